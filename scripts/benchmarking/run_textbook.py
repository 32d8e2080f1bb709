"""The textbook baseline as a subject."""

import argparse

import pyarrow.parquet as pq
import torch
from transformers import AutoModelForCausalLM

from benchmarking.subject import SPARSITY, parse_task, phase
from benchmarking.textbook import prune_model


def main() -> None:
    task, _ = parse_task(argparse.ArgumentParser(description=__doc__))
    torch.set_num_threads(task.threads)
    ids_NL = torch.tensor(pq.read_table(task.windows)["input_ids"].to_pylist())
    with phase("load"):
        model = AutoModelForCausalLM.from_pretrained(task.model, dtype="auto")
    n, _, m = task.pattern.partition(":")
    kept = (int(n), int(m)) if m else None
    with phase("prune"):
        prune_model(model, ids_NL, task.method, SPARSITY, kept)
    with phase("save"):
        model.save_pretrained(task.out)


if __name__ == "__main__":
    main()
