"""Replicas that exchange their sums have those of one process that sees all parts, bit for bit."""

import os
import socket
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import psutil
import pytest
import torch
import torch.multiprocessing as processes
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipeline import replicas
from pipeline.numerics.feedforward import BlockSums
from pipeline.numerics.statistics import ColumnSums, Gram, TokenCount
from pipeline.replicas import Alone, Meeting, Replica, ReplicaLost, Replicas, interface_of, offer_meeting, summed_by
from pipeline.segments import split

NUM_MICRO_BATCHES, WIDTH = 7, 40
CPU = torch.device("cpu")


def x_TI(index: int) -> Tensor:
    return torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(index))


def gram(part: range) -> Gram:
    sums = Gram.zeros(WIDTH, CPU)
    for index in part:
        sums.observe(x_TI(index))
    return sums


def columns(part: range) -> ColumnSums:
    sums = ColumnSums.zeros(WIDTH, CPU)
    for index in part:
        sums.observe(x_TI(index))
    return sums


def count(part: range) -> TokenCount:
    return TokenCount(5 * len(part))


def block(part: range) -> BlockSums:
    sums = BlockSums.zeros(torch.Size((3, WIDTH)), torch.Size((4, WIDTH)), CPU)
    for index in part:
        x = x_TI(index)
        sums.observe(x[:, :3], x, x[:, :4], x)
    return sums


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Gram):
        # above the diagonal of what is summed up there is nothing that counts
        return same([one.num_tokens, one.sum_I, one.sum_II], [other.num_tokens, other.sum_I, other.sum_II])
    if is_dataclass(one):
        return all(same(getattr(one, field.name), getattr(other, field.name)) for field in fields(one))
    if isinstance(one, list):
        return all(map(same, one, other))
    return bool(torch.equal(one, other)) if isinstance(one, Tensor) else bool(one == other)


def _as_replica(rank: int, num_replicas: int, meeting: Meeting, check: Callable[[Replica], None]) -> None:
    torch.set_num_threads(1)
    # small pieces, so that there are several
    replicas._NUMBERS_AT_ONCE = 300
    replica = Replica(NUM_MICRO_BATCHES, num_replicas, rank, meeting, "cpu")
    check(replica)
    replica.close()


def _check_sums(replica: Replica) -> None:
    first = split(NUM_MICRO_BATCHES, replica.size)[replica.rank].start
    alone = Alone(NUM_MICRO_BATCHES, replica.size)
    for sums_of in (gram, columns, count, block):

        def mine(part: range, sums_of: Any = sums_of) -> Any:
            return sums_of(range(first + part.start, first + part.stop))

        expected = summed_by(alone, sums_of)
        assert same(summed_by(replica, mine), expected), sums_of.__name__
        for owner in range(replica.size):
            (part,) = replica.parts
            total = replica.merge(None, mine(part), owner).result()
            assert owner != replica.rank or same(total, expected), sums_of.__name__


def _check_shared(replica: Replica) -> None:
    costs = [8.0, 1.0, 5.0, 2.0]
    owners = replica.deal(costs)
    assert set(owners) == set(range(replica.size)), "everyone has something to do"
    for task, owner in enumerate(owners):
        dtype = torch.bfloat16 if task % 2 else torch.float32
        wanted = torch.arange(6).reshape(2, 3).to(dtype) + task
        tensor = wanted.clone() if replica.does(owner) else torch.zeros(2, 3, dtype=dtype)
        told = replica.share([tensor], f"task {task}" if replica.does(owner) else "", owner)
        assert told == f"task {task}" and torch.equal(tensor, wanted)


@pytest.mark.parametrize("num_replicas", [2, 3])
@pytest.mark.parametrize("check", [_check_sums, _check_shared])
def test_replicas_agree_with_one_process(num_replicas: int, check: Callable[[Replica], None]) -> None:
    arguments = (num_replicas, offer_meeting("127.0.0.1"), check)
    processes.start_processes(_as_replica, arguments, num_replicas, start_method="spawn")


def _check_private(replica: Replica) -> None:
    connections = psutil.Process().net_connections("inet")
    listening = {each.laddr.ip for each in connections if each.status == psutil.CONN_LISTEN}
    assert listening == {"127.0.0.1"}


def test_replicas_of_one_host_are_reached_from_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they exchange is unpickled, and nobody is asked for a token."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", interface_of("127.0.0.1") or "")
    arguments = (2, offer_meeting("127.0.0.1"), _check_private)
    processes.start_processes(_as_replica, arguments, 2, start_method="spawn")


def _check_lost(replica: Replica) -> None:
    assert same(replica.merge(None, count(range(1)), None).result(), TokenCount(5 * replica.size))
    if replica.rank == 1:
        os._exit(0)
    for exchange in (
        lambda: replica.merge(None, gram(range(1)), None).result(),
        lambda: replica.share([torch.zeros(3)], None, 1),
    ):
        with pytest.raises(ReplicaLost, match="another replica does not answer"):
            exchange()
    os._exit(0)


def test_where_one_is_killed_the_other_says_so() -> None:
    arguments = (2, offer_meeting("127.0.0.1"), _check_lost)
    processes.start_processes(_as_replica, arguments, 2, start_method="spawn")


def test_a_place_that_is_taken_meanwhile_is_a_replica_lost() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ReplicaLost):
        Replica(NUM_MICRO_BATCHES, 2, 0, Meeting("127.0.0.1", taken.getsockname()[1]), "cpu")


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=12), st.integers(1, 5))
def test_no_replica_has_far_more_to_do_than_its_share(costs: list[float], num_replicas: int) -> None:
    replica = Replica.__new__(Replica)
    replica.size = num_replicas
    owners = replica.deal(costs)
    loads = [
        sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(num_replicas)
    ]
    assert max(loads) <= sum(costs) / num_replicas + max(costs)


def test_parts_of_one_process_hold_all_micro_batches() -> None:
    alone: Replicas = Alone(NUM_MICRO_BATCHES, 3)
    assert [index for part in alone.parts for index in part] == list(range(NUM_MICRO_BATCHES))
