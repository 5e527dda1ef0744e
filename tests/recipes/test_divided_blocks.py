"""Networks that have no place where one value is alone: blocks that hand values past each other."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.classifier import Classifier
from converters.conversion import to_torch
from converters.load import load_classifier
from converters.targets import choose_target
from converters.torch_module import TorchClassifier
from recipes.blocks import Block, divide, find_blocks
from recipes.images import ImageSet
from recipes.objective import moved
from recipes.progress import Silent, Task
from recipes.prune.engine import prune
from recipes.prune.goal import make_goal
from recipes.prune.settings import PACKAGE as PRUNE
from recipes.prune.settings import PruneSettings
from recipes.quantize.engine import _Run, quantize
from recipes.quantize.settings import PACKAGE, QuantizeSettings
from recipes.reconstruct import Changes, Values, read_by, walk_blocks
from recipes.sensitivity import Before, logit_noise, value_noise
from recipes.settings import LoopSettings, load_recipe
from recipes.slopes import Slopes
from tests import models

Load = Callable[[onnx.ModelProto], Classifier]
WIDTH, CELLS = 8, 7
SETTINGS = LoopSettings(logit_share=0.25, batch=4)


def cells(count: int = CELLS) -> onnx.ModelProto:
    """Every cell reads the two before it, as in a NASNet: two layers each, and two before the first."""
    nodes = [
        models.node("Conv", "image first.weight", "h0", pads=[1] * 4),
        models.node("Conv", "h0 second.weight", "h1", pads=[1] * 4),
    ]
    tensors = {"first.weight": models.weights(WIDTH, models.CHANNELS, 3, 3)}
    tensors["second.weight"] = models.weights(WIDTH, WIDTH, 3, 3)
    for number in range(2, count + 2):
        last, before = f"h{number - 1}", f"h{number - 2}"
        nodes += [
            models.node("Relu", last, f"relu{number}"),
            models.node("Conv", f"relu{number} a{number}.weight", f"a{number}", pads=[1] * 4),
            models.node("Conv", f"{before} b{number}.weight", f"b{number}"),
            models.node("Add", f"a{number} b{number}", f"h{number}"),
        ]
        tensors[f"a{number}.weight"] = models.weights(WIDTH, WIDTH, 3, 3, seed=number)
        tensors[f"b{number}.weight"] = models.weights(WIDTH, WIDTH, 1, 1, seed=number + 50)
    return models.assemble([*nodes, *models.head(f"h{count + 1}")], {**tensors, **models.head_tensors(WIDTH)})


def dense(*, spelled_out: bool) -> onnx.ModelProto:
    """A dense block of twelve layers: each concatenates all before it, or the concatenation before it and one more."""
    nodes = [models.node("Conv", "image first.weight", "f0", pads=[1] * 4)]
    tensors = {"first.weight": models.weights(WIDTH, models.CHANNELS, 3, 3)}
    joined = "f0"
    for number in range(1, 7):
        width = WIDTH + 4 * (number - 1)
        nodes += [
            models.node("Relu", joined, f"relu{number}"),
            models.node("Conv", f"relu{number} a{number}.weight", f"a{number}"),
            models.node("Conv", f"a{number} b{number}.weight", f"f{number}", pads=[1] * 4),
        ]
        before = " ".join(f"f{index}" for index in range(number)) if spelled_out else joined
        nodes.append(models.node("Concat", f"{before} f{number}", f"joined{number}", axis=1))
        joined = f"joined{number}"
        tensors[f"a{number}.weight"] = models.weights(WIDTH, width, 1, 1, seed=number)
        tensors[f"b{number}.weight"] = models.weights(4, WIDTH, 3, 3, seed=number + 50)
    return models.assemble([*nodes, *models.head(joined)], {**tensors, **models.head_tensors(WIDTH + 24)})


def windows() -> onnx.ModelProto:
    """Two streams from end to end, one of which goes through layers in windows that lie in the batch's dimension."""
    half = models.SIDE // 2
    shapes = {
        "apart": [-1, half, models.SIDE * WIDTH],
        "together": [-1, models.SIDE, models.SIDE, WIDTH],
    }
    nodes = [
        models.node("Conv", "image first.weight", "a0", pads=[1] * 4),
        models.node("Conv", "image second.weight", "b0", pads=[1] * 4),
    ]
    tensors: dict[str, Any] = {name: np.array(shape) for name, shape in shapes.items()}
    tensors |= {f"{name}.weight": models.weights(WIDTH, models.CHANNELS, 3, 3) for name in ("first", "second")}
    for number in range(1, 5):
        last, rows = number - 1, models.SIDE * WIDTH
        nodes += [
            models.node("Transpose", f"a{last}", f"upright{number}", perm=[0, 2, 3, 1]),
            models.node("Reshape", f"upright{number} apart", f"windows{number}"),
            models.node("MatMul", f"windows{number} u{number}.weight", f"u{number}"),
            models.node("Relu", f"u{number}", f"r{number}"),
            models.node("MatMul", f"r{number} v{number}.weight", f"v{number}"),
            models.node("Reshape", f"v{number} together", f"back{number}"),
            models.node("Transpose", f"back{number}", f"c{number}", perm=[0, 3, 1, 2]),
            models.node("Conv", f"b{last} w{number}.weight", f"d{number}", pads=[1] * 4),
            models.node("Add", f"c{number} d{number}", f"a{number}"),
            models.node("Mul", f"d{number} a{last}", f"e{number}"),
            models.node("Tanh", f"e{number}", f"b{number}"),
        ]
        tensors[f"u{number}.weight"] = models.weights(rows, rows, seed=number)
        tensors[f"v{number}.weight"] = models.weights(rows, rows, seed=number + 20)
        tensors[f"w{number}.weight"] = models.weights(WIDTH, WIDTH, 3, 3, seed=number + 40)
    nodes.append(models.node("Add", "a4 b4", "sum"))
    return models.assemble([*nodes, *models.head("sum")], {**tensors, **models.head_tensors(WIDTH)})


