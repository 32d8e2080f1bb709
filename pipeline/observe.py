"""Observe the inputs of a decoder layer's linears. Those that read the same input form a group: one statistic.

T = tokens, O = output rows of a group's linears stacked, I = input columns.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import Refusal
from pipeline.models.outside import Call
from pipeline.models.skeleton import Linear, LoadedLayer
from pipeline.numerics.statistics import Statistic
from pipeline.sparsity import Budget, Pattern


@dataclass
class Group:
    """Linears that read the same input, and the statistic of that input."""

    linears: list[Linear]
    statistic: Statistic
    input: Tensor | None = None
    input_version: int = 0

    def weight_OI(self, layer: LoadedLayer) -> Tensor:
        """The weights of the linears, stacked by rows."""
        return torch.cat([layer.weight_OI(linear) for linear in self.linears])

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


class _AllObserved(Exception):
    """Ends a layer's forward once its last group has been observed."""


def observe(
    layer: LoadedLayer, inputs: Iterable[tuple[Tensor, Call]], statistic: type[Statistic], num_tokens: int
) -> list[Group]:
    """The groups of a layer, with their statistics over all micro-batches of hidden states.

    Raises Refusal where a linear is never used, has not seen each of the `num_tokens` tokens once, or saw NaN or Inf.
    """
    groups: list[Group] = []
    for hidden, call in inputs:
        if not groups:
            groups = _observe_first(layer, hidden, call, statistic)
        else:
            _observe_next(layer, hidden, call, groups)
    _check_observed(layer, groups, num_tokens)
    return groups


def input_of(layer: LoadedLayer, linear: Linear, hidden: Tensor, call: Call) -> Tensor:
    """What a linear reads in a forward of the layer as it is now, which ends there."""
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])
        raise _AllObserved

    _run_hooked(layer, hidden, call, {linear.name: hook})
    return seen[0]


def without_inputs(layer: LoadedLayer, statistic: type[Statistic]) -> list[Group]:
    """The groups for a method that looks at weights alone: each linear by itself."""
    return [Group([linear], statistic.zeros(linear.num_inputs, layer.device)) for linear in layer.linears]


def _observe_first(layer: LoadedLayer, hidden: Tensor, call: Call, statistic: type[Statistic]) -> list[Group]:
    """One whole forward that finds out which linears read the same tensor, in the order of their first use."""
    groups: list[Group] = []

    def hook(linear: Linear) -> Any:
        def on_call(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            group = next((group for group in groups if _reads(group, args[0])), None)
            if group is None:
                group = Group([], statistic.zeros(linear.num_inputs, layer.device), args[0], args[0]._version)
                group.statistic.observe(args[0].reshape(-1, linear.num_inputs))
                groups.append(group)
            group.linears.append(linear)

        return on_call

    _run_hooked(layer, hidden, call, {linear.name: hook(linear) for linear in layer.linears})
    for group in groups:
        group.input = None
    return groups


def _observe_next(layer: LoadedLayer, hidden: Tensor, call: Call, groups: list[Group]) -> None:
    """A forward that ends at the input of the last group."""

    def hook(group: Group) -> Any:
        def on_call(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            group.statistic.observe(args[0].reshape(-1, group.linears[0].num_inputs))
            if group is groups[-1]:
                raise _AllObserved

        return on_call

    _run_hooked(layer, hidden, call, {group.linears[0].name: hook(group) for group in groups})


def _run_hooked(layer: LoadedLayer, hidden: Tensor, call: Call, hooks: dict[str, Any]) -> None:
    handles = [layer.module.get_submodule(name).register_forward_pre_hook(hook) for name, hook in hooks.items()]
    try:
        layer.run(hidden, call)
    except _AllObserved:
        pass
    finally:
        for handle in handles:
            handle.remove()


def _check_observed(layer: LoadedLayer, groups: list[Group], num_tokens: int) -> None:
    seen = [linear.name for group in groups for linear in group.linears]
    for linear in layer.linears:
        if seen.count(linear.name) != 1:
            raise Refusal(
                f"tensor {linear.key}: its linear is used {seen.count(linear.name)} times in layer {layer.index}; "
                "only layers that use each linear once are supported"
            )
    for group in groups:
        key = group.linears[0].key
        if group.statistic.num_tokens != num_tokens:
            raise Refusal(
                f"tensor {key}: its linear saw {group.statistic.num_tokens} tokens instead of {num_tokens}; "
                "a layer that uses a linear more or less than once is not supported"
            )
        if not group.statistic.is_finite():
            raise Refusal(
                f"tensor {key}: the inputs of its linear in layer {layer.index} hold NaN or Inf; "
                "compute in a wider dtype with model.dtype=float32"
            )


def _reads(group: Group, tensor: Tensor) -> bool:
    """Whether a tensor is the group's input: the same memory, with nothing written to it in between."""
    first = group.input
    return (
        first is not None
        and first.data_ptr() == tensor.data_ptr()
        and (first.shape, first.stride(), first.dtype) == (tensor.shape, tensor.stride(), tensor.dtype)
        and group.input_version == tensor._version
    )
