"""What "pruned" means: counts in exact decimal arithmetic, whatever the scores and however the columns are cut."""

from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.allocation.uniform import Uniform
from pipeline.errors import Refusal
from pipeline.sparsity import Budget, NofM, Pattern, Unstructured, parse_pattern

decimals = st.integers(0, 999).map(lambda thousandths: Decimal(thousandths) / 1000)


@st.composite
def budgets(draw: st.DrawFn) -> tuple[Budget, int]:
    """A budget for one to three stacked matrices, each with its own sparsity, and their number of columns."""
    num_matrices = draw(st.integers(1, 3))
    rows = draw(st.lists(st.integers(1, 5), min_size=num_matrices, max_size=num_matrices))
    m = draw(st.one_of(st.none(), st.integers(2, 8)))
    patterns: list[Pattern] = []
    for _ in range(num_matrices):
        patterns.append(Unstructured(draw(decimals)) if m is None else NofM(draw(st.integers(1, m - 1)), m))
    num_columns = draw(st.integers(1, 20)) if m is None else m * draw(st.integers(1, 4))
    return Budget(tuple(patterns), tuple(rows)), num_columns


def scores_for(budget: Budget, num_columns: int, seed: int) -> Tensor:
    """Few distinct values for an even seed, all equal for 0, else all different."""
    generator = torch.Generator().manual_seed(seed)
    shape = (sum(budget.num_rows), num_columns)
    if seed % 2:
        return torch.rand(shape, generator=generator)
    return torch.randint(0, 1 if seed == 0 else 3, shape, generator=generator).float()


def matrices(budget: Budget, keep_OI: Tensor) -> list[tuple[Pattern, Tensor]]:
    return list(zip(budget.patterns, torch.split(keep_OI, list(budget.num_rows)), strict=True))


def num_pruned(keep: Tensor) -> int:
    return keep.numel() - int(keep.sum())


def assert_n_of_m(pattern: Any, keep_OI: Tensor) -> None:
    assert (keep_OI.view(len(keep_OI), -1, pattern.m).sum(dim=2) == pattern.n).all()


@pytest.mark.parametrize(
    ("fraction", "num_weights", "expected"),
    [("0.7", 10, 7), ("0.6", 5, 3), ("0.1", 30, 3), ("0.29", 100, 29), ("0.57", 100, 57), ("0.5", 7, 3), ("0", 9, 0)],
)
def test_sparsity_is_a_decimal_and_not_its_binary_neighbour(fraction: str, num_weights: int, expected: int) -> None:
    assert Unstructured(Decimal(fraction)).num_pruned(num_weights) == expected
    pattern = parse_pattern("unstructured", float(fraction))
    assert pattern.num_pruned(num_weights) == expected


@given(decimals, st.integers(0, 10**12))
def test_the_count_is_the_floor_of_the_exact_product(fraction: Decimal, num_weights: int) -> None:
    assert Unstructured(fraction).num_pruned(num_weights) == int(Fraction(fraction) * num_weights)


@given(budgets(), st.integers(0, 5))
def test_every_row_gives_up_its_count(case: tuple[Budget, int], seed: int) -> None:
    budget, num_columns = case
    keep_OI = budget.keep_per_row(scores_for(budget, num_columns, seed))
    for pattern, keep_rI in matrices(budget, keep_OI):
        assert ((~keep_rI).sum(dim=1) == pattern.num_pruned(num_columns)).all()
        if isinstance(pattern, NofM):
            assert_n_of_m(pattern, keep_rI)


@given(decimals, st.integers(1, 9), st.integers(1, 20), st.integers(0, 5))
def test_rows_that_need_not_give_up_the_same_have_the_count_of_the_matrix(
    fraction: Decimal, num_rows: int, num_columns: int, seed: int
) -> None:
    pattern = Unstructured(fraction, equal_rows=False)
    budget = Budget((pattern,), (num_rows,))
    keep_OI = budget.keep_per_row(scores_for(budget, num_columns, seed))
    assert num_pruned(keep_OI) == pattern.num_pruned(num_rows * num_columns)
    of_each = [int((~keep_I).sum()) for keep_I in keep_OI]
    assert of_each == sorted(of_each, reverse=True) and of_each[0] - of_each[-1] <= 1
    of_rows = pattern.of_rows(num_rows, num_columns)
    assert [each.num_pruned(num_columns) for rows, each in of_rows for _ in range(rows)] == of_each


