"""What an error of a file system means for a run: whether running again can help."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from pipeline.errors import Incomplete, Refusal

# What running again does not cure.
_FINAL = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EOPNOTSUPP, errno.ENOSYS),
    *(errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG),
)


@contextmanager
def reading(path: object) -> Iterator[None]:
    """Turns errors of the system into FileNotFoundError, Refusal where running again cannot help, or Incomplete.

    An OSError that has no number is a library's word for damaged content, and stays.
    """
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(path) from None
    except OSError as error:
        if error.errno is None:
            raise
        if error.errno in _FINAL:
            raise Refusal(f"{path}: cannot be read ({error.strerror}); give another path or the right to") from None
        raise Incomplete(f"{path}: cannot be read ({error}); run again to resume") from error


def storage_error(path: object, error: OSError | SafetensorError) -> Incomplete | Refusal:
    """What a failed write means for the run."""
    number = number_of(error)
    if number in _FINAL:
        return Refusal(f"output.path: {path} cannot be written ({os.strerror(number)}); give a folder that can")
    reason = "the disk is full" if number in (errno.ENOSPC, errno.EDQUOT) else f"the storage refused it ({error})"
    return Incomplete(f"{path}: not written, {reason}; every committed layer is kept, run again to resume")


def number_of(error: OSError | SafetensorError) -> int | None:
    """The number of an error of the system; safetensors tells it only in its message."""
    told = re.search(r"os error (\d+)", str(error))
    return error.errno if isinstance(error, OSError) and error.errno else int(told[1]) if told else None
