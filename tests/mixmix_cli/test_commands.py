"""The real command, end to end: results, JSON keys, exit statuses, and one clear sentence for bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from mixmix_cli.__main__ import main
from mixmix_cli.cli import COMMANDS, cli
from recipes import zoo
from tests import models

TINY = ("--set", 'stages=[{"scale":0.5,"steps":4},{"scale":1.0,"steps":4}]', "--batch", "8")
FEW = ("--set", "steps=6")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of one call."""
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight synthesized images, made by the command."""
    directory = tmp_path_factory.mktemp("synth") / "data"
    models = [str(zoo.model_path(name)) for name in ("inverted", "plain")]
    assert main(["synth", *models, "-o", str(directory), "-n", "8", *TINY]) == 0
    return directory


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the target, so that outputs beside it do not touch the zoo."""
    path = tmp_path / "model.onnx"
    path.write_bytes(zoo.model_path("inverted").read_bytes())
    return path


def test_help_and_version_answer_at_once() -> None:
    """Half a second each on two busy cores, and neither torch nor onnx is loaded."""
    for arguments in (
        ["--help"],
        ["--version"],
        ["quantize", "--help"],
        ["quantize"],
        ["quantize", "--bits", "9", "m.onnx"],
    ):
        code = (
            "import sys; from mixmix_cli.__main__ import main; main(sys.argv[1:]);"
            "heavy = {'torch', 'onnx', 'onnxruntime', 'numpy'} & set(sys.modules); sys.exit(50 if heavy else 0)"
        )
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        assert time.perf_counter() - started < 2


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_an_example_and_a_readme_entry(name: str) -> None:
    result = CliRunner().invoke(cli, [name, "--help"])
    assert result.exit_code == 0
    assert f"Example: mixmix {name}" in result.output
    readme = (Path(__file__).parent.parent.parent / "README.md").read_text()
    assert f"mixmix {name}" in readme


def test_synth_writes_what_the_contract_says(images: Path) -> None:
    rows = [json.loads(line) for line in (images / "metadata.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    assert {"file_name", "label", "shard", "seed"} <= rows[0].keys()
    assert all((images / row["file_name"]).is_file() for row in rows)
    manifest = json.loads((images / "manifest.json").read_text())
    assert manifest["finished"] is True
    assert [m["name"] for m in manifest["identity"]["models"]] == ["inverted", "plain"]
    assert (images / "preview.png").is_file()


def test_synth_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, out, _ = run(capsys, "synth", zoo.model_path("plain"), "-o", tmp_path / "d", "-n", 4, *TINY, "--json")
    document = json.loads(out)
    assert status == 0
    assert document["images"] == 4
    assert document["models"] == ["plain"]
    assert set(document) >= {"dir", "images", "seconds", "seconds_per_image", "models", "final"}


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
    assert "first layer" in out
    assert model.with_name("model.w4.onnx").is_file()
    assert "made from the models" in err
    pictures = model.with_name("model.images") / "images"
    before = {path: path.stat().st_mtime_ns for path in pictures.rglob("*.png")}
    assert len(before) == 8
    assert run(capsys, "quantize", "--bits", 2, model, *quick)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in pictures.rglob("*.png")} == before
    status, _, err = run(capsys, "quantize", "--bits", 3, model, "-n", 4, *quick)
    assert status == 2
    assert "--force" in err
    assert run(capsys, "quantize", "--bits", 3, model, "-n", 4, *quick, "--force")[0] == 0
    assert len(list(pictures.rglob("*.png"))) == 4


def test_a_batch_fixed_in_the_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model, data = models.write(models.conv(image=(4, 3, 8, 8)), tmp_path / "m.onnx"), tmp_path / "d.npz"
    np.savez(data, images=np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3)).astype(np.uint8))
    status, out, _ = run(capsys, "quantize", "--bits", 4, model, "--data", data, *FEW, "--json")
    assert status == 0
    assert json.loads(out)["validation"]["images"] == 6


def test_a_folded_model_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """No statistics, no zoo, no images: they are shaped by the model's labels, and the manifest says so."""
    model = tmp_path / "folded.onnx"
    model.write_bytes(zoo.model_path("inverted_folded").read_bytes())
    status, _, err = run(capsys, "quantize", "--bits", 4, model, "-n", 8, "--effort", "fast", *FEW)
    assert status == 0
    assert "recipe labels" in err
    assert model.with_name("folded.w4.onnx").is_file()
    identity = json.loads((tmp_path / "folded.images" / "manifest.json").read_text())["identity"]
    assert identity["recipe"] == "labels"
    status, out, _ = run(capsys, "synth", model, "-o", tmp_path / "d", "-n", 4, "--steps", 8, "--json")
    assert status == 0
    assert list(json.loads(out)["final"]) == ["label/folded"]


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


