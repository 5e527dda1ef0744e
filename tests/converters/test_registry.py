"""The operator table: what it admits, what it falls back to, and the gradients of its entries."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx2torch.node_converters.registry import get_converter

from converters.errors import BrokenLibraryError, UnsupportedOperatorError
from converters.ops import registry
from converters.precision import OWN_DOMAIN
from tests import models
from tests.converters import oracle


def test_an_entry_that_exists_is_not_replaced() -> None:
    before = dict(registry._TABLE)
    with pytest.raises(ValueError, match="Conv"):
        registry.operator("Conv", 11)(lambda _: lambda x: x)
    assert before == registry._TABLE


@pytest.mark.parametrize(
    ("name", "domain", "version"), [(name, d, version) for d, name, version in registry._TABLE if d != OWN_DOMAIN]
)
def test_versions_of_the_table_exist(name: str, domain: str, version: int) -> None:
    assert onnx.defs.get_schema(name, max_inclusive_version=version, domain=domain).since_version == version


@pytest.mark.parametrize("name", ["Softmax", "Reshape", "Upsample", "Gelu", "Conv"])
def test_versions_in_force(name: str) -> None:
    """Every version that some opset from the oldest to the newest means, and no other."""
    meant = {registry.since_version(name, opset) for opset in range(registry.OLDEST, registry.NEWEST + 1)}
    known = {schema.since_version for schema in onnx.defs.get_all_schemas_with_history() if schema.name == name}
    deprecated = {s.since_version for s in onnx.defs.get_all_schemas_with_history() if s.name == name and s.deprecated}
    assert set(registry.versions_in_force(name)) == (meant & known) - deprecated


@pytest.mark.parametrize(
    ("name", "opset", "version"), [("Conv", 11, 11), ("Conv", 22, 22), ("Relu", 13, 13), ("ReduceMean", 17, 13)]
)
def test_since_version(name: str, opset: int, version: int) -> None:
    assert registry.since_version(name, opset) == version


def test_since_version_of_a_stranger() -> None:
    assert registry.since_version("Frobnicate", 3, "com.example") == 3


def test_unknown_operator_is_named() -> None:
    with pytest.raises(UnsupportedOperatorError) as caught:
        oracle.find(models.unknown_operator())
    message = str(caught.value)
    assert "frob/Frobnicate" in message
    assert "com.example.Frobnicate" in message
    assert "opset" in message
    assert "\n" not in message
    assert message.endswith("export the model without it")


def test_own_table_comes_first() -> None:
    """onnx2torch has Conv-11 as well, as a module that holds its weight."""
    assert callable(get_converter("Conv", 11))
    assert oracle.find(models.conv()).module is None


def test_operand_left_out_in_the_middle() -> None:
    """Modules of onnx2torch take operands by keyword then."""

    class Sum(torch.nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor | float = 1.0, c: torch.Tensor | float = 10.0) -> Any:
            return a + b + c

    call, two = registry._positional(Sum()), torch.tensor(2.0)
    assert call(two) == 13
    assert call(two, two, two) == 6
    assert call(two, None, two) == 5


def test_what_the_table_lacks_comes_from_onnx2torch() -> None:
    operands = [models.random(1, 2, 8, 8), np.array([[0, 0, 4, 4]], np.float32), np.zeros(1, np.int64)]
    model = oracle.single("RoiAlign", operands, 16, 1, {"output_height": 2, "output_width": 2})
    assert oracle.find(model).module is not None


def test_a_broken_library_is_not_the_models_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx2torch.node_converters.registry", None)
    assert oracle.find(models.conv()).module is None  # which it is not asked for
    with pytest.raises(BrokenLibraryError, match=r"onnx2torch cannot be imported .*: install it again"):
        oracle.find(models.unknown_operator())


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values)


def doubles(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(models.random(*shape, seed=seed).astype(np.float64)).requires_grad_()


SMOOTH_CASES: dict[str, tuple[str, int, dict[str, Any], list[Any]]] = {
    "Conv": ("Conv", 11, {"pads": [0, 1, 2, 1], "group": 2}, [(1, 4, 4, 4), (4, 2, 2, 2), (4,)]),
    "Conv SAME": ("Conv", 11, {"auto_pad": "SAME_LOWER", "strides": [2, 2]}, [(1, 1, 4, 4), (2, 1, 3, 3)]),
    "Gemm": ("Gemm", 13, {"alpha": 0.5, "beta": 2.0, "transB": 1}, [(2, 3), (4, 3), (4,)]),
    "Gemm without C": ("Gemm", 13, {"alpha": 0.5, "transA": 1}, [(3, 2), (3, 4)]),
    "ReduceMean": ("ReduceMean", 18, {}, [(2, 3, 4), ints(-1)]),
    "ReduceMax": ("ReduceMax", 18, {}, [(2, 3, 4), ints(1)]),
    "ReduceMin": ("ReduceMin", 18, {"keepdims": 0}, [(2, 3, 4), ints(1)]),
    "ReduceL1": ("ReduceL1", 18, {}, [(2, 3, 4), ints(1, 2)]),
    "ReduceL2": ("ReduceL2", 18, {}, [(2, 3, 4)]),
    "ReduceSumSquare": ("ReduceSumSquare", 18, {}, [(2, 3, 4), ints(0)]),
    "Pad": ("Pad", 18, {}, [(1, 2, 3, 3), ints(0, 1, 1, 2, 0, 0, 2, 1)]),
    "Pad reflect": ("Pad", 18, {"mode": "reflect"}, [(1, 2, 3, 3), ints(1, 1, 2, 0), None, ints(2, 3)]),
    "Split": ("Split", 18, {"num_outputs": 2}, [(5, 2)]),
    "Reshape": ("Reshape", 14, {}, [(2, 6), ints(0, 2, 3)]),
    "Gelu": ("Gelu", 20, {}, [(2, 3)]),
    "Gelu tanh": ("Gelu", 20, {"approximate": "tanh"}, [(2, 3)]),
    "GlobalMaxPool": ("GlobalMaxPool", 22, {}, [(2, 3, 2, 2)]),
}


@pytest.mark.parametrize("case", SMOOTH_CASES)
def test_gradients(case: str) -> None:
    """In the table a shape stands for random numbers, whose gradient is checked; a tensor for itself."""
    op, version, attributes, shapes = SMOOTH_CASES[case]
    function = registry._TABLE["", op, version](attributes)
    operands = [doubles(*s, seed=i) if isinstance(s, tuple) else s for i, s in enumerate(shapes)]
    assert torch.autograd.gradcheck(function, operands)


def test_gradients_of_batch_normalization() -> None:
    function = registry._TABLE["", "BatchNormalization", 15]({"epsilon": 1e-3})
    operands = [doubles(2, 3, 2, 2), doubles(3, seed=1), doubles(3, seed=2), doubles(3, seed=3).detach()]
    variance = doubles(3, seed=4).detach() ** 2 + 0.1
    assert torch.autograd.gradcheck(function, [*operands, variance])


def test_gradients_of_clip() -> None:
    """Between the bounds 1, outside 0."""
    x = torch.tensor([-2.0, -0.3, 0.4, 3.0], requires_grad=True)
    registry._TABLE["", "Clip", 13]({})(x, torch.tensor(-1.0), torch.tensor(1.0)).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 0]
