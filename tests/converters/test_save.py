"""A file appears whole and under its own name, or not at all; what the original said is still in it."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from converters import runtime
from converters.classifier import Classifier
from converters.edits import WeightEdit, apply_edits
from converters.errors import ConversionError, ModelError, OutputError
from converters.load import load_classifier
from converters.targets import PORTABLE
from converters.writeback import Proof, prepare_for_quantization, save, save_proved
from tests import models
from tests.converters import oracle


@pytest.fixture
def model() -> ir.Model:
    return ir.from_proto(models.conv())


def assert_refused(model: ir.Model, path: Path, *, overwrite: bool = False) -> None:
    """`save` raises an OutputError of one line, and leaves the folder as it was."""
    folder = path.parent
    before = {p: p.read_bytes() for p in folder.iterdir() if p.is_file()} if folder.is_dir() else {}
    with pytest.raises(OutputError) as caught:
        save(model, path, {}, overwrite=overwrite)
    assert "\n" not in str(caught.value)
    assert ": " in str(caught.value)
    after = {p: p.read_bytes() for p in folder.iterdir() if p.is_file()} if folder.is_dir() else {}
    assert after == before


def test_saved_file_is_the_model(model: ir.Model, tmp_path: Path) -> None:
    path, x = tmp_path / "out.onnx", models.images()
    save(model, path, {"note": "new"})
    np.testing.assert_array_equal(oracle.run(onnx.load(path), x), oracle.run(models.conv(), x))
    assert {entry.key: entry.value for entry in onnx.load(path).metadata_props} == {"note": "new"}
    assert [p.name for p in tmp_path.iterdir()] == ["out.onnx"]
    other = tmp_path / "other"
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode


def test_existing_file_is_kept(model: ir.Model, tmp_path: Path) -> None:
    (tmp_path / "out.onnx").write_text("precious")
    assert_refused(model, tmp_path / "out.onnx")


def test_existing_file_is_replaced_when_asked(model: ir.Model, tmp_path: Path) -> None:
    path = tmp_path / "out.onnx"
    path.write_text("old")
    save(model, path, {}, overwrite=True)
    assert onnx.load(path).graph.node[0].name == "features/Conv"
    assert [p.name for p in tmp_path.iterdir()] == ["out.onnx"]


def test_what_a_link_points_to_is_written(model: ir.Model, tmp_path: Path) -> None:
    link, there = tmp_path / "link.onnx", tmp_path / "folder" / "there.onnx"
    there.parent.mkdir()
    link.symlink_to(there)
    assert_refused(model, link)  # though nothing is there yet
    assert not there.exists()
    save(model, link, {}, overwrite=True)
    assert link.is_symlink()
    assert load_classifier(there).opset == load_classifier(link).opset


def test_only_files_are_replaced(model: ir.Model, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputError, match="no regular file"):
        save(model, tmp_path / "pipe", {}, overwrite=True)
    assert (tmp_path / "pipe").is_fifo()


def test_folder_that_is_not_there(model: ir.Model, tmp_path: Path) -> None:
    assert_refused(model, tmp_path / "absent" / "out.onnx")
    assert list(tmp_path.iterdir()) == []


def test_file_in_place_of_a_folder(model: ir.Model, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert_refused(model, tmp_path / "file" / "out.onnx")


def test_folder_in_place_of_the_file(model: ir.Model, tmp_path: Path) -> None:
    (tmp_path / "out.onnx").mkdir()
    assert_refused(model, tmp_path / "out.onnx", overwrite=True)


def test_unwritable_folder(model: ir.Model, unwritable: Path) -> None:
    with pytest.raises(OutputError, match=rf"{unwritable}.* cannot be written to \(.+\): choose another output"):
        save(model, unwritable / "out.onnx", {})


@pytest.mark.parametrize("length", [255, 300])
def test_longest_names(model: ir.Model, tmp_path: Path, length: int) -> None:
    """The temporary file's name must not be longer than the file system allows, where the file's own is not."""
    path = tmp_path / ("n" * (length - 5) + ".onnx")
    if length <= 255:
        save(model, path, {})
        assert [p.name for p in tmp_path.iterdir()] == [path.name]
    else:
        assert_refused(model, path)


@contextmanager
def full_disk(free: int) -> Iterator[None]:
    """No file grows beyond `free` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("exists", [False, True])
def test_disk_that_fills_up(model: ir.Model, tmp_path: Path, exists: bool) -> None:
    path = tmp_path / "out.onnx"
    if exists:
        path.write_text("old")
    with full_disk(100):
        assert_refused(model, path, overwrite=True)


@pytest.mark.parametrize("exists", [False, True])
def test_failing_check_leaves_nothing_behind(model: ir.Model, tmp_path: Path, exists: bool) -> None:
    path, seen = tmp_path / "out.onnx", []

    def check() -> None:
        seen.append([p.read_text() for p in tmp_path.iterdir()])
        raise ModelError("not good enough")

    if exists:
        path.write_text("old")
    with pytest.raises(ModelError, match="not good enough"):
        save(model, path, {}, overwrite=True, check=check)
    assert seen == [["old"] if exists else []]
    assert [p.read_text() for p in tmp_path.iterdir()] == (["old"] if exists else [])


