"""Every way of sharing the sparsity among the decoder layers, one file each; the union below is the registry.

An allocation is its settings, `measure`, which says one number of a layer of the dense model, and `allocate`, which
makes patterns of the numbers of all layers. Where it needs the inputs of the linears, the dense model is run once.
"""

from typing import Annotated

from pydantic import Field

from pipeline.allocation.alphapruning import AlphaPruning
from pipeline.allocation.owl import Owl
from pipeline.allocation.uniform import Uniform

Allocation = Annotated[Uniform | Owl | AlphaPruning, Field(discriminator="name")]
