"""Calibration windows: reproducible by seed, no token twice, BOS where the tokenizer itself puts it."""

import os
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import build_reader, random_ids, save_model, save_text, save_tokenizer, save_windows
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pipeline.calibration.plan import plan_calibration
from pipeline.calibration.text import TextSource, read_files
from pipeline.calibration.vocabulary import Vocabulary
from pipeline.calibration.windows import Windows, cut_across, read_window_ids
from pipeline.errors import Refusal


@st.composite
def asked(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """Tokens, windows, their length and a seed that go together."""
    length, num_windows = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    num_tokens = length * num_windows + draw(st.integers(0, 40))
    return num_tokens, num_windows, length, draw(st.integers(0, 2**31))


@given(asked())
def test_windows_are_cut_from_the_stream_and_no_token_is_used_twice(values: tuple[int, int, int, int]) -> None:
    num_tokens, num_windows, length, seed = values
    ids_NL = cut_across([torch.arange(num_tokens)], num_windows, length, seed)
    assert ids_NL.shape == (num_windows, length)
    assert len(ids_NL.unique()) == num_windows * length
    assert torch.equal(ids_NL, ids_NL[:, :1] + torch.arange(length))


@given(asked())
def test_the_same_seed_gives_the_same_windows(values: tuple[int, int, int, int]) -> None:
    num_tokens, num_windows, length, seed = values
    ids_T = torch.arange(num_tokens)
    before = torch.random.get_rng_state()
    first = cut_across([ids_T], num_windows, length, seed)
    torch.random.set_rng_state(before)
    torch.rand(3)
    assert torch.equal(first, cut_across([ids_T], num_windows, length, seed))


def test_seeds_give_other_windows_and_every_part_of_the_text_is_reached() -> None:
    ids_T = torch.arange(1000)
    many = [cut_across([ids_T], 4, 10, seed) for seed in range(300)]
    assert len({tuple(ids_NL.flatten().tolist()) for ids_NL in many}) == 300
    reached = torch.cat(many).unique()
    assert len(reached) == 1000


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 11))
def test_one_token_too_few_is_refused(num_windows: int, length: int, seed: int) -> None:
    with pytest.raises(Refusal, match=f"num_windows = {num_windows}: the text has {num_windows * length - 1} tokens"):
        cut_across([torch.arange(num_windows * length - 1)], num_windows, length, seed)


@given(st.integers(0, 95), st.integers(1, 95))
def test_ids_are_checked_at_both_ends(token: int, size: int) -> None:
    ids = torch.tensor([[0, token]])
    vocabulary = Vocabulary(size, None, None, ())
    if token < size:
        vocabulary.check(ids, "here")
    else:
        with pytest.raises(Refusal, match=f"token id {token} in here"):
            vocabulary.check(ids, "here")
    with pytest.raises(Refusal, match="token id -1 in here"):
        vocabulary.check(torch.tensor([[-1, token]]), "here")


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    windows = Windows(random_ids(5, 7), ("a", "b", "c", "d", "e"))
    pq.write_table(windows.to_table(seed=3), tmp_path / "windows.parquet")
    assert torch.equal(read_window_ids(str(tmp_path / "windows.parquet")), windows.ids_NL)
    rows = pq.read_table(tmp_path / "windows.parquet").to_pylist()
    assert [(row["window_index"], row["source"], row["seed"]) for row in rows] == [
        (index, source, 3) for index, source in enumerate("abcde")
    ]


def test_the_digest_knows_shape_order_and_ids_but_not_the_source() -> None:
    ids_NL = random_ids(4, 6)
    digest = Windows(ids_NL, ("a",) * 4).digest()
    assert Windows(ids_NL.clone(), ("b",) * 4).digest() == digest
    others = [ids_NL.view(6, 4), ids_NL.flip(0), ids_NL.flip(1), ids_NL + 1]
    assert digest not in [Windows(ids, ("a",) * len(ids)).digest() for ids in others]


# --- from Parquet


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "model", "llama")


def windows_of(
    model: Path, folder: Path, tokenizer: PreTrainedTokenizerBase | None, source: dict[str, Any], **settings: Any
) -> Windows:
    """What a config's source gives, in a run that lies in `folder`."""
    return plan_calibration(build_reader(model, folder / "out", {"source": source, **settings}, tokenizer)).windows()


