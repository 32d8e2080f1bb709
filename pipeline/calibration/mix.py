"""Source `mix`: windows from several sources, by weight."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.calibration.dataset import DatasetSource
from pipeline.calibration.parquet import ParquetSource
from pipeline.calibration.selfgen import SelfgenSource
from pipeline.calibration.text import TextSource
from pipeline.settings import Settings

SingleSource = TextSource | ParquetSource | DatasetSource | SelfgenSource


class WeightedSource(Settings):
    """One source of a mix."""

    weight: Annotated[float, Field(gt=0)] = 1.0
    source: Annotated[SingleSource, Field(discriminator="name")]


class MixSource(Settings):
    """Windows are shared out by weight, exactly; what is left over goes to the largest remainders."""

    name: Literal["mix"] = "mix"
    parts: Annotated[tuple[WeightedSource, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _parts_differ(self) -> "MixSource":
        sources = [part.source for part in self.parts]
        if any(source in sources[:index] for index, source in enumerate(sources)):
            raise ValueError("two parts have the same source and would give the same windows; make them one")
        return self

    def share_out(self, num_windows: int) -> list[int]:
        """How many windows each part gives."""
        return share_out(num_windows, [part.weight for part in self.parts])


def share_out(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers with a given sum, proportional to weights, by largest remainders; equal ones go to the first."""
    whole = sum(map(Fraction, weights))
    exact = [total * Fraction(weight) / whole for weight in weights]
    shares = [int(share) for share in exact]
    order = sorted(range(len(weights)), key=lambda index: shares[index] - exact[index])
    for index in order[: total - sum(shares)]:
        shares[index] += 1
    return shares
