"""Every pruning method, one file each; the union below is the registry.

A method is its settings, the statistic it needs, and one function `prune`: the stacked weights of the linears that
read one input, the statistic of that input and the budget go in, the pruned weights and the mask come out. Where it
`goes_by_rows`, it gets some rows of one linear at a time. Where it `prunes_blocks`, the linears of a feed-forward block
are pruned as one, by pipeline/feedforward.py. `best_granularity` is what pruning.granularity = auto means for it.
"""

from typing import Annotated

from pydantic import Field

from pipeline.methods.alps import ALPS
from pipeline.methods.dsnot import DSnoT
from pipeline.methods.magnitude import Magnitude
from pipeline.methods.ria import RIA
from pipeline.methods.sparsegpt import SparseGPT
from pipeline.methods.sparsellm import SparseLLM
from pipeline.methods.wanda import Wanda

Method = Annotated[Magnitude | Wanda | RIA | DSnoT | SparseGPT | ALPS | SparseLLM, Field(discriminator="name")]
