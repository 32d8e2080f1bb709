"""Statistics are sums: they agree however the tokens are split, ordered and merged, and they count every token."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.numerics.statistics import ColumnSums, Gram, Statistic, TokenCount

CPU = torch.device("cpu")
KINDS = [TokenCount, ColumnSums, Gram]


def random_tokens(num_tokens: int, num_inputs: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale_I = torch.logspace(-2, 1, num_inputs)
    return (torch.randn(num_tokens, num_inputs, generator=generator) + 0.3) * scale_I


def observed(kind: type[Statistic], *parts_TI: Tensor) -> Statistic:
    statistic = kind.zeros(parts_TI[0].shape[1], CPU)
    for x_TI in parts_TI:
        statistic.observe(x_TI)
    return statistic


def tensors(statistic: Statistic) -> list[Tensor]:
    if isinstance(statistic, Gram):
        return [statistic.sum_I, statistic.sum_II]
    return [value for value in vars(statistic).values() if isinstance(value, Tensor)]


def assert_same(left: Statistic, right: Statistic) -> None:
    assert type(left) is type(right) and left.num_tokens == right.num_tokens
    for ours, theirs in zip(tensors(left), tensors(right), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


@given(st.sampled_from(KINDS), st.lists(st.integers(0, 60), max_size=4), st.randoms(use_true_random=False))
def test_any_split_order_and_merge_of_the_tokens_agree(kind: type[Statistic], cuts: list[int], random: object) -> None:
    x_TI = random_tokens(60, 7)
    whole = observed(kind, x_TI)
    edges = [0, *sorted(cuts), 60]
    parts = [x_TI[start:stop] for start, stop in itertools.pairwise(edges)]
    random.shuffle(parts)
    assert_same(observed(kind, *parts), whole)
    merged = [observed(kind, part) for part in parts]
    while len(merged) > 1:
        left = merged.pop(random.randrange(len(merged)))
        merged.append(left + merged.pop(random.randrange(len(merged))))
    assert_same(merged[0], whole)


@pytest.mark.parametrize("kind", KINDS)
def test_adding_leaves_both_summands_alone(kind: type[Statistic]) -> None:
    left, right = (observed(kind, random_tokens(9, 5, seed)) for seed in (0, 1))
    assert_same(left + right, right + left)
    assert_same(left, observed(kind, random_tokens(9, 5, 0)))
    assert_same(right, observed(kind, random_tokens(9, 5, 1)))
    assert_same(left + kind.zeros(5, CPU), left)


def test_sums_are_what_they_are_called() -> None:
    x_TI = random_tokens(50, 6)
    exact_TI = x_TI.double()
    gram, columns = observed(Gram, x_TI), observed(ColumnSums, x_TI)
    assert observed(TokenCount, x_TI).num_tokens == gram.num_tokens == columns.num_tokens == 50
    torch.testing.assert_close(gram.sum_II.double(), exact_TI.T @ exact_TI, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(columns.sum_I.double(), exact_TI.sum(dim=0), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(columns.sum_squares_I, gram.sum_II.diagonal(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", [ColumnSums, Gram])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_summed_in_float32(kind: type[Statistic], dtype: torch.dtype) -> None:
    x_TI = random_tokens(4000, 3).to(dtype)
    statistic = observed(kind, *x_TI.split(100))
    assert all(tensor.dtype == torch.float32 for tensor in tensors(statistic))
    assert_same(statistic, observed(kind, x_TI.float()))


@pytest.mark.parametrize("kind", [ColumnSums, Gram])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_a_single_bad_input_is_seen(kind: type[Statistic], bad: float) -> None:
    x_TI = random_tokens(20, 4)
    assert observed(kind, x_TI).is_finite()
    x_TI[13, 2] = bad
    assert not observed(kind, x_TI).is_finite()


@pytest.fixture(params=[20, 2**18], ids=["in parts", "whole"])
def numbers_at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.numerics.statistics._NUMBERS_AT_ONCE", request.param)


def relative_error(statistic: Any, before_OI: Tensor, after_OI: Tensor) -> float:
    change, whole = statistic.errors(before_OI, after_OI)
    return float(change / whole)


@pytest.mark.usefixtures("numbers_at_once")
def test_relative_errors_are_those_of_the_outputs() -> None:
    x_TI, before_OI, after_OI = random_tokens(50, 6), random_tokens(4, 6, 1), random_tokens(4, 6, 2)
    change_TO = x_TI.double() @ (before_OI - after_OI).double().T
    whole_TO = x_TI.double() @ before_OI.double().T
    wanted = float(change_TO.square().sum() / whole_TO.square().sum())
    assert relative_error(observed(Gram, x_TI), before_OI, after_OI) == pytest.approx(wanted, rel=1e-5)
    uncorrelated = torch.diag(x_TI.double().square().sum(dim=0).sqrt())
    change, whole = ((weight.double() @ uncorrelated).square().sum() for weight in (before_OI - after_OI, before_OI))
    wanted = float(change / whole)
    assert relative_error(observed(ColumnSums, x_TI), before_OI, after_OI) == pytest.approx(wanted, rel=1e-5)
    wanted = float((before_OI - after_OI).norm() ** 2 / before_OI.norm() ** 2)
    assert relative_error(observed(TokenCount, x_TI), before_OI, after_OI) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_lost_of_nothing_is_no_error(kind: type[Statistic]) -> None:
    assert kind.zeros(6, CPU).errors(torch.zeros(4, 6), torch.zeros(4, 6)) == (0.0, 0.0)


def test_a_gram_is_whole_whenever_it_is_read() -> None:
    """Also between observations, in a sum and in another order of the columns, though half of it is computed."""
    x_TI = random_tokens(90, 600)
    seen, other = observed(Gram, x_TI[:30]), observed(Gram, x_TI[30:60])
    assert isinstance(seen, Gram) and isinstance(other, Gram)
    order_I = torch.randperm(600, generator=torch.Generator().manual_seed(0))
    for gram, expected_TI in (
        (seen, x_TI[:30]),
        (seen + other, x_TI[:60]),
        (seen.reordered(order_I), x_TI[:30, order_I]),
    ):
        assert torch.equal(gram.sum_II, gram.sum_II.T)
        torch.testing.assert_close(gram.sum_II, expected_TI.T @ expected_TI, rtol=1e-4, atol=1e-2)
    seen.observe(x_TI[60:])
    assert torch.equal(seen.sum_II, seen.sum_II.T)
    assert_same(seen, observed(Gram, x_TI[:30], x_TI[60:]))


@pytest.mark.usefixtures("numbers_at_once")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_column_sums_at_once_are_those_in_parts(dtype: torch.dtype) -> None:
    """A GPU takes them at once."""
    x_TI = torch.randn(300, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    parts, whole = (ColumnSums.zeros(7, torch.device("cpu")) for _ in range(2))
    parts.observe(x_TI)
    whole._observe_at_once(x_TI)
    torch.testing.assert_close(whole.sum_I, parts.sum_I, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(whole.sum_squares_I, parts.sum_squares_I, rtol=1e-5, atol=0)
