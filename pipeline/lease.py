"""The lease on a run directory: one writer at a time, and a writer that was replaced commits nothing.

All it needs of a storage is to create a file that does not exist yet. The files lease/00001.json, lease/00002.json ...
are numbered, and the highest number holds the directory. To take over is to create the next number, which of several
processes one can; to renew is to write one's own file again, which nobody else does; to release is to say so in it. A
process that finds a higher number, or that its own lease has ended, has lost it for good.

When a lease ends is told by the clock of the storage alone: it dates the renewals, and each process learns once how far
its own clock is off by writing a file and looking at its date.
"""

import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

from pydantic import ValidationError

from pipeline.errors import Incomplete, Refusal
from pipeline.faults import reading
from pipeline.files import create_file, read_text, write_file
from pipeline.process import Process
from pipeline.settings import Settings
from pipeline.storage import Location, hasty, status

LEASE_NAME = "lease"
_CLOCK = "clock"
LASTS_SECONDS = 60.0
_NUM_RENEWALS = 12
# Of a renewal that is under way. One that takes longer waits for a storage that would not take the farewell either.
_LAST_RENEWAL_SECONDS = 5.0


class LeaseLost(Incomplete):
    """Another process has taken the run directory over."""


class Holder(Settings):
    """What a lease file says: who holds the directory, and for how long after the file was written."""

    owner: str
    process: Process
    lasts_seconds: float
    released: bool = False


@dataclass(frozen=True)
class Held:
    """A lease file as it was found."""

    number: int
    holder: Holder
    seconds_left: float
    is_dead: bool

    @property
    def is_live(self) -> bool:
        return not self.holder.released and not self.is_dead and self.seconds_left >= 0


@dataclass(frozen=True)
class LeaseGuard:
    """What a worker needs to know to commit: the directory and whose lease it works under. Can be sent anywhere."""

    directory: Location
    owner: str
    number: int

    @property
    def is_ours(self) -> bool:
        """Whether the directory, as this process sees it, is the owner's: not another's by now, nor of another host."""
        return self._is_held_by(_read(self.directory, self.number))

    def check(self) -> None:
        """Raises LeaseLost unless the lease is still this owner's and has not ended."""
        held = _find(self.directory, self.number)
        if held is None or held.holder.released or not self._is_held_by(held.holder):
            raise LeaseLost(f"{self.directory}: another process has taken this run over; this one writes nothing more")
        if held.seconds_left < 0:
            raise LeaseLost(f"{self.directory}: the lease ended, its owner did not renew it; run again to resume")

    def _is_held_by(self, holder: Holder | None) -> bool:
        # both are asked: a folder on a network may be listed as it was some seconds ago, a file is opened as it is
        newest = max(_numbers(self.directory), default=0)
        return holder is not None and holder.owner == self.owner and newest <= self.number


class Lease:
    """The lease held by this process, renewed by a thread until it is released."""

    def __init__(self, guard: LeaseGuard, holder: Holder) -> None:
        self.guard, self._holder = guard, holder
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def release(self) -> None:
        self._released.set()
        self._thread.join(_LAST_RENEWAL_SECONDS)
        if self._thread.is_alive():
            return
        with suppress(Incomplete, Refusal, OSError):
            self.guard.check()
            self._write(self._holder.model_copy(update={"released": True}))

    def _renew(self) -> None:
        while not self._released.wait(self._holder.lasts_seconds / _NUM_RENEWALS):
            # a storage that refuses writes for a while costs a renewal; if it lasts, the guard finds the lease ended
            with suppress(Incomplete, Refusal, OSError):
                try:
                    self.guard.check()
                except LeaseLost:
                    return
                self._write(self._holder)

    def _write(self, holder: Holder) -> None:
        write_file(_file(self.guard.directory, self.guard.number), _content(holder))


def held(directory: Location) -> Held | None:
    """The newest lease on a directory, None where there was none; by the clock of this host, so nothing is written."""
    return _newest(directory, clock_offset=0.0)


def refuse_live(directory: Location) -> None:
    """Raises Refusal where another process holds the lease, Incomplete if it is of another host; changes nothing."""
    _refuse_if_live(directory, _newest(directory))


