"""DSnoT: swap pruned for kept weights until what a row is expected to put out is what it was (2310.08915).

With D_ij = w_ij E[x_j], the error of row i is the sum of D over its pruned weights. Where it is positive, the pruned
weight with the largest D / Var[x] grows back, and of the kept weights with D < 0 the one with the lowest Wanda score
goes; where it is negative, the same with -D. Nothing is swapped twice, and a swap stays within one group of N:M.

O = output rows, r = rows of one matrix, I = input columns, G = groups of M columns (one of all columns where nothing is
N:M), S = the sign of the error (plus, minus), K = swaps in their order and, last, the end of them.
"""

from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from pipeline.methods.masked import MaskMethod
from pipeline.methods.pruned import Pruned
from pipeline.numerics.solve import upper_factor
from pipeline.numerics.statistics import Columns, Gram, Statistic
from pipeline.sparsity import Budget, NofM, Pattern

# The official error is a sum over the tokens of a window, which are this many in all that is published.
_WINDOW_LENGTH = 2048


class DSnoT(MaskMethod):
    """Each row makes at most `max_cycles` swaps, until its |error|, that of 2048 tokens, is <= `update_threshold`.

    `initial`: whose scores the first mask has, row by row; sparsegpt = w² / U_jj², nothing updated, with `damping`.
    `refine`: in which linears weights are swapped, by the names of their modules; the others keep the first mask.
    `variance_power`: Var[x] to this power. `keep_sign`: a row ends before the swap that would turn the sign of its
    error; auto = where the pattern is N:M. The defaults are the official ones. They are meant for rows of thousands of
    columns: in one of 256, 50 swaps replace half of what is kept, which does harm.
    """

    name: Literal["dsnot"] = "dsnot"
    initial: Literal["magnitude", "wanda", "sparsegpt"] = "wanda"
    refine: Literal["attention", "mlp", "all"] = "attention"
    max_cycles: int = Field(50, ge=1)
    update_threshold: float = Field(0.1, ge=0)
    variance_power: float = Field(1.0, ge=0)
    keep_sign: bool | Literal["auto"] = "auto"
    damping: float = Field(0.01, ge=0, le=1)

    @property
    def statistic(self) -> type[Statistic]:
        return Gram if self.initial == "sparsegpt" else super().statistic

    def prune(self, weight_OI: Tensor, inputs: Any, budget: Budget) -> Pruned:
        score_OI, damping = self._initial_scores(weight_OI, inputs)
        matrices = (torch.split(tensor, list(budget.num_rows)) for tensor in (weight_OI, budget.keep_per_row(score_OI)))
        parts = zip(*matrices, budget.patterns, self.refines(budget), strict=True)
        keeps = [
            self._refined(weight_rI, keep_rI, inputs, pattern) if is_refined else keep_rI
            for weight_rI, keep_rI, pattern, is_refined in parts
        ]
        pruned = self.applied(weight_OI, torch.cat(keeps), inputs)
        return pruned if damping is None else replace(pruned, damping=damping)

    def score(self, weight_OI: Tensor, inputs: Any, budget: Budget) -> Tensor:
        """What the first mask goes by."""
        return self._initial_scores(weight_OI, inputs)[0]

    def variance(self, inputs: Columns) -> Tensor:
        """Var[x] over all tokens, [I]; rounding must not make it negative."""
        mean_I = inputs.sum_I / inputs.num_tokens
        return (inputs.sum_squares_I / inputs.num_tokens - mean_I.square()).clamp(min=0)

    def refines(self, budget: Budget) -> list[bool]:
        """For each matrix, whether its weights are swapped."""
        if self.refine == "all":
            return [True] * len(budget.num_rows)
        assert budget.names, "which linears are attention is told by their names"
        return [_is_attention(name) == (self.refine == "attention") for name in budget.names]

    def _initial_scores(self, weight_OI: Tensor, inputs: Any) -> tuple[Tensor, float | None]:
        """The scores [O, I] of the first mask, and the damping where there is one."""
        if self.initial == "magnitude":
            return weight_OI.abs(), None
        if self.initial == "wanda":
            return _wanda_scores(weight_OI, inputs), None
        upper_II, damping = upper_factor(inputs.sum_II, self.damping)
        # scores are squares: -1 sends columns that never saw an input first
        return (weight_OI * upper_II.diagonal()).square().masked_fill(inputs.sum_squares_I == 0, -1), damping

    def _refined(self, weight_rI: Tensor, keep_rI: Tensor, inputs: Columns, pattern: Pattern) -> Tensor:
        """The mask [r, I] of one matrix after its swaps."""
        is_n_of_m = isinstance(pattern, NofM)
        group_size = pattern.m if isinstance(pattern, NofM) else weight_rI.shape[1]
        queues = [
            _queue(*self._candidates(weight_rI, keep_rI, inputs, sign), group_size, self.max_cycles) for sign in (1, -1)
        ]
        grown_rSK, gone_rSK, is_end_rSK = (torch.stack(parts, dim=1) for parts in zip(*queues, strict=True))
        row_rSK = torch.arange(len(keep_rI), device=keep_rI.device)[:, None, None].expand_as(grown_rSK)
        contribution_rI = _contributions(weight_rI, inputs)
        change_rSK = contribution_rI[row_rSK, gone_rSK] - contribution_rI[row_rSK, grown_rSK]
        num_swaps_rS = self._num_swaps(
            contribution_rI.masked_fill(keep_rI, 0).sum(dim=1),
            change_rSK.masked_fill(is_end_rSK, torch.nan),
            is_n_of_m if self.keep_sign == "auto" else self.keep_sign,
        )
        made_rSK = torch.arange(grown_rSK.shape[2], device=keep_rI.device) < num_swaps_rS[:, :, None]
        keep_rI = keep_rI.clone()
        keep_rI[row_rSK[made_rSK], grown_rSK[made_rSK]] = True
        keep_rI[row_rSK[made_rSK], gone_rSK[made_rSK]] = False
        return keep_rI

    def _candidates(self, weight_rI: Tensor, keep_rI: Tensor, inputs: Columns, sign: int) -> tuple[Tensor, Tensor]:
        """For errors of a sign, by rank: what grows, the highest first; what goes, the lowest first. Both [r, I].

        What cannot grow has -inf, what cannot go inf. A column that is always 0 can do neither: it changes no error,
        and its D / Var[x] is NaN or 0, and so not > 0.
        """
        contribution_rI = sign * _contributions(weight_rI, inputs)
        growth_rI = contribution_rI / self.variance(inputs).pow(self.variance_power)
        goes_rI = _wanda_scores(weight_rI, inputs).where(keep_rI & (contribution_rI < 0), torch.inf)
        return growth_rI.where(~keep_rI & (growth_rI > 0), -torch.inf), goes_rI

    def _num_swaps(self, error_r: Tensor, change_rSK: Tensor, keep_sign: bool) -> Tensor:
        """How many swaps from the front of each queue give a row the least |error| of all masks on its way, [r, S].

        The official code ends with the last mask, which after an overshoot can be worse than the first. `change_rSK` is
        what a swap adds to the error, NaN at the end of a queue.
        """
        row_r = torch.arange(len(error_r), device=error_r.device)
        num_made_rS = torch.zeros(len(error_r), 2, dtype=torch.int64, device=error_r.device)
        best_rS, least_r = num_made_rS, error_r.abs()
        first_sign_r = error_r.sign()
        is_open_r = torch.ones_like(row_r, dtype=torch.bool)
        for _ in range(self.max_cycles):
            side_r = (error_r < 0).long()
            after_r = error_r + change_rSK[row_r, side_r, num_made_rS[row_r, side_r]]
            is_open_r = is_open_r & (error_r.abs() > self.update_threshold) & ~after_r.isnan()
            if keep_sign:
                is_open_r &= after_r.sign() == first_sign_r
            if not bool(is_open_r.any()):
                break
            error_r = torch.where(is_open_r, after_r, error_r)
            num_made_rS = num_made_rS.index_put((row_r, side_r), is_open_r.long(), accumulate=True)
            best_rS = torch.where((error_r.abs() < least_r)[:, None], num_made_rS, best_rS)
            least_r = torch.minimum(error_r.abs(), least_r)
        return best_rS


