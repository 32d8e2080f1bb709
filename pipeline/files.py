"""Files that appear whole or not at all, also when the process is killed, the disk is full or the network is gone."""

import errno
import hashlib
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError

from pipeline.errors import Incomplete
from pipeline.faults import number_of, reading, storage_error
from pipeline.storage import Location, ObjectPath

_CHUNK_BYTES = 2**20


@contextmanager
def written_whole(path: Location) -> Iterator[Path]:
    """A temporary local path whose file becomes that of `path` once it is whole.

    On a file system it is synchronised and takes its place. An object store, where nothing can be renamed, gets it by
    one request or one completed multipart upload.
    Raises Incomplete where the storage does not take it, Refusal where it never will; `path` is then as it was.
    """
    with _uploaded(path) if isinstance(path, ObjectPath) else _moved(path) as temporary:
        yield temporary


def create_file(path: Location, content: bytes) -> bool:
    """Write a file that must not exist yet; of several that try, one gets True. Raises as `written_whole`."""
    if isinstance(path, ObjectPath):
        return path.create(content)
    with _beside(path) as temporary:
        temporary.write_bytes(content)
        _sync(temporary)
        try:
            # unlike a rename this fails where the name is taken, on network file systems too
            os.link(temporary, path)
        except FileExistsError:
            return False
        _sync(path.parent)
    return True


def read_text(path: Location) -> str:
    """The text of a file of the run. Raises as `reading`."""
    with reading(path):
        return path.read_text(encoding="utf-8")


def read_table(path: Location, columns: list[str] | None = None) -> pa.Table:
    """A table of the run. Raises pa.ArrowException or OSError where it is damaged, and as `reading`."""
    with reading(path):
        source = pa.BufferReader(path.read_bytes()) if isinstance(path, ObjectPath) else path
        return pq.read_table(source, columns=columns)


def write_file(path: Location, content: bytes) -> None:
    if isinstance(path, ObjectPath):
        path.write_bytes(content)
        return
    with written_whole(path) as temporary:
        temporary.write_bytes(content)


def write_table(table: pa.Table, path: Location) -> None:
    with written_whole(path) as temporary:
        pq.write_table(table, temporary)


@contextmanager
def local_copy(path: Location) -> Iterator[Path]:
    """A file that libraries can open: a local one itself, else a copy for as long as the context lasts."""
    if isinstance(path, Path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="shardprune-") as folder:
        copy = Path(folder) / path.name
        copy_file(path, copy)
        yield copy


def copy_file(source: Location, target: Location) -> None:
    """Copy a file of any size. Raises FileNotFoundError where there is none, and as `reading` and `written_whole`."""
    # opened first: what goes wrong from then on is said of the target
    with _opened(source) as chunks, written_whole(target) as temporary, temporary.open("wb") as file:
        file.writelines(chunks)


def sha256_of_file(path: Location) -> str:
    """Raises as `reading`."""
    with reading(path):
        if isinstance(path, Path):
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()
        for chunk in path.chunks():
            digest.update(chunk)
        return digest.hexdigest()


def delete_folder(folder: Location) -> None:
    """Delete everything below a folder of the run, if there is one."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
        return
    for path in folder.rglob("*"):
        path.unlink()


@contextmanager
def _opened(path: Location) -> Iterator[Iterable[bytes]]:
    """All bytes of a file, in order."""
    with ExitStack() as stack:
        with reading(path):
            chunks = path.chunks() if isinstance(path, ObjectPath) else _chunks(stack.enter_context(path.open("rb")))
        yield chunks


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(_CHUNK_BYTES):
        yield chunk


@contextmanager
def _moved(path: Path) -> Iterator[Path]:
    with _beside(path) as temporary:
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        # safetensors leaves a file that nobody but its owner may read
        if stat.S_IMODE(temporary.stat().st_mode) != mode:
            temporary.chmod(mode)
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A name beside a file, for as long as it is being written; errors become those of `written_whole`."""
    # two hosts that share a folder may have processes of one number
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
    except (OSError, SafetensorError) as error:
        if number_of(error) == errno.ENOENT and path.parent.is_dir():
            told = f"{path}: not written, another process has deleted what was there of it; run again to resume"
            raise Incomplete(told) from error
        raise storage_error(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def _uploaded(path: ObjectPath) -> Iterator[Path]:
    try:
        with tempfile.TemporaryDirectory(prefix="shardprune-") as folder:
            temporary = Path(folder) / path.name
            yield temporary
            path.upload(temporary)
    except (OSError, SafetensorError) as error:
        raise storage_error(Path(tempfile.gettempdir()), error) from error


def _sync(path: Path) -> None:
    """Of a file its content, of a folder its names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
