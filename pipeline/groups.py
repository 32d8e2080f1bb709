"""Linears of a decoder layer that read the same input: one statistic, one factorisation, one sweep.

O = output rows of a group's linears stacked, I = input columns.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import Refusal
from pipeline.models.skeleton import Linear, LoadedLayer
from pipeline.numerics.statistics import Statistic
from pipeline.replicas import Replicas
from pipeline.sparsity import Budget, Pattern


@dataclass
class Group:
    """Linears that read the same input, and the statistic of that input, which is whole once it has settled.

    `owner` is the replica that the statistic matters to and that prunes the group, None = every one that has it.
    """

    linears: list[Linear]
    statistic: Statistic
    owner: int | None = None
    num_tokens: int = 0
    merging: "Future[Any] | None" = None
    input: Tensor | None = None
    input_version: int = 0

    @property
    def cost(self) -> float:
        """Of solving it, relative to others: factorisations, and a sweep over all rows."""
        num_inputs = self.linears[0].num_inputs
        return float(num_inputs) ** 2 * (num_inputs + sum(linear.num_outputs for linear in self.linears))

    def end_part(self, replicas: Replicas) -> None:
        """Begin to add what was seen of a part of the micro-batches to what was seen of those before it."""
        earlier = self.merging.result() if self.merging else None
        self.merging = replicas.merge(earlier, self.statistic, self.owner)

    def settle(self, layer: LoadedLayer) -> None:
        """Wait for the sums. Raises Refusal where they have not seen each token once, or saw NaN or Inf."""
        if self.merging is None:
            return
        self.statistic, self.merging = self.merging.result(), None
        key = self.linears[0].key
        if self.statistic.num_tokens != self.num_tokens:
            raise Refusal(
                f"tensor {key}: its linear saw {self.statistic.num_tokens} tokens instead of {self.num_tokens}; "
                "a layer that uses a linear more or less than once is not supported"
            )
        if not self.statistic.is_finite():
            raise Refusal(
                f"tensor {key}: the inputs of its linear in layer {layer.index} hold NaN or Inf; "
                "compute in a wider dtype with model.dtype=float32"
            )

    def weight_OI(self, layer: LoadedLayer) -> Tensor:
        """The weights of the linears in float32, stacked by rows, in memory of their own."""
        num_rows = [linear.num_outputs for linear in self.linears]
        stacked_OI = torch.empty(sum(num_rows), self.linears[0].num_inputs, device=layer.device)
        for linear, part_OI in zip(self.linears, torch.split(stacked_OI, num_rows), strict=True):
            part_OI.copy_(layer.as_stored(linear))
        return stacked_OI

    def budget(self, patterns: dict[str, Pattern]) -> Budget:
        return Budget(
            tuple(patterns[linear.key] for linear in self.linears),
            tuple(linear.num_outputs for linear in self.linears),
            tuple(linear.name for linear in self.linears),
        )


class Weights(Sequence[tuple[Tensor, Statistic]]):
    """The weight of each linear of a layer and the statistic of its input, one at a time in float32."""

    def __init__(self, layer: LoadedLayer, groups: list[Group]) -> None:
        self._layer = layer
        self._linears = [(linear, group.statistic) for group in groups for linear in group.linears]

    def __len__(self) -> int:
        return len(self._linears)

    def __getitem__(self, index: Any) -> Any:
        linear, statistic = self._linears[index]
        return self._layer.weight_OI(linear), statistic


def check_used_once(linears: Sequence[Linear], used: Sequence[str], layer_index: int) -> None:
    """`used` has the name of a linear for every time that it was called. Raises Refusal unless each was once."""
    for linear in linears:
        if used.count(linear.name) != 1:
            raise Refusal(
                f"tensor {linear.key}: its linear is used {used.count(linear.name)} times in layer {layer_index}; "
                "only layers that use each linear once are supported"
            )
