"""Markdown of contests: a line for each subject, medians of its rounds, lowest and highest beside them."""

import statistics
from collections.abc import Iterable, Sequence

from benchmarking.conditions import LLM_COMPRESSOR
from benchmarking.contest import Contest

_COLUMNS = (
    *("model", "method", "subject", "pruning s", "s: disk to disk, process", "CPU s: pruning, process", "peak MB"),
    *("of the rate", "pruning s / floor", "pruning s / llm-compressor", "disk to disk / llm-compressor"),
    *("peak / llm-compressor", "equal masks: first group, all"),
)


def tabulate(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def compare(contests: list[Contest]) -> str:
    """The one table of the benchmark."""
    return tabulate(_COLUMNS, [_row(contest, subject) for contest in contests for subject in contest.subjects])


def spread(values: Sequence[float], form: str) -> str:
    """median (lowest - highest)"""
    return f"{statistics.median(values):{form}} ({min(values):{form}} - {max(values):{form}})"


def median_of(runs: Sequence[object], what: str) -> float:
    return float(statistics.median(getattr(run, what) for run in runs))


def _row(contest: Contest, subject: str) -> list[str]:
    runs, same = contest.of(subject), contest.agreement[subject]
    return [
        str(contest.shape),
        contest.method,
        subject,
        spread([run.seconds for run in runs], ".2f"),
        f"{median_of(runs, 'disk_to_disk_seconds'):.2f}, {median_of(runs, 'process_seconds'):.2f}",
        f"{median_of(runs, 'cpu_seconds'):.1f}, {median_of(runs, 'process_cpu_seconds'):.1f}",
        spread([run.peak_bytes / 1e6 for run in runs], ".0f"),
        f"{median_of(runs, 'share_of_rate'):.0%}",
        spread([run.over_floor for run in runs], ".2f"),
        *(_beside_the_peer(contest, subject, what) for what in ("seconds", "disk_to_disk_seconds", "peak_bytes")),
        f"{same['first']:.3%}, {same['all']:.3%}",
    ]


def _beside_the_peer(contest: Contest, subject: str, what: str) -> str:
    """Round by round, against llm-compressor in the same round."""
    if not contest.of(LLM_COMPRESSOR.name):
        return ""
    return spread(contest.ratios(subject, LLM_COMPRESSOR.name, what), ".2f")
