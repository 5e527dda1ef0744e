"""A device that is not the processor, for machines that have no other: tensors whose values lie in ordinary memory, but
that say they are elsewhere, and are treated so.

As on a GPU, operands have to be on one device, but for numbers and for indices; numpy does not reach them; generators
of the processor do not draw there. `Watch` counts what the device is given to do, and where the host would have to wait
until it has caught up.

torch starts its threads for devices at the first backward pass: import this before.
"""

from __future__ import annotations

import re
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "elsewhere"
aten = torch.ops.aten
Operator = torch._ops.OpOverload


class _Backend:
    """What torch asks a device's module for."""

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def is_initialized() -> bool:
        return True

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def manual_seed_all(_seed: int) -> None:
        pass

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16]


_setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
ELSEWHERE = torch.device(NAME, 0)


class Remote(Tensor):
    """A tensor elsewhere; `held` has its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Remote:
        made: Remote = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=ELSEWHERE
        )
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # results are placed below, operator by operator

    @classmethod
    def __torch_dispatch__(
        cls, op: Operator, _types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _compute(op, args, kwargs or {})

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy (force={force})")


class Watch:
    """How many operations have been started, and how often the host has waited, by the line of ours that made it."""

    _current: Watch | None = None

    def __init__(self) -> None:
        self.operations = 0
        self.waits: Counter[str] = Counter()

    @contextmanager
    def kept(self) -> Iterator[None]:
        Watch._current = self
        try:
            yield
        finally:
            Watch._current = None

    @classmethod
    def started(cls, op: Operator) -> None:
        """Note an operation, unless it moves no data: a view, or memory that nothing is in yet."""
        views = any(result.alias_info is not None and not result.alias_info.is_write for result in op._schema.returns)
        if cls._current is not None and not views and "empty" not in op._schema.name:
            cls._current.operations += 1

    @classmethod
    def waited(cls) -> None:
        if cls._current is not None:
            ours = [f for f in traceback.extract_stack() if re.search("(?<!tests)/(recipes|converters)/", f.filename)]
            cls._current.waits[f"{ours[-1].filename}:{ours[-1].lineno}" if ours else "elsewhere"] += 1


_INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
_LOOKS = (
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.masked_scatter.default,
    aten.equal.default,
    aten.repeat_interleave.Tensor,
    aten._unique2.default,
    aten.bincount.default,
)
"""Whose result, or its shape, the host needs."""


def _compute(op: Operator, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """`op` on the values, its results where they would be. Raises RuntimeError where a GPU does."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    remote = any(isinstance(x, Remote) for x in tensors)
    device = kwargs.get("device")
    there = remote if device is None else torch.device(device).type == NAME
    if op is aten.copy_.default:
        there = isinstance(args[0], Remote)
        _copied(args[1], there, waits=not (len(args) > 2 and args[2]))
    elif op is aten._to_copy.default:
        _copied(args[0], there, waits=not kwargs.get("non_blocking"))
    elif remote:
        _check_together(op, args, tensors)
    if there:
        Watch.started(op)
    if there and kwargs.get("generator") is not None:
        raise RuntimeError(f"Expected a {NAME!r} device type for generator but found 'cpu' in {op}")
    checks = op is aten.segment_reduce.default and not kwargs.get("unsafe")  # its lengths
    if remote and (op in _LOOKS or checks):
        Watch.waited()
    origin: dict[int, Remote] = {}

    def fetched(x: Any) -> Any:
        if not isinstance(x, Remote):
            return x
        origin[id(x.held)] = x
        return x.held

    def placed(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        known = origin.get(id(x))  # what was changed in place is itself
        return known if known is not None else Remote(x) if there else x

    values, options = tree_map(fetched, (args, dict(kwargs)))
    if device is not None and there:
        options["device"] = torch.device("cpu")
    return tree_map(placed, op(*values, **options))


def _copied(source: Tensor, there: bool, *, waits: bool) -> None:
    if isinstance(source, Remote) != there and waits:
        Watch.waited()


def _check_together(op: Operator, args: Sequence[Any], tensors: Sequence[Tensor]) -> None:
    here = [x for x in tensors if not isinstance(x, Remote) and x.dim()]
    if op in _INDEXING:
        indices = [x for x in args[1] if isinstance(x, Tensor)]
        here = [x for x in here if not any(x is index for index in indices)]
        if any(not isinstance(x, Remote) or x.dtype == torch.bool for x in indices):  # sent, or counted first
            Watch.waited()
    if here:
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {NAME} and cpu in {op}")


def _kernel(op: Operator) -> Callable[..., Any]:
    return lambda *args, **kwargs: _compute(op, args, kwargs)


_ANY = torch.library.Library("_", "IMPL")
_ANY.fallback(lambda op, *args, **kwargs: _compute(op, args, kwargs), "PrivateUse1")
_ANY.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
_ATEN = torch.library.Library("aten", "IMPL")  # what torch calls without asking Python first
for _op in (aten._to_copy.default, aten.empty.memory_format, aten.empty_strided.default):
    _ATEN.impl(_op, _kernel(_op), "PrivateUse1")
