"""The texts to be generated: batches of one prompt length, prompts without end, and what makes a text another one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import build_reader, save_documents, save_model, save_tokenizer, selfgen
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pipeline.calibration.generation import Generation, Prompts, Tokens, plan_batches
from pipeline.calibration.plan import plan_calibration
from pipeline.calibration.selfgen import PRESETS
from pipeline.errors import Refusal

# --- batches

some_prompts = st.dictionaries(
    st.integers(0, 1000), st.lists(st.integers(0, 95), min_size=1, max_size=4).map(tuple), max_size=40
)


@given(some_prompts, st.integers(1, 9))
def test_every_row_is_in_one_batch_with_its_prompt(prompts: dict[int, Tokens], batch_size: int) -> None:
    batches = plan_batches(prompts, batch_size)
    pairs = [pair for each in batches for pair in zip(each.row_indices, each.prompts, strict=True)]
    assert len(pairs) == len(prompts) and dict(pairs) == prompts


@given(some_prompts, st.integers(1, 9))
def test_a_batch_has_prompts_of_one_length_and_is_full_but_for_the_last_of_each(
    prompts: dict[int, Tokens], batch_size: int
) -> None:
    batches = plan_batches(prompts, batch_size)
    lengths = [{len(prompt) for prompt in each.prompts} for each in batches]
    assert all(len(found) == 1 for found in lengths)
    assert all(1 <= len(each.row_indices) <= batch_size for each in batches)
    for each, found, following in zip(batches, lengths, lengths[1:], strict=False):
        assert len(each.row_indices) == batch_size or found != following


@given(some_prompts, st.integers(1, 9))
def test_rows_come_in_the_order_of_their_indices(prompts: dict[int, Tokens], batch_size: int) -> None:
    for length in {len(prompt) for prompt in prompts.values()}:
        chosen = {index: prompt for index, prompt in prompts.items() if len(prompt) == length}
        order = [index for each in plan_batches(chosen, batch_size) for index in each.row_indices]
        assert order == sorted(chosen)
    shuffled = dict(reversed(prompts.items()))
    assert plan_batches(shuffled, batch_size) == plan_batches(prompts, batch_size)


@given(st.integers(1, 60), st.integers(1, 9), st.data())
def test_what_is_missing_after_a_kill_are_whole_batches_of_the_first_attempt(
    num_texts: int, batch_size: int, data: st.DataObject
) -> None:
    prompts = {index: (index,) for index in range(num_texts)}
    first = plan_batches(prompts, batch_size)
    written = data.draw(st.sets(st.sampled_from(range(len(first)))))
    left = [each for number, each in enumerate(first) if number not in written]
    missing = {index: prompts[index] for each in left for index in each.row_indices}
    assert plan_batches(missing, batch_size) == left


# --- prompts


def documents(*lengths: int, first: int = 10) -> list[Tensor]:
    """Documents that are told apart by their first token."""
    return [torch.tensor([first + number, *range(length)][:length]) for number, length in enumerate(lengths)]


def as_tuples(corpus: list[Tensor]) -> list[Tokens]:
    return [tuple(ids_T.tolist()) for ids_T in corpus]


def take(prompts: Prompts, num_rows: int) -> list[Tokens]:
    return [prompts[index] for index in range(num_rows)]


def test_prompts_are_the_first_tokens_of_documents_that_have_as_many() -> None:
    corpus = documents(1, 2, 3, 4, 0, 9)
    prompts = take(Prompts.from_documents([corpus], 3, seed=0), 3)
    assert sorted(prompts) == [(12, 0, 1), (13, 0, 1), (15, 0, 1)]


@given(st.integers(1, 30), st.integers(0, 100), st.integers(1, 3))
def test_every_document_is_used_once_before_any_is_used_again(num_documents: int, seed: int, num_rounds: int) -> None:
    corpus = documents(*[2] * num_documents)
    prompts = take(Prompts.from_documents([corpus], 2, seed), num_rounds * num_documents)
    first = prompts[:num_documents]
    assert sorted(first) == sorted(as_tuples(corpus))
    assert prompts == first * num_rounds


def test_corpora_take_turns_whatever_their_sizes() -> None:
    small, large = documents(2, 2), documents(*[2] * 7, first=50)
    prompts = take(Prompts.from_documents([small, large], 2, seed=0), 28)
    assert sorted(prompts[1::2]) == sorted(as_tuples(large) * 2)
    assert sorted(prompts[::2]) == sorted(as_tuples(small) * 7)


def test_the_order_is_drawn_by_seed() -> None:
    corpus = documents(*[2] * 30)
    orders = {tuple(take(Prompts.from_documents([corpus], 2, seed), 30)) for seed in range(20)}
    assert len(orders) == 20 and tuple(as_tuples(corpus)) not in orders
    assert Prompts.from_documents([corpus], 2, 7) == Prompts.from_documents([corpus], 2, 7)


def test_two_corpora_of_one_size_are_not_in_step() -> None:
    corpus = documents(*[2] * 30)
    prompts = take(Prompts.from_documents([corpus, corpus], 2, seed=0), 60)
    assert prompts[::2] != prompts[1::2]


def test_a_corpus_without_a_text_that_long_is_refused() -> None:
    with pytest.raises(Refusal, match=r"prompt_tokens = 5: .*longest of 2 has 4"):
        Prompts.from_documents([documents(9), documents(3, 4)], 5, seed=0)


def test_the_digest_knows_the_prompts_and_their_order() -> None:
    corpus = documents(2, 2, 2)
    digest = Prompts.from_documents([corpus], 2, 0).digest()
    assert Prompts.from_documents([corpus], 2, 0).digest() == digest
    others = [
        Prompts.from_documents([corpus[:2]], 2, 0),
        Prompts.from_documents([corpus], 1, 0),
        Prompts.from_documents([corpus, corpus], 2, 0),
        Prompts((tuple(reversed(Prompts.from_documents([corpus], 2, 0).corpora[0])),)),
    ]
    assert len({digest, *(each.digest() for each in others)}) == 5


# --- what a text depends on


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its tokenizer, and a seed corpus of ten documents."""
    folder = tmp_path_factory.mktemp("place")
    save_tokenizer(save_model(folder / "model", "llama"))
    save_documents(folder / "corpus.txt", 10, 8)
    save_documents(folder / "other.txt", 10, 8, seed=1)
    return folder


