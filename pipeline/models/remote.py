"""A checkpoint on an object store: tensors by parallel range reads, and local copies of its small files."""

import hashlib
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import Refusal
from pipeline.files import copy_file
from pipeline.models.tensor_entry import TensorEntry
from pipeline.storage import ObjectPath, name_within, status

# What a checkpoint has beside its weights: config, tokenizer, templates, remote code, licence.
SMALL_FILES = re.compile(r".*\.(json|txt|model|jinja|py|tiktoken)|(LICENSE|LICENCE|NOTICE|USE_POLICY).*", re.IGNORECASE)
ALL_FILES = re.compile(rf"{SMALL_FILES.pattern}|.*\.safetensors", re.IGNORECASE)
_READ_BYTES, _NUM_READS_AT_ONCE = 8 * 2**20, 8
# Up to this many bytes between two tensors are read along rather than asked for apart.
_GAP_BYTES = 64 * 2**10


@dataclass(frozen=True)
class Read:
    """One request: bytes `start` to `stop` of a file, which hold tensors or a part of one."""

    start: int
    stop: int


def fill_by_ranges(file: ObjectPath, entries: dict[str, TensorEntry], memory: dict[str, memoryview]) -> None:
    """Read tensors of a file into the memory of each; a few reads more are in memory beside.

    Raises Refusal where the file is another than its header said.
    """

    def fetch(read: Read) -> None:
        content = file.read_range(read.start, read.stop)
        if len(content) != read.stop - read.start:
            raise Refusal(f"model file {file}: ends before byte {read.stop}, which its header names; copy it again")
        for key, entry in entries.items():
            start, stop = max(read.start, entry.start), min(read.stop, entry.start + entry.num_bytes)
            if start < stop:
                part = content[start - read.start : stop - read.start]
                memory[key][start - entry.start : stop - entry.start] = part

    with ThreadPoolExecutor(_NUM_READS_AT_ONCE) as pool:
        for _ in pool.map(fetch, plan_reads(list(entries.values()))):
            pass


def plan_reads(entries: list[TensorEntry], most_bytes: int = _READ_BYTES, gap_bytes: int = _GAP_BYTES) -> list[Read]:
    """Reads that cover some tensors of one file: neighbours together, what is larger than `most_bytes` in parts."""
    reads: list[Read] = []
    for start, stop in _spans(entries, gap_bytes):
        reads += [Read(first, min(first + most_bytes, stop)) for first in range(start, stop, most_bytes)]
    return reads


def copy_files(path: ObjectPath, wanted: re.Pattern[str]) -> Path:
    """A local folder with the files of a checkpoint whose names match, copied once as long as none of them changes."""
    files = [file for file in path.rglob("*") if wanted.fullmatch(file.name)]
    found = {name_within(file, path): status(file) for file in files}
    versions = [(str(name), version.num_bytes, version.etag) for name, version in found.items()]
    folder = _cache() / hashlib.sha256(repr((str(path), versions)).encode()).hexdigest()[:16]
    for name, version in found.items():
        copy = folder / name
        if not copy.is_file() or copy.stat().st_size != version.num_bytes:
            copy_file(path / name, copy)
    return folder


def _spans(entries: list[TensorEntry], gap_bytes: int) -> Iterator[tuple[int, int]]:
    """From the first to the last byte of tensors that lie next to each other."""
    first = last = 0
    for entry in sorted((entry for entry in entries if entry.num_bytes), key=lambda entry: entry.start):
        if last and entry.start - last <= gap_bytes:
            last = entry.start + entry.num_bytes
            continue
        if last:
            yield first, last
        first, last = entry.start, entry.start + entry.num_bytes
    if last:
        yield first, last


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shardprune"
