"""Hidden states from team to team: object references only, a few micro-batches in flight."""

from collections import deque
from typing import Any

from cluster.crew import Calls, Plan
from cluster.teams import Team

NUM_IN_FLIGHT = 4


def hand_over(source: Team, target: Team, detail: str) -> Plan:
    """Move the hidden states that `source` holds to `target`; they pass through the object store, not the driver."""
    kind = "moving hidden states"
    yield Calls(target.call("make_room"), kind, detail)
    moving: deque[Any] = deque()
    for rank, num_micro_batches in enumerate(source.num_micro_batches):
        for index in range(num_micro_batches):
            if len(moving) == NUM_IN_FLIGHT:
                yield Calls([moving.popleft()], kind, detail, moves=True)
            moving.append(target.ask(rank, "accept", index, source.ask(rank, "export", index)))
    yield Calls(list(moving), kind, detail, moves=True)
    yield Calls(source.call("leave"), kind, detail)
