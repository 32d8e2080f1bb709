"""Source `parquet`: ready-made windows, one a row, used as they are."""

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


class ParquetSource(Settings):
    """`path` is a Parquet file with a column of lists of token ids, all of one length."""

    name: Literal["parquet"] = "parquet"
    path: UserPath
    column: str = "input_ids"


def read_windows(source: ParquetSource, num_windows: int, window_length: int) -> Tensor:
    """The first `num_windows` rows as ids [N, L]. Raises Refusal where rows are missing or of another length."""
    rows = _read_rows(source, num_windows)
    lengths = sorted(set(pc.list_value_length(rows).to_pylist()))
    if lengths != [window_length]:
        raise Refusal(
            f"calibration.window_length = {window_length}: the windows of {source.path} have lengths "
            f"{', '.join(map(str, lengths[:5]))}; give windows of that one length or change the setting"
        )
    return torch.from_numpy(pc.list_flatten(rows).to_numpy().copy()).view(num_windows, window_length)


def _read_rows(source: ParquetSource, num_windows: int) -> pa.Array:
    """Lists of int64, none of them missing."""
    where = f"calibration.source.path = {source.path}"
    if not Path(source.path).is_file():
        raise Refusal(f"{where}: no such file; give the path of a Parquet file")
    try:
        file = pq.ParquetFile(source.path)
        names, num_rows = file.schema_arrow.names, file.metadata.num_rows
        if source.column not in names:
            raise Refusal(f"{where}: has no column {source.column!r}, only {names}; set calibration.source.column")
        if num_rows < num_windows:
            raise Refusal(f"{where}: has {num_rows} windows and calibration.num_windows = {num_windows}; ask for fewer")
        column = file.read(columns=[source.column])[source.column].slice(0, num_windows)
        is_lists = any(check(column.type) for check in _LIST_CHECKS)
        if not is_lists or not pa.types.is_integer(column.type.value_type):
            raise Refusal(
                f"{where}: column {source.column!r} is {column.type}; give a column of lists of whole numbers"
            )
        rows = column.cast(pa.list_(pa.int64())).combine_chunks()
    except (pa.ArrowException, OSError) as error:
        raise Refusal(f"{where}: cannot be read as windows of token ids ({error}); write it again") from None
    if rows.null_count or pc.list_flatten(rows).null_count:
        raise Refusal(f"{where}: column {source.column!r} has missing values; give complete windows")
    return rows