def _queue(grows_rI: Tensor, goes_rI: Tensor, group_size: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """The columns that grow and go in each swap, in the order of growth, and whether they have come to an end, [r, K].

    In each group the first to grow takes the place of the first to go, the second that of the second.
    """
    num_rows, num_columns = grows_rI.shape
    num_ranks = min(length, group_size)
    grows_rGM, goes_rGM = (rank_rI.view(num_rows, -1, group_size) for rank_rI in (grows_rI, goes_rI))
    grows_rGK, grown_rGK = grows_rGM.topk(num_ranks, dim=2)
    goes_rGK, gone_rGK = goes_rGM.topk(num_ranks, dim=2, largest=False)
    rank_rQ = grows_rGK.masked_fill(goes_rGK == torch.inf, -torch.inf).flatten(1)
    rank_rK, swap_rK = rank_rQ.topk(min(length, rank_rQ.shape[1]), dim=1)
    first_G1 = torch.arange(0, num_columns, group_size, device=grows_rI.device)[:, None]
    grown_rK, gone_rK = ((first_G1 + inner).flatten(1).gather(1, swap_rK) for inner in (grown_rGK, gone_rGK))
    return _with_end(grown_rK, 0), _with_end(gone_rK, 0), _with_end(rank_rK == -torch.inf, True)


def _with_end(values_rK: Tensor, end: int | bool) -> Tensor:
    return torch.cat([values_rK, values_rK.new_full((len(values_rK), 1), end)], dim=1)


def _contributions(weight_OI: Tensor, inputs: Columns) -> Tensor:
    """D [O, I], of the tokens of a window."""
    return weight_OI * (inputs.sum_I * (_WINDOW_LENGTH / inputs.num_tokens))


def _wanda_scores(weight_OI: Tensor, inputs: Columns) -> Tensor:
    return weight_OI.abs() * inputs.norm_I


def _is_attention(name: str) -> bool:
    """All architectures call it by its name: self_attn, self_attention, attn, attention."""
    return "attn" in name.lower() or "attention" in name.lower()
