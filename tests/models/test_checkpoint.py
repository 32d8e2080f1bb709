"""The digests of a checkpoint's files: of each its own, and a file that nobody has touched is not read again."""

import hashlib
from pathlib import Path
from typing import Any

from tiny import save_model

from pipeline.models.checkpoint import open_checkpoint


def test_files_are_hashed_once_until_they_change(tmp_path: Path) -> None:
    model = save_model(tmp_path / "m", "llama", max_shard_size="30KB")
    found = open_checkpoint(str(model)).file_digests({}, print)
    assert len(found) > 1 and list(found) == sorted(file.name for file in model.glob("*.safetensors"))
    for name, told in found.items():
        content = (model / name).read_bytes()
        assert (told["sha256"], told["num_bytes"]) == (hashlib.sha256(content).hexdigest(), len(content))
    first, *others = found
    (model / first).write_bytes((model / first).read_bytes())
    known: dict[str, Any] = {name: {**told, "sha256": "known"} for name, told in found.items()}
    again = open_checkpoint(str(model)).file_digests(known, print)
    assert again[first]["sha256"] == found[first]["sha256"]
    assert [again[name] for name in others] == [known[name] for name in others]
