"""`shardprune plan`: what a run will take, with the workers there are or the best use of them, as text."""

import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cluster.planning.draw import check_picture, draw, timeline
from cluster.planning.forecast import Forecast, forecast
from cluster.planning.layouts import choices, recommend, size
from cluster.planning.portion import Choice
from cluster.session import machine
from pipeline.clock import clock
from pipeline.config import RunConfig
from pipeline.errors import Refusal
from pipeline.planning.cost import is_counted
from pipeline.planning.gauge import measure
from pipeline.planning.rates import Rates, assumed_of_cpu, assumed_of_gpu
from pipeline.planning.scope import Scope, examine, necessary
from pipeline.runtime import Machine, slow_products
from pipeline.storage import ObjectPath


@dataclass(frozen=True)
class PlanOptions:
    """What the command is asked beside the config."""

    workers: int | None = None
    gpu: str | None = None
    rates: Path | None = None
    calibrate: bool = False
    price_per_hour: float | None = None
    failures_per_hour: float = 0.0
    draw: Path | None = None

    @property
    def measured(self) -> Path:
        """Where rates go that are measured."""
        return self.rates or Path("rates.yaml")


def plan(config: RunConfig, options: PlanOptions) -> str:
    """The plan of a run; nothing of it is begun. Raises Refusal."""
    _check(config, options)
    if options.gpu is not None:
        config = config.model_copy(update={"runtime": config.runtime.model_copy(update={"device": "cuda"})})
    scope, skeleton = examine(config, _machine(config, options))
    if options.calibrate:
        if scope.resolved.device == "cuda" and not Machine.here().has_cuda:
            raise Refusal("--calibrate-plan: this machine has no CUDA device, and workers compute on one; give --gpu")
        rates = measure(scope, skeleton, _nearest_folder(config))
        rates.write_to(options.measured)
    else:
        rates = _rates(scope, options)
    if rates.method not in (None, config.pruning.method.name):
        raise Refusal(
            f"--rates {options.rates}: were measured with {rates.method}, pruning.method is "
            f"{config.pruning.method.name}; measure them with --calibrate-plan"
        )
    num_workers = options.workers or _workers_of(config)
    asked = forecast(scope, rates, Choice.of(config, num_workers), options.failures_per_hour)
    parts = [describe(scope, rates, asked, options.price_per_hour)]
    if options.workers is not None:
        found = []
        for choice in choices(scope, options.workers):
            # a layout whose workers fail too often to finish is none
            with suppress(Refusal):
                found.append(forecast(scope, rates, choice, options.failures_per_hour))
        parts.append(recommend(found, rates.gpu_bytes, options.price_per_hour))
    if told := _slow_here(scope):
        parts.append(told)
    if options.draw is not None:
        draw(asked.schedule, options.draw)
    return "\n\n".join(parts)


def describe(scope: Scope, rates: Rates, asked: Forecast, price_per_hour: float | None) -> str:
    """Everything about one layout."""
    return "\n\n".join(
        [
            _heading(scope, rates, asked, price_per_hour),
            _stages(scope, asked),
            _memory(scope, asked, rates),
            _bytes(scope, asked),
            timeline(asked.schedule),
            _left_out(scope, rates),
        ]
    )


