"""One writer at a time: a live one is left alone, a dead one replaced at once, a replaced one writes nothing more."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from command import CONTEXT, refusal, sentence, shardprune, start
from s3 import Server
from tiny import digests, modified_ns, save_model, save_windows, write_config

from pipeline import bucket
from pipeline.config_file import load_config
from pipeline.errors import Incomplete, Refusal
from pipeline.lease import LEASE_NAME, LeaseGuard, LeaseLost, acquire, refuse_live
from pipeline.local import run_locally, survey_locally
from pipeline.preparation import begin, opened, prepare
from pipeline.runtime import Machine
from pipeline.storage import Location, locate, status

ASLEEP = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]


def lease_file(directory: Path) -> Path:
    """The newest lease."""
    return max((directory / LEASE_NAME).iterdir())


def read(directory: Path) -> dict[str, Any]:
    holder: dict[str, Any] = json.loads(lease_file(directory).read_text())
    return holder


def rewrite(directory: Path, process: dict[str, Any] | None = None, **changes: Any) -> None:
    holder = read(directory)
    changed = {**holder, **changes, "process": {**holder["process"], **(process or {})}}
    lease_file(directory).write_text(json.dumps(changed))


def end(directory: Path) -> None:
    """As if nobody had renewed the lease for an hour."""
    an_hour_ago = time.time() - 3600
    os.utime(lease_file(directory), (an_hour_ago, an_hour_ago))


def leave_to(directory: Path, pid: int, started: str | None = None) -> None:
    """A lease that lies there as if the process had taken it."""
    lease, _ = acquire(directory)
    lease.release()
    start_of_process = started or Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    rewrite(directory, {"pid": pid, "started": start_of_process}, owner="somebody", released=False)


def test_a_released_lease_is_free_and_numbers_only_grow(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        lease, taken_over = acquire(tmp_path)
        assert taken_over is None
        lease.guard.check()
        assert read(tmp_path)["process"]["pid"] == os.getpid() and lease.guard.number == number
        lease.release()
        assert [file.name for file in (tmp_path / LEASE_NAME).iterdir()] == [f"{number:05d}.json"]
        with pytest.raises(LeaseLost):
            lease.guard.check()


def test_the_lease_of_a_live_process_is_refused_until_it_dies(tmp_path: Path) -> None:
    with subprocess.Popen(ASLEEP) as process:
        leave_to(tmp_path, process.pid)
        before = digests(tmp_path)
        for attempt in (refuse_live, acquire):
            with pytest.raises(Refusal) as refused:
                attempt(tmp_path)
            assert str(process.pid) in str(refused.value) and str(tmp_path) in str(refused.value)
        assert digests(tmp_path) == before
        process.kill()
    refuse_live(tmp_path)
    lease, taken_over = acquire(tmp_path)
    assert taken_over is not None and str(process.pid) in taken_over and "dead" in taken_over
    lease.release()


def test_a_killed_process_that_nobody_has_waited_for_is_dead(tmp_path: Path) -> None:
    """In containers whose first process reaps no children, the dead stay in /proc as zombies."""
    with subprocess.Popen(ASLEEP) as process:
        leave_to(tmp_path, process.pid)
        process.kill()
        stat = Path(f"/proc/{process.pid}/stat")
        while stat.read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.001)
        lease, taken_over = acquire(tmp_path)
        lease.release()
    assert taken_over is not None and "dead" in taken_over


def test_another_process_with_the_same_number_is_not_the_owner(tmp_path: Path) -> None:
    leave_to(tmp_path, os.getpid(), started="1")
    lease, taken_over = acquire(tmp_path)
    lease.release()
    assert taken_over is not None and "dead" in taken_over


def test_a_process_of_which_nothing_is_told_is_not_known_to_be_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of another user, where /proc is mounted with hidepid."""
    leave_to(tmp_path, os.getpid(), started="1")
    monkeypatch.setattr("pipeline.process._started", lambda pid: "unknown")
    with pytest.raises(Refusal, match="is running it"):
        acquire(tmp_path)