def test_parquet_windows_are_used_as_they_are(model: Path, tmp_path: Path) -> None:
    path = save_windows(tmp_path / "windows.parquet", 6, 16)
    source = {"name": "parquet", "path": str(path)}
    windows = windows_of(model, tmp_path, None, source, num_windows=4, window_length=16, seed=9)
    assert torch.equal(windows.ids_NL, random_ids(6, 16)[:4])
    assert windows.sources == (str(path),) * 4


def test_the_windows_of_one_run_can_be_the_source_of_another(model: Path, tmp_path: Path) -> None:
    windows = Windows(random_ids(4, 16), ("text",) * 4)
    pq.write_table(windows.to_table(0), tmp_path / "windows.parquet")
    source = {"name": "parquet", "path": str(tmp_path / "windows.parquet")}
    again = windows_of(model, tmp_path, None, source, num_windows=4, window_length=16)
    assert again.digest() == windows.digest()


# --- from text


@pytest.fixture(scope="module", params=[True, False], ids=["adds-bos", "adds-none"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = save_tokenizer(tmp_path_factory.mktemp("tokenizer"), adds_bos=request.param)
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return loaded


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return bool(tokenizer("w3")["input_ids"][0] == 1)


def windows_of_text(text: Path, model: Path, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> Tensor:
    values = {"num_windows": 5, "window_length": 16, **settings}
    return windows_of(model, text.parent, tokenizer, {"name": "text", "path": str(text)}, **values).ids_NL


@pytest.mark.parametrize("bos", ["auto", True, False])
def test_every_window_begins_with_bos_or_none_is_given_one(
    bos: bool | str, model: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    ids_NL = windows_of_text(save_text(tmp_path / "text.txt", 400), model, tokenizer, bos=bos)
    assert ids_NL.shape == (5, 16)
    stream = " ".join(map(str, tokenizer((tmp_path / "text.txt").read_text())["input_ids"]))
    begins = bos is True or (bos == "auto" and adds_bos(tokenizer))
    for ids_L in ids_NL.tolist():
        assert not begins or ids_L[0] == 1
        assert " ".join(map(str, ids_L[begins:])) in stream
    if not begins:
        assert int((ids_NL[:, 0] == 1).sum()) <= 1  # at most the one at the very beginning of the text


def test_bos_takes_a_place_and_no_token_of_the_text_is_used_twice(
    model: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(" ".join(f"w{number}" for number in range(3, 96)))
    ids_NL = windows_of_text(tmp_path / "text.txt", model, tokenizer, bos=True)
    words = ids_NL[:, 1:][ids_NL[:, 1:] != 1]
    assert len(words.unique()) == len(words) >= 5 * 15 - 1


def test_text_windows_are_reproducible_and_differ_by_seed(
    model: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    text = save_text(tmp_path / "text.txt", 400)
    assert torch.equal(windows_of_text(text, model, tokenizer), windows_of_text(text, model, tokenizer))
    assert not torch.equal(windows_of_text(text, model, tokenizer), windows_of_text(text, model, tokenizer, seed=1))


def test_a_folder_is_its_text_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name, word in {"b.txt": "w4", "a.md": "w3", "sub/c.txt": "w5", "d.csv": "w6", "e.json": "w7"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(word)
    assert TextSource(path=str(tmp_path)).read() == ["w3", "w4", "w5"]
    assert TextSource(path=(str(tmp_path / "b.txt"), str(tmp_path / "sub"))).read() == ["w4", "w5"]
    assert read_files((str(tmp_path),)) == ["w3", "w4", "w5"]


def test_documents_are_tokenised_one_by_one(tokenizer: PreTrainedTokenizerBase) -> None:
    bos = [1] if adds_bos(tokenizer) else []
    documents = Vocabulary(96, tokenizer, None, ()).tokenize(["w3 w4", "w5"], TextSource(path="text.txt"))
    assert [ids_T.tolist() for ids_T in documents] == [[*bos, 3, 4], [*bos, 5]]


def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path) -> None:
    text = save_text(tmp_path / "text.txt", 10)
    text.chmod(0)
    if os.access(text, os.R_OK):
        pytest.skip("root may read everything")
    with pytest.raises(Refusal, match=r"text\.txt"):
        TextSource(path=str(text)).read()
