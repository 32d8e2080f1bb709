"""Masks with exact counts: first how many weights are kept, then which.

R = independent units (rows, or one for a whole matrix), S = scores of one unit; O = output rows, I = input columns.
"""

import itertools
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

_NUMBERS_AT_ONCE = 2**18


def keep_highest(score_RS: Tensor, num_pruned: int) -> Tensor:
    """Keep all but the `num_pruned` lowest scores of each unit; of equal scores the leftmost go first.

    The same choice as a stable ascending sort, without the sort. Returns a mask [R, S], True is kept.
    """
    if num_pruned == 0 or len(score_RS) == 0:
        return torch.ones_like(score_RS, dtype=torch.bool)
    threshold_R1 = _kth_lowest(score_RS, num_pruned)
    keep_RS = score_RS > threshold_R1
    num_kept = score_RS.shape[1] - num_pruned
    # no unit keeps more yet, so all together keep enough only where each does; one with NaN does not, since every
    # selection takes that for the highest, and it is above no threshold
    if int(keep_RS.count_nonzero()) < num_kept * len(score_RS):
        assert _are_numbers(score_RS), "a score is a number"
        tied_RS = score_RS == threshold_R1
        num_tied_pruned_R1 = _counted(tied_RS) - (num_kept - _counted(keep_RS))
        keep_RS |= tied_RS & (tied_RS.cumsum(dim=1, dtype=torch.int32) > num_tied_pruned_R1)
    return keep_RS


def _kth_lowest(score_RS: Tensor, k: int) -> Tensor:
    """The k-th lowest of each unit [R, 1]."""
    if score_RS.is_cuda:
        # kthvalue gives every unit one block of threads: of a single unit most of the device would see nothing
        return _kth_lowest_of_one(score_RS, k) if len(score_RS) == 1 else score_RS.kthvalue(k, 1, True).values
    # vectorised, where kthvalue is not: ten times as fast; a part at a time, which the cache holds
    lowest_R1 = torch.empty(len(score_RS), 1, dtype=score_RS.dtype)
    scores, lowest = score_RS.numpy(), lowest_R1.numpy()
    num_units = max(1, _NUMBERS_AT_ONCE // score_RS.shape[1])

    def look(start: int) -> None:
        part = scores[start : start + num_units].copy()
        part.partition(k - 1, axis=1)
        lowest[start : start + num_units] = part[:, k - 1 : k]

    if len(score_RS) <= num_units:
        look(0)
    else:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(look, range(0, len(score_RS), num_units)))
    return lowest_R1


def _kth_lowest_of_one(score_1S: Tensor, k: int) -> Tensor:
    """Of a single unit [1, 1], by what is a selection by the whole of a GPU, and no sort: the shorter side of it."""
    num_from_above = score_1S.shape[1] - k + 1
    if k <= num_from_above:
        return score_1S.topk(k, dim=1, largest=False, sorted=False).values.amax(dim=1, keepdim=True)
    return score_1S.topk(num_from_above, dim=1, sorted=False).values.amin(dim=1, keepdim=True)


def _counted(is_RS: Tensor) -> Tensor:
    """How many of each unit are True [R, 1]. As bytes, since a sum of booleans is not vectorised."""
    return is_RS.view(torch.uint8).sum(dim=1, keepdim=True, dtype=torch.int32)


def keep_n_of_m(score_OI: Tensor, n: int, m: int) -> Tensor:
    """Keep the `n` highest of every `m` consecutive columns; of equal scores the leftmost go first.

    I must be a multiple of `m`. Returns a mask [O, I], True is kept.
    """
    num_rows, num_columns = score_OI.shape
    assert num_columns % m == 0, (num_columns, m)
    assert _are_numbers(score_OI), "a score is a number"
    score_MOG = score_OI.reshape(num_rows, num_columns // m, m).permute(2, 0, 1).contiguous()
    # rank = how many of the group go before this one: of two, the left one unless it is higher
    rank_MOG = torch.empty_like(score_MOG, dtype=torch.int8 if m < 128 else torch.int16)
    scores, ranks = score_MOG.unbind(), rank_MOG.unbind()
    for place, rank_OG in enumerate(ranks):
        rank_OG.fill_(m - 1 - place)
    for left, right in itertools.combinations(range(m), 2):
        left_goes_OG = (scores[left] <= scores[right]).view(torch.int8)
        ranks[right].add_(left_goes_OG)
        ranks[left].sub_(left_goes_OG)
    return (rank_MOG >= m - n).permute(1, 2, 0).reshape(num_rows, num_columns)


def masked(weight_OI: Tensor, keep_OI: Tensor) -> Tensor:
    """The weight with 0 where it is not kept. By its bits, which is vectorised where masked_fill is not."""
    dtype = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight_OI.element_size()]
    bits_OI = keep_OI.view(torch.int8).to(dtype).neg_().bitwise_and_(weight_OI.view(dtype))
    return bits_OI.view(weight_OI.dtype)


def _are_numbers(scores: Tensor) -> bool:
    """The highest is NaN where any is."""
    return scores.numel() == 0 or not bool(scores.amax().isnan())
