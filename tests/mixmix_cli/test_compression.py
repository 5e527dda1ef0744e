"""`mixmix quantize`, `prune` and `distill`, end to end: the files, the JSON keys, the exit statuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from mixmix_cli.cli import cli
from recipes import zoo
from tests import models
from tests.mixmix_cli.command import BRIEFLY, FEW, run


def test_quantize_json_and_file(capsys: pytest.CaptureFixture[str], images: Path, model: Path) -> None:
    status, out, _ = run(capsys, "quantize", "--bits", 4, model, "--data", images, *FEW, "--json")
    document = json.loads(out)
    assert status == 0
    assert document["output"] == str(model.with_name("model.w4.onnx"))
    assert set(document) >= {"input", "bits", "act_bits", "sparsity", "blocks", "layers", "size_bytes", "seconds"}
    assert set(document["layers"][0]) >= {"name", "bits", "act_bits", "sparsity", "error"}
    assert document["validation"]["labels"] == "targets"
    assert document["validation"]["candidates"][0]["top1"] is None
    written = onnx.load(document["output"])
    types = {tensor.data_type for tensor in written.graph.initializer}
    assert {onnx.TensorProto.INT4, onnx.TensorProto.INT8} <= types
    assert {entry.key for entry in written.metadata_props} >= {"mixmix.input.size", "mixmix.quantize"}


def test_quantize_exactly_as_typed(
    capsys: pytest.CaptureFixture[str], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`mixmix quantize --bits 4 model.onnx`: images from the model itself, kept, and found again the second time."""
    recipe = model.with_name("tiny.toml")
    recipe.write_text('images = 8\nbatch = 8\nlabel = 0.0\nmixing = "none"\nstages = [{ scale = 1.0, steps = 5 }]\n')
    quick = (*FEW, "--synth-recipe", recipe)
    status, out, err = run(capsys, "quantize", "--bits", 4, model, *quick)
    assert status == 0
    assert "where more bits take the most noise out of the logits" in out
    assert model.with_name("model.w4.onnx").is_file()
    assert "made from the models" in err
    pictures = model.with_name("model.images") / "images"
    before = {path: path.stat().st_mtime_ns for path in pictures.rglob("*.png")}
    assert len(before) == 8
    assert run(capsys, "quantize", "--bits", 2, model, *quick)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in pictures.rglob("*.png")} == before
    status, _, err = run(capsys, "quantize", "--bits", 3, model, "--seed", 1, *quick)
    assert status == 2
    assert "--force" in err
    assert run(capsys, "quantize", "--bits", 3, model, "-n", 4, *quick)[0] == 0  # another number has its own folder
    assert len(list(model.with_name("model.images4").rglob("images/*/*.png"))) == 4
    assert {path: path.stat().st_mtime_ns for path in pictures.rglob("*.png")} == before
    assert run(capsys, "quantize", "--bits", 3, model, "--seed", 1, *quick, "--force")[0] == 0
    assert len(list(pictures.rglob("*.png"))) == 8


def test_a_batch_fixed_in_the_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model, data = models.write(models.conv(image=(4, 3, 8, 8)), tmp_path / "m.onnx"), tmp_path / "d.npz"
    np.savez(data, images=np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3)).astype(np.uint8))
    status, out, _ = run(capsys, "quantize", "--bits", 4, model, "--data", data, *FEW, "--json")
    assert status == 0
    assert json.loads(out)["validation"]["images"] == 6


def test_a_folded_model_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """No statistics, no zoo, no images: the model's labels and even channels shape them, and the manifest says so."""
    model = tmp_path / "folded.onnx"
    model.write_bytes(zoo.model_path("inverted_folded").read_bytes())
    status, _, err = run(capsys, "quantize", "--bits", 4, model, "-n", 8, "--effort", "fast", *FEW)
    assert status == 0
    assert "recipe small-labels" in err
    assert model.with_name("folded.w4.onnx").is_file()
    identity = json.loads((tmp_path / "folded.images8" / "manifest.json").read_text())["identity"]
    assert identity["recipe"] == "small-labels"
    status, out, _ = run(capsys, "synth", model, "-o", tmp_path / "d", "-n", 4, "--steps", 8, "--json")
    assert status == 0
    assert list(json.loads(out)["final"]) == ["unevenness/folded", "label/folded"]


