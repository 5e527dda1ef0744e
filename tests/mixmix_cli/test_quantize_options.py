"""`mixmix quantize`: targets, containers, budgets and widths as they are typed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import onnx
import pytest
from onnx import numpy_helper

from converters.conversion import to_torch
from converters.errors import ModelError
from converters.load import load_classifier
from converters.targets import TARGETS, WEIGHT_CONTAINERS, WIDE
from mixmix_cli import layers, options, results
from mixmix_cli.__main__ import main
from mixmix_cli.commands import quantize
from recipes import pipeline, zoo
from recipes.quantize.settings import PACKAGE
from recipes.settings import recipe_names

DATA = ("--data", str(zoo.calibration_images_path()), "-n", "8", "--method", "nearest")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of one call."""
    status = main(["quantize", *(str(argument) for argument in arguments), *DATA])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(zoo.model_path("residual").read_bytes())
    return path


def test_a_file_for_integer_kernels(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    status, out, _ = run(capsys, "--bits", 4, "--act-bits", 8, "--target", "ort-cpu", model, "--json")
    document = json.loads(out)
    fusion = document["fusion"]
    assert status == 0
    assert document["output"] == str(model.with_name("model.w4a8.onnx"))
    assert fusion["counted"] == fusion["forecast"] == fusion["layers"] == len(document["layers"])
    assert fusion["operators"]["QLinearConv"] > 0
    assert {4, 7} <= {layer["bits"] for layer in document["layers"]} <= {4, 6, 7}


def test_what_runs_in_integers_is_said(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    _, out, _ = run(capsys, "--bits", 8, "--act-bits", 8, "--target", "ort-cpu", model)
    words = " ".join(out.split())
    assert "layers run in integers in onnxruntime on this machine" in words
    assert re.search(
        r"layers have other bits than 8: 7 bits for .* more \(8 bits saturate on processors without VNNI\)", words
    )
    assert words.count("7 bits") == 1  # one reason, once


def test_what_will_run_in_integers_is_said_before(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    """And what keeps layers out of it; afterwards it is counted."""
    _, out, err = run(capsys, "--bits", 4, "--act-bits", 8, model)
    said, counted = " ".join(err.split()), " ".join(out.split())
    assert re.search(
        r"forecast: \d+ of \d+ layers will run in integers .*; \d+ will not: weights are stored in 4", said
    )
    assert re.search(r"\d+ of \d+ layers run in integers in onnxruntime on this machine", counted)


def test_why_a_file_is_slower_is_said(
    capsys: pytest.CaptureFixture[str], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the clock says here: 4-bit weights are unpacked at every run."""
    monkeypatch.setattr(results, "SLOWER", 0.0)
    _, out, err = run(capsys, "--bits", 4, model, "--json")
    reason = json.loads(out)["slower_because"]
    assert reason.startswith("integers are turned back into float on every run; with --act-bits 8 --target ort-cpu")
    assert f"times as slow as the float one here: {reason}" in " ".join(err.split())
    monkeypatch.setattr(results, "SLOWER", 1e9)
    _, out, err = run(capsys, "--bits", 4, model, "--json", "--force")
    assert json.loads(out)["slower_because"] is None
    assert "as slow as" not in err


def test_the_account_of_layers_in_json(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    """What each costs, as the written file has it, those that hurt most first."""
    _, out, _ = run(capsys, "--bits", 4, "--act-bits", 8, model, "--json")
    document = json.loads(out)
    found = document["validation"]["candidates"][0]["layers"]
    planned = {layer["name"]: layer for layer in document["layers"]}
    assert {layer["name"] for layer in found} == planned.keys()
    assert [layer["own_snr_db"] for layer in found] == sorted(layer["own_snr_db"] for layer in found)
    initializers = {tensor.name: tensor for tensor in onnx.load(document["output"]).graph.initializer}
    scales = [numpy_helper.to_array(t) for name, t in initializers.items() if name.endswith("scale")]
    for layer in found:
        assert layer["bits"] <= planned[layer["name"]]["bits"] <= {"int4": 4, "int8": 8}[layer["container"]]
        low, high = layer["scale"]
        assert any(low == scale.min() and high == scale.max() for scale in scales)
        assert layer["act_scale"][0] == layer["act_scale"][1] > 0
        assert layer["snr_db"] > 0


def test_the_account_of_layers_on_the_screen(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    """The worst of them; -v shows all."""
    _, out, _ = run(capsys, "--bits", 4, model)
    count = len(to_torch(load_classifier(model)).layers())
    assert out.count(" Conv ") + out.count(" Gemm ") == layers.WORST < count
    assert f"all {count} layers and their scales with -v" in out
    _, out, _ = run(capsys, "--bits", 4, model, "-v", "--force")
    assert out.count(" Conv ") + out.count(" Gemm ") == count
    assert "with -v" not in out


def test_layers_are_not_compared_where_a_file_takes_many_images_at_once(
    capsys: pytest.CaptureFixture[str], model: Path
) -> None:
    """All values of all layers of a batch would be in memory together."""
    proto = onnx.load(model)
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 16
    onnx.save(proto, model)
    status, out, err = run(capsys, "--bits", 8, model, "--json")
    assert status == 0
    assert json.loads(out)["validation"]["candidates"][0]["layers"] is None
    assert "takes 16 images at once" in " ".join(err.split())
    assert "mixmix validate --layers" in " ".join(err.split())


def test_layers_that_cannot_be_compared_cost_nothing(
    capsys: pytest.CaptureFixture[str], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is there and proved."""

    def fails(*_: object) -> None:
        raise ModelError("no such value")

    monkeypatch.setattr(pipeline, "compare_layers", fails)
    status, out, err = run(capsys, "--bits", 8, model)
    assert status == 0
    assert "layers are not compared: no such value" in err
    assert "model.w8.onnx" in out
    assert model.with_name("model.w8.onnx").is_file()


def test_without_a_target_nothing_is_said_of_integers(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    status, out, _ = run(capsys, "--bits", 4, model, "--json")
    assert status == 0
    assert json.loads(out)["fusion"] is None


def test_a_budget(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    status, out, _ = run(capsys, "--mixed", "size=100kB", model, "--json")
    document = json.loads(out)
    assert status == 0
    assert document["output"] == str(model.with_name("model.mixed.onnx"))
    assert document["bits"] is None
    assert document["size_bytes"]["after"] <= 100_000
    spent = document["size_bytes"]["after"]
    assert document["budget"] == {"kind": "size", "allowed": 100_000, "spent": spent, "binds": True}
    assert sum(layer["weights"] for layer in document["layers"]) == 93_744
    assert len({layer["bits"] for layer in document["layers"]}) > 1
    assert json.loads(metadata(Path(document["output"]))["mixmix.quantize"])["bits"] == "size=100000B"


def metadata(path: Path) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


def test_a_budget_on_the_screen(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    _, out, _ = run(capsys, "--mixed", "bits=3", model)
    words = " ".join(out.split())
    assert re.search(r" (2\.9|3\.0)\d of 3 bits a weight on average: .*layers? at 3 bits", words)


def test_a_budget_that_does_not_bind_is_said(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    _, out, _ = run(capsys, "--mixed", "bits=8", model)
    words = " ".join(out.split())
    all_of_it = r"8\.00 of 8 bits a weight on average \(more would change nothing\): \d+ layers at 8 bits"
    assert re.search(all_of_it, words)


def test_two_bits_in_two_bits(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    status, out, _ = run(capsys, "--bits", 2, "--weight-container", "int2", model, "--json")
    document = json.loads(out)
    assert status == 0
    kinds = {tensor.data_type for tensor in onnx.load(document["output"]).graph.initializer}
    assert onnx.TensorProto.INT2 in kinds


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "give either --bits or --mixed"),
        (("--bits", 4, "--mixed", "bits=3"), "give either --bits or --mixed"),
        (("--mixed", "small"), "--mixed 'small' is not a budget: write size=2MB, bops=1.5G or bits=3"),
        (("--mixed", "size=1kB"), "--mixed size=1000B cannot be reached: with 4 bits everywhere it is size="),
        (("--bits", 4, "--act-bits", 9), "--act-bits"),
        (
            ("--bits", 4, "--act-bits", 16, "--target", "tensorrt"),
            "--act-bits 16 cannot be used with --target tensorrt",
        ),
        (("--bits", 2, "--act-bits", 8, "--weight-container", "int2"), "int2 cannot be used with --act-bits"),
        (("--bits", 4, "--target", "coreml"), "coreml"),
        (("--bits", 4, "--act-bits", 4, "--target", "tensorrt"), "--target tensorrt, which runs 8 bits"),
        (("--mixed", "bits=9"), "weights have up to 8 bits: allow fewer"),
        (("--bits", 4, "--zoo", "a.onnx"), "--zoo makes images, and --data gives them: leave one out"),
    ],
)
def test_bad_words(capsys: pytest.CaptureFixture[str], model: Path, words: tuple[object, ...], sentence: str) -> None:
    status, out, err = run(capsys, *words, model)
    assert status == 2
    assert sentence in " ".join(err.split())
    assert not out
    assert list(model.parent.iterdir()) == [model]


def test_one_bad_model_does_not_hide_the_others(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
) -> None:
    bad = [tmp_path / "a.onnx", tmp_path / "b.onnx"]
    for path in bad:
        path.write_text("not a model")
    assert main(["inspect", str(bad[0]), str(model), str(bad[1]), "--json"]) == 2
    captured = capsys.readouterr()
    assert [result["path"] for result in json.loads(captured.out)] == [str(model)]
    assert all(str(path) in captured.err for path in bad)


def test_what_is_offered_is_what_there_is() -> None:
    """The command names targets, containers and methods without loading what defines them."""
    assert set(options.TARGETS) == set(TARGETS)
    assert set(quantize.CONTAINERS) == set(WEIGHT_CONTAINERS)
    assert set(quantize.METHODS) == set(recipe_names(PACKAGE))
    assert options.WIDE == WIDE
