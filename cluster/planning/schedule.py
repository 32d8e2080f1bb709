"""A run by the clock, as values: how it is laid out, how long each thing takes, and who was busy with what when."""

from dataclasses import dataclass, field

from pipeline.segments import Segment


@dataclass(frozen=True)
class Durations:
    """Seconds of one layer for one team, which shares its windows and its groups among its replicas.

    `read` and `load` bring its weights, `write` commits it, `keep` keeps its input; `forward` is a whole forward.
    `collect` is what runs until all that its linears read has been seen, `propagate` what runs for the next layer once
    it is pruned: two passes, or one and the rest of it. `observe` is what the former adds up, `exchange` what replicas
    tell each other, `solve` what is between; `move` is one micro-batch on its way to another team.
    """

    read: float = 0.0
    load: float = 0.0
    forward: float = 0.0
    collect: float = 0.0
    observe: float = 0.0
    solve: float = 0.0
    exchange: float = 0.0
    propagate: float = 0.0
    write: float = 0.0
    keep: float = 0.0
    move: float = 0.0


@dataclass(frozen=True)
class Layout:
    """A run as the driver cuts it, and what it takes beside its layers.

    `is_sequential`: its one segment is pruned in shards, team after team. `reads_ahead`: the next layer is read while
    one is pruned, not only while it runs after that. `before` is what the driver takes before it asks for workers,
    `start` a worker until it can be asked, `enter` the windows on their way to the first layer. `survey` is what one
    worker takes for each layer before any is pruned, beside its weights; `survey_enter` are the windows on their way to
    it, None where it looks at weights alone.
    """

    layers: tuple[Durations, ...]
    segments: tuple[Segment, ...]
    num_teams: int
    num_shards: int
    num_micro_batches: int
    team_size: int = 1
    is_dense: bool = False
    is_sequential: bool = False
    reads_ahead: bool = False
    keep_entry_every: int = 4
    needs_activations: bool = True
    before: float = 0.0
    start: float = 0.0
    enter: float = 0.0
    finish: float = 0.0
    survey: tuple[float, ...] = ()
    survey_enter: float | None = None


@dataclass(frozen=True)
class Span:
    """What a team was busy with."""

    team: int
    kind: str
    layer: int
    start: float
    stop: float


@dataclass
class Schedule:
    """Who was busy when, until the end; `num_failures` on the way."""

    num_teams: int
    spans: list[Span] = field(default_factory=list)
    seconds: float = 0.0
    num_failures: int = 0

    def add(self, team: int, kind: str, seconds: float) -> None:
        """What nothing else goes beside."""
        if seconds > 0:
            self.spans.append(Span(team, kind, -1, self.seconds, self.seconds + seconds))
        self.seconds += seconds

    @property
    def busy_share(self) -> float:
        """Of the teams' time."""
        return sum(span.stop - span.start for span in self.spans) / (self.seconds * self.num_teams or 1.0)