def test_zoo_takes_what_a_glob_gives(capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
    """Several values behind one --zoo, before and after MODEL, all of them loaded."""
    a, b = (zoo.model_path(name) for name in ("plain", "residual"))
    missing = tmp_path / "missing.onnx"
    for words in (
        ("--zoo", a, b, missing, "--bits", 4, model),
        (model, "--bits", 4, "--zoo", a, b, missing),
        ("--bits", 4, "--zoo", a, b, missing, model),
        ("--zoo", a, "--zoo", b, "--zoo", missing, "--bits", 4, model),
    ):
        status, _, err = run(capsys, "quantize", *words)
        assert status == 2
        assert f"{missing} does not exist" in err


def test_quantize_max_drop_is_a_gate(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    status, out, _ = run(
        capsys, "quantize", "--bits", 2, model, "--data", zoo.calibration_images_path(), "-n", 64,
        "--method", "nearest", "--max-drop", 0.01,
    )  # fmt: skip
    assert status == 1
    assert f"{model.with_name('model.w2.onnx')} fails max-drop: drop 0." in out
    assert model.with_name("model.w2.onnx").is_file()


@pytest.mark.parametrize(("target", "expected"), [("portable", 1), ("tensorrt", 0)])
def test_kernels_of_this_machine_are_no_gate_for_a_file_that_is_for_others(
    target: str, expected: int, capsys: pytest.CaptureFixture[str], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recipes.validate.FUSION_SHARE", -1.0)  # nothing passes
    monkeypatch.setattr("recipes.validate.FUSION_FLOOR", -1.0)
    status, out, err = run(
        capsys, "quantize", "--bits", 8, "--act-bits", 8, "--target", target, model, "-n", 16, "--method", "nearest",
        "--data", zoo.calibration_images_path(),
    )  # fmt: skip
    assert status == expected
    assert ("fails optimisations" in out) == bool(expected)
    assert (f"{target} has its own" in " ".join(err.split())) != bool(expected)


def test_prune_writes_the_contract(capsys: pytest.CaptureFixture[str], model: Path, images: Path) -> None:
    few = ("--data", images, *BRIEFLY)
    status, out, _ = run(capsys, "prune", model, "--sparsity", 0.5, *few, "--json")
    document = json.loads(out)
    assert status == 0
    assert document["output"] == str(model.with_name("model.s50.onnx"))
    assert (document["bits"], document["act_bits"]) == (None, None)
    assert document["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert {"input", "output", "blocks", "layers", "size_bytes", "seconds", "validation"} <= document.keys()
    assert {"name", "bits", "act_bits", "sparsity", "error"} <= document["layers"][0].keys()
    status, out, err = run(capsys, "prune", model, "--sparsity", 0.5, *few)
    assert (status, out) == (2, "")
    assert "--force" in err
    assert run(capsys, "prune", model, "--sparsity", 0.5, *few, "--force")[0] == 0


def test_prune_with_bits_writes_one_file_that_keeps_its_zeros(
    capsys: pytest.CaptureFixture[str], model: Path, images: Path
) -> None:
    few = ("--data", images, *BRIEFLY, "--effort", "fast", "--json")
    status, out, err = run(capsys, "prune", model, "--sparsity", 0.6, "--bits", 4, *few)
    document = json.loads(out)
    assert status == 0
    assert "stored in 8 bits" not in err
    assert document["bits"] == 4
    assert document["sparsity"] > 0.59
    written = model.with_name("model.s60.w4.onnx")
    assert [path.name for path in model.parent.glob("*.onnx")] in (
        ["model.onnx", written.name], [written.name, "model.onnx"],
    )  # fmt: skip
    facts = {entry.key: entry.value for entry in onnx.load(written).metadata_props}
    assert json.loads(facts["mixmix.prune"])["sparsity"] == 0.6
    assert json.loads(facts["mixmix.prune"])["settings"]["mask_steps"] == 2
    assert json.loads(facts["mixmix.quantize"])["bits"] == 4
    document = json.loads(run(capsys, "inspect", written, "--json")[1])
    assert document[0]["sparsity"] > 0.59


def test_prune_channels_and_bits(capsys: pytest.CaptureFixture[str], model: Path, images: Path) -> None:
    few = ("--data", images, "--set", "steps=3", "--set", "mask_steps=0", "--effort", "fast", "--json")
    status, out, _ = run(capsys, "prune", model, "--pattern", "channel", "--macs", 0.6, *few)
    document = json.loads(out)
    assert status == 0
    assert document["output"] == str(model.with_name("model.m40.onnx"))
    macs = [json.loads(run(capsys, "inspect", p, "--json")[1])[0]["macs"] for p in (model, document["output"])]
    assert 0.56 < macs[1] / macs[0] <= 0.6
    assert document["macs_left"] == pytest.approx(macs[1] / macs[0], abs=1e-3)
    assert document["size_bytes"]["after"] < 0.8 * document["size_bytes"]["before"]
    status, out, _ = run(capsys, "prune", model, "--pattern", "channel", "--sparsity", 0.4, "--bits", 4, *few)
    document = json.loads(out)
    assert status == 0
    assert document["output"] == str(model.with_name("model.c40.w4.onnx"))
    assert document["sparsity"] == pytest.approx(0.4, abs=0.02)
    assert document["bits"] == 4
    assert document["macs_left"] < 0.8
    status, out, _ = run(capsys, "prune", model, "--pattern", "channel", "--macs", 0.7, *few[:-1])
    assert status == 0
    assert "of the multiplications" in out


def test_what_is_said_of_a_file_that_is_of_no_use(
    capsys: pytest.CaptureFixture[str], model: Path, images: Path
) -> None:
    ruined = ("--method", "one-shot", "--set", "allocation=uniform")
    status, _, err = run(capsys, "prune", model, "--sparsity", 0.9, *ruined, "--data", images, "-n", 10**6)
    assert status == 0
    assert "of the images: take less out of it" in err
    assert f"{images} has" in err
    assert "all of them are used" in err


def test_pruning_what_is_pruned_already(capsys: pytest.CaptureFixture[str], model: Path, images: Path) -> None:
    few = ("--data", images, "--method", "one-shot", "--set", "allocation=uniform")
    assert "nothing to remove" not in run(capsys, "prune", model, "--sparsity", 0.5, *few)[2]
    pruned = model.with_name("model.s50.onnx")
    assert "nothing to remove" in run(capsys, "prune", pruned, "--sparsity", 0.3, *few)[2]
    assert "nothing to remove" not in run(capsys, "prune", pruned, "--sparsity", 0.6, *few)[2]


def test_bits_that_are_stored_in_more(capsys: pytest.CaptureFixture[str], model: Path, images: Path) -> None:
    few = ("--data", images, "--effort", "fast", *BRIEFLY)
    _, _, err = run(capsys, "prune", model, "--sparsity", 0.5, "--bits", 4, "--target", "tensorrt", *few)
    assert "stored in 8 bits for tensorrt" in err
    assert "not of tensorrt" in err


def test_distill_writes_the_contract(capsys: pytest.CaptureFixture[str], model: Path, images: Path) -> None:
    few = ("--data", images, "--steps", 3, "--set", "batch=4")
    status, out, _ = run(capsys, "distill", zoo.model_path("plain"), model, *few, "--json")
    document = json.loads(out)
    assert status == 0
    assert (document["input"], document["output"]) == (str(model), str(model.with_name("model.distilled.onnx")))
    assert {"blocks", "layers", "size_bytes", "seconds", "sparsity", "validation"} <= document.keys()
    assert document["validation"]["reference"]["path"] == str(zoo.model_path("plain"))
    (before,) = document["validation"]["beside"]
    assert (before["path"], "passed" in before) == (str(model), False)
    assert document["validation"]["candidates"][0]["gates"]
    assert run(capsys, "distill", zoo.model_path("plain"), model, *few)[0] == 2
    assert run(capsys, "distill", zoo.model_path("plain"), model, *few, "--force")[0] == 0


def test_prune_and_quantize_for_a_target(capsys: pytest.CaptureFixture[str], model: Path, images: Path) -> None:
    """2:4 in as few layers as a fifth of the weights needs, 8 bits throughout, symmetric as TensorRT takes it."""
    few = ("--data", images, *BRIEFLY, "--effort", "fast")
    words = ("--pattern", "2:4", "--sparsity", 0.2, "--bits", 8, "--act-bits", 8, "--target", "tensorrt")
    status, out, _ = run(capsys, "prune", model, *words, *few, "--json")
    document = json.loads(out)
    written = model.with_name("model.2of4.s20.w8a8.onnx")
    assert status == 0
    assert (document["output"], document["bits"], document["act_bits"]) == (str(written), 8, 8)
    assert document["sparsity"] >= 0.2
    assert {0.5} < {round(layer["sparsity"], 1) for layer in document["layers"]}
    zeros = {node.input[2]: node.op_type for node in onnx.load(written).graph.node if node.op_type == "QuantizeLinear"}
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(written).graph.initializer}
    assert zeros
    assert all(tensors[name].dtype == np.int8 and not tensors[name].any() for name in zeros)


@pytest.mark.parametrize("count", [("-n", 6), ("--set", "images=6"), ("-n", 6, "--set", "images=9")])
def test_distill_makes_its_own_images(
    count: tuple[str | int, ...], capsys: pytest.CaptureFixture[str], model: Path
) -> None:
    """From the teacher alone, beside the output, whatever is taught; as many as the recipe says, or -n."""
    status, _, err = run(
        capsys, "distill", zoo.model_path("plain"), model, *count, "--effort", "fast", "--steps", 2, "--set", "batch=4"
    )
    assert status == 0
    assert "plain.images6" in err
    assert len(list((model.parent / "plain.images6" / "images").rglob("*.png"))) == 6


def test_distill_says_whom_input_options_are_for() -> None:
    text = " ".join(CliRunner().invoke(cli, ["distill", "--help"]).output.split())
    assert "holds for both models" in text
    assert "STUDENT.toml" in text
