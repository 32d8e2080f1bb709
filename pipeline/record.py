"""run.yaml: what a run is, so that the next attempt knows."""

from typing import Any

import yaml
from pydantic import ValidationError

from pipeline.errors import Refusal
from pipeline.files import read_text
from pipeline.job import Resolved
from pipeline.settings import Settings
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
