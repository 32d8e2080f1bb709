"""The calibration stage as a command: it resumes by row, any interruption leaves the same bytes, refusals are told."""

import itertools
import json
import math
import re
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from command import Finished, Running, refusal, sentence, shardprune, start
from safetensors.torch import load_file, save_file
from tiny import (
    digests,
    modified_ns,
    save_documents,
    save_model,
    save_text,
    save_tokenizer,
    save_windows,
    selfgen,
    write_config,
)

from pipeline.calibration.generator import Generator
from pipeline.calibration.rows import Row
from pipeline.calibration.windows import read_window_ids
from pipeline.config_file import load_config
from pipeline.lease import LeaseLost
from pipeline.local import generate_locally
from pipeline.preparation import opened, prepare
from pipeline.runtime import Machine

NUM_TEXTS, BATCH_SIZE = 24, 4


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a corpus, a config that lets the model write 24 texts, and in undisturbed/ what comes of it."""
    folder = tmp_path_factory.mktemp("place")
    save_tokenizer(save_model(folder / "model", "llama"))
    save_documents(folder / "corpus.txt", 10, 8)
    save_text(folder / "text.txt", 400)
    save_windows(folder / "windows.parquet", 6, 16)
    write(folder, folder / "undisturbed", corpus(folder))
    assert shardprune("calibrate", folder / "run.yaml").code == 0
    return folder


def corpus(place: Path, name: str = "corpus.txt") -> dict[str, Any]:
    return {"name": "text", "path": str(place / name), "separator": "\n\n"}


def write(place: Path, out: Path, prompts: Any = "bos", file: str = "run.yaml", **changes: Any) -> Path:
    source = selfgen(prompts, **{"num_texts": NUM_TEXTS, "batch_size": BATCH_SIZE, **changes})
    settings = {"calibration.source": source, "model.dtype": "float32"}
    return write_config(place / file, place / "model", place / "windows.parquet", out, **settings)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def calibrate(place: Path, out: Path, *overrides: str) -> Finished:
    finished = shardprune("calibrate", place / "run.yaml", f"output.path={out}", *overrides)
    assert finished.code == 0, finished.err
    return finished


def refused(place: Path, out: Path, *overrides: str, command: str = "calibrate") -> str:
    return refusal(command, place / "run.yaml", f"output.path={out}", *overrides)


def rows_file(out: Path) -> Path:
    (file,) = out.glob("calibration/selfgen-*/rows.parquet")
    return file


def batch_files(out: Path) -> list[Path]:
    return sorted(out.glob("calibration/selfgen-*/batches/from-row-*.parquet"))


def rows_of(out: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(rows_file(out)).to_pylist()
    return rows


def killed_after(place: Path, out: Path, num_batches: int, *overrides: str) -> int:
    """Kill the stage as soon as some batches are written; how many are then."""
    for _ in range(10):
        running = start("calibrate", place / "run.yaml", f"output.path={out}", *overrides)
        running.wait_until(lambda: len(batch_files(out)) >= num_batches)
        running.send(signal.SIGKILL)
        if running.wait().code == -signal.SIGKILL and not list(out.glob("calibration/*/rows.parquet")):
            return len(batch_files(out))
        shutil.rmtree(out)
    raise AssertionError("every run ended before it could be killed")


# --- what comes of it


def test_rows_are_all_there_with_what_they_depend_on(place: Path) -> None:
    rows = rows_of(place / "undisturbed")
    assert [row["row_index"] for row in rows] == list(range(NUM_TEXTS))
    assert len({row["model"] for row in rows}) == 1
    assert all(json.loads(row["sampling"])["max_new_tokens"] == 20 for row in rows)
    texts = (place / "corpus.txt").read_text().split("\n\n")
    documents = {tuple(int(word[1:]) for word in text.split()[:2]) for text in texts}
    for row in rows:
        assert tuple(row["prompt_ids"]) in documents
        assert row["token_ids"][:2] == row["prompt_ids"]
        assert row["ended"] == (row["token_ids"][-1] == 2)
        assert len(row["token_ids"]) <= 22 and math.isfinite(row["perplexity"])


def test_the_highest_fifth_is_dropped_and_says_why(place: Path) -> None:
    rows = [row for row in rows_of(place / "undisturbed") if row["dropped_for"] != "empty"]
    ranked = sorted(rows, key=lambda row: (row["perplexity"], row["row_index"]))
    num_dropped = len(rows) // 5
    assert [row["dropped_for"] for row in ranked] == [None] * (len(rows) - num_dropped) + ["high perplexity"] * (
        num_dropped
    )
    assert all(row["kept"] == (row["dropped_for"] is None) for row in rows_of(place / "undisturbed"))


def test_every_window_is_cut_from_texts_that_are_kept(place: Path) -> None:
    table = pq.read_table(place / "undisturbed" / "calibration" / "windows.parquet").to_pylist()
    assert {row["source"] for row in table} == {"selfgen"} and len(table) == 6
    kept = [token for row in rows_of(place / "undisturbed") if row["kept"] for token in row["token_ids"]]
    stretches = {tuple(kept[first : first + 16]) for first in range(len(kept) - 15)}
    assert all(tuple(row["input_ids"]) in stretches for row in table)


def test_the_summary_counts_what_the_rows_say(place: Path, out: Path) -> None:
    printed, rows = calibrate(place, out).out, rows_of(place / "undisturbed")
    summary = printed[printed.index("6 windows of 16 tokens: 6 from selfgen") :]
    kept = [row for row in rows if row["kept"]]
    assert f"| texts | {NUM_TEXTS}, of which {len(kept)} kept " in summary
    tokens = [sum(len(row["token_ids"]) for row in chosen) for chosen in (rows, kept)]
    assert f"| tokens | {tokens[0]}, kept {tokens[1]} |" in summary
    assert f"| ended by the model | {sum(row['ended'] for row in rows) / NUM_TEXTS:.1%} of the texts |" in summary
    measured = [row["perplexity"] for row in rows]
    for share in (0, 0.1, 0.5, 0.8, 0.9, 1):
        assert f"| perplexity, {share:.0%} quantile | {np.quantile(measured, share):.2f} |" in summary
    for reason, count in Counter(row["dropped_for"] for row in rows if not row["kept"]).items():
        assert f"{count} {reason}" in summary
    assert len(re.findall(r"-grams that are in the seed corpus \|", summary)) == 3
    progress = [line for line in printed.splitlines() if line.startswith("text ")]
    assert [line.split()[1] for line in progress] == [f"{n}/{NUM_TEXTS}" for n in range(4, NUM_TEXTS + 1, 4)]


def test_the_plot_is_a_picture(place: Path) -> None:
    content = (place / "undisturbed" / "calibration" / "perplexity.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and content.endswith(b"IEND\xaeB`\x82")


def test_the_stage_leaves_only_calibration(place: Path) -> None:
    assert {file.name for file in (place / "undisturbed").iterdir()} == {"calibration", "lease"}
    names = {re.sub("-[0-9a-f]{12}", "", name) for name in digests(place / "undisturbed")}
    assert names == {
        "calibration/windows.parquet",
        "calibration/perplexity.png",
        "calibration/selfgen/generation.json",
        "calibration/selfgen/rows.parquet",
        *(f"calibration/selfgen/batches/from-row-{first:08d}.parquet" for first in range(0, NUM_TEXTS, BATCH_SIZE)),
    }


def test_the_same_config_gives_the_same_bytes(place: Path, out: Path) -> None:
    calibrate(place, out)
    assert digests(out) == digests(place / "undisturbed")


def test_again_it_generates_nothing(place: Path, out: Path) -> None:
    shutil.copytree(place / "undisturbed", out)
    before, batches = digests(out), {file: file.stat().st_mtime_ns for file in batch_files(out)}
    assert not [line for line in calibrate(place, out).out.splitlines() if line.startswith("text ")]
    assert digests(out) == before
    assert {file: file.stat().st_mtime_ns for file in batch_files(out)} == batches


# --- interrupted


@pytest.mark.parametrize("num_batches", [1, 3, 5])
def test_killed_it_goes_on_and_ends_with_the_same_bytes(num_batches: int, place: Path, out: Path) -> None:
    num_found = killed_after(place, out, num_batches)
    assert num_batches <= num_found < NUM_TEXTS // BATCH_SIZE
    written = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in batch_files(out)}
    resumed = calibrate(place, out)
    for file, (modified, content) in written.items():
        assert (file.stat().st_mtime_ns, file.read_bytes()) == (modified, content), "no row is generated twice"
    told = [line for line in resumed.out.splitlines() if line.startswith("text ")]
    assert len(told) == NUM_TEXTS // BATCH_SIZE - num_found
    assert rows_file(out).read_bytes() == rows_file(place / "undisturbed").read_bytes()
    assert digests(out) == digests(place / "undisturbed")


def test_killed_again_and_again_no_row_is_lost(place: Path, out: Path) -> None:
    written: dict[Path, int] = {}
    for num_batches in (1, 2, 3, 4):
        if batch_files(out) and len(batch_files(out)) >= 5:
            break
        killed_after_more(place, out, num_batches)
        for file, modified in written.items():
            assert file.stat().st_mtime_ns == modified
        written = {file: file.stat().st_mtime_ns for file in batch_files(out)}
    calibrate(place, out)
    assert digests(out) == digests(place / "undisturbed")


def killed_after_more(place: Path, out: Path, num_batches: int) -> None:
    running: Running = start("calibrate", place / "run.yaml", f"output.path={out}")
    running.wait_until(lambda: len(batch_files(out)) >= num_batches)
    running.send(signal.SIGKILL)
    assert running.wait().code in (0, -signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_with_75_and_it_resumes(number: signal.Signals, place: Path, out: Path) -> None:
    running = start("calibrate", place / "run.yaml", f"output.path={out}")
    running.wait_until(lambda: len(batch_files(out)) >= 2)
    running.send(number)
    stopped = running.wait()
    assert stopped.code == 75 and "run again" in sentence(stopped)
    assert all(json.loads(file.read_text())["released"] for file in (out / "lease").iterdir())
    assert not [name for name in digests(out) if ".tmp-" in name]
    calibrate(place, out)
    assert digests(out) == digests(place / "undisturbed")


def test_a_stage_that_another_process_is_in_is_refused(place: Path, out: Path) -> None:
    running = start("calibrate", place / "run.yaml", f"output.path={out}", "calibration.source.num_texts=400")
    running.wait_until(lambda: len(batch_files(out)) >= 1)
    running.send(signal.SIGSTOP)
    assert "is running it" in refused(place, out)
    running.send(signal.SIGKILL)
    running.send(signal.SIGCONT)
    running.wait()


def test_a_full_disk_stops_it_with_75(place: Path, out: Path) -> None:
    stopped = shardprune("calibrate", place / "run.yaml", f"output.path={out}", max_file_bytes=2000)
    assert stopped.code == 75 and "run again to resume" in sentence(stopped)
    calibrate(place, out)
    assert digests(out) == digests(place / "undisturbed")


def test_a_run_that_has_read_its_prompts_does_not_need_them_again(place: Path, out: Path, tmp_path: Path) -> None:
    """The seed corpus comes from a dataset that is gone, or another one, when the killed stage goes on."""
    (tmp_path / "data").mkdir()
    texts = (place / "corpus.txt").read_text().split("\n\n")
    data = tmp_path / "data" / "data.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prompts = f"calibration.source.prompts={{name: dataset, path: {tmp_path / 'data'}}}"
    killed_after(place, out, 2, prompts)
    shutil.rmtree(tmp_path / "data")
    calibrate(place, out, prompts)
    assert len(batch_files(out)) == NUM_TEXTS // BATCH_SIZE


def test_whoever_has_lost_the_lease_writes_nothing_more(place: Path, out: Path) -> None:
    prepared = prepare(load_config(place / "run.yaml", [f"output.path={out}"]), Machine(1, False), print)
    (generation,) = prepared.calibration.generations

    def taken_over(_: list[Row]) -> None:
        holder = json.loads((out / "lease" / "00001.json").read_text())
        (out / "lease" / "00002.json").write_text(json.dumps({**holder, "owner": "somebody else", "released": True}))

    with opened(prepared) as (guard, _), pytest.raises(LeaseLost):
        generate_locally(generation, guard, taken_over)
    assert len(batch_files(out)) == 1
    calibrate(place, out)
    assert digests(out / "calibration") == digests(place / "undisturbed" / "calibration")


@pytest.mark.parametrize("content", [b"", b"PAR1", None])
def test_a_damaged_batch_is_refused_and_mended_by_the_advice(content: bytes | None, place: Path, out: Path) -> None:
    shutil.copytree(place / "undisturbed", out)
    file = batch_files(out)[2]
    file.write_bytes(file.read_bytes()[:-30] if content is None else content)
    told = refused(place, out)
    assert file.name in told and "delete it and run again" in told
    file.unlink()
    calibrate(place, out)
    assert digests(out) == digests(place / "undisturbed")


# --- more texts, other settings


def test_more_texts_leave_the_earlier_ones_as_they_were(place: Path, out: Path, tmp_path: Path) -> None:
    for num_texts in (5, 12, 17, 30):
        before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in batch_files(out)}
        calibrate(place, out, f"calibration.source.num_texts={num_texts}", "calibration.num_windows=2")
        assert all((file.stat().st_mtime_ns, file.read_bytes()) == was for file, was in before.items())
    calibrate(place, tmp_path / "fresh", "calibration.source.num_texts=30", "calibration.num_windows=2")
    assert rows_file(out).read_bytes() == rows_file(tmp_path / "fresh").read_bytes()
    assert (out / "calibration" / "windows.parquet").read_bytes() == (
        tmp_path / "fresh" / "calibration" / "windows.parquet"
    ).read_bytes()


def test_fewer_texts_are_the_first_ones(place: Path, out: Path) -> None:
    shutil.copytree(place / "undisturbed", out)
    calibrate(place, out, "calibration.source.num_texts=18")
    names = ["row_index", "token_ids", "perplexity"]
    few, all_rows = (pq.read_table(rows_file(folder), columns=names) for folder in (out, place / "undisturbed"))
    assert few.equals(all_rows.slice(0, 18))
    assert len(batch_files(out)) == NUM_TEXTS // BATCH_SIZE


def test_another_filter_needs_no_new_texts(place: Path, out: Path) -> None:
    shutil.copytree(place / "undisturbed", out)
    chosen = "calibration.source.filter={drop_highest: 0.3, drop_lowest: 0.29}"
    assert "text " not in calibrate(place, out, chosen).out.split("6 windows")[0]
    counts = Counter(row["dropped_for"] for row in rows_of(out))
    num_ranked = NUM_TEXTS - counts["empty"]
    assert counts["high perplexity"] == int(num_ranked * 3 // 10)
    assert counts["low perplexity"] == int(num_ranked * 29 // 100)


def test_other_texts_lie_beside_the_earlier_ones(place: Path, out: Path) -> None:
    shutil.copytree(place / "undisturbed", out)
    before = {name: value for name, value in digests(out).items() if "/selfgen-" in name}
    calibrate(place, out, "calibration.source.sampling.temperature=0.8")
    assert before.items() <= digests(out).items()
    assert len(list(out.glob("calibration/selfgen-*"))) == 2


@pytest.mark.parametrize("cut", ["inside", "across"])
def test_windows_of_generated_texts_inside_and_across(cut: str, place: Path, out: Path) -> None:
    shutil.copytree(place / "undisturbed", out)
    calibrate(place, out, f"calibration.windows={cut}", "calibration.num_windows=8")
    rows = [row["token_ids"] for row in rows_of(out) if row["kept"]]
    inside = {tuple(ids[first : first + 16]) for ids in rows for first in range(len(ids) - 15)}
    ids_NL = read_window_ids(str(out / "calibration" / "windows.parquet"))
    found = {tuple(ids) for ids in ids_NL.tolist()}
    assert len(found) == 8 and (found <= inside) == (cut == "inside")


def test_too_few_tokens_are_told_and_a_higher_number_of_texts_is_enough(place: Path, out: Path) -> None:
    asked = "calibration.num_windows=27"
    told = refused(place, out, asked)
    assert all(part in told for part in ("calibration.num_windows = 27", f"{NUM_TEXTS} generated texts are kept")), told
    assert "higher calibration.source.num_texts" in told
    written = {file: file.stat().st_mtime_ns for file in batch_files(out)}
    assert len(written) == NUM_TEXTS // BATCH_SIZE
    calibrate(place, out, asked, "calibration.source.num_texts=60")
    assert all(file.stat().st_mtime_ns == modified for file, modified in written.items())


def test_a_run_that_dies_at_any_of_its_writes_resumes_to_the_same_bytes(place: Path, tmp_path: Path) -> None:
    save_text(place / "words.txt", 60)
    prompts = {"name": "dataset", "path": "text", "data_files": str(place / "words.txt"), "num_documents": 1}
    write(place, tmp_path / "alone", prompts, "dies.yaml", num_texts=8)

    def run(out: Path, dies_at_write: int | None = None) -> int | None:
        return shardprune("run", place / "dies.yaml", f"output.path={out}", dies_at_write=dies_at_write).code

    def lasting(out: Path) -> dict[str, str]:
        """What stays: not the lease, nor what tells of attempts and times."""
        return {name: digest for name, digest in digests(out).items() if name.startswith(("model/", "calibration/"))}

    assert run(tmp_path / "alone") == 0
    for number in itertools.count(1):
        out = tmp_path / f"dies-{number}"
        if run(out, number) == 0:
            assert number > 15, "every file of a run is written this way"
            break
        assert run(out) == 0, number
        assert lasting(out) == lasting(tmp_path / "alone"), number


# --- in a mix


def mixed(place: Path, *parts: dict[str, Any]) -> str:
    return f"calibration.source={json.dumps({'name': 'mix', 'parts': [{'source': part} for part in parts]})}"


def test_a_mix_of_text_ids_and_the_models_own_texts(place: Path, out: Path) -> None:
    text = {"name": "text", "path": str(place / "text.txt")}
    ids = {"name": "parquet", "path": str(place / "windows.parquet")}
    own = selfgen(corpus(place), num_texts=8, batch_size=4)
    printed = calibrate(place, out, mixed(place, text, ids, own)).out
    names = [text["path"], ids["path"], "selfgen"]
    assert f"6 windows of 16 tokens: 2 from {names[0]}, 2 from {names[1]}, 2 from selfgen" in printed
    table = pq.read_table(out / "calibration" / "windows.parquet").to_pylist()
    assert [row["source"] for row in table] == [name for name in names for _ in range(2)]


def test_texts_may_begin_with_a_random_token(place: Path, out: Path) -> None:
    calibrate(place, out, "calibration.source.prompts=random", "calibration.source.num_texts=93")
    prompts = [row["prompt_ids"] for row in rows_of(out)]
    assert {first for first, _ in prompts} == {1}
    assert sorted(second for _, second in prompts) == list(range(3, 96)), "each but the special ones, in turn"
    assert [second for _, second in prompts] != list(range(3, 96))


@pytest.mark.parametrize(("first", "second"), [(8, 14), (14, 8), (10, 9)])
def test_two_parts_with_the_same_texts_are_refused_or_share_them(
    first: int, second: int, place: Path, out: Path
) -> None:
    """No text is generated twice and none is lost, although each part wants another number of them."""
    parts = (selfgen(corpus(place), num_texts=num_texts, filter={"drop_highest": 0.0}) for num_texts in (first, second))
    finished = shardprune("calibrate", place / "run.yaml", f"output.path={out}", mixed(place, *parts))
    if finished.code == 2:
        assert "calibration.source" in sentence(finished) and not out.exists()
        return
    assert finished.code == 0, finished.err[-300:]
    assert len(rows_of(out)) == max(first, second)
    told = [line for line in finished.out.splitlines() if line.startswith("text ")]
    assert len(told) == len(batch_files(out)), "a line for every batch that is generated"


def test_two_parts_with_other_texts_lie_in_two_folders(place: Path, out: Path) -> None:
    printed = calibrate(place, out, mixed(place, selfgen(corpus(place)), selfgen("bos"))).out
    assert len(list(out.glob("calibration/selfgen-*/rows.parquet"))) == 2
    assert printed.count("| texts | 12, ") == 2


# --- as a part of a run


@pytest.fixture(scope="module")
def finished(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "out"
    ended = shardprune("run", place / "run.yaml", f"output.path={folder}")
    assert ended.code == 0, ended.err
    return folder


def test_a_run_calibrates_first_and_reports_it(finished: Path, place: Path) -> None:
    assert (finished / "model" / "model.safetensors.index.json").exists()
    kept = digests(place / "undisturbed")
    assert kept.items() <= digests(finished).items()
    report = (finished / "report.md").read_text()
    assert "## Calibration" in report and f"| texts | {NUM_TEXTS}, " in report
    assert "(calibration/perplexity.png)" in report and (finished / "calibration" / "perplexity.png").is_file()


def test_a_run_after_calibrate_generates_nothing(finished: Path, place: Path, out: Path) -> None:
    shutil.copytree(place / "undisturbed", out)
    written = {file: file.stat().st_mtime_ns for file in batch_files(out)}
    ended = shardprune("run", place / "run.yaml", f"output.path={out}")
    assert ended.code == 0 and not re.search("^text ", ended.out, re.MULTILINE), ended.err
    assert {file: file.stat().st_mtime_ns for file in batch_files(out)} == written
    assert digests(out / "model") == digests(finished / "model")
    assert digests(out / "calibration") == digests(finished / "calibration")


def test_a_run_killed_while_generating_ends_with_the_same_bytes(finished: Path, place: Path, out: Path) -> None:
    running = start("run", place / "run.yaml", f"output.path={out}")
    running.wait_until(lambda: len(batch_files(out)) >= 3)
    running.send(signal.SIGKILL)
    running.wait()
    ended = shardprune("run", place / "run.yaml", f"output.path={out}")
    assert ended.code == 0, ended.err
    assert digests(out / "model") == digests(finished / "model")
    assert digests(out / "calibration") == digests(finished / "calibration")


def test_a_finished_run_is_left_as_it_is(finished: Path, place: Path) -> None:
    before, model = digests(finished), modified_ns(finished / "model")
    batches = {file: file.stat().st_mtime_ns for file in batch_files(finished)}
    for command in ("run", "calibrate", "run"):
        again = shardprune(command, place / "run.yaml", f"output.path={finished}")
        assert again.code == 0, again.err
        assert (digests(finished), modified_ns(finished / "model")) == (before, model)
        assert {file: file.stat().st_mtime_ns for file in batch_files(finished)} == batches


@pytest.mark.parametrize("command", ["run", "calibrate"])
@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("calibration.source.sampling.temperature=0.8", "calibration.source.sampling.temperature was 1.0, now 0.8"),
        ("calibration.source.seed=1", "calibration.source.seed was 0, now 1"),
        ("calibration.source.batch_size=3", "calibration.source.batch_size was 4, now 3"),
        ("calibration.source.prompts=bos", "calibration.source.prompts was"),
        ("calibration.source.filter.drop_highest=0.5", "calibration.source.filter.drop_highest was"),
        ("calibration.num_windows=5", "calibration.num_windows was"),
        ("calibration.windows=inside", "calibration windows was"),
    ],
)
def test_other_texts_or_windows_are_another_run(
    command: str, override: str, told: str, finished: Path, place: Path
) -> None:
    before, written = digests(finished), modified_ns(finished)
    answer = refused(place, finished, override, command=command)
    assert told in answer and "another run" in answer, answer
    assert (digests(finished), modified_ns(finished)) == (before, written), "refused before anything is generated"


# --- what cannot work


def test_an_empty_corpus(place: Path, out: Path) -> None:
    (place / "empty.txt").write_text("")
    told = refused(place, out, f"calibration.source.prompts={{name: text, path: {place / 'empty.txt'}}}")
    assert "calibration.source.prompts" in told and "empty.txt" in told and not out.exists()


def test_a_corpus_of_special_tokens(place: Path, out: Path) -> None:
    (place / "special.txt").write_text("</s> <s> </s> <pad> " * 20)
    told = refused(place, out, f"calibration.source.prompts={{name: text, path: {place / 'special.txt'}}}")
    assert "special tokens" in told and "special.txt" in told and not out.exists()


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("calibration.source.prompt_tokens=9", ["calibration.source.prompt_tokens = 9", "longest of 10 has 8"]),
        ("calibration.source.prompts=boss", ["calibration.source.prompts = 'boss'"]),
        ("calibration.source.prompts={name: tekst, path: x}", ["calibration.source.prompts", "'tekst'"]),
        ("calibration.source.prompts=[]", ["calibration.source.prompts"]),
        ("calibration.source.prompts={name: text, path: none.txt}", ["none.txt", "no such file"]),
        ("calibration.source.preset=papers", ["calibration.source.preset = 'papers'", "'paper'"]),
        ("calibration.source.num_texts=4", ["calibration.source.num_texts = 4", "6 windows of 16"]),
        ("calibration.source.num_texts=0", ["calibration.source.num_texts = 0"]),
        ("calibration.source.sampling.max_new_tokens=63", ["max_new_tokens", "65", "64"]),
        ("calibration.source.sampling.temperature=0", ["calibration.source.sampling.temperature = 0"]),
        ("calibration.source.sampling.top_p=0", ["calibration.source.sampling.top_p = 0"]),
        ("calibration.source.sampling.topp=0.5", ["calibration.source.sampling.topp", "unknown key"]),
        ("calibration.source.sampling=hot", ["calibration.source.sampling"]),
        ("calibration.source.filter.drop_highest=1", ["calibration.source.filter.drop_highest = 1"]),
        ("calibration.source.filter.drop_lowest=0.8", ["calibration.source.filter", "below 1"]),
        ("calibration.source.engine.name=vllm", ["vllm", "cluster.address"]),
        ("calibration.source.engine.name=sglang", ["calibration.source.engine.name = 'sglang'", "'vllm'"]),
        ("calibration.source.batch_size=0", ["calibration.source.batch_size = 0"]),
        ("calibration.windows=rows", ["calibration.windows = 'rows'", "inside or across"]),
        ("calibration.windows=between", ["calibration.windows = 'between'"]),
        ("calibration.window_length=65", ["calibration.window_length = 65"]),
    ],
)
def test_settings_that_cannot_be(override: str, told: list[str], place: Path, out: Path) -> None:
    answer = refused(place, out, override)
    assert all(part in answer for part in told), answer
    assert not out.exists(), "nothing is written"


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("calibration.source.prompts={name: text}", "calibration.source.prompts.path: missing"),
        ("calibration.source.preset=[paper]", "calibration.source.preset"),
        ("calibration.source.engine={name: transformers, max_memory: {gpu: 70GB}}", "engine.max_memory"),
        ("calibration.source.engine={name: transformers, max_memory: {cpu: lots}}", "engine.max_memory"),
        ("calibration.source.engine={name: transformers, max_memory: {cpu: -1}}", "engine.max_memory"),
        ("calibration.source.engine={name: transformers, max_memory: {'7': 1GB, cpu: 1GB}}", "engine.max_memory"),
        (
            "calibration.source.engine={name: transformers, max_memory: {cpu: 60KB}, offload_path: /proc/none}",
            "offload_path",
        ),
    ],
)
def test_mistakes_in_what_is_nested_are_told_by_name(override: str, told: str, place: Path, out: Path) -> None:
    assert told in refused(place, out, override)
    assert not batch_files(out)


@pytest.mark.parametrize("max_memory", ["{cpu: 60KB}", "{cpu: 60KB, disk: 1GB}", "{cpu: 10, disk: 1GB}", "{}"])
def test_where_the_weights_lie_does_not_change_a_byte(max_memory: str, place: Path, out: Path, tmp_path: Path) -> None:
    engine = f"{{name: transformers, max_memory: {max_memory}, offload_path: {tmp_path / 'offload'}}}"
    calibrate(place, out, f"calibration.source.engine={engine}")
    assert digests(out) == digests(place / "undisturbed")


def test_what_libraries_tell_of_where_they_put_weights_is_no_error(place: Path, out: Path) -> None:
    engine = "{name: transformers, max_memory: {cpu: 60KB, disk: 1GB}}"
    assert calibrate(place, out, f"calibration.source.engine={engine}").err == ""


def test_texts_that_can_never_be_as_long_as_a_window_are_refused_before_they_are_written(
    place: Path, out: Path
) -> None:
    told = refused(place, out, "calibration.windows=inside", "calibration.window_length=32")
    assert "calibration.window" in told and "22" in told, told
    assert not out.exists()


def test_windows_rows_of_text(place: Path, out: Path) -> None:
    source = f"calibration.source={{name: text, path: {place / 'text.txt'}}}"
    assert "calibration.windows = 'rows'" in refused(place, out, source, "calibration.windows=rows", command="run")
    assert not out.exists()


def spoil(place: Path, folder: Path, family: str = "llama") -> tuple[Path, dict[str, torch.Tensor]]:
    model = save_tokenizer(save_model(folder / "model", family))
    return model, load_file(model / "model.safetensors")


def test_a_model_that_ends_every_text_at_once(place: Path, tmp_path: Path, out: Path) -> None:
    model, tensors = spoil(place, tmp_path, "gpt2")
    key = "transformer.ln_f" if "transformer.ln_f.weight" in tensors else "ln_f"
    embedding = key.replace("ln_f", "wte.weight")
    tensors[embedding][2] = 0
    tensors[embedding][2, 0] = 10
    tensors[f"{key}.weight"].zero_()
    tensors[f"{key}.bias"].zero_()[0] = 100
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    told = refused(place, out, f"model.path={model}")
    assert f"ended each of {NUM_TEXTS} texts at once" in told and "prompts" in told, told
    assert len(batch_files(out)) == NUM_TEXTS // BATCH_SIZE, "what it wrote is kept"


def test_a_model_for_which_every_token_is_the_end(place: Path, tmp_path: Path, out: Path) -> None:
    model, _ = spoil(place, tmp_path)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(96))}))
    assert "at once" in refused(place, out, f"model.path={model}", "calibration.source.prompts=bos")
    assert "special tokens" in refused(place, out, f"model.path={model}")


def test_a_generation_config_that_is_none(place: Path, tmp_path: Path, out: Path) -> None:
    model, _ = spoil(place, tmp_path)
    for content in ("{", "[]", "7"):
        (model / "generation_config.json").write_text(content)
        assert "generation_config.json" in refused(place, out, f"model.path={model}")


def test_logits_that_are_not_finite_end_it_with_a_sentence_and_what_is_written_stays(
    place: Path, tmp_path: Path, out: Path
) -> None:
    """Tokens from w90 on poison the model; they are in one prompt and never among the five likeliest tokens."""
    model, tensors = spoil(place, tmp_path)
    tensors["model.embed_tokens.weight"][90:] = math.nan
    tensors["lm_head.weight"][90:] = 0
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    texts = [f"w{10 + number} w{40 + number} w5" for number in range(9)]
    (tmp_path / "sound.txt").write_text("\n\n".join([*texts, "w30 w31 w5"]))
    (tmp_path / "poisoned.txt").write_text("\n\n".join([*texts, "w30 w95 w5"]))
    overrides = [f"model.path={model}", "calibration.source.batch_size=1", "calibration.source.sampling.top_k=5"]
    overrides += ["calibration.source.num_texts=10", "calibration.num_windows=2"]

    def prompts(name: str) -> str:
        return f"calibration.source.prompts={json.dumps(corpus(tmp_path, name))}"

    calibrate(place, tmp_path / "sound", *overrides, prompts("sound.txt"))
    poisoned = next(row["row_index"] for row in rows_of(tmp_path / "sound") if row["prompt_ids"] == [30, 31])
    assert poisoned > 0
    for _ in range(2):
        told = refused(place, out, *overrides, prompts("poisoned.txt"))
        assert f"texts {poisoned} to {poisoned}" in told and "not finite" in told and "model.dtype" in told, told
        assert len(batch_files(out)) == poisoned


def test_perplexities_beyond_all_numbers_are_told_and_drawn(place: Path, tmp_path: Path, out: Path) -> None:
    model, tensors = spoil(place, tmp_path)
    for factor in (1e3, 1e5):
        tensors["lm_head.weight"] *= factor
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
        hot = "calibration.source.sampling.temperature=1e12"
        finished = calibrate(place, tmp_path / f"{factor:g}", f"model.path={model}", hot)
        assert finished.err == "" and "nan" not in finished.out, (finished.err, finished.out)
        measured = [row["perplexity"] for row in rows_of(tmp_path / f"{factor:g}")]
        assert any(map(math.isinf, measured)) and not any(map(math.isnan, measured))


def test_what_auto_meant_is_what_it_means_when_the_stage_goes_on(place: Path, out: Path) -> None:
    """On a machine with other cores the texts that are there are not written again."""
    config = load_config(place / "run.yaml", [f"output.path={out}", "runtime.threads=auto"])
    prepared = prepare(config, Machine(num_cores=1, has_cuda=False), print)
    (generation,) = prepared.calibration.generations
    with opened(prepared):
        first = generation.missing()[0]
        generation.store.write(Generator(generation.task)(first))
    again = prepare(config, Machine(num_cores=2, has_cuda=False), print)
    assert again.calibration.num_missing == NUM_TEXTS - BATCH_SIZE


def test_a_text_source_needs_no_generator(place: Path, out: Path) -> None:
    source = f"calibration.source={{name: text, path: {place / 'text.txt'}}}"
    printed = calibrate(place, out, source).out
    assert printed.strip() == f"6 windows of 16 tokens: 6 from {place / 'text.txt'}"
    assert list(digests(out)) == ["calibration/windows.parquet"]
