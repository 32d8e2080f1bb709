"""What each propagation means, in one process; and that a run that is killed ends with the same bytes."""

import random
import signal
import time
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
from command import refusal, shardprune, start
from tiny import digests, save_model, save_windows, write_config

from pipeline.config_file import load_config
from pipeline.local import run_locally
from pipeline.preparation import begin, opened, prepare
from pipeline.runtime import Machine
from pipeline.store import Receipt, RunDirectory

NUM_LAYERS, KEPT_EVERY = 6, 2


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    source = save_model(folder / "model", "llama", num_hidden_layers=NUM_LAYERS)
    windows = save_windows(folder / "windows.parquet", 24, 32)
    settings: dict[str, Any] = {"output.keep_entry_every": KEPT_EVERY, "runtime.micro_batch_tokens": 128}
    settings["pruning.granularity"] = "layer"
    write_config(folder / "run.yaml", source, windows, folder / "out", "sparsegpt", 0.5, **settings)
    return folder


def pruned(place: Path, name: str, *overrides: str) -> dict[str, str]:
    """The sha256 of every file of a model pruned with some settings."""
    output = place / name
    if not output.exists():
        finished = shardprune("run", place / "run.yaml", f"output.path={output}", *overrides)
        assert finished.code == 0, finished.err
    return digests(output / "model")


def receipts(output: Path) -> list[Receipt]:
    return RunDirectory(output, NUM_LAYERS).receipts()


def errors(output: Path) -> list[list[float]]:
    return [[linear.relative_error for linear in receipt.linears] for receipt in receipts(output)]


def by_shards(num_shards: int) -> list[str]:
    return ["pruning.propagation=shard", f"cluster.num_shards={num_shards}"]


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "sparsellm"])
def test_shard_lies_between_pruned_and_dense(method: str, place: Path) -> None:
    """One shard is pruned propagation, shards of one layer are dense propagation, to the byte."""
    chosen = f"pruning.method={{name: {method}}}"
    alone = pruned(place, f"{method}-pruned", chosen)
    dense = pruned(place, f"{method}-dense", chosen, "pruning.propagation=dense")
    assert pruned(place, f"{method}-1", chosen, *by_shards(1)) == alone
    assert pruned(place, f"{method}-all", chosen, *by_shards(NUM_LAYERS)) == dense
    between = pruned(place, f"{method}-3", chosen, *by_shards(3))
    assert len({between[name] for name in between} | set(alone.values()) | set(dense.values())) > len(between)


def test_each_shard_begins_as_dense_propagation_does(place: Path) -> None:
    """The first layer of a shard sees dense activations, the others what the pruned ones before them give."""
    dense, shard = pruned(place, "sparsegpt-dense", "pruning.propagation=dense"), pruned(place, "three", *by_shards(3))
    same = [dense[receipt.file] == shard[receipt.file] for receipt in receipts(place / "three")]
    assert same == [True, False, True, False, True, False]


def test_dense_propagation_does_not_depend_on_what_is_pruned(place: Path) -> None:
    """A layer is pruned alike whatever became of those before it."""
    pruned(place, "sparsegpt-dense", "pruning.propagation=dense")
    pruned(place, "sparsegpt-dense-70", "pruning.propagation=dense", "pruning.sparsity=0.7")
    tokens = [[linear.num_tokens for linear in receipt.linears] for receipt in receipts(place / "sparsegpt-dense-70")]
    assert all(number == 24 * 32 for numbers in tokens for number in numbers)
    for lower, higher in zip(errors(place / "sparsegpt-dense"), errors(place / "sparsegpt-dense-70"), strict=True):
        assert all(one < other for one, other in zip(lower, higher, strict=True))


@pytest.mark.parametrize("propagation", ["pruned", "dense"])
def test_replicas_change_rounding_and_nothing_else(propagation: str, place: Path) -> None:
    chosen = f"pruning.propagation={propagation}"
    alone, shared = (
        pruned(place, f"{propagation}-1", chosen),
        pruned(place, f"{propagation}-3", chosen, "cluster.num_replicas=3"),
    )
    assert alone.keys() == shared.keys()
    for one, other in zip(errors(place / f"{propagation}-1"), errors(place / f"{propagation}-3"), strict=True):
        assert one == pytest.approx(other, rel=0.02)