MODELS = {"cells": cells, "dense": lambda: dense(spelled_out=True), "windows": windows}


@pytest.fixture(params=list(MODELS))
def classifier(request: pytest.FixtureRequest, load: Load) -> Classifier:
    return load(MODELS[request.param]())


@pytest.fixture
def module(classifier: Classifier) -> TorchClassifier:
    return to_torch(classifier)


def sizes(blocks: Sequence[Block]) -> list[int]:
    return [len(block.layers) for block in blocks]


def test_a_cell_that_reads_two_before_it_is_a_block(load: Load) -> None:
    blocks = find_blocks(to_torch(load(cells())))
    assert sizes(blocks) == [1, 1, *[2] * (CELLS - 2), 4, 1]
    assert [block.inputs for block in blocks[2:-1]] == [(f"h{number}", f"h{number + 1}") for number in range(CELLS - 1)]
    assert max(len(block.inputs) for block in blocks) == 2


def test_blocks_compute_the_logits_from_what_is_handed_to_them(module: TorchClassifier) -> None:
    blocks = find_blocks(module)
    assert [layer for block in blocks for layer in block.layers] == module.layers()
    assert any(len(block.inputs) > 1 for block in blocks)
    x = torch.from_numpy(models.images(3))
    values: Values = {module.input_name: x}
    for number, block in enumerate(blocks, 1):
        made = module.segment(block.inputs, [block.output])({name: values[name] for name in block.inputs})
        values = read_by(blocks[number:], values) | made
    torch.testing.assert_close(values[module.logits_name], module(x), rtol=1e-5, atol=1e-5)


def test_every_layer_is_computed_in_its_block_alone(module: TorchClassifier) -> None:
    for block in find_blocks(module):
        outputs = [name for step in module.segment(block.inputs, [block.output]).steps for name in step.outputs]
        inside = [layer for layer in module.layers() if layer.output in outputs]
        assert inside == list(block.layers)


def test_what_is_handed_over_has_a_row_for_each_image(module: TorchClassifier) -> None:
    names = [block.output for block in find_blocks(module)]
    values = module.segment([module.input_name], names)({module.input_name: torch.from_numpy(models.images(5))})
    assert {len(value) for value in values.values()} == {5}


def test_dense_blocks_are_the_same_however_they_are_spelled(load: Load) -> None:
    out, short = (find_blocks(to_torch(load(dense(spelled_out=how)))) for how in (True, False))
    assert max(sizes(out)) <= 4
    pairs = [[layer.output for layer in block.layers] for block in short]
    assert [layer for block in pairs for layer in block] == [layer.output for block in out for layer in block.layers]
    assert sizes(short) == [1, 2, 2, 2, 2, 2, 2, 1]


