"""Makes the quickstart model, its tokenizer and its texts from documentation packages of Debian 12.

Fetch the packages with `apt-get download NAME`, unpack each with `dpkg-deb -x FILE.deb PACKAGES/NAME`, and let the
program of the package bible-kjv print the King James Bible, one verse per line:

    python3.11-doc      3.11.2-6+deb12u9     Python documentation, PSF licence version 2
    postgresql-doc-15   15.20-0+deb12u1      PostgreSQL documentation, PostgreSQL licence
    sqlite3-doc         3.40.1-2+deb12u2     SQLite documentation, public domain
    bible-kjv           4.38                 King James Bible, public domain

    bible -f -l2000 gen1:1-rev22:21 > kjv.txt
    python scripts/train_quickstart_model.py texts PACKAGES WORK --bible kjv.txt
    python scripts/train_quickstart_model.py train WORK --minutes 100

`texts` makes one document of every page, sets pages aside that are never trained on, trains the tokenizer and writes
the committed texts. `train` runs on one CPU thread until the minutes are spent, exports the model as it stands every
ten minutes and, when killed and started again, goes on from its last checkpoint. The learning rate follows the clock,
so two runs agree in quality, not in bits.

Shapes: B sequences, T positions, V vocabulary.
"""

import argparse
import json
import math
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

QUICKSTART = Path("configs/quickstart")
PACKAGES = ("python3.11-doc", "postgresql-doc-15", "sqlite3-doc")
SEED = 20261121
BOS, EOS = "<bos>", "<eos>"
VOCABULARY = 4096
WINDOW = 512

