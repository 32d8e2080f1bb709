"""The command in a process of its own, forked from a server that has imported everything once.

A fresh interpreter spends seconds on imports; here a process costs milliseconds and can still be killed, stopped or
given limits like any other.
"""

import itertools
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "cluster.cli",
        "cluster.session",
        "cluster.driver",
        "pipeline.preparation",
        "pipeline.local",
        "pipeline.report",
        "pipeline.calibration.generator",
        "cluster.run",
        "matplotlib.figure",
        "transformers.models.llama.modeling_llama",
        "transformers.models.llama.tokenization_llama",
    ]
)


@dataclass(frozen=True)
class Finished:
    """How a command ended; `code` is negative where a signal ended it."""

    code: int | None
    out: str
    err: str


class Running:
    """A command that has been started."""

    def __init__(self, arguments: tuple[str, ...], max_file_bytes: int | None, dies_at_write: int | None) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._out, self._err = (Path(self._folder.name) / name for name in ("out", "err"))
        environment = dict(os.environ)
        arguments_of_child = (arguments, environment, str(self._out), str(self._err), max_file_bytes, dies_at_write)
        self.process = CONTEXT.Process(target=_be_the_command, args=arguments_of_child)
        self.process.start()

    def send(self, number: signal.Signals) -> None:
        """A command that has ended gets none."""
        assert self.process.pid is not None
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def wait_until(self, condition: Callable[[], bool], seconds: float = 60) -> bool:
        """True once the condition holds, False where the command ended before."""
        end = time.monotonic() + seconds
        while not condition():
            if not self.process.is_alive():
                return condition()
            assert time.monotonic() < end, self._err.read_text()
            time.sleep(0.001)
        return True

    def wait(self, seconds: float = 120) -> Finished:
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still running after {seconds} s"
        out, err = (file.read_text() if file.exists() else "" for file in (self._out, self._err))
        self._folder.cleanup()
        return Finished(self.process.exitcode, out, err)


def start(*arguments: object, max_file_bytes: int | None = None, dies_at_write: int | None = None) -> Running:
    """Start `shardprune ARGUMENTS`.

    Beyond `max_file_bytes` a write to a file fails, as on a full disk. At the write with the number `dies_at_write`,
    just before the file takes its name, the process is gone, as after a SIGKILL.
    """
    return Running(tuple(map(str, arguments)), max_file_bytes, dies_at_write)


def shardprune(*arguments: object, max_file_bytes: int | None = None, dies_at_write: int | None = None) -> Finished:
    """`shardprune ARGUMENTS`, to its end."""
    return start(*arguments, max_file_bytes=max_file_bytes, dies_at_write=dies_at_write).wait()


def refusal(*arguments: object) -> str:
    """The one sentence with which the command refuses."""
    finished = shardprune(*arguments)
    assert finished.code == 2, (finished.code, finished.err[-1000:] or finished.out)
    return sentence(finished)


def sentence(finished: Finished) -> str:
    """What a command that failed says: one line, no traceback."""
    lines = finished.err.strip().splitlines()
    assert len(lines) == 1, finished.err[-1000:]
    assert lines[0].startswith("shardprune: "), lines[0]
    return lines[0].removeprefix("shardprune: ")


def _be_the_command(
    arguments: tuple[str, ...],
    environment: dict[str, str],
    out: str,
    err: str,
    max_file_bytes: int | None,
    dies_at_write: int | None,
) -> None:
    # the server that forks has the one of its own start
    os.environ.update(environment)
    for name, number in ((out, 1), (err, 2)):
        descriptor = os.open(name, os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    if max_file_bytes is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
    if dies_at_write is not None:
        _die_at_write(dies_at_write)
    sys.argv = ["shardprune", *arguments]
    from cluster.cli import main

    main()


def _die_at_write(number: int) -> None:
    replace, count = Path.replace, itertools.count(1)

    def replace_or_die(self: Path, target: Path) -> Path:
        if next(count) == number:
            os._exit(137)
        return replace(self, target)

    Path.replace = replace_or_die  # type: ignore[method-assign]
