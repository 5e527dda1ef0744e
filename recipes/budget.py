"""What `--mixed` says: a budget, read without torch, so that a slip of the pen is answered at once."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from converters.errors import MixMixError

Kind = Literal["size", "bops", "bits"]
NARROWEST, WIDEST = 2, 8
UNITS: Mapping[Kind, Mapping[str, float]] = {
    "size": {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30},
    "bops": {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12},
    "bits": {"": 1},
}
THOUSANDS = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))


@dataclass(frozen=True)
class Budget:
    """What all layers may cost together, in bytes, bit operations or bits a weight."""

    kind: Kind
    amount: float

    @classmethod
    def parse(cls, text: str) -> Budget:
        """From `size=2MB`, `bops=1.5G` or `bits=3`. Raises MixMixError for anything else."""
        found = re.fullmatch(r"(\w+)=([0-9]*\.?[0-9]+)\s*([A-Za-z]*)", text.strip())
        kind = next((kind for kind in get_args(Kind) if found is not None and found[1] == kind), None)
        if found is not None and kind is not None:
            unit = next((UNITS[kind][u] for u in UNITS[kind] if u.lower() == found[3].lower()), None)
            if kind == "bits" and float(found[2]) > WIDEST:
                raise MixMixError(f"--mixed {text}: weights have up to {WIDEST} bits: allow fewer")
            if kind == "bits" and float(found[2]) < NARROWEST:
                raise MixMixError(f"--mixed {text}: weights have at least {NARROWEST} bits: allow more")
            if unit is not None and float(found[2]) > 0:
                return cls(kind, float(found[2]) * unit)
        raise MixMixError(f"--mixed {text!r} is not a budget: write size=2MB, bops=1.5G or bits=3")

    def tell(self, spent: float) -> str:
        """How much of it is spent, for people."""
        if self.kind == "bits":
            return f"{spent:.2f} of {self.amount:.6g} bits a weight on average"
        scale, letter = next(((by, letter) for letter, by in THOUSANDS if self.amount >= by), (1.0, ""))
        unit = f"{letter}B" if self.kind == "size" else f"{letter} bit operations".lstrip()
        return f"{spent / scale:.4g} of {self.amount / scale:.4g} {unit}"

    def __str__(self) -> str:
        """As it is written on the command line, rounded up so that it is no less than it is."""
        if self.kind == "bits":
            return f"bits={self.amount:.6g}"
        return f"{self.kind}={math.ceil(self.amount)}" + ("B" if self.kind == "size" else "")


@dataclass(frozen=True)
class Spending:
    """What a placement of bits costs, in the budget's unit."""

    budget: Budget
    spent: float
    binds: bool
    """Whether a larger budget would take more noise out."""

    def __str__(self) -> str:
        text = self.budget.tell(self.spent)
        return text if self.binds else f"{text} (more would change nothing)"
