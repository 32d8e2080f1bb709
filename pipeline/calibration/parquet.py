"""Source `parquet`: ready-made windows, one a row, used as they are."""

from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from pipeline.errors import Refusal
from pipeline.settings import Settings


class ParquetSource(Settings):
    """`path` is a Parquet file with a column of lists of token ids, all of one length."""

    name: Literal["parquet"] = "parquet"
    path: str
    column: str = "input_ids"


def read_windows(source: ParquetSource, num_windows: int, window_length: int) -> Tensor:
    """The first `num_windows` rows as ids [N, L]. Raises Refusal where rows are missing or of another length."""
    rows = _read_rows(source, num_windows)
    lengths = sorted({len(row) for row in rows})
    if lengths != [window_length]:
        raise Refusal(
            f"calibration.window_length = {window_length}: the windows of {source.path} have lengths "
            f"{', '.join(map(str, lengths[:5]))}; give windows of that one length or change the setting"
        )
    return torch.tensor(rows, dtype=torch.int64)


def _read_rows(source: ParquetSource, num_windows: int) -> list[list[int]]:
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
        rows: list[list[int]] = file.read(columns=[source.column])[source.column].slice(0, num_windows).to_pylist()
    except pa.ArrowException as error:
        raise Refusal(f"{where}: cannot be read as Parquet ({error})") from None
    if not all(isinstance(row, list) and all(isinstance(token, int) for token in row) for row in rows):
        raise Refusal(f"{where}: column {source.column!r} must hold lists of whole numbers, one window a row")
    return rows
