"""The column loop of the sweep on a GPU, as one Triton kernel: a row keeps the errors of its columns in registers.

What it computes is solve.sweep_columns, which is its oracle. O = output rows, C = columns that are swept together.
"""

import triton
import triton.language as tl
from torch import Tensor

# A program holds the errors of all columns of some rows.
MOST_COLUMNS = 128
_ROWS_AT_ONCE = 32


def sweep_columns(weight_CO: Tensor, error_CO: Tensor, upper_CC: Tensor) -> None:
    """As solve.sweep_columns; C is at most MOST_COLUMNS."""
    num_columns, num_rows = weight_CO.shape
    assert num_columns <= MOST_COLUMNS and weight_CO.stride(1) == error_CO.stride(1) == 1
    _sweep_some_rows[(triton.cdiv(num_rows, _ROWS_AT_ONCE),)](
        weight_CO,
        error_CO,
        upper_CC,
        num_columns,
        num_rows,
        weight_CO.stride(0),
        error_CO.stride(0),
        *upper_CC.stride(),
        COLUMNS=triton.next_power_of_2(num_columns),
        ROWS=_ROWS_AT_ONCE,
    )


@triton.jit  # type: ignore[untyped-decorator]
def _sweep_some_rows(  # type: ignore[no-untyped-def]
    weight,
    error,
    upper,
    num_columns,
    num_rows,
    weight_stride,
    error_stride,
    upper_stride,
    upper_column_stride,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    row_O = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row_O = row_O < num_rows
    place_C = tl.arange(0, COLUMNS)
    error_CO = tl.zeros((COLUMNS, ROWS), tl.float32)
    weight_at_O, error_at_O = weight + row_O, error + row_O
    for column in range(num_columns):
        upper_C = tl.load(upper + place_C * upper_stride + column * upper_column_stride, place_C < column, 0.0)
        weight_O = tl.load(weight_at_O, is_row_O, 0.0) - tl.sum(error_CO * upper_C[:, None], axis=0)
        error_O = weight_O * tl.load(error_at_O, is_row_O, 0.0)
        error_CO = tl.where(place_C[:, None] == column, error_O[None, :], error_CO)
        tl.store(weight_at_O, weight_O, is_row_O)
        tl.store(error_at_O, error_O, is_row_O)
        weight_at_O += weight_stride
        error_at_O += error_stride
