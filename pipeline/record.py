"""run.yaml and allocation.json: what a run is, so that the next attempt knows."""

from typing import Any

import yaml
from pydantic import ValidationError

from pipeline.errors import Refusal
from pipeline.files import read_text, write_file
from pipeline.job import Resolved
from pipeline.settings import Settings
from pipeline.sparsity import Pattern
from pipeline.storage import Location
from pipeline.store import RunDirectory


class RunRecord(Settings):
    """What run.yaml holds: the config as given, what `auto` came to, and what the fingerprint was made of."""

    fingerprint: str
    resolved: Resolved
    config: dict[str, Any]
    identity: dict[str, Any]
    source_files: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, output: Location) -> "RunRecord | None":
        """The record in a run directory, None where there is none."""
        file = RunDirectory(output, 0).settings_file
        try:
            return cls.model_validate(yaml.safe_load(read_text(file)))
        except FileNotFoundError:
            return None
        except (UnicodeDecodeError, yaml.YAMLError, ValidationError):
            raise Refusal(f"{file}: is not the record of a run; give another output.path") from None

    def to_yaml(self) -> bytes:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False).encode()


class AllocationRecord(Settings):
    """What allocation.json holds: what was measured of every layer, if anything, and the pattern of every linear."""

    measured: tuple[float, ...]
    layers: list[dict[str, str]]


def read_measured(directory: RunDirectory) -> tuple[float, ...]:
    """What the allocation has measured of every layer, empty if nothing yet."""
    file = directory.allocation_file
    try:
        record = AllocationRecord.model_validate_json(read_text(file))
    except FileNotFoundError:
        return ()
    except (ValidationError, UnicodeDecodeError):
        record = None
    if record is None or len(record.measured) not in (0, directory.num_layers):
        raise Refusal(f"{file}: is damaged; delete it and run again")
    return record.measured


def write_allocation(directory: RunDirectory, measured: tuple[float, ...], patterns: list[dict[str, Pattern]]) -> None:
    layers = [{key: str(pattern) for key, pattern in linears.items()} for linears in patterns]
    record = AllocationRecord(measured=measured, layers=layers)
    write_file(directory.allocation_file, record.model_dump_json(indent=1).encode())
