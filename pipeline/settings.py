"""The base of all settings: frozen values in which an unknown key is refused."""

import os
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict

from pipeline.storage import is_url, locate, may_hold_secret


def _local(text: str) -> str:
    if is_url(text):
        raise ValueError("is read from the file system only; copy it there and give its path")
    return _anywhere(text)


def _without_secrets(text: str) -> str:
    if may_hold_secret(text):
        raise ValueError("has a URL with a user, a query or a fragment; credentials belong in the environment")
    return text


def _anywhere(text: str) -> str:
    if not text:
        raise ValueError("is empty; give a path")
    return str(locate(text)) if is_url(text) else os.path.expanduser(text)


# A path as a user writes it, with ~ for the home folder.
UserPath = Annotated[str, AfterValidator(_local)]
# The same, or s3://BUCKET/PREFIX or gs://BUCKET/PREFIX.
UserLocation = Annotated[str, AfterValidator(_anywhere)]

# A text that may be a URL, for a library that reads it.
OpenText = Annotated[str, AfterValidator(_without_secrets)]


class Settings(BaseModel):
    """Frozen settings; unknown keys and numbers that are none are errors, not silence."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, protected_namespaces=(), allow_inf_nan=False
    )
