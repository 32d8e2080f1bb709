"""What a run will take with some workers: seconds from counts and rates, by the schedule; memory, bytes and money."""

from dataclasses import dataclass

from cluster.planning.portion import Choice, Portion, memory_of, portion_of, portion_of_survey, suspended
from cluster.planning.schedule import Durations, Layout, Schedule
from cluster.planning.simulate import simulate
from cluster.planning.traffic import exchanged_sums, have_owners, network_bytes, read_bytes, written_bytes
from pipeline.job import segments_of
from pipeline.models.checkpoint import NUM_HASHED_AT_ONCE
from pipeline.models.tracing import LayerTrace
from pipeline.planning.cost import (
    GroupShape,
    Passes,
    of_forwards,
    of_single_pass,
    of_solving,
    of_statistic,
)
from pipeline.planning.memory import Moment
from pipeline.planning.rates import Rates
from pipeline.planning.scope import Scope


@dataclass(frozen=True)
class Forecast:
    """`stages` are the seconds of all teams by kind; bytes are those of all workers together."""

    choice: Choice
    schedule: Schedule
    host: Moment
    gpu: Moment
    spilled_bytes: int
    network_bytes: int
    read_bytes: int
    written_bytes: int

    @property
    def seconds(self) -> float:
        return self.schedule.seconds

    @property
    def stages(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for span in self.schedule.spans:
            found[span.kind] = found.get(span.kind, 0.0) + span.stop - span.start
        return found

    def cost(self, price_per_hour: float) -> float:
        """Of all workers from the first second to the last, at the price of one."""
        return self.seconds / 3600 * price_per_hour * self.num_workers

    @property
    def num_workers(self) -> int:
        return self.schedule.num_teams * self.choice.num_replicas


def forecast(scope: Scope, rates: Rates, choice: Choice, failures_per_hour: float = 0.0) -> Forecast:
    """With a choice in place of what the config says about it."""
    scope = choice.within(scope)
    portion = portion_of(scope, rates, choice)
    layout = _lay_out(scope, rates, choice, portion)
    host, gpu = memory_of(scope, rates, portion)
    traffic = [of(scope, choice, layout) for of in (network_bytes, read_bytes, written_bytes)]
    spilled = max(portion.spilled_bytes, portion_of_survey(scope, rates).spilled_bytes)
    return Forecast(choice, simulate(layout, failures_per_hour), host, gpu, spilled, *traffic)


def _lay_out(scope: Scope, rates: Rates, choice: Choice, portion: Portion) -> Layout:
    """The run as the driver cuts it, with the seconds that everything takes."""
    config = scope.config
    segments, needs_inputs = segments_of(config, scope.num_layers), config.pruning.method.statistic.needs_inputs
    is_dense = needs_inputs and choice.propagation == "dense"
    is_sequential = needs_inputs and len(segments) == 1 and config.cluster.address != "none"
    num_teams = choice.num_fitting if choice.num_shards is None else min(choice.num_shards, choice.num_fitting)
    num_tasks = scope.num_layers if is_dense else len(segments)
    num_shards = choice.num_shards or 1
    is_local = config.cluster.address == "none"
    hashed_at_once = min(scope.resolved.threads, scope.num_source_files, NUM_HASHED_AT_ONCE)
    hashing = scope.model_bytes / rates.hash / hashed_at_once * scope.is_hashed
    return Layout(
        layers=tuple(_durations(scope, rates, portion, trace) for trace in scope.traces),
        segments=tuple(segments),
        num_teams=1 if is_local else min(num_teams, num_shards if is_sequential else num_tasks),
        num_shards=num_shards,
        num_micro_batches=-(-scope.num_micro_batches // choice.num_replicas),
        team_size=choice.num_replicas,
        is_dense=is_dense,
        is_sequential=is_sequential,
        reads_ahead=rates.device == "cuda",
        keep_entry_every=config.output.keep_entry_every,
        needs_activations=needs_inputs,
        before=rates.start_seconds + hashing,
        start=0.0 if is_local else rates.start_seconds,
        enter=(scope.outside.stored_bytes / rates.read + scope.hidden_bytes / rates.load) * needs_inputs,
        finish=scope.outside.stored_bytes * (1 / rates.read + 1 / rates.write),
        survey=_survey(scope, rates) if scope.has_survey else (),
        survey_enter=scope.outside.stored_bytes / rates.read + scope.survey_hidden_bytes / rates.load
        if scope.config.pruning.surveys_inputs
        else None,
    )


def _survey(scope: Scope, rates: Rates) -> tuple[float, ...]:
    """Of every layer of the dense model, for the one worker that measures it with all windows, in two passes."""
    statistic = scope.config.pruning.allocation.statistic
    num_tokens, length = scope.num_tokens, scope.config.calibration.window_length
    if statistic is None or not statistic.needs_inputs:
        return (0.0,) * scope.num_layers
    found = []
    for index, trace in enumerate(scope.traces):
        whole = of_forwards(trace.shape, num_tokens, length, Passes(is_single=True)).total
        cut = of_forwards(trace.shape, num_tokens, length, Passes(goes_on=False)).total
        forwards = cut + (whole - cut) / scope.num_micro_batches + whole * (index + 1 < scope.num_layers)
        # the rate is that of the method's statistic: column sums are few operations beside the forwards
        observing = of_statistic(trace.shape, statistic, num_tokens).total
        found.append(forwards / rates.forward + observing / rates.statistic)
    return tuple(found)


def _durations(scope: Scope, rates: Rates, portion: Portion, trace: LayerTrace) -> Durations:
    """Of a layer for a team of replicas, each of which has a part of the micro-batches and solves some groups."""
    method, length = scope.config.pruning.method, scope.config.calibration.window_length
    replicas, num_micro_batches = scope.resolved.num_replicas, scope.num_micro_batches
    share = -(-num_micro_batches // replicas) / num_micro_batches
    collecting = running = observing = whole = 0.0
    if method.statistic.needs_inputs:
        whole = of_forwards(trace.shape, scope.num_tokens, length, Passes(is_single=True)).total / rates.forward
        cut = of_forwards(trace.shape, scope.num_tokens, length, Passes(goes_on=False)).total / rates.forward
        observing = of_statistic(trace.shape, method.statistic, scope.num_tokens).total / rates.statistic
        if scope.resolved.granularity == "linear":
            stands = [num_bytes > 0 for num_bytes in suspended(scope, trace, portion)]
            parts = of_single_pass(trace.shape, scope.num_tokens, length, stands)
            collecting, running = (part.total / rates.forward for part in parts)
        else:
            # the first micro-batch runs to its end, to find out who reads what
            collecting, running = cut + (whole - cut) / num_micro_batches, whole
    hidden = scope.hidden_bytes / num_micro_batches
    solving, exchanging = _solving(trace, scope, rates, replicas)
    return Durations(
        read=trace.stored_bytes / rates.read,
        load=trace.loaded_bytes / rates.load,
        forward=whole * share,
        collect=collecting * share,
        observe=observing * share,
        solve=solving,
        exchange=exchanging,
        propagate=running * share,
        write=trace.stored_bytes / rates.write,
        keep=scope.hidden_bytes * share / rates.write,
        move=hidden / rates.network,
    )


def _solving(trace: LayerTrace, scope: Scope, rates: Rates, replicas: int) -> tuple[float, float]:
    """Seconds of solving and of exchanging: the replicas share out the groups, and tell each other sums and weights.

    In one pass through a layer all wait for the owner of each group.
    """
    pruning, groups = scope.config.pruning, trace.shape.groups
    seconds = [seconds_of_solving(group, scope, rates) for group in groups]
    if replicas == 1:
        return sum(seconds), 0.0
    sums = (replicas - 1) * exchanged_sums(trace, pruning.method) / rates.network
    if not have_owners(scope):
        return sum(seconds), sums
    weights = trace.stored_bytes / rates.network
    if scope.resolved.granularity == "linear":
        return sum(seconds), sums + weights
    loads = [0.0] * replicas
    for each in sorted(seconds, reverse=True):
        loads[loads.index(min(loads))] += each
    return max(loads), sums + weights


def seconds_of_solving(group: GroupShape, scope: Scope, rates: Rates) -> float:
    flops = of_solving([group], scope.config.pruning.method)
    return (
        flops.factorisation / rates.factorisation
        + flops.sweep / rates.sweep
        + flops.errors / rates.errors
        + group.num_weights / rates.choice
    )
