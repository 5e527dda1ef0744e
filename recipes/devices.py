"""Which device computes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from converters.torch_module import Layer
from recipes.ranks import local_rank
from recipes.settings import Precision, SettingsError

LARGE = 1 << 14
"""Weights of a layer from which on AMX is faster in bfloat16: 1.4 to 2 times for 64x64x3x3 and more, not at 64x192."""


def choose_precision(wanted: Precision, layers: Iterable[Layer], device: torch.device) -> torch.dtype:
    """What to compute in; with `auto`, what is faster: bfloat16 for layers of which one is large, on a CPU with AMX."""
    if wanted != "auto":
        return torch.bfloat16 if wanted == "bfloat16" else torch.float32
    large = any(layer.groups == 1 and layer.parameters >= LARGE for layer in layers)
    return torch.bfloat16 if large and device.type == "cpu" and multiplies_bfloat16() else torch.float32


def multiplies_bfloat16() -> bool:
    """Whether the processor has units that multiply matrices of bfloat16, as far as torch can say."""
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # of later versions than 2.5
    return bool(capabilities.get("amx_bf16"))


def computing_in(precision: torch.dtype, device: torch.device) -> torch.autocast:
    """A context in which what gains by it is computed in `precision`; nothing changes for float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == torch.bfloat16)


def send(x: Tensor, device: torch.device) -> Tensor:
    """`x` on `device`, without asking to wait until that is done with what it was given before.

    For memory that is not pinned: CUDA stages it before this returns, so that it may be changed or freed then. What
    comes back from a device has to be waited for: `Tensor.to`.
    """
    return x.to(device, non_blocking=x.device.type == "cpu")


def pick(x: Tensor, rows: Tensor, device: torch.device) -> Tensor:
    """`x[rows]` on `device`, wherever `x` [N, ...] and `rows` [n] are."""
    return send(x[send(rows, x.device)], device)


def choose_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N`. Raises SettingsError when torch does not have it.

    Under torchrun, `auto` is a GPU of its own for each process of a machine, as far as there are GPUs.
    """
    if name == "auto":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return torch.device("cuda", local_rank() % count) if count else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise SettingsError(f"there is no device {name!r}: use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise SettingsError(f"device {name!r} is not supported: use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SettingsError(f"device {name!r} is not there (torch sees {torch.cuda.device_count()} GPUs): use cpu")
    return device
