"""A run on a cluster by the clock: what the driver does with its plan values, attempt after attempt."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from cluster.planning.attempt import Attempt
from cluster.planning.eventloop import Process
from cluster.planning.schedule import Layout, Schedule
from cluster.recovery import Loss, decide
from pipeline.errors import Refusal
from pipeline.segments import Progress, Stretch, Work, work_left


def simulate(layout: Layout, failures_per_hour: float = 0.0, seed: int = 0) -> Schedule:
    """The whole run; each of its workers fails so many times an hour, and the crew is then replaced as a whole.

    Raises Refusal where the driver would stop.
    """
    run = _Run(layout, failures_per_hour, random.Random(seed), Schedule(layout.num_teams))
    run.schedule.add(0, "preparing", layout.before)
    if layout.survey:
        measured: set[int] = set()

        def survey(attempt: Attempt) -> Process:
            attempt.measured = measured
            return attempt.survey(len(measured))

        run.until_done(1, survey, lambda attempt: len(measured), "measured")
    progress = Progress()

    def keep(attempt: Attempt) -> int:
        nonlocal progress
        progress = Progress(
            {*progress.committed, *attempt.committed},
            {*progress.entries, *attempt.entries},
            {*progress.dense_entries, *attempt.dense_entries},
        )
        return len(progress.committed)

    num_workers = layout.num_teams * layout.team_size
    run.until_done(num_workers, lambda attempt: attempt.all(work_of(layout, progress)), keep, "committed")
    run.schedule.add(0, "finishing", layout.finish)
    return run.schedule


@dataclass
class _Run:
    """Attempts at one piece of work after the other, each by a crew of its own."""

    layout: Layout
    failures_per_hour: float
    draws: random.Random
    schedule: Schedule

    def until_done(
        self, num_workers: int, work: Callable[[Attempt], Process], keep: Callable[[Attempt], int], done: str
    ) -> None:
        """`keep` takes over what an attempt leaves that has failed, and says how many layers are done by now."""
        schedule, per_second = self.schedule, self.failures_per_hour * num_workers / 3600
        num_in_a_row, num_done = 0, -1
        while True:
            fails_at = schedule.seconds + self.draws.expovariate(per_second) if per_second else None
            attempt = Attempt(self.layout, schedule.seconds)
            attempt.clock.start(work(attempt))
            attempt.clock.run(fails_at)
            schedule.spans += attempt.spans_until(fails_at)
            if fails_at is None or attempt.clock.now < fails_at:
                schedule.seconds = attempt.clock.now
                return
            schedule.seconds, schedule.num_failures = fails_at, schedule.num_failures + 1
            progress = keep(attempt)
            num_in_a_row, num_done = num_in_a_row + 1 if progress == num_done else 1, progress
            if not decide(Loss.WORKER, num_in_a_row).goes_on:
                raise Refusal(
                    f"--failures-per-hour {self.failures_per_hour:g}: of {num_workers} workers some fail "
                    f"{num_in_a_row} times in a row before a layer is {done}, and the run stops; give a lower rate or "
                    "fewer workers"
                )


def work_of(layout: Layout, progress: Progress) -> Work:
    """What is left of a run, as `Job.work_left` has it."""
    if layout.needs_activations:
        return work_left(list(layout.segments), progress, layout.keep_entry_every, layout.is_dense)
    missing = [segment for segment in layout.segments if segment.first not in progress.committed]
    return Work(None, tuple(Stretch(segment, segment.first, segment.first) for segment in missing))
