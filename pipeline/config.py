"""RunConfig: every choice of a run, as frozen settings."""

import os
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from pipeline.allocation import Allocation
from pipeline.allocation.uniform import Uniform
from pipeline.calibration.sources import Source
from pipeline.errors import Refusal
from pipeline.methods import Method
from pipeline.methods.sparsegpt import SparseGPT
from pipeline.segments import Propagation
from pipeline.settings import Settings, UserLocation, UserPath
from pipeline.sparsity import Pattern, Unstructured, parse_pattern
from pipeline.storage import Location, ObjectPath, locate

Auto = Literal["auto"]
Granularity = Literal["layer", "linear"]
REVISION = "{revision}"
PositiveInt = Annotated[int, Field(ge=1)]


class ModelSettings(Settings):
    """`path` is a folder, an s3:// or gs:// prefix, or a model id on the Hugging Face hub.

    `dtype: auto` computes in the stored dtype.
    """

    path: UserLocation
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    trust_remote_code: bool = False


class CalibrationSettings(Settings):
    """`bos: auto` begins every window with the BOS token where the tokenizer itself begins a text with it.

    `windows`: inside = each from one document, across = from all documents joined, rows = each row of a Parquet file
    is one; auto = rows for Parquet files of token ids, else across.
    """

    source: Source
    num_windows: PositiveInt = 128
    window_length: Annotated[int, Field(ge=2)] = 2048
    windows: Auto | Literal["inside", "across", "rows"] = "auto"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    bos: Auto | bool = "auto"


class PruningSettings(Settings):
    """`sparsity` absent: 0.5, or what an N:M pattern implies. `permute`: reorder channels so that N:M costs less.

    `propagation`: the activations that a layer is pruned on. pruned = those that the pruned layers before it give,
    dense = those of the dense model, shard = dense ones at the first layer of each shard and pruned ones within it.
    `granularity`: layer = a layer is pruned on what its linears read while it is dense, and then run once more;
    linear = in one pass, each linear on what the pruned ones before it in the layer give; auto = as suits the method.
    """

    method: Method = SparseGPT()
    sparsity: float | None = None
    pattern: str = "unstructured"
    permute: bool = False
    allocation: Allocation = Uniform()
    propagation: Propagation = "pruned"
    granularity: Auto | Granularity = "auto"

    @field_validator("sparsity")
    @classmethod
    def _in_range(cls, sparsity: float | None) -> float | None:
        if sparsity is not None and not 0 <= sparsity < 1:
            raise ValueError("must be at least 0 and below 1")
        return sparsity

    @field_validator("pattern", mode="before")
    @classmethod
    def _as_text(cls, pattern: Any) -> Any:
        # YAML 1.1 reads an unquoted 2:4 as the sexagesimal number 124
        if isinstance(pattern, int) and not isinstance(pattern, bool):
            return f"{pattern // 60}:{pattern % 60}"
        return pattern

    @model_validator(mode="after")
    def _consistent(self) -> "PruningSettings":
        if isinstance(self.target, Unstructured) and self.permute:
            raise Refusal(
                "pruning.permute = true: the order of columns makes no difference to pruning.pattern = unstructured; "
                "leave it out, or ask for an N:M pattern"
            )
        if self.granularity == "linear" and self._why_by_layer:
            raise Refusal(f"pruning.granularity = 'linear': {self._why_by_layer}; ask for layer or auto")
        return self

    @property
    def surveys_inputs(self) -> bool:
        """Whether the allocation looks at the inputs of the linears of the dense model, which is run for it."""
        statistic = self.allocation.statistic
        return statistic is not None and statistic.needs_inputs

    def settle_granularity(self, earlier: Granularity | None) -> Granularity:
        """What `granularity` comes to; auto means what it did in an earlier attempt, if there was one."""
        if self.granularity != "auto":
            return self.granularity
        return earlier or ("layer" if self._why_by_layer else self.method.best_granularity)

    @property
    def _why_by_layer(self) -> str | None:
        """Why a layer cannot be pruned linear by linear, if it cannot."""
        if not self.method.statistic.needs_inputs:
            return f"pruning.method = {self.method.name} looks at weights alone, for which no layer is run"
        if self.method.prunes_blocks:
            return f"pruning.method = {self.method.name} prunes a feed-forward block as one"
        if self.propagation == "dense":
            return "with pruning.propagation = dense every layer is run unpruned"
        if self.permute:
            return "pruning.permute = true reorders channels by the statistics of a whole layer"
        return None

    def allocate(self, sizes: Sequence[dict[str, int]], measured: Sequence[float]) -> list[dict[str, Pattern]]:
        """Of every layer, the pattern of each linear by its key; `sizes` has the numbers of weights.

        `measured` is what the allocation measured of every layer, empty if nothing.
        """
        layers = self.allocation.allocate(self.target, [list(linears.values()) for linears in sizes], measured)
        return [dict(zip(linears, patterns, strict=True)) for linears, patterns in zip(sizes, layers, strict=True)]

    @property
    def target(self) -> Pattern:
        """The pattern of the whole model."""
        return parse_pattern(self.pattern, self.sparsity)


