"""The command: parse, load, call one function, print one result.

Exit code 0: the model is complete. 2: running again cannot help. 75: incomplete, run again and it resumes.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.progress import drop_stdout
from pipeline.errors import Incomplete, Refusal

if TYPE_CHECKING:
    from cluster.progress import RunProgress
    from pipeline.config import RunConfig
    from pipeline.evaluate import Perplexity
    from pipeline.job import Job
    from pipeline.preparation import Prepared

_REFUSED, _INCOMPLETE = 2, 75

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY.SUB=VALUE ...", help="override settings")]


@app.callback()
def shardprune() -> None:
    """Prune language models that do not fit on one machine."""


@app.command()
def run(config: Annotated[Path, typer.Argument(metavar="CONFIG")], overrides: Overrides = None) -> None:
    """Prune a model as a YAML config says. Running the same command again resumes."""
    with _interruptible():
        from pipeline.config_file import load_config

        _print(_run(load_config(config, overrides or [])))


@app.command()
def evaluate(model: Annotated[str, typer.Argument(metavar="MODEL")], overrides: Overrides = None) -> None:
    """Perplexity of a checkpoint: evaluation.text=PATH evaluation.window_length=NUMBER."""
    with _interruptible():
        from pipeline.config import EvaluateConfig
        from pipeline.config_file import validate
        from pipeline.evaluate import evaluate_checkpoint

        config = validate(EvaluateConfig, {"model": {"path": model}, "evaluation": {}}, overrides or [])
        measured = evaluate_checkpoint(config)
    _print(
        f"perplexity {measured.perplexity:.4f} on {config.evaluation.text} "
        f"({measured.num_windows} windows of {measured.window_length} tokens)"
    )


def main() -> None:
    """The entry point: what goes wrong becomes one sentence and an exit code."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _interrupt)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app()
    except (Refusal, Incomplete) as error:
        print(f"shardprune: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(_REFUSED if isinstance(error, Refusal) else _INCOMPLETE)


def _run(config: "RunConfig") -> str:
    """Prune, finish and measure, as far as that has not been done; returns the report."""
    from cluster import session
    from cluster.progress import RunProgress
    from pipeline.preparation import opened, prepare
    from pipeline.report import read_evaluation, write_report
    from pipeline.runtime import Machine

    joins_cluster = config.cluster.address not in ("none", "local")
    with session.connected(config.cluster) if joins_cluster else nullcontext():
        machine = session.machine(config.cluster.worker) if joins_cluster else Machine.here()
        prepared = prepare(config, machine, _print)
        with opened(prepared) as (job, taken_over):
            measured = read_evaluation(job, prepared)
            if measured is None:
                with RunProgress(job.num_layers, job.directory.receipts()) as progress:
                    if taken_over:
                        progress.tell(taken_over)
                    measured = _prune(job, prepared, progress)
            job.directory.drop_activations()
            return write_report(job, measured)


def _prune(job: "Job", prepared: "Prepared", progress: "RunProgress") -> "dict[str, Perplexity]":
    """Everything up to the evaluation, in this process or on Ray."""
    from cluster import session
    from cluster.driver import run_on_cluster
    from pipeline.local import run_locally

    cluster = job.config.cluster
    if cluster.address == "none":
        return run_locally(job, prepared, progress.on_layer)
    with session.connected(cluster) if cluster.address == "local" else nullcontext():
        return run_on_cluster(job, prepared, progress.on_layer, progress.tell)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Once: what follows is clean-up. KeyboardInterrupt is the one exception that every library lets through."""
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


@contextmanager
def _interruptible() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise Incomplete("stopped by a signal; run again, a run resumes at its last committed layer") from None


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except OSError:
        drop_stdout()
