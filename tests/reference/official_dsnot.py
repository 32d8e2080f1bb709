"""The habits of the official DSnoT that ours does not share. I = input columns, r = rows of one matrix, T = tokens."""

from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.methods.dsnot import DSnoT
from pipeline.numerics.statistics import Columns, ColumnSums, Statistic
from pipeline.sparsity import NofM, Pattern


@dataclass
class OfficialColumns(ColumnSums):
    """Column sums of windows given one by one, with the variances within them and a Hessian of harmonic weights."""

    num_windows: int = 0
    sum_variances_I: Tensor = field(default_factory=lambda: torch.zeros(()))
    harmonic_II: Tensor = field(default_factory=lambda: torch.zeros(()))

    def observe(self, x_TI: Tensor) -> None:
        super().observe(x_TI)
        self.num_windows += 1
        self.sum_variances_I = self.sum_variances_I + x_TI.var(dim=0, correction=0)
        self.harmonic_II = self.harmonic_II + x_TI.T @ x_TI * (2 / self.num_windows)

    @property
    def sum_II(self) -> Tensor:
        """The Hessian of the initial scores; a dead column has 1 on its diagonal."""
        return self.harmonic_II + torch.diag((self.harmonic_II.diagonal() == 0).float())


class DSnoTOfOfficialColumns(DSnoT):
    """Our DSnoT of the official statistics."""

    @property
    def statistic(self) -> type[Statistic]:
        return OfficialColumns

    def variance(self, inputs: Columns) -> Tensor:
        assert isinstance(inputs, OfficialColumns)
        return inputs.sum_variances_I / inputs.num_windows


class OfficialDSnoT(DSnoTOfOfficialColumns):
    """DSnoT with the official swaps, row by row.

    Queues are whole rows: beyond what can be swapped with profit they go on with what cannot. A dead column is 0 / 0,
    and sorted as the best of all to grow. A row that has stopped goes on through its queues until all have stopped,
    and writes its old state again, so that it drops weights it kept. In N:M weights of any sign go.
    """

    def _refined(self, weight_rI: Tensor, keep_rI: Tensor, inputs: Columns, pattern: Pattern) -> Tensor:
        d_rI = weight_rI * (inputs.sum_I * (2048 / inputs.num_tokens))
        queue_rI = torch.argsort(d_rI.masked_fill(keep_rI, 0) / self.variance(inputs), dim=1, stable=True)
        score_rI = weight_rI.abs() * inputs.sum_squares_I.sqrt()
        rows = [
            _OfficialRow(self, pattern, *parts) for parts in zip(d_rI, score_rI, keep_rI.clone(), queue_rI, strict=True)
        ]
        for _ in range(self.max_cycles):
            if any(row.is_open for row in rows):
                for row in rows:
                    row.swap()
        return torch.stack([row.keep_I for row in rows])


class _OfficialRow:
    def __init__(
        self, method: DSnoT, pattern: Pattern, d_I: Tensor, score_I: Tensor, keep_I: Tensor, queue_I: Tensor
    ) -> None:
        self.d, self.keep_I, self.is_open, self.threshold = d_I.tolist(), keep_I, True, method.update_threshold
        self.error = float(d_I[~keep_I].sum())
        self.score, self.group_size = score_I.masked_fill(~keep_I, torch.inf), None
        self.keep_sign, self.is_positive = method.keep_sign is True, self.error > 0
        self.grow, self.go = deque(queue_I.tolist()), deque[int]()
        if isinstance(pattern, NofM):
            self.keep_sign, self.group_size = True, pattern.m
        else:
            kept = [column for column in self.score.argsort(stable=True).tolist() if keep_I[column]]
            plus = [column for column in kept if self.d[column] > 0]
            minus = [column for column in kept if self.d[column] < 0]
            # columns that are neither leave a gap, which is filled with the lowest score
            gap = kept[:1] * (len(kept) - len(plus) - len(minus))
            self.go = deque([*minus, *gap, *plus[::-1]])

    def swap(self) -> None:
        grown = self.grow.pop() if self.error > 0 else self.grow.popleft()
        gone = self._gone(grown)
        after = self.error + self.d[gone] - self.d[grown]
        self.is_open &= abs(self.error) > self.threshold
        if self.keep_sign:
            self.is_open &= after != 0 and (after > 0) == self.is_positive
        self.keep_I[gone] = not self.is_open
        self.keep_I[grown] = self.is_open
        self.error = after if self.is_open else self.error

    def _gone(self, grown: int) -> int:
        if self.group_size is None:
            return self.go.pop() if self.error < 0 else self.go.popleft()
        first = grown - grown % self.group_size
        gone = first + int(self.score[first : first + self.group_size].argmin())
        self.score[gone] = torch.inf
        return gone
