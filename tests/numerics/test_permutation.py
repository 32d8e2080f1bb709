"""Orders of columns for N:M: always one, never a worse one, and the best where it is known.

R = rows, C = columns.
"""

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.numerics.masks import keep_n_of_m
from pipeline.numerics.permutation import best_order, dealt_order, exchanged_order, kept_score

values = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1e6, width=32))


@st.composite
def scores(draw: st.DrawFn) -> tuple[Tensor, int, int]:
    """Scores and a pattern; few distinct values make ties."""
    m = draw(st.integers(2, 6))
    num_rows, num_columns = draw(st.integers(1, 5)), m * draw(st.integers(1, 6))
    size = num_rows * num_columns
    score = torch.tensor(draw(st.lists(values, min_size=size, max_size=size))).view(num_rows, num_columns)
    return score, draw(st.integers(1, m - 1)), m


def uneven(num_rows: int, num_columns: int, seed: int = 0) -> Tensor:
    """Columns of uneven weight, strong ones next to each other."""
    generator = torch.Generator().manual_seed(seed)
    size_C = torch.randn(num_columns, generator=generator).exp().sort().values
    return torch.rand(num_rows, num_columns, generator=generator) * size_C


@given(scores())
def test_every_order_has_each_column_once(given_scores: tuple[Tensor, int, int]) -> None:
    score_RC, n, m = given_scores
    for order_C in (best_order(score_RC, n, m), dealt_order(score_RC, m)):
        assert order_C.sort().values.tolist() == list(range(score_RC.shape[1]))


@given(scores())
def test_no_less_is_kept_than_before(given_scores: tuple[Tensor, int, int]) -> None:
    score_RC, n, m = given_scores
    before = score_RC.clone()
    order_C = best_order(score_RC, n, m)
    assert torch.equal(score_RC, before) and torch.equal(best_order(score_RC, n, m), order_C)
    kept = [float(part[keep_n_of_m(part, n, m)].double().sum()) for part in (score_RC, score_RC[:, order_C])]
    assert kept[1] >= kept[0] * (1 - 1e-12)
    if kept[1] == kept[0]:
        assert order_C.tolist() == list(range(len(order_C))), "nothing is moved for nothing"


@given(scores())
def test_the_kept_score_is_the_sum_over_the_mask(given_scores: tuple[Tensor, int, int]) -> None:
    score_RC, n, m = given_scores
    highest_first = score_RC.double().reshape(len(score_RC), -1, m).sort(dim=2, descending=True).values
    assert kept_score(score_RC, n, m) == pytest.approx(float(highest_first[:, :, :n].sum()), rel=1e-12)


def test_columns_are_dealt_there_and_back() -> None:
    score_RC = torch.tensor([[5.0, 0.0, 7.0, 2.0, 4.0, 6.0, 1.0, 3.0]])
    # by weight: columns 1, 6 | 3, 7 | 4, 0 | 5, 2, every second pair dealt backwards
    assert dealt_order(score_RC, 4).tolist() == [1, 7, 4, 2, 6, 3, 0, 5]


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 2), (3, 4)])
def test_strong_columns_are_all_kept_where_there_is_room_for_them(n: int, m: int) -> None:
    """N of every M columns weigh something, and lie beside each other."""
    score_RC = uneven(16, 8 * m)
    score_RC[:, : 8 * (m - n)] = 0
    assert kept_score(score_RC, n, m) < 0.95 * float(score_RC.sum())
    found_RC = score_RC[:, best_order(score_RC, n, m)]
    assert kept_score(found_RC, n, m) == pytest.approx(float(score_RC.sum(dtype=torch.float64)), rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_exchanges_keep_more_than_dealing(seed: int) -> None:
    score_RC = uneven(32, 64, seed)
    dealt_C = dealt_order(score_RC, 4)
    dealt, exchanged, best = (
        kept_score(score_RC[:, order_C], 2, 4)
        for order_C in (dealt_C, exchanged_order(score_RC, dealt_C, 2, 4), best_order(score_RC, 2, 4))
    )
    assert kept_score(score_RC, 2, 4) < dealt < exchanged == best


@pytest.mark.parametrize("seed", range(5))
def test_of_eight_columns_it_is_near_the_best_of_all_orders(seed: int) -> None:
    score_RC = uneven(6, 8, seed)
    first_groups = [(0, *rest) for rest in combinations(range(1, 8), 3)]
    orders = [[*group, *(column for column in range(8) if column not in group)] for group in first_groups]
    best = max(kept_score(score_RC[:, order], 2, 4) for order in orders)
    assert 0.99 * best <= kept_score(score_RC[:, best_order(score_RC, 2, 4)], 2, 4) <= best * (1 + 1e-12)


def test_an_endless_score_still_gives_an_order() -> None:
    score_RC = uneven(8, 16)
    score_RC[3, 5] = torch.inf
    assert best_order(score_RC, 2, 4).sort().values.tolist() == list(range(16))
