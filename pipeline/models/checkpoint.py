"""A Hugging Face checkpoint on disk or on an object store: which tensors it has, and each one when it is asked for.

Nothing is loaded on opening but the headers of the safetensors files, which are checked against the files' sizes.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from pipeline.errors import Refusal
from pipeline.files import sha256_of_file
from pipeline.models.remote import ALL_FILES, SMALL_FILES, copy_files
from pipeline.models.tensor_entry import TensorEntry
from pipeline.models.tensor_file import read_tensors
from pipeline.settings import Settings
from pipeline.storage import Location, ObjectPath, locate, read_range, status

INDEX_NAME = "model.safetensors.index.json"
_SINGLE_NAME = "model.safetensors"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "consolidated.00.pth")
_OTHER_FORMATS = ["*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx"]
_LARGE_BYTES = 10**9
NUM_HASHED_AT_ONCE = 4


class _HeaderEntry(Settings):
    """A tensor in the header of a safetensors file."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]

    def located(self, file: str, header_bytes: int) -> TensorEntry:
        start, stop = self.data_offsets
        return TensorEntry(file, self.shape, self.dtype, stop - start, header_bytes + start)


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint by key, read lazily."""

    path: Location
    entries: dict[str, TensorEntry]

    @property
    def files(self) -> list[str]:
        return sorted({entry.file for entry in self.entries.values()})

    @cached_property
    def config(self) -> dict[str, Any]:
        return _read_json(self.path / "config.json")

    @cached_property
    def folder(self) -> Path:
        """A local folder with everything but the weights, for libraries that read from one."""
        return copy_files(self.path, SMALL_FILES) if isinstance(self.path, ObjectPath) else self.path

    def downloaded(self) -> Path:
        """A local folder with the weights too, for what holds the whole model anyway."""
        return copy_files(self.path, ALL_FILES) if isinstance(self.path, ObjectPath) else self.path

    def read(self, keys: Iterable[str], pinned: bool = False) -> dict[str, Tensor]:
        """The tensors as stored, on the CPU, in memory of their own; `pinned`: from which a GPU copies by itself."""
        tensors = {}
        by_file: dict[str, list[str]] = {}
        for key in keys:
            by_file.setdefault(self.entries[key].file, []).append(key)
        for file, file_keys in by_file.items():
            entries = {key: self.entries[key] for key in file_keys}
            tensors.update(read_tensors(self.path / file, entries, pinned))
        return tensors

    def header_digest(self) -> str:
        """sha256 of config.json and of every key, shape and dtype."""
        entries = {key: [entry.dtype, list(entry.shape)] for key, entry in sorted(self.entries.items())}
        text = json.dumps([self.config, entries], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def file_digests(self, known: dict[str, Any], tell: Callable[[str], None]) -> dict[str, Any]:
        """Per file its size, modification time and sha256; `known` is an earlier answer, reused for untouched files.

        On an object store size and ETag: the ETag changes with the content, and a digest would download it all.
        """
        if isinstance(self.path, ObjectPath):
            found = {name: status(self.path / name) for name in self.files}
            return {name: {"num_bytes": each.num_bytes, "etag": each.etag} for name, each in found.items()}
        at_hand = {name: (self.path / name).stat() for name in self.files}
        seen = {name: {"num_bytes": each.st_size, "modified_ns": each.st_mtime_ns} for name, each in at_hand.items()}
        digests = {name: known[name] for name, each in seen.items() if each.items() <= known.get(name, {}).items()}
        changed = [name for name in seen if name not in digests]
        num_bytes = sum(at_hand[name].st_size for name in changed)
        if num_bytes > _LARGE_BYTES:
            tell(f"hashing {self.path}: {num_bytes / 1e9:.1f} GB in {len(changed)} files")
        with ThreadPoolExecutor(NUM_HASHED_AT_ONCE) as pool:
            hashed = zip(changed, pool.map(lambda name: sha256_of_file(self.path / name), changed), strict=True)
            digests.update((name, {**seen[name], "sha256": sha256}) for name, sha256 in hashed)
        return {name: digests[name] for name in seen}


def open_checkpoint(path: str, revision: str | None = None) -> Checkpoint:
    """The checkpoint in a folder or below a URL, or of a model id on the Hugging Face hub (downloaded, not loaded).

    Raises Refusal where there is none, where it is not safetensors, or where a file is missing or cut short.
    """
    folder = find_folder(path, revision)
    if not (folder / "config.json").is_file():
        raise Refusal(f"model.path = {path}: not a checkpoint, it has no config.json; give a Hugging Face model folder")
    entries: dict[str, TensorEntry] = {}
    for name in _list_files(folder, path):
        for key, entry in _read_header(folder / name).items():
            if key in entries:
                raise Refusal(f"model.path = {path}: tensor {key} is in both {entries[key].file} and {name}")
            entries[key] = entry
    _check_index(folder, path, entries)
    return Checkpoint(folder, entries)


@dataclass(frozen=True)
class Revision:
    """What names the content of a checkpoint; `commit` is None for a folder."""

    name: str
    commit: str | None


def find_revision(path: str, revision: str | None = None) -> Revision:
    """The commit that a model id on the hub stands for now, or a digest of a folder: nothing large is read.

    A folder counts by its config, its tensors, and the size of its files with their modification time, on an object
    store with their ETag.
    """
    folder = find_folder(path, revision, allow_patterns=["config.json"])
    if not locate(path).is_dir():
        return Revision(folder.name, folder.name)
    checkpoint = open_checkpoint(path)
    known = {name: status(folder / name) for name in checkpoint.files}
    files = {name: [each.num_bytes, each.etag or each.modified] for name, each in known.items()}
    text = json.dumps([checkpoint.header_digest(), files])
    return Revision(hashlib.sha256(text.encode()).hexdigest()[:40], None)


def open_file(file: Location) -> Checkpoint:
    """A single safetensors file as a checkpoint without a config."""
    return Checkpoint(file.parent, _read_header(file))


def find_folder(path: str, revision: str | None, allow_patterns: list[str] | None = None) -> Location:
    """The folder of a checkpoint; of a model id on the hub the files with matching names are downloaded."""
    folder = locate(path)
    if folder.is_dir():
        return folder if isinstance(folder, ObjectPath) else folder.resolve()
    looks_like_path = isinstance(folder, ObjectPath) or path.startswith((".", "/")) or path.count("/") != 1
    if looks_like_path or folder.exists():
        raise Refusal(f"model.path = {path}: no such folder; give a Hugging Face model folder or a model id ORG/NAME")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        patterns = {"allow_patterns": allow_patterns, "ignore_patterns": _OTHER_FORMATS}
        return Path(snapshot_download(path, revision=revision, **patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise Refusal(f"model.path = {path}: no such folder, nor a model to be had from the hub ({reason})") from None


def find_again(source: Location, path: str) -> Location:
    """What another host found as `source`, by its `path`; one from the hub is downloaded if it has only been there."""
    if isinstance(source, Path) and not source.is_dir():
        # the folder of a model in the hub's cache has the name of its commit
        return find_folder(path, source.name)
    return source


def has_weights(folder: Location) -> bool:
    """Whether there are any, in whatever format."""
    return any((folder / name).exists() for name in (INDEX_NAME, _SINGLE_NAME, *_PICKLES))


def _list_files(folder: Location, path: str) -> list[str]:
    index = folder / INDEX_NAME
    if index.is_file():
        weight_map = _read_json(index).get("weight_map", {})
        if (
            not isinstance(weight_map, dict)
            or not weight_map
            or not all(isinstance(x, str) for x in weight_map.values())
        ):
            raise Refusal(f"model.path = {path}: {INDEX_NAME} has no sound weight_map; copy the checkpoint again")
        return sorted(set(weight_map.values()))
    if (folder / _SINGLE_NAME).is_file():
        return [_SINGLE_NAME]
    if any((folder / name).exists() for name in _PICKLES):
        raise Refusal(f"model.path = {path}: holds only pickled weights; convert them to safetensors first")
    raise Refusal(f"model.path = {path}: not a checkpoint, it has neither {INDEX_NAME} nor {_SINGLE_NAME}")


def _check_index(folder: Location, path: str, entries: dict[str, TensorEntry]) -> None:
    index = folder / INDEX_NAME
    if not index.is_file():
        return
    for key, file in _read_json(index)["weight_map"].items():
        if key not in entries or entries[key].file != file:
            raise Refusal(f"model.path = {path}: {INDEX_NAME} places tensor {key} in {file}, which does not hold it")


def _read_header(file: Location) -> dict[str, TensorEntry]:
    """Key to entry from a safetensors header; its offsets must end where the file ends."""
    if not file.is_file():
        raise Refusal(f"model file {file}: missing; complete the checkpoint")
    size = status(file).num_bytes
    header_size = int.from_bytes(read_range(file, 0, min(8, size)), "little")
    if size < 8 + header_size:
        raise Refusal(f"model file {file}: cut short within its header ({size} bytes); copy it again")
    raw = read_range(file, 8, 8 + header_size)
    try:
        header = TypeAdapter(dict[str, _HeaderEntry | dict[str, str]]).validate_json(raw)
    except ValidationError:
        raise Refusal(f"model file {file}: not a safetensors file; copy or convert it again") from None
    tensors = {key: entry for key, entry in header.items() if isinstance(entry, _HeaderEntry)}
    end = max((entry.data_offsets[1] for entry in tensors.values()), default=0)
    if size != 8 + header_size + end:
        raise Refusal(f"model file {file}: has {size} bytes, its header needs {8 + header_size + end}; copy it again")
    entries = {key: entry.located(file.name, 8 + header_size) for key, entry in tensors.items()}
    for key, entry in entries.items():
        if entry.torch_dtype and entry.num_bytes != math.prod(entry.shape) * entry.torch_dtype.itemsize:
            raise Refusal(f"model file {file}: tensor {key} has the wrong size for its shape; copy it again")
    return entries


def _read_json(path: Location) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Refusal(f"{path}: cannot be read as JSON ({error}); copy it again") from None
    if not isinstance(content, dict):
        raise Refusal(f"{path}: must hold a JSON object; copy it again")
    return content
