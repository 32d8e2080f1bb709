"""Files that appear whole or not at all, also when the process is killed or the disk is full."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError

from pipeline.errors import Incomplete, Refusal

# What running again does not cure.
_FINAL = (
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG),
)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary path whose file takes the place of `path` once it is safely on disk.

    Raises Incomplete where the storage does not take it, Refusal where it never will; `path` is then as it was.
    """
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        raise storage_error(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def read_text(path: Path) -> str:
    """The text of a file of the run. Raises FileNotFoundError, or Incomplete where the storage does not give it."""
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(path) from None
    except OSError as error:
        raise Incomplete(f"{path}: cannot be read ({error}); run again to resume") from error


def write_file(path: Path, content: bytes) -> None:
    with written_whole(path) as temporary:
        temporary.write_bytes(content)


def write_table(table: pa.Table, path: Path) -> None:
    with written_whole(path) as temporary:
        pq.write_table(table, temporary)


def storage_error(path: Path, error: OSError | SafetensorError) -> Incomplete | Refusal:
    """What a failed write means for the run."""
    # safetensors tells the number of the system's error only in its message
    told = re.search(r"os error (\d+)", str(error))
    number = error.errno if isinstance(error, OSError) and error.errno else int(told[1]) if told else None
    if number in _FINAL:
        return Refusal(f"output.path: {path} cannot be written ({os.strerror(number)}); give a folder that can")
    reason = "the disk is full" if number in (errno.ENOSPC, errno.EDQUOT) else f"the storage refused it ({error})"
    return Incomplete(f"{path}: not written, {reason}; every committed layer is kept, run again to resume")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
