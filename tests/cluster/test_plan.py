"""Plans and recoveries are values: decided without a cluster."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.plan import plan_shards
from cluster.recovery import Loss, decide, is_stalled


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 20))
def test_shards_cover_all_layers_in_order(num_layers: int, num_shards: int, num_workers: int) -> None:
    num_shards = min(num_shards, num_layers)
    shards = plan_shards(num_layers, num_shards, num_workers)
    assert [layer for shard in shards for layer in range(shard.first_layer, shard.stop_layer)] == list(
        range(num_layers)
    )
    sizes = [shard.stop_layer - shard.first_layer for shard in shards]
    assert len(shards) == num_shards
    assert max(sizes) - min(sizes) <= 1
    assert {shard.worker_index for shard in shards} == set(range(min(num_workers, num_shards)))


@pytest.mark.parametrize("loss", list(Loss))
def test_what_is_lost_again_and_again_stops_the_run_and_a_notice_never_does(loss: Loss) -> None:
    decisions = [decide(loss, num_in_a_row).goes_on for num_in_a_row in range(1, 30)]
    assert decisions[:2] == [True, True]
    assert decisions == sorted(decisions, reverse=True), "once it has stopped it does not go on"
    assert all(decisions) == (loss is Loss.NOTICE)


def test_only_a_storage_and_an_object_store_are_given_time_and_more_of_it_each_time() -> None:
    for loss in Loss:
        waits = [decision.wait_seconds for n in range(1, 30) if (decision := decide(loss, n)).goes_on]
        assert waits == sorted(waits) and max(waits) <= 60
        assert (max(waits) > 0) == (loss in (Loss.STORAGE, Loss.MEMORY))


@given(st.floats(0, 1e4), st.floats(0, 1e4), st.floats(0.1, 1e4))
def test_nothing_is_given_up_that_is_merely_slow(seconds: float, slowest: float, stall_seconds: float) -> None:
    assert is_stalled(seconds, None, stall_seconds) == (seconds > 10 * stall_seconds), "work that is new has an end too"
    assert is_stalled(seconds, slowest, stall_seconds) == (seconds > stall_seconds and seconds > 10 * slowest)