def test_a_short_stretch_stays_a_block(load: Load) -> None:
    assert sizes(find_blocks(to_torch(load(cells(4))))) == [1, 2 * 4 + 1, 1]


@st.composite
def stretches(draw: st.DrawFn) -> tuple[list[tuple[str, ...] | None], list[int]]:
    """Values held before and after each step of a random graph, and layers by step; one value at both ends."""
    count = draw(st.integers(2, 9))
    reads = [draw(st.sets(st.integers(0, step), min_size=1, max_size=3)) for step in range(count)]
    last = {value: step for step, values in enumerate(reads) for value in values}
    for value in range(count):  # what nobody reads, the last step does
        last.setdefault(value, count - 1)
    held: list[tuple[str, ...] | None] = [("0",)]
    for step in range(1, count):
        live = tuple(str(value) for value in range(step + 1) if last[value] >= step)
        held.append(None if draw(st.integers(0, 4)) == 0 else live)
    return [*held, (str(count),)], draw(st.lists(st.integers(0, 1), min_size=count, max_size=count))


@settings(max_examples=300, derandomize=True)
@given(stretches(), st.integers(0, 3))
def test_a_stretch_is_divided_at_the_least_cost(
    stretch: tuple[list[tuple[str, ...] | None], list[int]], max_chain: int
) -> None:
    """Held against all ways there are, in each of which one value alone is new between two borders."""
    held, layers = stretch
    end = len(layers)

    def costs(borders: Sequence[int]) -> int | None:
        total = 0
        for first, last in itertools.pairwise(borders):
            before, after = held[first], held[last]
            if before is None or after is None or len(set(after) - set(before)) != 1:
                return None
            total += max(0, sum(layers[first:last]) - max_chain) ** 2 + (len(after) - 1 if last < end else 0)
        return total

    inner = range(1, end)
    ways = [[0, *some, end] for count in range(end) for some in itertools.combinations(inner, count)]
    least = min(cost for way in ways if (cost := costs(way)) is not None)
    found = divide(held, layers, (0, end), max_chain)
    assert (found[0], found[-1]) == (0, end)
    assert found == sorted(set(found))
    assert costs(found) == least


def test_both_streams_come_to_the_logits(module: TorchClassifier) -> None:
    """Unchanged, what reconstruction reads of a block is the float model's, on either stream."""
    x = torch.from_numpy(models.images(6))
    stretch = None
    for stretch in walk_blocks(module, x, Changes((), {}), SETTINGS):
        assert set(stretch.float_inputs) == set(stretch.changed_inputs) == set(stretch.block.inputs)
        for name, value in stretch.float_inputs.items():
            torch.testing.assert_close(value, stretch.changed_inputs[name], rtol=1e-4, atol=1e-5)
        target = stretch.target
    torch.testing.assert_close(target, module(x), rtol=1e-4, atol=1e-5)


def test_slopes_are_those_of_the_block_beside_what_is_handed_past_it(module: TorchClassifier) -> None:
    """Finite differences, with what the block does not make as it was."""
    slopes, generator = Slopes(module, SETTINGS), torch.Generator().manual_seed(0)
    beside = 0
    for stretch in walk_blocks(module, torch.from_numpy(models.images(4)), Changes((), {}), SETTINGS):
        if not stretch.block.layers:
            continue
        found = slopes.of(stretch)
        if found is None:
            break
        others = dict(stretch.beside)
        beside = max(beside, len(others))
        name, target = stretch.block.output, stretch.target
        rest = module.segment([name, *others], [module.logits_name])
        d = 1e-3 * float(target.square().mean().sqrt()) * torch.randn(target.shape, generator=generator)
        up, down = (rest({name: target + sign * d, **others})[module.logits_name] for sign in (1, -1))
        order = up.add(down).argsort(dim=1, descending=True)
        expected = ((up - down) / 2).gather(1, order)
        error = moved(d, found, torch.arange(len(d))) - expected
        assert float(error.square().mean()) < 0.05**2 * float(expected.square().mean())
    assert beside