@pytest.fixture(scope="module")
def tokenizer(place: Path) -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(place / "model")
    return loaded


def planned(
    place: Path, tokenizer: PreTrainedTokenizerBase | None, calibration: dict[str, Any] | None = None, **changes: Any
) -> Generation:
    source = selfgen({"name": "text", "path": str(place / "corpus.txt"), "separator": "\n\n"}, **changes)
    values = {"source": source, "num_windows": 2, "window_length": 16, **(calibration or {})}
    generation = plan_calibration(build_reader(place / "model", place / "out", values, tokenizer)).generations[0]
    assert isinstance(generation, Generation)
    return generation


OTHER_TEXTS: dict[str, dict[str, Any]] = {
    **{
        f"sampling.{name}": {"sampling": {name: value}}
        for name, value in {
            "temperature": 0.9,
            "top_p": 0.9,
            "top_k": 9,
            "repetition_penalty": 1.1,
            "max_new_tokens": 21,
        }.items()
    },
    "seed": {"seed": 1},
    "calibration.seed": {"calibration": {"seed": 1}},
    "batch_size": {"batch_size": 5},
    "prompt_tokens": {"prompt_tokens": 3},
    "prompts: bos": {"prompts": "bos"},
    "separator": {"prompts": {"name": "text", "path": "corpus.txt", "separator": "w5"}},
    "another corpus": {"prompts": {"name": "text", "path": "other.txt", "separator": "\n\n"}},
}
SAME_TEXTS: dict[str, dict[str, Any]] = {
    "num_texts": {"num_texts": 40},
    "filter": {"filter": {"drop_highest": 0.5, "drop_lowest": 0.1, "deduplicate": True, "max_repetition": 0.5}},
    "num_windows": {"calibration": {"num_windows": 3}},
    "window_length": {"calibration": {"window_length": 8}},
    "windows": {"calibration": {"windows": "inside"}},
    "bos": {"calibration": {"bos": False}},
    "seed as auto": {"seed": 0},
    "max_memory": {"engine": {"name": "transformers", "max_memory": {"cpu": "1GB"}, "offload_path": "/somewhere"}},
    "the same corpus elsewhere": {"prompts": {"name": "text", "path": "copy.txt", "separator": "\n\n"}},
}


def changed(place: Path, tokenizer: PreTrainedTokenizerBase, changes: dict[str, Any]) -> Generation:
    changes = dict(changes)
    (place / "copy.txt").write_bytes((place / "corpus.txt").read_bytes())
    prompts = changes.pop("prompts", None)
    if prompts is None:
        return planned(place, tokenizer, **changes)
    prompts = prompts if isinstance(prompts, str) else {**prompts, "path": str(place / prompts["path"])}
    values = {"source": selfgen(prompts), "num_windows": 2, "window_length": 16}
    return plan_calibration(build_reader(place / "model", place / "out", values, tokenizer)).generations[0]


