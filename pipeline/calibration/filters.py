"""Which generated texts are kept: a quantile of perplexity over all of them, and what else is asked for."""

from collections.abc import Sequence
from decimal import Decimal
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from pipeline.calibration.rows import Row
from pipeline.settings import Settings

Share = Annotated[float, Field(ge=0, lt=1)]


class Filter(Settings):
    """Shares of the texts by perplexity under the model that wrote them (Ji et al., arXiv 2410.17711, section 4)."""

    drop_highest: Share = 0.2
    drop_lowest: Share = 0.0
    deduplicate: bool = False
    max_repetition: Annotated[float, Field(ge=0, le=1)] | None = None

    @model_validator(mode="after")
    def _leaves_something(self) -> "Filter":
        if self.drop_highest + self.drop_lowest >= 1:
            raise ValueError("drop_highest and drop_lowest together must be below 1")
        return self

    def reasons(self, rows: Sequence[Row]) -> list[str | None]:
        """Why each row is dropped, None where it is kept.

        Of n rows that nothing else drops, exactly floor(n x share) go at either end; among equals the later ones.
        """
        reasons: dict[int, str] = {}
        seen: set[bytes] = set()
        for row in sorted(rows, key=lambda row: row.row_index):
            if row.is_empty:
                reasons[row.row_index] = "empty"
            elif self.max_repetition is not None and repetition(row.token_ids) > self.max_repetition:
                reasons[row.row_index] = "repetition"
            elif self.deduplicate and row.token_ids.tobytes() in seen:
                reasons[row.row_index] = "duplicate"
            seen.add(row.token_ids.tobytes())
        ranked = sorted(
            (row for row in rows if row.row_index not in reasons), key=lambda row: (row.perplexity, row.row_index)
        )
        ranks = self.ranks_kept(len(ranked))
        rest, highest = ranked[: ranks.stop], ranked[ranks.stop :]
        lowest = sorted(rest, key=lambda row: (row.perplexity, -row.row_index))[: ranks.start]
        reasons |= {row.row_index: "high perplexity" for row in highest}
        reasons |= {row.row_index: "low perplexity" for row in lowest}
        return [reasons.get(row.row_index) for row in rows]

    def ranks_kept(self, num_rows: int) -> range:
        """Of rows in the order of their perplexity, those that the shares leave, in exact arithmetic."""
        num_lowest = int(Decimal(str(self.drop_lowest)) * num_rows)
        num_highest = int(Decimal(str(self.drop_highest)) * num_rows)
        return range(num_lowest, num_rows - num_highest)


def repetition(token_ids: NDArray[np.int32], length: int = 4) -> float:
    """The share of a text's n-grams that occurred earlier in it."""
    if len(token_ids) < length:
        return 0.0
    grams = np.lib.stride_tricks.sliding_window_view(token_ids, length)
    return 1 - len(np.unique(grams, axis=0)) / len(grams)