@pytest.mark.parametrize("elsewhere", [{"host": "elsewhere"}, {"boot": "another"}, {"pid_namespace": "pid:[1]"}])
def test_on_another_host_only_the_end_of_the_lease_tells(elsewhere: dict[str, str], tmp_path: Path) -> None:
    leave_to(tmp_path, 1, started="1")
    rewrite(tmp_path, elsewhere)
    with pytest.raises(Incomplete, match="is running it"):
        acquire(tmp_path)
    end(tmp_path)
    lease, taken_over = acquire(tmp_path)
    assert taken_over is not None and "let its lease end" in taken_over
    lease.release()


def test_a_guard_raises_once_another_owns_the_lease(tmp_path: Path) -> None:
    first, _ = acquire(tmp_path)
    end(tmp_path)
    with pytest.raises(LeaseLost, match="ended"):
        first.guard.check()
    second, taken_over = acquire(tmp_path)
    assert taken_over is not None
    with pytest.raises(LeaseLost, match="taken this run over"):
        first.guard.check()
    first.release()
    second.guard.check()
    second.release()
    assert issubclass(LeaseLost, Incomplete)


def test_a_guard_without_any_lease_raises(tmp_path: Path) -> None:
    with pytest.raises(LeaseLost):
        LeaseGuard(tmp_path, "nobody", 1).check()
    with pytest.raises(LeaseLost):
        LeaseGuard(tmp_path / "gone", "nobody", 1).check()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"owner": "x"}'])
def test_a_lease_that_cannot_be_read_ends_in_a_sentence_or_is_taken_over(
    content: str, place: Path, tmp_path: Path
) -> None:
    """A host that loses power can leave an empty file."""
    output = tmp_path / "out"
    (output / LEASE_NAME).mkdir(parents=True)
    (output / LEASE_NAME / "00001.json").write_text(content)
    finished = shardprune("run", place / "run.yaml", f"output.path={output}")
    if finished.code == 0:
        assert digests(output / "model") == digests(place / "undisturbed" / "model")
    else:
        assert finished.code == 2
        assert "00001.json" in sentence(finished)


# --- with runs


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    source = save_model(folder / "model", "llama", num_hidden_layers=6, max_shard_size="30KB")
    windows = save_windows(folder / "windows.parquet", 24, 32)
    write_config(folder / "run.yaml", source, windows, folder / "undisturbed", "sparsegpt")
    assert shardprune("run", folder / "run.yaml").code == 0
    return folder


def paused(place: Path, output: Path) -> Any:
    """A run that is stopped in the middle, alive and unable to do anything."""
    running = start("run", place / "run.yaml", f"output.path={output}")
    assert running.wait_until((output / "receipts" / "layer-00001.json").exists)
    running.send(signal.SIGSTOP)
    stat = Path(f"/proc/{running.process.pid}/stat")
    # it goes on for a moment, and may delete what it wrote for a while
    assert running.wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T")
    return running


