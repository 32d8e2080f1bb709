"""The registry of calibration sources."""

from typing import Annotated

from pydantic import Field

from pipeline.calibration.mix import MixSource, SingleSource

Source = Annotated[SingleSource | MixSource, Field(discriminator="name")]
