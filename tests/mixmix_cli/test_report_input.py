"""What `mixmix report` reads and refuses, and where it writes."""

from __future__ import annotations

import fnmatch
import json
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mixmix_cli.report.documents import FORMS
from tests.mixmix_cli.command import run
from tests.mixmix_cli.report_page import load

ROOT = Path(__file__).parent.parent.parent


def bad_inputs() -> Iterator[tuple[str, bytes | None, str]]:
    yield "missing.json", None, "does not exist"
    yield "empty.json", b"", "is empty"
    yield "blank.json", b" \n", "is empty"
    yield "garbled.json", b'{"reference": ', "not one JSON document"
    yield "two.json", b"{}\n{}", "not one JSON document"
    yield "binary.onnx", bytes(range(256)), "not one JSON document"
    yield "deep.json", b"[" * 200_000, "not one JSON document"
    yield "object.json", b"{}", "not the result of a command"
    yield "list.json", b"[]", "not the result of a command"
    yield "number.json", b"3", "not the result of a command"
    yield "other.json", b'{"name": "package", "version": "1.0.0"}', "not the result of a command"
    yield "half.json", b'{"reference": {}, "candidates": []}', "validate --json prints: reference.path"
    yield "wrapped.json", b'[{"reference": {}, "candidates": []}]', "not the result of a command"


@pytest.mark.parametrize(
    ("name", "content", "said"), bad_inputs(), ids=lambda value: value if str(value).count(".") else ""
)
def test_bad_input_is_one_sentence(
    capsys: pytest.CaptureFixture[str], made: Path, tmp_path: Path, name: str, content: bytes | None, said: str
) -> None:
    """It names the file and what is accepted; a page that was there stays, and no other is begun."""
    path, output = tmp_path / name, tmp_path / "r.html"
    if content is not None:
        path.write_bytes(content)
    output.write_text("mine")
    status, out, err = run(capsys, "report", made / "pass.json", path, "-o", output, "--force")
    assert (status, out) == (2, "")
    assert len(err.strip().splitlines()) == 1
    assert str(path) in err
    assert said in err
    assert "--json print" in err
    assert output.read_text() == "mine"
    assert {entry.name for entry in tmp_path.iterdir()} <= {name, "r.html"}


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda d: d["candidates"][0].update(agreement="0.9"), "candidates.0.agreement"),
        (lambda d: d["candidates"][0].update(top1=93.1), "candidates.0.top1"),
        (lambda d: d["candidates"][0].update(size_bytes=None), "candidates.0.size_bytes"),
        (lambda d: d.update(candidates={}), "candidates"),
        (lambda d: d.update(images=10**400), "images"),
        (lambda d: d["reference"].update(latency_ms=float("nan")), "reference.latency_ms"),
        (lambda d: d["candidates"][0].pop("passed"), "candidates.0.passed"),
    ],
)
def test_figures_that_are_none(
    capsys: pytest.CaptureFixture[str], made: Path, tmp_path: Path, change: Any, where: str
) -> None:
    document, path = load(made, "pass"), tmp_path / "v.json"
    change(document)
    path.write_text(json.dumps(document))
    status, out, err = run(capsys, "report", path, "-o", tmp_path / "r.html")
    assert (status, out) == (2, "")
    assert f"{path} is not what mixmix validate --json prints: {where}: " in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "r.html").exists()


def test_folders_that_are_none(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Nothing in it, something else in it, or what is in it is damaged."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, content, said in (
        ("", "", "neither synth nor demo wrote"),
        ("notes.txt", "notes", "neither synth nor demo wrote"),
        ("results.json", "", "results.json is empty"),
        ("manifest.json", "", "manifest.json is not JSON"),
        ("manifest.json", '{"finished": true}', "no usable identity"),
        ("manifest.json", "[]", "manifest.json has no usable content"),
    ):
        if name:
            (folder / name).write_text(content)
        status, out, err = run(capsys, "report", folder, "-o", tmp_path / "r.html")
        assert (status, out) == (2, "")
        assert said in err
        assert str(folder) in err
        assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "r.html").exists()


def test_nothing_to_report(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "report")
    assert status == 2
    assert "Missing argument" in err


