"""A sweep through the dense model as a wave: layer l + 1 takes up micro-batches while layer l still gives them.

Every layer is one task; teams take layers up in order as they become free, and hold the weights of one at a time. What
a layer gives waits in the object store until the next layer has a team.
"""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from cluster.crew import Calls, Crew, Plan, Task
from cluster.plan import NUM_AHEAD
from cluster.stream import NUM_IN_FLIGHT
from cluster.teams import Team
from pipeline.segments import Sweep
from pipeline.store import Receipt


class Wave:
    """What each layer of a sweep has given so far, of micro-batches by rank and number."""

    def __init__(self, crew: Crew, sweep: Sweep, on_layer: Callable[[Receipt], None]) -> None:
        self._crew, self._sweep, self._on_layer = crew, sweep, on_layer
        self._num_teams = min(crew.num_teams, crew.num_fitting)
        self._given: dict[int, dict[tuple[int, int], Any]] = {}
        self._running: set[int] = set()

    def tasks(self) -> list[Task]:
        """One for each layer, in order."""
        return [self._task(layer_index) for layer_index in range(self._sweep.entry_layer, self._sweep.stop)]

    def _task(self, layer_index: int) -> Task:
        self._given[layer_index] = {}
        return lambda team: self._pass(layer_index, team)

    def _pass(self, layer_index: int, team: Team) -> Plan:
        sweep, what = self._sweep, f"layer {layer_index} of the dense model"
        is_first, is_last = layer_index == sweep.entry_layer, layer_index + 1 == sweep.stop
        is_pruned, keeps = layer_index in sweep.pruned, layer_index + 1 in sweep.kept
        self._running.add(layer_index)
        if is_first:
            yield Calls(team.call("enter", layer_index, True), "entering", what)
        yield Calls(team.call("open", layer_index, self._next_of_team(layer_index), is_pruned, keeps), "opening", what)
        in_flight: deque[Any] = deque()
        for rank, index in _in_turn(team):
            while not (is_first or (rank, index) in self._given[layer_index - 1]) or self._is_far_ahead(layer_index):
                if in_flight:
                    yield Calls([in_flight.popleft()], "running", what, moves=True)
                else:
                    yield None
            taken = None if is_first else self._given[layer_index - 1].pop((rank, index))
            output, done = team.pass_on(rank, index, taken, not is_last)
            if not is_last:
                self._given[layer_index][rank, index] = output
            in_flight.append(done)
            # the object store holds what anybody refers to
            del taken, output
            if len(in_flight) == NUM_IN_FLIGHT * team.size:
                yield Calls([in_flight.popleft()], "running", what, moves=True)
        if in_flight:
            yield Calls(list(in_flight), "running", what, moves=True)
        self._running.discard(layer_index)
        if keeps:
            yield Calls(team.call("keep_dense", layer_index + 1), "keeping", what)
        yield from _close(self._crew, sweep, team, layer_index, self._on_layer)
        yield Calls(team.call("leave"), "leaving", what)

    def _next_of_team(self, layer_index: int) -> int | None:
        """The layer that a team will probably take up next."""
        probable = layer_index + self._num_teams
        return probable if probable < self._sweep.stop else None

    def _is_far_ahead(self, layer_index: int) -> bool:
        return layer_index + 1 in self._running and len(self._given[layer_index]) >= NUM_AHEAD


def sweep_alone(crew: Crew, sweep: Sweep, on_layer: Callable[[Receipt], None]) -> Task:
    """The same by one team, which keeps what each layer gives to itself."""

    def carry_out(team: Team) -> Plan:
        yield Calls(team.call("enter", sweep.entry_layer, True), "entering", f"layer {sweep.entry_layer}")
        for layer_index in range(sweep.entry_layer, sweep.stop):
            what = f"layer {layer_index} of the dense model"
            next_layer = layer_index + 1 if layer_index + 1 < sweep.stop else None
            yield Calls(team.call("open", layer_index, next_layer, layer_index in sweep.pruned, True), "opening", what)
            in_flight: deque[Any] = deque()
            for rank, index in _in_turn(team):
                in_flight.append(team.pass_on(rank, index, None, False)[1])
                if len(in_flight) == NUM_IN_FLIGHT * team.size:
                    yield Calls([in_flight.popleft()], "running", what, moves=True)
            yield Calls(list(in_flight), "running", what, moves=True)
            if layer_index + 1 in sweep.kept:
                yield Calls(team.call("keep_dense", layer_index + 1), "keeping", what)
            yield from _close(crew, sweep, team, layer_index, on_layer)
        yield Calls(team.call("leave"), "leaving", "the dense model")

    return carry_out


def _close(crew: Crew, sweep: Sweep, team: Team, layer_index: int, on_layer: Callable[[Receipt], None]) -> Plan:
    """Prune a layer, if it is one of those; it is committed while the team goes on."""
    is_pruned, what = layer_index in sweep.pruned, f"layer {layer_index} of the dense model"

    def commit() -> Plan:
        receipt, *_ = yield Calls(team.receipt(layer_index), "committing", f"layer {layer_index}")
        on_layer(receipt)

    # layers that are only run again close at once, which says nothing of how long one takes that is pruned
    kind = "pruning" if is_pruned else "closing"
    yield Calls(team.call("close", sweep.num_layers_replayed(layer_index)), kind, what)
    if is_pruned:
        crew.begin(commit())


def _in_turn(team: Team) -> Iterator[tuple[int, int]]:
    """All micro-batches, by turns of one for each rank."""
    for index in range(max(team.num_micro_batches)):
        for rank, num_micro_batches in enumerate(team.num_micro_batches):
            if index < num_micro_batches:
                yield rank, index
