"""Source `dataset`: folders of any format, read once; what cannot be read is told in a sentence."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command import refusal, sentence, shardprune
from datasets import Dataset, DatasetDict
from tiny import build_reader, digests, random_ids, save_model, save_tokenizer, save_windows, write_config
from transformers import AutoTokenizer

from pipeline.calibration.dataset import DatasetSource
from pipeline.calibration.plan import Calibration, plan_calibration
from pipeline.errors import Incomplete, Refusal

NUM_DOCUMENTS = 12
TEXTS = [" ".join(f"w{token}" for token in row) for row in random_ids(NUM_DOCUMENTS, 40).tolist()]


def write_json(folder: Path) -> dict[str, Any]:
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in TEXTS))
    return {"path": str(folder)}


def write_parquet(folder: Path) -> dict[str, Any]:
    pq.write_table(pa.table({"text": TEXTS, "n": [1] * NUM_DOCUMENTS}), folder / "data.parquet")
    return {"path": str(folder)}


def write_csv(folder: Path) -> dict[str, Any]:
    (folder / "data.csv").write_text("n,text\n" + "".join(f'1,"{text}"\n' for text in TEXTS))
    return {"path": str(folder)}


def write_text(folder: Path) -> dict[str, Any]:
    (folder / "data.txt").write_text("".join(text + "\n" for text in TEXTS))
    return {"path": str(folder)}


def write_named_files(folder: Path) -> dict[str, Any]:
    halves = TEXTS[:5], TEXTS[5:]
    for number, half in enumerate(halves):
        (folder / f"part-{number}.json").write_text("".join(json.dumps({"text": text}) + "\n" for text in half))
    return {"path": "json", "data_files": [str(folder / f"part-{number}.json") for number in range(2)]}


def write_one_named_file(folder: Path) -> dict[str, Any]:
    return {**write_parquet(folder), "path": "parquet", "data_files": str(folder / "data.parquet")}


def save_to_disk(folder: Path) -> dict[str, Any]:
    Dataset.from_dict({"text": TEXTS}).save_to_disk(folder)
    return {"path": str(folder)}


def save_splits_to_disk(folder: Path) -> dict[str, Any]:
    others = Dataset.from_dict({"text": ["w3"] * 3})
    DatasetDict({"train": Dataset.from_dict({"text": TEXTS}), "test": others}).save_to_disk(folder)
    return {"path": str(folder)}


FORMATS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "json lines": write_json,
    "parquet": write_parquet,
    "csv": write_csv,
    "text": write_text,
    "files by name": write_named_files,
    "a file by name": write_one_named_file,
    "saved to disk": save_to_disk,
    "splits saved to disk": save_splits_to_disk,
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def read(folder: Path, seed: int = 0, **settings: Any) -> list[str]:
    return DatasetSource(**settings).read(folder / "out", seed)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_all_its_documents(name: str, folder: Path) -> None:
    source = FORMATS[name](folder)
    assert read(folder, shuffle=False, **source) == TEXTS
    shuffled = read(folder, **source)
    assert sorted(shuffled) == sorted(TEXTS) and shuffled != TEXTS


@pytest.mark.parametrize("name", ["json lines", "files by name", "splits saved to disk"])
def test_the_order_is_drawn_by_seed(name: str, folder: Path) -> None:
    source = FORMATS[name](folder)
    assert read(folder, seed=3, **source) == read(folder, seed=3, **source) != read(folder, seed=4, **source)


def test_the_first_documents_are_taken(folder: Path) -> None:
    source = write_json(folder)
    assert read(folder, shuffle=False, num_documents=5, **source) == TEXTS[:5]
    few = read(folder, num_documents=5, **source)
    assert len(few) == 5 and set(few) <= set(TEXTS)


def test_split_and_column_are_those_asked_for(folder: Path) -> None:
    source = save_splits_to_disk(folder)
    assert read(folder, split="test", **source) == ["w3"] * 3
    write_csv(folder.parent)
    table = {"path": "csv", "data_files": str(folder.parent / "data.csv")}
    assert read(folder, column="text", shuffle=False, **table) == TEXTS


def _shorten(folder: Path) -> dict[str, Any]:
    source = write_parquet(folder)
    file = folder / "data.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    return source


def _break_json(folder: Path) -> dict[str, Any]:
    (folder / "data.jsonl").write_text('{"text": "w3"}\n{"text": ')
    return {"path": str(folder)}


def _compress_badly(folder: Path) -> dict[str, Any]:
    (folder / "data.jsonl.gz").write_bytes(b"\x1f\x8b\x08\x00 no gzip")
    return {"path": str(folder)}


def _other_encoding(folder: Path) -> dict[str, Any]:
    (folder / "data.txt").write_bytes("façade\n".encode("latin-1"))
    return {"path": str(folder)}


def _damage_saved(folder: Path) -> dict[str, Any]:
    source = save_to_disk(folder)
    next(folder.glob("*.arrow")).write_bytes(b"nothing")
    return source


def _lose_saved(folder: Path) -> dict[str, Any]:
    source = save_to_disk(folder)
    next(folder.glob("*.arrow")).unlink()
    return source


def _script(folder: Path) -> dict[str, Any]:
    (folder / "data.py").write_text("raise SystemExit('it ran')")
    return {"path": str(folder)}


BAD: dict[str, tuple[Callable[[Path], dict[str, Any]], list[str]]] = {
    "no such folder": (lambda folder: {"path": str(folder / "none")}, ["none"]),
    "no such name": (lambda folder: {"path": "nobody/nothing"}, ["nobody/nothing"]),
    "no such format": (lambda folder: {"path": "sqml", "data_files": "a.sqml"}, ["sqml"]),
    "no such file": (lambda folder: {"path": "json", "data_files": str(folder / "none.json")}, ["none.json"]),
    "empty folder": (lambda folder: {"path": str(folder)}, ["data"]),
    "wrong split": (lambda folder: {**write_json(folder), "split": "valid"}, ["valid"]),
    "wrong split, saved": (lambda folder: {**save_splits_to_disk(folder), "split": "valid"}, ["valid"]),
    "wrong config": (lambda folder: {**write_json(folder), "config": "en"}, ["en"]),
    "wrong column": (lambda folder: {**write_json(folder), "column": "body"}, ["'body'", "'text'", "column"]),
    "wrong column, saved": (lambda folder: {**save_to_disk(folder), "column": "body"}, ["'body'", "'text'"]),
    "column of numbers": (lambda folder: {**write_json(folder), "column": "n"}, ["'n'", "column"]),
    "cut short": (_shorten, ["data"]),
    "half a line": (_break_json, ["data"]),
    "no gzip": (_compress_badly, ["data"]),
    "not UTF-8": (_other_encoding, ["data"]),
    "saved and damaged": (_damage_saved, ["data"]),
    "saved and lost": (_lose_saved, ["data"]),
    "a script": (_script, ["data"]),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_told_in_a_sentence(name: str, folder: Path) -> None:
    spoil, told = BAD[name]
    source = spoil(folder)
    with pytest.raises((Refusal, Incomplete)) as raised:
        read(folder, **source)
    answer = str(raised.value)
    assert "calibration.source.path" in answer and all(part in answer for part in told), answer


# --- kept with the run


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    save_tokenizer(save_model(folder / "model", "llama"))
    save_windows(folder / "windows.parquet", 4, 16)
    return folder


def plan(place: Path, out: Path, source: dict[str, Any], **settings: Any) -> Calibration:
    values = {"source": {"name": "dataset", **source}, "num_windows": 4, "window_length": 16, **settings}
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    return plan_calibration(build_reader(place / "model", out, values, tokenizer))


def run_config(place: Path, folder: Path, source: dict[str, Any]) -> Path:
    return write_config(
        folder / "run.yaml",
        place / "model",
        place / "windows.parquet",
        folder / "out",
        **{"calibration.source": {"name": "dataset", **source}, "calibration.num_windows": 4},
    )


def kept(folder: Path) -> list[Path]:
    return list((folder / "out" / "calibration").glob("documents-*.parquet"))


@pytest.mark.parametrize("change", ["other texts", "gone"])
def test_a_run_goes_on_with_the_documents_it_has_read(change: str, place: Path, tmp_path: Path, folder: Path) -> None:
    config = run_config(place, tmp_path, write_json(folder))
    first = shardprune("calibrate", config)
    assert first.code == 0, first.err
    assert len(kept(tmp_path)) == 1
    assert sorted(pq.read_table(kept(tmp_path)[0])["text"].to_pylist()) == sorted(TEXTS)
    before = digests(tmp_path / "out")
    if change == "gone":
        shutil.rmtree(folder)
    else:
        (folder / "data.jsonl").write_text(json.dumps({"text": "w3 w4 " * 50}) + "\n")
    again = shardprune("calibrate", config)
    assert (again.code, again.out) == (0, first.out), again.err
    assert digests(tmp_path / "out") == before
    for _ in range(2):
        finished = shardprune("run", config)
        assert finished.code == 0, finished.err
    assert before.items() <= digests(tmp_path / "out").items()


def test_other_settings_of_a_dataset_are_read_anew(place: Path, tmp_path: Path, folder: Path) -> None:
    config = run_config(place, tmp_path, write_json(folder))
    assert shardprune("calibrate", config).code == 0
    assert shardprune("calibrate", config, "calibration.source.num_documents=11").code == 0
    assert shardprune("calibrate", config, "calibration.seed=1").code == 0
    assert len(kept(tmp_path)) == 3


def test_kept_documents_that_are_damaged_are_refused(place: Path, tmp_path: Path, folder: Path) -> None:
    config = run_config(place, tmp_path, write_json(folder))
    assert shardprune("calibrate", config).code == 0
    for damage in (b"", b"PAR1", kept(tmp_path)[0].read_bytes()[:-9]):
        kept(tmp_path)[0].write_bytes(damage)
        told = refusal("calibrate", config)
        assert kept(tmp_path)[0].name in told and "delete it" in told
    kept(tmp_path)[0].unlink()
    assert shardprune("calibrate", config).code == 0


def test_nothing_is_kept_before_a_run_begins(place: Path, tmp_path: Path, folder: Path) -> None:
    calibration = plan(place, tmp_path / "out", write_json(folder))
    assert not (tmp_path / "out").exists()
    assert [table["text"].to_pylist() for table in calibration.fetched.values()] == [read(folder, path=str(folder))]


@pytest.mark.parametrize("path", ["nobody/nothing", "nothing", "/no/such/folder"])
def test_the_command_tells_it_in_a_sentence_too(path: str, place: Path, tmp_path: Path) -> None:
    finished = shardprune("run", run_config(place, tmp_path, {"path": path}))
    assert finished.code in (2, 75), finished.err
    assert path in sentence(finished)
    assert not (tmp_path / "out").exists()


SECRET = "sEcrEt"


@pytest.mark.parametrize(
    "url",
    [
        f"https://user:{SECRET}@host/data.json",
        f"https://user:{SECRET}/with/slashes@host/data.json",
        f"https://host/data.json?token={SECRET}",
        f"https://host/data.json#{SECRET}",
        f"zip://data.json::https://{SECRET}@host/data.zip",
    ],
)
def test_a_url_that_may_hold_a_secret_is_refused_without_it(url: str, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(f"model: {{path: m}}\ncalibration: {{source: {{}}}}\noutput: {{path: {tmp_path}/out}}\n")
    dataset = {"name": "dataset", "path": "json"}
    engine = {"name": "vllm", "packages": ["vllm", f"blake3 @ {url}"]}
    for source in (
        {**dataset, "data_files": url},
        {**dataset, "data_files": {"train": url}},
        {**dataset, "data_files": ["data.json", url]},
        {"name": "selfgen", "prompts": "bos", "engine": engine},
    ):
        told = refusal("run", config, f"calibration.source={json.dumps(source)}")
        assert "calibration.source." in told and SECRET not in told


def test_what_a_library_says_of_a_url_is_told_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have been led elsewhere."""

    def load(*arguments: object, **more: object) -> None:
        raise ValueError(f"cannot read https://host/data.json?signature={SECRET}")

    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(Refusal, match=r"cannot read https://host/data\.json") as refused:
        DatasetSource(path="json", data_files="https://host:8443/data.json").read(Path("nowhere"), 0)
    assert SECRET not in str(refused.value)


def test_a_dataset_too_short_is_refused(place: Path, tmp_path: Path, folder: Path) -> None:
    told = refusal("run", run_config(place, tmp_path, {**write_json(folder), "num_documents": 1}))
    assert "calibration.num_windows = 4" in told and "40 tokens" in told
