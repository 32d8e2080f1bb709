"""Which activations each layer is pruned on, and so what is left to do in a run: pure functions.

Pruned propagation begins anew, from dense activations, at the first layer of every segment. One segment, one for each
shard, or one for each layer: the propagations `pruned`, `shard` and `dense`. Where there are more than one, a sweep
through the dense model leaves what they begin with; where each is one layer, the layers are pruned during the sweep.
"""

import itertools
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

Propagation = Literal["pruned", "shard", "dense"]


@dataclass(frozen=True)
class Segment:
    """Layers `first` .. `stop` - 1, of which each sees what those before it in the segment give once pruned."""

    first: int
    stop: int


@dataclass(frozen=True)
class Progress:
    """What is there: committed layers; kept inputs of layers, within their segments and of the dense model."""

    committed: Collection[int] = ()
    entries: Collection[int] = ()
    dense_entries: Collection[int] = ()


@dataclass(frozen=True)
class Sweep:
    """Run layers `entry_layer` .. `stop` - 1 of the dense model, from its kept input or from the windows at 0.

    Layers in `pruned` are pruned on what they read meanwhile; the inputs of `kept` are kept.
    """

    entry_layer: int
    stop: int
    pruned: tuple[int, ...]
    kept: tuple[int, ...]

    def num_layers_replayed(self, layer_index: int) -> int:
        """Layers that were run again just before this one, to get at what it reads."""
        before = [layer for layer in self.pruned if layer < layer_index]
        return layer_index - (before[-1] + 1 if before else self.entry_layer)


@dataclass(frozen=True)
class Stretch:
    """Layers `entry_layer` .. `next_layer` - 1 of a segment are run again as committed, the rest is pruned.

    The input of `entry_layer` is the dense model's where the segment begins with it, else one kept within the segment.
    """

    segment: Segment
    entry_layer: int
    next_layer: int

    @property
    def num_layers_replayed(self) -> int:
        return self.next_layer - self.entry_layer

    @property
    def enters_dense(self) -> bool:
        return self.entry_layer == self.segment.first


@dataclass(frozen=True)
class Work:
    """What is left of a run: a sweep first, if any; then stretches, which do not depend on each other."""

    sweep: Sweep | None
    stretches: tuple[Stretch, ...]


def cut(num_layers: int, num_parts: int) -> list[Segment]:
    """Consecutive layers in parts of nearly equal size."""
    assert 1 <= num_parts <= num_layers
    return [Segment(part.start, part.stop) for part in split(num_layers, num_parts)]


def split(number: int, num_parts: int) -> list[range]:
    """So many things, numbered from 0, in consecutive parts of nearly equal size."""
    bounds = [number * index // num_parts for index in range(num_parts + 1)]
    return [range(first, stop) for first, stop in itertools.pairwise(bounds)]


def work_left(segments: list[Segment], progress: Progress, keep_entry_every: int, is_dense: bool) -> Work:
    """What is left to do. `is_dense`: every layer is a segment, and is pruned in the sweep."""
    stretches = _stretches(segments, progress)
    if is_dense:
        wanted = [stretch.next_layer for stretch in stretches]
        if not wanted:
            return Work(None, ())
        first, stop = newest(progress.dense_entries, wanted[0]), wanted[-1] + 1
        kept = tuple(layer for layer in range(first + 1, stop) if layer % keep_entry_every == 0)
        return Work(Sweep(first, stop, tuple(wanted), kept), ())
    missing = [layer for layer in needed_dense(segments, progress) if layer not in (0, *progress.dense_entries)]
    if not missing:
        return Work(None, stretches)
    first, stop = newest(progress.dense_entries, missing[0]), missing[-1]
    passed = {layer for layer in range(first + 1, stop) if layer % keep_entry_every == 0}
    return Work(Sweep(first, stop, (), tuple(sorted(passed.union(missing)))), stretches)


def needed_dense(segments: list[Segment], progress: Progress) -> list[int]:
    """Layers whose dense input is still needed: those at which an unfinished segment begins, or begins again."""
    left = _stretches(segments, progress)
    return [stretch.entry_layer for stretch in left if stretch.enters_dense]


def obsolete(kept: Collection[int], needed: Collection[int]) -> set[int]:
    """Of the kept inputs of a sweep, those that are the newest before no layer that still needs one."""
    return set(kept) - {newest(kept, layer) for layer in needed}


def newest(kept: Collection[int], layer: int) -> int:
    """The last kept input at or before a layer; that of layer 0 can always be made."""
    return max((entry for entry in kept if entry <= layer), default=0)


def _stretches(segments: list[Segment], progress: Progress) -> tuple[Stretch, ...]:
    """Of all segments that are not finished."""
    done = set(progress.committed)
    return tuple(_stretch(segment, progress) for segment in segments if not set(_layers(segment)) <= done)


def _stretch(segment: Segment, progress: Progress) -> Stretch:
    next_layer = next(layer for layer in _layers(segment) if layer not in progress.committed)
    within = [entry for entry in progress.entries if segment.first < entry <= next_layer]
    return Stretch(segment, max(within, default=segment.first), next_layer)


def _layers(segment: Segment) -> range:
    return range(segment.first, segment.stop)
