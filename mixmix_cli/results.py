"""Results as the contract's JSON documents and as tables. Takes what recipes return; computes nothing of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from mixmix_cli.console import Terminal, table
from mixmix_cli.layers import layer_json
from mixmix_cli.phrases import counted, likeness, percent, pixels, size

if TYPE_CHECKING:
    from converters.input_spec import Detection, InputSpec
    from converters.kernels import Fusion
    from recipes.account import Compression
    from recipes.budget import Spending
    from recipes.compare import Comparison
    from recipes.inspect import Inspection
    from recipes.synth.engine import Synthesis
    from recipes.validate import Candidate, Validation
    from recipes.zoo import Zoo
    from recipes.zoo_facts import ZooFacts


def synthesis_json(result: Synthesis) -> dict[str, Any]:
    return {
        "dir": result.directory,
        "images": result.images,
        "seconds": result.seconds,
        "seconds_per_image": result.seconds_per_image,
        "models": result.models,
        "left_out": result.left_out,
        "retried": result.retried,
        "final": result.losses,
    }


def compression_json(result: Compression, validation: Validation) -> dict[str, Any]:
    return {
        "input": result.input,
        "output": result.output,
        "spec": spec_json(result.spec),
        "bits": result.bits,
        "act_bits": result.act_bits,
        "budget": None if result.spending is None else spending_json(result.spending),
        "sparsity": result.sparsity,
        "macs_left": result.macs_left,
        "blocks": [{"name": name, "before": r.before, "after": r.after} for name, r in result.blocks],
        "layers": [
            {
                "name": layer.name,
                "weights": layer.weights,
                "bits": layer.bits,
                "act_bits": layer.act_bits,
                "sparsity": layer.sparsity,
                "error": layer.error,
                "undecided": layer.undecided,
                "reason": "; ".join(filter(None, (layer.whole, layer.reason))) or None,
            }
            for layer in result.layers
        ],
        "size_bytes": {"before": result.size_before, "after": result.size_after},
        "seconds": result.seconds,
        "written_difference": result.written_difference,
        "fusion": None if result.fusion is None else fusion_json(result.fusion),
        "slower_because": slower_because(result, validation),
        "validation": validation_json(validation),
    }


def spending_json(spending: Spending) -> dict[str, Any]:
    budget = spending.budget
    return {"kind": budget.kind, "allowed": budget.amount, "spent": spending.spent, "binds": spending.binds}


SLOWER = 1.05
"""Times the float model's latency from which it is said; below is noise."""


def slower_because(result: Compression, validation: Validation) -> str | None:
    """Why the file is slower than the float model; None where it is not, or nothing is known of it."""
    (candidate,) = validation.candidates
    slower = candidate.latency_ms > SLOWER * validation.reference.latency_ms
    return result.likely_slow_because if slower else None


NAMED = 4
"""Layers that are called by name where many share a reason."""


def placement_line(result: Compression) -> str:
    """Which layers have other bits than was asked for and why; where a budget was given, how many have how many.

    Where inputs have other bits than was asked for, a second line says so.
    """
    return "\n".join(filter(None, (_weights_line(result), _inputs_line(result))))


def _weights_line(result: Compression) -> str:
    if result.bits is None:
        used = sorted({layer.bits for layer in result.layers if layer.bits is not None})
        counts = [
            f"{counted(sum(layer.bits == bits for layer in result.layers), 'layer')} at {bits} bits" for bits in used
        ]
        return f"{result.spending}: {', '.join(counts)}"
    if not result.kept:
        return f"all {counted(len(result.layers), 'layer')} at {result.bits} bits"
    reasons: dict[str | None, dict[int | None, list[str]]] = {}
    for layer in result.kept:
        reasons.setdefault(layer.reason, {}).setdefault(layer.bits, []).append(layer.name)
    parts = []
    for reason, widths in reasons.items():
        groups = [f"{bits} bits for {_named(names)}" for bits, names in widths.items()]
        parts.append(f"{'; '.join(groups)} ({reason})")
    layers = counted(len(result.layers), "layer")
    return f"{len(result.kept)} of {layers} have other bits than {result.bits}: {'; '.join(parts)}"