def _heading(scope: Scope, rates: Rates, asked: Forecast, price_per_hour: float | None) -> str:
    config, choice, of_layers = scope.config, asked.choice, necessary(scope)
    weights = "" if scope.has_weights else ", from config.json alone"
    lines = {
        "model": f"{scope.model_type}, {scope.num_layers} layers, {scope.num_parameters / 1e9:.3g} B parameters in "
        f"{scope.stored_dtype}{weights}",
        "pruning": f"{config.pruning.method.name}, {config.pruning.target}, {config.calibration.num_windows} windows "
        f"of {config.calibration.window_length} tokens, {scope.resolved.windows_per_micro_batch} in a micro-batch",
        "layout": f"propagation {choice.propagation}, {choice.num_shards or 'auto'} shards x {choice.num_replicas} "
        f"replicas, on {asked.num_workers} of {choice.num_workers} workers",
        "rates": rates.source,
        "FLOPs": f"{of_layers.necessary:.3g} necessary, {of_layers.attention:.2g} for attention, "
        f"{of_layers.errors:.2g} for errors; at {rates.product / 1e12:.3g} TFLOP/s of products the first take "
        f"{clock(of_layers.necessary / rates.product)}",
        "time": f"{clock(asked.seconds)}, workers busy {asked.schedule.busy_share:.0%} of it"
        + f", {asked.schedule.num_failures} failures" * (asked.schedule.num_failures > 0),
    }
    if price_per_hour is not None:
        lines["cost"] = f"{asked.cost(price_per_hour):.2f} at {price_per_hour:g} an hour and worker"
    return "\n".join(f"{name:<9} {text}" for name, text in lines.items())


def _stages(scope: Scope, asked: Forecast) -> str:
    lines = ["| stage | seconds, all teams | per layer |", "|---|---|---|"]
    for kind, seconds in asked.stages.items():
        lines.append(f"| {kind} | {seconds:,.1f} | {seconds / scope.num_layers:.2f} |")
    return "\n".join(lines)


def _memory(scope: Scope, asked: Forecast, rates: Rates) -> str:
    method = scope.config.pruning.method
    bound = f"beside what {method.name} needs to fit a block," if method.prunes_blocks else "at most"
    lines = [f"RAM of a worker, {bound} {size(asked.host.host_bytes)}, {_listed(asked.host.name, asked.host.host)}"]
    if rates.gpu_bytes is not None:
        used, there = asked.gpu.gpu_bytes, rates.gpu_bytes
        told = f"GPU of a worker, {bound} {size(used)} of {size(there)}, {_listed(asked.gpu.name, asked.gpu.gpu)}"
        lines.append(told + "; IT DOES NOT FIT" * (used > there))
    is_taken = scope.config.runtime.ram_bytes == "auto" and asked.host.host.get("hidden states")
    if is_taken and not scope.config.cluster.is_here:
        lines.append("RAM of workers elsewhere is taken to be enough; runtime.ram_bytes can say how much there is")
    if asked.spilled_bytes:
        lines.append(f"disk of a worker, {size(asked.spilled_bytes)} of hidden states beyond runtime.ram_bytes")
    return "\n".join(lines)


def _listed(moment: str, parts: dict[str, int]) -> str:
    return f"while {moment}: " + ", ".join(f"{name} {size(num)}" for name, num in parts.items() if num)


def _bytes(scope: Scope, asked: Forecast) -> str:
    return "\n".join(
        [
            f"storage: the finished model has {scope.model_bytes:,} bytes in {len(scope.file_bytes)} files; "
            f"{size(asked.read_bytes)} are read and {size(asked.written_bytes)} written",
            f"network: {size(asked.network_bytes)} from worker to worker",
        ]
    )


def _left_out(scope: Scope, rates: Rates) -> str:
    """What the figures do not hold."""
    method, told = scope.config.pruning.method, ["reading and generating calibration text"]
    if scope.config.evaluation.text is not None:
        told.append("the evaluation")
    if scope.config.pruning.permute:
        told.append("reordering channels")
    if not is_counted(method) and (rates.method is None or method.prunes_blocks):
        told.append(f"solving by {method.name} as far as it iterates")
    if scope.has_survey and not scope.config.pruning.surveys_inputs:
        told.append(f"the singular values of every weight, which {scope.config.pruning.allocation.name} takes first")
    elif scope.has_survey:
        told.append(f"counting outliers among the weights for {scope.config.pruning.allocation.name}")
    if method.prunes_blocks:
        told.append(f"the memory of {method.name} beside that of sparsegpt")
    return f"Not in these figures: {'; '.join(told)}."


