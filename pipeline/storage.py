"""Where a run or a model lies: a local folder, s3://bucket/prefix or gs://bucket/prefix.

An ObjectPath has the methods of pathlib.Path that this project uses, so that the same lines work with both.
Credentials come from the environment or from the instance and are never part of a path.
"""

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

import obstore
from obstore.exceptions import AlreadyExistsError

from pipeline.bucket import connect, translated
from pipeline.errors import Incomplete
from pipeline.faults import reading

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_PART_BYTES, _MAX_PARTS, _NUM_PARTS_AT_ONCE = 8 * 2**20, 5000, 8
_CHUNK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class ObjectPath:
    """An object, or a folder of objects, in a bucket; `key` is "" for the bucket itself.

    `is_hasty`: a request that hangs is given up soon, here and below.
    Whatever asks the store raises Refusal where running again cannot help (no such bucket, access denied) and, after
    the retries of the library, Incomplete where it can (no answer, too many requests).
    """

    scheme: str
    bucket: str
    key: str
    is_hasty: bool = False

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.key}".rstrip("/")

    def __truediv__(self, inner: "str | PurePath") -> "ObjectPath":
        return replace(self, key=str(PurePosixPath(self.key, inner)))

    @property
    def name(self) -> str:
        return PurePosixPath(self.key).name

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.key).suffix

    @property
    def parent(self) -> "ObjectPath":
        return replace(self, key=self.key.rpartition("/")[0])

    def is_file(self) -> bool:
        try:
            self.head()
        except FileNotFoundError:
            return False
        return True

    def is_dir(self) -> bool:
        """Whether anything lies below; a bucket is a folder even when it is empty. Shows that the bucket is there."""
        return next(self._objects(), None) is not None or not self.key

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def mkdir(self, parents: bool = True, exist_ok: bool = True) -> None:
        """Nothing: a folder is there as soon as an object in it is."""

    def iterdir(self) -> Iterator["ObjectPath"]:
        """Objects and folders directly below."""
        with self._translated():
            found = obstore.list_with_delimiter(self._store, self.key or None)
        keys = [*found["common_prefixes"], *(meta["path"] for meta in found["objects"])]
        yield from (replace(self, key=key) for key in sorted(keys))

    def glob(self, pattern: str) -> Iterator["ObjectPath"]:
        """What lies directly below and has a matching name."""
        return (path for path in self.iterdir() if fnmatchcase(path.name, pattern))

    def rglob(self, pattern: str) -> Iterator["ObjectPath"]:
        """All objects below, however deep, that have a matching name."""
        paths = (replace(self, key=meta["path"]) for meta in self._objects())
        return (path for path in paths if fnmatchcase(path.name, pattern))

    def read_bytes(self) -> bytes:
        with self._translated():
            return bytes(obstore.get(self._store, self.key).bytes())

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def read_range(self, start: int, stop: int) -> memoryview:
        with self._translated():
            return memoryview(obstore.get_range(self._store, self.key, start=start, end=stop))

    def chunks(self) -> Iterator[bytes]:
        """All bytes from the first to the last, a few megabytes at a time. Raises FileNotFoundError at once."""
        with self._translated():
            return self._stream(obstore.get(self._store, self.key))

    def head(self) -> Any:
        """Size, ETag and time of the last change. Raises FileNotFoundError."""
        with self._translated():
            return obstore.head(self._store, self.key)

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete the object; one that is not there is no error to S3, and here neither to Google."""
        with suppress(FileNotFoundError), self._translated():
            obstore.delete(self._store, self.key)

    def write_bytes(self, content: bytes) -> None:
        with self._translated(writing=True):
            obstore.put(self._store, self.key, content, use_multipart=False)

    def create(self, content: bytes) -> bool:
        """Write an object that must not exist yet; False where it does."""
        with self._translated(writing=True):
            try:
                obstore.put(self._store, self.key, content, mode="create")
            except AlreadyExistsError:
                return False
        return True

    def upload(self, file: Path, part_bytes: int = _PART_BYTES) -> None:
        """Write a local file by one request, or by a parallel multipart upload if it is larger than a part.

        Raises Incomplete where what has arrived is not what was sent.
        """
        num_bytes = file.stat().st_size
        part_bytes = max(part_bytes, -(-num_bytes // _MAX_PARTS))
        with self._translated(writing=True):
            written = obstore.put(
                self._store, self.key, file, chunk_size=part_bytes, max_concurrency=_NUM_PARTS_AT_ONCE
            )
        found = status(self)
        # Google does not say that both answers have the same ETag
        if found.num_bytes != num_bytes or (self.scheme == "s3" and found.etag != written["e_tag"]):
            raise Incomplete(f"{self}: is not what was written; another process writes there, run again to resume")

    @property
    def _store(self) -> Any:
        return connect(self.scheme, self.bucket, self.is_hasty)

    def _translated(self, writing: bool = False) -> AbstractContextManager[None]:
        return translated(str(self), self.bucket, writing)

    def _stream(self, content: Any) -> Iterator[bytes]:
        with self._translated():
            yield from map(bytes, content.stream(min_chunk_size=_CHUNK_BYTES))

    def _objects(self) -> Iterator[Any]:
        with self._translated():
            for batch in obstore.list(self._store, self.key or None):
                yield from batch


Location = Path | ObjectPath


@dataclass(frozen=True)
class Status:
    """`etag` changes with the content and is None for a local file; `modified` is by the clock of the storage."""

    num_bytes: int
    etag: str | None
    modified: float


def locate(text: str) -> Location:
    """The place that a path or URL names. Raises ValueError, which does not repeat it: it may hold a secret."""
    url = _URL.fullmatch(text)
    if url is None:
        return Path(text)
    scheme, rest = url[1].lower(), url[2]
    if scheme not in ("s3", "gs"):
        raise ValueError(f"{scheme}:// is no storage that is known here; give a local path, s3:// or gs://")
    bucket, _, key = rest.partition("/")
    if ":" in bucket or may_hold_secret(text):
        raise ValueError(
            f"must read {scheme}://BUCKET/PREFIX and nothing else; credentials belong in the environment, not in a path"
        )
    parts = [part for part in key.split("/") if part]
    if not _BUCKET.fullmatch(bucket) or any(part in (".", "..") for part in parts):
        raise ValueError(f"must read {scheme}://BUCKET/PREFIX, without . or .. in it")
    return ObjectPath(scheme, bucket, "/".join(parts))


def hasty(path: Location) -> Location:
    """The same place, for what must not wait for a request that hangs."""
    return replace(path, is_hasty=True) if isinstance(path, ObjectPath) else path


def is_within(path: Location, folder: Location) -> bool:
    """Whether a path is a folder or lies below it."""
    if isinstance(path, ObjectPath) and isinstance(folder, ObjectPath):
        same_bucket = (path.scheme, path.bucket) == (folder.scheme, folder.bucket)
        return same_bucket and PurePosixPath(path.key).is_relative_to(folder.key)
    return isinstance(path, Path) and isinstance(folder, Path) and path.is_relative_to(folder)


def name_within(path: Location, folder: Location) -> PurePath:
    """The name of what lies below a folder, by which it is called there."""
    assert is_within(path, folder), (path, folder)
    if isinstance(path, ObjectPath) and isinstance(folder, ObjectPath):
        return PurePosixPath(path.key).relative_to(folder.key)
    assert isinstance(path, Path) and isinstance(folder, Path)
    return path.relative_to(folder)


def read_range(path: Location, start: int, stop: int) -> bytes:
    """The bytes of a file from `start` up to `stop`."""
    if isinstance(path, ObjectPath):
        return bytes(path.read_range(start, stop)) if stop > start else b""
    with path.open("rb") as file:
        file.seek(start)
        return file.read(stop - start)


def is_url(text: str) -> bool:
    return _URL.fullmatch(text) is not None


def may_hold_secret(text: str) -> bool:
    """Whether a URL in a text has a user, a query or a fragment."""
    return re.search(r"://([^/\s]*@|[^/\s:]*:(?!\d*(/|\s|$))|[^\s?#]*[?#])", text) is not None


def concealed(text: str) -> str:
    """A text without what stands in its URLs where secrets may, nor USER:SECRET@ elsewhere."""
    without_users = re.sub(r"[^\s'\"/:]+:[^\s'\"]+@", "***@", re.sub(r"://[^\s'\"]*@", "://***@", text))
    return re.sub(r"(://[^\s'\"?#]*)[?#][^\s'\"]*", r"\1?***", without_users)


def status(path: Location) -> Status:
    """Raises as `reading`."""
    if isinstance(path, ObjectPath):
        head = path.head()
        return Status(head["size"], head["e_tag"], head["last_modified"].timestamp())
    with reading(path):
        found = path.stat()
    return Status(found.st_size, None, found.st_mtime)
