"""From the calibration settings to windows of token ids."""

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.calibration.parquet import ParquetSource, read_windows
from pipeline.calibration.text import read_documents, tokenize
from pipeline.calibration.windows import Windows, cut_windows
from pipeline.config import CalibrationSettings
from pipeline.errors import Refusal


def prepare_windows(
    settings: CalibrationSettings, tokenizer: PreTrainedTokenizerBase | None, vocabulary_size: int
) -> Windows:
    """The windows that the settings ask for. Raises Refusal where the source cannot give them."""
    source = settings.source
    if isinstance(source, ParquetSource):
        ids_NL = read_windows(source, settings.num_windows, settings.window_length)
        origin = source.path
    else:
        if tokenizer is None:
            raise Refusal(
                "calibration.source.name = 'text': the model has no tokenizer; "
                "give windows of token ids with source.name = 'parquet'"
            )
        bos = _bos_token(settings, tokenizer)
        ids_T = tokenize(read_documents(source.paths), tokenizer)
        ids_NL = cut_windows(ids_T, settings.num_windows, settings.window_length - (bos is not None), settings.seed)
        if bos is not None:
            ids_NL = torch.cat([torch.full((len(ids_NL), 1), bos), ids_NL], dim=1)
        origin = ", ".join(source.paths)
    check_vocabulary(ids_NL, vocabulary_size, origin)
    return Windows(ids_NL, (origin,) * len(ids_NL))


def check_vocabulary(ids: Tensor, vocabulary_size: int, origin: str) -> None:
    """Raises Refusal where a token id is outside the model's vocabulary."""
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or highest >= vocabulary_size:
        wrong = lowest if lowest < 0 else highest
        raise Refusal(
            f"token id {wrong} in {origin}: outside the model's vocabulary of {vocabulary_size}; "
            "give token ids made with this model's tokenizer"
        )


def _bos_token(settings: CalibrationSettings, tokenizer: PreTrainedTokenizerBase) -> int | None:
    if settings.bos is False:
        return None
    bos = tokenizer.bos_token_id
    if settings.bos == "auto":
        return bos if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else None
    if bos is None:
        raise Refusal("calibration.bos = true: the tokenizer has no BOS token; set calibration.bos=false")
    return int(bos)
