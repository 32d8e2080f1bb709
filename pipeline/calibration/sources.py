"""The registry of calibration sources."""

from typing import Annotated

from pydantic import Field

from pipeline.calibration.parquet import ParquetSource
from pipeline.calibration.text import TextSource

Source = Annotated[TextSource | ParquetSource, Field(discriminator="name")]
