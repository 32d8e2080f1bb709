"""The habits of the official code that ours does not share, restated so that everything else can be compared exactly.

O = output rows, I = input columns, C = columns of one block.
"""

import torch
from torch import Tensor

from pipeline.methods.alps import ALPS
from pipeline.methods.pruned import Pruned
from pipeline.methods.sparsegpt import SparseGPT
from pipeline.numerics.masks import keep_highest, keep_n_of_m
from pipeline.numerics.solve import sweep, upper_factor
from pipeline.numerics.statistics import Gram
from pipeline.sparsity import Budget, NofM, Unstructured


def num_below_threshold(num_weights: int, pattern: Unstructured) -> int:
    """How many scores are <= the one at index int(num_weights x sparsity): one more than asked."""
    return pattern.num_pruned(num_weights) + 1


class OfficialSparseGPT(SparseGPT):
    """SparseGPT with the official counts per block, dead columns and scale of the Hessian."""

    num_windows: int

    def prune(self, weight_OI: Tensor, inputs: Gram, budget: Budget) -> Pruned:
        hessian_II = inputs.sum_II * (2 / self.num_windows)
        dead_I = hessian_II.diagonal() == 0
        hessian_II.diagonal()[dead_I] = 1
        upper_II, damping = upper_factor(hessian_II, self.damping)

        def choose(score_OC: Tensor, first_column: int) -> Tensor:
            parts = zip(budget.patterns, score_OC.split(list(budget.num_rows)), strict=True)
            return torch.cat([_choose_in_matrix(pattern, score_rC) for pattern, score_rC in parts])

        step = budget.group_size or self.block_columns
        swept_OI, _ = sweep(weight_OI.masked_fill(dead_I, 0), upper_II, choose, step)
        # a weight of a dead column is 0 even where it was not chosen
        return Pruned(swept_OI, swept_OI != 0, damping)


class OfficialALPS(ALPS):
    """ALPS with a dead column as any other: in the mean of the damping, only that on its diagonal, not going first."""

    def prune(self, weight_OI: Tensor, inputs: Gram, budget: Budget) -> Pruned:
        # a diagonal too small to count in any sum is not dead
        sum_II = inputs.sum_II.clone()
        sum_II.diagonal().clamp_min_(torch.finfo(torch.float32).tiny)
        return super().prune(weight_OI, Gram(inputs.num_tokens, inputs.sum_I, sum_II), budget)


def _choose_in_matrix(pattern: Unstructured | NofM, score_rC: Tensor) -> Tensor:
    if isinstance(pattern, NofM):
        return keep_n_of_m(score_rC, pattern.n, pattern.m)
    num_pruned = num_below_threshold(score_rC.numel(), pattern)
    return keep_highest(score_rC.reshape(1, -1), num_pruned).view_as(score_rC)