def test_traceback_keeps_the_exit_status(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, _, err = run(capsys, "inspect", tmp_path / "no.onnx", "--traceback")
    assert status == 2
    assert "Traceback" in err
    assert "does not exist" in err


def test_quantize_max_drop_is_a_gate(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    status, _, _ = run(
        capsys, "quantize", "--bits", 2, model, "--data", zoo.calibration_images_path(), "-n", 64,
        "--method", "nearest", "--max-drop", 0.01,
    )  # fmt: skip
    assert status == 1
    assert model.with_name("model.w2.onnx").is_file()


def test_prune_writes_the_contract(capsys: pytest.CaptureFixture[str], model: Path, images: Path) -> None:
    few = ("--data", images, "--set", "mask_steps=3", "--set", "steps=3")
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
    few = ("--data", images, "--set", "mask_steps=3", "--set", "steps=3", "--effort", "fast", "--json")
    status, out, _ = run(capsys, "prune", model, "--sparsity", 0.6, "--bits", 4, *few)
    document = json.loads(out)
    assert status == 0
    assert document["bits"] == 4
    assert document["sparsity"] > 0.59
    written = model.with_name("model.s60.w4.onnx")
    assert [path.name for path in model.parent.glob("*.onnx")] in (
        ["model.onnx", written.name], [written.name, "model.onnx"],
    )  # fmt: skip
    facts = {entry.key: entry.value for entry in onnx.load(written).metadata_props}
    assert json.loads(facts["mixmix.prune"])["sparsity"] == 0.6
    assert json.loads(facts["mixmix.quantize"])["bits"] == 4
    document = json.loads(run(capsys, "inspect", written, "--json")[1])
    assert document[0]["sparsity"] > 0.59


def test_prune_channels_and_bits(capsys: pytest.CaptureFixture[str], model: Path, images: Path) -> None:
    few = ("--data", images, "--set", "steps=3", "--set", "mask_steps=0", "--effort", "fast", "--json")
    status, out, _ = run(capsys, "prune", model, "--pattern", "channel", "--macs", 0.6, *few)
    document = json.loads(out)
    assert status == 0
    assert document["output"] == str(model.with_name("model.c40.onnx"))
    macs = [json.loads(run(capsys, "inspect", p, "--json")[1])[0]["macs"] for p in (model, document["output"])]
    assert 0.56 < macs[1] / macs[0] <= 0.6
    assert document["size_bytes"]["after"] < 0.8 * document["size_bytes"]["before"]
    status, out, _ = run(capsys, "prune", model, "--pattern", "channel", "--sparsity", 0.4, "--bits", 4, *few)
    document = json.loads(out)
    assert status == 0
    assert document["output"] == str(model.with_name("model.c40.w4.onnx"))
    assert document["sparsity"] == pytest.approx(0.4, abs=0.02)
    assert document["bits"] == 4


def test_distill_writes_the_contract(capsys: pytest.CaptureFixture[str], model: Path, images: Path) -> None:
    few = ("--data", images, "--steps", 3, "--set", "batch=4")
    status, out, _ = run(capsys, "distill", zoo.model_path("plain"), model, *few, "--json")
    document = json.loads(out)
    assert status == 0
    assert (document["input"], document["output"]) == (str(model), str(model.with_name("model.distilled.onnx")))
    assert {"blocks", "layers", "size_bytes", "seconds", "sparsity", "validation"} <= document.keys()
    assert document["validation"]["reference"]["path"] == str(zoo.model_path("plain"))
    assert run(capsys, "distill", zoo.model_path("plain"), model, *few)[0] == 2
    assert run(capsys, "distill", zoo.model_path("plain"), model, *few, "--force")[0] == 0


def test_distill_makes_its_own_images(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    """From the teacher alone, beside the output, whatever is taught."""
    status, _, err = run(
        capsys, "distill", zoo.model_path("plain"), model, "-n", 8, "--effort", "fast", "--steps", 2,
        "--set", "batch=4",
    )  # fmt: skip
    assert status == 0
    assert "plain.images" in err
    assert (model.parent / "plain.images" / "manifest.json").is_file()


def test_distill_says_whom_input_options_are_for() -> None:
    text = " ".join(CliRunner().invoke(cli, ["distill", "--help"]).output.split())
    assert "holds for both models" in text
    assert "STUDENT.toml" in text


def test_inspect_checks_a_pattern(capsys: pytest.CaptureFixture[str], model: Path, images: Path) -> None:
    few = ("--data", images, "--set", "mask_steps=2", "--set", "steps=2", "-q")
    assert run(capsys, "prune", model, "--pattern", "2:4", *few)[0] == 0
    written = model.with_name("model.2of4.onnx")
    status, out, _ = run(capsys, "inspect", written, "--pattern", "2:4")
    assert status == 0
    assert "2:4: 14 of 21 layers have it" in out
    assert run(capsys, "inspect", written, "--pattern", "1:4")[0] == 1
    assert run(capsys, "inspect", model, "--pattern", "2:4")[0] == 1
    assert run(capsys, "inspect", written, model, "--pattern", "2:4")[0] == 1


def test_validate_gates(capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
    data = ("--data", zoo.calibration_images_path())
    status, out, _ = run(
        capsys, "validate", model, zoo.model_path("inverted_folded"), *data, "--max-drop", 0.0, "--json"
    )
    document = json.loads(out)
    assert status == 0
    assert document["labels"] == "real"
    candidate = document["candidates"][0]
    assert candidate["agreement"] == 1.0
    assert candidate["passed"] is True
    assert document["reference"]["top1"] > 0.9
    assert set(candidate) >= {"path", "top1", "top5", "agreement", "kl", "drop", "size_bytes", "latency_ms", "failed"}
    junit = tmp_path / "gates.xml"
    status, _, err = run(
        capsys, "validate", model, zoo.model_path("plain"), *data, "--min-agreement", 0.999, "--min-top1", 0.5,
        "--junit", junit, "--github",
    )  # fmt: skip
    assert status == 1
    assert "::error" in err
    assert 'failures="1"' in junit.read_text()


def test_validate_says_that_targets_are_not_truth(
    capsys: pytest.CaptureFixture[str], model: Path, images: Path
) -> None:
    status, out, _ = run(capsys, "validate", model, model, "--data", images)
    assert status == 0
    assert "not ground truth" in out


def test_inspect(capsys: pytest.CaptureFixture[str]) -> None:
    paths = [zoo.model_path(name) for name in ("inverted", "inverted_folded")]
    status, out, _ = run(capsys, "inspect", *paths, "--json")
    kept, folded = json.loads(out)
    assert status == 0
    assert kept["batchnorm"] == {"count": 20, "folded": 0}
    assert folded["batchnorm"] == {"count": 0, "folded": 20}
    assert kept["classes"] == 10
    assert kept["input"]["source"] == "metadata"
    assert kept["macs"] == 4622496  # counted by torch's flop counter on the module that was exported
    assert kept["can"]["synth"] is True
    assert folded["can"]["synth"] is True
    status, out, _ = run(capsys, "inspect", paths[0])
    assert status == 0
    assert "28x28 gray" in out


class TestBadInput:
    """One sentence on stderr, status 2, nothing left behind."""

    def refused(self, capsys: pytest.CaptureFixture[str], folder: Path, *arguments: object) -> str:
        before = sorted(folder.rglob("*"))
        status, out, err = run(capsys, *arguments)
        assert status == 2
        assert out == ""
        assert "Traceback" not in err
        assert len(err.strip().splitlines()) == 1 or err.startswith("Usage:")
        assert sorted(folder.rglob("*")) == before
        return err

    def test_missing_file(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        assert "does not exist" in self.refused(capsys, tmp_path, "quantize", "--bits", 4, tmp_path / "no.onnx")

    def test_truncated_file(self, capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
        model.write_bytes(model.read_bytes()[:100_000])
        assert "cut off" in self.refused(capsys, tmp_path, "inspect", model)

    def test_not_onnx(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        path = tmp_path / "notes.onnx"
        path.write_text("these are notes\n" * 100)
        assert "not an ONNX model" in self.refused(capsys, tmp_path, "synth", path, "-o", tmp_path / "d")

    def test_detector(self, capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
        proto = onnx.load(model)
        proto.graph.output.append(onnx.helper.make_tensor_value_info(proto.graph.node[0].output[0], 1, None))
        onnx.save(proto, model)
        assert "detector" in self.refused(capsys, tmp_path, "quantize", "--bits", 4, model)

    def test_unknown_operator(self, capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
        proto = onnx.load(model)
        proto.graph.node[2].op_type, proto.graph.node[2].domain = "Frobnicate", "com.example"
        del proto.graph.node[2].attribute[:]
        proto.opset_import.append(onnx.helper.make_opsetid("com.example", 1))
        onnx.save(proto, model)
        err = self.refused(capsys, tmp_path, "quantize", "--bits", 4, model)
        assert "Frobnicate" in err
        assert proto.graph.node[2].name in err

    def test_empty_data_folder(self, capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        err = self.refused(capsys, tmp_path, "quantize", "--bits", 4, model, "--data", tmp_path / "empty")
        assert "no images" in err

    def test_output_that_exists(self, capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
        model.with_name("model.w4.onnx").write_text("mine")
        err = self.refused(capsys, tmp_path, "quantize", "--bits", 4, model)
        assert "--force" in err
        assert model.with_name("model.w4.onnx").read_text() == "mine"

    def test_synth_output_that_exists(self, capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
        (tmp_path / "d").mkdir()
        (tmp_path / "d" / "mine.txt").write_text("mine")
        assert "not empty" in self.refused(capsys, tmp_path, "synth", model, "-o", tmp_path / "d")
        assert "remove it" in self.refused(capsys, tmp_path, "synth", model, "-o", tmp_path / "d", "--force")

    @pytest.mark.parametrize("bits", [1, 0, 9, -4])
    def test_bits(self, capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path, bits: int) -> None:
        assert f"'--bits': {bits}" in self.refused(capsys, tmp_path, "quantize", "--bits", bits, model)

    def test_nan_weights(self, capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
        proto = onnx.load(model)
        tensor = next(t for t in proto.graph.initializer if len(t.dims) == 4)
        array = onnx.numpy_helper.to_array(tensor).copy()
        array.flat[0] = np.nan
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
        onnx.save(proto, model)
        err = self.refused(capsys, tmp_path, "quantize", "--bits", 4, model)
        assert "NaN" in err
        assert tensor.name in err

    def test_read_only_output_folder(self, capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
        """root may write anywhere but into the kernel's own file systems."""
        folder = Path("/sys/kernel") if os.geteuid() == 0 else tmp_path / "locked"
        if os.geteuid() != 0:
            folder.mkdir(mode=0o555)
        err = self.refused(capsys, tmp_path, "quantize", "--bits", 4, model, "-o", folder / "out.onnx")
        assert "cannot be written" in err
        err = self.refused(capsys, tmp_path, "synth", model, "-o", folder / "data", *TINY)
        assert "cannot be written" in err

    def test_model_without_statistics(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        folded = zoo.model_path("inverted_folded")
        err = self.refused(capsys, tmp_path, "synth", folded, "-o", tmp_path / "d", "--recipe", "default")
        assert "BatchNorm" in err

    def test_output_that_is_the_model_itself(
        self, capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
    ) -> None:
        before = model.read_bytes()
        err = self.refused(capsys, tmp_path, "quantize", "--bits", 4, model, "-o", model, "--force")
        assert "the model itself" in err
        assert model.read_bytes() == before

    def test_output_that_is_a_folder(self, capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
        err = self.refused(capsys, tmp_path, "quantize", "--bits", 4, model, "-o", tmp_path, "--force")
        assert "is a folder" in err

    def test_max_drop_without_data(self, capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
        err = self.refused(capsys, tmp_path, "quantize", "--bits", 4, model, "--max-drop", 0.1)
        assert "--data" in err

    @pytest.mark.parametrize("label", [-1, 10])
    def test_labels_of_another_task(
        self, capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path, label: int
    ) -> None:
        data = tmp_path / "d.npz"
        np.savez(data, images=np.zeros((2, 28, 28, 1), np.uint8), labels=np.array([0, label]))
        command = ("quantize", "--bits", 4, model, "--data", data, "--method", "nearest")
        assert f"label {label}" in self.refused(capsys, tmp_path, *command, "--max-drop", 0.1)
        status, out, err = run(capsys, *command, "--json")  # without a gate nobody needs them
        assert status == 0
        assert f"label {label}" in err
        assert json.loads(out)["validation"]["labels"] == "none"

    @pytest.mark.parametrize("size", ["0", "-5", "12x0", "wide"])
    def test_size(self, capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path, size: str) -> None:
        assert "is not a size" in self.refused(capsys, tmp_path, "synth", model, "-o", tmp_path / "d", f"--size={size}")

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            ((), "give --sparsity"),
            (("--sparsity", "0"), "above 0 and below 1"),
            (("--sparsity", "1"), "above 0 and below 1"),
            (("--sparsity", "nan"), "above 0 and below 1"),
            (("--sparsity", "50"), "above 0 and below 1"),
            (("--pattern", "4:2"), "not a pattern"),
            (("--pattern", "0:4"), "not a pattern"),
            (("--pattern", "blocks"), "not a pattern"),
            (("--pattern", "2:4", "--sparsity", "0.7"), "leave --sparsity out"),
            (("--pattern", "channel"), "give --sparsity"),
            (("--macs", "0.5"), "use --pattern channel"),
            (("--pattern", "channel", "--macs", "0.5", "--sparsity", "0.5"), "leave one of them out"),
            (("--pattern", "channel", "--macs", "0"), "above 0 and below 1"),
            (("--pattern", "channel", "--macs", "1.5"), "above 0 and below 1"),
            (("--pattern", "channel", "--macs", "0.001"), "ask for less"),
            (("--pattern", "1:7"), "choose another pattern"),
            (("--sparsity", "0.99"), "cannot be reached"),
            (("--sparsity", "0.99", "--set", "allocation=uniform"), "ask for less"),
            (("--sparsity", "0.99", "--set", "allocation=global"), "cannot be reached"),
            (("--sparsity", "0.5", "--set", "allocation=fair"), "allocation cannot be"),
            (("--sparsity", "0.5", "--recipe", "two-stag"), "'two-stage'"),
            (("--sparsity", "0.5", "-o", "no/folder/m.onnx"), "no/folder is not a folder"),
            (("--sparsity", "0.5", "--max-drop", "0.1"), "real labels"),
        ],
    )
    def test_prune(
        self, capsys: pytest.CaptureFixture[str], model: Path, images: Path, tmp_path: Path,
        words: tuple[str, ...], said: str,
    ) -> None:  # fmt: skip
        assert said in self.refused(capsys, tmp_path, "prune", model, "--data", images, *words)

    def test_prune_of_a_quantized_model(
        self, capsys: pytest.CaptureFixture[str], model: Path, images: Path, tmp_path: Path
    ) -> None:
        assert run(capsys, "quantize", model, "--bits", 4, "--data", images, "--method", "nearest")[0] == 0
        quantized = model.with_name("model.w4.onnx")
        err = self.refused(capsys, tmp_path, "prune", quantized, "--sparsity", "0.5", "--data", images)
        assert "quantized already" in err

    def test_distill(self, capsys: pytest.CaptureFixture[str], model: Path, images: Path, tmp_path: Path) -> None:
        teacher, data = zoo.model_path("plain"), ("--data", images)
        assert "Missing argument" in self.refused(capsys, tmp_path, "distill", teacher)
        assert "no.onnx does not exist" in self.refused(capsys, tmp_path, "distill", teacher, "no.onnx", *data)
        assert "the model itself" in self.refused(capsys, tmp_path, "distill", teacher, model, *data, "-o", model)
        assert "'default'" in self.refused(capsys, tmp_path, "distill", teacher, model, *data, "--recipe", "defalt")
        assert "'mixing'" in self.refused(capsys, tmp_path, "distill", teacher, model, *data, "--set", "mixin=1")
        assert run(capsys, "quantize", model, "--bits", 4, *data, "--method", "nearest")[0] == 0
        quantized = model.with_name("model.w4.onnx")
        assert "quantized already" in self.refused(capsys, tmp_path, "distill", teacher, quantized, *data)

    def test_a_pattern_to_inspect(self, capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
        assert "not a pattern" in self.refused(capsys, tmp_path, "inspect", model, "--pattern", "half")

    def test_misspelt_setting(self, capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
        err = self.refused(capsys, tmp_path, "quantize", "--bits", 4, model, "--set", "stepps=3")
        assert "'steps'" in err

    def test_accuracy_gate_without_labels(
        self, capsys: pytest.CaptureFixture[str], model: Path, images: Path, tmp_path: Path
    ) -> None:
        err = self.refused(capsys, tmp_path, "validate", model, model, "--data", images, "--max-drop", 0.1)
        assert "real labels" in err


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
        (("zoo", "export", "embedded", "-o", "models"), "in files already"),
        (("synth", "{model}", "-o", "data", "--set", "models=[]"), "models cannot be"),
        (("zoo", "show", "no.onnx"), "no.onnx does not exist"),
        (("zoo", "export", "resnet", "-o", "models"), "there is no zoo 'resnet'"),
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