def test_model_that_onnxruntime_refuses_is_not_written(model: ir.Model, tmp_path: Path) -> None:
    model.graph.node("features/Conv").op_type = "Frobnicate"
    with pytest.raises(ModelError, match=r"out\.onnx: onnxruntime cannot load"):
        save(model, tmp_path / "out.onnx", {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bits", [4, 8])
def test_names_metadata_and_axes_survive(embedded: Classifier, tmp_path: Path, bits: int) -> None:
    """One Conv is edited and saved; everything else is named, and shaped, as in the file that came in."""
    ready = prepare_for_quantization(embedded, PORTABLE, bits)
    layer = next(node for node in ready.original.graph if node.op_type == "Conv")
    weight = layer.inputs[1]
    assert weight is not None
    assert weight.shape is not None
    shape = tuple(weight.shape.numpy())
    ones, zeros = np.ones(shape, np.int32), np.zeros(shape[0], np.int32)
    edit = WeightEdit(
        str(layer.outputs[0].name), ones, np.ones(shape[0], np.float32), zeros, 0, bits, PORTABLE.weight_container(bits)
    )
    path = tmp_path / "out.onnx"
    save(apply_edits(ready.original, [edit]), path, {"mixmix.quantize": "{}"})

    before, after = ir.to_proto(ready.original), onnx.load(path)
    assert after.graph.input == before.graph.input
    assert after.graph.output == before.graph.output
    assert after.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    kept = {entry.key: entry.value for entry in after.metadata_props}
    assert kept == {**dict(embedded.original.metadata_props), "mixmix.quantize": "{}"}
    assert [(n.name, n.op_type, list(n.output)) for n in after.graph.node if n.op_type != "DequantizeLinear"] == [
        (n.name, n.op_type, list(n.output)) for n in before.graph.node
    ]
    tensors = [{tensor.name for tensor in proto.graph.initializer} for proto in (before, after)]
    assert tensors[0] - tensors[1] == {weight.name}
    assert load_classifier(path).spec == embedded.spec
    for batch in (1, 3):
        x = models.random(batch, embedded.spec.channel_count, *embedded.spec.size)
        assert oracle.run(after, x).shape == (batch, 10)


def test_nodes_keep_the_files_names(embedded: Classifier, write: Callable[[onnx.ModelProto], Path]) -> None:
    """Without any edit, the graph that comes out is the graph that went in."""
    path = write(ir.to_proto(apply_edits(embedded.original, [])))
    before, after = onnx.load(embedded.path), onnx.load(path)
    assert [node.name for node in after.graph.node] == [node.name for node in before.graph.node]
    assert [t.name for t in after.graph.initializer] == [t.name for t in before.graph.initializer]
    assert [(o.domain, o.version) for o in after.opset_import] == [(o.domain, o.version) for o in before.opset_import]
    assert after.ir_version == before.ir_version


def test_a_model_too_large_for_one_file_has_its_weights_beside_it(
    model: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a file of over 2 GB is; here the limit is moved."""
    monkeypatch.setattr(runtime, "PROTOBUF_LIMIT", 100)
    path, x = tmp_path / "out.onnx", models.images()
    written = save(model, path, {"note": "new"})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.onnx", "out.onnx.data"]
    (weight,) = (t for t in onnx.load(path, load_external_data=False).graph.initializer if t.name == "conv.weight")
    assert weight.data_location == onnx.TensorProto.EXTERNAL
    np.testing.assert_array_equal(oracle.run(onnx.load(path), x), oracle.run(models.conv(), x))
    whole = sum(p.stat().st_size for p in tmp_path.iterdir())
    assert load_classifier(path).size_bytes == written == whole
    path.unlink()
    assert_refused(model, path)  # the data's name is taken
    with pytest.raises(ZeroDivisionError):
        save(model, path, {}, overwrite=True, check=lambda: print(1 / 0))
    assert [p.name for p in tmp_path.iterdir()] == ["out.onnx.data"]
    (tmp_path / "link.onnx").symlink_to(tmp_path / "there.onnx")
    with pytest.raises(OutputError, match="is a link"):
        save(model, tmp_path / "link.onnx", {}, overwrite=True)


def test_the_spec_in_a_file_is_the_last_one_that_was_said(model: ir.Model, tmp_path: Path) -> None:
    model.metadata_props.update({"mixmix.input.source": "assumed", "mixmix.input.mean": "[1]", "author": "me"})
    save(model, tmp_path / "out.onnx", {"mixmix.input.mean": "[2]"})
    written = {entry.key: entry.value for entry in onnx.load(tmp_path / "out.onnx").metadata_props}
    assert written == {"mixmix.input.mean": "[2]", "author": "me"}


def test_other_logits_than_the_proofs_are_not_written(model: ir.Model, tmp_path: Path) -> None:
    x, path = models.images(), tmp_path / "out.onnx"
    logits = oracle.run(model, x)
    proof = Proof(x, logits + np.float32(0.2) * np.abs(logits).max(), len(x), 1e-4)
    with pytest.raises(ConversionError, match="the written model differs from the computed one"):
        save_proved(model, path, {}, proof)
    assert list(tmp_path.iterdir()) == []
