"""The bytes that a plan says are read and sent: against a real run in this process, and worked out for teams."""

from pathlib import Path
from typing import Any

import pytest
from tiny import save_model, save_windows, write_config

from cluster.planning.forecast import Forecast, forecast
from cluster.planning.portion import Choice
from cluster.run import run_all
from pipeline.activations import Activations
from pipeline.config_file import load_config
from pipeline.models import checkpoint
from pipeline.planning.rates import assumed_of_cpu
from pipeline.planning.scope import Scope, examine
from pipeline.runtime import Machine

RATES = assumed_of_cpu(1, "float32")


def write(folder: Path, *overrides: str, method: str = "wanda", **settings: Any) -> Any:
    """A config of a model of 6 layers."""
    model = save_model(folder / "model", "llama", num_hidden_layers=6)
    windows = save_windows(folder / "windows.parquet", 8, 32)
    return load_config(write_config(folder / "run.yaml", model, windows, folder / "out", method, **settings), overrides)


def planned(folder: Path, choice: Choice, *overrides: str, method: str = "wanda") -> tuple[Scope, Forecast]:
    scope, _ = examine(write(folder, "cluster.address=auto", *overrides, method=method), Machine(1, False))
    return scope, forecast(scope, RATES, choice)


@pytest.mark.parametrize(
    ("method", "overrides"),
    [
        ("wanda", []),
        ("sparsegpt", ["pruning.propagation=shard", "cluster.num_shards=3"]),
        ("wanda", ["pruning.propagation=shard", "cluster.num_shards=4", "output.keep_entry_every=1"]),
        ("wanda", ["pruning.propagation=dense"]),
        ("magnitude", []),
        ("sparsegpt", ["pruning.allocation.name=owl"]),
        ("wanda", ["pruning.allocation.name=alphapruning"]),
        ("magnitude", ["pruning.allocation.name=owl"]),
    ],
)
def test_a_real_run_reads_what_was_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, overrides: list[str]
) -> None:
    config, counted = write(tmp_path, *overrides, method=method), 0
    scope, _ = examine(config, Machine(1, False))
    read_tensors, load = checkpoint.read_tensors, Activations.load

    def counting_tensors(file: Any, entries: Any, *rest: Any) -> Any:
        nonlocal counted
        counted += sum(entry.num_bytes for entry in entries.values())
        return read_tensors(file, entries, *rest)

    def counting_load(states: Activations, path: Path, indices: range) -> None:
        nonlocal counted
        counted += path.stat().st_size
        load(states, path, indices)

    monkeypatch.setattr(checkpoint, "read_tensors", counting_tensors)
    monkeypatch.setattr(Activations, "load", counting_load)
    run_all(config, lambda line: None)
    assert forecast(scope, RATES, Choice.of(config, 1)).read_bytes == counted + scope.model_bytes


def test_every_replica_opens_layers_and_what_is_outside_and_reads_its_part_of_what_is_kept(tmp_path: Path) -> None:
    scope, one = planned(tmp_path, Choice("shard", 3, 1, 3))
    _, two = planned(tmp_path, Choice("shard", 3, 2, 6))
    # a sweep of layers 0 to 3 before the segments, windows enter both; a header of .npy for each replica's part
    layers, outside = (6 + 4) * scope.traces[0].stored_bytes, scope.outside.stored_bytes
    headers = 2 * 128
    assert one.read_bytes == scope.model_bytes + layers + 3 * outside + 2 * scope.hidden_bytes + headers
    assert two.read_bytes - one.read_bytes == layers + 2 * outside + headers


def test_a_team_that_hands_over_has_read_the_next_layer_too(tmp_path: Path) -> None:
    scope, one = planned(tmp_path, Choice("pruned", 3, 1, 1))
    _, three = planned(tmp_path, Choice("pruned", 3, 1, 3))
    assert three.read_bytes - one.read_bytes == 2 * scope.traces[0].stored_bytes


def test_where_every_replica_solves_everything_sums_go_to_all_and_no_weights_to_anybody(tmp_path: Path) -> None:
    asked = Choice("pruned", 1, 3, 3)
    scope, dealt = planned(tmp_path, asked, "pruning.pattern=2:4", "pruning.sparsity=null")
    _, permuted = planned(tmp_path, asked, "pruning.pattern=2:4", "pruning.sparsity=null", "pruning.permute=true")
    weights = 2 * sum(trace.stored_bytes for trace in scope.traces)
    assert permuted.network_bytes == 3 * (dealt.network_bytes - weights) > 0
    # without sums the groups have owners all the same
    *_, magnitude = planned(
        tmp_path, asked, "pruning.pattern=2:4", "pruning.sparsity=null", "pruning.permute=true", method="magnitude"
    )
    assert magnitude.network_bytes == weights
