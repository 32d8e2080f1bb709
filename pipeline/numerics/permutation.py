"""An order of the columns under which N:M keeps more of the score (Zhang et al., "Plug-and-Play", ICLR 2024).

R = rows, C = columns, G = C / M groups of columns, P = the M places of a group. An order lists the columns [C] by their
new places, and is a view of [G, P].
"""

import torch
from torch import Tensor

from pipeline.numerics.masks import keep_n_of_m

# Most of the gain is in the first passes. A pass over M places takes C² R / M steps.
_MAX_PASSES, _LEAST_GAIN = 5, 5e-4
_ROUNDING = 1e-6


def best_order(score_RC: Tensor, n: int, m: int) -> Tensor:
    """An order in which N:M keeps more of the score than of the columns as they are; as they are, if none is found."""

    def kept(order_C: Tensor) -> float:
        return kept_score(score_RC[:, order_C], n, m)

    as_is_C = torch.arange(score_RC.shape[1], device=score_RC.device)
    start_C = max(as_is_C, dealt_order(score_RC, m), key=kept)
    return max(as_is_C, exchanged_order(score_RC, start_C, n, m), key=kept)


def kept_score(score_RC: Tensor, n: int, m: int) -> float:
    """The sum of the scores that N:M keeps."""
    return float(score_RC.masked_fill(~keep_n_of_m(score_RC, n, m), 0).sum(dtype=torch.float64))


def dealt_order(score_RC: Tensor, m: int) -> Tensor:
    """Columns by their sums, dealt out to the groups there and back, so that no group has only strong ones (the paper's
    heuristic allocation)."""
    column_PG = score_RC.sum(dim=0).argsort(stable=True).view(m, -1)
    column_PG[1::2] = column_PG[1::2].flip(1)
    return column_PG.T.flatten()


def exchanged_order(score_RC: Tensor, order_C: Tensor, n: int, m: int) -> Tensor:
    """`order_C` after exchanges of columns between groups for as long as they pay.

    With all places of a group but one as they are, a column x there adds the sum over rows of max(0, x - t), t the n-th
    highest of the others: (|x - t| + x - t) / 2. Over an exchange of columns only |x - t| changes, so a matrix of L1
    distances says what every column is worth in every group (the paper's assignment problem), place by place.
    """
    assert 0 < n < m, (n, m)
    score_CR, column_GP = score_RC.T.contiguous(), order_C.reshape(-1, m)
    place_P, group_G = (torch.arange(size, device=order_C.device) for size in (m, len(column_GP)))
    turned_GP = (place_P + group_G[:, None]) % m
    before = kept_score(score_RC[:, order_C], n, m)
    for _ in range(_MAX_PASSES):
        column_GP = column_GP.clone()
        for place in range(m):
            others_GPR = score_CR[torch.cat([column_GP[:, :place], column_GP[:, place + 1 :]], dim=1)]
            threshold_GR = others_GPR.kthvalue(m - n, dim=1).values
            worth_GG = torch.cdist(score_CR[column_GP[:, place]], threshold_GR, p=1)
            column_GP[:, place] = column_GP[_assigned(worth_GG), place]
        after = kept_score(score_RC[:, column_GP.flatten()], n, m)
        if after - before <= _LEAST_GAIN * before:
            break
        # columns change groups within a place: let others meet there in the next pass
        before, column_GP = after, column_GP.gather(1, turned_GP)
    return column_GP.flatten()


def _assigned(worth_GG: Tensor) -> Tensor:
    """Which row every column of `worth_GG` gets, where it had its own: no exchange of two would raise the sum much.

    All pairs that are each other's best are exchanged at once. The best pair of all is among them, so it ends.
    """
    index_G = torch.arange(len(worth_GG), device=worth_GG.device)
    row_G = index_G
    for _ in range(len(worth_GG)):
        given_GG = worth_GG[row_G]
        own_G = given_GG.diagonal()
        gain_GG = (given_GG + given_GG.T) - (own_G + own_G[:, None])
        gain_G, partner_G = gain_GG.max(dim=1)
        is_paired_G = (partner_G[partner_G] == index_G) & (gain_G > _ROUNDING * own_G.mean())
        if not bool(is_paired_G.any()):
            break
        row_G = row_G[torch.where(is_paired_G, partner_G, index_G)]
    return row_G
