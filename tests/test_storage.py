"""Local paths and URLs are one kind of thing; a store's errors are one sentence; nothing repeats a secret."""

import pickle
import random
from errno import ENOSYS
from pathlib import Path
from threading import Event
from typing import Any

import obstore
import pytest
import torch
from command import refusal
from hypothesis import given
from hypothesis import strategies as st
from obstore.exceptions import GenericError
from s3 import ACCESS_KEY, BUCKET, SECRET_KEY, Server
from safetensors.torch import load_file, save_file

from pipeline.bucket import translated
from pipeline.errors import Incomplete, Refusal
from pipeline.files import copy_file, create_file, delete_folder, sha256_of_file, write_file, written_whole
from pipeline.models.checkpoint import open_file
from pipeline.models.remote import plan_reads
from pipeline.models.tensor_entry import TensorEntry
from pipeline.storage import Location, ObjectPath, concealed, is_within, locate, name_within, read_range, status

URLS = ["s3://bucket/a/b.json", "gs://bucket/a/b.json", "s3://bucket"]


@pytest.fixture(params=["local", "s3", "gs"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """An empty folder of either kind."""
    return tmp_path if request.param == "local" else locate(request.getfixturevalue("s3").new_url(request.param))


# --- names


@pytest.mark.parametrize("url", URLS)
def test_a_url_is_what_it_says(url: str) -> None:
    path = locate(url)
    assert isinstance(path, ObjectPath) and str(path) == url
    assert pickle.loads(pickle.dumps(path)) == path and len({path, locate(url)}) == 1


def test_parts_of_a_url() -> None:
    path = locate("S3://bucket//runs/one/")
    assert str(path) == "s3://bucket/runs/one"
    assert str(path / "model" / Path("a/b.json")) == "s3://bucket/runs/one/model/a/b.json"
    assert [path.name, (path / "x.json").suffix, str(path.parent), str(path.parent.parent)] == [
        *("one", ".json", "s3://bucket/runs", "s3://bucket")
    ]


def test_what_lies_within_what() -> None:
    inner = locate("s3://bucket/run/model")
    for outer in ("s3://bucket/run", "s3://bucket", "s3://bucket/run/model"):
        assert is_within(inner, locate(outer))
    for other in ("s3://bucket/ru", "s3://other/run", "gs://bucket/run", "/run", "s3://bucket/run/model/x"):
        assert not is_within(inner, locate(other))
    assert str(name_within(inner, locate("s3://bucket"))) == "run/model"


WRONG = [
    "s3://",
    "s3:///key",
    f"s3://{ACCESS_KEY}:{SECRET_KEY}@bucket/run",
    f"s3://{ACCESS_KEY}@bucket/run",
    f"s3://bucket/run?AWSAccessKeyId={ACCESS_KEY}&Signature={SECRET_KEY}",
    f"s3://bucket/run#{SECRET_KEY}",
    "s3://bucket/../other",
    "http://bucket/run",
    "az://bucket/run",
]


@pytest.mark.parametrize("url", WRONG)
@pytest.mark.parametrize("key", ["output.path", "model.path", "evaluation.text", "calibration.source.path"])
def test_a_wrong_url_is_refused_without_its_secrets(key: str, url: str, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("model: {path: m}\ncalibration: {source: {name: text, path: t}}\noutput: {path: o}\n")
    told = refusal("run", config, f"{key}={url}")
    assert key in told and ACCESS_KEY not in told and SECRET_KEY not in told
    assert ACCESS_KEY not in concealed(url) and SECRET_KEY not in concealed(url)


@pytest.mark.parametrize("key", ["evaluation.text", "calibration.source.path", "runtime.spill_path"])
def test_what_is_read_from_the_file_system_only_says_so(key: str, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("model: {path: m}\ncalibration: {source: {name: text, path: t}}\noutput: {path: o}\n")
    assert f"{key} = 's3://bucket/x': is read from the file system only" in refusal(
        "run", config, f"{key}=s3://bucket/x"
    )


# --- files


def test_a_file_is_there_whole_or_not_at_all(folder: Location) -> None:
    path = folder / "a b" / "c+é%.bin"
    with pytest.raises(ZeroDivisionError), written_whole(path) as temporary:
        temporary.write_bytes(b"half")
        raise ZeroDivisionError
    assert not path.exists() and not path.is_file()
    for content in (b"", b"first", b"second"):
        write_file(path, content)
        assert path.read_bytes() == content and path.is_file() and status(path).num_bytes == len(content)
    assert (folder / "a b").is_dir() and [file.name for file in (folder / "a b").iterdir()] == [path.name]


def test_only_the_first_creates_a_file(folder: Location) -> None:
    path = folder / "lease" / "00001.json"
    assert create_file(path, b"first") and not create_file(path, b"second")
    assert path.read_bytes() == b"first"
    assert [file.name for file in (folder / "lease").iterdir()] == [path.name]


def test_a_copy_of_what_is_not_there_is_a_file_not_found(folder: Location, tmp_path: Path) -> None:
    for target in (folder / "copy", tmp_path / "copy"):
        with pytest.raises(FileNotFoundError):
            copy_file(folder / "no", target)
        assert not target.exists()


def test_what_another_process_deletes_meanwhile_is_written_again(tmp_path: Path) -> None:
    with pytest.raises(Incomplete, match="another process has deleted"), written_whole(tmp_path / "x") as temporary:
        temporary.unlink()


def test_a_file_system_without_hard_links_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(source: Path, target: Path) -> None:
        raise OSError(ENOSYS, "Function not implemented")

    monkeypatch.setattr("os.link", link)
    with pytest.raises(Refusal, match=f"output.path: {tmp_path}/x cannot be written"):
        create_file(tmp_path / "x", b"")
    assert not list(tmp_path.iterdir())


def test_folders_list_what_is_in_them(folder: Location) -> None:
    for name in ("a/1.json", "a/2.json", "a/b/3.json", "a/4.txt", "c.json"):
        write_file(folder / name, b"x")
    assert sorted(path.name for path in folder.iterdir()) == ["a", "c.json"]
    assert sorted(path.name for path in (folder / "a").glob("*.json")) == ["1.json", "2.json"]
    assert sorted(path.name for path in folder.rglob("*.json")) == ["1.json", "2.json", "3.json", "c.json"]
    assert not list((folder / "nothing").glob("*")) and not (folder / "a/1").exists()
    delete_folder(folder / "a")
    delete_folder(folder / "nothing")
    assert [path.name for path in folder.iterdir()] == ["c.json"]
    (folder / "c.json").unlink()
    (folder / "c.json").unlink(missing_ok=True)
    assert not (folder / "c.json").exists()


def test_what_is_missing_is_a_file_not_found(folder: Location) -> None:
    for read in (lambda: (folder / "no").read_bytes(), lambda: status(folder / "no")):
        with pytest.raises(FileNotFoundError):
            read()


def test_to_delete_what_is_not_there_is_no_error_to_google_either(s3: Server) -> None:
    s3.behave("miss DELETE")
    locate(s3.new_url("gs")).unlink(missing_ok=True)


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_large_file_goes_up_in_parts_and_comes_down_as_it_was(scheme: str, s3: Server, tmp_path: Path) -> None:
    file, before = tmp_path / "large.bin", s3.num_parts()
    file.write_bytes(random.Random(0).randbytes(18 * 2**20 + 1))
    path = locate(s3.new_url(scheme))
    copy_file(file, path)
    assert s3.num_parts() - before == 3
    copy_file(path, tmp_path / "again.bin")
    assert sha256_of_file(path) == sha256_of_file(file) == sha256_of_file(tmp_path / "again.bin")
    assert read_range(path, 2**23 - 2, 2**23 + 2) == read_range(file, 2**23 - 2, 2**23 + 2)


def test_an_upload_is_known_by_its_size_and_on_s3_by_its_etag_too(
    s3: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Google does not say that a completed upload and a look at it are told by the same ETag."""
    (tmp_path / "x").write_bytes(b"content")
    put = obstore.put
    monkeypatch.setattr("obstore.put", lambda *given, **more: {**put(*given, **more), "e_tag": "another"})
    copy_file(tmp_path / "x", locate(s3.new_url("gs")))
    with pytest.raises(Incomplete, match="is not what was written"):
        copy_file(tmp_path / "x", locate(s3.new_url("s3")))


# --- tensors


def test_tensors_are_read_as_they_are_from_a_file(s3: Server, tmp_path: Path) -> None:
    """Any dtype, nothing at all, a single number, and one that is larger than one read."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Any] = {
        "large": torch.randn(3, 1024, 1024, generator=generator),
        "odd": torch.randint(0, 255, (13,), generator=generator, dtype=torch.uint8),
        "half": torch.randn(5, 7, generator=generator).to(torch.bfloat16),
        "number": torch.tensor(3, dtype=torch.int64),
        "flag": torch.tensor([True, False, True]),
        "nothing": torch.empty(0, 4),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    path = locate(s3.new_url()) / "x.safetensors"
    copy_file(tmp_path / "x.safetensors", path)
    checkpoint = open_file(path)
    assert checkpoint.entries == open_file(tmp_path / "x.safetensors").entries
    for keys in (list(tensors), ["nothing"], ["number", "half"], []):
        read = checkpoint.read(keys)
        assert read.keys() == set(keys)
        for key in keys:
            wanted = load_file(tmp_path / "x.safetensors")[key]
            assert read[key].dtype == wanted.dtype and torch.equal(read[key], wanted)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 90)), max_size=12), st.integers(1, 30), st.integers(0, 20))
def test_reads_cover_every_tensor_once_and_are_no_larger_than_allowed(
    layout: list[tuple[int, int]], most_bytes: int, gap_bytes: int
) -> None:
    entries, end = [], 8
    for gap, size in layout:
        entries.append(TensorEntry("file", (size,), "U8", size, end + gap))
        end += gap + size
    random.Random(0).shuffle(entries)
    reads = plan_reads(entries, most_bytes, gap_bytes)
    covered = [position for read in reads for position in range(read.start, read.stop)]
    wanted = {position for entry in entries for position in range(entry.start, entry.start + entry.num_bytes)}
    assert len(covered) == len(set(covered)) and wanted <= set(covered)
    assert all(0 < read.stop - read.start <= most_bytes for read in reads)
    assert len(covered) - len(wanted) <= gap_bytes * len(entries)


# --- errors


def test_a_bucket_that_is_not_there_is_named(s3: Server) -> None:
    path = locate("s3://nobody-has-this/run")
    for ask in (path.is_dir, lambda: write_file(path / "x", b"x"), lambda: list(path.iterdir())):
        with pytest.raises(Refusal, match="there is no bucket 'nobody-has-this'"):
            ask()


@pytest.mark.parametrize("behaviour", ["busy", "gone"])
def test_a_store_that_does_not_answer_is_asked_again_later(behaviour: str, s3: Server) -> None:
    path = locate(s3.new_url())
    write_file(path, b"before")
    s3.behave(behaviour)
    for ask in (path.read_bytes, path.is_file, path.is_dir, path.unlink, lambda: write_file(path, b"after")):
        with pytest.raises(Incomplete, match="run again to resume"):
            ask()
    s3.behave("")
    assert path.read_bytes() == b"before"


def test_a_write_that_arrives_too_slowly_is_done_again(s3: Server) -> None:
    path = locate(s3.new_url())
    s3.behave("slow PUT")
    with pytest.raises(Incomplete, match=r"RequestTimeout.*run again to resume"):
        write_file(path, b"after")


def test_an_upload_whose_completion_was_not_answered_is_done_again(s3: Server, tmp_path: Path) -> None:
    file, path = tmp_path / "large.bin", locate(s3.new_url())
    file.write_bytes(bytes(9 * 2**20))
    s3.behave("forget")
    with pytest.raises(Incomplete, match=r"NoSuchUpload.*run again to resume"):
        copy_file(file, path)
    assert sha256_of_file(path) == sha256_of_file(file)


def test_credentials_that_cannot_be_had_are_final_only_at_the_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of an instance are asked for again and again."""
    monkeypatch.setattr("pipeline.bucket._ANSWERED", Event())

    def ask() -> None:
        with translated("s3://bucket/run", "bucket", writing=False):
            raise GenericError("Error performing PUT http://169.254.169.254/latest/api/token: 503 Service Unavailable")

    with pytest.raises(Refusal, match="there are no credentials"):
        ask()
    with translated("s3://bucket/run", "bucket", writing=False):
        pass
    with pytest.raises(Incomplete, match="run again to resume"):
        ask()


@pytest.mark.parametrize("method", ["GET", "PUT", "HEAD", "POST"])  # S3 deletes by POST
def test_denied_access_is_final_and_told_without_the_key(method: str, s3: Server) -> None:
    path = locate(s3.new_url())
    write_file(path, b"before")
    s3.behave(f"deny {method}")
    asks = {"GET": path.read_bytes, "HEAD": path.is_file, "POST": path.unlink, "PUT": lambda: write_file(path, b"x")}
    with pytest.raises(Refusal, match="access denied") as refused:
        asks[method]()
    assert ACCESS_KEY not in str(refused.value) and refused.value.__cause__ is None
    assert BUCKET in str(refused.value)


def test_a_gs_url_asks_a_google_store(s3: Server) -> None:
    path = locate("gs://bucket-of-this-test/run")
    assert isinstance(path, ObjectPath) and type(path._store).__name__ == "GCSStore"