def _inputs_line(result: Compression) -> str:
    others: dict[int, list[str]] = {}
    for layer in result.layers:
        if layer.act_bits is not None and layer.act_bits != result.act_bits:
            others.setdefault(layer.act_bits, []).append(layer.name)
    if not others:
        return ""
    groups = [f"{bits} bits for {_named(names)}" for bits, names in sorted(others.items())]
    layers = counted(sum(len(names) for names in others.values()), "layer")
    return f"inputs of {layers} have other bits than {result.act_bits}: {'; '.join(groups)}"


def _named(names: Sequence[str]) -> str:
    """The first of many names, and how many more there are."""
    return ", ".join(names[:NAMED]) + f" and {len(names) - NAMED} more" * (len(names) > NAMED)


def fusion_json(fusion: Fusion) -> dict[str, Any]:
    return {
        "layers": fusion.layers,
        "forecast": fusion.forecast,
        "counted": fusion.counted,
        "operators": dict(fusion.operators),
    }


def fusion_line(fusion: Fusion) -> str:
    """What runs in integers, in one sentence."""
    text = f"{fusion.counted} of {fusion.layers} layers run in integers in onnxruntime on this machine"
    return text + ("" if fusion.counted == fusion.forecast else f", where {fusion.forecast} were forecast")


def spec_json(spec: InputSpec) -> dict[str, Any]:
    return {
        "size": list(spec.size),
        "channels": spec.channels,
        "layout": spec.layout,
        "scale": spec.scale,
        "mean": list(spec.mean),
        "std": list(spec.std),
        "source": spec.source,
    }


def validation_json(result: Validation) -> dict[str, Any]:
    reference = result.reference
    return {
        "reference": {
            "path": reference.path,
            "top1": reference.top1,
            "top5": reference.top5,
            "size_bytes": reference.size_bytes,
            "latency_ms": reference.latency_ms,
        },
        "candidates": [_figures_json(candidate) | _verdict_json(candidate) for candidate in result.candidates],
        "beside": [_figures_json(model) for model in result.beside],
        "images": result.images,
        "labels": result.labels,
    }


def _figures_json(candidate: Candidate) -> dict[str, Any]:
    return {
        "path": candidate.path,
        "top1": candidate.top1,
        "top5": candidate.top5,
        "agreement": candidate.agreement,
        "kl": candidate.kl,
        "snr_db": candidate.snr,
        "drop": candidate.drop,
        "size_bytes": candidate.size_bytes,
        "latency_ms": candidate.latency_ms,
        "optimisation_snr_db": candidate.fusion_snr,
    }


def _verdict_json(candidate: Candidate) -> dict[str, Any]:
    return {
        "passed": candidate.passed,
        "failed": candidate.failed,
        "gates": [
            {"gate": gate.gate, "passed": gate.passed, "reason": gate.reason, "seconds": gate.seconds}
            for gate in candidate.verdicts
        ],
        "layers": None if candidate.layers is None else [layer_json(layer) for layer in candidate.layers],
    }


def validation_table(result: Validation) -> Table:
    reference = result.reference
    rows = [
        [
            str(reference.path),
            percent(reference.top1),
            percent(reference.top5),
            "-",
            "-",
            "-",
            size(reference.size_bytes),
            f"{reference.latency_ms:.2f} ms",
            "",
        ]
    ]
    rows += [
        [
            str(candidate.path),
            percent(candidate.top1),
            percent(candidate.top5),
            percent(candidate.agreement),
            f"{candidate.kl:.4f}",
            f"{candidate.snr:.1f} dB",
            size(candidate.size_bytes),
            f"{candidate.latency_ms:.2f} ms",
            _gates(candidate),
        ]
        for candidate in (*result.beside, *result.candidates)
    ]
    columns = ["model", "top-1", "top-5", "agreement", "KL", "SNR", "size", "latency", "gates"]
    return table(columns, rows, texts=["gates"])


def _gates(candidate: Candidate) -> str:
    """Every gate by name, those that nobody has to ask for too."""
    passed = [verdict.gate for verdict in candidate.verdicts if verdict.passed]
    groups = {"failed": candidate.failed, "passed": passed}
    return "; ".join(f"{word}: {', '.join(gates)}" for word, gates in groups.items() if gates)


