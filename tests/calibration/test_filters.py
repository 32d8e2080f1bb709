"""Filters: exact counts at either end of the perplexities, and a reason for every text that is dropped."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.calibration.filters import Filter, repetition
from pipeline.calibration.rows import Row

KEEP_ALL = Filter(drop_highest=0)


def row(row_index: int, perplexity: float = 2.0, tokens: tuple[int, ...] = (), *, ended: bool = False) -> Row:
    """A text of its own, unless its tokens are given; the first one is its prompt."""
    ids = np.array(tokens or (1, 3 + row_index, 5), np.int32)
    return Row(row_index, 1, ids, ended, perplexity)


def dropped(chosen: Filter, rows: list[Row], reason: str | None = None) -> set[int]:
    """The indices of the rows that go, for one reason or for any."""
    pairs = zip(rows, chosen.reasons(rows), strict=True)
    return {each.row_index for each, why in pairs if (why == reason if reason else why is not None)}


@st.composite
def shares(draw: st.DrawFn) -> tuple[str, str]:
    """Two decimal fractions as a config writes them, together below 1."""
    places = draw(st.sampled_from([1, 2, 3]))
    highest = draw(st.integers(0, 10**places - 1))
    lowest = draw(st.integers(0, 10**places - 1 - highest))
    return f"{highest / 10**places:.{places}f}", f"{lowest / 10**places:.{places}f}"


@given(shares(), st.integers(0, 400))
def test_exactly_the_share_goes_at_either_end(written: tuple[str, str], num_rows: int) -> None:
    """In exact decimal arithmetic: 0.29 of 100 rows are 29, though 0.29 * 100 is 28.999999999999996."""
    highest, lowest = written
    chosen = Filter(drop_highest=float(highest), drop_lowest=float(lowest))
    rows = [row(index, float((index * 7919) % 1009)) for index in range(num_rows)]
    num_highest, num_lowest = (math.floor(Fraction(share) * num_rows) for share in (highest, lowest))
    ranked = sorted(rows, key=lambda each: each.perplexity)
    high, low = dropped(chosen, rows, "high perplexity"), dropped(chosen, rows, "low perplexity")
    assert high == {each.row_index for each in ranked[num_rows - num_highest :]}
    assert low == {each.row_index for each in ranked[:num_lowest]}
    assert dropped(chosen, rows) == high | low


def test_029_of_100_is_29() -> None:
    rows = [row(index, index) for index in range(100)]
    assert len(dropped(Filter(drop_highest=0.29), rows)) == 29 > int(0.29 * 100)
    assert len(dropped(Filter(drop_highest=0, drop_lowest=0.57), rows)) == 57 > int(0.57 * 100)


@pytest.mark.parametrize(("highest", "lowest"), [(0.3, 0.0), (0.0, 0.3), (0.3, 0.3)])
def test_among_equals_the_later_ones_go(highest: float, lowest: float) -> None:
    rows = [row(index, 5.0) for index in range(10)]
    num_dropped = round(10 * (highest + lowest))
    assert dropped(Filter(drop_highest=highest, drop_lowest=lowest), rows) == set(range(10 - num_dropped, 10))


@given(st.permutations(range(12)), st.lists(st.sampled_from([1.0, 2.0, 3.0]), min_size=12, max_size=12))
def test_the_order_of_the_rows_does_not_matter(order: list[int], perplexities: list[float]) -> None:
    chosen = Filter(drop_highest=0.2, drop_lowest=0.1, deduplicate=True)
    rows = [row(index, perplexity, (1, 3 + index % 7, 5)) for index, perplexity in enumerate(perplexities)]
    reasons = chosen.reasons(rows)
    assert chosen.reasons([rows[index] for index in order]) == [reasons[index] for index in order]


def test_the_worst_go_whatever_their_perplexity_is_called() -> None:
    rows = [row(0, math.inf), row(1, 1.0), row(2, 1e300), row(3, 2.0)]
    assert dropped(Filter(drop_highest=0.25), rows) == {0}
    assert dropped(Filter(drop_highest=0.5), rows) == {0, 2}


@given(st.integers(0, 40))
def test_nothing_is_dropped_where_nothing_is_asked(num_rows: int) -> None:
    assert dropped(KEEP_ALL, [row(index, index) for index in range(num_rows)]) == set()


# --- what else drops a text


def test_empty_texts_go_and_do_not_count_for_the_share() -> None:
    ended_at_once = [row(index, 1.0, (1, 2), ended=True) for index in range(10)]
    rows = [*ended_at_once, *(row(index, index) for index in range(10, 20))]
    chosen = Filter(drop_highest=0.2)
    assert dropped(chosen, rows, "empty") == set(range(10))
    assert dropped(chosen, rows, "high perplexity") == {18, 19}


def test_a_text_of_one_token_is_empty_only_where_that_token_ends_it() -> None:
    assert row(0, 1.0, (1, 2), ended=True).is_empty
    assert row(0, 1.0, (1,)).is_empty
    assert not row(0, 1.0, (1, 7)).is_empty
    assert not row(0, 1.0, (1, 7, 2), ended=True).is_empty


def test_of_equal_texts_the_first_stays() -> None:
    rows = [row(index, 1.0, (1, 3 + index % 3, 5)) for index in range(9)]
    assert dropped(Filter(drop_highest=0, deduplicate=True), rows, "duplicate") == {3, 4, 5, 6, 7, 8}
    assert dropped(KEEP_ALL, rows) == set()


def test_texts_that_repeat_themselves_go() -> None:
    varied, half, all_one = tuple(range(3, 24)), (3, 4, 5, 6) * 5, (7,) * 20
    rows = [row(index, 1.0, tokens) for index, tokens in enumerate([varied, half, all_one])]
    assert dropped(Filter(drop_highest=0, max_repetition=0.99), rows) == set()
    assert dropped(Filter(drop_highest=0, max_repetition=0.9), rows, "repetition") == {2}
    assert dropped(Filter(drop_highest=0, max_repetition=0), rows, "repetition") == {1, 2}


@given(st.lists(st.integers(0, 3), max_size=30))
def test_repetition_is_the_share_of_n_grams_seen_before(tokens: list[int]) -> None:
    grams = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
    repeated = sum(gram in grams[:position] for position, gram in enumerate(grams))
    assert repetition(np.array(tokens, np.int32)) == pytest.approx(repeated / len(grams) if grams else 0.0)


@pytest.mark.parametrize(
    "settings",
    [
        {"drop_highest": 1},
        {"drop_highest": -0.1},
        {"drop_highest": 0.5, "drop_lowest": 0.5},
        {"max_repetition": 1.1},
        {"drop_worst": 0.2},
    ],
)
def test_filters_that_cannot_be(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        Filter(**settings)  # type: ignore[arg-type]