class WorkerSettings(Settings):
    """What one worker asks Ray for."""

    num_gpus: Auto | Annotated[float, Field(ge=0)] = "auto"
    num_cpus: Annotated[float, Field(gt=0, le=4096)] = 1
    memory_bytes: PositiveInt | None = None


class ClusterSettings(Settings):
    """`address`: none = this process, local = a Ray of its own, auto = the cluster this job runs in, or HOST:PORT.

    `num_generators`: actors that write calibration texts; auto = from one to as many as find room. `stall_seconds`: a
    worker that takes longer, and ten times longer than any has taken for such work, is replaced; and one that takes ten
    times longer for work that none has done yet.
    """

    address: str = "none"
    num_shards: Auto | PositiveInt = "auto"
    num_replicas: PositiveInt = 1
    num_generators: Auto | PositiveInt = "auto"
    stall_seconds: Annotated[float, Field(gt=0)] = 300.0
    worker: WorkerSettings = WorkerSettings()

    @field_validator("address")
    @classmethod
    def _known(cls, address: str) -> str:
        host, _, port = address.rpartition(":")
        if address not in ("none", "local", "auto") and not (host and port.isdigit()):
            raise ValueError("must be none, local, auto or HOST:PORT")
        return address

    @property
    def is_here(self) -> bool:
        """Whether all workers are on the machine that the command runs on."""
        return self.address in ("none", "local")


class RuntimeSettings(Settings):
    """How a worker computes. What `auto` meant is settled before the first layer and kept in run.yaml.

    `micro_batch_tokens`: auto = as many as suit most devices of a kind, measured = tried on a worker, once in a run.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    micro_batch_tokens: Auto | Literal["measured"] | PositiveInt = "auto"
    threads: Auto | Annotated[int, Field(ge=1, le=4096)] = "auto"
    gpu_bytes: Auto | PositiveInt = "auto"
    ram_bytes: Auto | PositiveInt = "auto"
    spill_path: Annotated[UserPath, AfterValidator(os.path.abspath)] | None = None


class EvaluationSettings(Settings):
    """`text` absent: no evaluation. `window_length` absent: that of the calibration."""

    text: UserPath | None = None
    window_length: Annotated[int, Field(ge=2)] | None = None
    tasks: Annotated[tuple[str, ...], Field(max_length=0)] = ()


class OutputSettings(Settings):
    """The run directory; the input of every `keep_entry_every`-th layer is kept in it until the end, for resuming.

    `{revision}` in `path` stands for the commit of a model id on the hub, or for a digest of a folder's files.
    """

    path: UserLocation
    keep_entry_every: PositiveInt = 4

    @field_validator("path")
    @classmethod
    def _known_placeholders(cls, path: str) -> str:
        unknown = [found for found in re.findall(r"{.*?}", path) if found != REVISION]
        if unknown:
            raise ValueError(f"{unknown[0]} stands for nothing; only {REVISION} is replaced")
        return path

    @property
    def folder(self) -> Location:
        """The run directory, absolute and without symbolic links."""
        folder = locate(self.path)
        return folder if isinstance(folder, ObjectPath) else folder.resolve()


class RunConfig(Settings):
    """Every choice of a run."""

    model: ModelSettings
    calibration: CalibrationSettings
    pruning: PruningSettings = PruningSettings()
    cluster: ClusterSettings = ClusterSettings()
    runtime: RuntimeSettings = RuntimeSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    output: OutputSettings

    @property
    def evaluation_window_length(self) -> int:
        return self.evaluation.window_length or self.calibration.window_length


class EvaluateConfig(Settings):
    """What `shardprune evaluate` needs to know of a config."""

    model: ModelSettings
    runtime: RuntimeSettings = RuntimeSettings()
    evaluation: EvaluationSettings
