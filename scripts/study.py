"""What prunes best: calibration sources x methods x sparsities x seeds, with a table and a plot.

    python scripts/study.py configs/studies/calibration.yaml --out runs/calibration
    python scripts/study.py configs/studies/methods.yaml --out runs/methods

Every source is calibrated once per seed, as `shardprune calibrate` does it, and its windows are used by all methods.
Every combination leaves one small file below --out when it is done, so a study that was stopped goes on, and one with
more seeds or methods adds to what there is. Each process computes on one thread. At the end, and with --report alone,
table.md and plot.png are made of what is there: mean and standard deviation over seeds.
"""

import argparse
import itertools
import json
import multiprocessing
import shutil
import statistics
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml

from pipeline.config import EvaluateConfig, RunConfig
from pipeline.config_file import load_config, validate
from pipeline.evaluate import evaluate_checkpoint
from pipeline.files import write_file
from pipeline.local import run_locally, survey_locally
from pipeline.preparation import begin, opened, prepare
from pipeline.runtime import Machine

HERE = Machine(num_cores=1, has_cuda=False)
REFERENCE, WORST = "training text", "unlike text"
SECONDS = "seconds of solving"

# what was measured with each seed, by source, method and target
Results = dict[tuple[str, str, str], list[dict[str, float]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--report", action="store_true", help="only make the table and the plot again")
    arguments = parser.parse_args()
    study = Study(arguments.study, arguments.out)
    if not arguments.report:
        study.make_texts()
        with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
            # all sources first: the methods share their windows
            for work in (study.calibrations(), study.cells()):
                for done in pool.imap_unordered(run_one, [(arguments.study, arguments.out, *each) for each in work]):
                    print(done, flush=True)
    results = study.results()
    table = make_table(study, results)
    write_file(arguments.out / "table.md", table.encode())
    plot(study, results, arguments.out / "plot.png")
    print(table)


class Study:
    """A study's config, its work and its results, below one folder."""

    def __init__(self, path: Path, out: Path) -> None:
        self.values: dict[str, Any] = yaml.safe_load(path.read_text())
        self.out = out
        self.files = {
            "{unlike calibration}": str(out / "unlike-calibration.txt"),
            "{unlike evaluation}": str(out / "unlike-evaluation.txt"),
            "{random tokens}": str(out / "random-tokens.parquet"),
        }
        self.data_free = [method for method in self.values["methods"] if self._is_data_free(method)]

    def make_texts(self) -> None:
        """The unlike text in two parts, and windows of random tokens."""
        self.check_same()
        documents = Path(self.values["unlike_text"]).read_text().split("\n\n")
        stop = len(documents) * 2 // 3
        for name, part in (("calibration", documents[:stop]), ("evaluation", documents[stop:])):
            write_file(Path(self.files[f"{{unlike {name}}}"]), "\n\n".join(part).encode())
        config = load_config(Path(self.values["base"]), [])
        vocabulary = json.loads((Path(config.model.path) / "config.json").read_text())["vocab_size"]
        ids_T = torch.randint(vocabulary, (2**18,), generator=torch.Generator().manual_seed(0))
        table = pa.table({"input_ids": pa.array([ids_T.tolist()], pa.list_(pa.int32()))})
        pq.write_table(table, self.files["{random tokens}"])

    def check_same(self) -> None:
        """Results of other settings are not taken for those of this study; more of the same may be added to it."""
        now = {**self.values, "base": Path(self.values["base"]).read_text(), "seeds": None}
        file = self.out / "study.json"
        before = json.loads(file.read_text()) if file.exists() else now
        for key, value in now.items():
            both = before.get(key)
            if key != "settings" and isinstance(value, dict) and isinstance(both, dict):
                value = {name: each for name, each in value.items() if name in both}
                both = {name: each for name, each in both.items() if name in value}
            if value != both:
                raise SystemExit(
                    f"{self.out} holds a study with another {key}: {both}, now {value}; give another --out"
                )
        kept = {key: {**before[key], **value} for key, value in now.items() if isinstance(before.get(key), dict)}
        write_file(file, json.dumps({**before, **now, **kept}).encode())

    def calibrations(self) -> list[tuple[str, str, str, int]]:
        return [(source, "", "", seed) for source in self.values["sources"] for seed in self.values["seeds"]]

    def cells(self) -> list[tuple[str, str, str, int]]:
        """Every combination; methods that look at no data need one source and one seed."""
        cells = itertools.product(
            self.values["sources"], self.values["methods"], self.values["targets"], self.values["seeds"]
        )
        first = (next(iter(self.values["sources"])), self.values["seeds"][0])
        return [cell for cell in cells if cell[1] not in self.data_free or (cell[0], cell[3]) == first]

    def config(self, source: dict[str, Any], seed: int, output: Path, settings: dict[str, Any]) -> RunConfig:
        overrides = {
            "calibration.source": source,
            "calibration.seed": seed,
            "calibration.windows": "across",
            "cluster": {"address": "none"},
            "evaluation.text": None,
            "runtime.threads": 1,
            "output.path": str(output),
            **self.values["settings"],
            **settings,
        }
        return load_config(
            Path(self.values["base"]), [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
        )

    def filled(self, value: Any) -> Any:
        """A value with the names of made files replaced by their paths."""
        if isinstance(value, dict):
            return {key: self.filled(each) for key, each in value.items()}
        if isinstance(value, list):
            return [self.filled(each) for each in value]
        return self.files.get(value, value) if isinstance(value, str) else value

    def folder(self, source: str, seed: int) -> Path:
        return self.out / "calibration" / f"{_slug(source)}-seed-{seed}"

    def result_file(self, source: str, method: str, target: str, seed: int) -> Path:
        return self.out / "results" / f"{_slug(source)}-{_slug(method)}-{_slug(target)}-seed-{seed}.json"

    def results(self) -> Results:
        """What has been measured, over seeds, by source, method and target."""
        found: Results = {}
        for source, method, target, seed in self.cells():
            file = self.result_file(source, method, target, seed)
            if file.exists():
                found.setdefault((source, method, target), []).append(json.loads(file.read_text()))
        return found

    def shown(self, method: str, source: str) -> str:
        return "none" if method in self.data_free else source

    def _is_data_free(self, method: str) -> bool:
        nothing = {"name": "text", "path": "none"}
        pruning = self.config(nothing, 0, Path("none"), self.values["methods"][method]).pruning
        return not any(x and x.needs_inputs for x in (pruning.method.statistic, pruning.allocation.statistic))


def run_one(work: tuple[Path, Path, str, str, str, int]) -> str:
    """Calibrate a source, or prune with its windows and measure; nothing that is done already."""
    path, out, source, method, target, seed = work
    torch.set_num_threads(1)
    study = Study(path, out)
    if not method:
        return calibrate(study, source, seed)
    return prune(study, source, method, target, seed)


def calibrate(study: Study, source: str, seed: int) -> str:
    from cluster.run import calibrate_only

    folder = study.folder(source, seed)
    if not (folder / "calibration" / "windows.parquet").exists():
        config = study.config(study.filled(study.values["sources"][source]), seed, folder, {})
        write_file(folder.with_suffix(".md"), calibrate_only(config, lambda sentence: None).encode())
    return f"calibrated {source}, seed {seed}"


def prune(study: Study, source: str, method: str, target: str, seed: int) -> str:
    file = study.result_file(source, method, target, seed)
    if not file.exists():
        windows = study.folder(source, seed) / "calibration" / "windows.parquet"
        parquet = {"name": "parquet", "path": str(windows)}
        output = study.out / "runs" / file.stem
        settings = {"calibration.windows": "rows", **study.values["methods"][method], **study.values["targets"][target]}
        prepared = prepare(study.config(parquet, seed, output, settings), HERE, lambda sentence: None)
        with opened(prepared) as (guard, _):
            run_locally(begin(prepared, guard, survey_locally), prepared, lambda receipt: None)
        linears = [linear for receipt in prepared.directory.receipts() for linear in receipt.linears]
        measured = {**measure(study, output / "model", prepared.config), SECONDS: sum(x.seconds for x in linears)}
        write_file(file, json.dumps(measured).encode())
        # a study of hundreds of runs keeps their figures, not their models
        shutil.rmtree(output)
    return f"{source}, {method}, {target}, seed {seed}: {json.loads(file.read_text())}"


def measure(study: Study, model: Path, config: RunConfig) -> dict[str, float]:
    """Perplexity on each of the study's texts."""
    perplexities = {}
    for name, text in study.filled(study.values["texts"]).items():
        values = {
            "model": {"path": str(model), "dtype": config.model.dtype},
            "runtime": {"threads": 1},
            "evaluation": {"text": text, "window_length": config.evaluation_window_length},
        }
        evaluated = evaluate_checkpoint(validate(EvaluateConfig, values, []), lambda sentence: None)
        perplexities[name] = evaluated.perplexity
    return perplexities


def make_table(study: Study, results: Results) -> str:
    """Markdown: one table per text, and how much of the gap between unlike and training text a source closes."""
    targets = list(study.values["targets"])
    header = [f"| method | calibration | {' | '.join(targets)} |", f"|---|---|{'---|' * len(targets)}"]
    pairs = list(itertools.product(study.values["methods"], study.values["sources"]))
    lines = []
    for quantity in (*study.values["texts"], SECONDS):
        what = "Seconds of solving" if quantity == SECONDS else f"Perplexity on {quantity} text"
        lines += [f"\n{what}, mean ± standard deviation over seeds:\n", *header]
        for method, source in pairs:
            cells = [_cell(results.get((source, method, target), []), quantity) for target in targets]
            if any(cells):
                lines.append(f"| {method} | {study.shown(method, source)} | {' | '.join(cells)} |")
    if {REFERENCE, WORST} <= study.values["sources"].keys():
        lines += [f"\nShare of the gap between {WORST} and {REFERENCE} that a source closes, on like text:\n", *header]
        for method, source in pairs:
            if method not in study.data_free and source not in (REFERENCE, WORST):
                cells = [_gap_closed(results, source, method, target) for target in targets]
                lines.append(f"| {method} | {source} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(measured: list[dict[str, float]], quantity: str) -> str:
    values = [each[quantity] for each in measured if quantity in each]
    if not values:
        return ""
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def _gap_closed(results: Results, source: str, method: str, target: str) -> str:
    found = [results.get((name, method, target), []) for name in (WORST, source, REFERENCE)]
    if not all(found):
        return ""
    worst, mean, best = (statistics.mean(each["like"] for each in measured) for measured in found)
    return f"{(worst - mean) / (worst - best):.0%}"


def plot(study: Study, results: Results, file: Path) -> None:
    """Perplexity by sparsity with its spread over seeds: the sources of each method, or the methods of one source."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    sources, texts = list(study.values["sources"]), list(study.values["texts"])
    methods = [method for method in study.values["methods"] if len(sources) == 1 or method not in study.data_free]
    panels = [[(source, method) for source in sources] for method in methods]
    if len(sources) == 1:
        panels = [[(sources[0], method) for method in methods]]
    figure = Figure(figsize=(6 * len(panels), 4 * len(texts)), layout="constrained")
    for axes, (text, pairs) in zip(
        figure.subplots(len(texts), len(panels), squeeze=False).flat, itertools.product(texts, panels), strict=True
    ):
        for index, (source, method) in enumerate(pairs):
            label = source if len(sources) > 1 else method
            _draw(axes, study, results, (source, method, text), (index - len(pairs) / 2) * 0.6 / len(pairs), label)
        title = f"{pairs[0][1]}, {text} text" if len(sources) > 1 else f"{text} text"
        axes.set(title=title, yscale="log", ylabel="perplexity")
        axes.set_xticks(range(len(study.values["targets"])), list(study.values["targets"]))
        axes.yaxis.set_major_formatter("{x:g}")
        # few labels between the powers of ten where there are many decades, all where there are few
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 1)))
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=120)


def _draw(axes: Any, study: Study, results: Results, what: tuple[str, str, str], offset: float, label: str) -> None:
    source, method, text = what
    points = [
        (position + offset, [each[text] for each in measured])
        for position, target in enumerate(study.values["targets"])
        if (measured := results.get((source, method, target)))
    ]
    means = [statistics.mean(values) for _, values in points]
    spreads = [statistics.stdev(values) if len(values) > 1 else 0 for _, values in points]
    axes.errorbar([x for x, _ in points], means, spreads, fmt="o", capsize=3, markersize=4, label=label)


def _slug(name: str) -> str:
    return "".join(character if character.isalnum() else "-" for character in name).strip("-")


if __name__ == "__main__":
    main()
