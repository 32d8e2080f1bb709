"""A run that is cut off goes on where it was and ends with the bytes of one that never was."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from command import refusal, sentence, shardprune, start
from tiny import digests, modified_ns, random_ids, save_model, save_text, save_tokenizer, save_windows, write_config

from pipeline.config_file import load_config
from pipeline.hidden import Hidden
from pipeline.local import prune_locally, run_locally, survey_locally
from pipeline.methods import Method
from pipeline.preparation import begin, opened, prepare
from pipeline.runtime import Machine
from pipeline.store import Receipt, RunDirectory
from pipeline.worker import ShardWorker

NUM_LAYERS, KEPT_EVERY = 6, 2
METHODS = [each.model_fields["name"].default for each in get_args(get_args(Method)[0])]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of six layers, and in undisturbed/ the run that nothing happened to."""
    folder = tmp_path_factory.mktemp("place")
    source = save_model(folder / "model", "llama", torch.bfloat16, "30KB", num_hidden_layers=NUM_LAYERS)
    save_tokenizer(source)
    windows = save_windows(folder / "windows.parquet", 24, 32)
    settings: dict[str, Any] = {"output.keep_entry_every": KEPT_EVERY, "runtime.micro_batch_tokens": 256}
    write_config(folder / "run.yaml", source, windows, folder / "undisturbed", "sparsegpt", 0.5, **settings)
    assert shardprune("run", folder / "run.yaml").code == 0
    return folder


@pytest.fixture
def out(place: Path, tmp_path: Path) -> str:
    return f"output.path={tmp_path / 'out'}"


def receipt_files(output: Path) -> list[Path]:
    return sorted((output / "receipts").glob("layer-*.json"))


def all_receipts(output: Path) -> list[Receipt]:
    return RunDirectory(output, NUM_LAYERS).receipts()


def killed_after(place: Path, out: str, output: Path, num_layers: int, *overrides: str) -> int:
    """Kill a run as soon as some layers are committed; how many are then. On a busy machine the run may end first."""
    for _ in range(10):
        running = start("run", place / "run.yaml", out, *overrides)
        running.wait_until(lambda: len(receipt_files(output)) >= num_layers)
        running.send(signal.SIGKILL)
        if running.wait().code == -signal.SIGKILL and len(receipt_files(output)) < NUM_LAYERS:
            return len(receipt_files(output))
        shutil.rmtree(output)
    raise AssertionError("every run ended before it could be killed")


@pytest.mark.parametrize("method", METHODS)
def test_killed_at_random_moments_it_ends_with_the_same_bytes(
    method: str, place: Path, out: str, tmp_path: Path
) -> None:
    output, override = tmp_path / "out", f"pruning.method={{name: {method}}}"
    wanted = place / "undisturbed"
    if method != "sparsegpt":
        wanted = tmp_path / "undisturbed"
        assert shardprune("run", place / "run.yaml", override, f"output.path={wanted}").code == 0
    moments = random.Random(method)
    seen: dict[str, tuple[int, bytes]] = {}
    was_interrupted = False
    for num_layers in (1, 3, 5):
        running = start("run", place / "run.yaml", out, override)
        running.wait_until(lambda at_least=num_layers: len(receipt_files(output)) >= at_least)
        time.sleep(moments.uniform(0, 0.05))
        running.send(signal.SIGKILL)
        assert running.wait().code in (-signal.SIGKILL, 0)
        for name, (modified, content) in seen.items():
            file = output / "receipts" / name
            assert (file.stat().st_mtime_ns, file.read_bytes()) == (modified, content), "a receipt is written once"
        seen = {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in receipt_files(output)}
        was_interrupted |= 0 < len(seen) < NUM_LAYERS
    finished = shardprune("run", place / "run.yaml", out, override)
    assert finished.code == 0, finished.err
    assert digests(output / "model") == digests(wanted / "model")
    receipts = all_receipts(output)
    assert [receipt.layer_index for receipt in receipts] == list(range(NUM_LAYERS))
    assert all(receipt.num_layers_replayed <= KEPT_EVERY for receipt in receipts)
    assert (receipts[-1].attempt > 1) == was_interrupted
    assert [receipt.attempt for receipt in receipts] == sorted(receipt.attempt for receipt in receipts)
    assert not [name for name in digests(output) if ".tmp-" in name]
    assert {file.name for file in output.iterdir()} == {file.name for file in wanted.iterdir()}


