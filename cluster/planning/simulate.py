"""A run on a cluster by the clock: what the driver does with its plan values, attempt after attempt."""

import random

from cluster.planning.attempt import Attempt
from cluster.planning.schedule import Layout, Schedule
from cluster.recovery import Loss, decide
from pipeline.errors import Refusal
from pipeline.segments import Progress, Stretch, Work, work_left


def simulate(layout: Layout, failures_per_hour: float = 0.0, seed: int = 0) -> Schedule:
    """The whole run; each of its workers fails so many times an hour, and the crew is then replaced as a whole.

    Raises Refusal where the driver would stop.
    """
    draws, schedule, progress = random.Random(seed), Schedule(layout.num_teams), Progress()
    num_in_a_row, num_committed = 0, -1
    schedule.add(0, "preparing", layout.before)
    per_second = failures_per_hour * layout.num_teams * layout.team_size / 3600
    while True:
        work = work_of(layout, progress)
        fails_at = schedule.seconds + draws.expovariate(per_second) if per_second else None
        attempt = Attempt(layout, schedule.seconds)
        attempt.clock.start(attempt.all(work))
        attempt.clock.run(fails_at)
        schedule.spans += attempt.spans_until(fails_at)
        if fails_at is None or attempt.clock.now < fails_at:
            schedule.seconds = attempt.clock.now
            schedule.add(0, "finishing", layout.finish)
            return schedule
        schedule.seconds, schedule.num_failures = fails_at, schedule.num_failures + 1
        progress = Progress(
            {*progress.committed, *attempt.committed},
            {*progress.entries, *attempt.entries},
            {*progress.dense_entries, *attempt.dense_entries},
        )
        num_in_a_row = num_in_a_row + 1 if len(progress.committed) == num_committed else 1
        num_committed = len(progress.committed)
        if not decide(Loss.WORKER, num_in_a_row).goes_on:
            raise Refusal(
                f"--failures-per-hour {failures_per_hour:g}: of {layout.num_teams * layout.team_size} workers some "
                f"fail {num_in_a_row} times in a row before a layer is committed, and the run stops; give a lower rate "
                "or fewer workers"
            )


def work_of(layout: Layout, progress: Progress) -> Work:
    """What is left of a run, as `Job.work_left` has it."""
    if layout.needs_activations:
        return work_left(list(layout.segments), progress, layout.keep_entry_every, layout.is_dense)
    missing = [segment for segment in layout.segments if segment.first not in progress.committed]
    return Work(None, tuple(Stretch(segment, segment.first, segment.first) for segment in missing))
