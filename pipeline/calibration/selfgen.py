"""Source `selfgen`: the model writes its own calibration data (Ji et al., arXiv 2410.17711).

Calibration data close to what a model was trained on prunes it best, and where the training data is not to be had, the
model's own texts come closest.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, StringConstraints, Tag, model_validator

from pipeline.calibration.dataset import DatasetSource
from pipeline.calibration.filters import Filter
from pipeline.calibration.parquet import ParquetSource
from pipeline.calibration.text import TextSource
from pipeline.settings import OpenText, Settings, UserPath

Corpus = Annotated[TextSource | ParquetSource | DatasetSource, Field(discriminator="name")]
PositiveInt = Annotated[int, Field(ge=1)]

# Every choice that a recipe makes; what a config gives besides takes precedence.
PRESETS: dict[str, dict[str, Any]] = {
    # the settings of Ji et al., whose prompts are the first tokens of 5,000 Wikipedia texts
    "paper": {
        "prompt_tokens": 2,
        "num_texts": 5000,
        "sampling": {
            "temperature": 0.6,
            "top_p": 0.95,
            "top_k": 50,
            "repetition_penalty": 1.2,
            "max_new_tokens": 2048,
        },
        "filter": {"drop_highest": 0.2},
    },
    # what prunes the quickstart model best: hardly changed sampling, from nothing (README.md has the study)
    "plain": {
        "prompts": "bos",
        "prompt_tokens": 1,
        "num_texts": 1000,
        "sampling": {
            "temperature": 0.9,
            "top_p": 1.0,
            "top_k": 0,
            "repetition_penalty": 1.0,
            "max_new_tokens": 2048,
        },
        "filter": {"drop_highest": 0.2},
    },
}


class Sampling(Settings):
    """`top_k: 0`, `top_p: 1` and `repetition_penalty: 1` do nothing."""

    temperature: Annotated[float, Field(ge=1e-6)]
    top_p: Annotated[float, Field(gt=0, le=1)]
    top_k: Annotated[int, Field(ge=0)]
    repetition_penalty: Annotated[float, Field(ge=1e-3)]
    max_new_tokens: PositiveInt


MemoryName = Annotated[str, BeforeValidator(str), StringConstraints(pattern=r"^(cpu|disk|\d+)$")]
MemorySize = Annotated[int, Field(ge=0)] | Annotated[str, StringConstraints(pattern=r"^\d+(\.\d+)?[KMGT]i?B$")]


class TransformersEngine(Settings):
    """`generate` of transformers, which runs anywhere.

    `max_memory`: auto = the whole model on the worker's device where it fits, else spread by accelerate over GPUs, RAM
    and `offload_path`; or bytes by name, for example `{"0": 70GB, cpu: 200GB}`, the rest on disk.
    """

    name: Literal["transformers"] = "transformers"
    max_memory: Literal["auto"] | dict[MemoryName, MemorySize] = "auto"
    offload_path: UserPath | None = None

    @property
    def identity(self) -> str:
        """What rows depend on; where the weights lie does not matter."""
        return self.name


class VllmEngine(Settings):
    """vLLM through Ray Data LLM, for GPUs; `packages` are installed into an environment of the engine's own."""

    name: Literal["vllm"] = "vllm"
    tensor_parallel_size: PositiveInt = 1
    pipeline_parallel_size: PositiveInt = 1
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    packages: tuple[OpenText, ...] = ()

    @property
    def identity(self) -> str:
        """What rows depend on."""
        return f"{self.name}, {self.tensor_parallel_size} x {self.pipeline_parallel_size} GPUs"


Engine = Annotated[TransformersEngine | VllmEngine, Field(discriminator="name")]


def _kind_of_prompts(value: Any) -> str:
    """Which of the ways to give prompts a value is, so that a mistake is told of that one alone."""
    if isinstance(value, list | tuple):
        return "corpora"
    return "corpus" if isinstance(value, dict | Settings) else "word"


Prompts = Annotated[
    Annotated[Literal["bos", "random"], Tag("word")]
    | Annotated[Corpus, Tag("corpus")]
    | Annotated[tuple[Corpus, ...], Field(min_length=1), Tag("corpora")],
    Discriminator(_kind_of_prompts),
]


class SelfgenSource(Settings):
    """A text is the continuation of the first `prompt_tokens` tokens of a text of `prompts`.

    Several corpora take turns. Where there are fewer texts than `num_texts`, they are used again with other random
    numbers. Without a corpus, bos begins with BOS alone and random with BOS and one token of the vocabulary, each token
    in turn. `seed: auto` is calibration.seed.
    """

    name: Literal["selfgen"] = "selfgen"
    preset: Literal["paper", "plain"] = "paper"
    prompts: Prompts
    prompt_tokens: PositiveInt
    num_texts: PositiveInt
    sampling: Sampling
    filter: Filter
    seed: Literal["auto"] | Annotated[int, Field(ge=0, lt=2**63)] = "auto"
    batch_size: PositiveInt = 32
    engine: Engine = TransformersEngine()

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        preset = values.get("preset", "paper")
        return _merge(PRESETS.get(preset, {}) if isinstance(preset, str) else {}, values)

    @model_validator(mode="after")
    def _engine_takes_it(self) -> "SelfgenSource":
        # beyond it vLLM refuses, or takes another temperature, once the model is loaded
        if isinstance(self.engine, VllmEngine) and not 0.01 <= self.sampling.temperature <= 2:
            raise ValueError(f"sampling.temperature = {self.sampling.temperature}: vLLM takes 0.01 to 2")
        return self

    @property
    def corpora(self) -> tuple[TextSource | ParquetSource | DatasetSource, ...]:
        """Where prompts come from; none where the model begins by itself."""
        if isinstance(self.prompts, str):
            return ()
        return self.prompts if isinstance(self.prompts, tuple) else (self.prompts,)

    @property
    def origin(self) -> str:
        return "selfgen"


def _merge(defaults: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """`given` before `defaults`, in nested mappings too."""
    merged = {**defaults, **given}
    for name, value in defaults.items():
        if isinstance(value, dict) and isinstance(given.get(name), dict):
            merged[name] = _merge(value, given[name])
    return merged
