"""What to do when a worker is lost, as a pure function."""

from enum import Enum

_MAX_LOSSES_WITHOUT_PROGRESS = 3


class Decision(Enum):
    """Go on from what is committed with new workers, or stop so that the run can be started again later."""

    GO_ON = "go on"
    STOP = "stop"


def decide(num_losses_without_progress: int) -> Decision:
    """Work that loses its worker again and again is not going to be done by one more try at once."""
    return Decision.STOP if num_losses_without_progress >= _MAX_LOSSES_WITHOUT_PROGRESS else Decision.GO_ON
