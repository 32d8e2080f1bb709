"""The command: parse, load, call one function, print one result.

Exit code 0: the model is complete. 2: running again cannot help. 75: incomplete, run again and it resumes.
"""

import os
import shlex
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.progress import drop_stdout
from pipeline.errors import Incomplete, Refusal

if TYPE_CHECKING:
    from pipeline.config import OutputSettings

_REFUSED, _INCOMPLETE = 2, 75

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


def _address(whose: str) -> Any:
    return typer.Option("--address", metavar="URL", help=f"the dashboard {whose}, http://HOST:8265")


Address = Annotated[str, _address("of the cluster")]
Run = Annotated[str, typer.Argument(metavar="RUN", help="a run directory (output.path), or the CONFIG of a run")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY.SUB=VALUE ...", help="override settings")]


@app.callback()
def shardprune() -> None:
    """Prune language models that do not fit on one machine."""


@app.command()
def run(config: Annotated[Path, typer.Argument(metavar="CONFIG")], overrides: Overrides = None) -> None:
    """Prune a model as a YAML config says. Running the same command again resumes."""
    with _interruptible():
        from cluster.run import run_all
        from pipeline.config_file import load_config

        _print(run_all(load_config(config, overrides or []), _print))


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(metavar="CONFIG")],
    overrides: Overrides = None,
    workers: Annotated[int | None, typer.Option(help="how many there are, to find the best use of them")] = None,
    gpu: Annotated[str | None, typer.Option(help="the kind that workers have: A100, H100 or H200")] = None,
    rates: Annotated[Path | None, typer.Option(help="a file of rates, read, or written by --calibrate-plan")] = None,
    calibrate_plan: Annotated[bool, typer.Option("--calibrate-plan", help="measure this machine first")] = False,
    price_per_hour: Annotated[float | None, typer.Option(help="of a worker")] = None,
    failures_per_hour: Annotated[float, typer.Option(help="of each worker")] = 0.0,
    draw: Annotated[Path | None, typer.Option(help="a picture of who is busy when, .svg or .png")] = None,
) -> None:
    """What a run will take: time, memory, disk, network and money. Nothing of it is begun; no weights are needed."""
    with _interruptible():
        from cluster.planning.command import PlanOptions
        from cluster.planning.command import plan as plan_run
        from pipeline.config_file import load_config

        options = PlanOptions(
            workers=workers,
            gpu=gpu,
            rates=rates,
            calibrate=calibrate_plan,
            price_per_hour=price_per_hour,
            failures_per_hour=failures_per_hour,
            draw=draw,
        )
        _print(plan_run(load_config(config, overrides or []), options))


@app.command()
def calibrate(config: Annotated[Path, typer.Argument(metavar="CONFIG")], overrides: Overrides = None) -> None:
    """Only the calibration stage of a run: its windows, and what there is to know of them. Resumes too."""
    with _interruptible():
        from cluster.run import calibrate_only
        from pipeline.config_file import load_config

        _print(calibrate_only(load_config(config, overrides or []), _print))


@app.command()
def evaluate(model: Annotated[str, typer.Argument(metavar="MODEL")], overrides: Overrides = None) -> None:
    """Perplexity of a checkpoint: evaluation.text=PATH evaluation.window_length=NUMBER."""
    with _interruptible():
        from pipeline.config import EvaluateConfig
        from pipeline.config_file import validate
        from pipeline.evaluate import evaluate_checkpoint

        config = validate(EvaluateConfig, {"model": {"path": model}, "evaluation": {}}, overrides or [])
        measured = evaluate_checkpoint(config, _print)
    _print(
        f"perplexity {measured.perplexity:.4f} on {config.evaluation.text} "
        f"({measured.num_windows} windows of {measured.window_length} tokens)"
    )


@app.command()
def submit(
    config: Annotated[Path, typer.Argument(metavar="CONFIG")],
    address: Address,
    overrides: Overrides = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="follow the log to the end of the run")] = True,
) -> None:
    """The same run as a Ray job. Submitting it again follows the job that is live, or resumes."""
    from cluster import submission
    from cluster import submit as ray_jobs
    from pipeline.config import RunConfig
    from pipeline.config_file import read_values, validate

    with _interruptible():
        values = read_values(config, overrides or [])
        submission.check_paths(values)
        settings = validate(RunConfig, values, [])
        jobs = ray_jobs.Jobs(address)
        submission_id = ray_jobs.submit(settings, jobs, _print)
    place = f"{shlex.quote(settings.output.path)} --address {address}"
    commands = f"`shardprune status {place}`, `shardprune stop {place}`"
    if not wait:
        _print(f"it runs without this command: {commands}")
        return
    try:
        ray_jobs.wait(submission_id, jobs, _write)
    except KeyboardInterrupt:
        raise Incomplete(f"job {submission_id} goes on without this command: {commands}") from None


@app.command()
def status(
    run: Run, overrides: Overrides = None, address: Annotated[str | None, _address("of the cluster it runs on")] = None
) -> None:
    """How a run is doing, from its directory; with --address also what its Ray job does."""
    from pipeline.status import describe, look

    settings = _output_of(run, overrides or [])
    output, folder = settings.path, settings.folder
    if address is not None:
        from cluster.submission import run_id
        from cluster.submit import Jobs, describe_job

        _print(describe_job(output, Jobs(address).attempts(run_id(output))))
        if not folder.exists():
            _print(f"{output}: not to be seen from this machine, or not begun yet")
            return
    _print(describe(look(folder)))


@app.command()
def stop(run: Run, address: Address, overrides: Overrides = None) -> None:
    """Stop the Ray job of a run. What is committed is kept; submitting the run again resumes."""
    from cluster import submit as ray_jobs

    with _interruptible():
        _print(ray_jobs.stop(_output_of(run, overrides or []).path, ray_jobs.Jobs(address), _print))


def main() -> None:
    """The entry point: what goes wrong becomes one sentence and an exit code."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _interrupt)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Ray would tell of its own inner life, and would start anew where a thread asks for it after its end
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
    if not sys.warnoptions:
        # what libraries warn of is for who develops with them; `python -W` shows it
        warnings.simplefilter("ignore")
    with in_one_sentence():
        app()


@contextmanager
def in_one_sentence() -> Iterator[None]:
    """Exits with what went wrong on stderr, also for scripts."""
    try:
        yield
    except (Refusal, Incomplete) as error:
        print(f"shardprune: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(_REFUSED if isinstance(error, Refusal) else _INCOMPLETE)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """What follows is clean-up, which a second signal ends. KeyboardInterrupt is the one exception that every library
    lets through."""
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_DFL)
    raise KeyboardInterrupt


@contextmanager
def _interruptible() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise Incomplete("stopped by a signal; what is committed is kept, run again to resume") from None


def _output_of(run: str, overrides: list[str]) -> "OutputSettings":
    """Where a run writes, which is given by it or by its config."""
    from pipeline.config import OutputSettings
    from pipeline.config_file import load_config, validate
    from pipeline.storage import concealed

    if Path(run).is_file():
        return load_config(Path(run), overrides).output
    if overrides:
        raise Refusal(f"RUN = {concealed(run)}: no such config; overrides only go with one")
    return validate(OutputSettings, {"path": run}, [])


def _print(text: str) -> None:
    _write(f"{text}\n")


def _write(text: str) -> None:
    try:
        print(text, end="", flush=True)
    except OSError:
        drop_stdout()
