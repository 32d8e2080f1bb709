"""Files that appear whole or not at all, also when the process is killed, the disk is full or the network is gone."""

import errno
import hashlib
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError

from pipeline.errors import Incomplete, Refusal
from pipeline.storage import Location, ObjectPath

# What running again does not cure.
_FINAL = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EOPNOTSUPP),
    *(errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG),
)


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
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        _sync(temporary)
        # unlike a rename this fails where the name is taken, on network file systems too
        os.link(temporary, path)
        _sync(path.parent)
    except FileExistsError:
        return False
    except OSError as error:
        raise storage_error(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink()
    return True


def read_text(path: Location) -> str:
    """The text of a file of the run. Raises FileNotFoundError, or Incomplete where the storage does not give it."""
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(path) from None
    except OSError as error:
        if error.errno in _FINAL:
            raise Refusal(f"{path}: cannot be read ({error.strerror}); give another path or the right to") from None
        raise Incomplete(f"{path}: cannot be read ({error}); run again to resume") from error


def read_table(path: Location, columns: list[str] | None = None) -> pa.Table:
    """A table of the run. Raises pa.ArrowException or OSError where it is damaged."""
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
    """Copy a file of any size. Raises FileNotFoundError where there is none, and as `written_whole`."""
    with written_whole(target) as temporary:
        if isinstance(source, Path):
            shutil.copyfile(source, temporary)
            return
        with temporary.open("wb") as file:
            for chunk in source.chunks():
                file.write(chunk)


def sha256_of_file(path: Location) -> str:
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


def storage_error(path: Location, error: OSError | SafetensorError) -> Incomplete | Refusal:
    """What a failed write means for the run."""
    # safetensors tells the number of the system's error only in its message
    told = re.search(r"os error (\d+)", str(error))
    number = error.errno if isinstance(error, OSError) and error.errno else int(told[1]) if told else None
    if number in _FINAL:
        return Refusal(f"output.path: {path} cannot be written ({os.strerror(number)}); give a folder that can")
    reason = "the disk is full" if number in (errno.ENOSPC, errno.EDQUOT) else f"the storage refused it ({error})"
    return Incomplete(f"{path}: not written, {reason}; every committed layer is kept, run again to resume")


@contextmanager
def _moved(path: Path) -> Iterator[Path]:
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
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


def _temporary(path: Path) -> Path:
    # two hosts that share a folder may have processes of one number
    return path.with_name(f"{path.name}.tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}")


def _sync(path: Path) -> None:
    """Of a file its content, of a folder its names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
