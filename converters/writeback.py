"""What becomes of a file: the graph that changes are made in, and the changed one written, once it is proved."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from converters import folding, graphs, known_sizes, passes, precision, steps
from converters.classifier import Classifier, build, logits_session
from converters.conversion import OTHER_FLOAT_TOLERANCE, relative_difference, seeded_input
from converters.edits import Edit, apply_edits, dequantized_names
from converters.endings import find_ending
from converters.errors import ConversionError, ModelError, OutputError
from converters.input_spec import METADATA_PREFIX
from converters.outputs import TEMPORARY, data_beside, ensure_writable, write_atomically
from converters.runtime import Session, fits_protobuf, serialise
from converters.targets import PLAIN_IR, PLAIN_OPSET, Target

RAISED_TOLERANCE = 1e-3
"""Largest relative difference of logits at another opset.

Ten times what a conversion may have, for models that magnify rounding; a shift of half a pixel before a global mean may
be no more than twice of it.
"""


@dataclass(frozen=True)
class Proof:
    """Inputs [N, ...] of which `batch` are run at once, and the logits that a file has to give on them."""

    inputs: NDArray[np.float32]
    logits: NDArray[np.float32]
    batch: int
    tolerance: float
    """Largest relative difference."""
    quantized: steps.Quantized | None = None
    """What is compared instead, value by value, where logits differ by more and activations are quantized."""
    is_rounding: Callable[[float], bool] = lambda difference: False
    """Whether a larger difference is what the model makes of the last digits, where no activations are quantized."""


def prepare_for_quantization(
    classifier: Classifier, target: Target, bits: int, act_bits: int | None = None
) -> Classifier:
    """The graph that quantization writes into: the original at the opset its types need, with what layers can take in.

    That is BatchNorm and its like (`folding`), zeros around an input, and the bias that is added to a product.
    Per-channel weight quantization commutes with it, and layers stand next to what follows them, which is what fusing
    runtimes look for.
    """
    return _prepare(classifier, *target.needs(bits, act_bits))


def prepare_for_pruning(classifier: Classifier) -> Classifier:
    """The graph that pruning writes into, with what layers can take in, so that a weight's size is its effect."""
    return _prepare(classifier, PLAIN_OPSET, PLAIN_IR)


def prepare_for_training(classifier: Classifier) -> Classifier:
    """The graph that distillation writes into: the original, BatchNorm and all, in float32."""
    model = _float_copy(classifier)
    turned = passes.untranspose_rows(model)
    passes.tidy(model)
    prepared = build(classifier.path, model, classifier.spec, classifier.sha256, size_bytes=classifier.size_bytes)
    if turned:
        _prove_same(classifier, prepared)
    return prepared


def _float_copy(classifier: Classifier) -> ir.Model:
    if classifier.quantized:
        raise ModelError(f"{classifier.path} is quantized already: give the float model that it was made from")
    model = classifier.original.clone()
    precision.to_float32_inside(model)
    return model


def _prepare(classifier: Classifier, opset: int, ir_version: int) -> Classifier:
    model = _float_copy(classifier)
    common.RemoveInitializersFromInputsPass()(model)  # which keeps a weight in the file that nothing reads any more
    raised = passes.raise_opset(model, opset, str(classifier.path))
    model.ir_version = max(passes.least_ir(model), ir_version)  # older runtimes refuse what new exporters write
    passes.fold_constants(model)  # weights behind a Cast too are to take in what follows
    folding.fold_affine(model)
    padded = folding.fold_padding(model)
    turned = passes.untranspose_rows(model)
    joined = passes.join_biases(model, partial(_ranks, classifier))
    passes.tidy(model)
    prepared = build(classifier.path, model, classifier.spec, classifier.sha256, size_bytes=classifier.size_bytes)
    if raised or turned or joined or padded:
        _prove_same(classifier, prepared)
    return prepared


def _ranks(classifier: Classifier, names: Iterable[str]) -> dict[str, int]:
    """Ranks of the named values that may be rows, from a run: what a file says of inner values may be stale."""
    values = graphs.values_by_name(classifier.normal.graph)
    computed = [values[name] for name in names if name in values and values[name].producer() is not None]
    rows = [value for value in computed if value.shape is None or len(value.shape) == passes.ROWS]
    found = known_sizes.values_of_a_run(classifier.normal, list(dict.fromkeys(rows)))
    return {str(value.name): array.ndim for value, array in found.items()}


def _prove_same(classifier: Classifier, prepared: Classifier) -> None:
    """Raise ConversionError where the graph, at another opset or spelt otherwise, does not answer as the file does.

    A file that onnxruntime does not run, or not to finite numbers, is not judged here: whoever runs it says why.
    """
    x = seeded_input(classifier, classifier.fixed_batch or 1).numpy()
    try:
        expected = classifier.session(optimise=False).run(x)[0].astype(np.float32)
    except ModelError:
        return
    if not np.isfinite(expected).all():
        return
    actual = prepared.session(optimise=False).run(x)[0]
    difference = relative_difference(actual.reshape(expected.shape), expected)
    if not difference <= (OTHER_FLOAT_TOLERANCE if classifier.other_floats else RAISED_TOLERANCE):
        if prepared.opset == classifier.opset:
            raise ConversionError(
                f"{classifier.path}: prepared for writing, it answers otherwise (by {difference:.1e}): please report it"
            )
        raise ConversionError(
            f"{classifier.path}: at opset {prepared.opset} it answers otherwise than at its own, {classifier.opset}"
            f" (by {difference:.1e}): export it at opset {prepared.opset}, and please report it"
        )


