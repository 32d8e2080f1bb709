"""Texts generated on Ray Data are those of the single process: any number of generators, whoever is killed."""

import queue
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import torch
from command import Finished, Running, shardprune, start
from tiny import build_model, digests, save_model, save_tokenizer, save_windows, selfgen, write_config

from cluster.generate import Shift, describe
from cluster.session import Waiter
from pipeline import lease
from pipeline.lease import LeaseGuard, LeaseLost

NUM_TEXTS, BATCH_SIZE = 60, 2
NUM_BATCHES = NUM_TEXTS // BATCH_SIZE

on_ray = pytest.mark.ray


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that writes its own calibration data, and in alone/ what one process makes of it."""
    folder = tmp_path_factory.mktemp("generate")
    save_tokenizer(save_model(folder / "model", "llama"))
    windows = save_windows(folder / "windows.parquet", 8, 16)
    source = selfgen(num_texts=NUM_TEXTS, batch_size=BATCH_SIZE, sampling={"max_new_tokens": 48})
    settings = {"calibration.source": source, "calibration.windows": "across", "cluster.worker.num_cpus": 0.3}
    write_config(folder / "run.yaml", folder / "model", windows, folder / "alone", **settings)
    assert shardprune("run", folder / "run.yaml").code == 0
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def command(name: str, place: Path, out: Path, num_generators: int, *overrides: str) -> list[object]:
    """Arguments that have a command of `place` run on a Ray of its own, into another folder."""
    on_cluster = ["cluster.address=local", f"cluster.num_generators={num_generators}", f"output.path={out}"]
    return [name, place / "run.yaml", *on_cluster, *overrides]


def batch_files(out: Path) -> list[Path]:
    """The batches that are on disk."""
    return sorted(out.glob("calibration/selfgen-*/batches/from-row-*.parquet"))


def batches_written(out: Path) -> dict[str, int]:
    """When each of them was written."""
    return {file.name: file.stat().st_mtime_ns for file in batch_files(out)}


def rows_file(out: Path) -> Path:
    (file,) = out.glob("calibration/selfgen-*/rows.parquet")
    return file


def end(running: Running, number: signal.Signals) -> Finished:
    """Send a signal; what a killed command leaves of Ray is ended too."""
    processes = psutil.Process(running.process.pid).children(recursive=True)
    running.send(number)
    finished = running.wait()
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    return finished


def end_in_the_middle(running: Running, out: Path, num_batches: int, number: signal.Signals) -> Finished:
    """Send a signal as soon as so many batches are written."""
    assert running.wait_until(lambda: len(batch_files(out)) >= num_batches, seconds=120)
    finished = end(running, number)
    assert num_batches <= len(batch_files(out)) < NUM_BATCHES
    return finished


def generators_of(running: Running) -> Iterator[psutil.Process]:
    for child in psutil.Process(running.process.pid).children(recursive=True):
        try:
            if child.cmdline() and child.cmdline()[0].startswith("ray::Map"):
                yield child
        except psutil.Error:
            continue


def refusal_of(finished: Finished) -> str:
    """The one sentence of a command that refused, after the line with which Ray's core names its log level."""
    assert finished.code == 2, (finished.code, finished.err[-1000:])
    (told,) = [line for line in finished.err.strip().splitlines() if "Set ray log level" not in line]
    return told


@on_ray
def test_several_generators_give_the_bytes_of_one_process(place: Path, out: Path) -> None:
    finished = shardprune(*command("calibrate", place, out, 3))
    assert finished.code == 0, finished.err
    assert digests(out / "calibration") == digests(place / "alone" / "calibration")
    assert f"text {NUM_TEXTS}/{NUM_TEXTS}" in finished.out
    assert "generators, busy" in finished.out


@on_ray
def test_a_killed_generator_is_replaced(place: Path, out: Path) -> None:
    running = start(*command("calibrate", place, out, 2))
    assert running.wait_until(lambda: len(batch_files(out)) >= 3, seconds=120)
    next(generators_of(running)).kill()
    assert len(batch_files(out)) < NUM_BATCHES
    finished = running.wait()
    assert finished.code == 0, finished.err
    assert digests(out / "calibration") == digests(place / "alone" / "calibration")