def test_killed_before_the_first_layer_it_starts_over(place: Path, tmp_path: Path) -> None:
    """Whatever stage of the preparation a run dies in, the same command works afterwards."""
    stages = ["lease/00001.json", "calibration", "calibration/windows.parquet", "run.yaml"]
    for number, stage in enumerate(stages):
        output = tmp_path / str(number)
        running = start("run", place / "run.yaml", f"output.path={output}")
        running.wait_until(lambda stage=stage, output=output: (output / stage).exists())
        running.send(signal.SIGKILL)
        running.wait()
        finished = shardprune("run", place / "run.yaml", f"output.path={output}")
        assert finished.code == 0, (stage, finished.err)
        assert digests(output / "model") == digests(place / "undisturbed" / "model"), stage


@pytest.mark.parametrize("num_committed", [1, 2, 5])
def test_it_goes_on_from_the_newest_kept_entry(num_committed: int, place: Path, out: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    found = killed_after(place, out, output, num_committed)
    entries = [int(file.stem.split("-")[1]) for file in (output / "activations").glob("layer-*-0.npy")]
    usable = max((entry for entry in entries if entry <= found), default=0)
    finished = shardprune("run", place / "run.yaml", out)
    assert finished.code == 0, finished.err
    receipts = all_receipts(output)
    replayed = {receipt.layer_index: receipt.num_layers_replayed for receipt in receipts if receipt.num_layers_replayed}
    assert replayed == ({found: found - usable} if usable < found < NUM_LAYERS else {})
    assert found - usable <= KEPT_EVERY or found == NUM_LAYERS
    assert [receipt.attempt for receipt in receipts] == [1] * found + [2] * (NUM_LAYERS - found)
    assert digests(output / "model") == digests(place / "undisturbed" / "model")


@pytest.mark.parametrize(
    ("number", "granularity"), [(signal.SIGTERM, "auto"), (signal.SIGINT, "auto"), (signal.SIGTERM, "layer")]
)
def test_a_signal_stops_it_with_75_and_it_resumes(
    number: signal.Signals, granularity: str, place: Path, out: str, tmp_path: Path
) -> None:
    output, wanted, chosen = tmp_path / "out", place / "undisturbed", f"pruning.granularity={granularity}"
    if granularity != "auto":
        wanted = tmp_path / "undisturbed"
        assert shardprune("run", place / "run.yaml", chosen, f"output.path={wanted}").code == 0
    running = start("run", place / "run.yaml", out, chosen)
    running.wait_until(lambda: len(receipt_files(output)) >= 2)
    running.send(number)
    stopped = running.wait()
    assert stopped.code == 75
    told = sentence(stopped)
    assert "stopped by a signal" in told and "run again" in told
    assert json.loads((output / "lease" / "00001.json").read_text())["released"]
    assert not [name for name in digests(output) if ".tmp-" in name]
    assert shardprune("run", place / "run.yaml", out, chosen).code == 0
    assert digests(output / "model") == digests(wanted / "model")


def test_what_leaves_the_bytes_alone_may_change_on_resume(place: Path, out: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    text = save_text(tmp_path / "text.txt", 100)
    killed_after(place, out, output, 3)
    overrides = [
        "output.keep_entry_every=3",
        "cluster.num_shards=4",
        "runtime.ram_bytes=1",
        f"evaluation.text={text}",
        "runtime.threads=auto",
        "runtime.micro_batch_tokens=auto",
    ]
    finished = shardprune("run", place / "run.yaml", out, *overrides)
    assert finished.code == 0, finished.err
    assert digests(output / "model") == digests(place / "undisturbed" / "model")


def test_a_run_whose_sparsity_changed_is_refused_and_left_alone(place: Path, out: str, tmp_path: Path) -> None:
    killed_after(place, out, tmp_path / "out", 3)
    before, written = digests(tmp_path / "out"), modified_ns(tmp_path / "out")
    told = refusal("run", place / "run.yaml", out, "pruning.sparsity=0.625")
    assert "pruning.sparsity was 0.5, now 0.625" in told and "output.path" in told
    assert (digests(tmp_path / "out"), modified_ns(tmp_path / "out")) == (before, written)


@pytest.fixture
def begun(place: Path, tmp_path: Path) -> Iterator[Path]:
    """A run of which some layers are committed."""
    shutil.copytree(place / "undisturbed", tmp_path / "out")
    output = tmp_path / "out"
    for file in [*receipt_files(output)[4:], output / "model" / "model.safetensors.index.json"]:
        file.unlink()
    for number in (1, 6, 7):
        (output / "model" / f"model-{number:05d}-of-00007.safetensors").unlink()
    yield output


def test_the_copy_of_a_begun_run_goes_on(begun: Path, place: Path, out: str) -> None:
    assert shardprune("run", place / "run.yaml", out).code == 0
    assert digests(begun / "model") == digests(place / "undisturbed" / "model")


def test_a_receipt_of_another_run_is_refused(begun: Path, place: Path, out: str) -> None:
    file = receipt_files(begun)[2]
    file.write_text(json.dumps({**json.loads(file.read_text()), "fingerprint": "0" * 64}))
    committed = digests(begun / "model")
    told = refusal("run", place / "run.yaml", out)
    assert "layer 2" in told and "other settings" in told
    assert digests(begun / "model") == committed


@pytest.mark.parametrize("content", ["", "[]", '{"layer_index": 2}'])
def test_a_receipt_that_cannot_be_read_is_refused(content: str, begun: Path, place: Path, out: str) -> None:
    receipt_files(begun)[2].write_text(content)
    assert "layer-00002.json" in refusal("run", place / "run.yaml", out)


def _flip_last_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


@pytest.mark.parametrize("damage", [_flip_last_byte, _cut, Path.unlink])
def test_a_damaged_layer_is_refused_and_mended_by_the_advice(damage: Any, begun: Path, place: Path, out: str) -> None:
    damage(begun / "model" / "model-00004-of-00007.safetensors")
    told = refusal("run", place / "run.yaml", out)
    assert "layer 2" in told and "model-00004-of-00007.safetensors" in told
    _follow_advice(told, begun)
    assert shardprune("run", place / "run.yaml", out).code == 0
    assert digests(begun / "model") == digests(place / "undisturbed" / "model")


def test_a_layer_damaged_after_the_end_is_mended_by_the_advice(place: Path, out: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(place / "undisturbed", output)
    _flip_last_byte(output / "model" / "model-00004-of-00007.safetensors")
    told = refusal("run", place / "run.yaml", out)
    _follow_advice(told, output)
    finished = shardprune("run", place / "run.yaml", out)
    assert finished.code == 0, finished.err
    assert digests(output / "model") == digests(place / "undisturbed" / "model")


def _follow_advice(told: str, output: Path) -> None:
    """The sentence says: delete the receipts from layer-00002.json on and run again."""
    assert "delete the receipts from layer-00002.json on and run again" in told
    for file in receipt_files(output)[2:]:
        file.unlink()


@pytest.mark.parametrize("name", ["model-00001-of-00007.safetensors", "config.json", "tokenizer.json"])
def test_exit_code_0_means_that_the_model_is_complete(name: str, place: Path, out: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(place / "undisturbed", output)
    (output / "model" / name).unlink()
    finished = shardprune("run", place / "run.yaml", out)
    assert finished.code == 2 or digests(output / "model") == digests(place / "undisturbed" / "model")


def test_what_a_killed_process_left_half_written_is_removed(begun: Path, place: Path, out: str) -> None:
    left = [begun / folder / "something.tmp-123" for folder in ("model", "receipts", "metrics", ".")]
    left.append(begun / "model" / ".tmpdOdZwK")
    for file in left:
        file.write_text("half")
    assert shardprune("run", place / "run.yaml", out).code == 0
    assert not any(file.exists() for file in left)


def test_what_a_lost_worker_left_is_not_in_the_finished_model(place: Path, out: str, tmp_path: Path) -> None:
    prepared = prepare(load_config(place / "run.yaml", [out]), Machine(1, False), print)

    def on_layer(receipt: Receipt) -> None:
        (tmp_path / "out" / "model" / f"{receipt.file}.tmp-123-abc").write_bytes(b"half")

    with opened(prepared) as (guard, _):
        run_locally(begin(prepared, guard, lambda job: []), prepared, on_layer)
    assert digests(tmp_path / "out" / "model") == digests(place / "undisturbed" / "model")


def test_metrics_of_every_layer_are_there_after_a_kill(place: Path, out: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    killed_after(place, out, output, 4)
    assert shardprune("run", place / "run.yaml", out).code == 0
    assert len(list((output / "metrics").glob("layer-*.parquet"))) == NUM_LAYERS


def test_a_finished_run_evaluates_when_asked_later(place: Path, out: str, tmp_path: Path) -> None:
    output, text = tmp_path / "out", save_text(tmp_path / "text.txt", 100)
    shutil.copytree(place / "undisturbed", output)
    before = modified_ns(output / "model")
    finished = shardprune("run", place / "run.yaml", out, f"evaluation.text={text}")
    assert finished.code == 0 and "| pruned |" in finished.out, finished.err
    assert modified_ns(output / "model") == before
    text.write_text(" ".join(f"w{token}" for token in random_ids(1, 100, seed=9)[0].tolist()))
    again = shardprune("run", place / "run.yaml", out, f"evaluation.text={text}")
    assert again.out.split("| dense |")[1] != finished.out.split("| dense |")[1], "another text, other figures"


# --- a full disk


@pytest.mark.parametrize("max_file_bytes", [1000, 3000, 8000, 20000])
def test_a_file_that_does_not_fit_stops_it_with_75(max_file_bytes: int, place: Path, out: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    stopped = shardprune("run", place / "run.yaml", out, max_file_bytes=max_file_bytes)
    assert stopped.code == 75, stopped
    assert "run again to resume" in sentence(stopped)
    assert not (output / "model" / "model.safetensors.index.json").exists()
    for receipt in all_receipts(output):
        assert receipt.sha256 == digests(output / "model")[receipt.file]
    finished = shardprune("run", place / "run.yaml", out)
    assert finished.code == 0, finished.err
    assert digests(output / "model") == digests(place / "undisturbed" / "model")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few hundred kilobytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") is not None and os.geteuid() == 0
    if mounted:
        command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    if not mounted:
        pytest.skip("mounting a small file system needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def _fill(folder: Path, leave_bytes: int) -> Path:
    """Take up all room but some; delete the file to have it back."""
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    filler = folder / "filler"
    with filler.open("wb") as file:
        file.write(b"\0" * max(0, free - leave_bytes))
    return filler


@pytest.mark.parametrize("left_bytes", [0, 16384, 150 * 1024])
def test_a_full_disk_stops_it_with_75_and_room_lets_it_go_on(left_bytes: int, small_disk: Path, place: Path) -> None:
    output = small_disk / "out"
    filler = _fill(small_disk, left_bytes)
    stopped = shardprune("run", place / "run.yaml", f"output.path={output}")
    assert stopped.code == 75, stopped
    told = sentence(stopped)
    assert "disk is full" in told or os.strerror(errno.ENOSPC) in told or "of disk are needed" in told
    for receipt in all_receipts(output):
        assert receipt.sha256 == digests(output / "model")[receipt.file]
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    finished = shardprune("run", place / "run.yaml", f"output.path={output}")
    assert finished.code == 0, finished.err
    assert digests(output / "model") == digests(place / "undisturbed" / "model")


class Killed(Exception):
    """Stands for a SIGKILL at one moment."""


class MortalHidden(Hidden):
    """Dies when a layer is committed and the input of the next one is about to be kept."""

    dies_before_layer = 0

    def keep(self, layer_index: int, always: bool = False) -> None:
        if layer_index == self.dies_before_layer and layer_index not in self.job.progress().entries:
            raise Killed
        super().keep(layer_index, always)


def test_killed_before_every_kept_input_it_still_replays_few_layers(place: Path, tmp_path: Path) -> None:
    config = load_config(place / "run.yaml", [f"output.path={tmp_path}/out"])
    for dies_before_layer in (2, 4, NUM_LAYERS):
        prepared = prepare(config, Machine(num_cores=1, has_cuda=False), print)
        with opened(prepared) as (guard, _), suppress(Killed):
            job = begin(prepared, guard, survey_locally)
            worker = ShardWorker(job)
            worker.hidden = hidden = MortalHidden(job, worker.skeleton, worker.replicas, None)
            hidden.dies_before_layer = dies_before_layer
            for stretch in job.work_left().stretches:
                prune_locally(worker, stretch, lambda receipt: None)
    assert [receipt.num_layers_replayed for receipt in all_receipts(tmp_path / "out")] == [0, 0, 2, 0, 2, 0]
