"""An ONNX image classifier: the graph as the file has it, and a private copy in one spelling."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from torch import Tensor

from converters import graphs, passes
from converters.batch import batch_size, fixed_batch
from converters.endings import Ending, find_ending
from converters.input_spec import Detection, InputSpec
from converters.precision import FEW_BITS, FLOATS, computes_in_halves, uses_other_floats
from converters.runtime import Session

STORED_AS = {ir.DataType.FLOAT16: torch.float16, ir.DataType.BFLOAT16: torch.bfloat16}


@dataclass(frozen=True)
class Classifier:
    """An ONNX image classifier.

    `original` is the graph as the file has it, local functions inlined, and is never changed; `normal` is a private
    copy that the passes have brought to one spelling and that ends in the logits [N, classes], in which initializers
    and values keep their names. `logits` names the latter's output; `ending` tells what it is in the original. `notes`
    are choices that were made where the file leaves them open.
    """

    path: Path
    original: ir.Model
    normal: ir.Model
    spec: InputSpec
    input_name: str
    ending: Ending
    logits: str
    opset: int
    size_bytes: int
    sha256: str
    is_file: bool
    """Whether `original` is what the file at `path` holds."""
    passes: list[str] = field(default_factory=list)
    detection: Detection | None = None
    remarks: tuple[str, ...] = ()
    """What was changed in `original` for it to be one."""

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def output_name(self) -> str:
        return str(self.ending.output.name)

    @property
    def output_kind(self) -> str:
        return self.ending.kind

    @property
    def notes(self) -> tuple[str, ...]:
        return (*self.remarks, *self.ending.notes)

    @property
    def image_type(self) -> ir.DataType:
        """The type of the image input in the file."""
        return graphs.image_input(self.original.graph).dtype or ir.DataType.FLOAT

    @property
    def other_floats(self) -> bool:
        """Whether the file stores or computes in a float type other than float32."""
        return uses_other_floats(self.original)

    @property
    def computes_in_halves(self) -> bool:
        """Whether a layer multiplies in 16-bit floats: not only stores its weights so."""
        return computes_in_halves(self.original)

    @property
    def open_size(self) -> bool:
        """Whether the file leaves the image's height or width open."""
        image = graphs.image_input(self.original.graph)
        sides = list(image.shape or ())[1:3] if self.spec.layout == "NHWC" else list(image.shape or ())[2:4]
        return not all(isinstance(side, int) and side > 0 for side in sides)

    @property
    def has_statistics(self) -> bool:
        """Whether BatchNormalization is left in it, with the statistics of the training data."""
        norms = (node for node in self.normal.graph if node.op_type == "BatchNormalization")
        return any(all(graphs.is_constant(value) for value in norm.inputs[3:5]) for norm in norms)

    @property
    def quantized(self) -> bool:
        """Whether the file holds quantized weights or activations already."""
        return any(node.op_type == "DequantizeLinear" for node in self.original.graph.all_nodes())

    @property
    def fixed_batch(self) -> int | None:
        """The batch size that the file insists on, or None where it takes any."""
        return fixed_batch(graphs.image_input(self.original.graph))

    def as_stored(self, x: Tensor) -> Tensor:
        """What the type of the image input keeps of `x`: whole numbers for uint8, fewer digits for 16 bits."""
        if self.image_type == ir.DataType.UINT8:
            return x.round().clamp(0, 255)
        narrower = STORED_AS.get(self.image_type)
        return x if narrower is None else x.to(narrower).float()

    def parameter_count(self) -> int:
        """Elements of all float and of all quantized initializers and constants, as the file has them."""
        tensors = [ir.convenience.get_const_tensor(value) for value in constants(self.original)]
        return sum(tensor.size for tensor in tensors if tensor is not None and _is_parameter(tensor))

    def session(self, *, optimise: bool = True, threads: int = 0) -> Session:
        """onnxruntime on the file; `Session.run` gives the logits first, whatever the file's own outputs are."""
        model = self.path if self.is_file else self.original
        return logits_session(model, self.original, self.ending, str(self.path), optimise=optimise, threads=threads)


def logits_session(
    model: Path | ir.Model, graph: ir.Model, ending: Ending, name: str, *, optimise: bool = True, threads: int = 0
) -> Session:
    """A session that gives the logits first: of `model` itself where they are an output, else of a copy of `graph`."""
    logits = str(ending.logits.name)
    if any(value.name == logits for value in graph.graph.outputs):
        return Session(model, optimise=optimise, threads=threads, name=name, first=logits)
    probe = graph.clone()
    value = next(v for node in probe.graph for v in node.outputs if v.name == logits)
    value.type = value.shape = None  # the runtime knows them; what a file says of inner values may be stale
    probe.graph.outputs.append(value)
    return Session(probe, optimise=optimise, threads=threads, name=name, first=logits)


INTEGER_WEIGHTS = (ir.DataType.INT8, ir.DataType.UINT8, *FEW_BITS)


def _is_parameter(tensor: ir.TensorProtocol) -> bool:
    return tensor.dtype in FLOATS or (tensor.dtype in INTEGER_WEIGHTS and len(tensor.shape) > 1)


def constants(model: ir.Model) -> Iterable[ir.Value]:
    """Initializers, and the outputs of Constant nodes."""
    yield from model.graph.initializers.values()
    yield from (node.outputs[0] for node in model.graph.all_nodes() if node.op_type == "Constant")


def build(
    path: Path,
    original: ir.Model,
    spec: InputSpec,
    sha256: str = "",
    *,
    size_bytes: int,
    is_file: bool = False,
) -> Classifier:
    """The classifier around a graph that has been checked already (a loaded one, or one prepared for quantization)."""
    normal = original.clone()
    graphs.name_nodes(normal.graph)
    image = graphs.image_input(normal.graph)
    image.shape = ir.Shape([batch_size(image), *_fixed_shape(spec)])
    logits = _end_in_logits(normal, path)
    return Classifier(
        path=path,
        original=original,
        normal=normal,
        spec=spec,
        input_name=str(image.name),
        ending=find_ending(original.graph, path),
        logits=logits,
        opset=original.opset_imports.get("", 1),
        size_bytes=size_bytes,
        sha256=sha256,
        is_file=is_file,
        passes=passes.normalise(normal),
    )


def _end_in_logits(model: ir.Model, path: Path) -> str:
    """Cut the graph behind its logits and bring them to [N, classes]; their name."""
    value = find_ending(model.graph, path).logits
    if value.shape is None:
        common.ShapeInferencePass(check_type=False, strict_mode=False)(model)
    if value.shape is None or len(value.shape) != 2:
        flat = ir.node("Flatten", [value], name=f"{value.name}/Flatten")
        flat.outputs[0].name = graphs.unused_name(model.graph, f"{value.name}.matrix")
        producer = value.producer()
        assert producer is not None
        model.graph.insert_after(producer, flat)
        value, flat.outputs[0].type = flat.outputs[0], value.type
    value.type = value.type or ir.TensorType(ir.DataType.FLOAT)
    model.graph.outputs[:] = [value]
    common.RemoveUnusedNodesPass()(model)
    return str(value.name)


def _fixed_shape(spec: InputSpec) -> list[int]:
    height, width = spec.size
    channels = spec.channel_count
    return [channels, height, width] if spec.layout == "NCHW" else [height, width, channels]
