"""Source `dataset`: anything the `datasets` library can stream, by its name on the hub or from a local folder."""

import hashlib
import zlib
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow as pa
from pydantic import Field

from pipeline.errors import Incomplete, Refusal
from pipeline.files import read_table
from pipeline.settings import OpenText, Settings, UserPath
from pipeline.storage import Location, concealed


class DatasetSource(Settings):
    """The first `num_documents` of a stream that is shuffled by seed, so that a terabyte is never downloaded.

    `path` is a name on the hub, a folder with Parquet, JSON lines or text, a folder that `save_to_disk` wrote, or the
    name of a format (json, parquet, text, csv) whose files `data_files` names.
    """

    name: Literal["dataset"] = "dataset"
    path: UserPath
    config: str | None = None
    revision: str | None = None
    split: str = "train"
    data_files: OpenText | tuple[OpenText, ...] | None = None
    column: str = "text"
    num_documents: Annotated[int, Field(ge=1)] = 10_000
    shuffle: bool = True

    @property
    def origin(self) -> str:
        return ":".join(filter(None, (self.path, self.config, self.split)))

    def kept_file(self, folder: Location, seed: int) -> Location:
        """Where a run keeps the documents it has read: a hub may change or be away when the run resumes."""
        digest = hashlib.sha256(f"{self.model_dump_json()} {seed}".encode()).hexdigest()
        return folder / f"documents-{digest[:12]}.parquet"

    def read(self, folder: Location, seed: int) -> list[str]:
        """The documents, from the run's folder where an earlier attempt kept them.

        Raises Refusal where the dataset has no such split or column, Incomplete where the hub does not answer.
        """
        kept = self.kept_file(folder, seed)
        if kept.is_file():
            try:
                return [str(text) for text in read_table(kept)["text"].to_pylist()]
            except (pa.ArrowException, OSError, KeyError):
                raise Refusal(f"{kept}: is damaged; delete it and run again") from None
        return self._stream(seed)

    def _text(self, row: dict[str, Any]) -> str:
        if self.column not in row:
            raise Refusal(
                f"calibration.source.path = {self.path!r}: has no column {self.column!r} of text, only {sorted(row)}; "
                "set calibration.source.column"
            )
        text = row[self.column]
        if not isinstance(text, str):
            raise Refusal(
                f"calibration.source.path = {self.path!r}: column {self.column!r} has {type(text).__name__} where text "
                "should be; set calibration.source.column, or give complete rows"
            )
        return text

    def _stream(self, seed: int) -> list[str]:
        # large libraries that no other source needs
        from datasets.exceptions import DatasetsError
        from huggingface_hub.errors import HfHubHTTPError

        where = f"calibration.source.path = {self.path!r}"
        try:
            rows = _open(self)
            if self.shuffle:
                rows = rows.shuffle(seed=seed, buffer_size=self.num_documents)
            documents = [self._text(row) for row in rows.take(self.num_documents)]
        except (ConnectionError, TimeoutError) as error:
            raise Incomplete(f"{where}: the hub does not answer ({_short(error)}); run again to resume") from None
        except HfHubHTTPError as error:
            status = getattr(error.response, "status_code", 0)
            # too many requests, or a fault of the hub's own: both pass
            if status == 429 or status >= 500:
                raise Incomplete(f"{where}: the hub answers {status}; run again to resume") from None
            raise Refusal(f"{where}: the hub answers {status}; check path, revision and access") from None
        except (DatasetsError, OSError, ValueError, KeyError, TypeError, RuntimeError, EOFError, zlib.error) as error:
            if isinstance(error, Refusal):
                raise
            raise Refusal(
                f"{where}: cannot be read as a dataset ({_short(error)}); check path, config and split"
            ) from None
        return documents


def kept_table(documents: list[str]) -> pa.Table:
    """What `DatasetSource.read` finds again."""
    return pa.table({"text": pa.array(documents, pa.string())})


def _open(source: DatasetSource) -> Any:
    """An iterable dataset."""
    from datasets import load_dataset, load_from_disk

    folder = Path(source.path)
    if any((folder / name).exists() for name in ("dataset_info.json", "dataset_dict.json")):
        stored = load_from_disk(source.path)
        if isinstance(stored, dict):
            return stored[source.split].to_iterable_dataset()
        if stored.split is not None and str(stored.split) != source.split:
            raise ValueError(f"it is the split {str(stored.split)!r}, not {source.split!r}")
        return stored.to_iterable_dataset()
    data_files = list(source.data_files) if isinstance(source.data_files, tuple) else source.data_files
    return load_dataset(
        source.path,
        source.config,
        split=source.split,
        revision=source.revision,
        data_files=data_files,
        streaming=True,
    )


def _short(error: Exception) -> str:
    return concealed(" ".join(str(error).split()))[:200] or type(error).__name__
