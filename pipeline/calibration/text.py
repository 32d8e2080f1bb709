"""Source `text`: UTF-8 files, or every .txt and .md file below a folder, cut into windows by seed."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from pipeline.errors import Refusal
from pipeline.settings import Settings, UserPath

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SUFFIXES = (".txt", ".md")


class TextSource(Settings):
    """`path` is a file, a folder, or a list of either; each file is one document, taken in the order of their names."""

    name: Literal["text"] = "text"
    path: UserPath | tuple[UserPath, ...]

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path,) if isinstance(self.path, str) else self.path


def read_documents(paths: tuple[str, ...]) -> list[str]:
    """The text of every file. Raises Refusal for a path that is missing, not UTF-8 or without text."""
    files = [file for path in paths for file in _list_files(Path(path))]
    documents = []
    for file in files:
        try:
            documents.append(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise Refusal(f"text {file}: cannot be read as UTF-8 text ({error}); give plain text files") from None
    return documents


def tokenize(documents: list[str], tokenizer: "PreTrainedTokenizerBase") -> Tensor:
    """All documents as one stream of token ids [T], each with the special tokens that the tokenizer adds by itself."""
    return torch.cat(
        [torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64) for text in documents]
    )


def _list_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise Refusal(f"text {path}: no such file or folder; give the path of a text file or of a folder of them")
    files = sorted(file for file in path.rglob("*") if file.suffix in _SUFFIXES and file.is_file())
    if not files:
        raise Refusal(f"text {path}: no {' or '.join(_SUFFIXES)} file below this folder; give a folder with text files")
    return files
