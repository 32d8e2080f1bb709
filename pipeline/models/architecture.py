"""A model without weights: built from its config on the meta device, and refused where it is not a dense decoder."""

from pathlib import PurePath
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from pipeline.errors import Refusal
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.remote import SMALL_FILES
from pipeline.storage import Location, name_within

# What transformers raises for a config that it cannot read.
_CONFIG_ERRORS = (OSError, ValueError, TypeError, LookupError, AttributeError, ZeroDivisionError, StrictDataclassError)
# What it and torch also raise for one that they cannot make a model of. Only for calls that no code of ours is below.
_MODEL_ERRORS = (*_CONFIG_ERRORS, AssertionError, RuntimeError)
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json", "spiece.model")


def compute_dtype(checkpoint: Checkpoint, asked: str, device: torch.device) -> torch.dtype:
    """The dtype to compute in: `asked`, or the one most weights are stored in; never float16 on a CPU."""
    if asked != "auto":
        dtype = getattr(torch, asked)
        assert isinstance(dtype, torch.dtype)
        if dtype == torch.float16 and device.type == "cpu":
            raise Refusal("model.dtype = 'float16': not computed on a CPU; use float32 or bfloat16")
        return dtype
    num_bytes: dict[torch.dtype, int] = {}
    for entry in checkpoint.entries.values():
        if entry.torch_dtype is not None:
            num_bytes[entry.torch_dtype] = num_bytes.get(entry.torch_dtype, 0) + entry.num_bytes
    stored = max(num_bytes, key=lambda dtype: num_bytes[dtype], default=torch.float32)
    return torch.float32 if stored == torch.float16 and device.type == "cpu" else stored


def build_empty_model(checkpoint: Checkpoint, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """The model with all parameters on the meta device and real buffers.

    Raises Refusal where it needs code or features that a dense decoder-only model does not.
    """
    config = _load_config(checkpoint, trust_remote_code)
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except ImportError as error:
        raise _not_installed(checkpoint.path, error) from None
    except _MODEL_ERRORS as error:
        if "Padding_idx" in str(error):
            # torch does not know what it is called here
            padding = config.get_text_config().pad_token_id
            error = ValueError(f"pad_token_id = {padding} is no token of the vocabulary")
        raise _bad_config(checkpoint.path, error) from None
    _check_sizes(checkpoint.path, model)
    # moving parameters to the meta device one by one has separated the tied ones
    model.tie_weights()
    model.config.use_cache = False
    return model.eval().requires_grad_(False)


def find_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """The name and the list of the decoder layers: the list as long as the config says."""
    num_layers = model.config.get_text_config().num_hidden_layers
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == num_layers]
    if not found:
        raise Refusal(f"model {type(model).__name__}: has no list of {num_layers} decoder layers; it is not supported")
    return min(found, key=lambda named: named[0].count("."))


def name_tensors(checkpoint: Checkpoint, model: Any) -> dict[str, str]:
    """Checkpoint key to the name in the model, by the rules that transformers itself loads with."""
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    state = model.state_dict(keep_vars=True)
    names = {}
    for key in checkpoint.entries:
        name, converted = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if converted is not None and name in state and name != key:
            raise Refusal(f"tensor {key}: is fused with others into {name} on loading, which is not supported yet")
        names[key] = name
    return names


def load_tokenizer(
    checkpoint: Checkpoint, vocabulary_size: int, trust_remote_code: bool
) -> PreTrainedTokenizerBase | None:
    """The checkpoint's tokenizer, None where it has none. Raises Refusal for a tokenizer of another model."""
    if not any((checkpoint.folder / name).exists() for name in _TOKENIZER_FILES):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise Refusal(f"tokenizer of {checkpoint.path}: cannot be loaded ({reason}); put a sound one there") from None
    # models pad their vocabulary to a round number, by a few entries in a hundred at the most
    if not 0.9 * vocabulary_size <= len(tokenizer) <= vocabulary_size:
        raise Refusal(
            f"tokenizer of {checkpoint.path}: has {len(tokenizer)} entries, the model's vocabulary {vocabulary_size}; "
            "put the tokenizer of this model there, or give windows of token ids"
        )
    return tokenizer


