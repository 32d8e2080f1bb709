"""Shares of layers: exact totals whatever was measured, the order of what was measured, and patterns that are real."""

from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.allocation import Allocation
from pipeline.allocation.alphapruning import AlphaPruning
from pipeline.allocation.owl import Owl
from pipeline.allocation.shares import settled
from pipeline.allocation.uniform import Uniform
from pipeline.numerics.power_law import tail_exponent
from pipeline.numerics.statistics import ColumnSums
from pipeline.sparsity import NofM, Unstructured

MEASURING = {
    "owl": Owl(),
    "owl, wide": Owl(max_deviation=0.5),
    "alphapruning": AlphaPruning(),
    "alphapruning, wide": AlphaPruning(max_ratio=0.99),
}
every_measuring = pytest.mark.parametrize("allocation", MEASURING.values(), ids=MEASURING)

fractions = st.integers(0, 999).map(lambda thousandths: Decimal(thousandths) / 1000)
layers = st.lists(
    st.tuples(st.lists(st.integers(1, 5000), min_size=1, max_size=4), st.floats(0, 100)), min_size=1, max_size=8
)


@every_measuring
@given(fraction=fractions, layers=layers)
def test_the_model_gives_up_the_exact_count(
    allocation: Owl | AlphaPruning, fraction: Decimal, layers: list[tuple[list[int], float]]
) -> None:
    sizes, measured = [list(size) for size, _ in layers], [each for _, each in layers]
    patterns = allocation.allocate(Unstructured(fraction), sizes, measured)
    total = 0
    for linears, chosen in zip(sizes, patterns, strict=True):
        for size, pattern in zip(linears, chosen, strict=True):
            assert isinstance(pattern, Unstructured) and 0 <= pattern.fraction <= 1
            assert (size * pattern.fraction).denominator == 1
            total += pattern.num_pruned(size)
    assert total == int(Fraction(fraction) * sum(map(sum, sizes)))


@every_measuring
@given(fraction=fractions, measured=st.lists(st.floats(0, 100), min_size=2, max_size=8))
def test_who_measures_more_is_spared_by_owl_and_pays_by_alphapruning(
    allocation: Owl | AlphaPruning, fraction: Decimal, measured: list[float]
) -> None:
    num_weights = 10**6
    patterns = allocation.allocate(Unstructured(fraction), [[num_weights]] * len(measured), measured)
    counts = [pattern.num_pruned(num_weights) for (pattern,) in patterns]
    ordered = [count for _, count in sorted(zip(measured, counts, strict=True))]
    if isinstance(allocation, Owl):
        ordered.reverse()
        assert max(counts) - min(counts) <= 2 * allocation.max_deviation * num_weights + 1
    # one weight may be left over by rounding
    assert all(left <= right + 1 for left, right in pairwise(ordered))


@every_measuring
@given(data=st.data(), measured=st.lists(st.floats(0, 100), min_size=1, max_size=8))
def test_n_of_m_keeps_real_patterns_and_the_exact_total(
    allocation: Owl | AlphaPruning, data: st.DataObject, measured: list[float]
) -> None:
    m = data.draw(st.sampled_from([2, 4, 8, 16]))
    n = data.draw(st.integers(1, m - 1))
    patterns = allocation.allocate(NofM(n, m), [[60 * m, 4 * m]] * len(measured), measured)
    for first, second in patterns:
        assert first == second and isinstance(first, NofM) and first.m == m and 1 <= first.n <= m - 1
    assert sum(first.n for first, _ in patterns) == n * len(measured)


@every_measuring
@given(data=st.data(), layers=layers)
def test_n_of_m_never_keeps_more_than_asked(
    allocation: Owl | AlphaPruning, data: st.DataObject, layers: list[tuple[list[int], float]]
) -> None:
    m = data.draw(st.sampled_from([4, 8]))
    n = data.draw(st.integers(1, m - 1))
    sizes = [[m * size for size in linears] for linears, _ in layers]
    patterns = allocation.allocate(NofM(n, m), sizes, [each for _, each in layers])
    weights = [sum(linears) for linears in sizes]
    kept = sum(pattern.n * size for (pattern, *_), size in zip(patterns, weights, strict=True))
    missing = n * sum(weights) - kept
    assert missing >= 0
    chosen = [first.n for first, *_ in patterns if isinstance(first, NofM)]
    for up, raised in enumerate(chosen):
        if raised < m - 1:
            assert weights[up] > missing
            freed = [weights[down] for down, lowered in enumerate(chosen) if lowered > 1 and down != up]
            assert not any(0 < weights[up] - each <= missing for each in freed)