def test_the_noise_of_a_layer_and_of_a_value_is_that_of_the_whole_network(module: TorchClassifier) -> None:
    x = torch.from_numpy(models.images(4))
    reference = module(x)

    def versions(layer: Any, before: Before) -> list[dict[str, torch.Tensor]]:
        assert set(before.read) == set(before.block.inputs)
        return [{layer.weight: 0.9 * module.constant(layer.weight)}]

    found = logit_noise(module, x, versions, len(x), SETTINGS)
    for layer in module.layers():
        changed = module.whole({module.input_name: x}, {layer.weight: 0.9 * module.constant(layer.weight)})
        other = changed[module.logits_name]
        expected = float((other - reference).square().sum() / reference.square().sum())
        assert found[layer.output] == [pytest.approx(expected, rel=1e-3)]
    values = {layer.input for layer in module.layers()}
    noise = value_noise(module, x, values, lambda value: [lambda y: 0.9 * y], SETTINGS)
    assert set(noise) == values
    for name in values:
        changed = module.whole({module.input_name: x}, None, {name: lambda y: 0.9 * y})
        other = changed[module.logits_name]
        expected = float((other - reference).square().sum() / reference.square().sum())
        assert noise[name] == [pytest.approx(expected, rel=1e-3, abs=1e-9)]


@pytest.mark.parametrize(("method", "act_bits"), [("qdrop", 4), ("adaround", None)])
def test_it_is_quantized_better_than_by_rounding(
    classifier: Classifier, small_images: ImageSet, tmp_path: Path, method: str, act_bits: int | None
) -> None:
    noise = []
    for name in ("nearest", method):
        overrides = ["extra_share=0", *["steps=30"] * (name != "nearest")]
        how = load_recipe(QuantizeSettings, PACKAGE, name, overrides=overrides)
        quantize(classifier, small_images, tmp_path / f"{name}.onnx", how, 3, act_bits)
        x = classifier.spec.to_input(small_images.pixels).numpy()
        exact, rounded = (c.session().run(x)[0] for c in (classifier, load_classifier(tmp_path / f"{name}.onnx")))
        noise.append(float(np.square(rounded - exact).sum() / np.square(exact).sum()))
    assert noise[1] < noise[0]


@pytest.mark.parametrize("target", ["portable", "ort-cpu"])
@pytest.mark.parametrize("method", ["qdrop", "adaround"])
def test_what_layers_read_is_learned_once_by_whom_it_is_read_first(
    classifier: Classifier,
    small_images: ImageSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    target: str,
) -> None:
    """Whatever has it later finds the steps that the weights before were rounded for."""
    reconstruct, settled, again = _Run._reconstruct, dict[str, float](), dict[str, float]()
    read = set[str]()

    def watched(self: _Run, unit: Any, *others: Any) -> None:
        assert not settled.keys() & set(unit.values)
        assert set(unit.frozen) <= settled.keys()
        reconstruct(self, unit, *others)
        read.update(layer.input for layer in self.module.layers() if layer.input in self.widths)
        settled.update((name, float(self.quantizers.values[name].scale)) for name in unit.values)
        again.update((name, float(self.quantizers.values[name].scale)) for name in settled)

    monkeypatch.setattr(_Run, "_reconstruct", watched)
    how = load_recipe(QuantizeSettings, PACKAGE, method, "fast", overrides=["steps=3"])
    quantize(classifier, small_images, tmp_path / "out.onnx", how, 4, 8, choose_target(target, None, 8))
    assert read <= settled.keys()
    assert again == settled


