"""Plans and recoveries are values: decided without a cluster."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.plan import plan_shards
from cluster.recovery import Decision, decide


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


@pytest.mark.parametrize(("num_losses", "decision"), [(1, Decision.GO_ON), (2, Decision.GO_ON), (3, Decision.STOP)])
def test_a_layer_that_keeps_losing_its_worker_stops_the_run(num_losses: int, decision: Decision) -> None:
    assert decide(num_losses) is decision
