"""The size of micro-batches: another than the usual one only where it is clearly faster, and settled once in a run."""

from pathlib import Path

import pytest
import yaml
from command import shardprune
from tiny import digests, save_model, save_windows, write_config

from pipeline.micro_batch import choose, measure_sizes, sizes

LENGTH, NUM_WINDOWS = 16, 128


@pytest.fixture
def config(tmp_path: Path) -> Path:
    model = save_model(tmp_path / "m", "llama")
    windows = save_windows(tmp_path / "windows.parquet", NUM_WINDOWS, LENGTH)
    return write_config(tmp_path / "run.yaml", model, windows, tmp_path / "out")


def settled(output: Path) -> int:
    return int(yaml.safe_load((output / "run.yaml").read_text())["resolved"]["windows_per_micro_batch"])


def test_sizes_are_whole_windows_and_the_usual_one_is_among_them() -> None:
    assert sizes(512, usual=4, most=16) == [1, 2, 4, 8, 16]
    assert sizes(10**6, usual=1, most=4) == [1]
    assert sizes(700, usual=5, most=3) == [1, 2, 5]


def test_a_size_that_is_hardly_faster_is_not_chosen() -> None:
    assert choose({1: 1.0, 2: 0.96, 4: 0.97}, usual=1) == 1
    assert choose({1: 1.0, 2: 0.96, 4: 0.94}, usual=1) == 4


def test_sizes_that_take_long_are_tried_up_to_the_usual_one() -> None:
    assert list(measure_sizes([1, 2, 4, 8], 4, lambda size: 2.0 * size)) == [1, 2, 4]
    found = measure_sizes([1, 2, 4, 8], 4, lambda size: 0.001 * size)
    assert found == pytest.approx({1: 0.001, 2: 0.001, 4: 0.001, 8: 0.001})


@pytest.mark.parametrize("address", ["none", pytest.param("local", marks=pytest.mark.ray)])
def test_what_is_measured_is_kept_and_gives_the_bytes_of_its_size(config: Path, tmp_path: Path, address: str) -> None:
    measured = f"cluster.address={address}", "runtime.micro_batch_tokens=measured"
    assert shardprune("run", config, *measured).code == 0
    size = settled(tmp_path / "out")
    again = shardprune("run", config, *measured)
    assert again.code == 0 and settled(tmp_path / "out") == size
    pinned = [f"output.path={tmp_path / 'pinned'}", f"runtime.micro_batch_tokens={size * LENGTH}"]
    assert shardprune("run", config, *pinned).code == 0
    assert digests(tmp_path / "out/model") == digests(tmp_path / "pinned/model")


def test_a_run_that_has_settled_a_size_is_not_measured_anew(config: Path, tmp_path: Path) -> None:
    assert shardprune("run", config).code == 0
    before = settled(tmp_path / "out")
    (tmp_path / "out/report.md").unlink()
    assert shardprune("run", config, "runtime.micro_batch_tokens=measured").code == 0
    assert settled(tmp_path / "out") == before == 64 // LENGTH
