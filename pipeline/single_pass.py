"""Prune a decoder layer in one pass: the forwards of all micro-batches stop before each group of linears until it is
pruned, and then go on. So every linear is pruned on the inputs that it will really get, and nothing is computed twice.

A forward is a greenlet that a hook suspends: the layer's own code does not know of it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from pipeline.errors import Refusal
from pipeline.groups import Group
from pipeline.held import Held
from pipeline.hidden import Hidden
from pipeline.layer import LinearResult, prune_layer
from pipeline.methods import Method
from pipeline.models.outside import Call
from pipeline.models.skeleton import LoadedLayer
from pipeline.numerics.statistics import Statistic, TokenCount
from pipeline.observe import observe
from pipeline.replicas import Replicas
from pipeline.sparsity import Pattern


@contextmanager
def single_pass(layer: LoadedLayer, hidden: Hidden, replicas: Replicas, held: Held) -> Iterator["SinglePass"]:
    """A pass through a layer for all hidden states before it, which stand where there is room beside them.

    Raises Refusal where the layer uses a linear more or less than once.
    """
    assert hidden.states.complete, "a layer is pruned with all windows or not at all"
    beginning = partial(hidden.beginning, layer.index)
    groups = observe(layer, [beginning(2)], TokenCount, 2)
    num_bytes = held.before(layer, groups, *beginning(hidden.window_length))
    may_stand = [(each + hidden.copied_bytes) * hidden.num_windows <= hidden.bytes_beside for each in num_bytes]
    begun = SinglePass(layer, partial(hidden.input, layer.index), groups, may_stand, replicas)
    with begun.hooked():
        yield begun


class SinglePass:
    """The forwards of a layer, one for each micro-batch, on their way from group to group.

    `inputs` gives what the layer reads of a micro-batch by its number, `groups` are those that the layer was found to
    have. `may_stand`: of each group, whether there is memory for all forwards to stand before it at once. Where there
    is not, a forward ends once its input has been seen, and another begins where one is needed again: the same
    operations on the same data, so the bytes do not depend on it.
    """

    def __init__(
        self,
        layer: LoadedLayer,
        inputs: Callable[[int], tuple[Tensor, Call]],
        groups: list[Group],
        may_stand: list[bool],
        replicas: Replicas,
    ) -> None:
        self._layer, self._inputs, self._replicas = layer, inputs, replicas
        self._groups, self._may_stand = groups, may_stand
        self._standing: dict[int, greenlet] = {}
        self._stops_before: Group | None = None

    def prune(self, method: Method, patterns: dict[str, Pattern], num_tokens: int) -> list[LinearResult]:
        """Prune every linear in place, group after group. Where there are replicas, all wait for the owner of a group.

        Raises Refusal where a linear has not seen each of the `num_tokens` tokens once, or saw NaN or Inf.
        """
        results: list[LinearResult] = []
        owners = self._replicas.deal([group.cost for group in self._groups])
        for found, owner, may_stand in zip(self._groups, owners, self._may_stand, strict=True):
            group = replace(found, owner=owner, num_tokens=num_tokens)
            self._observe(group, method.statistic, found, may_stand)
            results += prune_layer(self._layer, [group], method, patterns, self._replicas)
        return results

    def finish(self, index: int) -> Tensor:
        """What the pruned layer gives for a micro-batch."""
        self._stops_before = None
        forward = self._forward(index)
        del self._standing[index]
        output = forward.switch()
        assert isinstance(output, Tensor)
        return output

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Within the context forwards can stop; after it, however it ends, none is left standing."""
        modules = [self._layer.module.get_submodule(group.linears[0].name) for group in self._groups]
        hooks = [self._hook(group) for group in self._groups]
        handles = [module.register_forward_pre_hook(hook) for module, hook in zip(modules, hooks, strict=True)]
        # the grad mode belongs to the thread: one that a forward sets would stay when it is suspended
        with torch.no_grad():
            try:
                yield
            finally:
                while self._standing:
                    self._standing.popitem()[1].throw()
                for handle in handles:
                    handle.remove()

    def _observe(self, group: Group, statistic: type[Statistic], found: Group, may_stand: bool) -> None:
        """Let all micro-batches come to a group and sum up what it reads, in the order of their numbers."""
        num_inputs = group.linears[0].num_inputs
        for part in self._replicas.parts:
            group.statistic = statistic.zeros(num_inputs, self._layer.device)
            for index in part:
                group.statistic.observe(self._reach(index, found).reshape(-1, num_inputs))
                if not may_stand:
                    self._standing.pop(index).throw()
            group.end_part(self._replicas)

    def _reach(self, index: int, group: Group) -> Tensor:
        """The input of a group, before which the forward of a micro-batch stands then."""
        self._stops_before = group
        forward = self._forward(index)
        reached = forward.switch()
        if forward.dead:
            raise Refusal(
                f"tensor {group.linears[0].key}: its linear is used 0 times by micro-batch {index} in layer "
                f"{self._layer.index}, where all are to be used once; use pruning.granularity = layer"
            )
        assert isinstance(reached, Tensor)
        return reached

    def _forward(self, index: int) -> greenlet:
        """The forward of a micro-batch where it stands, or else a new one."""
        if index not in self._standing:
            self._standing[index] = greenlet(partial(self._run, index))
        return self._standing[index]

    def _run(self, index: int) -> Tensor:
        return self._layer.run(*self._inputs(index))

    def _hook(self, group: Group) -> Any:
        def on_call(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if group is self._stops_before:
                getcurrent().parent.switch(args[0])

        return on_call
