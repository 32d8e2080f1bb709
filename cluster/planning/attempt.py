"""One crew at work by the clock: teams, tasks, their order and what they wait for.

All of it is as in cluster/driver.py, crew.py, sweep.py and pipeline/worker.py, with durations in place of calls.
"""

from collections import deque
from collections.abc import Callable
from functools import partial

from cluster.plan import NUM_AHEAD, plan_shards
from cluster.planning.eventloop import Clock, Process
from cluster.planning.schedule import Layout, Span
from pipeline.segments import Segment, Stretch, Sweep, Work

Task = Callable[[int], Process]


class Attempt:
    """One crew at work, until it is done or lost."""

    def __init__(self, layout: Layout, now: float) -> None:
        self.layout, self.clock = layout, Clock(now)
        self.committed: set[int] = set()
        self.measured: set[int] = set()
        self.entries: set[int] = set()
        self.dense_entries: set[int] = set()
        self._spans: list[Span] = []
        self._newest: dict[int, int] = {}
        self._started: set[int] = set()
        # of each team, the layers that it reads ahead and writes behind, and when they are there
        self._ahead: dict[int, tuple[int, float]] = {}
        self._writing: dict[int, tuple[int, float]] = {}
        self._num_committing = 0
        # of each layer of a wave, when a micro-batch that it gives reaches the next
        self._given: dict[int, dict[int, float]] = {}
        self._running: set[int] = set()

    def spans_until(self, moment: float | None) -> list[Span]:
        """What was done by then; what was under way is cut there."""
        if moment is None:
            return self._spans
        started = [span for span in self._spans if span.start < moment]
        return [Span(s.team, s.kind, s.layer, s.start, min(s.stop, moment)) for s in started]

    def survey(self, first: int) -> Process:
        """What the allocation measures of the layers from `first` on, by one worker; for their inputs from 0 on."""
        layout, num_layers = self.layout, len(self.layout.survey)
        yield from self._hire(0)
        if layout.survey_enter is not None:
            first = 0
            yield from self._busy(0, "entering", 0, layout.survey_enter)
        for layer in range(first, num_layers):
            yield from self._load(0, layer, layer + 1 if layer + 1 < num_layers else None)
            yield from self._busy(0, "measuring", layer, layout.survey[layer])
            self.measured.add(layer)

    def all(self, work: Work) -> Process:
        """The sweep, then the stretches."""
        layout, sweep = self.layout, work.sweep
        if sweep:
            layers = range(sweep.entry_layer, sweep.stop)
            self._given = {layer: {} for layer in layers}
            alone = [lambda team: self._sweep_alone(sweep, team)]
            yield from self._share(alone if layout.num_teams == 1 else [self._passing(sweep, each) for each in layers])
        if layout.is_sequential:
            for stretch in work.stretches:
                yield from self._prune_in_shards(stretch)
        else:
            yield from self._share([self._pruning(stretch) for stretch in work.stretches])

    def _share(self, tasks: list[Task]) -> Process:
        """On as many teams as there may be; the next team that is free takes up the next task."""
        left, unfinished = deque(tasks), len(tasks)

        def serve(team: int) -> Process:
            nonlocal unfinished
            yield from self._hire(team)
            while left:
                yield from left.popleft()(team)
                unfinished -= 1
            yield from self._written(team)

        for team in range(min(self.layout.num_teams, len(tasks))):
            self.clock.start(serve(team))
        yield lambda: unfinished == 0 and self._num_committing == 0

    def _hire(self, team: int) -> Process:
        if team not in self._started:
            self._started.add(team)
            yield from self._busy(team, "starting", -1, self.layout.start)

    def _pruning(self, stretch: Stretch) -> Task:
        """What is left of a segment, by one team."""

        def prune(team: int) -> Process:
            if self.layout.needs_activations:
                yield from self._enter(team, stretch)
            yield from self._prune_layers(team, stretch, stretch.segment)

        return prune

    def _prune_in_shards(self, stretch: Stretch) -> Process:
        """Shard after shard, the hidden states following from team to team."""
        layout = self.layout
        shards = plan_shards(len(layout.layers), layout.num_shards, layout.num_teams)
        previous = None
        for shard in (each for each in shards if each.stop_layer > stretch.next_layer):
            team = shard.worker_index
            yield from self._hire(team)
            if previous is None:
                yield from self._enter(team, stretch)
            elif previous != team:
                moving = layout.layers[shard.first_layer].move * layout.num_micro_batches
                yield from self._busy(team, "moving", shard.first_layer, moving)
            previous = team
            within = Segment(max(shard.first_layer, stretch.next_layer), shard.stop_layer)
            yield from self._prune_layers(team, stretch, within)

    def _enter(self, team: int, stretch: Stretch) -> Process:
        layers = self.layout.layers
        entering = layers[stretch.entry_layer].keep if stretch.entry_layer else self.layout.enter
        yield from self._busy(team, "entering", stretch.entry_layer, entering)
        for layer in range(stretch.entry_layer, stretch.next_layer):
            each = layers[layer]
            yield from self._busy(team, "replaying", layer, each.read + each.load + each.forward)

    def _prune_layers(self, team: int, stretch: Stretch, within: Segment) -> Process:
        for layer in range(max(within.first, stretch.next_layer), within.stop):
            each, is_last = self.layout.layers[layer], layer + 1 == stretch.segment.stop
            following = None if is_last else layer + 1
            yield from self._load(team, layer, following if self.layout.reads_ahead else None)
            yield from self._busy(team, "collecting", layer, each.collect)
            yield from self._busy(team, "observing", layer, each.observe)
            yield from self._busy(team, "exchanging", layer, each.exchange)
            yield from self._busy(team, "solving", layer, each.solve)
            self._write(team, layer)
            if not is_last:
                self._read_ahead(team, following)
                yield from self._busy(team, "propagating", layer, each.propagate)
            yield from self._written(team)
            if self.layout.needs_activations and not is_last and (layer + 1) % self.layout.keep_entry_every == 0:
                yield from self._busy(team, "keeping", layer + 1, each.keep)
                self.entries.add(layer + 1)

    def _passing(self, sweep: Sweep, layer: int) -> Task:
        """A layer of the dense model takes up micro-batches while the one before still gives them."""
        is_first, is_last = layer == sweep.entry_layer, layer + 1 == sweep.stop

        def is_next(index: int) -> bool:
            num_given = len(self._given[layer]) * self.layout.team_size
            is_far = layer + 1 in self._running and num_given >= NUM_AHEAD
            return (is_first or index in self._given[layer - 1]) and not is_far

        def take(team: int) -> Process:
            self._running.add(layer)
            if is_first:
                yield from self._busy(team, "entering", layer, self.layout.enter)
            probable = layer + self.layout.num_teams
            yield from self._load(team, layer, probable if probable < sweep.stop else None)
            for index in range(self.layout.num_micro_batches):
                if not is_next(index):
                    yield partial(is_next, index)
                if not is_first:
                    yield max(0.0, self._given[layer - 1].pop(index) - self.clock.now)
                yield from self._pass_on(team, sweep, layer)
                if not is_last:
                    self._given[layer][index] = self.clock.now + self.layout.layers[layer].move
            self._running.discard(layer)
            yield from self._close(team, sweep, layer)

        return take

    def _sweep_alone(self, sweep: Sweep, team: int) -> Process:
        yield from self._busy(team, "entering", sweep.entry_layer, self.layout.enter)
        for layer in range(sweep.entry_layer, sweep.stop):
            yield from self._load(team, layer, layer + 1 if layer + 1 < sweep.stop else None)
            for _ in range(self.layout.num_micro_batches):
                yield from self._pass_on(team, sweep, layer)
            yield from self._close(team, sweep, layer)

    def _pass_on(self, team: int, sweep: Sweep, layer: int) -> Process:
        each = self.layout.layers[layer]
        seconds = each.forward + each.observe * (layer in sweep.pruned)
        yield from self._busy(team, "passing on", layer, seconds / self.layout.num_micro_batches)

    def _close(self, team: int, sweep: Sweep, layer: int) -> Process:
        each = self.layout.layers[layer]
        if layer + 1 in sweep.kept:
            yield from self._busy(team, "keeping", layer + 1, each.keep)
            self.dense_entries.add(layer + 1)
        if layer in sweep.pruned:
            yield from self._busy(team, "exchanging", layer, each.exchange)
            yield from self._busy(team, "solving", layer, each.solve)
            yield from self._written(team)
            self._write(team, layer)

    def _write(self, team: int, layer: int) -> None:
        """Begin to commit a layer, beside what its team goes on with."""

        def commit() -> Process:
            self._num_committing += 1
            yield self.layout.layers[layer].write
            self.committed.add(layer)
            self._num_committing -= 1

        self._writing[team] = layer, self.clock.now + self.layout.layers[layer].write
        self.clock.start(commit())

    def _written(self, team: int) -> Process:
        """Wait for the layer that is being written: a team writes one at a time."""
        layer, there_at = self._writing.pop(team, (-1, 0.0))
        yield from self._busy(team, "writing", layer, there_at - self.clock.now)

    def _load(self, team: int, layer: int, following: int | None) -> Process:
        """The weights of a layer, which may have been read ahead; then the next are."""
        each = self.layout.layers[layer]
        ahead, there_at = self._ahead.pop(team, (None, 0.0))
        reading = there_at - self.clock.now if ahead == layer else each.read
        yield from self._busy(team, "reading", layer, reading)
        yield from self._busy(team, "loading", layer, each.load)
        self._read_ahead(team, following)

    def _read_ahead(self, team: int, layer: int | None) -> None:
        """Begin to read a layer, unless one is being read or there is none."""
        if team not in self._ahead and layer is not None:
            self._ahead[team] = layer, self.clock.now + self.layout.layers[layer].read

    def _busy(self, team: int, kind: str, layer: int, seconds: float) -> Process:
        if seconds <= 0:
            return
        start, stop = self.clock.now, self.clock.now + seconds
        place = self._newest.get(team)
        last = None if place is None else self._spans[place]
        if place is not None and last and (last.kind, last.layer, last.stop) == (kind, layer, start):
            self._spans[place] = Span(team, kind, layer, last.start, stop)
        else:
            self._newest[team] = len(self._spans)
            self._spans.append(Span(team, kind, layer, start, stop))
        yield seconds
