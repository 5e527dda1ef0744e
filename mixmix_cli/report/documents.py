"""The inputs of a report: folders of `synth` and `demo`, and the JSON documents that commands print.

A document is known by its keys, as the contract names them, and then checked in full: a report that someone signs must
not guess. Keys that the contract does not name may be absent.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import click
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

if TYPE_CHECKING:
    from recipes.records import SetRecord, Sheet

LARGEST = 64_000_000
"""Bytes; what is larger is a model or an image set by mistake."""
ACCEPTED = (
    "give folders that synth or demo wrote, and files with what --json printed for quantize, prune, distill, validate,"
    " synth, inspect, data compare or demo"
)
RESULTS = "results.json"

Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[float, Field(ge=0)]


class ReportError(click.ClickException):
    """An input that cannot be reported on, in one sentence."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(clean(message).split()))


class Part(BaseModel):
    """Strict: a number in quotes is no number."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class Gate(Part):
    gate: str
    passed: bool
    reason: str = ""


class LayerNoise(Part):
    name: str | None = None
    value: str
    op: str = ""
    snr_db: float | None = None
    own_snr_db: float | None = None
    bits: Count | None = None
    act_bits: Count | None = None
    sparsity: Fraction | None = None
    container: str | None = None
    compared_with: str | None = None
    reason: str | None = None

    @property
    def known_as(self) -> str:
        """The layer's name, which older documents do not have."""
        return self.name or self.value


class Judged(Part):
    """What reference and candidates have in common."""

    path: str
    top1: Fraction | None
    top5: Fraction | None
    size_bytes: Count
    latency_ms: Positive


class Candidate(Judged):
    agreement: Fraction
    kl: float | None
    snr_db: float | None = None
    drop: Annotated[float, Field(ge=-1, le=1)] | None
    passed: bool
    failed: list[str]
    gates: list[Gate] = []
    layers: list[LayerNoise] | None = None


class Validation(Part):
    reference: Judged
    candidates: list[Candidate]
    images: Count
    labels: Literal["real", "targets", "none"]


class Block(Part):
    name: str
    before: Positive | None
    after: Positive | None


class Layer(Part):
    name: str
    bits: Count | None
    act_bits: Count | None
    sparsity: Fraction
    error: Positive | None
    reason: str | None = None


class Sizes(Part):
    before: Count
    after: Count


class Fusion(Part):
    layers: Count
    forecast: Count
    counted: Count


class Compression(Part):
    """Of quantize, prune or distill."""

    input: str
    output: str
    bits: Count | None
    act_bits: Count | None
    sparsity: Fraction | None
    blocks: list[Block]
    layers: list[Layer]
    size_bytes: Sizes
    seconds: Positive
    written_difference: Positive | None = None
    fusion: Fusion | None = None
    validation: Validation


class Synthesis(Part):
    dir: str
    images: Count
    seconds: Positive
    seconds_per_image: Positive
    models: list[str]
    left_out: list[str] = []
    retried: Count = 0
    final: dict[str, float | None]


class ModelInput(Part):
    size: list[Count]
    channels: str | int
    layout: str
    scale: float
    mean: list[float]
    std: list[float]
    source: str
    confidence: Fraction | None = None


class BatchNorms(Part):
    count: Count
    folded: Count


class Operator(Part):
    op: str
    opset: Count
    node: str


class Inspection(Part):
    path: str
    input: ModelInput
    classes: Count | None
    output: str
    opset: Count
    params: Count
    macs: Count | None
    batchnorm: BatchNorms
    blocks: list[Any] | Count
    unsupported: list[Operator]
    can: dict[str, bool]
    why_not: dict[str, str | None] = {}
    sparsity: Fraction | None = None


class ComparedSet(Part):
    path: str
    images: Count
    distance_to_stored: Positive | None = None


class Distance(Part):
    value: str
    distance: Positive | None


class Comparison(Part):
    a: ComparedSet
    b: ComparedSet
    model: str
    features: str = ""
    mmd2: float
    p_value: Fraction
    permutations: Count
    distance: Positive | None
    layers: list[Distance] = []