def acquire(directory: Location, lasts_seconds: float = LASTS_SECONDS) -> tuple[Lease, str | None]:
    """Take the lease, and a sentence if it had to be taken over. Raises as `refuse_live` where it is in use."""
    holder = Holder(owner=uuid.uuid4().hex, process=Process.here(), lasts_seconds=lasts_seconds)
    while True:
        before = _newest(directory)
        _refuse_if_live(directory, before)
        guard = LeaseGuard(directory, holder.owner, before.number + 1 if before else 1)
        # an answer that was lost may have been a yes
        if create_file(_file(directory, guard.number), _content(holder)) or guard.is_ours:
            break
    _drop_others(guard)
    if before is None or before.holder.released:
        return Lease(guard, holder), None
    process = before.holder.process
    reason = "is dead" if before.is_dead else "let its lease end"
    return Lease(guard, holder), f"taking over from process {process.pid} on {process.host}, which {reason}"


def _refuse_if_live(directory: Location, held: Held | None) -> None:
    if held is None or not held.is_live:
        return
    process = held.holder.process
    told = f"output.path = {directory}: process {process.pid} on {process.host} is running it; wait for that run"
    if process.is_neighbour:
        raise Refusal(told)
    # it may be gone with its host, and then it helps to run again
    raise Incomplete(f"{told}, or for its lease to end in {held.seconds_left:.0f} s if it is gone")


def _drop_others(guard: LeaseGuard) -> None:
    """Delete lower numbers, so that whoever holds one sees it gone, however old its view of the folder; and what
    processes that were killed left half written."""
    folder, now = _folder(guard.directory), time.time() + _clock_offset(guard.directory)
    for number in [number for number in _numbers(guard.directory) if number < guard.number]:
        _file(guard.directory, number).unlink(missing_ok=True)
    for file in [file for pattern in ("*.tmp-*", f"{_CLOCK}-*") for file in folder.glob(pattern)]:
        with suppress(FileNotFoundError):
            if now - status(file).modified > LASTS_SECONDS:
                file.unlink(missing_ok=True)


def _newest(directory: Location, clock_offset: float | None = None) -> Held | None:
    while numbers := list(_numbers(directory)):
        found = _find(directory, max(numbers), clock_offset)
        # one that is gone again has been followed by a higher one
        if found is not None:
            return found
    return None


def _find(directory: Location, number: int, clock_offset: float | None = None) -> Held | None:
    with suppress(FileNotFoundError):
        modified = status(_file(directory, number)).modified
        holder = _read(directory, number)
        if holder is not None:
            now = time.time() + (_clock_offset(directory) if clock_offset is None else clock_offset)
            return Held(number, holder, modified + holder.lasts_seconds - now, holder.process.is_dead())
    return None


def _numbers(directory: Location) -> Iterator[int]:
    with suppress(FileNotFoundError):
        folder = _folder(directory)
        with reading(folder):
            names = [file.name.removesuffix(".json") for file in folder.iterdir()]
        yield from (int(name) for name in names if name.isdigit())


@cache
def _clock_offset(directory: Location) -> float:
    """Seconds that the clock of the storage is ahead of this host's; an object store tells whole seconds only."""
    probe = _folder(directory) / f"{_CLOCK}-{uuid.uuid4().hex}"
    write_file(probe, b"")
    # by as much as the writing took, a lease seems to last longer than it does: nobody takes over too early
    written = time.time()
    try:
        return status(probe).modified - written
    finally:
        probe.unlink(missing_ok=True)


def _folder(directory: Location) -> Location:
    return hasty(directory / LEASE_NAME)


def _file(directory: Location, number: int) -> Location:
    return _folder(directory) / f"{number:05d}.json"


def _read(directory: Location, number: int) -> Holder | None:
    file = _file(directory, number)
    try:
        return Holder.model_validate_json(read_text(file))
    except FileNotFoundError:
        return None
    except (ValidationError, UnicodeDecodeError):
        raise Refusal(f"{file}: cannot be read; delete it if no process is running this directory") from None


def _content(holder: Holder) -> bytes:
    return holder.model_dump_json(indent=1).encode()
