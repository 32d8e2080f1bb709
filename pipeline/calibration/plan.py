"""What a run's calibration source will give: everything is read and checked before anything is written.

Text that exists is read at once. For text that the model has yet to write the windows follow when all of it is there.
N = windows, L = window length, T = tokens of a document.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import torch
from torch import Tensor

from pipeline.calibration.generation import Generation
from pipeline.calibration.mix import MixSource, SingleSource
from pipeline.calibration.parquet import ParquetSource, read_windows
from pipeline.calibration.reading import Reader
from pipeline.calibration.selfgen import SelfgenSource
from pipeline.calibration.vocabulary import Vocabulary
from pipeline.calibration.windows import Windows, cut_across, cut_inside
from pipeline.config import CalibrationSettings
from pipeline.errors import Refusal
from pipeline.files import write_table
from pipeline.storage import Location

# Ready windows [N, L], documents [T], or documents yet to be generated.
Material = Tensor | tuple[Tensor, ...] | Generation


@dataclass(frozen=True)
class Part:
    """Where some of the windows come from."""

    source: SingleSource
    num_windows: int
    material: Material


@dataclass(frozen=True)
class Calibration:
    """The calibration data of a run, as far as it is known before the run begins.

    `fetched` are tables that came from elsewhere and are kept with the run.
    """

    settings: CalibrationSettings
    vocabulary: Vocabulary
    parts: tuple[Part, ...]
    fetched: dict[Location, pa.Table]

    @property
    def generations(self) -> list[Generation]:
        return [part.material for part in self.parts if isinstance(part.material, Generation)]

    @property
    def num_missing(self) -> int:
        """How many texts are still to be generated."""
        return sum(generation.num_missing for generation in self.generations)

    def keep_fetched(self) -> None:
        """Write what came from elsewhere, for the attempts after this one."""
        for file, table in self.fetched.items():
            write_table(table, file)
        self.fetched.clear()

    def windows(self) -> Windows:
        """All windows, part after part, once no text is missing. Raises Refusal where there is too little of them."""
        assert self.num_missing == 0
        ids_NL = torch.cat([self._cut(part) for part in self.parts])
        return Windows(ids_NL, tuple(part.source.origin for part in self.parts for _ in range(part.num_windows)))

    def _cut(self, part: Part) -> Tensor:
        if isinstance(part.material, Tensor):
            return part.material
        settings = self.settings
        bos = self.vocabulary.window_bos(settings.bos)
        length = settings.window_length - (bos is not None)
        if isinstance(part.material, Generation):
            advice = (
                f"; the {part.material.source.num_texts} generated texts are kept, and a higher "
                "calibration.source.num_texts adds to them"
            )
            documents: Sequence[Tensor] = part.material.kept_documents()
        else:
            advice, documents = "", part.material
        try:
            if settings.windows == "inside":
                documents = [_without_first(ids_T, bos) for ids_T in documents]
                ids_NL = cut_inside(documents, part.num_windows, length, settings.seed)
            else:
                ids_NL = cut_across(documents, part.num_windows, length, settings.seed)
        except Refusal as refusal:
            raise Refusal(f"{refusal}{advice}") from None
        return ids_NL if bos is None else torch.cat([torch.full((len(ids_NL), 1), bos), ids_NL], dim=1)


def plan_calibration(reader: Reader) -> Calibration:
    """Read what there is and plan what is to be generated. Raises Refusal where the source cannot give the windows."""
    settings = reader.config.calibration
    source = settings.source
    if isinstance(source, MixSource):
        shares = zip((part.source for part in source.parts), source.share_out(settings.num_windows), strict=True)
    else:
        shares = zip((source,), (settings.num_windows,), strict=True)
    parts = [Part(single, share, _material(single, share, reader)) for single, share in shares if share]
    calibration = Calibration(settings, reader.vocabulary, tuple(parts), reader.fetched)
    folders = [generation.store.folder for generation in calibration.generations]
    if len(set(folders)) < len(folders):
        raise Refusal(
            "calibration.source.parts: two parts would generate the same texts; make them one, or give one another seed"
        )
    return calibration


def _material(source: SingleSource, num_windows: int, reader: Reader) -> Material:
    settings = reader.config.calibration
    has_ids = isinstance(source, ParquetSource) and not source.holds_text
    if settings.windows == "rows" and not has_ids:
        raise Refusal(
            f"calibration.windows = 'rows': the source {source.name!r} has no ready windows; use inside or across"
        )
    if isinstance(source, SelfgenSource):
        return reader.generation(source, num_windows)
    if isinstance(source, ParquetSource) and has_ids and settings.windows in ("auto", "rows"):
        if settings.bos is True:
            raise Refusal("calibration.bos = true: ready windows are used as they are; leave calibration.bos out")
        ids_NL = read_windows(source, num_windows, settings.window_length)
        reader.vocabulary.check(ids_NL, source.origin)
        return ids_NL
    return tuple(reader.documents(source, settings.seed))


def _without_first(ids_T: Tensor, token: int | None) -> Tensor:
    """A document without the BOS that would follow the one that begins the window."""
    return ids_T[1:] if len(ids_T) and int(ids_T[0]) == token else ids_T