def test_a_live_run_is_left_alone(place: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    running = paused(place, output)
    before, written = digests(output), modified_ns(output)
    told = refusal("run", place / "run.yaml", f"output.path={output}")
    assert str(running.process.pid) in told and str(output) in told and "is running it" in told
    assert (digests(output), modified_ns(output)) == (before, written)
    running.send(signal.SIGCONT)
    assert running.wait().code == 0
    assert digests(output / "model") == digests(place / "undisturbed" / "model")


def test_a_killed_run_is_taken_over_at_once_with_a_sentence(place: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    running = paused(place, output)
    pid = running.process.pid
    running.send(signal.SIGKILL)
    running.wait()
    finished = shardprune("run", place / "run.yaml", f"output.path={output}")
    assert finished.code == 0, finished.err
    assert f"taking over from process {pid} on" in finished.out and "is dead" in finished.out
    assert digests(output / "model") == digests(place / "undisturbed" / "model")


@pytest.mark.parametrize("another_finishes", [True, False])
def test_a_run_that_wakes_after_its_lease_writes_nothing(another_finishes: bool, place: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    running = paused(place, output)
    end(output)  # as if it had slept for longer than its lease lasts
    if another_finishes:
        finished = shardprune("run", place / "run.yaml", f"output.path={output}")
        assert finished.code == 0, finished.err
        assert "let its lease end" in finished.out
    else:
        other, _ = acquire(output)
    before, written = digests(output), modified_ns(output)
    running.send(signal.SIGCONT)
    woken = running.wait()
    assert woken.code == 75
    assert "taken this run over" in sentence(woken)
    if not another_finishes:
        before = {name: digest for name, digest in before.items() if ".tmp-" not in name}
        written = {name: modified for name, modified in written.items() if ".tmp-" not in name}
    assert (digests(output), modified_ns(output)) == (before, written)
    if not another_finishes:
        other.release()


def test_two_that_start_together_do_not_both_run(place: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.rmtree(output, ignore_errors=True)
    both = [start("run", place / "run.yaml", f"output.path={output}") for _ in range(2)]
    finished = [running.wait() for running in both]
    codes = sorted(ended.code or 0 for ended in finished)
    assert codes in ([0, 0], [0, 2]), finished
    told = [sentence(ended) for ended in finished if ended.code]
    assert all("is running it" in each for each in told), told
    assert digests(output / "model") == digests(place / "undisturbed" / "model")
    receipts = [json.loads(file.read_text()) for file in (output / "receipts").iterdir()]
    assert {receipt["attempt"] for receipt in receipts} == {1}


# --- on every storage


@pytest.fixture(params=["local", "s3", "gs"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    return (
        tmp_path / "out" if request.param == "local" else locate(request.getfixturevalue("s3").new_url(request.param))
    )


def written(directory: Location) -> dict[str, tuple[float, bytes]]:
    """Every file of a run but its lease, with when it was written; half of one is none."""
    files = [file for file in directory.rglob("*") if file.is_file() and ".tmp-" not in file.name]
    return {str(file): (status(file).modified, file.read_bytes()) for file in files if file.parent.name != LEASE_NAME}


def test_a_lease_is_renewed_while_its_owner_lives(directory: Location) -> None:
    lease, _ = acquire(directory, lasts_seconds=2)
    time.sleep(4)
    lease.guard.check()
    with pytest.raises(Refusal, match="is running it"):
        acquire(directory)
    lease.release()
    refuse_live(directory)


def test_an_owner_that_was_replaced_never_comes_back(directory: Location) -> None:
    """Not even when the one that replaced it has ended."""
    first, _ = acquire(directory)
    file = directory / LEASE_NAME / "00001.json"
    content = json.loads(file.read_bytes())
    ended = json.dumps({**content, "lasts_seconds": -1.0}).encode()
    file.write_bytes(ended)
    second, taken_over = acquire(directory)
    assert taken_over is not None and "let its lease end" in taken_over
    assert second.guard.number == 2 and not file.exists()
    second.release()
    file.write_bytes(json.dumps(content).encode())  # as a renewal that was under way for long
    with pytest.raises(LeaseLost, match="taken this run over"):
        first.guard.check()
    assert not first.guard.is_ours
    first.release()
    third, taken_over = acquire(directory)
    assert third.guard.number == 3 and taken_over is None
    third.release()


def test_a_guard_can_be_sent_anywhere_and_knows_its_own(directory: Location) -> None:
    lease, _ = acquire(directory)
    guard = pickle.loads(pickle.dumps(lease.guard))
    guard.check()
    assert guard.is_ours and not LeaseGuard(directory, "somebody else", 1).is_ours
    lease.release()


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_request_that_hangs_does_not_cost_the_lease(s3: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bucket._PATIENCE_SECONDS, True, (1.0, 2.0))
    directory, before = locate(s3.new_url()), s3.num_hanging()
    lease, _ = acquire(directory, lasts_seconds=24)
    file = directory / LEASE_NAME / "00001.json"
    s3.behave("hang PUT once")
    wait_until(lambda: s3.num_hanging() > before)
    renewed = status(file).modified
    wait_until(lambda: status(file).modified > renewed)
    lease.guard.check()
    lease.release()


def test_a_renewal_that_hangs_is_left_to_itself_at_the_end(s3: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store would not take the farewell either."""
    monkeypatch.setattr("pipeline.lease._LAST_RENEWAL_SECONDS", 0.1)
    directory, before = locate(s3.new_url()), s3.num_hanging()
    lease, _ = acquire(directory, lasts_seconds=12)
    s3.behave("hang PUT")
    wait_until(lambda: s3.num_hanging() == before + 1)
    lease.release()
    assert s3.num_hanging() == before + 1


def race(environment: dict[str, str], url: str, connection: Connection) -> None:
    """Take the lease of a folder at the moment that one is told, and say whether that worked, again and again."""
    os.environ.update(environment)
    while number := connection.recv():
        directory = locate(url) / str(number)
        moment = connection.recv()
        while time.time() < moment:
            pass
        try:
            lease, _ = acquire(directory)
        except Refusal:
            connection.send(False)
            continue
        connection.send(True)
        connection.recv()
        lease.release()


def test_of_processes_that_race_for_a_lease_exactly_one_wins(directory: Location) -> None:
    processes, connections = [], []
    for _ in range(3):
        ours, theirs = CONTEXT.Pipe()
        processes.append(CONTEXT.Process(target=race, args=(dict(os.environ), str(directory), theirs)))
        connections.append(ours)
        processes[-1].start()
    winners: list[int] = []
    for number in range(1, 41):
        for connection in connections:
            connection.send(number)
        moment = time.time() + 0.005
        for connection in connections:
            connection.send(moment)
        won = [connection.recv() for connection in connections]
        assert sum(won) == 1, (number, won)
        winners.append(won.index(True))
        connections[won.index(True)].send("release")
    for connection, process in zip(connections, processes, strict=True):
        connection.send(0)
        process.join(30)
        assert process.exitcode == 0
    assert len(set(winners)) > 1, "nobody raced"


def drive(environment: dict[str, str], config: Path, output: str, lasts_seconds: float) -> None:
    """What `shardprune run` does in one process, with a lease that ends soon."""
    os.environ.update(environment)
    settings = load_config(config, [f"output.path={output}"])
    prepared = prepare(settings, Machine(num_cores=1, has_cuda=False), print)
    try:
        with opened(prepared, lasts_seconds) as (guard, _):
            job = begin(prepared, guard, survey_locally)
            run_locally(job, prepared, lambda receipt: None)
    except LeaseLost:
        raise SystemExit(75) from None


@pytest.mark.parametrize("another_finishes", [True, False])
def test_a_driver_stopped_past_its_lease_and_replaced_commits_nothing(
    another_finishes: bool, directory: Location, place: Path
) -> None:
    stopped = CONTEXT.Process(target=drive, args=(dict(os.environ), place / "run.yaml", str(directory), 2.0))
    stopped.start()
    while not (directory / "receipts" / "layer-00001.json").exists():
        assert stopped.is_alive()
    os.kill(stopped.pid or 0, signal.SIGSTOP)
    again = ("run", place / "run.yaml", f"output.path={directory}")
    assert f"process {stopped.pid} on" in refusal(*again)
    time.sleep(3)
    if another_finishes:
        finished = shardprune(*again)
        assert finished.code == 0 and "let its lease end" in finished.out, finished
    else:
        other, taken_over = acquire(directory)
        assert taken_over is not None and "let its lease end" in taken_over
    before = written(directory)
    os.kill(stopped.pid or 0, signal.SIGCONT)
    stopped.join(60)
    assert stopped.exitcode == 75
    assert written(directory) == before
    if not another_finishes:
        other.release()
        assert shardprune(*again).code == 0
    wanted = {file.name: file.read_bytes() for file in (place / "undisturbed" / "model").iterdir()}
    assert {file.name: file.read_bytes() for file in (directory / "model").iterdir()} == wanted
