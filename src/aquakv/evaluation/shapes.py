"""Models of known shapes with random weights, and codecs for them: memory and time need no more.

What is measured with them says nothing of quality.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from aquakv.calibration import calibrate
from aquakv.codec import ModelCodec, TensorCodec
from aquakv.config import CodecConfig
from aquakv.errors import ConfigError
from aquakv.models.adapter import adapt

#: What precedes a shape's name where a model is asked for.
PREFIX = "shape:"

#: Vocabularies are cut to this: no part of what is measured depends on them.
VOCABULARY = 1024

_LLAMA_3: dict[str, Any] = {
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 1 << 18,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "llama-3.1-8b": {
        **_LLAMA_3,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "head_dim": 128,
    },
    "llama-3.1-70b": {
        **_LLAMA_3,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "head_dim": 128,
    },
    "llama-3.1-405b": {
        **_LLAMA_3,
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
        "head_dim": 128,
    },
    "llama-3.2-1b": {
        **_LLAMA_3,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "head_dim": 64,
    },
}


def shape_config(shape: str, layers: int | None = None, **changes: Any) -> LlamaConfig:
    """Return the configuration of a shape; the arguments are those of `random_model`."""
    if shape not in SHAPES:
        raise ConfigError(f"unknown shape {shape!r}; expected one of: {', '.join(SHAPES)}")
    settings = {**SHAPES[shape], **changes}
    if layers is not None:
        settings["num_hidden_layers"] = layers
    return LlamaConfig(**settings, bos_token_id=None, eos_token_id=None, pad_token_id=None)


def random_model(
    shape: str,
    *,
    layers: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    **changes: Any,
) -> PreTrainedModel:
    """Return a model with random weights, the same at every call.

    Parameters
    ----------
    shape
        One of `SHAPES`.
    layers
        How many layers; all that the shape has if None.
    dtype, device
        Of the weights, which are made there.
    changes
        Further entries of the model's configuration.

    Raises
    ------
    ConfigError
        There is no such shape.
    """
    config = shape_config(shape, layers, **{"vocab_size": VOCABULARY, **changes})
    device = torch.device(device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def random_tokens(model: PreTrainedModel, rows: int, length: int, seed: int = 0) -> Tensor:
    """Return random token ids, ``[rows, length]`` int64 on the CPU."""
    random = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (rows, length), generator=random)


def stand_in_codec(model: PreTrainedModel, config: CodecConfig) -> ModelCodec:
    """Return a codec of the right form for a model from `random_model`.

    Only as many layers are calibrated as differ in form: those whose predictors reach fewer layers back than
    the configuration says, and one more, which then stands for all that follow. With an outlier guard blocks
    have as many outliers as they may have, which is the most that a cache of the codec can hold.
    """
    reach = config.predictor.history if config.predictor.kind == "linear" else 0
    first = _first_layers(model, min(model.config.num_hidden_layers, 1 + reach))
    inputs = 1 + reach * max(len(config.predictor.key_inputs), len(config.predictor.value_inputs))
    length = min(1024, model.config.max_position_embeddings)
    count = 2 + -(-6 * inputs * adapt(model).features // length)
    codec = calibrate(first, random_tokens(model, count, length, seed=1), config)
    layers = [
        replace(layer, keys=_strict(layer.keys), values=_strict(layer.values)) for layer in codec.layers
    ]
    layers += [layers[-1]] * (model.config.num_hidden_layers - len(layers))
    return ModelCodec(codec.config, adapt(model).fingerprint(), tuple(layers))


def _strict(codec: TensorCodec) -> TensorCodec:
    """Return a codec whose guard, if it has one, tolerates no error."""
    if codec.guard is None:
        return codec
    tiny = torch.full_like(codec.guard.limit, torch.finfo(torch.float32).tiny)
    return replace(codec, guard=replace(codec.guard, limit=tiny))


def _first_layers(model: PreTrainedModel, layers: int) -> PreTrainedModel:
    """Return a copy of a model that has fewer layers."""
    settings = {**model.config.to_dict(), "num_hidden_layers": layers}
    first = AutoModelForCausalLM.from_config(type(model.config)(**settings), dtype=model.dtype)
    first = first.to(model.device).eval().requires_grad_(False)
    weights = model.state_dict()
    first.load_state_dict({name: weights[name] for name in first.state_dict()})
    return first
