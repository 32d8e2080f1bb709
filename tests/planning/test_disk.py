"""The bytes of a run are known before it, and there is room for them or it does not begin."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import FAMILIES, save_model, save_windows, write_config

from pipeline.config_file import load_config
from pipeline.errors import Incomplete
from pipeline.job import segments_of
from pipeline.local import run_locally
from pipeline.models.hollow import open_or_imagine
from pipeline.models.skeleton import Skeleton
from pipeline.planning.disk import check_room, entry_bytes, model_files, num_entries_at_once
from pipeline.preparation import begin, opened, prepare
from pipeline.runtime import Machine
from pipeline.store import Receipt


@pytest.mark.parametrize("family", FAMILIES)
def test_every_file_of_the_model_and_every_kept_input_has_the_planned_size(tmp_path: Path, family: str) -> None:
    model = save_model(tmp_path / "m", family, torch.bfloat16)
    windows = save_windows(tmp_path / "windows.parquet", 4, 16)
    path = write_config(tmp_path / "run.yaml", model, windows, tmp_path / "out", **{"output.keep_entry_every": 1})
    prepared = prepare(load_config(path, []), Machine(1, False), print)
    kept: set[int] = set()

    def on_layer(receipt: Receipt) -> None:
        kept.update(file.stat().st_size for file in (tmp_path / "out/activations").glob("*.npy"))

    with opened(prepared) as (guard, _):
        run_locally(begin(prepared, guard, lambda job: []), prepared, on_layer)
    written = {file.name: file.stat().st_size for file in (tmp_path / "out/model").iterdir()}
    (tmp_path / "c").mkdir()
    for file in model.glob("*.json"):
        shutil.copy(file, tmp_path / "c")
    hollow = Skeleton(open_or_imagine(str(tmp_path / "c"), None, False), torch.bfloat16, torch.device("cpu"))
    assert model_files(hollow) == written
    assert kept == {entry_bytes(4 * 16, hollow.hidden_size, 2, 1)}


def test_where_the_disk_has_no_room_it_is_said_what_is_missing(tmp_path: Path) -> None:
    model = save_model(tmp_path / "m", "llama")
    windows = save_windows(tmp_path / "windows.parquet", 4, 16)
    path = write_config(tmp_path / "run.yaml", model, windows, tmp_path / "out")
    config = load_config(path, ["calibration.num_windows=1000000000000"])
    skeleton = Skeleton(open_or_imagine(str(model), None, False), torch.float32, torch.device("cpu"))
    with pytest.raises(Incomplete, match=r"GB of disk are needed .*for the model, .*are free; make room for .* more"):
        check_room(config, 1, skeleton)
    check_room(load_config(path, []), 1, skeleton)


@pytest.fixture(params=["the same disk", "another one"])
def source_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    if request.param == "the same disk":
        yield tmp_path
        return
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system here")
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def test_a_run_begins_with_the_last_byte_of_room_and_not_without(
    source_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_model(source_folder / "m", "llama")
    windows = save_windows(tmp_path / "windows.parquet", 4, 16)
    config = load_config(write_config(tmp_path / "run.yaml", model, windows, tmp_path / "out"), [])
    skeleton = Skeleton(open_or_imagine(str(model), None, False), torch.float32, torch.device("cpu"))
    once = sum(model_files(skeleton).values())
    num_entries = num_entries_at_once(segments_of(config, skeleton.num_layers), config.output.keep_entry_every)
    needed = once * (1 if source_folder == tmp_path else 2) + num_entries * entry_bytes(
        4 * 16, skeleton.hidden_size, 4, 1
    )
    free = SimpleNamespace(total=10**12, used=0, free=needed)
    monkeypatch.setattr("shutil.disk_usage", lambda path: free)
    check_room(config, 1, skeleton)
    free.free -= 1
    with pytest.raises(Incomplete, match=r"make room for 0\.0 MB more"):
        check_room(config, 1, skeleton)
