"""How every layer of a file fares: as JSON, as a table, and what the figures mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from mixmix_cli.console import Terminal, table
from mixmix_cli.phrases import percent

if TYPE_CHECKING:
    from recipes.layer_noise import LayerNoise
    from recipes.validate import Candidate

WORST = 8
"""Layers that are shown of the noisiest; all of them with -v."""


def layer_json(layer: LayerNoise) -> dict[str, Any]:
    return {
        "name": layer.name,
        "value": layer.value,
        "op": layer.op,
        "snr_db": layer.snr,
        "own_snr_db": layer.own_snr,
        "bits": layer.bits,
        "act_bits": layer.act_bits,
        "scale": layer.scale,
        "act_scale": layer.act_scale,
        "sparsity": layer.sparsity,
        "container": layer.container,
        "compared_with": layer.compared,
        "reason": layer.reason,
    }


def layers_table(candidate: Candidate, layers: Sequence[LayerNoise], *, scales: bool = True) -> Table:
    """One row a layer, the noisiest on their own first; no columns for what all of them have in float."""
    columns: dict[str, list[str]] = {
        "layer": [_name(layer) for layer in layers],
        "op": [layer.op for layer in layers],
        "own SNR": [_decibels(layer.own_snr) for layer in layers],
        "SNR": [_decibels(layer.snr) for layer in layers],
        "bits": ["float" if layer.bits is None else str(layer.bits) for layer in layers],
        "stored as": [layer.container for layer in layers],
        "scale": [_scale(layer.scale) for layer in layers],
        "input bits": ["float" if layer.act_bits is None else str(layer.act_bits) for layer in layers],
        "input scale": [_scale(layer.act_scale) for layer in layers],
        "zeros": [percent(layer.sparsity) for layer in layers],
    }
    left_out = {"scale", "input scale"} if not scales else set()
    if all(layer.act_bits is None for layer in layers):
        left_out |= {"input bits", "input scale"}
    if all(layer.bits is None for layer in layers):
        left_out |= {"bits", "stored as", "scale"}
    shown = [name for name in columns if name not in left_out]
    rows = list(zip(*(columns[name] for name in shown), strict=True))
    title = f"layers of {candidate.path}, the noisiest on their own first"
    return table(shown, rows, title, ["op", "stored as"])


def _name(layer: LayerNoise) -> str:
    """With the value that stands for it in the reference, where that has another name."""
    return layer.name if layer.compared in (layer.value, None) else f"{layer.name} (as {layer.compared})"


def _scale(found: tuple[float, float] | None) -> str:
    if found is None:
        return "-"
    low, high = (f"{scale:.2g}" for scale in found)
    return low if low == high else f"{low} to {high}"


def meaning() -> str:
    """What the figures are."""
    from recipes.layer_noise import IMAGES

    return (
        f"SNR of each layer's output as the file runs; own SNR: on the reference's input, its own noise alone; on the"
        f" first {IMAGES} images at most"
    )


def layers_note(layers: Sequence[LayerNoise]) -> str:
    """What the figures mean, and which layers have none."""
    if not layers:
        return "no Conv, ConvTranspose, Gemm or MatMul with a constant weight: no layers to compare"
    note = meaning()
    missing = [layer for layer in layers if layer.snr is None]
    if missing:
        note += f"\n{len(missing)} of {len(layers)} layers cannot be compared:"
        for reason in dict.fromkeys(layer.reason for layer in missing):
            note += f"\n  {reason}: {', '.join(layer.name for layer in missing if layer.reason == reason)}"
    return note


def _decibels(snr: float | None) -> str:
    if snr is None:
        return "-"
    return f"{snr:.1f} dB" if math.isfinite(snr) else "equal" if snr > 0 else "not finite"


def show_worst_layers(terminal: Terminal, candidate: Candidate) -> None:
    """Those that hurt most, and what their figures mean; with -v all, and which cannot be compared."""
    layers = candidate.layers
    if not layers:
        return
    if terminal.verbose:
        terminal.show(layers_table(candidate, layers))
        terminal.show(layers_note(layers))
        return
    terminal.show(layers_table(candidate, layers[:WORST], scales=False))
    missing = sum(layer.snr is None for layer in layers)
    more = f"; all {len(layers)} layers and their scales with -v" * (len(layers) > WORST)
    terminal.show(meaning() + more + f"; {missing} cannot be compared" * bool(missing))
