"""Mixes and cuts: windows shared out exactly by weight, and inside documents or across them."""

import math
from collections import Counter
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import build_reader, random_ids, save_documents, save_model, save_text, save_tokenizer, save_windows, selfgen
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pipeline.calibration.mix import share_out
from pipeline.calibration.plan import Calibration, plan_calibration
from pipeline.calibration.text import TextSource
from pipeline.calibration.windows import Windows, cut_across, cut_inside
from pipeline.errors import Refusal

# --- shares

weights = st.lists(
    st.one_of(st.floats(1e-6, 1e6), st.sampled_from([1.0, 0.1, 1 / 3, 5e-324, 1e300])), min_size=1, max_size=8
)


@given(st.integers(0, 1000), weights)
def test_shares_are_whole_add_up_and_are_less_than_one_off(total: int, chosen: list[float]) -> None:
    shares, whole = share_out(total, chosen), sum(map(Fraction, chosen))
    exact = [total * Fraction(weight) / whole for weight in chosen]
    assert sum(shares) == total and all(isinstance(share, int) for share in shares)
    assert all(share in (math.floor(wanted), math.ceil(wanted)) for share, wanted in zip(shares, exact, strict=True))


@given(st.integers(0, 1000), weights)
def test_what_is_left_over_goes_to_the_largest_remainders_and_among_equals_to_the_first(
    total: int, chosen: list[float]
) -> None:
    shares, whole = share_out(total, chosen), sum(map(Fraction, chosen))
    exact = [total * Fraction(weight) / whole for weight in chosen]
    remainders = [wanted - math.floor(wanted) for wanted in exact]
    rounded_up = [share > math.floor(wanted) for share, wanted in zip(shares, exact, strict=True)]
    order = sorted(range(len(chosen)), key=lambda index: (-remainders[index], index))
    assert [rounded_up[index] for index in order] == sorted(rounded_up, reverse=True)


@given(st.integers(0, 1000), weights, st.sampled_from([2.0, 0.5, 1024.0]))
def test_only_the_ratios_of_weights_count(total: int, chosen: list[float], factor: float) -> None:
    scaled = [weight * factor for weight in chosen]
    if [Fraction(weight) * Fraction(factor) for weight in chosen] == list(map(Fraction, scaled)):
        assert share_out(total, scaled) == share_out(total, chosen)


# --- inside documents


def numbered(*lengths: int) -> list[Tensor]:
    """Documents of which no token occurs twice: those of document d are d * 1000, d * 1000 + 1 ..."""
    return [1000 * number + torch.arange(length) for number, length in enumerate(lengths)]


