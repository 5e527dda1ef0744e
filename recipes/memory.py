"""Where large tensors live, and what the C library does with memory that is given back."""

from __future__ import annotations

import atexit
import ctypes
import os
import platform
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from converters.errors import MixMixError

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


def _reserve(path: Path, size: int) -> None:
    """Raise OSError where there is no room, which would kill the process when the mapped file is written to."""
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, size)


def rows_like(part: Tensor, count: int, limit: float) -> Tensor:
    """An empty tensor for `count` rows such as those of `part` [n, ...], in its memory order.

    On part's device where it takes up to `limit` gigabytes, else on disk in the temporary folder, mapped into memory:
    the file has no name, and is gone with the tensor. Raises MixMixError where there is no room for it.
    """
    shape = (count, *part.shape[1:])
    spread = part.dim() == 4 and part.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if spread else torch.contiguous_format
    size = count * part[0].numel()
    if size * part.element_size() <= limit * GIGABYTE:
        return torch.empty(shape, dtype=part.dtype, device=part.device, memory_format=memory_format)
    handle, name = tempfile.mkstemp(prefix="mixmix-")
    os.close(handle)
    try:
        _reserve(Path(name), size * part.element_size())
        flat = torch.from_file(name, shared=True, size=size, dtype=part.dtype)
    except (OSError, RuntimeError) as error:
        raise MixMixError(
            f"the temporary folder {tempfile.gettempdir()} has no room for {size * part.element_size() / GIGABYTE:.1f}"
            " GB of activations: name another with the environment variable TMPDIR, or use fewer images"
        ) from error
    finally:
        if os.name == "posix":
            Path(name).unlink()
        else:  # a file that is mapped cannot be removed there
            atexit.register(Path(name).unlink, missing_ok=True)
    if not spread:
        return flat.view(shape)
    _, channels, height, width = shape
    return flat.view(count, height, width, channels).permute(0, 3, 1, 2)
