"""Data mixing against torch's own resize and a loop over samples."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recipes.synth.mixing import Mix, draw_mix, mixed_cross_entropy

checked = settings(max_examples=60, derandomize=True)
sizes = st.tuples(st.integers(4, 40), st.integers(4, 40))
boxes = st.tuples(st.floats(0.02, 1), st.floats(0.02, 1)).map(lambda pair: (min(pair), max(pair)))
counts = st.integers(1, 7)
seeds = st.integers(0, 2**32)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def box_mask(mix: Mix, index: int) -> Tensor:
    mask = torch.zeros(mix.size, dtype=torch.bool)
    top, left = int(mix.top[index]), int(mix.left[index])
    mask[top : top + int(mix.height[index]), left : left + int(mix.width[index])] = True
    return mask


@checked
@given(counts, sizes, boxes, seeds)
def test_boxes_lie_in_the_image_with_edges_in_the_range(
    count: int, size: tuple[int, int], box: tuple[float, float], seed: int
) -> None:
    mix = draw_mix(count, size, box, seeded(seed))
    for length, start, extent in ((size[0], mix.top, mix.height), (size[1], mix.left, mix.width)):
        assert start.shape == extent.shape == (count,)
        assert bool((start >= 0).all())
        assert bool((start + extent <= length).all())
        assert bool((extent >= max(1, round(box[0] * length - 1e-4))).all())
        assert bool((extent <= max(1, round(box[1] * length + 1e-4))).all())
    assert sorted(mix.partner.tolist()) == list(range(count))


@checked
@given(counts, sizes, boxes, seeds)
def test_outside_the_box_nothing_changes_and_inside_is_the_whole_partner_resized(
    count: int, size: tuple[int, int], box: tuple[float, float], seed: int
) -> None:
    images = torch.rand(count, 3, *size, generator=seeded(seed + 1))
    mix = draw_mix(count, size, box, seeded(seed))
    mixed = mix.apply(images)
    assert mixed.shape == images.shape
    for index in range(count):
        mask = box_mask(mix, index)
        assert torch.equal(mixed[index][:, ~mask], images[index][:, ~mask])
        edges = (int(mix.height[index]), int(mix.width[index]))
        partner = images[mix.partner[index]][None]
        expected = F.interpolate(partner, edges, mode="bilinear", align_corners=False)
        torch.testing.assert_close(mixed[index][:, mask].view(3, *edges), expected[0], rtol=0, atol=1e-5)


@checked
@given(counts, sizes, boxes, seeds)
def test_share_is_the_boxes_area(count: int, size: tuple[int, int], box: tuple[float, float], seed: int) -> None:
    mix = draw_mix(count, size, box, seeded(seed))
    expected = torch.stack([box_mask(mix, index).float().mean() for index in range(count)])
    torch.testing.assert_close(mix.share, expected)


def test_edges_span_the_whole_range_and_boxes_the_whole_image() -> None:
    mix = draw_mix(2000, (50, 50), (0.1, 0.4), seeded(0))
    assert (int(mix.height.min()), int(mix.height.max())) == (5, 20)
    covered = torch.zeros(50, 50)
    for index in range(2000):
        covered += box_mask(mix, index)
    assert bool((covered.sum(0) > 0).all() and (covered.sum(1) > 0).all())  # every row and column


def test_a_full_box_shows_the_partner_alone() -> None:
    images = torch.rand(4, 1, 9, 11, generator=seeded(0))
    mix = draw_mix(4, (9, 11), (1.0, 1.0), seeded(1))
    torch.testing.assert_close(mix.apply(images), images[mix.partner], rtol=0, atol=1e-6)
    assert mix.share.tolist() == [1.0] * 4


@checked
@given(sizes, seeds)
def test_gradients_reach_both_partners(size: tuple[int, int], seed: int) -> None:
    images = torch.rand(5, 1, *size, generator=seeded(seed), requires_grad=True)
    mix = draw_mix(5, size, (0.2, 0.6), seeded(seed))
    for index in range(5):
        (gradient,) = torch.autograd.grad(mix.apply(images)[index].sum(), images)
        reached = {n for n in range(5) if bool((gradient[n] != 0).any())}
        covered = bool(box_mask(mix, index).all())
        assert reached == {int(mix.partner[index])} | (set() if covered else {index})


@checked
@given(counts, boxes, seeds)
def test_mixed_cross_entropy_is_a_loop_over_samples(count: int, box: tuple[float, float], seed: int) -> None:
    generator = seeded(seed)
    logits = 3 * torch.randn(count, 10, generator=generator)
    labels = torch.randint(0, 10, (count,), generator=generator)
    mix = draw_mix(count, (12, 17), box, generator)
    total = 0.0
    for index in range(count):
        share = float(mix.height[index] * mix.width[index]) / (12 * 17)
        surprise = -torch.log_softmax(logits[index].double(), 0)
        partner = int(mix.partner[index])
        total += (1 - share) * float(surprise[labels[index]]) + share * float(surprise[labels[partner]])
    torch.testing.assert_close(
        mixed_cross_entropy(logits, labels, mix), torch.tensor(total / count), rtol=1e-5, atol=1e-5
    )


@checked
@given(counts, sizes, boxes, seeds)
def test_the_seed_decides_the_mix(count: int, size: tuple[int, int], box: tuple[float, float], seed: int) -> None:
    images = torch.rand(count, 1, *size, generator=seeded(seed))
    first, again = (draw_mix(count, size, box, seeded(seed)).apply(images) for _ in range(2))
    assert torch.equal(first, again)


def test_another_seed_gives_another_mix() -> None:
    first, other = (draw_mix(16, (28, 28), (0.1, 0.4), seeded(seed)) for seed in (0, 1))
    assert not torch.equal(first.partner, other.partner)
    assert not torch.equal(first.top, other.top)
    assert not torch.equal(first.height, other.height)
