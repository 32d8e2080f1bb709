"""The bytes of a run are known before it, and there is room for them or it does not begin."""

import shutil
from pathlib import Path

import pytest
import torch
from tiny import FAMILIES, save_model, save_windows, write_config

from pipeline.config_file import load_config
from pipeline.errors import Incomplete
from pipeline.local import run_locally
from pipeline.models.hollow import open_or_imagine
from pipeline.models.skeleton import Skeleton
from pipeline.planning.disk import check_room, entry_bytes, model_files
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