@pytest.mark.parametrize("name", OTHER_TEXTS)
def test_texts_that_are_others_lie_in_another_folder(
    name: str, place: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    other, usual = changed(place, tokenizer, OTHER_TEXTS[name]), planned(place, tokenizer)
    assert other.store.folder != usual.store.folder
    assert other.store.folder.parent == usual.store.folder.parent == place / "out" / "calibration"


@pytest.mark.parametrize("name", SAME_TEXTS)
def test_what_leaves_the_texts_as_they_are_leaves_their_folder(
    name: str, place: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert changed(place, tokenizer, SAME_TEXTS[name]).store == planned(place, tokenizer).store


def test_another_model_writes_other_texts(place: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    source = selfgen()
    values = {"source": source, "num_windows": 2, "window_length": 16}
    reader = build_reader(place / "model", place / "out", values, tokenizer)
    folders = set()
    for model in ("one", "other"):
        object.__setattr__(reader, "model", model)
        folders.add(plan_calibration(reader).generations[0].store.folder)
    assert len(folders) == 2


def test_prompts_do_not_depend_on_how_many_texts_are_asked_for(place: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    few, many = planned(place, tokenizer, num_texts=5), planned(place, tokenizer, num_texts=50)
    assert take(few.prompts, 50) == take(many.prompts, 50)
    assert few.missing() == [*many.missing()[:1], *plan_batches({4: many.prompts[4]}, 4)]


def test_the_paper_is_the_preset(place: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Ji et al., section 4: two tokens of 5,000 texts, and the worst fifth goes."""
    corpus = {"name": "text", "path": str(place / "corpus.txt")}
    reader = build_reader(place / "model", place / "out", {"source": {"name": "selfgen", "prompts": corpus}}, tokenizer)
    source: Any = reader.config.calibration.source
    assert (source.prompt_tokens, source.num_texts, source.filter.drop_highest) == (2, 5000, 0.2)
    assert source.sampling.model_dump() == {
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 50,
        "repetition_penalty": 1.2,
        "max_new_tokens": 2048,
    }


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_settles_all_but_where_the_prompts_come_from(preset: str, place: Path) -> None:
    values = {"name": "selfgen", "preset": preset, "prompts": "bos"}
    source: Any = build_reader(place / "model", place / "out", {"source": values}).config.calibration.source
    given = {name: value for name, value in PRESETS[preset].items() if name != "prompts"}
    settled = source.model_dump()
    assert {name: settled[name] for name in ("prompt_tokens", "num_texts", "sampling")} == {
        name: given[name] for name in ("prompt_tokens", "num_texts", "sampling")
    }
    assert given["filter"].items() <= settled["filter"].items()


def test_what_a_config_gives_goes_before_the_preset_key_by_key(place: Path) -> None:
    values = {"name": "selfgen", "prompts": "bos", "num_texts": 7, "sampling": {"top_k": 0}, "filter": {}}
    source: Any = build_reader(place / "model", place / "out", {"source": values}).config.calibration.source
    assert (source.num_texts, source.prompt_tokens) == (7, 2)
    assert (source.sampling.top_k, source.sampling.temperature, source.filter.drop_highest) == (0, 0.6, 0.2)


def test_a_config_survives_being_written_and_read(place: Path) -> None:
    values = {"source": selfgen([{"name": "text", "path": "a.txt"}, {"name": "parquet", "path": "b.parquet"}])}
    config = build_reader(place / "model", place / "out", values).config
    assert type(config).model_validate(config.model_dump(mode="json")) == config
    assert type(config).model_validate_json(config.model_dump_json()) == config


# --- prompts of a model


@pytest.mark.parametrize("adds_bos", [True, False])
def test_bos_alone_is_one_token(adds_bos: bool, place: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(save_tokenizer(tmp_path / "tokenizer", adds_bos=adds_bos))
    values = {"source": selfgen(), "num_windows": 2, "window_length": 16}
    prompts = plan_calibration(build_reader(place / "model", tmp_path, values, tokenizer)).generations[0].prompts
    assert take(prompts, 3) == [(1,)] * 3


def test_a_model_without_tokenizer_begins_with_its_end_token(place: Path, tmp_path: Path) -> None:
    values = {"source": selfgen(), "num_windows": 2, "window_length": 16}
    reader = build_reader(place / "model", tmp_path, values, None, eos_tokens=(40, 2))
    assert plan_calibration(reader).generations[0].prompts[0] == (40,)
    with pytest.raises(Refusal, match="neither BOS nor EOS"):
        plan_calibration(build_reader(place / "model", tmp_path, values, None, eos_tokens=()))


def test_documents_of_special_tokens_alone_give_no_prompts(
    place: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    (tmp_path / "corpus.txt").write_text("</s> </s> </s>\n\nw3 w4\n\n<s> </s>\n\nw5 w6 </s>\n\nw7 </s> w8")
    source = selfgen({"name": "text", "path": str(tmp_path / "corpus.txt"), "separator": "\n\n"})
    values = {"source": source, "num_windows": 2, "window_length": 16}
    generation = plan_calibration(build_reader(place / "model", tmp_path, values, tokenizer)).generations[0]
    assert sorted(take(generation.prompts, 3)) == [(3, 4), (5, 6), (7, 2)]
    assert set(as_tuples(list(generation.corpora[0]))) == {(3, 4), (5, 6), (7, 2, 8)}, "without the end of a text"
