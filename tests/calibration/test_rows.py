"""Generated texts on disk and what is told of them: written whole, read as they were, measured against a corpus."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.calibration.rows import Row, RowStore
from pipeline.calibration.summary import overlap
from pipeline.errors import Refusal

IDENTITY = {"model": "m" * 64, "sampling": {"temperature": 0.6}, "seed": 7}


def row(row_index: int, num_tokens: int = 5, *, ended: bool = False, perplexity: float = 2.5) -> Row:
    return Row(row_index, 2, np.arange(row_index, row_index + num_tokens, dtype=np.int32), ended, perplexity)


def same(one: Sequence[Row], other: Sequence[Row]) -> bool:
    def as_bytes(each: Row) -> tuple[Any, ...]:
        return (
            each.row_index,
            each.num_prompt_tokens,
            each.token_ids.tolist(),
            each.token_ids.dtype,
            each.ended,
            each.perplexity,
        )

    return list(map(as_bytes, one)) == list(map(as_bytes, other))


def test_rows_are_read_as_they_were_written_in_the_order_of_their_indices(tmp_path: Path) -> None:
    store = RowStore(tmp_path / "rows", IDENTITY)
    rows = [row(index, 2 + index, ended=index % 2 == 0, perplexity=1 / (3 + index)) for index in range(12)]
    assert store.existing() == set()
    for first in (8, 0, 4):
        store.write(rows[first : first + 4])
    assert store.existing() == RowStore(tmp_path / "rows", IDENTITY).existing() == set(range(12))
    assert same(store.read(12), rows)
    assert same(RowStore(tmp_path / "rows", IDENTITY).read(7), rows[:7])
    assert json.loads((tmp_path / "rows" / "generation.json").read_text()) == IDENTITY


@pytest.mark.parametrize("perplexity", [math.inf, 1.0, math.nextafter(1.0, 2.0), 1e308])
def test_a_perplexity_keeps_its_last_bit(perplexity: float, tmp_path: Path) -> None:
    store = RowStore(tmp_path / "rows", IDENTITY)
    store.write([row(0, perplexity=perplexity)])
    assert store.read(1)[0].perplexity == perplexity


def test_the_bytes_of_a_batch_depend_on_nothing_else(tmp_path: Path) -> None:
    for name in ("one", "other"):
        RowStore(tmp_path / name, IDENTITY).write([row(4), row(5)])
    one, other = ((tmp_path / name / "batches" / "from-row-00000004.parquet").read_bytes() for name in ("one", "other"))
    assert one == other


def test_the_table_says_which_rows_are_kept_and_why_not(tmp_path: Path) -> None:
    store = RowStore(tmp_path / "rows", IDENTITY)
    store.write_table([row(0), row(1), row(2)], [None, "empty", "high perplexity"])
    table = pq.read_table(store.table_file)
    assert table["kept"].to_pylist() == [True, False, False]
    assert table["dropped_for"].to_pylist() == [None, "empty", "high perplexity"]
    assert table["prompt_ids"].to_pylist() == [[0, 1], [1, 2], [2, 3]]
    assert table["token_ids"].to_pylist()[1] == [1, 2, 3, 4, 5]
    assert table["model"].to_pylist() == ["m" * 64] * 3
    assert [json.loads(each) for each in table["sampling"].to_pylist()] == [{"temperature": 0.6}] * 3


def test_what_a_killed_process_left_half_written_is_no_batch(tmp_path: Path) -> None:
    store = RowStore(tmp_path / "rows", IDENTITY)
    store.write([row(0)])
    (tmp_path / "rows" / "batches" / "from-row-00000001.parquet.tmp-123").write_bytes(b"PAR1")
    assert RowStore(tmp_path / "rows", IDENTITY).existing() == {0}


def _other_columns(file: Path) -> None:
    pq.write_table(pa.table({"number": [1]}), file)


def _flip_in_the_middle(file: Path) -> None:
    """Not in the index column, so that it only shows when the rows are read."""
    content = bytearray(file.read_bytes())
    column = pq.ParquetFile(file).metadata.row_group(0).column(2)
    start = min(filter(None, (column.dictionary_page_offset, column.data_page_offset)))
    content[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [_other_columns, _flip_in_the_middle])
def test_a_damaged_batch_is_refused_by_its_name(damage: Any, tmp_path: Path) -> None:
    RowStore(tmp_path / "rows", IDENTITY).write([row(0, 500), row(1, 500)])
    file = tmp_path / "rows" / "batches" / "from-row-00000000.parquet"
    damage(file)
    with pytest.raises(Refusal, match=file.name):
        store = RowStore(tmp_path / "rows", IDENTITY)
        store.existing()
        store.read(2)


# --- overlap


def arrays(*documents: list[int]) -> list[NDArray[np.int32]]:
    return [np.array(text, np.int32) for text in documents]


texts = st.lists(st.lists(st.integers(0, 5), max_size=12), max_size=5)


@given(texts, texts, st.integers(1, 5))
def test_overlap_is_the_share_of_n_grams_that_are_in_the_corpus(
    own: list[list[int]], corpus: list[list[int]], length: int
) -> None:
    def grams(documents: list[list[int]]) -> list[tuple[int, ...]]:
        return [tuple(text[i : i + length]) for text in documents for i in range(len(text) - length + 1)]

    known, mine = set(grams(corpus)), grams(own)
    expected = sum(gram in known for gram in mine) / len(mine) if mine else 0.0
    assert overlap(arrays(*own), arrays(*corpus), length) == pytest.approx(expected)


@pytest.mark.parametrize("length", [1, 2, 4, 8])
def test_a_text_overlaps_wholly_with_itself_and_not_with_a_disjoint_one(length: int) -> None:
    generator = np.random.default_rng(0)
    own = [generator.integers(0, 50_000, 400).astype(np.int32) for _ in range(20)]
    other = [generator.integers(50_000, 100_000, 400).astype(np.int32) for _ in range(20)]
    assert overlap(own, own, length) == 1
    assert overlap(own, other, length) == 0
    assert overlap(own, [*other, *own], length) == 1
    assert overlap([*own, *other], own, length) == pytest.approx(0.5)


def test_the_order_of_tokens_counts() -> None:
    assert overlap(arrays([3, 4, 5]), arrays([5, 4, 3]), 2) == 0
    assert overlap(arrays([3, 4, 5]), arrays([5, 4, 3]), 1) == 1


def test_n_grams_do_not_cross_the_end_of_a_text() -> None:
    assert overlap(arrays([3, 4]), arrays([9, 3], [4, 9]), 2) == 0
