"""Source `parquet`: a column of token ids or of text, one document (or one ready window) a row."""

from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from pipeline.errors import Refusal
from pipeline.settings import Settings, UserPath

_LIST_CHECKS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
_TEXT_CHECKS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)


class ParquetSource(Settings):
    """`path` is a Parquet file with a column of lists of token ids, or of text."""

    name: Literal["parquet"] = "parquet"
    path: UserPath
    column: str = "input_ids"

    @property
    def origin(self) -> str:
        return self.path

    @property
    def holds_text(self) -> bool:
        """Whether the column is text. Raises Refusal where the file cannot be read or has no such column."""
        kind = _open(self).schema_arrow.field(self.column).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        return any(check(kind) for check in _TEXT_CHECKS)

    def read_texts(self) -> list[str]:
        """The documents of a column of text."""
        return [str(text) for text in _read_column(self).to_pylist()]

    def read_ids(self) -> list[Tensor]:
        """The documents of a column of token ids."""
        rows = _as_ids(self, _read_column(self))
        return [torch.from_numpy(row.values.to_numpy().copy()) for row in rows]


def read_windows(source: ParquetSource, num_windows: int, window_length: int) -> Tensor:
    """The first `num_windows` rows as ids [N, L]. Raises Refusal where rows are missing or of another length."""
    num_rows = _open(source).metadata.num_rows
    if num_rows < num_windows:
        raise Refusal(
            f"{_where(source)}: has {num_rows} windows and calibration.num_windows = {num_windows}; ask for fewer"
        )
    rows = _as_ids(source, _read_column(source, num_windows))
    lengths = sorted(set(pc.list_value_length(rows).to_pylist()))
    if lengths != [window_length]:
        raise Refusal(
            f"calibration.window_length = {window_length}: the windows of {source.path} have lengths "
            f"{', '.join(map(str, lengths[:5]))}; give windows of that one length, change the setting, or set "
            "calibration.windows to inside or across to have them cut"
        )
    return torch.from_numpy(pc.list_flatten(rows).to_numpy().copy()).view(num_windows, window_length)


def _where(source: ParquetSource) -> str:
    return f"calibration.source.path = {source.path}"


def _open(source: ParquetSource) -> pq.ParquetFile:
    """The file, with the column in it."""
    if not Path(source.path).is_file():
        raise Refusal(f"{_where(source)}: no such file; give the path of a Parquet file")
    try:
        file = pq.ParquetFile(source.path)
        names = file.schema_arrow.names
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(source, error) from None
    if names.count(source.column) > 1:
        raise Refusal(f"{_where(source)}: has {names.count(source.column)} columns {source.column!r}; give them names")
    if source.column not in names:
        raise Refusal(f"{_where(source)}: has no column {source.column!r}, only {names}; set calibration.source.column")
    return file


def _read_column(source: ParquetSource, num_rows: int | None = None) -> pa.Array:
    """The first rows of the column, none of them missing."""
    try:
        column = _open(source).read(columns=[source.column])[source.column].slice(0, num_rows).combine_chunks()
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(source, error) from None
    if column.null_count:
        raise Refusal(f"{_where(source)}: column {source.column!r} has missing values; give complete rows")
    return column


def _as_ids(source: ParquetSource, column: pa.Array) -> pa.Array:
    """Lists of int64."""
    is_lists = any(check(column.type) for check in _LIST_CHECKS)
    if not is_lists or not pa.types.is_integer(column.type.value_type):
        raise Refusal(
            f"{_where(source)}: column {source.column!r} is {column.type}; give a column of lists of whole numbers"
        )
    try:
        rows = column.cast(pa.list_(pa.int64()))
    except pa.ArrowException as error:
        raise _unreadable(source, error) from None
    if pc.list_flatten(rows).null_count:
        raise Refusal(f"{_where(source)}: column {source.column!r} has missing values; give complete rows")
    return rows


def _unreadable(source: ParquetSource, error: Exception) -> Refusal:
    return Refusal(f"{_where(source)}: cannot be read as windows of token ids ({error}); write it again")
