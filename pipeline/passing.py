"""A layer of the dense model that micro-batches pass through one by one, observed meanwhile if it is to be pruned."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from torch import Tensor

from pipeline.activations import Activations
from pipeline.hidden import Hidden
from pipeline.models.feedforward import FeedForward, find_feed_forward
from pipeline.models.outside import Call
from pipeline.models.skeleton import LoadedLayer
from pipeline.observe import Observer
from pipeline.recording import recorded
from pipeline.runtime import keeping_freed_memory

# What a layer itself reads, once more: a micro-batch by its number.
Again = Callable[[int], tuple[Tensor, Call]]


@dataclass
class Block:
    """A feed-forward block that is pruned as one, and what it has read."""

    feed_forward: FeedForward
    read: Activations


@contextmanager
def recorded_block(layer: LoadedLayer, beside: Activations) -> Iterator[Block]:
    """The feed-forward block of a layer; what it reads within the context is kept beside what the layer reads."""
    feed_forward = find_feed_forward(layer.index, layer.module, layer.linears)
    with recorded(layer, feed_forward, beside) as read:
        yield Block(feed_forward, read)


class Passing:
    """`observer`: what observes the layer, if it is to be pruned. `keeps`: what it gives is kept in `hidden`.

    `records`: what the layer and its feed-forward block read is kept too.
    """

    def __init__(
        self, hidden: Hidden, layer: LoadedLayer, keeps: bool, observer: Observer | None, records: bool
    ) -> None:
        self.layer, self.observer, self.started = layer, observer, time.perf_counter()
        self._hidden, self._keeps = hidden, keeps
        self._within = ExitStack()
        self._kept = self._within.enter_context(keeping_freed_memory())
        self._inputs = hidden.others() if records else None
        self.block: Block | None = None
        if self._inputs is not None:
            self.block = self._within.enter_context(recorded_block(layer, self._inputs))

    def step(self, index: int, hidden_BLH: Tensor | None) -> Tensor:
        """The output for a micro-batch, one of those kept in `hidden` unless it is given."""
        if hidden_BLH is None:
            hidden_BLH = self._hidden.states.read(index)
        if self._inputs is not None:
            self._inputs.write(index, hidden_BLH)
        hidden_BLH, call = self._hidden.on_device(self.layer.index, hidden_BLH)
        if self.observer is None:
            output_BLH = self.layer.run(hidden_BLH, call)
        else:
            output_BLH = self.observer.see(index, hidden_BLH, call)
        if self._keeps:
            self._hidden.states.write(index, output_BLH)
        self._kept.limit()
        return output_BLH

    def end(self) -> None:
        """No micro-batch follows."""
        self._within.close()

    def again(self, index: int) -> tuple[Tensor, Call]:
        """What the layer has read, where that was kept."""
        assert self._inputs is not None
        return self._hidden.on_device(self.layer.index, self._inputs.read(index))
