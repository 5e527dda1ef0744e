"""Real architectures from the onnx package: equal to the outputs shipped with them, and with weights of their own.

The quick ones; `benchmarks/conversion_matrix.py` has all nine.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import light_models
from benchmarks.conformance import measure
from tests import models


@pytest.mark.parametrize("name", ["light_bvlc_alexnet", "light_inception_v1", "light_squeezenet"])
def test_equals_the_output_shipped(name: str) -> None:
    assert light_models.difference_from_shipped(name) < 1e-6


@pytest.mark.parametrize("name", ["light_shufflenet", "light_squeezenet"])
def test_equals_onnxruntime_with_seeded_weights(tmp_path: Path, name: str) -> None:
    assert measure(models.write(light_models.seeded(name), tmp_path / "model.onnx")).holds
