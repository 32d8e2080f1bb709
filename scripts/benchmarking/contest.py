"""Rounds in which every subject prunes the same model on the same windows, one after another, and what they took."""

import json
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path

from benchmarking.conditions import LLM_COMPRESSOR, Conditions, Shape, Subject, make_model
from benchmarking.measurement import Measured


@dataclass(frozen=True)
class Run:
    """One subject in one round. `rate` is that of the machine in the round, `flops` what was necessary.

    `seconds` are those of pruning alone, `disk_to_disk_seconds` those from the model there to the pruned one.
    """

    subject: str
    round_index: int
    seconds: float
    disk_to_disk_seconds: float
    process_seconds: float
    cpu_seconds: float
    process_cpu_seconds: float
    peak_bytes: int
    rate: float
    flops: float
    two_pass_flops: float

    @property
    def share_of_rate(self) -> float:
        return self.flops / self.seconds / self.rate

    @property
    def over_floor(self) -> float:
        """Times what two passes would take at the rate of the machine."""
        return self.seconds * self.rate / self.two_pass_flops


@dataclass(frozen=True)
class Contest:
    """All runs of a method on a model; `agreement`: the masks of each subject beside those of one of them."""

    shape: Shape
    method: str
    runs: list[Run]
    agreement: dict[str, dict[str, float]]

    def of(self, subject: str) -> list[Run]:
        return [run for run in self.runs if run.subject == subject]

    @property
    def subjects(self) -> list[str]:
        return list(dict.fromkeys(run.subject for run in self.runs))

    def ratios(self, subject: str, of: str, what: str) -> list[float]:
        """Round by round."""
        others = {run.round_index: run for run in self.of(of)}
        return [getattr(run, what) / getattr(others[run.round_index], what) for run in self.of(subject)]


def hold(
    shape: Shape, method: str, subjects: list[Subject], num_rounds: int, conditions: Conditions, folder: Path
) -> Contest:
    """The subjects in turn, round after round, with the machine's rate before and after each round."""
    place = make_model(shape, folder)
    told = conditions.ask("benchmarking.floor", place / "model", method, shape.num_windows, shape.window_length)
    flops = {granularity: stages["necessary"] for granularity, stages in json.loads(told).items()}
    runs, agreement, before = [], {}, conditions.rate()
    for round_index in range(num_rounds):
        taken = {}
        for subject in subjects:
            taken[subject] = conditions.run(subject, conditions.task(place, _out(place, subject), method))
            print(f"{shape}; {method}; {subject.name}: {taken[subject].seconds_of('prune'):.1f} s", flush=True)
        after = conditions.rate()
        rate, before = statistics.mean([before, after]), after
        runs += [_run(subject, round_index, measured, rate, flops) for subject, measured in taken.items()]
        if round_index == 0:
            agreement = _compare(subjects, place, conditions)
        shutil.rmtree(place / "out")
    return Contest(shape, method, runs, agreement)


def _out(place: Path, subject: Subject) -> Path:
    return place / "out" / subject.name.replace(" ", "-").replace(",", "")


def _run(subject: Subject, round_index: int, measured: Measured, rate: float, flops: dict[str, float]) -> Run:
    return Run(
        subject=subject.name,
        round_index=round_index,
        seconds=measured.seconds_of("prune"),
        disk_to_disk_seconds=measured.seconds_of_phases,
        process_seconds=measured.seconds,
        cpu_seconds=measured.cpu_seconds_of("prune"),
        process_cpu_seconds=measured.cpu_seconds,
        peak_bytes=measured.peak_bytes_until("prune"),
        rate=rate,
        flops=flops[subject.granularity],
        two_pass_flops=flops["layer"],
    )


def _compare(subjects: list[Subject], place: Path, conditions: Conditions) -> dict[str, dict[str, float]]:
    """The masks of all subjects with those of llm-compressor, or of the first where it does not take part."""
    reference = LLM_COMPRESSOR if LLM_COMPRESSOR in subjects else subjects[0]
    outs = {subject: _out(place, subject) for subject in subjects}
    models = {subject: out / "model" if (out / "model").is_dir() else out for subject, out in outs.items()}
    return {
        subject.name: json.loads(conditions.ask("benchmarking.agreement", models[reference], models[subject]))
        for subject in subjects
    }
