"""Writes a Llama checkpoint with random weights, and a Parquet file of random windows for it.

python scripts/random_model.py OUT --layers 8 --hidden 512 --windows 64 --window-length 512
"""

import argparse
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import LlamaConfig, LlamaForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--window-length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    config = LlamaConfig(
        hidden_size=arguments.hidden,
        intermediate_size=arguments.hidden * 11 // 4,
        num_hidden_layers=arguments.layers,
        num_attention_heads=max(1, arguments.hidden // 64),
        num_key_value_heads=max(1, arguments.hidden // 128),
        vocab_size=arguments.vocabulary,
        max_position_embeddings=max(2048, arguments.window_length),
    )
    model = LlamaForCausalLM(config).to(getattr(torch, arguments.dtype))
    model.save_pretrained(arguments.out / "model")
    ids = torch.randint(arguments.vocabulary, (arguments.windows, arguments.window_length)).tolist()
    pq.write_table(pa.table({"input_ids": pa.array(ids, pa.list_(pa.int32()))}), arguments.out / "windows.parquet")


if __name__ == "__main__":
    main()
