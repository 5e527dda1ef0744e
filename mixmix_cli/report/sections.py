"""From what commands printed to what a page shows. Computes nothing that is not in them but ratios and counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mixmix_cli.phrases import likeness, pixels
from mixmix_cli.report import plots
from mixmix_cli.report.documents import (
    Comparison,
    Compression,
    Demo,
    Inspection,
    ModelInput,
    Source,
    Synthesis,
    Validation,
    clean,
)
from mixmix_cli.report.models import compression, validation
from mixmix_cli.report.page import (
    Block,
    Column,
    Drawing,
    Facts,
    Note,
    Picture,
    Section,
    Table,
    listed,
    make_section,
    name_of,
    number,
    of_all,
    share,
    text,
    text_columns,
)

if TYPE_CHECKING:
    from recipes.records import SetRecord, Shard

ABOUT_IMAGES = ("images", "synthesis", "comparison")


def section_of(source: Source) -> Section:
    """What one input comes to."""
    content = source.content
    makers: dict[type, Callable[[Source, Any], Section]] = {
        Validation: validation,
        Compression: compression,
        Synthesis: _synthesis,
        Comparison: _comparison,
        Demo: _demo,
        list: _inspection,
    }
    return makers.get(type(content), _image_set)(source, content)


def title_of(sections: Sequence[Section]) -> str:
    """Names what is reported: models first, image sets where there is no model."""
    models = [section for section in sections if section.kind not in ABOUT_IMAGES]
    names = list(dict.fromkeys(name for section in models or sections for name in section.names))
    return f"MixMix report: {listed(names)}"


def _image_set(source: Source, content: SetRecord) -> Section:
    """A folder of `synth`."""
    made, shards = content.made, content.shards
    asked = made.settings.images
    retried = sum(shard.attempts - 1 for shard in shards)
    state = "finished" if content.finished else f"not finished: {content.images} of {asked}; synth --resume goes on"
    facts = [
        ("images", number(content.images)),
        ("state", text(state, "" if content.finished else "bad")),
        ("height and width", text("x".join(map(str, made.size)))),
        ("recipe", text(made.recipe)),
        ("seed", number(made.seed, "")),
        ("batches", number(len(shards))),
        *([("made again, having diverged", number(retried))] if retried else []),
        ("time it took", number(content.seconds, ".1f", " s")),
        ("versions", text(", ".join(f"{key} {value}" for key, value in made.versions.items()))),
    ]
    blocks: list[Block] = [Facts(facts)]
    if content.sheet is None:
        blocks.append(Note("There is no image to show."))
    else:
        blocks.append(Picture(content.sheet, "The first images of the set, made from the models alone."))
    rows = [
        [
            text(m.name),
            number(m.batchnorms),
            number(m.evens),
            text({True: "yes", False: "no", None: None}[m.labels]),
            text(m.sha256),
        ]
        for m in made.models
    ]
    columns = [
        Column("model"),
        Column("BatchNorm"),
        Column("even channels"),
        Column("label loss", False),
        Column("SHA-256", False),
    ]
    blocks.append(Table("Models that the images were made from", columns, rows))
    blocks += _losses(content.losses, "means over all batches")
    blocks += _loss_curves(shards)
    name = name_of(str(source.path.resolve()))
    title = f"Images: {name}, from {listed([clean(model.name) for model in made.models])}"
    return make_section(source, "images", title, blocks, [name])


def _losses(losses: Mapping[str, float | None], what: str) -> list[Block]:
    if not losses:
        return []
    rows = [[text(name), number(value, ".4g")] for name, value in losses.items()]
    return [Table(f"Losses on the finished images, {what}", [Column("loss"), Column("value")], rows)]


def _loss_curves(shards: Sequence[Shard]) -> list[Block]:
    """One plot a kind of loss (the word before the slash), one line a model, over the batches."""
    series: dict[str, dict[str, dict[int, float]]] = {}
    for shard in shards:
        for loss, value in shard.losses.items():
            if value is not None and math.isfinite(value):
                kind, _, model = loss.partition("/")
                series.setdefault(kind, {}).setdefault(model or kind, {})[shard.index] = value
    blocks: list[Block] = []
    for kind, by_model in series.items():
        caption = (
            f"Loss {clean(kind)} of each batch's finished images by model, neither augmented nor mixed. A set keeps"
            " the final losses of each batch, not the steps on the way there."
        )
        svg = plots.lines(by_model, "batch", f"loss {clean(kind)}", caption)
        blocks.append(Drawing(svg, caption))
    return blocks


def _synthesis(source: Source, content: Synthesis) -> Section:
    facts = [
        ("folder", text(content.dir)),
        ("images", number(content.images)),
        ("models", text(", ".join(content.models))),
        *([("left out", text(", ".join(content.left_out)))] if content.left_out else []),
        *([("batches made again", number(content.retried))] if content.retried else []),
        ("time it took", number(content.seconds, ".1f", " s")),
        ("time an image", number(content.seconds_per_image, ".3g", " s")),
    ]
    blocks: list[Block] = [Facts(facts), *_losses(content.final, "means over all batches")]
    blocks.append(Note("The images themselves are in the folder: name it to mixmix report to see them."))
    name = name_of(content.dir)
    return make_section(source, "synthesis", f"Synthesis: {name}", blocks, [name])


def _demo(source: Source, content: Demo) -> Section:
    columns = list(dict.fromkeys(column for row in content.top1.values() for column in row))
    rows = [[text(name), *(share(row.get(column)) for column in columns)] for name, row in content.top1.items()]
    spread = 100 * math.sqrt(content.float_top1 * (1 - content.float_top1) / max(1, content.images))
    facts = [
        ("model", text(content.target)),
        ("top-1 of the float model", share(content.float_top1)),
        ("test images", number(content.images)),
        *((name, number(seconds, ".1f", " s")) for name, seconds in content.seconds.items()),
    ]
    blocks: list[Block] = [
        Facts(facts),
        Table(
            "Top-1 by what was asked for, and on what it was made: nearest is rounding, or removing the smallest,"
            " without training; the others are reconstructed on these images",
            [Column(""), *map(Column, columns)],
            rows,
        ),
        Note(f"Against real labels; one standard error of the float model's accuracy is {spread:.1f} points."),
    ]
    if source.sheet is not None:
        blocks.append(Picture(source.sheet, "The first images that were made from the whole zoo."))
    return make_section(source, "demo", f"Demo: {clean(content.target)}, smaller", blocks, [clean(content.target)])


def _inspection(source: Source, content: Sequence[Inspection]) -> Section:
    rows = [
        [
            text(model.path),
            text(f"{'x'.join(map(str, model.input.size))} {model.input.channels}"),
            text(_pixels(model.input)),
            number(model.classes),
            text(model.output),
            number(model.opset),
            number(model.params),
            number(model.macs),
            number(model.batchnorm.count),
            number(model.batchnorm.folded),
            share(model.sparsity),
        ]
        for model in content
    ]
    columns = [
        *text_columns("model", "input", "pixels"),
        Column("classes"),
        Column("output", False),
        *map(Column, ["opset", "parameters", "MACs", "BatchNorm kept", "folded", "zeros"]),
    ]
    blocks: list[Block] = [Table("As the files say", columns, rows)]
    able = [
        [text(name_of(model.path)), text(task), text("yes" if can else "no"), text(model.why_not.get(task))]
        for model in content
        for task, can in model.can.items()
    ]
    blocks.append(Table("What can be done with them", text_columns("model", "command", "can it", "why not"), able))
    missing = [
        [text(name_of(model.path)), text(found.op), number(found.opset), text(found.node)]
        for model in content
        for found in model.unsupported
    ]
    if missing:
        head = [Column("model"), Column("operator", False), Column("opset"), Column("node", False)]
        blocks.append(Table("Operators that cannot be converted", head, missing))
    names = [name_of(model.path) for model in content]
    return make_section(source, "inspection", f"Models: {listed(names)}", blocks, names)


def _pixels(spec: ModelInput) -> str:
    certain = "" if spec.confidence is None else f", confidence {spec.confidence:.2f}"
    return f"{pixels(spec)} ({spec.source}{certain})"


def _comparison(source: Source, content: Comparison) -> Section:
    a, b = content.a, content.b
    facts = [
        ("first set", text(a.path)),
        ("its images", number(a.images)),
        ("second set", text(b.path)),
        ("its images", number(b.images)),
        ("in the eyes of", text(content.model)),
        ("MMD²", number(content.mmd2, ".4f")),
        ("p-value", number(content.p_value, ".3f", f" {likeness(content.p_value, content.permutations)}")),
        ("distance of statistics", number(content.distance, ".3f", " of the spread, mean over layers")),
        ("first to training", number(a.distance_to_stored, ".3f", " from the stored statistics")),
        ("second to training", number(b.distance_to_stored, ".3f", " from the stored statistics")),
    ]
    blocks: list[Block] = [Facts(facts)]
    measured = [(layer.value, layer.distance) for layer in content.layers if layer.distance is not None]
    measured.sort(key=lambda entry: -entry[1])
    shown = measured[: plots.MOST_BARS]
    if shown:
        caption = (
            "Distance of the two sets' statistics by layer, as a share of their spread, largest first."
            f"{of_all(len(shown), len(content.layers))}"
        )
        distances = [distance for _, distance in shown]
        svg = plots.bars([value for value, _ in shown], distances, [f"{d:.3f}" for d in distances], "distance", caption)
        blocks.append(Drawing(svg, caption))
    if content.layers:
        rows = [[text(layer.value), number(layer.distance, ".3f")] for layer in content.layers]
        head = [Column("layer"), Column("distance")]
        blocks.append(Table(f"All {len(rows)} layers in figures", head, rows, folded=True))
    names = [name_of(a.path), name_of(b.path)]
    return make_section(source, "comparison", f"Image sets: {names[0]} and {names[1]}", blocks, names)
