"""The base of all settings: frozen values in which an unknown key is refused."""

import os
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict

# A path as a user writes it, with ~ for the home folder.
UserPath = Annotated[str, AfterValidator(os.path.expanduser)]


class Settings(BaseModel):
    """Frozen settings; unknown keys and numbers that are none are errors, not silence."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, protected_namespaces=(), allow_inf_nan=False
    )
