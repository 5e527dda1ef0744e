"""The paper's appendix A.1 carried out: encoder, memoriser, decoder, and the inputs split over several networks.

A vector X in [0, 1)^d is quantized to n bits an entry and the entries are laid behind one another (eq. 4 and 5); a
table takes that code to the k-bit code of f(X) (eq. 6); a decoder reads it as a number. The error is at most
w_f(2^-n) + 2^-k, with w_f the modulus of continuity (eq. 7). Codes are Python integers, so that they may be long.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes.zoo_facts import Fact, ZooFacts

Vector = Sequence[float]


def quantize(x: float, bits: int) -> int:
    """q_n: the largest multiple of 2^-n that is not above x, as an integer code (eq. 4)."""
    return min(int(x * 2**bits), 2**bits - 1)


def encode(vector: Vector, bits: int) -> int:
    """The quantized entries behind one another, the first in front (eq. 5, as an integer of d n bits)."""
    code = 0
    for x in vector:
        code = (code << bits) | quantize(x, bits)
    return code


def decode(code: int, bits: int) -> float:
    return code / 2**bits


def corner(code: int, dimension: int, bits: int) -> list[float]:
    """The vector that a code stands for: the lower corner of its cell."""
    mask = 2**bits - 1
    return [((code >> (bits * (dimension - 1 - i))) & mask) / 2**bits for i in range(dimension)]


def target(vector: Vector) -> float:
    """Lipschitz with constant 1 in the largest norm, values in [0, 1)."""
    return 0.999 * (0.5 + 0.5 * math.sin(sum(vector) / len(vector) * 2))


class Assembled:
    """f by m networks: each encodes its d / m entries and memorises its k bits of the answer for every code."""

    def __init__(self, dimension: int, networks: int, n: int, k: int) -> None:
        self.dimension, self.networks, self.n, self.k = dimension, networks, n, k
        self.each = dimension // networks
        total = k * networks  # the answer has k m bits, of which network i keeps the i-th k
        self.memories: list[dict[tuple[int, ...], int]] = [{} for _ in range(networks)]
        for codes in itertools.product(range(2 ** (n * self.each)), repeat=networks):
            joined = [x for code in codes for x in corner(code, self.each, n)]
            answer = quantize(target(joined), total)
            for i, memory in enumerate(self.memories):
                memory[codes] = (answer >> (k * (networks - 1 - i))) & (2**k - 1)

    def __call__(self, vector: Vector) -> float:
        codes = tuple(encode(vector[i * self.each : (i + 1) * self.each], self.n) for i in range(self.networks))
        merged = 0.0
        for i, memory in enumerate(self.memories):  # a linear map of the m outputs
            merged += decode(memory[codes], self.k) * 2.0 ** (-self.k * i)
        return merged


@given(x=st.floats(0, 1, exclude_max=True), n=st.integers(1, 30))
def test_quantization_is_wrong_by_less_than_its_last_bit(x: float, n: int) -> None:
    assert 0 <= x - decode(quantize(x, n), n) < 2.0**-n


@pytest.mark.parametrize(("bits", "code"), [(3, 0b100), (4, 0b1000)])
def test_the_papers_example(bits: int, code: int) -> None:
    """ "0.5 will be quantized to 100 using q_3 and 1000 using q_4"."""
    assert quantize(0.5, bits) == code


@given(vector=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=6), n=st.integers(1, 12))
def test_no_entry_is_lost_in_the_code(vector: list[float], n: int) -> None:
    found = corner(encode(vector, n), len(vector), n)
    assert all(0 <= x - y < 2.0**-n for x, y in zip(vector, found, strict=True))


@pytest.mark.parametrize("networks", [1, 2, 4])
@pytest.mark.parametrize(("n", "k"), [(1, 2), (2, 4), (3, 6)])
def test_the_error_keeps_its_bound_however_the_inputs_are_split(networks: int, n: int, k: int) -> None:
    dimension = 4
    f = Assembled(dimension, networks, n, k)
    bound = 2.0**-n + 2.0 ** (-k * networks)  # w_f(2^-n) <= 2^-n for this f, and k m bits of the answer
    points = list(itertools.product([0.0, 0.13, 0.37, 0.5, 0.74, 0.999], repeat=dimension))
    worst = max(abs(f(point) - target(point)) for point in points)
    assert worst <= bound
    assert worst > bound / 100  # the bound says something


def test_the_split_networks_together_are_the_one_network() -> None:
    """Splitting encoder and answer loses nothing: with equal k m, all are the same function."""
    whole, halves, quarters = Assembled(4, 1, 2, 8), Assembled(4, 2, 2, 4), Assembled(4, 4, 2, 2)
    for point in itertools.product([0.1, 0.6, 0.9], repeat=4):
        assert whole(point) == halves(point) == quarters(point)


@given(dimension=st.integers(1, 200_000), width=st.integers(1, 5_000))
def test_the_number_of_networks_is_the_least_that_the_theorem_allows(dimension: int, width: int) -> None:
    m = ZooFacts([Fact.__new__(Fact)], dimension, width).needed
    assert m * width >= dimension + 1 > (m - 1) * width
