"""Where large tensors live, and what the C library does with memory that is given back."""

from __future__ import annotations

import ctypes
import os
import platform
import tempfile
from pathlib import Path

import torch
from torch import Tensor

GIGABYTE = 1e9
MMAP_MAX, TRIM_THRESHOLD = -4, -1
"""Parameters of glibc's mallopt."""


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, for its next tensors; whether that could be arranged.

    glibc gives large blocks back to the system at once, which then clears each page anew: a third of the time of a step
    on EfficientNet-Lite0 at 64 images of 224x224. What is kept makes the peak a fifth higher there (6.8 to 8.1 GB).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(MMAP_MAX, 0)) and bool(mallopt(TRIM_THRESHOLD, 2**31 - 1))


def rows_like(part: Tensor, count: int, limit: float) -> Tensor:
    """An empty tensor for `count` rows such as those of `part` [n, ...], in its memory order.

    On part's device where it takes up to `limit` gigabytes, else on disk, mapped into memory: the file has no name, and
    is gone with the tensor.
    """
    shape = (count, *part.shape[1:])
    spread = part.dim() == 4 and part.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if spread else torch.contiguous_format
    size = count * part[0].numel()
    if size * part.element_size() <= limit * GIGABYTE:
        return torch.empty(shape, dtype=part.dtype, device=part.device, memory_format=memory_format)
    handle, name = tempfile.mkstemp(prefix="mixmix-")
    os.close(handle)
    flat = torch.from_file(name, shared=True, size=size, dtype=part.dtype)
    if os.name == "posix":  # elsewhere a file that is mapped cannot be removed
        Path(name).unlink()
    if not spread:
        return flat.view(shape)
    _, channels, height, width = shape
    return flat.view(count, height, width, channels).permute(0, 3, 1, 2)
