"""`mixmix data` and `mixmix zoo`, end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recipes import zoo
from tests.mixmix_cli.command import run


def test_data_export_is_what_onnxruntime_takes(
    capsys: pytest.CaptureFixture[str], images: Path, tmp_path: Path
) -> None:
    output = tmp_path / "calib.npz"
    words = ("data", "export", images, "--model", zoo.model_path("plain"), "-o", output)
    status, out, _ = run(capsys, *words, "--json")
    assert status == 0
    assert json.loads(out) == {
        "output": str(output), "key": "image", "shape": [8, 1, 28, 28], "dtype": "float32",
        "size_bytes": output.stat().st_size,
    }  # fmt: skip
    status, _, err = run(capsys, *words)
    assert status == 2
    assert "--force" in err
    assert run(capsys, *words, "--force", "-q")[0] == 0


def test_data_compare_tells_real_images_from_made_ones(capsys: pytest.CaptureFixture[str], images: Path) -> None:
    words = ("data", "compare", zoo.test_images_path(), images, "--model", zoo.model_path("plain"), "-n", "64")
    status, out, _ = run(capsys, *words, "--permutations", 99, "--json")
    document = json.loads(out)
    assert status == 0
    assert (document["a"]["images"], document["b"]["images"]) == (64, 8)
    assert 0.01 <= document["p_value"] <= 0.05
    assert document["a"]["distance_to_stored"] < document["b"]["distance_to_stored"]
    assert len(document["layers"]) == 6
    status, out, _ = run(capsys, *words)
    assert status == 0
    assert "they differ" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("data", "compare", "no/such", "no/such", "--model", "{model}"), "no/such does not exist"),
        (("data", "compare", "{test}", "{test}", "--model", "{model}", "-n", "2"), "at least 4"),
        (("data", "export", "{test}", "--model", "{model}", "-o", "no/folder/c.npz"), "no/folder is not a folder"),
        (("data", "export", "{test}", "--model", "no.onnx", "-o", "c.npz"), "no.onnx does not exist"),
        (("zoo", "show", "mixmix-residul"), "'mixmix-residual'"),
        (("zoo", "show", "mixmix", "no.onnx"), "not both"),
        (("zoo", "show", "mixmix", "embedded"), "name it alone"),
        (("zoo", "export", "embedded", "-o", "models", "--untrained"), "comes with its weights"),
        (("synth", "{model}", "-o", "data", "--set", "models=[]"), "models cannot be"),
        (("zoo", "show", "no.onnx"), "no.onnx does not exist"),
        (("zoo", "export", "resnet", "-o", "models"), "there is no zoo 'resnet'"),
        (("zoo", "export", "embeded", "-o", "models"), "(the nearest is 'embedded')"),
    ],
)
def test_bad_input_of_data_and_zoo(
    words: tuple[str, ...],
    said: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    paths = {"model": zoo.model_path("plain"), "test": zoo.test_images_path()}
    status, out, err = run(capsys, *(word.format(**paths) for word in words))
    assert (status, out) == (2, "")
    assert said in err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_zoo_list_and_show(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "zoo", "list", "--json")
    assert status == 0
    listed = {row["name"]: row["models"] for row in json.loads(out)}
    assert listed == {"mixmix": 21, "mixmix-mobile": 3, "mixmix-residual": 3, "embedded": 6}
    assert "mixmix-mobile" in run(capsys, "zoo", "list")[1]
    document = json.loads(run(capsys, "zoo", "show", "mixmix-mobile", "--json")[1])
    assert document["members"][0] == {
        "paper": "MobileNetV2", "accuracy": 0.7315, "library": "torchvision", "model": "mobilenet_v2",
        "instead": None, "installed": True,
    }  # fmt: skip
    assert "torchvision/mnasnet1_0" in run(capsys, "zoo", "show", "mixmix-mobile")[1]


def test_zoo_show_says_how_many_models_the_theory_asks_for(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "zoo", "show", zoo.model_path("dense"), zoo.model_path("plain"), "--json")
    document = json.loads(out)
    assert status == 0
    assert [model["width"] for model in document["models"]] == [10976, 12544]
    assert document["theory"] == {"dimension": 784, "width": 10976, "models_needed": 1, "models": 2}


def test_zoo_export_reports_what_failed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from recipes import libraries

    monkeypatch.setattr(libraries, "is_installed", lambda _: False)
    status, out, err = run(capsys, "zoo", "export", "mixmix-mobile", "-o", tmp_path, "--untrained", "--json")
    assert status == 2
    assert sorted(json.loads(out)["failed"]) == ["mnasnet1_0.onnx", "mobilenet_v2.onnx", "mobilenet_v3_large.onnx"]
    assert "pip install torchvision" in err


def test_zoo_export_copies_the_embedded_models(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    models = tmp_path / "models"
    status, out, _ = run(capsys, "zoo", "export", "embedded", "-o", models, "--json")
    assert status == 0
    assert sorted(json.loads(out)["written"]) == sorted(str(models / f"{name}.onnx") for name in zoo.FAMILIES)
    assert (models / "plain.onnx").read_bytes() == zoo.model_path("plain").read_bytes()
    (models / "plain.onnx").write_bytes(b"of the user")
    status, out, err = run(capsys, "zoo", "export", "embedded", "-o", models, "--json")
    assert (status, len(json.loads(out)["kept"]), list(json.loads(out)["failed"])) == (2, 5, ["plain.onnx"])
    assert "pass --force to replace it" in err
    assert (models / "plain.onnx").read_bytes() == b"of the user"
    assert run(capsys, "zoo", "export", "embedded", "-o", models, "--force")[0] == 0
    assert (models / "plain.onnx").read_bytes() == zoo.model_path("plain").read_bytes()
