"""What was asked of a quantization: whether it can be written, and what the file says of it."""

from __future__ import annotations

import json

from converters.errors import MixMixError
from converters.targets import MAX_BITS, MIN_BITS, WIDE, Target
from recipes.budget import Budget
from recipes.quantize.settings import QuantizeSettings


def least_bits(bits: int | Budget) -> int:
    """The fewest bits that a weight may get."""
    return MIN_BITS if isinstance(bits, Budget) else bits


def check_bits(bits: int | Budget, act_bits: int | None) -> None:
    """Raise MixMixError for widths that cannot be written."""
    if not MIN_BITS <= least_bits(bits) <= MAX_BITS:
        raise MixMixError(f"--bits {bits} cannot be used: choose {MIN_BITS} to {MAX_BITS} bits for weights")
    if act_bits is not None and not (2 <= act_bits <= MAX_BITS or act_bits == WIDE):
        raise MixMixError(
            f"--act-bits {act_bits} cannot be used: choose 2 to {MAX_BITS} bits for activations, or {WIDE}"
        )


def what_was_asked(
    settings: QuantizeSettings, bits: int | Budget, act_bits: int | None, target: Target, images: int, seed: int
) -> dict[str, str]:
    """What the written file says of how it was made: an entry of its metadata."""
    asked = {
        "bits": str(bits) if isinstance(bits, Budget) else bits,
        "act_bits": act_bits,
        "target": target.name,
        "images": images,
        "seed": seed,
        "settings": settings.changed(),
    }
    return {"mixmix.quantize": json.dumps(asked)}
