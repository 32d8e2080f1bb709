"""How a run is doing is read from its directory alone, and nothing is written there."""

import signal
from dataclasses import replace
from pathlib import Path

import pytest
from command import refusal, shardprune, start
from tiny import digests, save_model, save_windows, write_config

from pipeline import lease
from pipeline.clock import clock
from pipeline.status import Facts, describe, look

NUM_LAYERS = 5


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run.yaml, and in done/ the finished run."""
    folder = tmp_path_factory.mktemp("place")
    model = save_model(folder / "model", "llama", num_hidden_layers=NUM_LAYERS)
    windows = save_windows(folder / "windows.parquet", 400, 32)
    write_config(folder / "run.yaml", model, windows, folder / "done", "sparsegpt")
    assert shardprune("run", folder / "run.yaml").code == 0
    return folder


@pytest.fixture
def facts(place: Path) -> Facts:
    return look(place / "done")


def lines(facts: Facts) -> dict[str, str]:
    """What is told, by its first word."""
    told = describe(facts).splitlines()[1:]
    return {line.split()[0]: line.partition(" ")[2].strip() for line in told}


def test_a_finished_run_is_told_the_same_by_its_directory_and_its_config(place: Path) -> None:
    before = digests(place)
    by_folder, by_config = shardprune("status", place / "done"), shardprune("status", place / "run.yaml")
    assert by_folder.code == by_config.code == 0
    assert by_folder.out == by_config.out
    assert "sparsegpt, sparsity 0.5" in by_folder.out
    assert "finished" in by_folder.out and f"{NUM_LAYERS} of {NUM_LAYERS} committed" in by_folder.out
    assert "held by nobody" in by_folder.out and "0.5000 so far" in by_folder.out
    assert digests(place) == before


def test_a_killed_run_tells_what_is_left_and_who_left_it(place: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    running = start("run", place / "run.yaml", f"output.path={output}", "output.keep_entry_every=9")
    assert running.wait_until(lambda: (output / "receipts" / "layer-00001.json").exists())
    running.send(signal.SIGSTOP)
    stopped = look(output)
    running.send(signal.SIGKILL)
    running.wait()
    done = len(stopped.receipts)
    assert 2 <= done < NUM_LAYERS
    assert lines(stopped)["state"] == "running"
    assert str(running.process.pid) in lines(stopped)["lease"]
    told = lines(look(output))
    assert told["state"] == "run again to resume" and "dead" in told["lease"]
    assert told["layers"] == f"{done} of {NUM_LAYERS} committed" and "to go" in told["time"]
    assert shardprune("run", place / "run.yaml", f"output.path={output}", "output.keep_entry_every=9").code == 0
    told = lines(look(output))
    assert told["state"] == "finished" and told["lease"] == "held by nobody"
    assert told["attempts"] == f"2 that committed a layer, {done} layers run again after restarts"


def test_the_time_to_go_is_that_of_the_layers_that_are_left(facts: Facts) -> None:
    receipts = [receipt.model_copy(update={"seconds": 60.0}) for receipt in facts.receipts]
    for num_done in range(1, NUM_LAYERS):
        told = lines(replace(facts, receipts=receipts[:num_done]))["time"]
        assert told == f"60.0 s a layer, {NUM_LAYERS - num_done}:00 of pruning to go"
    assert lines(replace(facts, receipts=receipts))["time"] == "60.0 s a layer"


def test_a_lease_is_held_until_it_ends_or_its_owner_is_dead(facts: Facts, tmp_path: Path) -> None:
    taken, _ = lease.acquire(tmp_path)
    held = lease.held(tmp_path)
    taken.release()
    released = lease.held(tmp_path)
    assert held is not None and released is not None
    facts = replace(facts, receipts=facts.receipts[:2], is_complete=False, is_reported=False)
    live = lines(replace(facts, lease=replace(held, seconds_left=30)))
    assert live["state"] == "running" and "for 0:30 unless it is renewed" in live["lease"]
    ended = lines(replace(facts, lease=replace(held, seconds_left=-90)))
    assert ended["state"] == "run again to resume" and "ended 1:30 ago" in ended["lease"]
    assert lines(replace(facts, lease=replace(held, is_dead=True)))["state"] == "run again to resume"
    for nobody in (None, released):
        assert lines(replace(facts, lease=nobody))["lease"] == "held by nobody"


def test_layers_of_different_environments_are_warned_of(facts: Facts) -> None:
    assert "warning" not in describe(facts)
    other = {**facts.receipts[0].environment, "torch": "1.0"}
    changed = [receipt.model_copy(update={"environment": other}) for receipt in facts.receipts[3:]]
    told = describe(replace(facts, receipts=facts.receipts[:3] + changed))
    warnings = [line for line in told.splitlines() if line.startswith("warning")]
    assert len(warnings) == 2
    assert "layers from 0 on" in warnings[0] and "layers from 3 on" in warnings[1] and "1.0" in warnings[1]


def test_a_run_that_only_calibrates_yet_has_no_layers(tmp_path: Path) -> None:
    (tmp_path / "calibration").mkdir()
    told = describe(look(tmp_path))
    assert "calibrating" in told and "not settled" in told


def test_what_is_no_run_is_refused(place: Path, tmp_path: Path) -> None:
    assert "no such folder" in refusal("status", tmp_path / "nowhere")
    assert "holds no run" in refusal("status", tmp_path)
    assert "no such config" in refusal("status", place / "done", "pruning.sparsity=0.6")
    (tmp_path / "run.yaml").write_text("- no\n")
    assert "not the record of a run" in refusal("status", tmp_path)


@pytest.mark.parametrize(
    "run", ["ftp://bucket/run", "s3://key:hidden@bucket/run", "s3://bucket/run?hidden", "runs/{x}"]
)
def test_what_no_run_directory_can_be_is_refused_without_its_secrets(run: str) -> None:
    assert "hidden" not in refusal("status", run)


def test_durations_are_read_as_clocks() -> None:
    assert [clock(seconds) for seconds in (0, 59.6, 61, 3600, 36061)] == ["0:00", "1:00", "1:01", "1:00:00", "10:01:01"]
