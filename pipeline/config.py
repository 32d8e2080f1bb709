"""RunConfig: every choice of a run, loaded from YAML with dotted overrides."""

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator

from pipeline.allocation import Allocation
from pipeline.allocation.uniform import Uniform
from pipeline.calibration.sources import Source
from pipeline.errors import Refusal
from pipeline.methods import Method
from pipeline.methods.sparsegpt import SparseGPT
from pipeline.settings import Settings
from pipeline.sparsity import Pattern, parse_pattern

Auto = Literal["auto"]
S = TypeVar("S", bound=Settings)
PositiveInt = Annotated[int, Field(ge=1)]


def _only(available: str) -> AfterValidator:
    """For choices whose other values are named in the design and not built yet."""

    def check(value: str) -> str:
        if value not in (available, "auto"):
            raise ValueError(f"{value!r} is not available yet: use {available!r}")
        return value

    return AfterValidator(check)


class ModelSettings(Settings):
    """`path` is a folder or a model id on the Hugging Face hub; `dtype: auto` computes in the stored dtype."""

    path: str
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    trust_remote_code: bool = False


class CalibrationSettings(Settings):
    """`bos: auto` begins every window with the BOS token where the tokenizer itself begins a text with it."""

    source: Source
    num_windows: PositiveInt = 128
    window_length: Annotated[int, Field(ge=2)] = 2048
    seed: Annotated[int, Field(ge=0)] = 0
    bos: Auto | bool = "auto"


class PruningSettings(Settings):
    """`sparsity` may be absent with an N:M pattern, which implies it."""

    method: Method = SparseGPT()
    sparsity: float | None = None
    pattern: str = "unstructured"
    allocation: Allocation = Uniform()
    propagation: Annotated[str, _only("pruned")] = "pruned"
    granularity: Annotated[str, _only("layer")] = "auto"

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
        parse_pattern(self.pattern, self.sparsity)
        return self

    def allocate(self, num_layers: int) -> list[Pattern]:
        """The pattern of every decoder layer."""
        return self.allocation.allocate(parse_pattern(self.pattern, self.sparsity), num_layers)


class WorkerSettings(Settings):
    """What one worker asks Ray for."""

    num_gpus: Auto | Annotated[float, Field(ge=0)] = "auto"
    num_cpus: Annotated[float, Field(gt=0)] = 1
    memory_bytes: PositiveInt | None = None


class ClusterSettings(Settings):
    """`address`: none = this process, local = a Ray of its own, auto = the cluster this job runs in, or HOST:PORT."""

    address: str = "none"
    num_shards: Auto | PositiveInt = "auto"
    num_replicas: Literal[1] = 1
    worker: WorkerSettings = WorkerSettings()

    @field_validator("address")
    @classmethod
    def _known(cls, address: str) -> str:
        host, _, port = address.rpartition(":")
        if address not in ("none", "local", "auto") and not (host and port.isdigit()):
            raise ValueError("must be none, local, auto or HOST:PORT")
        return address


class RuntimeSettings(Settings):
    """How a worker computes. What `auto` meant is settled before the first layer and kept in run.yaml."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    micro_batch_tokens: Auto | PositiveInt = "auto"
    threads: Auto | PositiveInt = "auto"
    gpu_bytes: Annotated[str, _only("auto")] = "auto"
    ram_bytes: Auto | PositiveInt = "auto"
    spill_path: str | None = None


class EvaluationSettings(Settings):
    """`text` absent: no evaluation. `window_length` absent: that of the calibration."""

    text: str | None = None
    window_length: Annotated[int, Field(ge=2)] | None = None
    tasks: Annotated[tuple[str, ...], Field(max_length=0)] = ()


class OutputSettings(Settings):
    """The run directory; the input of every `keep_entry_every`-th layer is kept in it until the end, for resuming."""

    path: str
    keep_entry_every: PositiveInt = 4


class RunConfig(Settings):
    """Every choice of a run."""

    model: ModelSettings
    calibration: CalibrationSettings
    pruning: PruningSettings = PruningSettings(sparsity=0.5)
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


def load_config(path: Path, overrides: list[str]) -> RunConfig:
    """The config in a YAML file, with `key.sub=value` overrides. Raises Refusal."""
    return validate(RunConfig, _read_yaml(path), overrides)


def validate(kind: type[S], values: dict[str, Any], overrides: list[str]) -> S:
    """Settings from plain values and overrides. Raises Refusal that tells the first mistake in one sentence."""
    for override in overrides:
        _apply(values, override)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise Refusal(_explain(error, values)) from None


class _Loader(yaml.SafeLoader):
    """YAML in which a key that is given twice is an error: the first value would be lost in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise Refusal(f"config {path}: {error.strerror}; give the path of a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise Refusal(f"config {path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise Refusal(f"config {path}: must be a mapping with the keys model, calibration, pruning, output")
    return values


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    *parents, leaf = key.split(".")
    if not equals or not all([*parents, leaf]):
        raise Refusal(f"override {override!r}: must read key.sub=value, for example pruning.sparsity=0.6")
    node = values
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise Refusal(f"override {override!r}: {parent} is a plain value and has no key {leaf}")
    try:
        node[leaf] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise Refusal(f"override {override!r}: the value is not valid YAML") from None


def _explain(error: ValidationError, values: Any) -> str:
    details = error.errors()
    key = _key_path(details[0], values)
    reasons = [_reason(key, detail) for detail in details if _key_path(detail, values) == key]
    others = len(details) - len(reasons)
    return " or ".join(dict.fromkeys(reasons)) + (f" (and {others} more)" if others else "")


def _key_path(detail: Any, values: Any) -> str:
    """The dotted key as the user wrote it: pydantic's location also names the branches of unions."""
    path, node = [], values
    for position, part in enumerate(detail["loc"]):
        known = isinstance(node, dict) and part in node
        if known or (detail["type"] == "missing" and position == len(detail["loc"]) - 1):
            path.append(str(part))
            node = node[part] if known else None
    return ".".join(path)


def _reason(key: str, detail: Any) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        return f"{key}: unknown key; leave it out or see README.md for the keys there are"
    if kind == "missing":
        return f"{key}: missing; it must be given"
    if kind == "union_tag_invalid":
        return f"{key}.name = {context['tag']!r}: unknown; must be one of {context['expected_tags']}"
    if kind == "union_tag_not_found":
        return f"{key}.name: missing; it must be given"
    if isinstance(context.get("error"), Refusal):
        return str(context["error"])
    reason = str(context.get("error", detail["msg"]))
    return f"{key} = {detail['input']!r}: {reason[0].lower()}{reason[1:]}"
