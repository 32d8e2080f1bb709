"""Generated texts on disk: a file per batch, so that a killed stage goes on, and one table when all are there."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.errors import Refusal
from pipeline.files import read_table, write_file, write_table
from pipeline.storage import Location

_IDS = pa.list_(pa.int32())


@dataclass(frozen=True, eq=False)
class Row:
    """A generated text: prompt and continuation as token ids [T], with its perplexity under the model that wrote it.

    `ended` says that the model ended it itself, with the last of its tokens.
    """

    row_index: int
    num_prompt_tokens: int
    token_ids: NDArray[np.int32]
    ended: bool
    perplexity: float

    @property
    def is_empty(self) -> bool:
        """Whether nothing follows the prompt but the end."""
        return len(self.token_ids) - self.num_prompt_tokens <= int(self.ended)


@dataclass(frozen=True)
class RowStore:
    """The rows of one generation; `identity` is everything that they depend on."""

    folder: Location
    identity: dict[str, Any]

    @property
    def table_file(self) -> Location:
        return self.folder / "rows.parquet"

    def existing(self) -> set[int]:
        """The indices of the rows that have been generated."""
        return set(self._existing)

    def write(self, rows: Sequence[Row]) -> None:
        """Keep the rows of a batch, all or none."""
        if not (self.folder / "generation.json").exists():
            write_file(self.folder / "generation.json", json.dumps(self.identity, indent=1).encode())
        write_table(self._table(rows), self._batch_folder / f"from-row-{rows[0].row_index:08d}.parquet")
        self._existing.update(row.row_index for row in rows)

    def read(self, num_rows: int) -> list[Row]:
        """The first rows, by index."""
        rows = {row.row_index: row for file in self._files for row in _rows(file)}
        return [rows[index] for index in range(num_rows)]

    def write_table(self, rows: Sequence[Row], reasons: Sequence[str | None]) -> None:
        """All rows in one file, with which were kept and why the others were not."""
        table = self._table(rows)
        table = table.append_column("kept", pa.array([reason is None for reason in reasons], pa.bool_()))
        write_table(table.append_column("dropped_for", pa.array(reasons, pa.string())), self.table_file)

    @cached_property
    def _existing(self) -> set[int]:
        return {index for file in self._files for index in _read(file, ["row_index"])["row_index"].to_pylist()}

    @property
    def _batch_folder(self) -> Location:
        return self.folder / "batches"

    @property
    def _files(self) -> list[Location]:
        return sorted(self._batch_folder.glob("from-row-*.parquet"), key=str)

    def _table(self, rows: Sequence[Row]) -> pa.Table:
        return pa.table(
            {
                "row_index": pa.array([row.row_index for row in rows], pa.int64()),
                "prompt_ids": pa.array([row.token_ids[: row.num_prompt_tokens] for row in rows], _IDS),
                "token_ids": pa.array([row.token_ids for row in rows], _IDS),
                "ended": pa.array([row.ended for row in rows], pa.bool_()),
                "perplexity": pa.array([row.perplexity for row in rows], pa.float64()),
                "model": pa.array([self.identity["model"]] * len(rows), pa.string()),
                "sampling": pa.array([json.dumps(self.identity["sampling"])] * len(rows), pa.string()),
            }
        )


def _rows(file: Location) -> Iterator[Row]:
    table = _read(file, ["row_index", "prompt_ids", "token_ids", "ended", "perplexity"])
    ids = [text.values.to_numpy() for text in table["token_ids"]]
    scalars = [table[name].to_pylist() for name in ("row_index", "ended", "perplexity")]
    lengths = pc.list_value_length(table["prompt_ids"]).to_pylist()
    for row_index, ended, perplexity, num_prompt_tokens, token_ids in zip(*scalars, lengths, ids, strict=True):
        yield Row(row_index, num_prompt_tokens, token_ids, ended, perplexity)


def _read(file: Location, columns: list[str]) -> pa.Table:
    try:
        return read_table(file, columns)
    except (pa.ArrowException, OSError):
        raise Refusal(f"{file}: is damaged; delete it and run again, its rows are then generated again") from None
