"""Source `text`: UTF-8 files, or every .txt and .md file below a folder."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from pipeline.errors import Refusal
from pipeline.settings import Settings, UserPath

NonEmptyPath = Annotated[UserPath, Field(min_length=1)]

_SUFFIXES = (".txt", ".md")


class TextSource(Settings):
    """`path` is a file, a folder, or a list of either, taken in the order of their names.

    A document is what lies between two `separator`s, for example a blank line; without one, each file is a document.
    """

    name: Literal["text"] = "text"
    path: NonEmptyPath | Annotated[tuple[NonEmptyPath, ...], Field(min_length=1)]
    separator: Annotated[str, Field(min_length=1)] | None = None

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path,) if isinstance(self.path, str) else self.path

    @property
    def origin(self) -> str:
        """What the windows table says about where a window comes from."""
        return ", ".join(self.paths)

    def read(self) -> list[str]:
        """The documents. Raises Refusal for a path that is missing, not UTF-8 or without text."""
        texts = read_files(self.paths)
        if self.separator is None:
            return texts
        documents = [part.strip() for text in texts for part in text.split(self.separator)]
        return [document for document in documents if document]


def read_files(paths: tuple[str, ...]) -> list[str]:
    """The text of every file. Raises Refusal for a path that is missing, not UTF-8 or without text."""
    texts = []
    for file in (file for path in paths for file in _list_files(Path(path))):
        try:
            texts.append(file.read_text(encoding="utf-8-sig"))
        except (OSError, UnicodeDecodeError) as error:
            raise Refusal(f"text {file}: cannot be read as UTF-8 text ({error}); give plain text files") from None
    return texts


def _list_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise Refusal(f"text {path}: no such file or folder; give the path of a text file or of a folder of them")
    files = sorted(file for file in path.rglob("*") if file.suffix in _SUFFIXES and file.is_file())
    if not files:
        raise Refusal(f"text {path}: no {' or '.join(_SUFFIXES)} file below this folder; give a folder with text files")
    return files
