"""The real command: help, images, what a model is, and output that nobody reads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner

from mixmix_cli.__main__ import TRAINED
from mixmix_cli.cli import COMMANDS, cli
from recipes import zoo
from tests.mixmix_cli.command import BRIEFLY, TINY, run


@pytest.mark.timing
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


def test_what_a_model_does_not_need_is_not_imported(model: Path, tmp_path: Path) -> None:
    """Of two seconds' worth: operators that are in no table of ours, and augmentation that no default recipe has."""
    few = ("-n", "2", "--set", 'stages=[{"scale":1.0,"steps":1}]', "-o", str(tmp_path / "set"))
    code = (
        "import sys; from mixmix_cli.__main__ import main; status = main(sys.argv[1:]);"
        "print(status, {'torch', 'onnx2torch', 'torchvision', 'kornia'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, "synth", str(model), *few]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 {'torch'}"


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


def test_synth_size_is_that_of_a_model_that_leaves_it_open(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = onnx.load(zoo.model_path("plain"))
    for dim, name in zip(model.graph.input[0].type.tensor_type.shape.dim[2:], ("height", "width"), strict=True):
        dim.dim_param = name
    kept = [prop for prop in model.metadata_props if prop.key != "mixmix.input.size"]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    onnx.save(model, tmp_path / "open.onnx")
    words = ("synth", tmp_path / "open.onnx", "-o", tmp_path / "d", "-n", 2, "--size", "28", *TINY)
    assert run(capsys, *words)[0] == 0
    manifest = json.loads((tmp_path / "d" / "manifest.json").read_text())
    assert manifest["identity"]["models"][0]["input"]["size"] == [28, 28]


def test_traceback_keeps_the_exit_status(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, _, err = run(capsys, "inspect", tmp_path / "no.onnx", "--traceback")
    assert status == 2
    assert "Traceback" in err
    assert "does not exist" in err


@pytest.mark.parametrize("words", [("-q", "-v"), ("--verbose", "--quiet"), ("-vq",)])
def test_quiet_or_verbose(capsys: pytest.CaptureFixture[str], words: tuple[str, ...]) -> None:
    status, out, err = run(capsys, "recipe", "list", *words)
    assert (status, out) == (2, "")
    assert "give -q or -v, not both" in err


@pytest.mark.parametrize(("words", "heard"), [((), False), (("-v",), True), (("--json", "--verbose"), True)])
def test_remarks_of_libraries_are_heard_where_more_is_asked_for(
    words: tuple[str, ...], heard: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        assert run(capsys, "recipe", "list", *words)[0] == 0
        warnings.warn("a remark to developers", RuntimeWarning, stacklevel=1)
    assert bool(caught) == heard


def exhaust_torch() -> None:
    torch.empty(2**50)


def exhaust_numpy() -> None:
    np.empty(2**50)


def exhaust_a_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")  # as torch does where there is one


@pytest.mark.parametrize(
    ("exhaust", "whose", "where"),
    [
        (exhaust_torch, "machine", "converters.conversion.TorchClassifier"),
        (exhaust_numpy, "machine", "converters.load.read_model"),
        (exhaust_a_gpu, "GPU", "converters.conversion.TorchClassifier"),
    ],
)
@pytest.mark.parametrize(
    ("command", "remedy"),
    [
        (("synth", "-o", "d"), "take fewer images at once (--batch 8 or fewer), or another --device"),
        (("quantize", "--bits", "4", "-o", "synth"), f"take fewer images at once ({TRAINED}), or another --device"),
        (("inspect",), "free some"),
    ],
)
def test_memory_that_is_used_up_is_no_bug(
    exhaust: Callable[[], None],
    whose: str,
    command: tuple[str, ...],
    remedy: str,
    where: str,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(model.parent)
    monkeypatch.setattr(where, lambda *_, **__: exhaust())
    status, out, err = run(capsys, *command, model)
    assert (status, out) == (2, "")
    assert err.splitlines()[-1] == f"Error: the {whose} has too little memory left: {remedy}"


def test_inspect_checks_a_pattern(capsys: pytest.CaptureFixture[str], model: Path, images: Path) -> None:
    few = ("--data", images, *BRIEFLY, "-q")
    assert run(capsys, "prune", model, "--pattern", "2:4", *few)[0] == 0
    written = model.with_name("model.2of4.onnx")
    status, out, _ = run(capsys, "inspect", written, "--pattern", "2:4")
    assert status == 0
    assert "2:4: 6 of 7 layers have it" in out
    assert run(capsys, "inspect", written, "--pattern", "1:4")[0] == 1
    assert run(capsys, "inspect", model, "--pattern", "2:4")[0] == 1
    assert run(capsys, "inspect", written, model, "--pattern", "2:4")[0] == 1


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


def test_nobody_reads_on(model: Path, tmp_path: Path) -> None:
    """`mixmix ... | head -1`: the work is done, the status says how it went, and nothing is said of the pipe."""
    junit, data = tmp_path / "gates.xml", ("--data", zoo.calibration_images_path())
    gate = ("validate", model, zoo.model_path("residual"), *data, "--min-agreement", 1, "--junit", junit)
    recipes = ("recipe", "list")
    for status, arguments in ((0, ("--help",)), (0, recipes), (0, (*recipes, "--json")), (1, gate)):
        done = into_closed_pipe("stdout", *arguments)
        assert (done.returncode, done.stderr) == (status, "")
    assert junit.is_file()
    assert into_closed_pipe("stderr", "inspect", tmp_path / "no.onnx").returncode == 2
    assert into_closed_pipe("stderr", "inspect").returncode == 2


def into_closed_pipe(stream: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A call one of whose streams goes into a pipe that nobody reads any more."""
    reader, writer = os.pipe()
    os.close(reader)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | {stream: writer}
    command = [sys.executable, "-m", "mixmix_cli", *map(str, arguments)]
    try:
        return subprocess.run(command, **streams, text=True, check=False)
    finally:
        os.close(writer)
