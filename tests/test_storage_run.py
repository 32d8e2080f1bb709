"""A run whose model and directory lie on an object store: the bytes of a local one, also when it is cut off."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import s3 as store
import torch
from command import Finished, refusal, sentence, shardprune, start
from s3 import ACCESS_KEY, BUCKET, SECRET_KEY, Server
from tiny import digests, save_model, save_text, save_tokenizer, save_windows, selfgen, write_config

from pipeline.files import write_file
from pipeline.storage import locate, status

NUM_LAYERS = 6
SHARDPRUNE = Path(sys.executable).parent / "shardprune"


@pytest.fixture(scope="module")
def place(s3_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of six layers, here and on the store, and in undisturbed/ the run on local paths."""
    folder = tmp_path_factory.mktemp("place")
    source = save_model(folder / "model", "llama", torch.bfloat16, "30KB", num_hidden_layers=NUM_LAYERS)
    save_tokenizer(source)
    (source / "chat_template.jinja").write_text("{{ messages }}\n")
    windows = save_windows(folder / "windows.parquet", 24, 32)
    text = save_text(folder / "text.txt", 100)
    settings: dict[str, Any] = {
        "output.keep_entry_every": 2,
        "runtime.micro_batch_tokens": 256,
        "evaluation.text": str(text),
    }
    write_config(folder / "run.yaml", source, windows, folder / "undisturbed", "sparsegpt", 0.5, **settings)
    assert shardprune("run", folder / "run.yaml").code == 0
    s3_server.behave("")
    store.upload(source, f"s3://{BUCKET}/model")
    return folder


def command(place: Path, url: str, *overrides: str) -> tuple[object, ...]:
    return ("run", place / "run.yaml", f"model.path=s3://{BUCKET}/model", f"output.path={url}", *overrides)


def undisturbed(place: Path) -> dict[str, str]:
    return digests(place / "undisturbed" / "model")


def receipts(url: str) -> list[dict[str, Any]]:
    found = store.contents(f"{url}/receipts")
    return [json.loads(found[name]) for name in sorted(found)]


def num_committed(url: str) -> Callable[[int], Callable[[], bool]]:
    return lambda at_least: lambda: len(store.names(f"{url}/receipts")) >= at_least


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_model_and_directory_on_the_store_give_the_bytes_of_local_ones(scheme: str, place: Path, s3: Server) -> None:
    url = s3.new_url(scheme)
    finished = shardprune(*command(place, url, f"model.path={scheme}://{BUCKET}/model"))
    assert finished.code == 0, finished.err
    assert store.digests(f"{url}/model") == undisturbed(place)
    local = {name for name in digests(place / "undisturbed") if not name.startswith("lease/")}
    assert set(store.digests(url)) == local
    for receipt in receipts(url):
        found = status(locate(url) / "model" / receipt["file"])
        assert (receipt["num_bytes"], receipt["etag"]) == (found.num_bytes, found.etag)
        assert receipt["sha256"] == undisturbed(place)[receipt["file"]]
    perplexities = (place / "undisturbed" / "report.md").read_text().split("| dense |")[1].split("##")[0]
    assert perplexities in finished.out
    before = store.contents(f"{url}/model")
    assert shardprune(*command(place, url, f"model.path={scheme}://{BUCKET}/model")).code == 0
    assert store.contents(f"{url}/model") == before


def test_only_the_directory_or_only_the_model_on_the_store(place: Path, s3: Server, tmp_path: Path) -> None:
    url = s3.new_url()
    assert shardprune("run", place / "run.yaml", f"output.path={url}").code == 0
    assert shardprune(*command(place, str(tmp_path / "out"))).code == 0
    assert store.digests(f"{url}/model") == digests(tmp_path / "out" / "model") == undisturbed(place)


def test_evaluate_reads_a_model_from_the_store(place: Path, s3: Server) -> None:
    settings = (f"evaluation.text={place / 'text.txt'}", "evaluation.window_length=32")
    told = [shardprune("evaluate", model, *settings) for model in (place / "model", f"s3://{BUCKET}/model")]
    assert told[0].code == told[1].code == 0 and told[0].out == told[1].out, told


