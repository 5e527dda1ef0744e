"""What is quantized for integer kernels, what is forecast to run in them, and what does."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from converters.conversion import to_torch
from converters.errors import MixMixError
from converters.kernels import forecast, values_between
from converters.targets import INT2, INT4, INT8, TARGETS, UINT8, UINT16, choose_target
from converters.torch_module import TorchClassifier
from converters.writeback import prepare_for_quantization

Modules = Callable[[str], TorchClassifier]


@pytest.mark.parametrize("name", ["plain", "residual", "inverted", "dense", "excite", "shuffle", "attention"])
def test_all_layers_run_in_integers_when_all_that_is_asked_for_has_eight_bits(name: str, module_of: Modules) -> None:
    module = module_of(name)
    inputs = [layer.input for layer in module.layers()]
    quantized = dict.fromkeys([*values_between(module), *inputs], 8)
    stored = {layer.output: 8 for layer in module.layers()}
    assert forecast(module, quantized, stored, biases=True).count == len(module.layers())


def test_what_is_between_convolutions_is_found_in_the_graph(module_of: Modules) -> None:
    """A residual network adds: both operands are quantized, and the sum behind its Relu."""
    module = to_torch(prepare_for_quantization(module_of("residual").classifier, TARGETS["ort-cpu"], 8, 8))
    found = values_between(module)
    adds = [step for step in module.whole.steps if step.op == "Add"]
    assert adds
    assert all(name in found for step in adds for name in step.inputs)
    readers = {name: step for step in module.whole.steps for name in step.inputs}
    for step in adds:
        after = readers[step.outputs[0]]
        assert (after.outputs[0] if after.op == "Relu" else step.outputs[0]) in found
    assert module.logits_name not in found
    order = [module.input_name] + [name for step in module.whole.steps for name in step.outputs]
    assert found == sorted(found, key=order.index)


def test_nothing_is_wanted_between_layers_that_write_float(module_of: Modules) -> None:
    """In a transformer, MatMul writes float, so that only what its first convolution writes is quantized."""
    module = module_of("attention")
    convolutions = [layer for layer in module.layers() if layer.op == "Conv"]
    assert len(values_between(module)) <= 2 * len(convolutions)


def test_sixteen_bits_do_not_run_in_integers(module_of: Modules) -> None:
    module = module_of("plain")
    inputs = {layer.input: 16 for layer in module.layers()}
    stored = {layer.output: 8 for layer in module.layers()}
    found = forecast(module, dict.fromkeys(values_between(module), 8) | inputs, stored, biases=True)
    assert (found.count, found.kept_out) == (0, {"inputs have 16 bits": found.layers})


def test_a_convolution_whose_output_has_fewer_than_eight_bits_does_not_run_in_integers(module_of: Modules) -> None:
    """The Clip that keeps it within them stays. What reads it runs in integers all the same."""
    module = module_of("plain")
    quantized = dict.fromkeys([*values_between(module), *(layer.input for layer in module.layers())], 4)
    found = forecast(module, quantized, {layer.output: 8 for layer in module.layers()}, biases=True)
    assert module.layers()[-1].op == "Gemm"
    assert (found.count, found.kept_out) == (1, {"outputs are not quantized to 8 bits": found.layers - 1})


def test_weights_stored_in_four_bits_do_not_run_in_integers(module_of: Modules) -> None:
    module = module_of("plain")
    quantized = dict.fromkeys([*values_between(module), *(layer.input for layer in module.layers())], 8)
    layers = module.layers()
    stored = {layer.output: 4 for layer in layers} | {layers[2].output: 8}
    found = forecast(module, quantized, stored, biases=True)
    assert found.kept_out == {"weights are stored in 4 bits": len(layers) - 1}
    assert str(found) == (
        f"forecast: 1 of {len(layers)} layers will run in integers in onnxruntime on this machine;"
        f" {len(layers) - 1} will not: weights are stored in 4 bits ({len(layers) - 1})"
    )


def test_a_convolution_whose_output_stays_in_float_does_not_run_in_integers(module_of: Modules) -> None:
    module = module_of("residual")
    layers = module.layers()
    found = forecast(
        module, dict.fromkeys([layer.input for layer in layers], 8), {layer.output: 8 for layer in layers}, biases=True
    )
    assert 0 < found.count < len(layers)
    assert list(found.kept_out) == ["outputs are not quantized to 8 bits"]
    assert forecast(module, {}, {layer.output: 8 for layer in layers}, biases=True).kept_out == {
        "inputs are in float": len(layers)
    }


def test_a_gemm_with_a_float_bias_needs_a_quantized_output(module_of: Modules) -> None:
    module = module_of("plain")
    last = module.layers()[-1]
    quantized = dict.fromkeys([*values_between(module), *(layer.input for layer in module.layers())], 8)
    stored = {layer.output: 8 for layer in module.layers()}
    assert last.op == "Gemm"
    assert forecast(module, quantized, stored, biases=False).kept_out == {"biases are in float": 1}
    assert forecast(module, quantized | {last.output: 8}, stored, biases=False).kept_out == {}


def test_containers_by_target() -> None:
    portable = TARGETS["portable"]
    assert [portable.weight_container(bits) for bits in (2, 4, 5, 8)] == [INT4, INT4, INT8, INT8]
    assert [portable.activation_container(bits) for bits in (2, 8, 16)] == [UINT8, UINT8, UINT16]
    assert choose_target("portable", "int2").weight_container(2) == INT2
    assert choose_target("ort-cpu", act_bits=8).weight_container(4) == INT8
    assert choose_target("ort-cpu", "int4", 8).weight_container(4) == INT4
    assert choose_target("ort-cpu").weight_container(4) == INT4  # nothing runs in integers without activation bits
    assert not choose_target("ort-cpu").integer_kernels
    assert choose_target("tensorrt", act_bits=8).activation_container(8) == INT8
    with pytest.raises(ValueError, match="2 to 8"):
        portable.weight_container(9)


@pytest.mark.parametrize("target", ["ort-cpu", "ort-cuda"])
def test_sixteen_bits_are_refused_where_kernels_have_eight(target: str) -> None:
    with pytest.raises(MixMixError, match=f"--act-bits 16 cannot be used with --target {target}.*up to 8 bits"):
        choose_target(target, act_bits=16)


@pytest.mark.parametrize("act_bits", [4, 16])
def test_tensorrt_runs_eight_bits(act_bits: int) -> None:
    with pytest.raises(MixMixError, match=f"--act-bits {act_bits} cannot be used with --target tensorrt.*use 8"):
        choose_target("tensorrt", act_bits=act_bits)
    assert choose_target("tensorrt", act_bits=None).name == "tensorrt"


def test_two_bit_storage_is_refused_with_quantized_activations() -> None:
    with pytest.raises(MixMixError, match="int2 cannot be used with --act-bits"):
        choose_target("portable", "int2", 8)
