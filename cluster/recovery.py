"""What to do when something is lost, as pure functions."""

from dataclasses import dataclass
from enum import Enum

_MAX_IN_A_ROW = {"worker": 3, "stalled": 3, "memory": 3, "storage": 6}
_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 2.0, 60.0
_TIMES_SLOWER = 10


class Loss(Enum):
    """What was lost: a worker or its node, one that does not answer, room in the object store, storage for a while; or
    a node that has given notice, which takes nothing with it."""

    WORKER = "worker"
    STALLED = "stalled"
    MEMORY = "memory"
    STORAGE = "storage"
    NOTICE = "notice"


@dataclass(frozen=True)
class Decision:
    """Go on from what is committed with new workers after some seconds, or stop so that the run can go on later."""

    goes_on: bool
    wait_seconds: float = 0.0


def decide(loss: Loss, num_in_a_row: int) -> Decision:
    """`num_in_a_row`: losses, this one included, since a layer was last done.

    Work that is lost again and again is not going to be done by one more try at once. A storage or an object store that
    refuses is given time; a worker is replaced at once.
    """
    if loss is Loss.NOTICE:
        return Decision(True)
    if num_in_a_row >= _MAX_IN_A_ROW[loss.value]:
        return Decision(False)
    waits = loss in (Loss.STORAGE, Loss.MEMORY)
    return Decision(True, min(_FIRST_WAIT_SECONDS * 2**num_in_a_row, _LONGEST_WAIT_SECONDS) if waits else 0.0)


def is_stalled(seconds: float, slowest: float | None, stall_seconds: float) -> bool:
    """Whether work that has taken so long is to be given to another worker.

    `slowest` is how long the same kind of work has taken so far at most. Work that is new is given ten times as long.
    """
    return seconds > (_TIMES_SLOWER * stall_seconds if slowest is None else max(stall_seconds, _TIMES_SLOWER * slowest))