def test_layers_of_other_sizes_are_raised_for_one_another() -> None:
    assert Owl(max_deviation=0.2).allocate(NofM(2, 4), [[24], [4]], [0.0, 1.0]) == [[NofM(2, 4)], [NofM(2, 4)]]


@every_measuring
def test_layers_without_linears_are_passed_over(allocation: Owl | AlphaPruning) -> None:
    assert allocation.measure([]) == 0
    assert allocation.allocate(Unstructured(Decimal("0.5")), [[8], [], [8]], [1.0, 0.0, 1.0])[1] == []
    assert allocation.allocate(NofM(2, 4), [[8], [], [8]], [1.0, 0.0, 1.0])[1] == []


@every_measuring
def test_layers_that_measure_the_same_share_alike(allocation: Owl | AlphaPruning) -> None:
    patterns = allocation.allocate(Unstructured(Decimal("0.5")), [[100, 50]] * 3, [7.0] * 3)
    assert {pattern.fraction for linears in patterns for pattern in linears} == {Fraction(1, 2)}


def test_a_level_between_bounds_makes_the_target() -> None:
    """Two layers of one and three weights, of which the first wants 0.5 less than the second."""
    wanted = settled([1, 3], Fraction(1, 2), (Fraction(0), Fraction(1)), lambda level: [level - 0.5, level])
    assert wanted == pytest.approx([0.125, 0.625], abs=1e-12)
    clipped = settled([1, 3], Fraction(1, 10), (Fraction(0), Fraction(1)), lambda level: [level - 0.5, level])
    assert clipped == pytest.approx([0, 0.4 / 3], abs=1e-12)


def test_outliers_are_counted_over_all_linears_of_a_layer() -> None:
    """19 scores of 1 and one of 41 have mean 3: only the 41 is above five times that."""
    ones_I = torch.ones(10)
    first_OI, second_OI = torch.ones(1, 10), torch.ones(1, 10)
    second_OI[0, 3] = -41
    linears = [(weight_OI, ColumnSums(1, ones_I, ones_I)) for weight_OI in (first_OI, second_OI)]
    assert Owl().measure(linears) == 5.0
    assert Owl(outlier_factor=14).measure(linears) == 0.0
    louder = ColumnSums(1, ones_I * 3, ones_I * 9)
    assert Owl().measure([(weight_OI, louder) for weight_OI, _ in linears]) == 5.0


def pareto(exponent: float, num_values: int) -> Tensor:
    """Quantiles of a power law with density ~ x^-exponent above 1."""
    rank_E = (torch.arange(num_values, dtype=torch.float64) + 0.5) / num_values
    return (1 - rank_E) ** (-1 / (exponent - 1))


@pytest.mark.parametrize("exponent", [1.8, 2.5, 4.0])
def test_the_exponent_of_a_power_law_is_found(exponent: float) -> None:
    assert tail_exponent(pareto(exponent, 4000)) == pytest.approx(exponent, rel=0.02)
    assert tail_exponent(1e-3 * pareto(exponent, 4000).flip(0)) == pytest.approx(exponent, rel=0.02)


@pytest.mark.parametrize("values", [[], [0.0, 0.0], [0.0, 3.0], [2.0, 2.0, 2.0]])
def test_a_spectrum_without_a_tail_has_the_heaviest_exponent(values: list[float]) -> None:
    assert tail_exponent(torch.tensor(values)) == 1.0


def test_rounding_is_no_tail() -> None:
    """Weights of rank one have one eigenvalue, and those of rank 16 as many."""
    assert AlphaPruning().measure([(torch.outer(torch.arange(1, 5.0), torch.arange(1, 7.0)), None)]) == 1.0
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(shape, generator=generator) for shape in ((256, 16), (16, 256)))
    exact_E = torch.linalg.svdvals(left.double() @ right.double())[:16].square()
    assert AlphaPruning().measure([(left @ right, None)]) == pytest.approx(tail_exponent(exact_E), rel=1e-3)


def test_every_allocation_of_the_registry_is_tested() -> None:
    registered, _discriminator = get_args(Allocation)
    assert {type(allocation) for allocation in MEASURING.values()} | {Uniform} == set(get_args(registered))
