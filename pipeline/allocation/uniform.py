"""The same pattern for every decoder layer."""

from typing import Literal

from pipeline.settings import Settings
from pipeline.sparsity import Pattern


class Uniform(Settings):
    """What the papers of Wanda and SparseGPT do."""

    name: Literal["uniform"] = "uniform"

    def allocate(self, pattern: Pattern, num_layers: int) -> list[Pattern]:
        """One pattern per decoder layer."""
        return [pattern] * num_layers
