"""Masks with exact counts: first how many weights are kept, then which.

R = independent units (rows, or one for a whole matrix), S = scores of one unit; O = output rows, I = input columns.
"""

import torch
from torch import Tensor


def keep_highest(score_RS: Tensor, num_pruned: int) -> Tensor:
    """Keep all but the `num_pruned` lowest scores of each unit; of equal scores the leftmost go first.

    The same choice as a stable ascending sort, without the sort. Returns a mask [R, S], True is kept.
    """
    assert not bool(score_RS.isnan().any()), "a score is a number"
    if num_pruned == 0 or len(score_RS) == 0:
        return torch.ones_like(score_RS, dtype=torch.bool)
    threshold_R1 = score_RS.kthvalue(num_pruned, dim=1, keepdim=True).values
    below_RS = score_RS < threshold_R1
    tied_RS = score_RS == threshold_R1
    num_tied_pruned_R1 = num_pruned - below_RS.sum(dim=1, keepdim=True)
    if torch.equal(num_tied_pruned_R1, tied_RS.sum(dim=1, keepdim=True)):
        return score_RS > threshold_R1
    tied_pruned_RS = tied_RS & (tied_RS.cumsum(dim=1, dtype=torch.int32) <= num_tied_pruned_R1)
    return ~(below_RS | tied_pruned_RS)


def keep_n_of_m(score_OI: Tensor, n: int, m: int) -> Tensor:
    """Keep the `n` highest of every `m` consecutive columns; of equal scores the leftmost go first.

    I must be a multiple of `m`. Returns a mask [O, I], True is kept.
    """
    num_rows, num_columns = score_OI.shape
    assert num_columns % m == 0, (num_columns, m)
    assert not bool(score_OI.isnan().any()), "a score is a number"
    score_OGM = score_OI.reshape(num_rows, num_columns // m, m)
    # rank = how many of the group go before this one; counting m comparisons beats sorting groups this small
    rank_OGM = torch.zeros_like(score_OGM, dtype=torch.int16)
    position_M = torch.arange(m, device=score_OI.device)
    for other in range(m):
        other_OG1 = score_OGM[:, :, other : other + 1]
        rank_OGM += other_OG1 < score_OGM
        rank_OGM += (other_OG1 == score_OGM) & (position_M > other)
    return (rank_OGM >= m - n).view(num_rows, num_columns)
