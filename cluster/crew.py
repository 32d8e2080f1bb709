"""The teams of a run and their plans, side by side: each plan asks its team, waits, and goes on with the answers.

A plan is a generator. It yields the calls that it waits for and is sent what they gave, or yields None where it can
only go on when another plan has.
"""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from typing import Any

from cluster.recovery import Loss, is_stalled
from cluster.session import Waiter, WorkerLost, count_workers, draining_nodes, gpus_of_worker
from cluster.teams import Team
from pipeline.job import Job


class Calls:
    """Calls that a plan waits for: what kind of work they do, and for what exactly.

    `moves`: their answers are the bytes that they have moved from worker to worker. `is_work`: unlike waiting for room
    or for a download, they take about as long each time.
    """

    def __init__(
        self, references: list[Any], kind: str, detail: str = "", moves: bool = False, is_work: bool = True
    ) -> None:
        self.moves, self.is_work = moves, is_work
        self.kind, self.what = kind, f"{kind} {detail}".strip()
        self.started = time.monotonic()
        self.left = {reference: index for index, reference in enumerate(references)}
        self.answers: list[Any] = [None] * len(references)


Plan = Generator[Calls | None, list[Any], None]
Task = Callable[[Team], Plan]


class Crew:
    """Teams are hired when a plan first needs them. `num_teams` is how many there may be at a time.

    `slowest`: how long each kind of work has taken at most, which the next crew knows too.
    """

    def __init__(
        self, job: Job, team_size: int, waiter: Waiter, on_moved: Callable[[int], None], slowest: dict[str, float]
    ) -> None:
        cluster = job.config.cluster
        self.job, self.team_size, self.waiter, self._on_moved = job, team_size, waiter, on_moved
        self._num_gpus = gpus_of_worker(cluster.worker, job.resolved.device)
        self.num_fitting = max(1, count_workers(cluster, self._num_gpus, team_size) // team_size)
        self.num_teams = self.num_fitting
        if cluster.num_shards != "auto":
            # more may be asked for than there is room now: it comes with the autoscaler
            grows = cluster.address != "local"
            self.num_teams = cluster.num_shards if grows else min(cluster.num_shards, self.num_fitting)
        self._teams: dict[int, Team] = {}
        self._active: dict[Plan, Calls | None] = {}
        self._num_beside = 0
        self._slowest = slowest

    def hire(self, index: int) -> Generator[Calls | None, list[Any], Team]:
        """A started team, for a plan to `yield from`."""
        if index not in self._teams:
            team = self._teams[index] = Team(self.job, index, self.team_size, self._num_gpus)
            asked = f"{self.job.config.cluster.worker.num_cpus:g} CPU, {self._num_gpus:g} GPU"
            try:
                workers = f"for team {index} ({team.size} x {asked})"
                yield Calls(team.room(), "waiting for room", workers, is_work=False)
                if self.job.is_from_hub:
                    # apart, since it takes as long as it takes
                    yield Calls(team.call("fetch", self.job), "fetching the model", f"for team {index}", is_work=False)
                team.node_ids = yield Calls(team.start(), "starting workers", f"of team {index}")
            except GeneratorExit:
                # nobody waits for it any more
                self.dismiss(index)
                raise
        return self._teams[index]

    def dismiss(self, index: int) -> None:
        """End the workers of a team, if it is there."""
        team = self._teams.pop(index, None)
        if team is not None:
            team.dismiss()

    def close(self) -> None:
        """End all workers."""
        for index in list(self._teams):
            self.dismiss(index)

    def is_leaving(self, team: Team) -> bool:
        """Whether a node of a team is about to be taken away."""
        return bool(draining_nodes().intersection(team.node_ids))

    def share(self, tasks: list[Task]) -> None:
        """Carry out tasks on as many teams as there may be; the next team that is free takes up the next task."""
        left, num_unfinished = deque(tasks), len(tasks)

        def serve(index: int) -> Plan:
            nonlocal num_unfinished
            team = yield from self.hire(index)
            while left:
                yield from left.popleft()(team)
                num_unfinished -= 1

        self.run([serve(index) for index in range(min(self.num_teams, len(tasks)))], lambda: num_unfinished == 0)

    def run(self, plans: Iterable[Plan], is_done: Callable[[], bool] = lambda: False) -> None:
        """Carry out plans side by side until all are at their end, or nothing is left to do."""
        for plan in plans:
            self._advance(plan, None)
        try:
            while self._active and not (is_done() and self._num_beside == 0):
                self._collect([calls for calls in self._active.values() if calls])
                self._go_on()
        finally:
            for plan in self._active:
                plan.close()
            self._active, self._num_beside = {}, 0

    def begin(self, plan: Plan) -> None:
        """Carry out another plan beside those that run; nothing is done before it is."""

        def counted() -> Plan:
            self._num_beside += 1
            yield from plan
            self._num_beside -= 1

        self._advance(counted(), None)

    def _go_on(self) -> None:
        """With the plans that have their answers, and then with those that waited for other plans."""
        for plan, calls in list(self._active.items()):
            if calls is not None and not calls.left:
                taken = time.monotonic() - calls.started
                self._slowest[calls.kind] = max(taken, self._slowest.get(calls.kind, 0.0))
                if calls.moves:
                    self._on_moved(sum(calls.answers))
                self._advance(plan, calls.answers)
        for plan, calls in list(self._active.items()):
            if calls is None:
                self._advance(plan, [])

    def _advance(self, plan: Plan, answers: list[Any] | None) -> None:
        try:
            self._active[plan] = next(plan) if answers is None else plan.send(answers)
        except StopIteration:
            self._active.pop(plan, None)

    def _collect(self, awaited: list[Calls]) -> None:
        """Wait for at least one answer. Raises what a call raised, or WorkerLost."""
        assert awaited, "plans wait for each other"
        calls_of = {reference: calls for calls in awaited for reference in calls.left}

        what_of = {reference: calls.what for reference, calls in calls_of.items()}
        for reference in self.waiter.ready(what_of, lambda: self._watch(awaited)):
            calls = calls_of[reference]
            calls.answers[calls.left.pop(reference)] = self.waiter.take(reference, calls.what)
        # also while others answer
        self._watch([calls for calls in awaited if calls.left])

    def _watch(self, awaited: list[Calls]) -> None:
        """Raises WorkerLost where a call is not answered any more."""
        for calls in awaited:
            taken, slowest = time.monotonic() - calls.started, self._slowest.get(calls.kind)
            if calls.is_work and is_stalled(taken, slowest, self.job.config.cluster.stall_seconds):
                others = "" if slowest is None else f", though others took {slowest:.1f} s"
                told = f"{calls.what}: no answer for {taken:.0f} s{others} (cluster.stall_seconds)"
                raise WorkerLost(told, Loss.STALLED)
