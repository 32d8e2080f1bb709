"""Measures shardprune beside llm-compressor and a textbook implementation, on the same models and windows.

    python scripts/benchmark.py --hidden 512 1024 2048 --aspect 8b 70b --repeats 5
    python scripts/benchmark.py --hidden 256 --layers 2 --windows 16 --repeats 1 --methods wanda
    python scripts/benchmark.py --growth growth.png
    python scripts/benchmark.py --profile --methods sparsegpt --hidden 2048

The second takes a minute, to see that it works. Random Llamas are pruned to one half. Each subject is a process of its
own; they take turns, round after round, and each ratio is one of two subjects in the same round. Prints one Markdown
table: README.md, "How fast it is", says what its columns mean. Run it on a machine with nothing else to do.
llm-compressor gets an environment of its own, once.
"""

import argparse
import itertools
import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path

from benchmarking.conditions import LLM_COMPRESSOR, PROFILED, SHARDPRUNE, SUBJECTS, Conditions, Shape, Subject
from benchmarking.contest import Contest, hold
from benchmarking.growth import FORMATS, describe_growth, draw_growth, measure_growth
from benchmarking.peer import install_peer
from benchmarking.profile_stages import profile
from benchmarking.table import compare
from door import positive
from random_model import ASPECTS, HEAD_SIZE, why_no_heads

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "shardprune").absolute()


def main() -> None:
    arguments = parse()
    subjects = subjects_of(arguments)
    pythons = {}
    if LLM_COMPRESSOR in subjects:
        pythons[LLM_COMPRESSOR.name] = install_peer(arguments.cache)
    conditions = Conditions(arguments.pattern, arguments.threads, arguments.batch_size, pythons)
    sizes = (arguments.layers, arguments.windows, arguments.window_length, arguments.dtype)
    shapes = [Shape(hidden, aspect, *sizes) for hidden in arguments.hidden for aspect in arguments.aspect]
    with tempfile.TemporaryDirectory(dir=arguments.work) as name:
        folder, how = Path(name), (arguments.repeats, conditions)
        if arguments.growth:
            lines = measure_growth(shapes[0], arguments.methods, *how, folder)
            print(describe_growth(lines), flush=True)
            draw_growth(lines, shapes[0], arguments.growth)
            return
        if arguments.profile:
            for shape, method, subject in itertools.product(shapes, arguments.methods, subjects):
                print(profile(shape, method, subject, *how, folder), end="\n\n", flush=True)
            return
        contests: list[Contest] = []
        for shape, method in itertools.product(shapes, arguments.methods):
            contests.append(hold(shape, method, subjects, *how, folder))
            if arguments.out:
                # after every contest: a benchmark takes hours, and may be stopped
                arguments.out.write_text(json.dumps([asdict(contest) for contest in contests], indent=1))
    print(f"\n{compare(contests)}\n\n{describe(contests, conditions)}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [subject.name for subject in SUBJECTS]
    parser.add_argument("--subjects", nargs="+", choices=names, metavar="SUBJECT", help=", ".join(names))
    parser.add_argument("--methods", nargs="+", choices=["sparsegpt", "wanda"], default=["sparsegpt", "wanda"])
    parser.add_argument("--hidden", type=positive, nargs="+", default=[512])
    parser.add_argument("--aspect", choices=["8b", "70b"], nargs="+", default=["8b"])
    parser.add_argument("--layers", type=positive, default=4)
    parser.add_argument("--windows", type=positive, default=64)
    parser.add_argument("--window-length", type=positive, default=512)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--pattern", choices=["unstructured", "2:4"], default="unstructured")
    parser.add_argument("--threads", type=positive, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--batch-size", type=positive, default=1, help="windows that llm-compressor runs at once")
    parser.add_argument("--repeats", type=positive, default=5)
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument("--growth", type=absolute, metavar="PLOT", help="time by layers, windows and tokens")
    ways.add_argument("--profile", action="store_true", help="where shardprune's time goes")
    ways.add_argument("--out", type=absolute, help="a JSON file for every single run")
    parser.add_argument("--cache", type=absolute, default=CACHE, help="where the environment of llm-compressor lies")
    parser.add_argument("--work", type=absolute, help="a folder with room for the models")
    arguments = parser.parse_args()
    if (wrong := why_not(arguments)) is not None:
        parser.error(wrong)
    return arguments


def why_not(arguments: argparse.Namespace) -> str | None:
    """What would end the benchmark after hours, or be ignored."""
    for file in (arguments.growth, arguments.out):
        if file and not file.parent.is_dir():
            return f"{file}: there is no folder {file.parent}; make it first"
        if file and file.is_dir():
            return f"{file}: is a folder; give the name of a file"
    if arguments.work and not arguments.work.is_dir():
        return f"--work {arguments.work}: there is no such folder; make it first"
    for hidden, aspect in itertools.product(arguments.hidden, arguments.aspect):
        if (wrong := why_no_heads(hidden, HEAD_SIZE, ASPECTS[aspect][1])) is not None:
            return wrong
    if arguments.growth:
        if arguments.growth.suffix[1:].lower() not in FORMATS:
            return f"--growth {arguments.growth.name}: must end with one of {', '.join(sorted(FORMATS))}"
        if arguments.subjects or len(arguments.hidden) > 1 or len(arguments.aspect) > 1:
            return "--growth is of shardprune, from one --hidden and one --aspect; leave out --subjects and the others"
    if arguments.profile and not set(arguments.subjects or ()) <= {subject.name for subject in PROFILED}:
        return f"--profile is of {' and '.join(repr(subject.name) for subject in PROFILED)}; leave out other --subjects"
    return None


def subjects_of(arguments: argparse.Namespace) -> list[Subject]:
    """Those that are named, else all that there is a measurement for."""
    able = (SHARDPRUNE,) if arguments.growth else PROFILED if arguments.profile else SUBJECTS
    return [subject for subject in able if arguments.subjects is None or subject.name in arguments.subjects]


def absolute(path: str) -> Path:
    """For processes that run in folders of their own."""
    return Path(path).absolute()


def describe(contests: list[Contest], conditions: Conditions) -> str:
    rates = [run.rate / 1e9 for contest in contests for run in contest.runs]
    return (
        f"{conditions.threads} threads, {conditions.pattern}, {len(set(rates))} rounds in all. The machine multiplied "
        f"float32 matrices at {min(rates):.0f} to {max(rates):.0f} GFLOP/s."
    )


if __name__ == "__main__":
    main()
