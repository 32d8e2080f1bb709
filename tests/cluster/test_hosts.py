"""Two hosts that are really two, with a cable between them: the bytes of one process, and no folder that only has the
same name."""

import itertools
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import s3
from hosts import PORT, Host, Network, why_not
from outcome import Receipts
from s3 import BUCKET, access
from tiny import digests, modified_ns, save_model, save_windows, write_config

from pipeline.lease import LASTS_SECONDS

pytestmark = [pytest.mark.ray, pytest.mark.skipif(why_not() is not None, reason=why_not() or "")]

FIRST, S3_PORT = "10.99.0.1", 9000
SHARDPRUNE = Path(sys.executable).parent / "shardprune"


@dataclass
class Two:
    """The hosts, room for one worker on each, and a folder of which each has another one."""

    first: Host
    second: Host
    config: Path
    not_shared: Path

    def command(self, *overrides: object, on_second: bool = False) -> list[str]:
        address = f"cluster.address={self.first.address}:{PORT}"
        host = self.second if on_second else self.first
        return host.command(SHARDPRUNE, "run", self.config, address, *overrides)

    def alone(self, *overrides: str) -> dict[str, str]:
        """The files of a single process."""
        output = self.config.parent / "-".join(["alone", *overrides])
        if not output.exists():
            command = [SHARDPRUNE, "run", self.config, *overrides, f"output.path={output}"]
            subprocess.run(command, check=True, capture_output=True)
        return digests(output / "model")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    folder = tmp_path_factory.mktemp("hosts")
    save_model(folder / "model", "llama", num_hidden_layers=6, hidden_size=192, intermediate_size=512)
    save_windows(folder / "windows.parquet", 192, 64, 96)
    settings = {"runtime.micro_batch_tokens": 1024, "output.keep_entry_every": 2}
    config = folder / "run.yaml"
    write_config(config, folder / "model", folder / "windows.parquet", folder / "out", method="sparsegpt", **settings)
    not_shared = folder / "not-shared"
    with Network(access(f"http://{FIRST}:{S3_PORT}")) as network:
        first, second = (network.host(name, {not_shared: "100m"}) for name in ("first", "second"))
        for host in (first, second):
            host.start_ray(first, 1)
        yield Two(first, second, config, not_shared)


def test_a_folder_of_which_each_host_has_another_one_is_refused(two: Two) -> None:
    """Replicas begin together: no host is so quick that the other is not needed any more."""
    command = two.command("cluster.num_replicas=2", f"output.path={two.not_shared}/out")
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2, refused.stderr
    assert refused.stderr.splitlines()[-1].startswith(
        f"shardprune: output.path = {two.not_shared}/out: host second does not see it"
    )


def test_a_bucket_is_the_same_one_for_every_host(two: Two) -> None:
    """As above, with a place that both do see."""
    chosen, url = ["cluster.num_replicas=2"], f"s3://{BUCKET}/out"
    serve = two.first.command(sys.executable, s3.__file__, FIRST, S3_PORT)
    with subprocess.Popen(serve, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            ask(two.first, f"s3.make_bucket('http://{FIRST}:{S3_PORT}')")
            finished = subprocess.run(two.command(*chosen, f"output.path={url}"), capture_output=True, text=True)
            assert finished.returncode == 0, finished.stderr
            assert json.loads(ask(two.first, f"print(json.dumps(s3.digests('{url}/model')))")) == two.alone(*chosen)
        finally:
            server.kill()


def ask(host: Host, program: str) -> str:
    """What some lines about the store print on a host."""
    path = f"PYTHONPATH={Path(s3.__file__).parent}"
    return host.run("env", path, sys.executable, "-c", f"import json, s3; {program}")


@pytest.mark.parametrize(
    "chosen",
    [["cluster.num_shards=2", "pruning.propagation=pruned"], ["cluster.num_replicas=2"]],
    ids=["shards", "replicas"],
)
def test_same_bytes_across_two_hosts(two: Two, tmp_path: Path, chosen: list[str]) -> None:
    """Hidden states, and the sums of replicas, go through the cable: there is room for one worker on each host."""
    finished = subprocess.run(two.command(*chosen, f"output.path={tmp_path}/out"), capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert digests(tmp_path / "out/model") == two.alone(*chosen)


def test_replicas_meet_at_the_interface_of_the_cable(two: Two) -> None:
    program = "import sys; from pipeline.replicas import interface_of; print(*map(interface_of, sys.argv[1:]))"
    asked = [two.second.address, "127.0.0.1", two.first.address]
    assert two.second.run(sys.executable, "-c", program, *asked).split() == ["eth0", "lo", "None"]


def test_same_bytes_when_the_cable_is_cut_and_mended(two: Two, tmp_path: Path) -> None:
    """The host that was cut off still sees the run directory, and ends what it was asked for: it counts once."""
    chosen, out = ["cluster.num_shards=2", "pruning.propagation=shard"], tmp_path / "out"
    wanted = two.alone(*chosen)
    with Receipts(out / "receipts") as receipts:
        process = begin(two.command(*chosen, f"output.path={out}"), receipts, num_committed=2)
        two.second.cut()
        assert process.stdout is not None
        told = list(itertools.takewhile(lambda line: "going on" not in line, process.stdout))
        two.second.mend()
        printed = process.communicate(timeout=120)[0]
    assert process.returncode == 0, [*told, printed]
    receipts.check(2, "the run")
    assert digests(out / "model") == wanted
    # a node that was given up for lost ends when it hears of it
    two.second.kill()
    two.second.start()
    two.second.start_ray(two.first, 1)


@pytest.mark.slow
def test_a_driver_that_sleeps_longer_than_its_lease_lasts_commits_nothing(two: Two, tmp_path: Path) -> None:
    chosen, out = ["cluster.worker.num_cpus=0.5", f"output.path={tmp_path}/out"], tmp_path / "out"
    wanted = two.alone()
    with Receipts(out / "receipts") as receipts:
        process = begin(two.command(*chosen), receipts, num_committed=2)
        (driver,) = psutil.Process(process.pid).children()
        driver.suspend()
        asleep, code = time.monotonic(), 75
        while code == 75:
            another = subprocess.run(two.command(*chosen, on_second=True), capture_output=True, text=True)
            code = another.returncode
            assert code == 0 or "is running it" in another.stderr, another.stderr
        assert time.monotonic() - asleep > LASTS_SECONDS - 10
        assert "let its lease end" in another.stdout
        finished = modified_ns(out)
        driver.resume()
        # nsenter stops with the process it has started
        process.send_signal(signal.SIGCONT)
        printed = process.communicate(timeout=120)[0]
    assert process.returncode == 75, printed
    assert "another process has taken this run over" in printed
    receipts.check(2, "the run")
    assert modified_ns(out) == finished
    assert digests(out / "model") == wanted


def begin(command: list[str], receipts: Receipts, num_committed: int) -> "subprocess.Popen[str]":
    """A run of which some layers are committed."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while len(receipts.seen) < num_committed:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    return process
