"""Masks have the exact count, and choose as a stable sort does."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import keep_by_stable_sort
from oracle import keep_n_of_m as sorted_keep_n_of_m
from torch import Tensor

from pipeline.numerics.masks import _kth_lowest_of_one, keep_highest, keep_n_of_m, masked

# few distinct values make ties, also between -0.0 and 0.0 and at infinity
tied = st.sampled_from([-1.0, -0.0, 0.0, 0.5, 1.0, 2.0, float("inf")])
scores = st.one_of(tied, st.floats(width=32, allow_nan=False))


@st.composite
def score_matrices(draw: st.DrawFn, multiple_of: int = 1) -> Tensor:
    num_rows = draw(st.integers(1, 4))
    num_columns = multiple_of * draw(st.integers(1, 24 // multiple_of))
    size = num_rows * num_columns
    values = draw(st.one_of(st.lists(scores, min_size=size, max_size=size), tied.map(lambda value: [value] * size)))
    return torch.tensor(values).view(num_rows, num_columns)


@given(score_matrices(), st.data())
def test_keep_highest_is_a_stable_sort_with_the_exact_count(score: Tensor, data: st.DataObject) -> None:
    num_pruned = data.draw(st.integers(0, score.shape[1]))
    keep = keep_highest(score, num_pruned)
    assert keep.dtype == torch.bool and keep.shape == score.shape
    assert ((~keep).sum(dim=1) == num_pruned).all()
    for row, keep_row in zip(score.numpy(), keep.numpy(), strict=True):
        assert (keep_row == keep_by_stable_sort(row, num_pruned)).all()


@pytest.mark.parametrize("num_rows", [7, 8, 9, 30])
def test_many_units_choose_as_each_alone(num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four at a time."""
    monkeypatch.setattr("pipeline.numerics.masks._NUMBERS_AT_ONCE", 4 * 24 + 1)
    score = torch.randint(0, 9, (num_rows, 24), generator=torch.Generator().manual_seed(0)).float()
    for row, keep_row in zip(score.numpy(), keep_highest(score, 11).numpy(), strict=True):
        assert (keep_row == keep_by_stable_sort(row, 11)).all()


@given(score_matrices(), st.data())
def test_a_selection_from_either_side_is_that_of_a_sort(score: Tensor, data: st.DataObject) -> None:
    score_1S = score.reshape(1, -1)
    k = data.draw(st.integers(1, score_1S.shape[1]))
    assert torch.equal(_kth_lowest_of_one(score_1S, k), score_1S.sort(dim=1).values[:, k - 1 : k])


@given(st.integers(1, 12), st.data())
def test_keep_n_of_m_is_a_stable_sort_with_the_exact_count(m: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(0, m))
    score = data.draw(score_matrices(multiple_of=m))
    keep = keep_n_of_m(score, n, m)
    assert keep.dtype == torch.bool and keep.shape == score.shape
    assert (keep.view(len(score), -1, m).sum(dim=2) == n).all()
    assert (keep.numpy() == sorted_keep_n_of_m(score.numpy(), n, m)).all()


@pytest.mark.parametrize("m", [127, 128, 300])
def test_groups_may_be_wide(m: int) -> None:
    score = torch.rand(3, 2 * m, generator=torch.Generator().manual_seed(m))
    keep = keep_n_of_m(score, m // 3, m)
    assert (keep.numpy() == sorted_keep_n_of_m(score.numpy(), m // 3, m)).all()


def test_of_equal_scores_the_leftmost_go_first() -> None:
    equal = torch.ones(2, 8)
    assert keep_highest(equal, 3).tolist() == [[False] * 3 + [True] * 5] * 2
    assert keep_n_of_m(equal, 1, 4).tolist() == [[False, False, False, True] * 2] * 2


def test_scores_that_are_not_contiguous_choose_alike() -> None:
    score = torch.rand(24, 16, generator=torch.Generator().manual_seed(0))
    transposed = score.T.contiguous().T
    assert torch.equal(keep_highest(transposed, 7), keep_highest(score, 7))
    assert torch.equal(keep_n_of_m(transposed, 2, 4), keep_n_of_m(score, 2, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_is_kept_keeps_its_bits_and_the_rest_is_0(dtype: torch.dtype) -> None:
    weight = torch.tensor([[1.5, -2.0, -0.0, torch.inf], [-3.0, torch.nan, 0.0, -torch.inf]], dtype=dtype)
    keep = torch.tensor([[True, False, True, True], [True, False, True, False]])
    ours, wanted = (part.view(torch.uint8) for part in (masked(weight, keep), weight.masked_fill(~keep, 0)))
    assert torch.equal(ours, wanted)


def test_columns_that_no_group_fills_are_a_bug() -> None:
    with pytest.raises(AssertionError):
        keep_n_of_m(torch.ones(2, 10), 2, 4)


@given(st.integers(1, 4), st.integers(2, 12), st.data())
def test_nan_is_noticed_wherever_it_is(num_rows: int, num_columns: int, data: st.DataObject) -> None:
    """Also where all others differ, and some units have none."""
    numbers = data.draw(st.permutations(range(num_rows * num_columns)))
    places = data.draw(st.lists(st.sampled_from(numbers), min_size=1))
    score = torch.tensor(numbers, dtype=torch.float32)
    score[places] = torch.nan
    with pytest.raises(AssertionError, match="number"):
        keep_highest(score.view(num_rows, num_columns), data.draw(st.integers(1, num_columns - 1)))


def test_a_score_that_is_no_number_is_a_bug_and_not_a_choice() -> None:
    score_OI = torch.ones(2, 8)
    score_OI[1, 3] = torch.nan
    for choose in (lambda: keep_highest(score_OI, 4), lambda: keep_n_of_m(score_OI, 2, 4)):
        with pytest.raises(AssertionError, match="number"):
            choose()