def _check(config: RunConfig, options: PlanOptions) -> None:
    for name, value in (("workers", options.workers), ("price-per-hour", options.price_per_hour)):
        if value is not None and not 0 < value < math.inf:
            raise Refusal(f"--{name} {value}: must be a number above 0")
    if not 0 <= options.failures_per_hour < math.inf:
        raise Refusal(f"--failures-per-hour {options.failures_per_hour:g}: must be a number and not below 0")
    if options.calibrate and options.gpu is not None:
        raise Refusal(f"--gpu {options.gpu}: --calibrate-plan measures this machine; give one of them")
    if options.rates is not None and options.gpu is not None:
        raise Refusal(f"--gpu {options.gpu}: --rates {options.rates} says how fast a worker is; give one of them")
    if options.workers is not None and config.cluster.address == "none":
        raise Refusal(f"--workers {options.workers}: cluster.address = none is one process; give another address")
    if options.workers is not None and options.workers < config.cluster.num_replicas:
        raise Refusal(
            f"--workers {options.workers}: cluster.num_replicas = {config.cluster.num_replicas} need as many; give one "
            "of them another number"
        )
    if options.gpu is not None and config.runtime.device == "cpu":
        raise Refusal(f"--gpu {options.gpu}: runtime.device = cpu uses none; leave out one of them")
    # before anything is measured
    if options.calibrate:
        Rates.check_place(options.measured)
    if options.draw is not None:
        check_picture(options.draw)


def _rates(scope: Scope, options: PlanOptions) -> Rates:
    if options.rates is not None:
        rates = Rates.of_file(options.rates)
        if rates.device != scope.resolved.device:
            raise Refusal(
                f"--rates {options.rates}: were measured on a {rates.device}, runtime.device is "
                f"{scope.resolved.device}; measure them with --calibrate-plan"
            )
        return rates
    if options.gpu is not None:
        return assumed_of_gpu(options.gpu, scope.resolved.dtype)
    if scope.resolved.device == "cuda":
        raise Refusal("runtime.device = 'cuda': say which GPU the workers have with --gpu, or give --rates FILE")
    return assumed_of_cpu(scope.resolved.threads, scope.resolved.dtype, is_slow=_slow_here(scope) is not None)


def _slow_here(scope: Scope) -> str | None:
    """What is to be said of the dtype; of workers elsewhere it is not known."""
    return slow_products(scope.resolved.dtype, scope.resolved.device) if scope.config.cluster.is_here else None


def _machine(config: RunConfig, options: PlanOptions) -> Machine:
    """What a worker has, without asking a cluster that need not be there."""
    if not config.cluster.is_here or options.gpu is not None:
        asks_for_gpu = config.runtime.device == "cuda" or config.cluster.worker.num_gpus not in ("auto", 0)
        return Machine(max(1, int(config.cluster.worker.num_cpus)), options.gpu is not None or asks_for_gpu)
    return machine(config)


def _workers_of(config: RunConfig) -> int:
    """One process, what fits this machine, or else what the config itself asks for."""
    cluster = config.cluster
    if cluster.address == "none":
        return 1
    if cluster.address == "local":
        fitting = int(Machine.here().num_cores // cluster.worker.num_cpus)
        if fitting < cluster.num_replicas:
            raise Refusal(
                f"cluster.address = local: this machine has room for {fitting} workers of {cluster.worker.num_cpus:g} "
                f"CPU, cluster.num_replicas = {cluster.num_replicas}; ask for fewer or smaller ones, or give another "
                "address and --workers"
            )
        return fitting
    return cluster.num_replicas * (1 if cluster.num_shards == "auto" else cluster.num_shards)


def _nearest_folder(config: RunConfig) -> Path:
    """Where the run will write, or the first folder above it that is there."""
    output = config.output.folder
    if isinstance(output, ObjectPath):
        return Path()
    return next(path for path in (output, *output.parents) if path.is_dir())
