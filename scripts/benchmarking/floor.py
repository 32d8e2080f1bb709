"""The necessary FLOPs of pruning a model, in two passes over the tokens and in one, stage by stage as
pipeline/planning/cost.py counts them.

python -m benchmarking.floor MODEL METHOD NUM_WINDOWS WINDOW_LENGTH
"""

import json
import sys
from dataclasses import asdict

import torch

from pipeline.methods import Method
from pipeline.methods.sparsegpt import SparseGPT
from pipeline.methods.wanda import Wanda
from pipeline.models.checkpoint import open_checkpoint
from pipeline.models.skeleton import Skeleton
from pipeline.models.tracing import trace_layers
from pipeline.planning.cost import Flops, Passes, count

METHODS: dict[str, Method] = {"sparsegpt": SparseGPT(), "wanda": Wanda()}


def main() -> None:
    model, method = sys.argv[1:3]
    num_windows, window_length = map(int, sys.argv[3:])
    skeleton = Skeleton(open_checkpoint(model), torch.float32, torch.device("cpu"))
    layers = [trace.shape for trace in trace_layers(skeleton, window_length)]
    told = {}
    for granularity in ("layer", "linear"):
        total = Flops()
        for index, layer in enumerate(layers):
            passes = Passes(is_single=granularity == "linear", goes_on=index + 1 < len(layers))
            total += count(layer, METHODS[method], num_windows * window_length, window_length, passes)
        told[granularity] = {**asdict(total), "necessary": total.necessary}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
