"""Which device computes."""

from __future__ import annotations

import torch

from recipes.ranks import local_rank
from recipes.settings import Precision, SettingsError


def computing_in(precision: Precision, device: torch.device) -> torch.autocast:
    """A context in which what gains by it is computed in `precision`; nothing changes for float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


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