def show_failures(terminal: Terminal, candidate: Candidate) -> None:
    """Every gate that a candidate fails, and why."""
    for verdict in candidate.verdicts:
        if not verdict.passed:
            terminal.show(f"{candidate.path} fails {verdict.gate}: {verdict.reason}")


def inspection_json(result: Inspection) -> dict[str, Any]:
    classifier, spec, detection = result.classifier, result.classifier.spec, result.classifier.detection
    reasons = _reasons(result)
    return {
        "path": classifier.path,
        "input": {
            **spec_json(spec),
            "confidence": detection.confidence if detection is not None else None,
            "runner_up": detection.runner_up if detection is not None else None,
            "evidence": detection.evidence if detection is not None else None,
            "type": classifier.image_type.name.lower(),
            "batch": classifier.fixed_batch,
        },
        "classes": result.classes,
        "output": classifier.output_kind,
        "opset": classifier.opset,
        "params": result.parameters,
        "macs": result.macs,
        "batchnorm": {"count": result.batchnorms, "folded": result.folded},
        "blocks": [
            {"inputs": list(block.inputs), "output": block.output, "layers": [layer.name for layer in block.layers]}
            for block in result.blocks
        ],
        "quantized": classifier.quantized,
        "sparsity": result.sparsity,
        "layers": [
            {"name": layer.name, "weights": layer.weights, "zeros": layer.zeros, "obeys": layer.obeys}
            for layer in result.zeros
        ],
        "notes": list(classifier.notes),
        "unsupported": [
            {"op": found.op, "opset": found.opset, "node": found.node, "help": found.help}
            for found in result.unsupported
        ],
        "can": {task: reason is None for task, reason in reasons.items()},
        "why_not": {task: reason for task, reason in reasons.items() if reason is not None},
    }


def _reasons(result: Inspection) -> dict[str, str | None]:
    """Why each task cannot be done with the model; None where it can."""
    return {
        "synth": result.why_not_synthesize,
        "quantize": result.why_not_quantize,
        "prune": result.why_not_prune,
    }


def inspection_page(result: Inspection) -> Table:
    classifier, spec, detection = result.classifier, result.classifier.spec, result.classifier.detection
    macs = "-" if result.macs is None else f"{result.macs / 1e6:,.1f} million for one image"
    sizes = [len(block.layers) for block in result.blocks]
    source: str = spec.source if detection is None else f"detected, confidence {detection.confidence:.2f}"
    source += ": say so with --mean, --std, --scale or a .toml beside it, if that is wrong" * (source == "assumed")
    batch = "any batch" if classifier.fixed_batch is None else f"batches of {classifier.fixed_batch}"
    kind = classifier.image_type.name.lower()
    rows = [
        ("input", f"{spec.size[0]}x{spec.size[1]} {spec.channels}, {spec.layout}, {kind}, {batch}"),
        ("pixels", f"{pixels(spec)} ({source})"),
        *([("", f"{detection.evidence}" + _second(detection))] if detection is not None else []),
        ("output", f"{_classes(result.classes)}, {classifier.output_kind}"),
        *(("", note) for note in classifier.notes),
        ("file", f"{size(classifier.size_bytes)}, opset {classifier.opset}"),
        ("parameters", f"{result.parameters:,}"),
        ("zeros", f"{percent(result.sparsity)} of the weights of {len(result.zeros)} layers"),
        ("MACs", macs),
        ("BatchNorm", f"{result.batchnorms} layers kept, {result.folded} convolutions with a bias in place of one"),
        ("blocks", f"{len(sizes)} to reconstruct, of {min(sizes)} to {max(sizes)} layers" if sizes else "none"),
        *((task, f"no: {reason}" if reason else _yes(task, result)) for task, reason in _reasons(result).items()),
    ]
    return _page(str(classifier.path), rows)


def _classes(count: int | None) -> str:
    if count == 1:
        return "two classes by one number"
    return f"{'?' if count is None else count} classes"


def pattern_page(result: Inspection, pattern: str) -> str:
    """Which layers have the pattern, in one sentence."""
    fitting = [layer for layer in result.zeros if layer.obeys is not None]
    failing = [layer.name for layer in fitting if not layer.obeys]
    without = len(result.zeros) - len(fitting)
    text = f"{pattern}: {len(fitting) - len(failing)} of {len(result.zeros)} layers have it"
    text += f"; it does not divide the input channels of {without}" * bool(without)
    return text + (f"; these have not: {', '.join(failing)}" if failing else "")


