"""The column loop of the sweep on a GPU, as one Triton kernel: a row keeps the errors of its columns in registers.

What it computes is solve.sweep_columns, which is its oracle; where N of M are kept it chooses them too, as
masks.keep_n_of_m does: groups of M columns one after another would leave the device idle. O = output rows, C = columns
that are swept together, M = columns of a group.
"""

import torch
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


def choose_and_sweep_columns(
    weight_CO: Tensor,
    error_CO: Tensor,
    keep_CO: Tensor,
    upper_CC: Tensor,
    is_dead_C: Tensor,
    num_kept_O: Tensor,
    m: int,
) -> None:
    """Of every `m` consecutive columns of a row keep as many as `num_kept_O` says, and sweep, in place.

    Dead columns go first. Pruned weights are 0 afterwards, `error_CO` and `keep_CO` are filled. C is at most
    MOST_COLUMNS and a multiple of `m`.
    """
    num_columns, num_rows = weight_CO.shape
    assert num_columns <= MOST_COLUMNS and num_columns % m == 0
    assert weight_CO.is_contiguous() and error_CO.is_contiguous() and keep_CO.is_contiguous()
    _choose_and_sweep_some_rows[(triton.cdiv(num_rows, _ROWS_AT_ONCE),)](
        weight_CO,
        error_CO,
        keep_CO.view(torch.uint8),
        upper_CC,
        is_dead_C.to(torch.int32),
        num_kept_O,
        num_columns,
        num_rows,
        *upper_CC.stride(),
        COLUMNS=triton.next_power_of_2(num_columns),
        ROWS=_ROWS_AT_ONCE,
        M=m,
        MOST_OF_GROUP=triton.next_power_of_2(m),
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


@triton.jit  # type: ignore[untyped-decorator]
def _choose_and_sweep_some_rows(  # type: ignore[no-untyped-def]
    weight,
    error,
    keep,
    upper,
    is_dead,
    num_kept,
    num_columns,
    num_rows,
    upper_stride,
    upper_column_stride,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    M: tl.constexpr,
    MOST_OF_GROUP: tl.constexpr,
):
    row_O = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row_O = row_O < num_rows
    num_pruned_O = M - tl.load(num_kept + row_O, is_row_O, 0)
    place_C, place_M = tl.arange(0, COLUMNS), tl.arange(0, MOST_OF_GROUP)
    error_CO = tl.zeros((COLUMNS, ROWS), tl.float32)
    for group in range(num_columns // M):
        first = group * M
        # scores after all updates from the left of the group; what is beyond M goes behind all others
        score_MO = tl.full((MOST_OF_GROUP, ROWS), float("inf"), tl.float32)
        for column in range(first, first + M):
            upper_C = tl.load(upper + place_C * upper_stride + column * upper_column_stride, place_C < first, 0.0)
            diagonal = tl.load(upper + column * (upper_stride + upper_column_stride))
            root_O = _updated(weight + column * num_rows + row_O, is_row_O, error_CO, upper_C) / diagonal
            score_O = tl.where(tl.load(is_dead + column) != 0, -1.0, root_O * root_O)
            score_MO = tl.where(place_M[:, None] == column - first, score_O[None, :], score_MO)
        for column in range(first, first + M):
            at_O = column * num_rows + row_O
            upper_C = tl.load(upper + place_C * upper_stride + column * upper_column_stride, place_C < column, 0.0)
            diagonal = tl.load(upper + column * (upper_stride + upper_column_stride))
            weight_O = _updated(weight + at_O, is_row_O, error_CO, upper_C)
            is_kept_O = _rank(score_MO, place_M, column - first) >= num_pruned_O
            error_O = tl.where(is_kept_O, 0.0, weight_O / diagonal)
            error_CO = tl.where(place_C[:, None] == column, error_O[None, :], error_CO)
            tl.store(weight + at_O, tl.where(is_kept_O, weight_O, 0.0), is_row_O)
            tl.store(error + at_O, error_O, is_row_O)
            tl.store(keep + at_O, is_kept_O.to(tl.uint8), is_row_O)


@triton.jit
def _updated(weight_at_O, is_row_O, error_CO, upper_C):  # type: ignore[no-untyped-def]
    """A column after the updates from columns to its left."""
    return tl.load(weight_at_O, is_row_O, 0.0) - tl.sum(error_CO * upper_C[:, None], axis=0)


@triton.jit
def _rank(score_MO, place_M, member):  # type: ignore[no-untyped-def]
    """How many of a group go before one of it: of equal scores the left one goes first."""
    score_O = tl.sum(tl.where(place_M[:, None] == member, score_MO, 0.0), axis=0)
    is_lower_MO = score_MO < score_O[None, :]
    is_tied_MO = (score_MO == score_O[None, :]) & (place_M[:, None] < member)
    return tl.sum((is_lower_MO | is_tied_MO).to(tl.int32), axis=0)
