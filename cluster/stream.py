"""Hidden states from worker to worker: object references only, a few micro-batches in flight."""

from typing import Any

from cluster.session import Waiter

_NUM_IN_FLIGHT = 4


def hand_over(source: Any, target: Any, num_micro_batches: int, waiter: Waiter, what: str) -> None:
    """Move the hidden states that `source` holds to `target`; they pass through the object store, not the driver."""
    waiter.result(target.open_entry.remote(), what)
    moving: list[Any] = []
    for index in range(num_micro_batches):
        if len(moving) == _NUM_IN_FLIGHT:
            waiter.result(moving.pop(0), what)
        moving.append(target.accept.remote(index, source.export.remote(index)))
    for reference in moving:
        waiter.result(reference, what)
    waiter.result(source.leave.remote(), what)
