"""Every way of sharing the sparsity among the decoder layers, one file each; the union below is the registry."""

from pipeline.allocation.uniform import Uniform

Allocation = Uniform