@on_ray
def test_a_run_stopped_and_killed_while_it_generates_loses_nothing_and_writes_nothing_twice(
    place: Path, out: Path
) -> None:
    """With another number of generators every time: it is the same run."""
    stopped = end_in_the_middle(start(*command("run", place, out, 3)), out, 3, signal.SIGTERM)
    assert stopped.code == 75
    assert stopped.err.strip().splitlines()[-1].startswith("shardprune: stopped by a signal")
    assert "Traceback" not in stopped.err and "Started a local Ray" not in stopped.err
    written = batches_written(out)

    num_more = len(written) + 3
    killed = end_in_the_middle(start(*command("run", place, out, 2)), out, num_more, signal.SIGKILL)
    assert killed.code == -signal.SIGKILL
    assert written.items() <= batches_written(out).items()
    written = batches_written(out)

    finished = shardprune(*command("run", place, out, 1))
    assert finished.code == 0, finished.err
    assert written.items() <= batches_written(out).items()
    assert len(batches_written(out)) == NUM_BATCHES
    assert digests(out / "calibration") == digests(place / "alone" / "calibration")
    assert digests(out / "model") == digests(place / "alone" / "model")


@on_ray
def test_weights_that_are_not_numbers_are_refused_and_what_is_written_stays(place: Path, out: Path) -> None:
    texts = [set(ids) for ids in pq.read_table(rows_file(place / "alone"))["token_ids"].to_pylist()]
    first_row_with = {token: next(i for i, ids in enumerate(texts) if token in ids) for token in set.union(*texts)}
    late_token, first_row = max(first_row_with.items(), key=lambda item: item[1])
    assert first_row >= 2 * BATCH_SIZE
    model = build_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[late_token] = torch.nan
    model.save_pretrained(place / "late")
    save_tokenizer(place / "late")

    finished = shardprune(*command("calibrate", place, out, 1, f"model.path={place / 'late'}"))
    told = refusal_of(finished)
    assert told.startswith(f"shardprune: generating texts {first_row // BATCH_SIZE * BATCH_SIZE} to ")
    assert "not finite" in told and "model.dtype" in told
    kept = [ids for file in batch_files(out) for ids in pq.read_table(file)["token_ids"].to_pylist()]
    assert len(kept) == first_row // BATCH_SIZE * BATCH_SIZE
    assert kept == pq.read_table(rows_file(place / "alone"))["token_ids"].to_pylist()[: len(kept)]


@on_ray
def test_a_generator_that_never_fits_is_refused(place: Path, out: Path) -> None:
    running = start(*command("calibrate", place, out, 1, "cluster.worker.num_cpus=4096"))
    running.process.join(60)
    if running.process.is_alive():
        end(running, signal.SIGKILL)
        pytest.fail("it waits for ever")
    told = refusal_of(running.wait())
    assert "cluster.worker" in told and "4096" in told
    assert not batch_files(out)


def shift(generator: str, started: float, ended: float) -> Shift:
    return Shift(generator, started, ended)


@pytest.mark.parametrize(
    ("shifts", "told"),
    [
        ([shift("a", 100, 110)], ["1 generator", "100%", "10.0 s"]),
        ([shift("a", 0, 10), shift("a", 15, 20)], ["1 generator", "75%", "20.0 s"]),
        ([shift("a", 0, 10), shift("b", 0, 10), shift("b", 10, 20)], ["2 generators", "75%", "20.0 s"]),
        ([shift("b", 4, 8), shift("a", 0, 8), shift("c", 2, 8)], ["3 generators", "75%", "8.0 s"]),
    ],
)
def test_how_busy_generators_were(shifts: list[Shift], told: list[str]) -> None:
    for order in (shifts, shifts[::-1]):
        assert all(part in describe(order) for part in told), describe(order)


@pytest.fixture
def held(tmp_path: Path) -> Iterator[LeaseGuard]:
    held, _ = lease.acquire(tmp_path)
    yield held.guard
    held.release()


def test_results_of_another_thread_come_in_their_order(held: LeaseGuard) -> None:
    told: list[str] = []
    results: queue.Queue[int | None] = queue.Queue(maxsize=1)

    def give() -> None:
        for result in (3, 1, None, 2):
            time.sleep(0.01)
            results.put(result)

    threading.Thread(target=give).start()
    waiter = Waiter(held, told.append)
    assert [waiter.next(results, "waiting") for _ in range(4)] == [3, 1, None, 2]
    assert told == []


def test_waiting_ends_where_the_lease_is_lost(held: LeaseGuard) -> None:
    (held.directory / lease.LEASE_NAME / "00001.json").unlink()
    with pytest.raises(LeaseLost):
        Waiter(held, print).next(queue.Queue(), "waiting")