@pytest.mark.parametrize("stop", [1, 5])
def test_a_run_that_was_interrupted_comes_to_the_same(
    classifier: Classifier, small_images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    how = load_recipe(QuantizeSettings, PACKAGE, "qdrop", "fast", overrides=["steps=3", "logit_share=0.25"])

    def run(output: Path) -> bytes:
        quantize(classifier, small_images, output, how, 4, 4)
        return output.read_bytes()

    expected = run(tmp_path / "whole.onnx")
    reconstruct, done = _Run._reconstruct, itertools.count(1)

    def interrupted(self: _Run, *what: Any) -> None:
        if next(done) > stop:
            raise KeyboardInterrupt
        reconstruct(self, *what)

    with monkeypatch.context() as patch:
        patch.setattr(_Run, "_reconstruct", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "again.onnx")
    assert run(tmp_path / "again.onnx") == expected


class Counted(Silent):
    """How far each task came of how far it was to come."""

    def __init__(self) -> None:
        self.tasks: list[list[float]] = []

    @contextmanager
    def task(self, name: str, total: float) -> Iterator[Task]:
        self.tasks.append([total, 0.0])
        yield self

    def advance(self, steps: float = 1, note: str | None = None) -> None:
        self.tasks[-1][1] += steps


def test_it_is_pruned(classifier: Classifier, small_images: ImageSet, tmp_path: Path) -> None:
    overrides = ["mask_steps=5", "steps=10", "sensitive_images=8"]
    how = load_recipe(PruneSettings, PRUNE, "obs", "fast", overrides=overrides)
    counted, goal = Counted(), make_goal("unstructured", 0.5)
    found = prune(classifier, small_images, tmp_path / "out.onnx", how, goal, progress=counted)
    assert all(done == pytest.approx(total) for total, done in counted.tasks)
    assert found.sparsity == pytest.approx(0.5, abs=0.02)
    assert all(after.after < 1 for _, after in found.blocks)


def test_a_dimension_of_two_is_not_the_number_of_images(load: Load, small_images: ImageSet, tmp_path: Path) -> None:
    """Halves of the channels in front of the images [2, N, ...], as keys and values of attention are."""
    nodes = [models.node("Conv", "image first.weight", "a0", pads=[1] * 4)]
    tensors: dict[str, Any] = {"first.weight": models.weights(WIDTH, models.CHANNELS, 3, 3)}
    tensors |= {
        "halves": np.array([-1, 2, WIDTH // 2, models.SIDE, models.SIDE]),
        "one": np.array(1),
        "zero": np.array(0),
    }
    for number in range(1, 7):
        last = f"a{number - 1}"
        nodes += [
            models.node("Conv", f"{last} u{number}.weight", f"u{number}", pads=[1] * 4),
            models.node("Reshape", f"u{number} halves", f"apart{number}"),
            models.node("Transpose", f"apart{number}", f"front{number}", perm=[1, 0, 2, 3, 4]),
            models.node("Gather", f"front{number} zero", f"k{number}", axis=0),
            models.node("Gather", f"front{number} one", f"v{number}", axis=0),
            models.node("Mul", f"k{number} v{number}", f"m{number}"),
            models.node("Conv", f"m{number} w{number}.weight", f"w{number}", pads=[1] * 4),
            models.node("Add", f"w{number} a{max(0, number - 2)}", f"a{number}"),
        ]
        tensors[f"u{number}.weight"] = models.weights(WIDTH, WIDTH, 3, 3, seed=number)
        tensors[f"w{number}.weight"] = models.weights(WIDTH, WIDTH // 2, 3, 3, seed=number + 20)
    classifier = load(models.assemble([*nodes, *models.head("a6")], {**tensors, **models.head_tensors(WIDTH)}))
    blocks = find_blocks(to_torch(classifier))
    assert max(sizes(blocks)) <= 4
    assert not [block.output for block in blocks if block.output.startswith("front")]
    how = load_recipe(QuantizeSettings, PACKAGE, "qdrop", "fast", overrides=["steps=3"])
    quantize(classifier, small_images, tmp_path / "out.onnx", how, 4, 8)


def test_a_block_does_not_end_at_windows(load: Load, small_images: ImageSet, tmp_path: Path) -> None:
    """Where they are all there is."""
    rows = models.SIDE * WIDTH
    nodes = [
        models.node("Conv", "image first.weight", "a", pads=[1] * 4),
        models.node("Transpose", "a", "upright", perm=[0, 2, 3, 1]),
        models.node("Reshape", "upright apart", "b0"),
        *(models.node("MatMul", f"b{number} u{number}.weight", f"b{number + 1}") for number in range(3)),
        models.node("Reshape", "b3 together", "back"),
        models.node("Transpose", "back", "c", perm=[0, 3, 1, 2]),
    ]
    tensors: dict[str, Any] = {f"u{number}.weight": models.weights(rows, rows, seed=number) for number in range(3)}
    tensors["first.weight"] = models.weights(WIDTH, models.CHANNELS, 3, 3)
    tensors["apart"] = np.array([-1, models.SIDE // 2, rows])
    tensors["together"] = np.array([-1, models.SIDE, models.SIDE, WIDTH])
    classifier = load(models.assemble([*nodes, *models.head("c")], {**tensors, **models.head_tensors(WIDTH)}))
    assert [block.output for block in find_blocks(to_torch(classifier))] == ["upright", "flat", "logits"]
    how = load_recipe(QuantizeSettings, PACKAGE, "qdrop", "fast", overrides=["steps=3"])
    quantize(classifier, small_images, tmp_path / "out.onnx", how, 4, 8)