@pytest.mark.parametrize(
    "settings",
    [["pruning.propagation=dense"], by_shards(2), by_shards(4), ["pruning.granularity=linear"]],
    ids=lambda settings: settings[-1],
)
@pytest.mark.parametrize("num_replicas", [1, 2])
def test_killed_at_random_moments_it_ends_with_the_same_bytes(
    settings: list[str], num_replicas: int, place: Path, tmp_path: Path
) -> None:
    chosen = [*settings, f"cluster.num_replicas={num_replicas}"]
    wanted = pruned(place, "-".join(chosen).replace("/", ""), *chosen)
    output, moments = tmp_path / "out", random.Random(str(chosen))
    for num_layers in (0, 1, 3, 5):
        running = start("run", place / "run.yaml", f"output.path={output}", *chosen)
        running.wait_until(
            lambda at_least=num_layers: len(receipts(output)) >= at_least and (output / "run.yaml").exists()
        )
        time.sleep(moments.uniform(0, 0.1))
        running.send(signal.SIGKILL)
        running.wait()
    finished = shardprune("run", place / "run.yaml", f"output.path={output}", *chosen)
    assert finished.code == 0, finished.err
    assert digests(output / "model") == wanted
    assert all(receipt.num_layers_replayed <= KEPT_EVERY for receipt in receipts(output))
    assert not (output / "activations").exists()


def test_what_decides_the_bytes_is_kept(place: Path, tmp_path: Path) -> None:
    """Of a run by shards the boundaries, of any run the replicas; what does not is free."""
    output = f"output.path={tmp_path / 'out'}"
    assert shardprune("run", place / "run.yaml", output, *by_shards(2)).code == 0
    assert "cluster.num_shards was 2, now 3" in refusal("run", place / "run.yaml", output, *by_shards(3))
    assert "propagation" in refusal("run", place / "run.yaml", output, "pruning.propagation=dense")
    assert "pruning.granularity was 'layer', now 'linear'" in refusal(
        "run", place / "run.yaml", output, *by_shards(2), "pruning.granularity=linear"
    )
    assert "cluster.num_replicas was 1, now 2" in refusal(
        "run", place / "run.yaml", output, *by_shards(2), "cluster.num_replicas=2"
    )


@pytest.mark.parametrize("propagation", ["pruned", "dense"])
def test_freed_memory_is_kept_while_windows_run_and_not_while_weights_are_solved(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, propagation: str
) -> None:
    is_kept, seen = [False], set()

    def watch(name: str) -> None:
        function = resolve_name(name)

        def watched(*args: Any) -> Any:
            seen.add((name, is_kept[-1]))
            return function(*args)

        monkeypatch.setattr(name.replace(":", "."), watched)

    monkeypatch.setattr("pipeline.runtime._set_thresholds", lambda mmap, trim: is_kept.append(trim > 2**30))
    observed, run, solved = names = (
        "pipeline.numerics.statistics:Gram.observe",
        "pipeline.models.skeleton:LoadedLayer.run",
        "pipeline.layer:prune_group",
    )
    for name in names:
        watch(name)
    chosen = [f"output.path={tmp_path / 'out'}", f"pruning.propagation={propagation}"]
    prepared = prepare(load_config(place / "run.yaml", chosen), Machine(1, False), print)
    with opened(prepared) as (guard, _):
        run_locally(begin(prepared, guard, lambda job: []), prepared, lambda receipt: None)
    assert seen == {(observed, True), (run, True), (solved, False)}


def test_an_input_of_the_dense_model_goes_once_no_layer_needs_it(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    chosen = [f"output.path={out}", "pruning.propagation=dense", "output.keep_entry_every=1"]
    prepared = prepare(load_config(place / "run.yaml", chosen), Machine(1, False), print)
    kept: list[set[int]] = []

    def on_layer(receipt: Receipt) -> None:
        kept.append(RunDirectory(out, NUM_LAYERS).entries(1, is_dense=True))

    with opened(prepared) as (guard, _):
        run_locally(begin(prepared, guard, lambda job: []), prepared, on_layer)
    # told of a layer, the next one may have been run already
    assert all(min(entries, default=NUM_LAYERS) > index for index, entries in enumerate(kept)), kept