def edited_classifier(prepared: Classifier, edits: Iterable[Edit]) -> Classifier:
    """A prepared classifier with edits made, to go on with before anything is written."""
    model = apply_edits(prepared.original, edits)
    return build(prepared.path, model, prepared.spec, prepared.sha256, size_bytes=prepared.size_bytes)


def save(
    model: ir.Model,
    path: Path,
    metadata: Mapping[str, str],
    *,
    overwrite: bool = False,
    check: Callable[[], None] | None = None,
) -> int:
    """Write the model with `metadata` added, and return its bytes; nothing appears under `path` unless all went well.

    onnxruntime loads the bytes, `check` may judge the model, and only then is the temporary file renamed. Raises
    OutputError when `path` exists (without `overwrite`) or cannot be written.
    """
    ensure_writable(path, overwrite=overwrite)
    stamp(model, metadata)
    if not fits_protobuf(model):
        return _save_with_external_data(model, path, check, overwrite=overwrite)
    content = serialise(model)
    Session(content, name=str(path))
    if check is not None:
        check()
    write_atomically(path, content)
    return len(content)


def stamp(model: ir.Model, metadata: Mapping[str, str]) -> None:
    """Add `metadata` in place; an input spec replaces the one before, key and all."""
    if any(key.startswith(METADATA_PREFIX) for key in metadata):
        for key in [key for key in model.metadata_props if key.startswith(METADATA_PREFIX)]:
            del model.metadata_props[key]
    model.metadata_props.update(metadata)


def save_proved(
    model: ir.Model,
    path: Path,
    metadata: Mapping[str, str],
    proof: Proof,
    *,
    overwrite: bool = False,
) -> tuple[int, float]:
    """`save`, once onnxruntime has given the logits of `proof` back: bytes written, and the relative difference.

    Where the difference is above the proof's tolerance, every quantized value has to be what was computed (`steps`) or,
    where there is none, the difference one of rounding. Raises ConversionError, and writes nothing, where it is not.
    """
    difference = math.nan

    def check() -> None:
        nonlocal difference
        difference = difference_from(model, proof.inputs, proof.logits, path, proof.batch)
        if difference <= proof.tolerance:
            return
        if proof.quantized is None:
            if proof.is_rounding(difference):
                return
            raise ConversionError(
                f"{path}: the written model differs from the computed one by {difference:.1e}: please report it"
            )
        values = dequantized_names(model.graph, proof.quantized.steps)
        logits = str(find_ending(model.graph, path).logits.name)
        batch = proof.inputs[np.arange(proof.batch) % len(proof.inputs)]
        steps.hold(model, values, logits, batch, proof.quantized, path)

    return save(model, path, metadata, overwrite=overwrite, check=check), difference


def stored_size(model: ir.Model) -> int:
    """Bytes that the model takes on disk, in one file or two."""
    if fits_protobuf(model):
        return len(serialise(model))
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)


def ensure_data_writable(path: Path, *, overwrite: bool) -> None:
    """Raise OutputError where the weights of a model cannot be written beside its file `path`."""
    if path.is_symlink():
        raise OutputError(f"{path} is a link, and the weights of so large a model lie beside its file: name the file")
    ensure_writable(data_beside(path), overwrite=overwrite)


def _save_with_external_data(model: ir.Model, path: Path, check: Callable[[], None] | None, *, overwrite: bool) -> int:
    """The weights of a model that is too large for one file go to `NAME.onnx.data` beside it; bytes of both."""
    ensure_data_writable(path, overwrite=overwrite)
    data = data_beside(path)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=TEMPORARY) as folder:
            written = Path(folder) / path.name
            ir.save(model, written, external_data=data.name)
            Session(written, name=str(path))
            if check is not None:
                check()
            written.with_name(data.name).replace(data)
            written.replace(path)
            return path.stat().st_size + data.stat().st_size
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error.strerror}): choose another output") from error


def difference_from(
    model: ir.Model, x: NDArray[np.float32], expected: NDArray[np.float32], path: Path, batch: int
) -> float:
    """The relative difference of a written model's logits in onnxruntime, optimisations off, from `expected` ones.

    `x` holds any number of inputs, of which `batch` are run at once.

    Raises ModelError when the model does not run.
    """
    session = logits_session(model, model, find_ending(model.graph, path), str(path), optimise=False)
    actual = session.run_in_batches(x, batch).astype(np.float32).reshape(expected.shape)
    difference = relative_difference(actual, expected)
    if not np.isfinite(difference):
        raise ModelError(f"{path}: the written model gives another shape or NaN: please report it")
    return difference
