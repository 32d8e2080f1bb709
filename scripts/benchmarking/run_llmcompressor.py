"""llm-compressor as a subject, in the environment of peer.py: one call of its `oneshot`, its sequential pipeline."""

import argparse
from typing import Any

import pyarrow.parquet as pq
import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from transformers import AutoModelForCausalLM

from benchmarking.subject import SPARSITY, parse_task, phase

MODIFIERS = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}


class NoProcessor:
    """It asks for a processor also where windows are ready."""

    def save_pretrained(self, *arguments: Any, **settings: Any) -> tuple[()]:
        return ()


def main() -> None:
    task, _ = parse_task(argparse.ArgumentParser(description=__doc__))
    torch.set_num_threads(task.threads)
    ids = pq.read_table(task.windows)["input_ids"].to_pylist()
    dataset = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(window) for window in ids]})
    with phase("load"):
        model = AutoModelForCausalLM.from_pretrained(task.model, dtype="auto")
    # its N:M means N pruned of M, which at one half is the same
    structure = "0:0" if task.pattern == "unstructured" else task.pattern
    settings: dict[str, Any] = {"sparsity": SPARSITY, "mask_structure": structure}
    modifier = MODIFIERS[task.method](targets=["Linear"], ignore=["re:.*lm_head"], **settings)
    with phase("prune"):
        oneshot(
            model=model,
            dataset=dataset,
            processor=NoProcessor(),
            recipe=modifier,
            num_calibration_samples=len(ids),
            max_seq_length=len(ids[0]),
            batch_size=task.batch_size,
            shuffle_calibration_samples=False,
            pipeline="sequential",
        )
    with phase("save"):
        model.save_pretrained(task.out, save_compressed=False)


if __name__ == "__main__":
    main()