def text_tokens(checkpoint: Checkpoint, skeleton: Any) -> tuple[int | None, tuple[int, ...]]:
    """What begins and what ends a text: the ids in generation_config.json, else in config.json.

    Raises Refusal where one is no token of the model.
    """
    file = checkpoint.folder / "generation_config.json"
    try:
        generation = GenerationConfig.from_pretrained(checkpoint.folder) if file.is_file() else None
    except _CONFIG_ERRORS as error:
        raise Refusal(f"{file}: is not valid ({' '.join(str(error).split())[:200]}); copy it again") from None
    config, found = skeleton.model.config.get_text_config(), []
    for name in ("bos_token_id", "eos_token_id"):
        known = getattr(generation, name, None)
        known = getattr(config, name, None) if known is None else known
        ids = known if isinstance(known, list | tuple) else () if known is None else (known,)
        for token in ids:
            if type(token) is not int or not 0 <= token < skeleton.vocabulary_size:
                raise Refusal(
                    f"model {checkpoint.path}: {name} = {known!r} is no token of the vocabulary of "
                    f"{skeleton.vocabulary_size}; correct it in generation_config.json or config.json"
                )
        found.append(tuple(ids))
    return next(iter(found[0]), None), found[1]


def copied_files(path: Location) -> list[PurePath]:
    """The names of what a finished model carries over beside its weights: config, tokenizer, remote code, licence."""
    files = [file for file in path.rglob("*") if SMALL_FILES.fullmatch(file.name) and file.is_file()]
    names = [name_within(file, path) for file in files if not file.name.endswith(".index.json")]
    return sorted(name for name in names if not any(part[0] == "." for part in name.parts))


def _check_sizes(path: Location, model: Any) -> None:
    """What could be built, but not run. Raises Refusal."""
    for name, parameter in model.named_parameters():
        if parameter.numel() == 0:
            shape = tuple(parameter.shape)
            raise Refusal(f"model {path}: config.json gives {name} the shape {shape}; correct the size that is 0")
    config = model.config.get_text_config()
    heads, shared = (getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    # some families have a list of them
    if isinstance(heads, int) and isinstance(shared, int) and shared > 0 and heads % shared:
        raise Refusal(
            f"model {path}: config.json says num_key_value_heads = {shared}, which does not divide "
            f"num_attention_heads = {heads}; correct it"
        )


def _bad_config(path: Location, error: Exception) -> Refusal:
    reason = " ".join(str(error).split())[:200]
    return Refusal(f"model {path}: config.json is not valid ({type(error).__name__}: {reason}); correct it")


def _not_installed(path: Location, error: ImportError) -> Refusal:
    reason = " ".join(str(error).split())[:200]
    return Refusal(f"model {path}: config.json asks for what is not installed ({reason}); install it or change that")


def _load_config(checkpoint: Checkpoint, trust_remote_code: bool) -> Any:
    raw, path = checkpoint.config, checkpoint.path
    model_type = raw.get("model_type")
    if "quantization_config" in raw:
        raise Refusal(f"model {path}: is already quantised; give the unquantised checkpoint")
    if model_type not in CONFIG_MAPPING:
        if "auto_map" not in raw:
            raise Refusal(f"model {path}: model_type {model_type!r} is unknown to transformers; give a supported model")
        if not trust_remote_code:
            raise Refusal(f"model {path}: runs its own remote code; set model.trust_remote_code=true if you trust it")
    try:
        config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=trust_remote_code)
    except ImportError as error:
        raise _not_installed(path, error) from None
    except _CONFIG_ERRORS as error:
        raise _bad_config(path, error) from None
    if config.get_text_config().num_hidden_layers < 1:
        raise Refusal(f"model {path}: config.json says num_hidden_layers < 1; give a model with decoder layers")
    if any((getattr(config.get_text_config(), key, None) or 0) > 1 for key in _EXPERT_KEYS):
        raise Refusal(f"model {path}: is a mixture of experts, which is not supported yet; give a dense model")
    is_causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in raw.get("auto_map", {})
    if getattr(config, "is_encoder_decoder", False) or not is_causal:
        raise Refusal(f"model {path}: model_type {model_type!r} is not a decoder-only language model; give one that is")
    return config
