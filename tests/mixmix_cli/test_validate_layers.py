"""`mixmix validate --layers`, end to end."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
from onnx import numpy_helper

from mixmix_cli.__main__ import main
from recipes import zoo
from tests import models

DATA = ("--data", str(zoo.calibration_images_path()), "-n", "16", "--threads", "1")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Exit status and stdout of one call."""
    status = main(["validate", *(str(argument) for argument in arguments), *DATA])
    return status, capsys.readouterr().out


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """`inverted_folded`, the weight of the layer that writes `getitem_24` negated."""
    model = onnx.load(zoo.model_path("inverted_folded"))
    name = next(node.input[1] for node in model.graph.node if node.output[0] == "getitem_24")
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(tensor), name))
    return models.write(model, tmp_path / "damaged.onnx")


def test_json(capsys: pytest.CaptureFixture[str], damaged: Path) -> None:
    reference = zoo.model_path("inverted_folded")
    status, out = run(capsys, reference, damaged, reference, "--layers", "--json")
    assert status == 0
    first, second = (candidate["layers"] for candidate in json.loads(out)["candidates"])
    assert len(first) == len(second) == 21
    assert set(first[0]) >= {"value", "op", "snr_db", "bits", "act_bits", "sparsity"}
    assert (first[0]["value"], first[0]["op"], first[0]["bits"]) == ("getitem_24", "Conv", None)
    assert first[0]["snr_db"] < 0
    assert {(layer["snr_db"], layer["reason"]) for layer in second} == {(None, "equal to the reference")}


@pytest.mark.parametrize("named", [True, False])
def test_a_layer_has_one_name(capsys: pytest.CaptureFixture[str], tmp_path: Path, named: bool) -> None:
    """In every account: that of its node in the file or, where it has none, that of its output."""
    path = tmp_path / "model.onnx"
    proto = onnx.load(zoo.model_path("inverted"))
    for node in proto.graph.node:
        node.name = node.name if named else ""
    onnx.save(proto, path)
    assert main(["quantize", str(path), "--bits", "4", "--method", "nearest", *DATA[:4], "--json"]) == 0
    told = {layer["name"] for layer in json.loads(capsys.readouterr().out)["layers"]}
    written = path.with_name("model.w4.onnx")
    layers = json.loads(run(capsys, path, written, "--layers", "--json")[1])["candidates"][0]["layers"]
    assert {layer["name"] for layer in layers} == told
    nodes = [node for node in onnx.load(written).graph.node if node.op_type in ("Conv", "Gemm")]
    assert {node.name if named else node.output[0] for node in nodes} == told
    assert main(["inspect", str(written), "--json"]) == 0
    assert {layer["name"] for layer in json.loads(capsys.readouterr().out)[0]["layers"]} == told
    shown = run(capsys, path, written, "--layers")[1]
    assert all(f"\n{name} " in shown for name in told)


def test_json_without_layers(capsys: pytest.CaptureFixture[str]) -> None:
    model = zoo.model_path("inverted_folded")
    assert json.loads(run(capsys, model, model, "--json")[1])["candidates"][0]["layers"] is None


def test_on_screen(capsys: pytest.CaptureFixture[str], damaged: Path) -> None:
    """One table a candidate, each layer once, the damaged one first."""
    reference = zoo.model_path("inverted_folded")
    _, out = run(capsys, reference, damaged, reference, "--layers")
    lines = out.splitlines()
    titles = [index for index, line in enumerate(lines) if line.startswith("layers of ")]
    assert len(titles) == 2
    assert lines[titles[0] + 1].split()[:2] == ["layer", "op"]
    assert lines[titles[0] + 2].startswith("node_Conv_336 ")
    assert "dB" in lines[titles[0] + 2]
    assert lines[titles[1] + 2].count("equal") == 2
    assert "layers of" not in run(capsys, reference, damaged)[1]


def test_what_cannot_be_compared_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    _, out = run(capsys, zoo.model_path("plain"), zoo.model_path("residual"), "--layers")
    assert "10 of 12 layers cannot be compared:" in out
    assert "no value of its name, nor of what follows it: /3/body/body.0/Conv, " in out


def test_another_task_is_one_sentence(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    other = models.write(models.conv(image=("batch", 1, 28, 28)), tmp_path / "o.onnx")
    assert main(["validate", str(zoo.model_path("plain")), str(other), *DATA, "--layers"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert err.count("Error:") == 1
