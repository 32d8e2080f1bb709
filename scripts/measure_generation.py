"""How fast texts are generated, how busy the generators are, and what the batch size changes.

    python scripts/measure_generation.py speed      the stage beside plain sequential `generate`, on the same machine
    python scripts/measure_generation.py batches    rows at batch sizes 1 and 8: how many are equal, and the logits

`speed` interleaves the ways of generating --repeats times and prints medians with the lowest and highest; one thread a
process. The stage's wall time is that of the whole command, start of Ray and loading of models included.
"""

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from transformers import AutoModelForCausalLM

from pipeline.calibration.generation import Generation
from pipeline.calibration.generator import Generator
from pipeline.calibration.rows import Row
from pipeline.config import RunConfig
from pipeline.config_file import load_config
from pipeline.preparation import prepare
from pipeline.runtime import Machine

HERE = Machine(num_cores=1, has_cuda=False)
NEW_TOKENS = 511


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "batches"])
    parser.add_argument("--config", default="configs/quickstart/run.yaml")
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.what == "speed":
        compare_speed(arguments)
    else:
        compare_batches(arguments)


def compare_speed(arguments: argparse.Namespace) -> None:
    """Tokens per second of each way, and how busy the generators were."""
    ways: dict[str, Callable[[], tuple[int, float, str]]] = {
        # at one text at a time, an eighth of the texts is enough
        "sequential generate": lambda: sequentially(arguments, arguments.texts // 8),
        "address: none": lambda: by_command(arguments, "none", 1),
        "1 generator on Ray": lambda: by_command(arguments, "local", 1),
        "2 generators on Ray": lambda: by_command(arguments, "local", 2),
    }
    measured: dict[str, list[tuple[float, str]]] = {name: [] for name in ways}
    for _ in range(arguments.repeats):
        for name, way in ways.items():
            num_tokens, seconds, said = way()
            measured[name].append((num_tokens / seconds, said))
    print("| | tokens/s, median | lowest - highest | said by the command |\n|---|---|---|---|")
    for name, runs in measured.items():
        speeds = [speed for speed, _ in runs]
        said = "; ".join(each for _, each in runs)
        print(f"| {name} | {statistics.median(speeds):.0f} | {min(speeds):.0f} - {max(speeds):.0f} | {said} |")


def sequentially(arguments: argparse.Namespace, num_texts: int) -> tuple[int, float, str]:
    """What one would write without this project: one prompt, one call of `generate`, the next prompt."""
    generation = plan(load(arguments, num_texts=num_texts))
    task = generation.task
    model = AutoModelForCausalLM.from_pretrained(task.source, dtype=getattr(torch, task.dtype)).eval()
    torch.manual_seed(0)
    sampling = task.sampling.model_dump()
    num_tokens, started = 0, time.perf_counter()
    for index in range(num_texts):
        prompt = torch.tensor([generation.prompts[index]])
        ids = model.generate(prompt, do_sample=True, pad_token_id=task.pad_token, **sampling)
        num_tokens += ids.shape[1] - prompt.shape[1]
    return num_tokens, time.perf_counter() - started, ""


def by_command(arguments: argparse.Namespace, address: str, num_generators: int) -> tuple[int, float, str]:
    """The calibration stage as a user runs it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(str(Path(sys.executable).parent / "shardprune"), "calibrate", arguments.config),
            *overrides(arguments, num_texts=arguments.texts, batch_size=arguments.batch_size),
            *(f"cluster.address={address}", f"cluster.num_generators={num_generators}", f"output.path={folder}/out"),
        ]
        started = time.perf_counter()
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        seconds = time.perf_counter() - started
        (table,) = Path(folder).glob("out/calibration/selfgen-*/rows.parquet")
        rows = pq.read_table(table, columns=["prompt_ids", "token_ids"]).to_pylist()
    said = re.findall(r"\d+ generators?, busy .*", printed)
    return sum(len(row["token_ids"]) - len(row["prompt_ids"]) for row in rows), seconds, "".join(said)


def compare_batches(arguments: argparse.Namespace) -> None:
    """The same texts at batch sizes 1 and 8, and the logits of the same tokens at both."""
    print("| dtype | equal rows | equal tokens until the first difference, median | largest logit difference |")
    print("|---|---|---|---|")
    for dtype in ("float32", "bfloat16"):
        settings = {"dtype": dtype, "num_texts": arguments.texts}
        rows = {size: generate(load(arguments, batch_size=size, **settings)) for size in (1, 8)}
        pairs = list(zip(rows[1], rows[8], strict=True))
        equal = sum(list(left.token_ids) == list(right.token_ids) for left, right in pairs)
        common = statistics.median(common_tokens(left, right) for left, right in pairs)
        difference = logit_difference(load(arguments, dtype=dtype, num_texts=8), rows[8][:8])
        print(f"| {dtype} | {equal} of {len(pairs)} | {common:.0f} | {difference:.2g} |")


def generate(config: RunConfig) -> list[Row]:
    generation = plan(config)
    generator = Generator(generation.task)
    return sorted((row for batch in generation.missing() for row in generator(batch)), key=lambda row: row.row_index)


def common_tokens(left: Row, right: Row) -> int:
    pairs = zip(left.token_ids, right.token_ids, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(left.token_ids), len(right.token_ids)))


def logit_difference(config: RunConfig, rows: list[Row]) -> float:
    """Between a forward of all rows, cut to one length, and of each alone."""
    task = plan(config).task
    model: Any = AutoModelForCausalLM.from_pretrained(task.source, dtype=getattr(torch, task.dtype)).eval()
    length = min(len(row.token_ids) for row in rows)
    ids_BT = torch.stack([torch.from_numpy(row.token_ids[:length].astype("int64")) for row in rows])
    with torch.inference_mode():
        together = model(ids_BT).logits.float()
        alone = torch.cat([model(ids_1T).logits.float() for ids_1T in torch.split(ids_BT, 1)])
    return float((together - alone).abs().max())


def plan(config: RunConfig) -> Generation:
    (generation,) = prepare(config, HERE, lambda sentence: None).calibration.generations
    return generation


def load(arguments: argparse.Namespace, dtype: str | None = None, **settings: int) -> RunConfig:
    changed = [*overrides(arguments, **settings), "output.path=/nonexistent/never-written"]
    changed += [f"model.dtype={dtype}"] if dtype else []
    return load_config(Path(arguments.config), changed)


def overrides(arguments: argparse.Namespace, **settings: int) -> list[str]:
    source = {"name": "selfgen", "preset": "paper", "prompts": "bos", **settings}
    text = ", ".join(f"{name}: {value}" for name, value in source.items())
    return [
        f"calibration.source={{{text}, sampling: {{max_new_tokens: {NEW_TOKENS}}}}}",
        *("calibration.num_windows=1", "runtime.threads=1", "evaluation.text=null", "cluster.num_shards=auto"),
    ]


if __name__ == "__main__":
    main()
