"""The base of all settings: frozen values in which an unknown key is refused."""

import os
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict

from pipeline.storage import is_url, locate


def _local(text: str) -> str:
    if is_url(text):
        raise ValueError("is read from the file system only; copy it there and give its path")
    return _anywhere(text)


def _anywhere(text: str) -> str:
    if not text:
        raise ValueError("is empty; give a path")
    return str(locate(text)) if is_url(text) else os.path.expanduser(text)


# A path as a user writes it, with ~ for the home folder.
UserPath = Annotated[str, AfterValidator(_local)]
# The same, or s3://BUCKET/PREFIX or gs://BUCKET/PREFIX.
UserLocation = Annotated[str, AfterValidator(_anywhere)]


class Settings(BaseModel):
    """Frozen settings; unknown keys and numbers that are none are errors, not silence."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, protected_namespaces=(), allow_inf_nan=False
    )