class Demo(Part):
    target: str
    images: Count
    float_top1: Fraction = Field(alias="float")
    top1: dict[str, dict[str, Fraction]]
    seconds: dict[str, float] = {}


def _listed(value: object) -> object:
    return value if isinstance(value, list) else [value]


Inspections = Annotated[list[Inspection], BeforeValidator(_listed), Field(min_length=1)]
Document = Validation | Compression | Synthesis | Comparison | Demo | list[Inspection]


@dataclass(frozen=True)
class Form:
    """A kind of document: the command that prints it, the keys it is known by, and what it holds."""

    command: str
    keys: frozenset[str]
    holds: Any


FORMS = (
    Form("validate", frozenset({"reference", "candidates"}), Validation),
    Form("quantize, prune or distill", frozenset({"input", "output", "layers", "size_bytes"}), Compression),
    Form("synth", frozenset({"dir", "final", "models"}), Synthesis),
    Form("data compare", frozenset({"a", "b", "mmd2"}), Comparison),
    Form("demo", frozenset({"target", "top1", "float"}), Demo),
    Form("inspect", frozenset({"path", "input", "can"}), Inspections),
)


@dataclass(frozen=True)
class Source:
    """One input as it was read."""

    path: Path
    content: Document | SetRecord
    sheet: Sheet | None = None
    """Images that belong to it."""
    digest: str | None = None
    """SHA-256 of the file that it was read from."""


def read_source(path: Path) -> Source:
    """Read a folder or a file. Raises ReportError or DataError in one sentence."""
    try:
        folder = path.is_dir()
    except OSError as error:
        raise ReportError(f"{path} cannot be read ({error.strerror}): {ACCEPTED}") from error
    if folder:
        return _read_folder(path)
    document, digest = _read_json(path)
    return Source(path, _recognise(path, document), digest=digest)


def _read_folder(path: Path) -> Source:
    from recipes.records import is_set, read_set, read_sheet

    if is_set(path):
        return Source(path, read_set(path))
    results = path / RESULTS
    if not results.is_file():
        raise ReportError(f"{path} is a folder that neither synth nor demo wrote: {ACCEPTED}")
    document, digest = _read_json(results)
    return Source(path, _recognise(results, document), read_sheet(path), digest)


def _read_json(path: Path) -> tuple[Any, str]:
    """The document, tidied up, and the SHA-256 of the file."""
    try:
        if path.stat().st_size > LARGEST:
            raise ReportError(f"{path} is too large to be the result of a command: {ACCEPTED}")
        content = path.read_bytes()
    except FileNotFoundError:
        raise ReportError(f"{path} does not exist: {ACCEPTED}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the name
        raise ReportError(f"{path} cannot be read ({getattr(error, 'strerror', error)}): {ACCEPTED}") from error
    if not content.strip():
        raise ReportError(f"{path} is empty, as where a command failed and printed nothing: {ACCEPTED}")
    try:
        return tidy(json.loads(content)), sha256(content).hexdigest()
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{path} is not one JSON document: {ACCEPTED}") from error


def _recognise(path: Path, document: Any) -> Document:
    sample = document[0] if isinstance(document, list) and document else document
    keys = set(sample) if isinstance(sample, dict) else set()
    form = next((form for form in FORMS if form.keys <= keys), None)
    if form is None or (isinstance(document, list) and form.holds is not Inspections):
        raise ReportError(f"{path} is JSON, but not the result of a command that is reported on: {ACCEPTED}")
    try:
        return TypeAdapter[Document](form.holds).validate_python(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the document"
        raise ReportError(
            f"{path} is not what mixmix {form.command} --json prints: {where}: {first['msg'].lower()}"
        ) from error


def clean(text: str) -> str:
    """Text without what cannot be seen or stored: control characters, halves of pairs, turned reading direction."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)


def tidy(value: Any) -> Any:
    """Printable text and finite numbers only; others become null, as commands print them."""
    if isinstance(value, dict):
        return {clean(key): tidy(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [tidy(entry) for entry in value]
    if isinstance(value, str):
        return clean(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
