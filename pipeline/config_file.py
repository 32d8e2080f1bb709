"""From a YAML file and dotted overrides to settings, or to one sentence about what is wrong with them."""

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from pipeline.config import RunConfig
from pipeline.errors import Refusal
from pipeline.settings import Settings
from pipeline.storage import concealed

S = TypeVar("S", bound=Settings)


def load_config(path: Path, overrides: list[str]) -> RunConfig:
    """The config in a YAML file, with `key.sub=value` overrides. Raises Refusal."""
    return validate(RunConfig, _read_yaml(path), overrides)


def read_values(path: Path, overrides: list[str]) -> dict[str, Any]:
    """The same before it is validated: values as the user wrote them, which may be wrong. Raises Refusal."""
    values = _read_yaml(path)
    for override in overrides:
        _apply(values, override)
    return values


def validate(kind: type[S], values: dict[str, Any], overrides: list[str]) -> S:
    """Settings from plain values and overrides, of which `key=@FILE` takes its value from a YAML file.

    Raises Refusal that tells the first mistake in one sentence.
    """
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
    except (yaml.YAMLError, ValueError) as error:
        raise Refusal(f"config {path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise Refusal(f"config {path}: must be a mapping of keys to values")
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
    if text.startswith("@"):
        node[leaf] = _read_yaml(Path(text[1:]))
        return
    try:
        node[leaf] = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        raise Refusal(f"override {override!r}: the value is not valid YAML") from None


def _explain(error: ValidationError, values: Any) -> str:
    details = error.errors()
    key = _key_path(details[0], values)
    reasons = [_reason(key, detail) for detail in details if _key_path(detail, values) == key]
    others = len(details) - len(reasons)
    return " or ".join(dict.fromkeys(reasons)) + (f" (and {others} more)" if others else "")


def _key_path(detail: Any, values: Any) -> str:
    """The dotted key as the user wrote it: pydantic's location also names the branches of unions."""
    path: list[str] = []
    node = values
    for position, part in enumerate(detail["loc"]):
        if isinstance(node, list | tuple) and isinstance(part, int) and part < len(node):
            path[-1] += f"[{part}]"
            node = node[part]
            continue
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
    return f"{key} = {concealed(repr(detail['input']))}: {reason[0].lower()}{reason[1:]}"
