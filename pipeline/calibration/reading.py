"""Reads sources for a model: documents as token ids, and what a model needs to write documents itself."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import pyarrow as pa
import torch
from torch import Tensor

from pipeline.calibration.dataset import DatasetSource, kept_table
from pipeline.calibration.generation import Generation, GenerationTask, Prompts, identify_rows, rows_folder
from pipeline.calibration.parquet import ParquetSource
from pipeline.calibration.rows import RowStore
from pipeline.calibration.selfgen import SelfgenSource, VllmEngine
from pipeline.calibration.text import TextSource
from pipeline.calibration.vocabulary import Vocabulary
from pipeline.config import RunConfig
from pipeline.errors import Refusal
from pipeline.job import Resolved
from pipeline.models.skeleton import Skeleton
from pipeline.storage import Location, locate


@dataclass(frozen=True)
class Reader:
    """`model` is the digest of the checkpoint, `folder` that of the run's calibration data.

    `fetched` fills with what came from elsewhere and is to be kept with the run.
    """

    config: RunConfig
    resolved: Resolved
    skeleton: Skeleton
    vocabulary: Vocabulary
    model: str
    folder: Location
    fetched: dict[Location, pa.Table] = field(default_factory=dict)

    def documents(self, source: TextSource | ParquetSource | DatasetSource, seed: int) -> Iterator[Tensor]:
        """Every document as token ids [T], with the special tokens that the tokenizer adds by itself."""
        if isinstance(source, ParquetSource) and not source.holds_text:
            for ids_T in source.read_ids():
                self.vocabulary.check(ids_T, source.origin)
                yield ids_T
            return
        if isinstance(source, DatasetSource):
            texts = source.read(self.folder, seed)
            if not source.kept_file(self.folder, seed).exists():
                self.fetched[source.kept_file(self.folder, seed)] = kept_table(texts)
        else:
            texts = source.read_texts() if isinstance(source, ParquetSource) else source.read()
        yield from self.vocabulary.tokenize(texts, source)

    def generation(self, source: SelfgenSource, num_windows: int) -> Generation:
        """The texts that the model is to write for some of the windows. Raises Refusal where it could not be enough."""
        if isinstance(source.engine, VllmEngine) and self.config.cluster.address == "none":
            raise Refusal(
                "calibration.source.engine.name = 'vllm': runs on Ray; set cluster.address, or use 'transformers'"
            )
        seed = self.config.calibration.seed if source.seed == "auto" else source.seed
        corpora = self._corpora(source, seed)
        prompts = self._prompts(source, corpora, seed)
        self._check_lengths(source, num_windows, prompts)
        task = GenerationTask(
            source=self.skeleton.checkpoint.path,
            model_path=self.config.model.path,
            is_from_hub=not locate(self.config.model.path).is_dir(),
            trust_remote_code=self.config.model.trust_remote_code,
            dtype=self.resolved.dtype,
            device=self.resolved.device,
            threads=self._num_threads(),
            engine=source.engine,
            sampling=source.sampling,
            seed=seed,
            batch_size=source.batch_size,
            pad_token=self.vocabulary.pad_token,
            eos_tokens=self.vocabulary.eos_tokens,
        )
        identity = identify_rows(task, self.model, prompts)
        return Generation(source, task, prompts, corpora, RowStore(rows_folder(self.folder, identity), identity))

    def _num_threads(self) -> int:
        """Of one generator: as many run side by side as find room, so each takes no more than it asks for."""
        threads = self.config.runtime.threads
        return max(1, int(self.config.cluster.worker.num_cpus)) if threads == "auto" else threads

    def _corpora(self, source: SelfgenSource, seed: int) -> tuple[tuple[Tensor, ...], ...]:
        """The documents of each seed corpus that say anything, without the end that a tokenizer may add."""
        corpora = []
        for corpus in source.corpora:
            documents = map(self.vocabulary.without_end, self.documents(corpus, seed))
            speaking = tuple(ids_T.to(torch.int32) for ids_T in documents if self.vocabulary.says_anything(ids_T))
            if not speaking:
                raise Refusal(
                    f"calibration.source.prompts: no document of {corpus.origin} has any text beside special tokens; "
                    "give a seed corpus with text"
                )
            corpora.append(speaking)
        return tuple(corpora)

    def _prompts(self, source: SelfgenSource, corpora: tuple[tuple[Tensor, ...], ...], seed: int) -> Prompts:
        if corpora:
            return Prompts.from_documents(corpora, source.prompt_tokens, seed)
        first = self.vocabulary.first_token()
        if source.prompts == "bos":
            return Prompts((((first,),),))
        starts = [torch.tensor([first, token]) for token in self.vocabulary.speaking_tokens()]
        return Prompts.from_documents([starts], 2, seed)

    def _check_lengths(self, source: SelfgenSource, num_windows: int, prompts: Prompts) -> None:
        settings, length = self.config.calibration, len(prompts[0]) + source.sampling.max_new_tokens
        self.skeleton.check_window_length("calibration.source: a prompt and sampling.max_new_tokens", length)
        # the BOS that begins a window may be the window's own
        if settings.windows == "inside" and length < settings.window_length - 1:
            raise Refusal(
                f"calibration.window_length = {settings.window_length}: a text has at most {length} tokens, prompt and "
                "all, so that none holds a window; set calibration.windows=across, or ask for shorter windows"
            )
        # of what passes everything else, the filter drops at least this much
        num_kept = len(source.filter.ranks_kept(source.num_texts))
        if num_kept * length < num_windows * (settings.window_length - 1):
            raise Refusal(
                f"calibration.source.num_texts = {source.num_texts}: of them at most {num_kept} are kept, of at most "
                f"{length} tokens, which cannot be enough for {num_windows} windows of {settings.window_length}; "
                "ask for more texts or fewer windows"
            )