def _yes(task: str, result: Inspection) -> str:
    if task == "synth" and not result.batchnorms:
        by = "its labels and even channels" if result.shaping else "its labels alone"
        return f"yes, from {by}: it has no BatchNorm statistics (better: --zoo, models that have)"
    return "yes"


def _second(detection: Detection) -> str:
    return f"; second best: {detection.runner_up}" if detection.runner_up else ""


def comparison_json(a: Path, b: Path, result: Comparison) -> dict[str, Any]:
    stored = result.to_stored
    return {
        "a": {"path": a, "images": result.counts[0], "distance_to_stored": stored and stored[0]},
        "b": {"path": b, "images": result.counts[1], "distance_to_stored": stored and stored[1]},
        "model": result.model,
        "features": result.features,
        "mmd2": result.mmd2,
        "p_value": result.p_value,
        "permutations": result.permutations,
        "distance": result.distance,
        "layers": [{"value": name, "distance": distance} for name, distance in result.layers],
    }


def comparison_page(a: Path, b: Path, result: Comparison) -> Table:
    stored = result.to_stored
    worst = max(result.layers, key=lambda layer: layer[1])
    rows = [
        ("images", f"{result.counts[0]} of {a}, {result.counts[1]} of {b}"),
        ("MMD^2", f"{result.mmd2:.4f} in {result.features}, the input of the last layer"),
        ("p-value", f"{result.p_value:.3f} {likeness(result.p_value, result.permutations)}"),
        ("distance", f"{result.distance:.3f} of the spread, mean over {len(result.layers)} layers of their statistics"),
        ("farthest", f"{worst[1]:.3f} in {worst[0]}"),
        *([("to training", f"{stored[0]:.3f} and {stored[1]:.3f} from the stored statistics")] if stored else []),
    ]
    return _page(f"in the eyes of {result.model}", rows)


def zoo_json(zoo: Zoo) -> dict[str, Any]:
    return {
        "name": zoo.name,
        "about": zoo.about,
        "members": [
            {
                "paper": member.paper,
                "accuracy": None if member.accuracy is None else round(member.accuracy / 100, 4),
                "library": member.library,
                "model": member.name,
                "instead": member.instead,
                "installed": member.installed,
            }
            for member in zoo.members
        ],
    }


def zoo_page(zoo: Zoo) -> Table:
    rows = [
        [
            member.paper,
            "-" if member.accuracy is None else f"{member.accuracy:.2f} %",
            f"{member.library}/{member.name}" + (f" ({member.instead})" if member.instead else ""),
            "yes" if member.installed else "no",
        ]
        for member in zoo.members
    ]
    title = f"{zoo.name}: {zoo.about}; mixmix zoo export {zoo.name} -o DIR"
    return table(["paper's model", "paper's top-1", "taken from", "installed"], rows, title, ["taken from"])


def files_json(facts: ZooFacts) -> dict[str, Any]:
    return {
        "models": [
            {
                "path": fact.path,
                "classes": fact.classes,
                "params": fact.parameters,
                "batchnorms": fact.batchnorms,
                "width": fact.width,
            }
            for fact in facts.models
        ],
        "theory": {
            "dimension": facts.dimension,
            "width": facts.width,
            "models_needed": facts.needed,
            "models": len(facts.models),
        },
    }


def files_page(facts: ZooFacts) -> Table:
    rows = [
        [str(fact.path), str(fact.classes), f"{fact.parameters:,}", str(fact.batchnorms), f"{fact.width:,}"]
        for fact in facts.models
    ]
    title = (
        f"{len(facts.models)} models; theorem 4.2 asks for m >= ceil((d + 1) / w) = {facts.needed}"
        f" (d = {facts.dimension:,} input values, w = {facts.width:,} units in the widest layer of the narrowest model)"
    )
    return table(["file", "classes", "parameters", "BatchNorm", "width"], rows, title)


def _page(title: str, rows: list[tuple[str, str]]) -> Table:
    """Facts, one a row, under a title."""
    page = Table(title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    page.title = Text(title, "table.title")
    page.add_column(style="bold")
    page.add_column(overflow="fold")
    for key, value in rows:
        page.add_row(key, Text(value))
    return page
