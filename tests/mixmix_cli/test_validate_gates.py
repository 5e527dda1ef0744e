"""`mixmix validate`: gates, and what is said of them."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import onnx
import pytest

from recipes import zoo
from tests.mixmix_cli.command import run


def test_validate_gates(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    data = ("--data", zoo.calibration_images_path())
    model, folded = (zoo.model_path(name) for name in ("inverted", "inverted_folded"))
    status, out, _ = run(capsys, "validate", model, folded, *data, "--max-drop", 0.0, "--json")
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
    (suite,) = ElementTree.parse(junit).getroot()
    assert suite.get("failures") == "1"
    times = [float(case.get("time", "nan")) for case in suite]
    assert len(times) == 4
    assert all(0 < time < float(suite.get("time", "nan")) for time in times)


def test_validate_says_that_targets_are_not_truth(
    capsys: pytest.CaptureFixture[str], model: Path, images: Path
) -> None:
    status, out, _ = run(capsys, "validate", model, model, "--data", images)
    assert status == 0
    assert "not ground truth" in out


def test_a_candidate_that_takes_pixels_otherwise(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
) -> None:
    """What it says itself holds, and is said; what it does not say is as with the reference."""
    candidate, data = onnx.load(model), ("--data", zoo.calibration_images_path())
    for silent in (False, True):
        other = tmp_path / f"{silent}.onnx"
        for entry in candidate.metadata_props:
            if entry.key == "mixmix.input.mean":
                entry.value = "[0.5]"
        if silent:
            del candidate.metadata_props[:]
        onnx.save(candidate, other)
        _, _, err = run(capsys, "validate", model, other, *data)
        told = f"{other} is given images otherwise than {model}: 28x28 gray, mean 0.5, std 0.353, as it says"
        assert (told in " ".join(err.split())) is not silent
    _, _, err = run(capsys, "validate", model, model, *data)
    assert "otherwise" not in err


def test_every_gate_is_named(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    """Those that nobody asked for too."""
    data = ("--data", zoo.calibration_images_path())
    status, out, _ = run(capsys, "validate", model, model, *data)
    assert status == 0
    assert "passed: finite, optimisations" in out
    status, out, _ = run(
        capsys, "validate", model, zoo.model_path("residual"), *data, "--min-agreement", 1.0, "--min-top1", 0.1
    )
    assert status == 1
    assert "failed: min-agreement; passed: min-top1, finite, optimisations" in out


def test_names_that_reports_cannot_hold(capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
    """XML has no control characters, and an annotation one line."""
    odd = tmp_path / "o\x1bd\nd 100%.onnx"
    odd.write_bytes(zoo.model_path("residual").read_bytes())
    status, _, err = run(
        capsys, "validate", model, odd, "--data", zoo.calibration_images_path(), "--min-agreement", 1.0,
        "--junit", tmp_path / "gates.xml", "--github",
    )  # fmt: skip
    assert status == 1
    assert [line for line in err.splitlines() if "::error" in line and "d%0Ad 100%25.onnx: " in line]
    (suite,) = ElementTree.parse(tmp_path / "gates.xml").getroot()
    assert {Path(case.get("classname", "")).name for case in suite} == {"o\ufffdd\ufffdd 100%.onnx"}
