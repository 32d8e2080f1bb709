"""Micro-batches in parts, one for each replica; what is summed over them is summed in the order of the parts.

A process that is alone sees all parts, one after another. Replicas see one each and exchange their sums. Both give the
same sums, bit for bit. I = input columns.
"""

import fcntl
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, is_dataclass, replace
from datetime import timedelta
from typing import Any, Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.errors import Incomplete
from pipeline.segments import split

S = TypeVar("S")
T = TypeVar("T")

_NUMBERS_AT_ONCE = 2**24
# the driver notices a lost replica and ends the others; they need no deadline of their own
_PATIENCE = timedelta(days=7)
_GET_ADDRESS = 0x8915


class ReplicaLost(Incomplete):
    """Another of the replicas does not take part any more."""


class Replicas(Protocol):
    """`parts`: the micro-batches of each part that this process sees, by its own numbers."""

    parts: list[range]

    def merge(self, earlier: Any, part: Any, owner: int | None) -> "Future[Any]":
        """The sum over all parts so far: over those seen before, and one that this process has just seen.

        Where the owner is another replica, the result is of no use; without an owner all get it. All replicas merge in
        the same order.
        """
        ...

    def deal(self, costs: Sequence[float]) -> list[int | None]:
        """To each task the replica that does it."""
        ...

    def does(self, owner: int | None) -> bool:
        """Whether a task of an owner is done here."""
        ...

    def share(self, tensors: list[Tensor], known: T, owner: int | None) -> T:
        """The owner's tensors, put in place of these, and what else it knows."""
        ...


class Alone:
    """One process that sees all parts."""

    def __init__(self, num_micro_batches: int, num_replicas: int = 1) -> None:
        self.parts = split(num_micro_batches, num_replicas)

    def merge(self, earlier: Any, part: Any, owner: int | None) -> "Future[Any]":
        done: Future[Any] = Future()
        done.set_result(part if earlier is None else earlier + part)
        return done

    def deal(self, costs: Sequence[float]) -> list[int | None]:
        return [None] * len(costs)

    def does(self, owner: int | None) -> bool:
        return True

    def share(self, tensors: list[Tensor], known: T, owner: int | None) -> T:
        return known


@dataclass(frozen=True)
class Meeting:
    """Where the replicas of a group find each other: the address of the first of them."""

    host: str
    port: int


class Replica:
    """One of several processes, each of which sees one part.

    Everything that is exchanged goes through one thread, in the order in which it is asked for, so that the replicas
    agree on it while each goes on computing.
    """

    def __init__(self, num_micro_batches: int, num_replicas: int, rank: int, meeting: Meeting, device: str) -> None:
        part = split(num_micro_batches, num_replicas)[rank]
        self.parts, self.rank, self.size = [range(len(part))], rank, num_replicas
        self._exchanges = ThreadPoolExecutor(1, "exchange")
        _answered(_meet, num_replicas, rank, meeting, device)

    def merge(self, earlier: Any, part: Any, owner: int | None) -> "Future[Any]":
        assert earlier is None, "a replica sees one part"
        return self._exchanges.submit(_answered, self._summed, part, owner)

    def deal(self, costs: Sequence[float]) -> list[int | None]:
        """The most expensive first, each to whoever has least to do."""
        loads, owners = [0.0] * self.size, [0] * len(costs)
        for task in sorted(range(len(costs)), key=lambda task: -costs[task]):
            owners[task] = loads.index(min(loads))
            loads[owners[task]] += costs[task]
        return list(owners)

    def does(self, owner: int | None) -> bool:
        return owner in (None, self.rank)

    def share(self, tensors: list[Tensor], known: T, owner: int | None) -> T:
        if owner is None:
            return known
        told: T = self._exchanges.submit(_answered, self._broadcast, tensors, known, owner).result()
        return told

    def close(self) -> None:
        """Part from the others, once all of them are here."""
        self._exchanges.submit(dist.barrier).result()
        self._exchanges.shutdown()
        dist.destroy_process_group()

    def _broadcast(self, tensors: list[Tensor], known: T, owner: int) -> T:
        told = [known]
        dist.broadcast_object_list(told, src=owner)
        for tensor in tensors:
            # as bytes: not every backend knows every dtype
            dist.broadcast(tensor.view(torch.uint8), src=owner)
        return told[0]

    def _summed(self, part: Any, owner: int | None) -> Any:
        """A dataclass whose numbers and tensors are the sums of those of all replicas, in the order of their ranks."""
        totals: dict[str, Any] = {}
        for field in fields(part):
            value = getattr(part, field.name)
            if isinstance(value, Tensor):
                self._sum_in_place(value, field.name in getattr(part, "symmetric", ()), owner)
            elif is_dataclass(value):
                totals[field.name] = self._summed(value, owner)
            else:
                totals[field.name] = sum(self._told(value))
        return replace(part, **totals)

    def _told(self, value: int) -> list[int]:
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def _sum_in_place(self, tensor: Tensor, is_symmetric: bool, owner: int | None) -> None:
        for piece in _pieces(tensor, is_symmetric):
            mine = piece.contiguous()
            gathered = [torch.empty_like(mine) for _ in range(self.size if self.does(owner) else 0)]
            if owner is None:
                dist.all_gather(gathered, mine)
            else:
                dist.gather(mine, gathered or None, dst=owner)
            if gathered:
                total = gathered[0]
                for other in gathered[1:]:
                    total += other
                piece.copy_(total)


