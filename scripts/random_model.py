"""Writes a Llama checkpoint with random weights, and a Parquet file of random windows for it.

python scripts/random_model.py OUT --layers 8 --hidden 512 --windows 64 --window-length 512
python scripts/random_model.py OUT --layers 4 --hidden 2048 --aspect 70b
"""

import argparse
from fractions import Fraction
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import LlamaConfig, LlamaForCausalLM

# Intermediate over hidden size, and heads that share a key and a value: of something small, and of Llama 3 and 3.1.
ASPECTS = {"small": (Fraction(11, 4), 2), "8b": (Fraction(7, 2), 4), "70b": (Fraction(7, 2), 8)}
HEAD_SIZE = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--aspect", choices=ASPECTS, default="small")
    parser.add_argument("--head-size", type=int, default=HEAD_SIZE)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--window-length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    widening, num_sharing = ASPECTS[arguments.aspect]
    num_heads = max(1, arguments.hidden // arguments.head_size)
    config = LlamaConfig(
        hidden_size=arguments.hidden,
        intermediate_size=int(arguments.hidden * widening),
        num_hidden_layers=arguments.layers,
        num_attention_heads=num_heads,
        num_key_value_heads=max(1, num_heads // num_sharing),
        vocab_size=arguments.vocabulary,
        max_position_embeddings=max(2048, arguments.window_length),
    )
    model = LlamaForCausalLM(config).to(getattr(torch, arguments.dtype))
    model.save_pretrained(arguments.out / "model")
    ids = torch.randint(arguments.vocabulary, (arguments.windows, arguments.window_length)).tolist()
    pq.write_table(pa.table({"input_ids": pa.array(ids, pa.list_(pa.int32()))}), arguments.out / "windows.parquet")


if __name__ == "__main__":
    main()
