"""Blocks tile the graph, hold whole branches, and computed one after the other are the model."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

from converters.torch_module import TorchClassifier
from recipes.blocks import find_blocks, find_cuts, live_values

MODELS = ["inverted", "inverted_folded", "plain", "residual", "shuffle", "dense", "excite"]
Modules = Callable[[str], TorchClassifier]


def inputs(module: TorchClassifier, count: int = 4) -> torch.Tensor:
    pixels = torch.rand(count, 1, 28, 28, generator=torch.Generator().manual_seed(2))
    return module.spec.to_input(pixels)


@pytest.mark.parametrize("max_chain", [1, 2, 3, 5])
@pytest.mark.parametrize("name", MODELS)
def test_blocks_tile_the_way_and_share_out_the_layers(name: str, max_chain: int, module_of: Modules) -> None:
    module = module_of(name)
    blocks = find_blocks(module, max_chain)
    assert blocks[0].inputs == (module.input_name,)
    assert blocks[-1].output == module.logits_name
    assert all(after.inputs == (before.output,) for before, after in pairwise(blocks))
    assert [layer for block in blocks for layer in block.layers] == module.layers()
    assert all(block.layers for block in blocks)
    assert all(len(block.layers) <= max_chain for block in blocks if not block.branches)
    assert len({block.name for block in blocks}) == len(blocks)


@pytest.mark.parametrize("max_chain", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_blocks_in_turn_are_the_whole_model(name: str, max_chain: int, module_of: Modules) -> None:
    module = module_of(name)
    x = inputs(module)
    expected, values = module(x), {module.input_name: x}
    for block in find_blocks(module, max_chain):
        values = module.segment(block.inputs, [block.output])(values)  # nothing but the block's input is there
    torch.testing.assert_close(values[module.logits_name], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_all_information_goes_through_each_cut(name: str, module_of: Modules) -> None:
    module = module_of(name)
    live = live_values(module.whole.steps, module.input_name, module.logits_name)
    cuts = find_cuts(module, live)
    assert (cuts[0], live[0]) == (0, (module.input_name,))
    assert (cuts[-1], live[-1]) == (len(module.whole.steps), (module.logits_name,))
    assert cuts == sorted(set(cuts))
    x = inputs(module)
    names = [live[cut][0] for cut in cuts]
    values = module.segment([module.input_name], names)({module.input_name: x})
    shuffled = torch.tensor([2, 0, 3, 1])
    expected = module(x)[shuffled]
    for name in names:  # another image's value at the cut alone gives the other image's logits
        logits = module.segment([name], [module.logits_name])({name: values[name][shuffled]})[module.logits_name]
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "sizes"), [("residual", [3, 2, 3, 2]), ("inverted", [3, 3, 3, 3]), ("inverted_folded", [3, 3, 3, 3])]
)
def test_residual_blocks_hold_their_branches(name: str, sizes: list[int], module_of: Modules) -> None:
    """The residual net's units, two of them with a shortcut convolution; the inverted net's four units that add."""
    module = module_of(name)
    blocks = [block for block in find_blocks(module) if block.branches]
    assert [len(block.layers) for block in blocks] == sizes
    for block in blocks:
        steps = module.segment(block.inputs, [block.output]).steps
        assert [step.op for step in steps].count("Add") == 1
        read = [step for step in steps if block.inputs[0] in step.inputs]
        assert len(read) == 2  # the way through and the way around


def test_a_gate_lies_in_one_block_with_what_it_multiplies(module_of: Modules) -> None:
    module = module_of("excite")
    gated = 0
    for block in find_blocks(module):
        ops = [step.op for step in module.segment(block.inputs, [block.output]).steps]
        if "Mul" in ops:
            gated += 1
            assert block.branches
            assert ops.count("GlobalAveragePool") == ops.count("HardSigmoid") == 1
            assert ops.index("GlobalAveragePool") < ops.index("HardSigmoid") < ops.index("Mul")
    assert gated == 5


def test_single_layers_join_up_to_the_longest_chain(module_of: Modules) -> None:
    module = module_of("plain")
    sizes = {chain: [len(block.layers) for block in find_blocks(module, chain)] for chain in (1, 2, 3, 7)}
    assert sizes == {1: [1] * 7, 2: [2, 2, 2, 1], 3: [3, 3, 1], 7: [7]}


def test_chains_do_not_run_into_branches(module_of: Modules) -> None:
    blocks = find_blocks(module_of("residual"), 99)
    assert [block.branches for block in blocks] == [False, True, True, True, True, False]
