"""Sections on models that were made or held against a reference, and the summary of all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

from mixmix_cli.phrases import LABELS
from mixmix_cli.report import plots
from mixmix_cli.report.documents import (
    Candidate,
    Compression,
    Layer,
    LayerNoise,
    Source,
    Validation,
    clean,
)
from mixmix_cli.report.page import (
    Block,
    Cell,
    Column,
    Drawing,
    Facts,
    Note,
    Section,
    Table,
    listed,
    make_section,
    name_of,
    number,
    of_all,
    share,
    size_cell,
    text,
    text_columns,
)

ERROR_FORM = ".3g"
ALWAYS = ("finite", "optimisations")
"""Gates that nobody has to ask for."""


def summarise(sources: Sequence[Source]) -> list[Block]:
    """All candidates at a glance, and what their gates say; nothing where no model was judged."""
    judged = [
        (source, validation, candidate)
        for source in sources
        if (validation := _validation_in(source)) is not None
        for candidate in validation.candidates
    ]
    if not judged:
        return []
    rows = []
    for source, validation, candidate in judged:
        reference = validation.reference
        rows.append(
            [
                text(name_of(candidate.path)),
                size_cell(candidate.size_bytes),
                _times(reference.size_bytes, candidate.size_bytes),
                share(candidate.top1),
                share(candidate.drop),
                share(candidate.agreement),
                number(candidate.latency_ms, ".2f", " ms"),
                _times(reference.latency_ms, candidate.latency_ms),
                number(validation.images),
                _gates(candidate),
                text(source.path.name),
            ]
        )
    columns = [
        *map(Column, ["model", "size", "smaller", "top-1", "drop", "agreement", "latency", "faster"]),
        Column("images"),
        Column("gates", False),
        Column("from", False),
    ]
    return [
        _verdict(judged),
        Table("At a glance, each against its reference; smaller and faster are how many times", columns, rows),
    ]


def _validation_in(source: Source) -> Validation | None:
    if isinstance(source.content, Validation):
        return source.content
    return source.content.validation if isinstance(source.content, Compression) else None


def _verdict(judged: Sequence[tuple[Source, Validation, Candidate]]) -> Note:
    count = len(judged)
    failing = [
        f"{name_of(candidate.path)} in {clean(source.path.name)} ({', '.join(candidate.failed) or 'not said which'})"
        for source, _, candidate in judged
        if not _passes(candidate)
    ]
    free = [
        f"{name_of(candidate.path)} in {clean(source.path.name)}"
        for source, _, candidate in judged
        if _passes(candidate) and not _asked(candidate)
    ]
    unasked = f" No gate was asked for: {'; '.join(free)}." if free else ""
    if failing:
        verb = "fails" if len(failing) == 1 else "fail"
        return Note(f"{len(failing)} of {count} results {verb} a gate: {'; '.join(failing)}.{unasked}", "bad")
    if len(free) == count:
        return Note(
            "No gate was asked for, so nothing here says whether a model is good enough: mixmix validate takes"
            " --max-drop, --min-top1 and --min-agreement.",
            "open",
        )
    passing = count - len(free)
    verb = "passes" if passing == 1 else "pass"
    return Note(f"{passing} of {count} results {verb} every gate that was asked for.{unasked}", "good")


def _passes(candidate: Candidate) -> bool:
    return candidate.passed and not candidate.failed and all(gate.passed for gate in candidate.gates)


def _asked(candidate: Candidate) -> bool:
    return any(gate.gate not in ALWAYS for gate in candidate.gates)


def _gates(candidate: Candidate) -> Cell:
    if not _passes(candidate):
        failed = candidate.failed or [gate.gate for gate in candidate.gates if not gate.passed]
        return text(f"failed: {', '.join(failed)}" if failed else "failed", "bad")
    return text("passed", "good") if _asked(candidate) else text("none asked", "open")


def _times(reference: float, candidate: float) -> Cell:
    return number(reference / candidate if candidate else None, ".2f", "×")


def validation(source: Source, content: Validation) -> Section:
    names = [name_of(candidate.path) for candidate in content.candidates]
    blocks = _judgement(content)
    for candidate in content.candidates:
        if candidate.layers is not None:
            blocks += _noise(candidate, candidate.layers)
    title = f"Validation: {listed(names)} against {name_of(content.reference.path)}"
    return make_section(source, "validation", title, blocks, names)


def _judgement(content: Validation) -> list[Block]:
    """Accuracy, size and latency of reference and candidates, and each gate with its reason."""
    reference = content.reference
    rows = [
        [
            text(f"{reference.path} (reference)"),
            share(reference.top1),
            share(reference.top5),
            *[Cell("")] * 4,
            size_cell(reference.size_bytes),
            number(reference.latency_ms, ".2f", " ms"),
            Cell(""),
        ]
    ]
    rows += [
        [
            text(candidate.path),
            share(candidate.top1),
            share(candidate.top5),
            share(candidate.drop),
            share(candidate.agreement),
            number(candidate.kl, ".4f"),
            number(candidate.snr_db, ".1f", " dB"),
            size_cell(candidate.size_bytes),
            number(candidate.latency_ms, ".2f", " ms"),
            _gates(candidate),
        ]
        for candidate in content.candidates
    ]
    columns = [
        *map(Column, ["model", "top-1", "top-5", "drop", "agreement", "KL", "SNR", "size", "latency"]),
        Column("gates", False),
    ]
    gates = [
        [
            text(name_of(candidate.path)),
            text(gate.gate),
            text("passed", "good") if gate.passed else text("failed", "bad"),
            text(gate.reason),
        ]
        for candidate in content.candidates
        for gate in candidate.gates
    ]
    blocks: list[Block] = [Table("By onnxruntime on the files as they are", columns, rows), Note(_measured(content))]
    if gates:
        blocks.append(Table("Gates", text_columns("model", "gate", "verdict", "why"), gates))
    return blocks


def _measured(content: Validation) -> str:
    sentence = f"On {content.images:,} images; {LABELS[content.labels]}."
    top1 = content.reference.top1
    if content.labels == "real" and top1 is not None and content.images:
        spread = 100 * math.sqrt(top1 * (1 - top1) / content.images)
        sentence += f" One standard error of an accuracy like the reference's is {spread:.1f} points on so many."
    return sentence


def _noise(candidate: Candidate, layers: Sequence[LayerNoise]) -> list[Block]:
    """Signal-to-noise ratios by layer: the worst as a plot, all as a table, and which have none."""
    name = name_of(candidate.path)
    both = [
        (layer.known_as, layer.own_snr_db, layer.snr_db)
        for layer in layers
        if layer.own_snr_db is not None and layer.snr_db is not None
    ]
    both.sort(key=lambda entry: entry[1])
    shown = both[: plots.MOST_BARS]
    blocks: list[Block] = []
    if shown:
        caption = (
            f"Signal-to-noise ratio of layer outputs of {name} in dB, worst first: on the reference's input, which is"
            f" the noise of that layer alone, and as the file runs, with the noise of all layers before it."
            f"{of_all(len(shown), len(layers))}"
        )
        svg = plots.pairs(
            [value for value, _, _ in shown],
            [own for _, own, _ in shown],
            [snr for _, _, snr in shown],
            ("own SNR", "as the file runs"),
            ".1f",
            "dB, more is better",
            caption,
        )
        blocks.append(Drawing(svg, caption))
    rows = [
        [
            text(layer.known_as),
            text(layer.op),
            number(layer.own_snr_db, ".1f", " dB"),
            number(layer.snr_db, ".1f", " dB"),
            _bits(layer.bits),
            text(layer.container),
            _bits(layer.act_bits),
            share(layer.sparsity),
            text(layer.reason),
        ]
        for layer in layers
    ]
    columns = [
        Column("layer"),
        Column("op", False),
        *map(Column, ["own SNR", "SNR", "bits"]),
        Column("stored as", False),
        Column("input bits"),
        Column("zeros"),
        Column("why there is no SNR", False),
    ]
    blocks.append(Table(f"All {len(layers)} layers of {name} in figures", columns, rows, folded=True))
    missing = [layer for layer in layers if layer.snr_db is None]
    for reason, group in groupby(sorted(missing, key=lambda layer: layer.reason or ""), lambda layer: layer.reason):
        values = [clean(layer.known_as) for layer in group]
        why = clean(reason) if reason else "no finite SNR, as where nothing differs"
        blocks.append(Note(f"{name}: {len(values)} of {len(layers)} layers without SNR: {why}: {listed(values)}."))
    return blocks


def _bits(value: int | None) -> Cell:
    return text("float") if value is None else number(value)


def compression(source: Source, content: Compression) -> Section:
    name, taught = name_of(content.output), content.validation.reference.path != content.input
    facts = [
        ("made from", text(content.input)),
        *([("taught by", text(content.validation.reference.path))] if taught else []),
        ("written to", text(content.output)),
        ("weights", text(_widths(content))),
        ("activations", text("float" if content.act_bits is None else f"{content.act_bits} bits")),
        ("zeros among the weights", share(content.sparsity)),
        ("size before", size_cell(content.size_bytes.before)),
        ("size after", size_cell(content.size_bytes.after)),
        ("times smaller", _times(content.size_bytes.before, content.size_bytes.after)),
        ("time it took", number(content.seconds, ".1f", " s")),
        ("file against computation", number(content.written_difference, ".1e", " largest relative difference")),
    ]
    if content.fusion is not None:
        fusion = content.fusion
        facts.append(("run in integers here", text(f"{fusion.counted} of {fusion.layers} layers")))
    blocks: list[Block] = [
        Facts(facts),
        *_judgement(content.validation),
        Note("These are the images that it was made on: hold it against others with mixmix validate."),
        *_block_errors(content),
        *_layer_errors(content.layers, "change" if taught else "error"),
    ]
    return make_section(source, "compression", f"Compression: {name}", blocks, [name])


def _widths(content: Compression) -> str:
    if content.bits is not None:
        kept = sum(layer.bits != content.bits for layer in content.layers)
        return f"{content.bits} bits" + (f", {kept} of {len(content.layers)} layers otherwise" if kept else "")
    widths = sorted({layer.bits for layer in content.layers if layer.bits is not None})
    counts = [f"{sum(layer.bits == bits for layer in content.layers)} layers of {bits} bits" for bits in widths]
    return ", ".join(counts) or "float"


def _block_errors(content: Compression) -> list[Block]:
    if not content.blocks:
        return []
    rows = [
        [text(block.name), number(block.before, ERROR_FORM), number(block.after, ERROR_FORM)]
        for block in content.blocks
    ]
    finite = [(b.name, b.before, b.after) for b in content.blocks if b.before is not None and b.after is not None]
    largest = sorted(finite, key=lambda entry: -max(entry[1:]))[: plots.MOST_BARS]
    shown = [entry for entry in finite if entry in largest][: plots.MOST_BARS]
    blocks: list[Block] = []
    if any(before or after for _, before, after in shown):
        same = all(before == after for _, before, after in finite)
        caption = (
            "Squared error of each block's output before and after reconstruction, as a share of the output's mean"
            " square, in the order of the network."
            + (" Nothing was reconstructed: both are the same." if same else "")
            + of_all(len(shown), len(content.blocks))
        )
        svg = plots.pairs(
            [name for name, _, _ in shown],
            [before for _, before, _ in shown],
            [after for _, _, after in shown],
            ("before", "after"),
            ERROR_FORM,
            "relative squared error, less is better",
            caption,
        )
        blocks.append(Drawing(svg, caption))
    columns = [Column("block"), Column("before"), Column("after")]
    return [*blocks, Table(f"All {len(rows)} blocks in figures", columns, rows, folded=True)]


def _layer_errors(layers: Sequence[Layer], word: str) -> list[Block]:
    if not layers:
        return []
    measured = [(layer, layer.error) for layer in layers if layer.error]
    measured.sort(key=lambda entry: -entry[1])
    shown = measured[: plots.MOST_BARS]
    blocks: list[Block] = []
    if shown:
        caption = (
            f"Squared {word} of each layer's weights as a share of their squares, largest first, with what the layer"
            f" has become. Layers without any are left out.{of_all(len(shown), len(measured))}"
        )
        svg = plots.bars(
            [layer.name for layer, _ in shown],
            [error for _, error in shown],
            [", ".join([format(error, ERROR_FORM), *_what(layer)]) for layer, error in shown],
            f"relative squared {word}",
            caption,
        )
        blocks.append(Drawing(svg, caption))
    rows = [
        [
            text(layer.name),
            _bits(layer.bits),
            _bits(layer.act_bits),
            share(layer.sparsity),
            number(layer.error, ERROR_FORM),
            text(layer.reason),
        ]
        for layer in layers
    ]
    columns = [
        *map(Column, ["layer", "bits", "input bits", "zeros", word]),
        Column("why otherwise than asked", False),
    ]
    return [*blocks, Table(f"All {len(rows)} layers in figures", columns, rows, folded=True)]


def _what(layer: Layer) -> list[str]:
    parts = [f"{layer.bits} bits"] * (layer.bits is not None)
    return parts + [f"{100 * layer.sparsity:.0f} % zeros"] * (layer.bits is None and layer.sparsity > 0)