@given(budgets(), st.integers(0, 5))
def test_every_matrix_gives_up_its_count(case: tuple[Budget, int], seed: int) -> None:
    budget, num_columns = case
    keep_OI = budget.keep_per_matrix(scores_for(budget, num_columns, seed))
    for pattern, keep_rI in matrices(budget, keep_OI):
        assert num_pruned(keep_rI) == pattern.num_pruned(keep_rI.numel())
        if isinstance(pattern, NofM):
            assert_n_of_m(pattern, keep_rI)


@given(budgets(), st.integers(0, 5), st.integers(1, 20))
def test_columns_in_turn_give_up_the_count_of_the_matrix(case: tuple[Budget, int], seed: int, step: int) -> None:
    budget, num_columns = case
    step = budget.group_size or step
    score_OI = scores_for(budget, num_columns, seed)
    turns = [
        budget.keep_in_columns(score_OI[:, first : first + step], first, num_columns)
        for first in range(0, num_columns, step)
    ]
    for pattern, keep_rI in matrices(budget, torch.cat(turns, dim=1)):
        total = pattern.num_pruned(keep_rI.numel())
        assert num_pruned(keep_rI) == total
        # no turn is more than one weight away from its proportional share
        for first in range(0, num_columns, step):
            share = Fraction(total * keep_rI[:, first : first + step].shape[1], num_columns)
            assert abs(num_pruned(keep_rI[:, first : first + step]) - share) < 1
        if isinstance(pattern, NofM):
            assert_n_of_m(pattern, keep_rI)


@given(budgets(), st.integers(0, 5))
def test_a_group_is_its_matrices_one_by_one(case: tuple[Budget, int], seed: int) -> None:
    budget, num_columns = case
    score_OI = scores_for(budget, num_columns, seed)
    alone = [Budget((pattern,), (rows,)) for pattern, rows in zip(budget.patterns, budget.num_rows, strict=True)]
    parts = torch.split(score_OI, list(budget.num_rows))
    assert [one for one, _ in budget.alone(score_OI)] == alone
    assert all(torch.equal(mine, part) for (_, mine), part in zip(budget.alone(score_OI), parts, strict=True))

    def keep_at_once(one: Budget, score: Tensor) -> Tensor:
        return one.keep_in_columns(score, 0, num_columns)

    for choose in (Budget.keep_per_row, Budget.keep_per_matrix, keep_at_once):
        one_by_one = [choose(one, part) for one, part in zip(alone, parts, strict=True)]
        assert torch.equal(choose(budget, score_OI), torch.cat(one_by_one))


def test_the_group_size_is_m_or_none() -> None:
    assert Budget((NofM(2, 4), NofM(1, 4)), (3, 5)).group_size == 4
    assert Budget((Unstructured(Decimal("0.5")),) * 2, (3, 5)).group_size is None
    with pytest.raises(AssertionError):
        _ = Budget((NofM(2, 4), NofM(2, 8)), (3, 5)).group_size


@pytest.mark.parametrize(
    ("pattern", "sparsity", "expected"),
    [
        ("unstructured", 0.5, Unstructured(Decimal("0.5"))),
        ("unstructured", 0, Unstructured(Decimal(0))),
        ("2:4", None, NofM(2, 4)),
        ("2:4", 0.5, NofM(2, 4)),
        ("1:4", 0.75, NofM(1, 4)),
        ("4:5", 0.2, NofM(4, 5)),
        ("1:3", None, NofM(1, 3)),
    ],
)
def test_patterns_are_read(pattern: str, sparsity: float | None, expected: Pattern) -> None:
    assert parse_pattern(pattern, sparsity) == expected


@pytest.mark.parametrize(
    ("pattern", "sparsity", "said"),
    [
        ("unstructured", 1.0, "pruning.sparsity = 1.0"),
        ("unstructured", -0.1, "pruning.sparsity = -0.1"),
        ("2:4", 0.6, "leave pruning.sparsity out"),
        ("1:4", 0.5, "leave pruning.sparsity out"),
        ("4:4", None, "N kept of M"),
        ("0:4", None, "N kept of M"),
        ("4:2", None, "N kept of M"),
        ("2:4:8", None, "N kept of M"),
        ("-2:4", None, "N kept of M"),
        ("block", None, "N kept of M"),
    ],
)
def test_patterns_that_mean_nothing_are_refused(pattern: str, sparsity: float | None, said: str) -> None:
    with pytest.raises(Refusal, match=said):
        parse_pattern(pattern, sparsity)


@pytest.mark.parametrize("pattern", [Unstructured(Decimal("0.7")), NofM(2, 4)])
def test_uniform_gives_every_layer_the_pattern(pattern: Pattern) -> None:
    assert Uniform().allocate(pattern, [[4, 8], [], [6]], ()) == [[pattern] * 2, [], [pattern]]