def _meet(num_replicas: int, rank: int, meeting: Meeting, device: str) -> None:
    is_first = rank == 0
    # left to itself torch would listen at every interface
    listening = socket.create_server((meeting.host, meeting.port)).detach() if is_first else None
    store = dist.TCPStore(  # type: ignore[attr-defined]
        meeting.host, meeting.port, num_replicas, is_first, _PATIENCE, master_listen_fd=listening
    )
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=num_replicas, timeout=_PATIENCE)


def _answered(exchange: Callable[..., T], *arguments: Any) -> T:
    """What an exchange with the other replicas gives. Raises ReplicaLost where one of them is gone."""
    try:
        return exchange(*arguments)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, OSError) as error:
        # torch knows no more special error for it
        reason = str(error).partition("\n")[0]
        raise ReplicaLost(f"another replica does not answer ({reason}); run again to resume") from error


def offer_meeting(host: str) -> Meeting:
    """A place on this host that is free now."""
    with socket.create_server((host, 0)) as server:
        return Meeting(host, server.getsockname()[1])


def interface_of(host: str) -> str | None:
    """The name of the network interface of this host that has an address, None if none has.

    gloo would take the one that the host's name leads to, which in a container may be any.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            try:
                told = fcntl.ioctl(asked.fileno(), _GET_ADDRESS, struct.pack("256s", name.encode()))
            except OSError:
                continue
            if socket.inet_ntoa(told[20:24]) == host:
                return name
    return None


def _pieces(tensor: Tensor, is_symmetric: bool) -> Iterator[Tensor]:
    """Views of a tensor that are small enough to be exchanged at once; of a symmetric one, of its lower triangle."""
    if not is_symmetric:
        yield from torch.chunk(tensor.view(-1), -(-tensor.numel() // _NUMBERS_AT_ONCE))
        return
    size = len(tensor)
    num_rows = max(1, min(_NUMBERS_AT_ONCE // size, size // 8))
    for first in range(0, size, num_rows):
        stop = min(first + num_rows, size)
        yield tensor[first:stop, :stop]


def summed_by(replicas: Replicas, sums_of: Callable[[range], S]) -> S:
    """What a function gives for the micro-batches of a part, summed over all parts, for every replica."""
    total: Any = None
    for part in replicas.parts:
        total = replicas.merge(total, sums_of(part), None).result()
    return cast(S, total)
