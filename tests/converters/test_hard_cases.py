"""Every hard case converts: value, gradient, batch of eight, and each weight bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.conformance import measure
from tests import hard_cases


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("hard")
    assert len(list(hard_cases.write_all(directory))) == len(hard_cases.CASES) + 1
    return directory


HALF_PRECISION = {"float16": 5e-3}  # onnxruntime computes in 16 bits, the module does not


@pytest.mark.parametrize("name", [*hard_cases.CASES, "external_data"])
def test_hard_case(folder: Path, name: str) -> None:
    found = measure(folder / f"{name}.onnx")
    for difference in (found.difference, found.batch_difference):
        assert difference < HALF_PRECISION.get(name, 1e-4)
    assert found.gradient
    assert found.mapped == found.weights >= 1
