"""A schedule to look at: who was busy with what when, as lines of letters and as a picture."""

from collections import Counter
from pathlib import Path

from cluster.planning.schedule import Schedule
from pipeline.clock import clock
from pipeline.errors import Refusal

_COLUMNS, _MOST_ROWS = 72, 12
# The letter and the colour of each kind of work.
KINDS = {
    "preparing": ("p", "#9e9e9e"),
    "starting": ("s", "#bdbdbd"),
    "entering": ("e", "#8c6d31"),
    "reading": ("r", "#e7ba52"),
    "loading": ("l", "#bd9e39"),
    "measuring": ("M", "#637939"),
    "replaying": ("R", "#ad494a"),
    "collecting": ("C", "#3182bd"),
    "observing": ("G", "#08519c"),
    "exchanging": ("x", "#de9ed6"),
    "passing on": ("P", "#6baed6"),
    "solving": ("S", "#e6550d"),
    "propagating": ("F", "#31a354"),
    "writing": ("w", "#756bb1"),
    "keeping": ("k", "#9e9ac8"),
    "moving": ("m", "#d6616b"),
    "finishing": ("f", "#636363"),
}


def timeline(schedule: Schedule) -> str:
    """A line for each of the first teams: at every moment what most of it was spent with, a dot for waiting."""
    width = schedule.seconds / _COLUMNS or 1.0
    rows: list[list[Counter[str]]] = [[Counter() for _ in range(_COLUMNS)] for _ in range(schedule.num_teams)]
    for span in schedule.spans:
        for column in range(int(span.start / width), min(_COLUMNS - 1, int(span.stop / width)) + 1):
            part = min(span.stop, (column + 1) * width) - max(span.start, column * width)
            rows[span.team][column][span.kind] += part  # type: ignore[assignment]
    used = {span.kind for span in schedule.spans}
    legend = ", ".join(f"{letter} {kind}" for kind, (letter, _) in KINDS.items() if kind in used)
    lines = [f"team {team:<4} {''.join(_letter(cell, width) for cell in row)}" for team, row in enumerate(rows)]
    hidden = f"\n... and {len(lines) - _MOST_ROWS} more teams" * (len(lines) > _MOST_ROWS)
    scale = f"{'0:00':<{_COLUMNS - 8}}{clock(schedule.seconds):>8}"
    return "\n".join([*lines[:_MOST_ROWS]]) + f"{hidden}\n{'':<9} {scale}\n{legend}"


def check_picture(path: Path) -> None:
    """Raises Refusal where `draw` could not write it."""
    if path.suffix.lower() not in (".svg", ".png"):
        raise Refusal(f"--draw {path}: must end in .svg or .png; give it another name")
    if path.is_dir() or not path.parent.is_dir():
        raise Refusal(
            f"--draw {path}: {'is a folder' if path.is_dir() else 'is in no folder that is there'}; make one "
            "or give another path"
        )


def draw(schedule: Schedule, path: Path) -> None:
    """The same as a picture, by the ending of its name. Raises Refusal."""
    # matplotlib takes a second to import, and only pictures need it
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(12, max(2.0, min(24.0, 1 + 0.25 * schedule.num_teams))), layout="constrained")
    axes = figure.subplots()
    for kind, (_, colour) in KINDS.items():
        for team in range(schedule.num_teams):
            bars = [(s.start, s.stop - s.start) for s in schedule.spans if s.kind == kind and s.team == team]
            axes.broken_barh(bars, (team - 0.4, 0.8), facecolors=colour)
    used = {span.kind for span in schedule.spans}
    patches = [Patch(color=colour, label=kind) for kind, (_, colour) in KINDS.items() if kind in used]
    axes.set(xlabel="seconds", ylabel="team", xlim=(0, schedule.seconds), ylim=(schedule.num_teams - 0.5, -0.5))
    axes.legend(handles=patches, ncols=7, loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
    try:
        figure.savefig(path)
    except OSError as error:
        raise Refusal(f"--draw {path}: cannot be written ({error.strerror}); give another path") from None


def _letter(cell: "Counter[str]", width: float) -> str:
    if sum(cell.values()) < width / 2:
        return "."
    return KINDS[cell.most_common(1)[0][0]][0]
