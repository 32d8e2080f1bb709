"""Observe the inputs of a decoder layer's linears. Those that read the same input form a group: one statistic."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from pipeline.groups import Group, check_used_once
from pipeline.models.outside import Call
from pipeline.models.skeleton import Linear, LoadedLayer
from pipeline.numerics.statistics import Statistic
from pipeline.replicas import Alone, Replicas


class _AllObserved(Exception):
    """Ends a layer's forward once its last group has been observed."""


class Observer:
    """Sees what the linears of a layer read, micro-batch by micro-batch, and sums it up in parts.

    `everyone`: all replicas get the sums, not only the one that prunes a group. `whole`: forwards go on to their end
    after the last input, for what the layer gives.
    """

    def __init__(
        self,
        layer: LoadedLayer,
        statistic: type[Statistic],
        num_tokens: int,
        replicas: Replicas,
        everyone: bool = False,
        whole: bool = False,
    ) -> None:
        self._whole = whole
        self._layer, self._statistic, self._num_tokens = layer, statistic, num_tokens
        self._replicas, self._everyone = replicas, everyone
        self._groups: list[Group] = []

    def see(self, index: int, hidden: Tensor, call: Call) -> Tensor:
        """Observe one micro-batch, in the order of their numbers; its output, or nothing of it unless `whole`."""
        part = next(part for part in self._replicas.parts if index in part)
        if not self._groups:
            output = self._see_first(hidden, call)
        else:
            if index == part.start:
                for group in self._groups:
                    group.statistic = self._statistic.zeros(group.linears[0].num_inputs, self._layer.device)
            output = self._see_next(hidden, call)
        if index == part.stop - 1:
            self._end_part()
        return output

    def groups(self) -> list[Group]:
        """All groups, in the order of their first use.

        Raises Refusal where a linear is never used or used twice. What became of the sums is known once they settle.
        """
        seen = [linear.name for group in self._groups for linear in group.linears]
        check_used_once(self._layer.linears, seen, self._layer.index)
        return self._groups

    def _see_first(self, hidden: Tensor, call: Call) -> Tensor:
        """One whole forward that finds out which linears read the same tensor, in the order of their first use."""
        layer, groups = self._layer, self._groups

        def hook(linear: Linear) -> Any:
            def on_call(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                group = next((group for group in groups if _reads(group, args[0])), None)
                if group is None:
                    sums = self._statistic.zeros(linear.num_inputs, layer.device)
                    group = Group([], sums, input=args[0], input_version=args[0]._version)
                    group.statistic.observe(args[0].reshape(-1, linear.num_inputs))
                    groups.append(group)
                group.linears.append(linear)

            return on_call

        output = run_hooked(layer, hidden, call, {linear.name: hook(linear) for linear in layer.linears})
        owners: list[int | None] = [None] * len(groups)
        if not self._everyone:
            owners = self._replicas.deal([group.cost for group in groups])
        for group, owner in zip(groups, owners, strict=True):
            group.input, group.owner, group.num_tokens = None, owner, self._num_tokens
        return output

    def _see_next(self, hidden: Tensor, call: Call) -> Tensor:
        """A forward that ends at the input of the last group, unless it is to be whole."""

        def hook(group: Group) -> Any:
            def on_call(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                group.statistic.observe(args[0].reshape(-1, group.linears[0].num_inputs))
                if group is self._groups[-1] and not self._whole:
                    raise _AllObserved

            return on_call

        hooks = {group.linears[0].name: hook(group) for group in self._groups}
        return run_hooked(self._layer, hidden, call, hooks)

    def _end_part(self) -> None:
        for group in self._groups:
            group.end_part(self._replicas)


def observe(
    layer: LoadedLayer,
    inputs: Iterable[tuple[Tensor, Call]],
    statistic: type[Statistic],
    num_tokens: int,
    replicas: Replicas | None = None,
    everyone: bool = False,
) -> list[Group]:
    """The groups of a layer, with their statistics over all micro-batches of hidden states.

    Raises Refusal where a linear is never used, has not seen each of the `num_tokens` tokens once, or saw NaN or Inf;
    of a group that another replica owns, the other raises it.
    """
    if replicas is None:
        inputs = list(inputs)
        replicas = Alone(len(inputs))
    observer = Observer(layer, statistic, num_tokens, replicas, everyone)
    for index, (hidden, call) in enumerate(inputs):
        observer.see(index, hidden, call)
    groups = observer.groups()
    for group in groups:
        if replicas.does(group.owner):
            group.settle(layer)
    return groups


def input_of(layer: LoadedLayer, linear: Linear, hidden: Tensor, call: Call) -> Tensor:
    """What a linear reads in a forward of the layer as it is now, which ends there."""
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])
        raise _AllObserved

    run_hooked(layer, hidden, call, {linear.name: hook})
    return seen[0]


def without_inputs(layer: LoadedLayer, statistic: type[Statistic], replicas: Replicas | None = None) -> list[Group]:
    """The groups for a method that looks at weights alone: each linear by itself."""
    groups = [Group([linear], statistic.zeros(linear.num_inputs, layer.device)) for linear in layer.linears]
    for group, owner in zip(groups, (replicas or Alone(0)).deal([group.cost for group in groups]), strict=True):
        group.owner = owner
    return groups


def run_hooked(layer: LoadedLayer, hidden: Tensor, call: Call, hooks: dict[str, Any]) -> Tensor:
    """The output of a layer, with a hook called before each of some linears, by their names."""
    handles = [layer.module.get_submodule(name).register_forward_pre_hook(hook) for name, hook in hooks.items()]
    try:
        return layer.run(hidden, call)
    except _AllObserved:
        return hidden[:0]
    finally:
        for handle in handles:
            handle.remove()


def _reads(group: Group, tensor: Tensor) -> bool:
    """Whether a tensor is the group's input: the same memory, with nothing written to it in between."""
    first = group.input
    return (
        first is not None
        and first.data_ptr() == tensor.data_ptr()
        and (first.shape, first.stride(), first.dtype) == (tensor.shape, tensor.stride(), tensor.dtype)
        and group.input_version == tensor._version
    )