def test_status_reads_a_run_on_the_store(place: Path, s3: Server) -> None:
    url = s3.new_url()
    killed_after(place, url, 2)
    before = store.contents(url)
    told = shardprune("status", url)
    assert told.code == 0 and "run again to resume" in told.out and "is dead" in told.out, told
    assert store.contents(url) == before
    assert shardprune(*command(place, url)).code == 0
    assert "held by nobody" in shardprune("status", url).out
    secret = f"s3://{ACCESS_KEY}:{SECRET_KEY}@bucket/run"
    assert SECRET_KEY not in refusal("status", secret)


def test_a_run_is_named_after_what_lies_on_the_store(place: Path, s3: Server) -> None:
    url = s3.new_url()
    first = shardprune(*command(place, f"{url}/{{revision}}"))
    assert first.code == 0, first.err
    (revision,) = (path.name for path in locate(url).iterdir())
    assert len(revision) == 40 and store.digests(f"{url}/{revision}/model") == undisturbed(place)
    before = store.contents(url)
    assert shardprune(*command(place, f"{url}/{{revision}}")).code == 0
    assert store.contents(url) == before


@pytest.mark.ray
def test_on_ray_too(place: Path, s3: Server) -> None:
    url = s3.new_url()
    arguments = [str(each) for each in command(place, url, "cluster.address=local", "cluster.num_shards=2")]
    result = subprocess.run([SHARDPRUNE, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert store.digests(f"{url}/model") == undisturbed(place)


def test_texts_that_the_model_writes_are_kept_on_the_store(place: Path, s3: Server, tmp_path: Path) -> None:
    source = f"calibration.source={json.dumps(selfgen())}"
    short = ("calibration.num_windows=4", "calibration.window_length=16")
    url, local = s3.new_url(), f"output.path={tmp_path / 'out'}"
    for arguments in (("run", place / "run.yaml", local, source, *short), (*command(place, url), source, *short)):
        finished = shardprune(*arguments)
        assert finished.code == 0, finished.err
    assert store.digests(f"{url}/model") == digests(tmp_path / "out" / "model")
    assert sum(name.startswith("calibration/selfgen-") for name in store.names(url)) == len(
        [name for name in digests(tmp_path / "out") if name.startswith("calibration/selfgen-")]
    )


# --- cut off


def killed_after(place: Path, url: str, num_layers: int) -> int:
    """Kill a run as soon as some layers are committed; how many are then."""
    running = start(*command(place, url))
    running.wait_until(num_committed(url)(num_layers))
    running.send(signal.SIGKILL)
    assert running.wait().code == -signal.SIGKILL
    return len(store.names(f"{url}/receipts"))


@pytest.mark.parametrize("num_layers", [1, 4])
def test_killed_in_the_middle_it_resumes(num_layers: int, place: Path, s3: Server) -> None:
    url = s3.new_url()
    found = killed_after(place, url, num_layers)
    before = store.contents(f"{url}/receipts")
    finished = shardprune(*command(place, url))
    assert finished.code == 0, finished.err
    assert "taking over from process" in finished.out and "is dead" in finished.out
    assert store.digests(f"{url}/model") == undisturbed(place)
    assert [receipt["attempt"] for receipt in receipts(url)] == [1] * found + [2] * (NUM_LAYERS - found)
    assert before.items() <= store.contents(f"{url}/receipts").items(), "a receipt is written once"
    assert all(receipt["num_layers_replayed"] <= 2 for receipt in receipts(url))


@pytest.mark.parametrize("behaviour", ["gone", "busy"])
def test_a_store_that_goes_away_stops_it_with_75_and_it_resumes(behaviour: str, place: Path, s3: Server) -> None:
    url = s3.new_url()
    running = start(*command(place, url))
    running.wait_until(num_committed(url)(2))
    s3.behave(behaviour)
    stopped = running.wait()
    s3.behave("")
    assert stopped.code == 75, stopped
    assert url.removesuffix("/out") in sentence(stopped) and "run again to resume" in sentence(stopped)
    assert 2 <= len(receipts(url)) < NUM_LAYERS
    finished = shardprune(*command(place, url))
    assert finished.code == 0, finished.err
    assert store.digests(f"{url}/model") == undisturbed(place)


def test_a_store_that_is_busy_for_a_moment_costs_a_retry(
    place: Path, s3: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "8")
    url = s3.new_url()
    running = start(*command(place, url))
    running.wait_until(num_committed(url)(1))
    s3.behave("busy")
    threading.Timer(0.05, lambda: s3.behave("")).start()
    finished = running.wait()
    assert finished.code == 0, finished.err
    assert store.digests(f"{url}/model") == undisturbed(place)


def test_a_second_signal_ends_what_waits_for_the_store(place: Path, s3: Server) -> None:
    url, before = s3.new_url(), s3.num_hanging()
    running = start(*command(place, url))
    running.wait_until(num_committed(url)(1))
    s3.behave("hang PUT")
    running.wait_until(lambda: s3.num_hanging() > before)
    while running.process.is_alive():
        running.send(signal.SIGINT)
        running.process.join(0.2)
    assert running.wait().code == -signal.SIGINT
    s3.behave("")
    assert len(receipts(url)) < NUM_LAYERS


def test_a_damaged_layer_is_refused(place: Path, s3: Server) -> None:
    url = s3.new_url()
    assert shardprune(*command(place, url)).code == 0
    file = locate(url) / "model" / "model-00004-of-00007.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    write_file(file, bytes(content))
    assert "layer 2" in refusal(*command(place, url))


def test_a_run_copied_elsewhere_goes_on_though_etags_are_others(place: Path, s3: Server, tmp_path: Path) -> None:
    """From a folder, where there are none, to the store."""
    shutil.copytree(place / "undisturbed", tmp_path / "out")
    for file in sorted((tmp_path / "out" / "receipts").iterdir())[3:]:
        file.unlink()
    url = store.upload(tmp_path / "out", s3.new_url())
    finished = shardprune("run", place / "run.yaml", f"output.path={url}")
    assert finished.code == 0, finished.err
    assert store.digests(f"{url}/model") == undisturbed(place)


# --- refused


def test_a_bucket_or_model_that_is_not_there_is_refused(place: Path, s3: Server, tmp_path: Path) -> None:
    told = refusal(*command(place, "s3://nobody-has-this/run"))
    assert "s3://nobody-has-this" in told and "no bucket" in told
    told = refusal("run", place / "run.yaml", "model.path=s3://nobody-has-this/x", f"output.path={tmp_path / 'out'}")
    assert "no bucket" in told
    told = refusal("run", place / "run.yaml", f"model.path=s3://{BUCKET}/nothing", f"output.path={tmp_path / 'out'}")
    assert "model.path = s3://bucket/nothing: no such folder" in told


@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_denied_access_is_refused(method: str, place: Path, s3: Server) -> None:
    url = s3.new_url()
    s3.behave(f"deny {method}")
    told = refusal(*command(place, url))
    assert "access denied" in told and "s3://" in told and ACCESS_KEY not in told
    s3.behave("")
    assert not store.names(url)


def test_a_directory_with_other_things_or_within_the_model_is_refused(place: Path, s3: Server) -> None:
    url = s3.new_url()
    write_file(locate(url) / "thesis.txt", b"all there is")
    assert "holds files that are no run" in refusal(*command(place, url))
    assert "overlaps" in refusal(*command(place, f"s3://{BUCKET}/model/pruned"))
    assert store.names(url) == ["thesis.txt"]


def test_another_model_in_the_same_place_is_another_run(place: Path, s3: Server, tmp_path: Path) -> None:
    source = shutil.copytree(place / "model", tmp_path / "model")
    model, url = store.upload(source, s3.new_url()), s3.new_url()
    arguments = ("run", place / "run.yaml", f"model.path={model}", f"output.path={url}")
    assert shardprune(*arguments).code == 0
    file = sorted(source.glob("*.safetensors"))[1]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    write_file(locate(model) / file.name, bytes(content))
    assert f"model file {file.name} was" in refusal(*arguments)


# --- secrets


def test_nothing_that_is_written_or_said_holds_a_secret(place: Path, s3: Server) -> None:
    url = s3.new_url()
    told: list[Finished] = [shardprune(*command(place, url))]
    running = start(*command(place, url := s3.new_url()))
    running.wait_until(num_committed(url)(1))
    s3.behave("deny PUT")
    told.append(running.wait())
    s3.behave("")
    assert [each.code for each in told] == [0, 2]
    caches = [file.read_bytes() for file in Path(os.environ["XDG_CACHE_HOME"]).rglob("*") if file.is_file()]
    written = [content for each in (url, f"s3://{BUCKET}") for content in store.contents(each).values()]
    for text in [*caches, *written, *(f"{each.out}{each.err}".encode() for each in told)]:
        assert ACCESS_KEY.encode() not in text and SECRET_KEY.encode() not in text
