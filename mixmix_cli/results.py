"""Results as the contract's JSON documents and as tables. Takes what recipes return; computes nothing of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from mixmix_cli.console import percent, pixels, size, table

if TYPE_CHECKING:
    from converters.input_spec import Detection, InputSpec
    from recipes.inspect import Inspection
    from recipes.quantize.engine import Quantization
    from recipes.synth.engine import Synthesis
    from recipes.validate import Candidate, Validation

ALWAYS = ("finite", "optimisations")
"""Gates that nobody has to ask for."""


def synthesis_json(result: Synthesis) -> dict[str, Any]:
    return {
        "dir": result.directory,
        "images": result.images,
        "seconds": result.seconds,
        "seconds_per_image": result.seconds / result.images,
        "models": result.models,
        "left_out": result.left_out,
        "retried": result.retried,
        "final": result.losses,
    }


def quantization_json(result: Quantization, validation: Validation) -> dict[str, Any]:
    return {
        "input": result.input,
        "output": result.output,
        "spec": spec_json(result.spec),
        "bits": result.bits,
        "act_bits": result.act_bits,
        "sparsity": 0.0,
        "blocks": [{"name": name, "before": r.before, "after": r.after} for name, r in result.blocks],
        "layers": [
            {
                "name": layer.name,
                "bits": layer.bits,
                "act_bits": layer.act_bits,
                "sparsity": 0.0,
                "error": layer.error,
                "undecided": layer.undecided,
                "reason": layer.reason,
            }
            for layer in result.layers
        ],
        "size_bytes": {"before": result.size_before, "after": result.size_after},
        "seconds": result.seconds,
        "written_difference": result.written_difference,
        "validation": validation_json(validation),
    }


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
        "candidates": [
            {
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
                "passed": candidate.passed,
                "failed": candidate.failed,
                "gates": [
                    {"gate": verdict.gate, "passed": verdict.passed, "reason": verdict.reason}
                    for verdict in candidate.verdicts
                ],
            }
            for candidate in result.candidates
        ],
        "images": result.images,
        "labels": result.labels,
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
        for candidate in result.candidates
    ]
    columns = ["model", "top-1", "top-5", "agreement", "KL", "SNR", "size", "latency", "gates"]
    return table(columns, rows)


def _gates(candidate: Candidate) -> str:
    if candidate.failed:
        return "failed: " + ", ".join(candidate.failed)
    asked = [verdict for verdict in candidate.verdicts if verdict.gate not in ALWAYS]
    return "passed" if asked else "none asked"


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
            {"input": block.input, "output": block.output, "layers": [layer.name for layer in block.layers]}
            for block in result.blocks
        ],
        "quantized": classifier.quantized,
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
        "prune": "this version does not prune",
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
        ("output", f"{result.classes if result.classes is not None else '?'} classes, {classifier.output_kind}"),
        *(("", note) for note in classifier.notes),
        ("file", f"{size(classifier.size_bytes)}, opset {classifier.opset}"),
        ("parameters", f"{result.parameters:,}"),
        ("MACs", macs),
        ("BatchNorm", f"{result.batchnorms} layers kept, {result.folded} convolutions with a folded bias"),
        ("blocks", f"{len(sizes)} to reconstruct, of {min(sizes)} to {max(sizes)} layers" if sizes else "none"),
        *((task, f"no: {reason}" if reason else _yes(task, result)) for task, reason in _reasons(result).items()),
    ]
    page = Table(title=str(classifier.path), title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    page.add_column(style="bold")
    page.add_column(overflow="fold")
    for key, value in rows:
        page.add_row(key, escape(value))
    return page


def _yes(task: str, result: Inspection) -> str:
    if task == "synth" and not result.batchnorms:
        return "yes, from its labels alone: it has no BatchNorm statistics (better: --zoo, models that have)"
    return "yes"


def _second(detection: Detection) -> str:
    return f"; second best: {detection.runner_up}" if detection.runner_up else ""