@st.composite
def asked(draw: st.DrawFn) -> tuple[list[int], int, int, int]:
    """Lengths of documents, windows, their length and a seed that go together."""
    lengths, length = draw(st.lists(st.integers(0, 40), min_size=1, max_size=8)), draw(st.integers(1, 10))
    room = sum(each // length for each in lengths)
    num_windows = draw(st.integers(1, room)) if room else 0
    return lengths, num_windows, length, draw(st.integers(0, 2**31))


@given(asked())
def test_a_window_inside_is_a_stretch_of_one_document(values: tuple[list[int], int, int, int]) -> None:
    lengths, num_windows, length, seed = values
    if not num_windows:
        return
    ids_NL = cut_inside(numbered(*lengths), num_windows, length, seed)
    assert ids_NL.shape == (num_windows, length)
    assert torch.equal(ids_NL, ids_NL[:, :1] + torch.arange(length))
    assert torch.equal(ids_NL[:, 0] // 1000, ids_NL[:, -1] // 1000)
    assert len(ids_NL.unique()) == ids_NL.numel(), "no token twice"
    assert torch.equal(cut_inside(numbered(*lengths), num_windows, length, seed), ids_NL)


@given(asked())
def test_all_the_room_inside_is_there_and_no_more(values: tuple[list[int], int, int, int]) -> None:
    lengths, _, length, seed = values
    room = sum(each // length for each in lengths)
    if room:
        assert len(cut_inside(numbered(*lengths), room, length, seed)) == room
    num_long = sum(each >= length for each in lengths)
    told = f"of {len(lengths)} documents {num_long} have {length} tokens or more, enough for {room} windows"
    with pytest.raises(Refusal, match=told):
        cut_inside(numbered(*lengths), room + 1, length, seed)


def test_seeds_reach_every_part_of_every_document() -> None:
    many = [cut_inside(numbered(25, 9, 34), 3, 10, seed) for seed in range(300)]
    reached = torch.cat(many).unique().tolist()
    assert reached == [*range(25), *range(2000, 2034)]
    assert len({tuple(ids_NL.flatten().tolist()) for ids_NL in many}) > 200


@given(st.lists(st.integers(0, 30), max_size=6), st.integers(1, 10), st.integers(0, 99))
def test_across_is_inside_all_documents_joined(lengths: list[int], length: int, seed: int) -> None:
    documents = numbered(*lengths)
    room = sum(lengths) // length
    if room:
        ids_NL = cut_across(documents, room, length, seed)
        assert torch.equal(ids_NL, cut_inside([torch.cat(documents)], room, length, seed))
        assert len(ids_NL.unique()) == ids_NL.numel()
    with pytest.raises(Refusal, match=f"the text has {sum(lengths)} tokens, enough for {room} windows"):
        cut_across(documents, room + 1, length, seed)


# --- as a config asks for them


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and the same material as text, as documents and as ids."""
    folder = tmp_path_factory.mktemp("place")
    save_tokenizer(save_model(folder / "model", "llama"))
    save_text(folder / "text.txt", 400)
    save_documents(folder / "documents.txt", 20, 21)
    texts = (folder / "documents.txt").read_text().split("\n\n")
    pq.write_table(pa.table({"text": texts, "label": [0] * 20}), folder / "texts.parquet")
    save_windows(folder / "windows.parquet", 8, 16)
    save_windows(folder / "long.parquet", 8, 40)
    return folder


@pytest.fixture(scope="module", params=[True, False], ids=["adds-bos", "adds-none"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = save_tokenizer(tmp_path_factory.mktemp("tokenizer"), adds_bos=request.param)
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return loaded


def plan(
    place: Path, source: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None = None, **settings: Any
) -> Calibration:
    values = {"source": source, "num_windows": 6, "window_length": 16, **settings}
    return plan_calibration(build_reader(place / "model", place / "out", values, tokenizer))


def windows(place: Path, source: dict[str, Any], tokenizer: Any = None, **settings: Any) -> Windows:
    return plan(place, source, tokenizer, **settings).windows()


def text(place: Path, name: str = "documents.txt") -> dict[str, Any]:
    return {"name": "text", "path": str(place / name), "separator": "\n\n"}


def parquet(place: Path, name: str = "windows.parquet", column: str = "input_ids") -> dict[str, Any]:
    return {"name": "parquet", "path": str(place / name), "column": column}


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return bool(tokenizer("w3")["input_ids"][0] == 1)


def stretches(documents: list[list[int]], length: int) -> set[tuple[int, ...]]:
    return {tuple(ids[first : first + length]) for ids in documents for first in range(len(ids) - length + 1)}


@pytest.mark.parametrize("bos", ["auto", True, False])
def test_windows_inside_begin_with_one_bos_and_hold_one_document(
    bos: bool | str, place: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    documents = [tokenizer(each)["input_ids"] for each in (place / "documents.txt").read_text().split("\n\n")]
    ids_NL = windows(place, text(place), tokenizer, windows="inside", bos=bos, num_windows=20).ids_NL
    begins = bos is True or (bos == "auto" and adds_bos(tokenizer))
    for ids in ids_NL.tolist():
        assert tuple(ids[begins:]) in stretches(documents, 16 - begins)
        assert not begins or (ids[0] == 1 and ids[1] != 1), "the document's own BOS is not there a second time"
    assert len({tuple(ids) for ids in ids_NL.tolist()}) == 20


def test_windows_across_hold_the_end_of_one_document_and_the_beginning_of_the_next(
    place: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    documents = [tokenizer(each)["input_ids"] for each in (place / "documents.txt").read_text().split("\n\n")]
    stream, length = [token for each in documents for token in each], 16 - adds_bos(tokenizer)
    ids_NL = windows(place, text(place), tokenizer, windows="across", num_windows=20).ids_NL
    cut = [tuple(ids[adds_bos(tokenizer) :]) for ids in ids_NL.tolist()]
    assert set(cut) <= stretches([stream], length)
    assert not set(cut) <= stretches(documents, length)


def test_auto_is_across_for_text_and_rows_for_ids(place: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    texts = parquet(place, "texts.parquet", "text")
    for source, usual in ((text(place), "across"), (parquet(place), "rows"), (texts, "across")):
        automatic = windows(place, source, tokenizer)
        assert automatic.digest() == windows(place, source, tokenizer, windows=usual).digest()


@pytest.mark.parametrize("cut", ["inside", "across"])
def test_a_parquet_column_of_text_is_what_a_text_file_is(
    cut: str, place: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    from_parquet = windows(place, parquet(place, "texts.parquet", "text"), tokenizer, windows=cut)
    assert from_parquet.digest() == windows(place, text(place), tokenizer, windows=cut).digest()
    assert from_parquet.sources == (str(place / "texts.parquet"),) * 6


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
def test_text_may_be_stored_in_any_way(
    kind: Any, place: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    texts = pq.read_table(place / "texts.parquet")["text"].to_pylist()
    pq.write_table(pa.table({"text": pa.array(texts, kind)}), tmp_path / "texts.parquet")
    stored = windows(place, parquet(tmp_path, "texts.parquet", "text"), tokenizer)
    assert stored.digest() == windows(place, parquet(place, "texts.parquet", "text"), tokenizer).digest()


def test_rows_of_ids_may_be_cut_too(place: Path) -> None:
    rows = random_ids(8, 40).tolist()
    inside = windows(place, parquet(place, "long.parquet"), windows="inside", num_windows=16).ids_NL
    assert {tuple(ids) for ids in inside.tolist()} <= stretches(rows, 16)
    across = windows(place, parquet(place, "long.parquet"), windows="across", num_windows=20).ids_NL
    stream = [token for row in rows for token in row]
    assert {tuple(ids) for ids in across.tolist()} <= stretches([stream], 16)
    assert not {tuple(ids) for ids in across.tolist()} <= stretches(rows, 16)


@pytest.mark.parametrize("cut", ["inside", "across"])
def test_rows_of_unequal_length_are_documents(cut: str, place: Path, tmp_path: Path) -> None:
    """One of them is empty, as the tokenizer of any program may leave it."""
    rows = [list(range(3, 3 + length)) for length in (40, 0, 5, 33)]
    pq.write_table(pa.table({"input_ids": pa.array(rows, pa.list_(pa.int32()))}), tmp_path / "rows.parquet")
    ids_NL = windows(place, parquet(tmp_path, "rows.parquet"), windows=cut, num_windows=4).ids_NL
    assert ids_NL.shape == (4, 16)


def test_ids_outside_the_vocabulary_are_refused_wherever_they_are_cut(place: Path, tmp_path: Path) -> None:
    rows = [[3] * 40, [4] * 39 + [96]]
    pq.write_table(pa.table({"input_ids": rows}), tmp_path / "rows.parquet")
    with pytest.raises(Refusal, match="token id 96"):
        windows(place, parquet(tmp_path, "rows.parquet"), windows="across", num_windows=1)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ({"name": "text", "path": "documents.txt"}, "text"),
        ({"name": "parquet", "path": "texts.parquet", "column": "text"}, "parquet"),
        (selfgen(), "selfgen"),
    ],
)
def test_only_a_column_of_ids_has_ready_windows(
    source: dict[str, Any], name: str, place: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    if "path" in source:
        source = {**source, "path": str(place / source["path"])}
    with pytest.raises(Refusal, match=f"calibration.windows = 'rows': the source '{name}' has no ready windows"):
        plan(place, source, tokenizer, windows="rows")


# --- mixes


def mix(*parts: tuple[float, dict[str, Any]]) -> dict[str, Any]:
    return {"name": "mix", "parts": [{"weight": weight, "source": source} for weight, source in parts]}


def test_a_mix_is_its_parts_one_after_the_other(place: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    source = mix((1, text(place)), (2, parquet(place)), (1, text(place, "text.txt")))
    mixed = windows(place, source, tokenizer, num_windows=9)
    shares = share_out(9, [1, 2, 1])
    assert shares == [2, 5, 2]
    alone = [
        windows(place, source, tokenizer, num_windows=share)
        for source, share in zip([text(place), parquet(place), text(place, "text.txt")], shares, strict=True)
    ]
    assert torch.equal(mixed.ids_NL, torch.cat([each.ids_NL for each in alone]))
    assert mixed.sources == tuple(source for each in alone for source in each.sources)
    table = mixed.to_table(0).to_pylist()
    assert Counter(row["source"] for row in table) == {
        str(place / "documents.txt"): 2,
        str(place / "windows.parquet"): 5,
        str(place / "text.txt"): 2,
    }


def test_a_part_that_gives_no_window_is_not_read(place: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    planned = plan(place, mix((1000, parquet(place)), (1, text(place, "none.txt"))), tokenizer)
    assert [part.num_windows for part in planned.parts] == [6]


def test_a_mix_of_one_is_that_one(place: Path) -> None:
    assert windows(place, mix((0.3, parquet(place)))).digest() == windows(place, parquet(place)).digest()


def test_what_a_mix_refuses_names_the_part(place: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(Refusal, match=r"none\.txt"):
        plan(place, mix((1, parquet(place)), (1, text(place, "none.txt"))), tokenizer)
    with pytest.raises(Refusal, match="'text' has no ready windows"):
        plan(place, mix((1, parquet(place)), (1, text(place))), tokenizer, windows="rows")


@pytest.mark.parametrize("weight", [0, -1, math.nan, math.inf])
def test_weights_that_are_none(weight: float, place: Path) -> None:
    with pytest.raises(ValueError, match="weight"):
        plan(place, mix((weight, parquet(place))))


def test_a_mix_is_no_part_of_a_mix(place: Path) -> None:
    with pytest.raises(ValueError, match="mix"):
        plan(place, mix((1, mix((1, parquet(place))))))
    with pytest.raises(ValueError, match="parts"):
        plan(place, mix())


@given(st.lists(st.text(alphabet="ab \n", max_size=12), max_size=6))
def test_documents_lie_between_separators(parts: list[str]) -> None:
    with TemporaryDirectory() as folder:
        file = Path(folder) / "text.txt"
        file.write_text("|".join(parts))
        read = TextSource(path=str(file), separator="|").read()
        assert read == [part.strip() for part in parts if part.strip()]
        assert TextSource(path=str(file)).read() == ["|".join(parts)]