def test_output(
    capsys: pytest.CaptureFixture[str], made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """report.html in the current folder; kept without --force; the same input, the same bytes."""
    monkeypatch.chdir(tmp_path)
    inputs = [made / "data", made / "validate.json"]
    status, out, err = run(capsys, "report", *inputs)
    output = tmp_path / "report.html"
    assert (status, err) == (0, "")
    assert "report.html: 2 sections" in out
    first = output.read_bytes()
    status, out, err = run(capsys, "report", made / "pass.json")
    assert (status, out) == (2, "")
    assert "--force" in err
    assert output.read_bytes() == first
    assert run(capsys, "report", *inputs, "--force")[0] == 0
    assert output.read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    for target, said in ((tmp_path, "is a folder"), (tmp_path / "no" / "r.html", "not a folder")):
        status, _, err = run(capsys, "report", *inputs, "-o", target, "--force")
        assert status == 2
        assert said in err


def test_an_input_is_never_the_output(capsys: pytest.CaptureFixture[str], made: Path, tmp_path: Path) -> None:
    path = tmp_path / "v.json"
    shutil.copy(made / "pass.json", path)
    before = path.read_bytes()
    status, _, err = run(capsys, "report", path, "-o", tmp_path / "." / "v.json", "--force")
    assert status == 2
    assert "one of the inputs" in err
    assert path.read_bytes() == before


def test_files_of_other_shells(capsys: pytest.CaptureFixture[str], made: Path, tmp_path: Path) -> None:
    """What PowerShell's > writes: UTF-16 with a byte order mark."""
    path = tmp_path / "v.json"
    path.write_text((made / "pass.json").read_text(), encoding="utf-16")
    assert run(capsys, "report", path, "-o", tmp_path / "r.html")[0] == 0


def test_help_loads_no_libraries_of_the_page() -> None:
    code = (
        "import sys; from mixmix_cli.__main__ import main; main(['report', '--help']);"
        "sys.exit(bool({'jinja2', 'matplotlib', 'pydantic', 'numpy', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_template_is_shipped() -> None:
    """Every file beside the modules is named in pyproject, and each kind of document is read by one form."""
    shipped = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "mixmix_cli.report" in shipped["packages"]
    beside = [p.name for p in (ROOT / "mixmix_cli" / "report").iterdir() if p.is_file() and p.suffix != ".py"]
    patterns = shipped["package-data"]["mixmix_cli.report"]
    assert beside
    assert all(any(fnmatch.fnmatch(name, pattern) for pattern in patterns) for name in beside)
    assert len({form.command for form in FORMS}) == len(FORMS)


def test_the_keys_of_the_contract_are_enough(capsys: pytest.CaptureFixture[str], made: Path, tmp_path: Path) -> None:
    candidate = ("path", "top1", "top5", "agreement", "kl", "drop", "size_bytes", "latency_ms", "passed", "failed")
    document = load(made, "brecq")
    keys = (
        "input",
        "output",
        "bits",
        "act_bits",
        "sparsity",
        "blocks",
        "layers",
        "size_bytes",
        "seconds",
        "validation",
    )
    document = {key: document[key] for key in keys}
    document["layers"] = [
        {key: layer[key] for key in ("name", "bits", "act_bits", "sparsity", "error")} for layer in document["layers"]
    ]
    document["validation"]["candidates"] = [
        {key: entry[key] for key in candidate} for entry in document["validation"]["candidates"]
    ]
    synthesis = {
        key: load(made, "synth")[key] for key in ("dir", "images", "seconds", "seconds_per_image", "models", "final")
    }
    paths = [tmp_path / "q.json", tmp_path / "s.json"]
    for path, content in zip(paths, (document, synthesis), strict=True):
        path.write_text(json.dumps(content))
    status, out, _ = run(capsys, "report", *paths, "-o", tmp_path / "r.html", "--json")
    assert status == 0
    told = json.loads(out)
    assert told["output"] == str(tmp_path / "r.html")
    assert [section["kind"] for section in told["sections"]] == ["compression", "synthesis"]
    assert [section["source"] for section in told["sections"]] == [str(path) for path in paths]
