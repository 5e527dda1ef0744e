"""Bad input: one clear sentence, exit status 2, and nothing left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from converters.errors import OutputError
from converters.outputs import ensure_writable
from recipes import zoo
from tests.mixmix_cli.command import TINY, run


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

    @pytest.mark.parametrize("command", ["quantize", "validate", "data"])
    def test_parts_and_parents_of_a_set(
        self, capsys: pytest.CaptureFixture[str], model: Path, images: Path, tmp_path: Path, command: str
    ) -> None:
        """Their labels are targets, and their previews no images."""
        words: dict[str, tuple[object, ...]] = {
            "quantize": ("quantize", "--bits", 4, model),
            "validate": ("validate", model, model),
            "data": ("data", "export", "--model", model, "-o", tmp_path / "x.npz"),
        }
        link = tmp_path / "sets"
        link.mkdir()
        (link / "one").symlink_to(images)
        data = () if command == "data" else ("--data",)
        for part in (images / "images", images / "images" / "00000"):
            err = self.refused(capsys, tmp_path, *words[command], *data, part)
            assert f"a part of what synth wrote to {images.resolve()}: name that folder" in err
        assert "holds what synth wrote (one): name one of" in self.refused(
            capsys, tmp_path, *words[command], *data, link
        )

    def test_output_that_exists(self, capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
        model.with_name("model.w4.onnx").write_text("mine")
        err = self.refused(capsys, tmp_path, "quantize", "--bits", 4, model)
        assert "--force" in err
        assert model.with_name("model.w4.onnx").read_text() == "mine"

    def test_synth_output_that_exists(self, capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
        (tmp_path / "d").mkdir()
        (tmp_path / "d" / "mine.txt").write_text("mine")
        assert "not empty" in self.refused(capsys, tmp_path, "synth", model, "-o", tmp_path / "d")
        for more in ((), ("--resume",), ("--force",)):
            err = self.refused(capsys, tmp_path, "synth", model, "-o", tmp_path / "d", *more)
            assert "not a set that synth wrote: choose another folder" in err

    def test_synth_writes_no_file(self, capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("mine")
        for name in ("data.npz", "notes.txt"):
            for more in ((), ("--force",)):
                err = self.refused(capsys, tmp_path, "synth", model, "-o", tmp_path / name, *more)
                assert "not a folder" in err
                assert "mixmix data export" in err
                assert "--force" not in err

    @pytest.mark.parametrize("name", ["x.txt", "x", "there.txt"])
    def test_data_export_writes_npz(
        self, capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path, name: str
    ) -> None:
        (tmp_path / "there.txt").write_text("mine")
        words = ("data", "export", zoo.test_images_path(), "--model", model, "-o", tmp_path / name)
        for more in ((), ("--force",)):
            assert "does not end in .npz" in self.refused(capsys, tmp_path, *words, *more)

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
        err = self.refused(capsys, tmp_path, "synth", folded, "-o", tmp_path / "d", "--recipe", "single")
        assert "BatchNorm" in err

    def test_output_that_is_the_model_itself(
        self, capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
    ) -> None:
        before = model.read_bytes()
        err = self.refused(capsys, tmp_path, "quantize", "--bits", 4, model, "-o", model, "--force")
        assert "one of the inputs" in err
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
            (("--pattern", "2:4", "--sparsity", "0.7"), "leave it out for every layer"),
            (("--pattern", "2:4", "--sparsity", "0.4995"), "can remove at most 49."),
            (("--sparsity", "0.5", "--act-bits", "8"), "give --bits too"),
            (("--sparsity", "0.5", "--target", "tensorrt"), "give --bits too"),
            (("--sparsity", "0.5", "--bits", "4", "--act-bits", "9"), "is not 2 to 8, or 16"),
            (("--pattern", "channel"), "give --sparsity"),
            (("--macs", "0.5"), "use --pattern channel"),
            (("--pattern", "channel", "--macs", "0.5", "--sparsity", "0.5"), "leave one of them out"),
            (("--latency", "0.5"), "use --pattern channel"),
            (("--pattern", "channel", "--latency", "0.5", "--macs", "0.5"), "instead of --latency"),
            (("--pattern", "channel", "--latency", "nan"), "above 0 and below 1"),
            pytest.param(("--pattern", "channel", "--latency", "0.001"), "give --latency 0.", marks=pytest.mark.timing),
            (("--pattern", "channel", "--latency", "0.5", "--bits", "4"), "give --macs instead"),
            (("--pattern", "channel", "--macs", "0"), "above 0 and below 1"),
            (("--pattern", "channel", "--macs", "1.5"), "above 0 and below 1"),
            (("--pattern", "channel", "--macs", "0.001"), "give --macs 0."),
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
        assert "one of the inputs" in self.refused(capsys, tmp_path, "distill", teacher, model, *data, "-o", model)
        assert "'default'" in self.refused(capsys, tmp_path, "distill", teacher, model, *data, "--recipe", "defalt")
        assert "'mixing'" in self.refused(capsys, tmp_path, "distill", teacher, model, *data, "--set", "mixin=1")
        assert run(capsys, "quantize", model, "--bits", 4, *data, "--method", "nearest")[0] == 0
        quantized = model.with_name("model.w4.onnx")
        assert "quantized already" in self.refused(capsys, tmp_path, "distill", teacher, quantized, *data)

    def test_misspelt_setting(self, capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
        err = self.refused(capsys, tmp_path, "quantize", "--bits", 4, model, "--set", "stepps=3")
        assert "'steps'" in err

    def test_accuracy_gate_without_labels(
        self, capsys: pytest.CaptureFixture[str], model: Path, images: Path, tmp_path: Path
    ) -> None:
        err = self.refused(capsys, tmp_path, "validate", model, model, "--data", images, "--max-drop", 0.1)
        assert "real labels" in err


def external(location: str) -> bytes:
    """A model whose only tensor lies in another file."""
    tensor = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[2])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    model = onnx.helper.make_model(onnx.helper.make_graph([], "graph", [], [], [tensor]))
    return bytes(model.SerializeToString())


@pytest.mark.parametrize("location", ["w", "weights.bin", "data/weights.bin"])
def test_external_data_of_a_model_are_a_part_of_it(location: str, tmp_path: Path) -> None:
    model, weights = tmp_path / "model.onnx", tmp_path / location
    weights.parent.mkdir(exist_ok=True)
    for name in (weights, tmp_path / "m", tmp_path / "model", tmp_path / "graph"):
        name.touch()
    model.write_bytes(external(location))
    with pytest.raises(OutputError, match="a part of"):
        ensure_writable(weights, overwrite=True, inputs=[model])
    for name in ("m", "model", "graph"):
        ensure_writable(tmp_path / name, overwrite=True, inputs=[model])


def test_the_weights_of_a_large_output_are_no_part_of_an_input(tmp_path: Path) -> None:
    """Of a model that was renamed away from its data file, which a new file of its old name would replace."""
    model = tmp_path / "renamed.onnx"
    model.write_bytes(external("old.onnx.data"))
    ensure_writable(tmp_path / "old.onnx", overwrite=True, inputs=[model])
    (tmp_path / "old.onnx.data").touch()
    with pytest.raises(OutputError, match=r"old\.onnx\.data is a part of .*renamed\.onnx"):
        ensure_writable(tmp_path / "old.onnx", overwrite=True, inputs=[model])


def test_what_needs_no_torch_is_said_without_it(tmp_path: Path) -> None:
    """Importing torch takes seconds."""
    for name in ("m.onnx", "m.w4.onnx", "m.2of4.w4.onnx", "m.distilled.onnx", "there.npz", "there.xml"):
        (tmp_path / name).touch()
    (tmp_path / "images" / "0").mkdir(parents=True)
    for name in ("images/0/a.png", "weights.bin"):
        (tmp_path / name).touch()
    (tmp_path / "heavy.onnx").write_bytes(external("weights.bin"))
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "other" / "images").mkdir(parents=True)
    (tmp_path / "other" / "manifest.json").write_text('{"name": "of a browser\'s extension"}')
    exists, missing, both = "exists: choose another name", "gone does not exist", "--zoo makes images, and --data gives"
    calls = {
        "quantize m.onnx --bits 4": exists,
        "quantize m.onnx --bits 4 -o gone/out.onnx": "gone is not a folder",
        "quantize m.onnx --bits 4 -o /sys/kernel/out.onnx": "cannot be written",
        "quantize m.onnx --bits 4 -o m.onnx": "one of the inputs",
        "quantize m.onnx --mixed small": "not a budget",
        "quantize m.onnx --bits 3 --data gone": missing,
        "quantize m.onnx --bits 3 --data there.npz --zoo m.onnx": both,
        "quantize m.onnx --bits 3 --data there.npz --synth-recipe small": "--synth-recipe is for images that are made",
        "quantize m.onnx --mixed bits=1": "at least 2 bits: allow more",
        "quantize m.onnx --bits 3 --max-drop 0.1": "--data",
        "quantize m.onnx --bits 3 --act-bits 4 --target tensorrt": "runs 8 bits",
        "prune m.onnx --sparsity 0.5 -o there.npz": exists,
        "prune m.onnx --sparsity 0.5 --data there.npz --zoo m.onnx": both,
        "prune m.onnx --sparsity 2": "above 0 and below 1",
        "prune m.onnx --pattern 2:4 --sparsity 0.7": "leave it out",
        "prune m.onnx --pattern 2:4 --bits 4": exists,
        "prune m.onnx --sparsity 0.5 --bits 8 --act-bits 4 --target tensorrt": "runs 8 bits",
        "distill m.onnx m.onnx": exists,
        "distill m.onnx m.onnx -o new.onnx --data gone": missing,
        "quantize m.onnx --bits 3 --set stepz=1": "the nearest is 'steps'",
        "quantize m.onnx --bits 3 --recipe gone.toml": "gone.toml does not exist",
        "prune m.onnx --sparsity 0.5 --set steps=-1": "steps cannot be -1",
        "distill m.onnx m.onnx -o new.onnx --set steps=none": "steps cannot be 'none'",
        "quantize m.onnx --bits 3 --synth-recipe smal": "there is no recipe 'smal' (the nearest is 'small')",
        "synth m.onnx -o new --set rat=1": "the nearest is 'rate'",
        "synth m.onnx -o .": "not empty",
        "synth m.onnx -o new.npz": "not a folder",
        "synth m.onnx -o /sys/kernel/data": "cannot be written",
        "demo -o .": "not empty",
        "validate m.onnx m.onnx --data gone": missing,
        "validate m.onnx m.onnx --data there.npz --junit there.xml": exists,
        "data export gone --model m.onnx -o new.npz": missing,
        "validate m.onnx gone.onnx --data there.npz": "gone.onnx does not exist",
        "validate m.onnx m.onnx --data there.npz --min-agreement nan": "not a number from 0 to 1",
        "data export there.npz --model m.onnx -o there.npz --force": "one of the inputs",
        "validate m.onnx m.onnx --data there.npz --junit m.onnx --force": "one of the inputs",
        "quantize m.onnx --bits 3 --data there.npz -o there.npz --force": "one of the inputs",
        "validate m.onnx m.onnx --data images --junit images/0/a.png --force": "a part of images",
        "validate heavy.onnx m.onnx --data there.npz --junit weights.bin --force": "a part of heavy.onnx",
        "quantize m.onnx --bits 3 -o new/": "names a folder",
        "quantize m.onnx --bits 3 -o pipe --force": "no regular file",
        "quantize m.onnx --bits 3 -o link": exists,
        "quantize m.onnx --bits 3 --device gpu": "not auto, cpu, cuda or cuda:N",
        "quantize m.onnx --bits 3 --seed 18446744073709551616": "not in the range",
        "quantize m.onnx --bits 3 --set steps=x": "--set: steps cannot be 'x'",
        f"quantize {300 * 'm'}.onnx --bits 3": "File name too long",
        "quantize m\udcff.onnx --bits 3": "not UTF-8",
        "synth gone.onnx -o new": "gone.onnx does not exist",
        "synth m.onnx -o other --force": "not a set that synth wrote",
        "inspect m.onnx --pattern half": "not a pattern",
        "zoo export embedded -o new --untrained": "leave --untrained out",
        "demo -o m.onnx": "not a folder",
        "distill --zoo m.onnx m.onnx m.onnx": "m.distilled.onnx exists",
        "distill m.onnx --zoo m.onnx m.onnx": "m.distilled.onnx exists",
        "quantize --bits 4 -qn 4 --zoo there.npz m.onnx": "m.w4.onnx exists",
        "data compare there.npz gone --model m.onnx": missing,
        "report there.xml -o m.onnx": exists,
        "zoo show m.onnx mixmix": "not both",
        "zoo show mixmix-residul": "'mixmix-residual'",
        "zoo show m.onnx gone.onnx": "gone.onnx does not exist",
        "zoo export resnet -o new": "there is no zoo 'resnet'",
        "inspect gone.onnx": "gone.onnx does not exist",
        "inspect m.onnx --channels purple": "'purple' is not rgb, bgr, gray, or a number of channels",
        "synth m.onnx -o new --channels 0": "'0' is not rgb",
    }
    code = (
        "import sys; from mixmix_cli.__main__ import main\n"
        "for words in sys.argv[1:]:\n"
        "    status = main(words.split())\n"
        "    print(status, 'torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *calls], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    answers = done.stderr.split("2 False\n")
    assert answers.pop() == ""
    assert len(answers) == len(calls)
    for (words, sentence), answer in zip(calls.items(), answers, strict=True):
        assert sentence in answer, words