SKIPPED_PAGES = re.compile(
    r"(genindex|contents|py-modindex|search|bookindex|crossref|requirements|syntaxdiagrams|keyword_index|sitemap"
    r"|/_static/|/_downloads/|/_sources/|capi3ref|docs\.html|changelog\.html|c-api/stable)"
)
SKIPPED_TAGS = {"head", "script", "style", "svg", "nav", "footer", "button", "form", "title", "sup"}
SKIPPED_CLASSES = {
    *("nosearch", "navheader", "navfooter", "related", "sphinxsidebar", "footer", "headerlink", "toctree-wrapper"),
    *("contents", "toc", "fancy_toc", "imgcontainer", "mobile-nav", "menu", "copyright", "indextable"),
}
VOID_TAGS = {"area", "base", "br", "col", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
BLOCK_TAGS = {
    *("p", "div", "h1", "h2", "h3", "h4", "h5", "h6", "li", "ul", "ol", "dl", "dt", "dd", "tr", "table", "pre"),
    *("blockquote", "section", "hr", "body", "tbody", "thead", "caption", "center"),
}


@dataclass(frozen=True)
class Document:
    package: str
    text: str


@dataclass(frozen=True)
class Recipe:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms; rates at their plateau."""

    minutes: float = 100.0
    batch: int = 8
    optimizer: str = "muon"
    muon_rate: float = 1e-2
    adamw_rate: float = 5e-3
    weight_decay: float = 0.1
    warmup: float = 0.02
    decay: float = 0.30
    clip: float = 1.0
    checkpoint_every: float = 5.0
    first_export: float = 3.0
    export_every: float = 10.0


@dataclass
class Progress:
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass
class Run:
    """What a checkpoint has to bring back, and where things are."""

    work: Path
    recipe: Recipe
    model: LlamaForCausalLM
    optimizers: list[torch.optim.Optimizer]
    progress: Progress = field(default_factory=Progress)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    texts = commands.add_parser("texts", help="make the committed texts, the tokenizer and the training tokens")
    texts.add_argument("packages", type=Path, help="folder with one unpacked Debian package per sub-folder")
    texts.add_argument("work", type=Path)
    texts.add_argument("--bible", type=Path, required=True, help="what `bible -f -l2000 gen1:1-rev22:21` printed")
    training = commands.add_parser("train", help="train, or go on training, and export the model")
    training.add_argument("work", type=Path)
    training.add_argument("--minutes", type=float, default=Recipe.minutes)
    training.add_argument("--batch", type=int, default=Recipe.batch)
    training.add_argument("--optimizer", choices=("muon", "adamw"), default=Recipe.optimizer)
    training.add_argument("--muon-rate", type=float, default=Recipe.muon_rate)
    training.add_argument("--adamw-rate", type=float, default=Recipe.adamw_rate)
    options = vars(parser.parse_args())
    if options.pop("command") == "texts":
        make_texts(**options)
    else:
        train(options.pop("work"), Recipe(**options))


def make_texts(packages: Path, work: Path, bible: Path) -> None:
    rng = random.Random(SEED)
    documents = read_pages(packages)
    rng.shuffle(documents)
    num_heldout = round(0.04 * len(documents))
    heldout, training = documents[:num_heldout], documents[num_heldout:]
    _write_text("calibration", draw(training, 1_500_000, rng))
    _write_text("heldout", draw(heldout, 300_000, rng))
    _write_text("unlike", draw(read_bible(bible), 300_000, rng))
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer([d.text for d in training])
    save_tokenizer(tokenizer, work / "tokenizer")
    ids = [_encode(tokenizer, d.text) for d in training]
    torch.save([torch.tensor(i, dtype=torch.int16) for i in ids], work / "training.pt")
    report = {
        "pages": {name: sum(d.package == name for d in documents) for name in PACKAGES},
        "characters": {name: sum(len(d.text) for d in documents if d.package == name) for name in PACKAGES},
        "training_tokens": sum(map(len, ids)),
        "heldout_pages": num_heldout,
    }
    (work / "corpus.json").write_text(json.dumps(report, indent=1))
    print(json.dumps(report, indent=1))


def train(work: Path, recipe: Recipe) -> None:
    torch.set_num_threads(1)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")
    batch_at = batch_source(torch.load(work / "training.pt"), recipe.batch)
    probe = committed_windows(tokenizer, "heldout")[:32]
    model = build_model()
    run = Run(work, recipe, model, build_optimizers(model, recipe))
    load_checkpoint(run)
    at = run.progress
    before, started, budget = at.seconds, time.monotonic(), recipe.minutes * 60
    checkpoint_due, export_due = at.seconds + recipe.checkpoint_every * 60, at.seconds + recipe.first_export * 60
    losses: list[float] = []
    while at.seconds < budget:
        losses.append(train_step(run, batch_at(at.step), scale=rate_at(at.seconds / budget, recipe)))
        at.step, at.tokens = at.step + 1, at.tokens + recipe.batch * WINDOW
        at.seconds = before + time.monotonic() - started
        if at.step % 20 == 0:
            log(run, train_loss=sum(losses) / len(losses))
            losses.clear()
        if at.seconds >= checkpoint_due:
            save_checkpoint(run)
            log(run, heldout_loss=mean_loss(model, probe))
            checkpoint_due += recipe.checkpoint_every * 60
        if at.seconds >= export_due:
            export(run, model_card(run, {}))
            export_due += recipe.export_every * 60
    save_checkpoint(run)
    finish(run, tokenizer)


def finish(run: Run, tokenizer: PreTrainedTokenizerFast) -> None:
    """Measures the model as stored, in bfloat16, and puts the figures on its card."""
    export(run, model_card(run, {}))
    stored = LlamaForCausalLM.from_pretrained(QUICKSTART / "model")
    losses = {name: mean_loss(stored, committed_windows(tokenizer, name)) for name in ("heldout", "unlike")}
    perplexities = {name: math.exp(loss) for name, loss in losses.items()}
    card = model_card(run, perplexities)
    (QUICKSTART / "model" / "README.md").write_text(card, encoding="utf-8")
    log(run, **perplexities)
    print(card)


def model_card(run: Run, perplexities: dict[str, float]) -> str:
    corpus, at = json.loads((run.work / "corpus.json").read_text()), run.progress
    num_parameters = sum(p.numel() for p in run.model.parameters())
    figures = "".join(f"| perplexity on {name}.txt | {value:.2f} |\n" for name, value in perplexities.items())
    return f"""# Quickstart model

A small Llama (6 layers, hidden size 256, 4 heads, 2 key-value heads, byte-level BPE of {VOCABULARY} tokens) for trying
out pruning on a CPU. It writes text that looks like software documentation; it knows nothing and is of no other use.
Made by `scripts/train_quickstart_model.py`.

| | |
|---|---|
| parameters | {num_parameters:,}, embedding tied, stored in bfloat16 |
| training corpus | {corpus["training_tokens"]:,} tokens |
| tokens seen in training | {at.tokens:,} in {at.step:,} steps, {at.tokens / corpus["training_tokens"]:.1f} epochs |
| training time | {at.seconds / 60:.0f} minutes on one CPU thread |
{figures or "| state | still in training |" + chr(10)}
Perplexities are per token, over non-overlapping windows of {WINDOW} tokens, computed in bfloat16, every document opened
by `{BOS}` and closed by `{EOS}` as in training. Read as one plain text, as `shardprune evaluate` does, a text without
these marks has a slightly higher one. The texts are in `configs/quickstart/text`: neither was trained on, `heldout.txt`
is of the training register, `unlike.txt` is not.

Trained on the documentation of Python 3.11 (PSF licence version 2), PostgreSQL 15 (PostgreSQL licence) and SQLite 3.40
(public domain), as packaged in Debian 12; notices in `configs/quickstart/text/NOTICE`. Every document was opened by
`{BOS}` and closed by `{EOS}`, so the model writes a page from `{BOS}` alone.
"""


def _write_text(name: str, documents: list[Document]) -> None:
    (QUICKSTART / "text").mkdir(parents=True, exist_ok=True)
    text = "\n\n".join(document.text for document in documents) + "\n"
    (QUICKSTART / "text" / f"{name}.txt").write_text(text, encoding="utf-8")


class PageText(HTMLParser):
    """Collects the prose of one page as blocks: paragraphs, headings, list items, table rows and code."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[str] = []
        self._pieces: list[str] = []
        self._item_mark = ""
        self._code_depth = 0
        self._skip_tag = ""
        self._skip_depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._skip_tag:
            self._skip_depth += tag == self._skip_tag
        elif tag not in VOID_TAGS and (tag in SKIPPED_TAGS or _classes(attrs) & SKIPPED_CLASSES):
            self._skip_tag, self._skip_depth = tag, 1
        elif tag in BLOCK_TAGS:
            self._close_block()
            self._code_depth += tag == "pre"
            self._item_mark = "- " if tag == "li" else self._item_mark
        elif tag in ("br", "td", "th"):
            self._pieces.append("\n" if tag == "br" and self._code_depth else " ")

    def handle_endtag(self, tag: str) -> None:
        if self._skip_tag:
            self._skip_depth -= tag == self._skip_tag
            self._skip_tag = self._skip_tag if self._skip_depth else ""
        elif tag in BLOCK_TAGS:
            self._close_block()
            self._code_depth = max(0, self._code_depth - (tag == "pre"))
            self._item_mark = "" if tag == "li" else self._item_mark

    def handle_data(self, data: str) -> None:
        if not self._skip_tag:
            self._pieces.append(data)

    def close(self) -> None:
        super().close()
        self._close_block()

    def _close_block(self) -> None:
        raw = "".join(self._pieces)
        self._pieces.clear()
        if self._code_depth:
            lines = [line.rstrip() for line in raw.expandtabs(8).splitlines()]
            text = "\n".join(line for line in lines if line)
        else:
            text = " ".join(raw.split())
        if text:
            self.blocks.append(self._item_mark + text)
            self._item_mark = ""


def _classes(attrs: list[tuple[str, str | None]]) -> set[str]:
    return set((dict(attrs).get("class") or "").split())


def read_pages(packages: Path) -> list[Document]:
    """One document per page, without pages that are indexes and without blocks that an earlier page had."""
    seen: set[str] = set()
    documents = []
    for name in PACKAGES:
        pages = sorted((packages / name).rglob("*.html"))
        if not pages:
            raise ValueError(f"no pages under {packages / name}: unpack the Debian package {name} there")
        for page in pages:
            if page.is_symlink() or SKIPPED_PAGES.search(page.as_posix()):
                continue
            parser = PageText()
            parser.feed(page.read_text(encoding="utf-8", errors="replace"))
            parser.close()
            text = "\n".join(_unseen(parser.blocks, seen))
            if len(text) >= 400:
                documents.append(Document(name, text))
    return documents


def _unseen(blocks: list[str], seen: set[str]) -> Iterator[str]:
    for block in blocks:
        if len(block) < 40:
            yield block
        elif block not in seen:
            seen.add(block)
            yield block


def read_bible(path: Path) -> list[Document]:
    """One document per chapter, from lines like `Ge1:1 In the beginning God created the heaven and the earth.`."""
    chapters: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        place, verse = line.split(" ", maxsplit=1)
        chapters.setdefault(place.split(":")[0], []).append(verse.strip())
    return [Document("bible-kjv", "\n".join(verses)) for verses in chapters.values()]


def draw(documents: list[Document], size: int, rng: random.Random) -> list[Document]:
    """Whole documents in random order, about `size` bytes; none is longer than a tenth of that."""
    drawn, total = [], 0
    for document in rng.sample(documents, len(documents)):
        length = len(document.text.encode())
        if length <= size // 10 and total + length <= size * 1.01:
            drawn.append(document)
            total += length
    return drawn


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = (BOS, tokenizer.token_to_id(BOS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B:1", special_tokens=[bos]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=2 * WINDOW,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Names the class that transformers 4 and 5 both know."""
    tokenizer.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    named = json.loads(settings.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings.write_text(json.dumps(named, indent=2) + "\n")


def _encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Every document opens with <bos>, which also separates it from the one before, and closes with <eos>."""
    return [*tokenizer.encode(text), tokenizer.eos_token_id]


def build_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2 * WINDOW,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        attn_implementation="sdpa",
    )
    torch.manual_seed(SEED)
    return LlamaForCausalLM(config)


def build_optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    embeddings = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" in name]
    norms = [p for p in model.parameters() if p.ndim < 2]
    by_adamw = embeddings if recipe.optimizer == "muon" else embeddings + matrices
    groups = [{"params": by_adamw, "weight_decay": recipe.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=recipe.adamw_rate, betas=(0.9, 0.95), fused=True)
    ]
    if recipe.optimizer == "muon":
        muon = torch.optim.Muon(
            matrices, lr=recipe.muon_rate, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        optimizers.insert(0, muon)
    return optimizers


def rate_at(fraction: float, recipe: Recipe) -> float:
    """Multiplier of the learning rate when `fraction` of the budget is spent."""
    if fraction < recipe.warmup:
        return max(fraction / recipe.warmup, 0.02)
    return min(1.0, max(0.0, 1.0 - fraction) / recipe.decay)


def epoch_windows(documents: list[Tensor], epoch: int) -> Tensor:
    """All windows of one pass, (windows, WINDOW + 1): documents in a fresh order, joined, cut at a fresh offset."""
    generator = torch.Generator().manual_seed(SEED + epoch)
    order = torch.randperm(len(documents), generator=generator).tolist()
    stream = torch.cat([documents[i] for i in order])
    offset = int(torch.randint(WINDOW, (1,), generator=generator))
    num = (len(stream) - offset - 1) // WINDOW
    windows = stream[offset:].unfold(0, WINDOW + 1, WINDOW)[:num]
    return windows[torch.randperm(num, generator=generator)]


def batch_source(documents: list[Tensor], batch: int) -> Callable[[int], Tensor]:
    """Step -> its batch, whatever step the run resumes from."""
    per_epoch = sum(map(len, documents)) // WINDOW // batch - 1
    cache: dict[int, Tensor] = {}

    def batch_at(step: int) -> Tensor:
        epoch, index = divmod(step, per_epoch)
        if epoch not in cache:
            cache.clear()
            cache[epoch] = epoch_windows(documents, epoch)
        return cache[epoch][index * batch : (index + 1) * batch].long()

    return batch_at


def committed_windows(tokenizer: PreTrainedTokenizerFast, name: str) -> Tensor:
    """Non-overlapping windows over a committed text, each with the token that follows it as its last target."""
    documents = (QUICKSTART / "text" / f"{name}.txt").read_text(encoding="utf-8").strip().split("\n\n")
    stream = torch.tensor([i for d in documents for i in _encode(tokenizer, d)])
    return stream.unfold(0, WINDOW + 1, WINDOW)


def loss_of(model: LlamaForCausalLM, windows: Tensor) -> Tensor:
    """Mean next-token loss of windows (B, T + 1); a float32 model computes under bfloat16 autocast."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=model.dtype == torch.float32):
        logits_BTV = model(input_ids=windows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits_BTV.flatten(0, 1).float(), windows[:, 1:].flatten())


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, windows: Tensor, batch: int = 8) -> float:
    total = sum(float(loss_of(model, part)) * len(part) for part in torch.split(windows, batch))
    return total / len(windows)


def train_step(run: Run, windows: Tensor, scale: float) -> float:
    loss = loss_of(run.model, windows)
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), run.recipe.clip)
    for optimizer in run.optimizers:
        by_muon = isinstance(optimizer, torch.optim.Muon)
        for group in optimizer.param_groups:
            group["lr"] = scale * (run.recipe.muon_rate if by_muon else run.recipe.adamw_rate)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def save_checkpoint(run: Run) -> None:
    path = run.work / "checkpoint.pt"
    optimizers = [optimizer.state_dict() for optimizer in run.optimizers]
    state = {"model": run.model.state_dict(), "optimizers": optimizers, "progress": asdict(run.progress)}
    torch.save(state, path.with_suffix(".partial"))
    os.replace(path.with_suffix(".partial"), path)


def load_checkpoint(run: Run) -> None:
    path = run.work / "checkpoint.pt"
    if not path.exists():
        return
    state = torch.load(path, weights_only=True)
    run.model.load_state_dict(state["model"])
    for optimizer, saved in zip(run.optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    run.progress = Progress(**state["progress"])


def export(run: Run, card: str) -> None:
    """Writes the model folder file by file through a temporary folder, so a reader never sees half a file."""
    partial, target = QUICKSTART / ".model-partial", QUICKSTART / "model"
    copy = build_model()
    copy.load_state_dict(run.model.state_dict())
    copy = copy.to(torch.bfloat16)
    copy.generation_config = GenerationConfig(
        bos_token_id=0, eos_token_id=1, do_sample=True, temperature=0.8, top_p=0.95
    )
    copy.save_pretrained(partial)
    for file in (run.work / "tokenizer").iterdir():
        shutil.copyfile(file, partial / file.name)
    (partial / "README.md").write_text(card, encoding="utf-8")
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(partial.iterdir()):
        file.chmod(0o644)
        os.replace(file, target / file.name)
    partial.rmdir()


def log(run: Run, **figures: float) -> None:
    line = json.dumps(asdict(run.progress) | {name: round(value, 4) for name, value in figures.items()})
    with (run.work / "log.jsonl").open("a") as file:
        file.write(line + "\n")


if __name__ == "__main__":
    main()
