"""What is left of a run is decided by values: whatever is there, the rest gets done, and little of it twice."""

from hypothesis import given
from hypothesis import strategies as st

from pipeline.segments import Progress, Segment, cut, needed_dense, newest, obsolete, work_left


class Run:
    """What a run would leave behind, without any arithmetic. It dies when its strength is spent."""

    def __init__(self, num_layers: int, segments: list[Segment], keep_every: int, is_dense: bool) -> None:
        self.num_layers, self.segments, self.keep_every, self.is_dense = num_layers, segments, keep_every, is_dense
        self.committed: set[int] = set()
        self.entries: set[int] = set()
        self.dense: set[int] = set()
        self.num_run_again: list[int] = []

    @property
    def progress(self) -> Progress:
        return Progress(set(self.committed), set(self.entries), set(self.dense))

    def attempt(self, strength: int) -> None:
        work, self.strength = work_left(self.segments, self.progress, self.keep_every, self.is_dense), strength
        if work.sweep:
            entry = work.sweep.entry_layer
            assert entry == 0 or entry in self.dense
            for layer in range(entry, work.sweep.stop):
                if not self._lives():
                    return
                if layer + 1 in work.sweep.kept:
                    self.dense.add(layer + 1)
                    self._forget()
                if layer in work.sweep.pruned:
                    assert layer not in self.committed, "a committed layer is never committed again"
                    self.num_run_again.append(work.sweep.num_layers_replayed(layer))
                    self.committed.add(layer)
                    self._forget()
        for stretch in work.stretches:
            known = self.dense if stretch.enters_dense else self.entries
            assert stretch.entry_layer == 0 or stretch.entry_layer in known
            self.num_run_again.append(stretch.num_layers_replayed)
            for layer in range(stretch.entry_layer, stretch.segment.stop):
                if not self._lives():
                    return
                if layer >= stretch.next_layer:
                    assert layer not in self.committed
                    self.committed.add(layer)
                # it may die between the two: the layer is committed, what it gives is not kept
                if layer + 1 < stretch.segment.stop and (layer + 1) % self.keep_every == 0 and self._lives():
                    self.entries.add(layer + 1)
                    self.entries -= set(range(stretch.segment.first + 1, layer + 1))
                    self._forget()

    def _lives(self) -> bool:
        self.strength -= 1
        return self.strength >= 0

    def _forget(self) -> None:
        self.dense -= obsolete(self.dense, needed_dense(self.segments, self.progress))


@given(
    num_layers=st.integers(1, 24),
    keep_every=st.integers(1, 6),
    kind=st.sampled_from(["pruned", "shard", "dense"]),
    num_shards=st.integers(1, 6),
    strengths=st.lists(st.integers(0, 20), max_size=8),
)
def test_however_often_it_dies_every_layer_is_pruned_once_and_few_are_run_again(
    num_layers: int, keep_every: int, kind: str, num_shards: int, strengths: list[int]
) -> None:
    num_segments = {"pruned": 1, "shard": min(num_shards, num_layers), "dense": num_layers}[kind]
    run = Run(num_layers, cut(num_layers, num_segments), keep_every, kind == "dense")
    for strength in [*strengths, 10**6]:
        run.attempt(strength)
    assert run.committed == set(range(num_layers))
    assert max(run.num_run_again) <= keep_every, run.num_run_again
    assert work_left(run.segments, run.progress, keep_every, run.is_dense).stretches == ()


@given(st.sets(st.integers(1, 30)), st.sets(st.integers(0, 30)))
def test_nothing_that_is_needed_is_obsolete(kept: set[int], needed: set[int]) -> None:
    left = kept - obsolete(kept, needed)
    assert all(newest(left, layer) == newest(kept, layer) for layer in needed)
    assert len(left) <= len(needed)


@given(st.integers(1, 200), st.data())
def test_parts_cover_all_layers_and_are_of_nearly_one_size(num_layers: int, data: st.DataObject) -> None:
    parts = cut(num_layers, data.draw(st.integers(1, num_layers)))
    assert [layer for part in parts for layer in range(part.first, part.stop)] == list(range(num_layers))
    sizes = {part.stop - part.first for part in parts}
    assert max(sizes) - min(sizes) <= 1
