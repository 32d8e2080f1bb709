"""The necessary FLOPs of pruning a random Llama, in two passes over the tokens and in one, stage by stage.

python -m benchmark.floor MODEL METHOD NUM_WINDOWS WINDOW_LENGTH
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from pipeline.cost import Flops, LayerShape, LinearShape, Passes, count
from pipeline.methods.sparsegpt import SparseGPT
from pipeline.methods.wanda import Wanda

METHODS = {"sparsegpt": SparseGPT(), "wanda": Wanda()}


def main() -> None:
    model, method, num_windows, window_length = sys.argv[1:]
    config = json.loads((Path(model) / "config.json").read_text())
    layer, num_tokens = shape_of_layer(config), int(num_windows) * int(window_length)
    told = {}
    for name, is_single in {"layer": False, "linear": True}.items():
        total = Flops()
        for index in range(config["num_hidden_layers"]):
            passes = Passes(is_single, goes_on=index + 1 < config["num_hidden_layers"])
            total += count(layer, METHODS[method], num_tokens, int(window_length), passes)
        told[name] = {**asdict(total), "necessary": total.necessary}
    print(json.dumps(told))


def shape_of_layer(config: dict[str, int]) -> LayerShape:
    """q, k and v read one input, gate and up another."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    shared = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    groups = [([hidden, shared, shared], hidden), ([hidden], hidden), ([inner, inner], hidden), ([hidden], inner)]
    linears = [
        LinearShape(num_outputs, num_inputs, number)
        for number, (outputs, num_inputs) in enumerate(groups)
        for num_outputs in outputs
    ]
    return LayerShape(tuple(linears), hidden)


if __name__ == "__main__":
    main()
