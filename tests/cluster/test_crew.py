"""What a driver waits for is given up only where others of its kind were fast and nobody gets on meanwhile."""

from cluster.crew import HIRING, Calls, first_stalled

SLOWEST = {HIRING: 1.0, "pruning": 1.0}


def calls(kind: str, seconds: float) -> Calls:
    """Calls that are waited for since some seconds."""
    waiting = Calls([object()], kind)
    waiting.started -= seconds
    return waiting


def test_work_that_takes_far_longer_than_any_before_is_given_up() -> None:
    quick, slow = calls("pruning", 20), calls("pruning", 40)
    assert first_stalled([quick], SLOWEST, 30) is None
    assert first_stalled([quick, slow], SLOWEST, 30) is slow
    assert first_stalled([calls("measuring", 40)], SLOWEST, 30) is None, "nothing is known of work that is new"


def test_a_team_without_room_is_waited_for_as_long_as_another_works() -> None:
    hired, working = calls(HIRING, 4000), calls("pruning", 20)
    assert first_stalled([hired, working], SLOWEST, 30) is None
    assert first_stalled([hired], SLOWEST, 30) is hired
