"""What aquakv needs to know of a transformers model, found by rules rather than by model name."""

from __future__ import annotations

import hashlib
import inspect
import sys
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from aquakv.codec import ModelFingerprint
from aquakv.errors import DataError, UnsupportedModelError
from aquakv.models.rotary import RotaryTables, rotate

#: Rotary types whose tables for a position depend on how long the sequence has become: what was rotated with
#: one table cannot be undone with another.
_CHANGING_ROPE_TYPES = frozenset({"dynamic", "longrope"})


@dataclass(frozen=True)
class ModelAdapter:
    """A decoder-only model seen through the few things that compression depends on.

    Attributes
    ----------
    model
        The causal language model.
    decoder
        Its stack of decoder layers with embedding and final norm.
    config
        The text model's configuration.
    rotary
        The module that turns position ids into cosines and sines.
    compressed_layers
        Indices of the layers with full attention: those are compressed.
    num_kv_heads, head_dim
        Shape of a token's keys at those layers.
    """

    model: PreTrainedModel
    decoder: nn.Module
    config: PreTrainedConfig
    rotary: nn.Module
    compressed_layers: tuple[int, ...]
    num_kv_heads: int
    head_dim: int

    @property
    def name(self) -> str:
        """Transformers' ``model_type``."""
        return str(self.config.model_type)

    @property
    def features(self) -> int:
        """``num_kv_heads * head_dim``."""
        return self.num_kv_heads * self.head_dim

    @property
    def layers(self) -> nn.ModuleList:
        """All decoder layers."""
        layers = self.decoder.layers
        assert isinstance(layers, nn.ModuleList)  # established by `adapt`
        return layers

    @property
    def max_length(self) -> int | None:
        """Longest sequence that the model's configuration allows."""
        return getattr(self.config, "max_position_embeddings", None)

    def require_length(self, seq_len: int) -> None:
        """Raise `DataError` if sequences of ``seq_len`` tokens are longer than the model takes."""
        if self.max_length is not None and seq_len > self.max_length:
            raise DataError(
                f"sequences of {seq_len} tokens are longer than the model's maximum of {self.max_length}; "
                f"use --seq-len {self.max_length} or less"
            )

    @cached_property
    def _rotary_takes_layer_type(self) -> bool:
        return "layer_type" in inspect.signature(type(self.rotary).forward).parameters

    def rotary_tables(
        self, positions: Tensor, layer_idx: int, dtype: torch.dtype, device: torch.device
    ) -> RotaryTables:
        """Return the model's own cosines and sines.

        Parameters
        ----------
        positions
            ``[tokens]`` position ids, any integer dtype.
        layer_idx
            Layer whose rotary embedding is meant (some models have several).
        dtype
            The model's dtype: the tables are rounded to it, as the model does.
        device
            Where the tables are wanted.
        """
        probe = torch.empty(1, 0, dtype=dtype, device=device)
        positions = positions.to(device=device, dtype=torch.long)[None]
        return RotaryTables.from_model(*self.rotary_embeddings(probe, positions, layer_idx))

    def rotary_embeddings(self, like: Tensor, positions: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Return cosines and sines as the model's attention gets them, in dtype and device of ``like``."""
        arguments = [like, positions]
        if self._rotary_takes_layer_type:
            arguments.append(self.config.layer_types[layer_idx])
        return self.rotary.forward(*arguments)  # not __call__: hooks are for the model's own passes

    def exact_layers(self) -> list[Any]:
        """Return fresh transformers cache layers, one for every decoder layer."""
        return list(DynamicCache(config=self.config).layers)

    def fingerprint(self) -> ModelFingerprint:
        """Return what ties a codec to this model."""
        rotary = getattr(self.config, "rope_parameters", None) or {}
        return ModelFingerprint(
            architecture=self.name,
            num_layers=len(self.layers),
            compressed_layers=self.compressed_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            rotary=_plain(rotary),
            layer_hashes=tuple(_layer_hash(self.layers[i]) for i in self.compressed_layers),
        )


def adapt(model: PreTrainedModel) -> ModelAdapter:
    """Look a model over and return its adapter.

    Raises
    ------
    UnsupportedModelError
        The model cannot be compressed correctly; the message names it and says why.
    """
    config = model.config.get_text_config(decoder=True)
    name = config.model_type

    def refuse(reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"model type {name!r} is not supported: {reason}")

    if model.config.is_encoder_decoder:
        raise refuse("it is an encoder-decoder, and aquakv compresses decoder-only models")
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not all(hasattr(layer, "self_attn") for layer in layers):
        raise refuse("expected a stack of decoder layers, each with a self_attn module")
    if getattr(config, "num_kv_shared_layers", 0):
        raise refuse("its layers share keys and values")
    cache_layers = DynamicCache(config=config).layers
    if len(cache_layers) != len(layers):
        raise refuse(f"expected a cache layer for each of {len(layers)} layers, found {len(cache_layers)}")
    for layer in cache_layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise refuse(f"it needs a cache layer of type {type(layer).__name__}")
    compressed = tuple(i for i, layer in enumerate(cache_layers) if type(layer) is DynamicLayer)
    if not compressed:
        raise refuse("all its layers attend through sliding windows, whose caches do not grow")
    if getattr(config, "kv_lora_rank", None) is not None:
        raise refuse("it caches a latent (multi-head latent attention) rather than keys and values")
    rotary = getattr(decoder, "rotary_emb", None)
    if not isinstance(rotary, nn.Module):
        raise refuse("expected rotary position embedding in a module named rotary_emb")
    for rope_type in sorted(_rope_types(getattr(config, "rope_parameters", None))):
        if rope_type in _CHANGING_ROPE_TYPES:
            raise refuse(f"the frequencies of its rotary embedding ({rope_type}) change as a sequence grows")
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    adapter = ModelAdapter(model, decoder, config, rotary, compressed, kv_heads, head_dim)
    _check_rotation(adapter, refuse)
    return adapter


def _check_rotation(adapter: ModelAdapter, refuse: Any) -> None:
    """Compare our rotation with the model's own on random vectors; refuse the model if they differ."""
    layer_idx = adapter.compressed_layers[0]
    attention = adapter.layers[layer_idx].self_attn
    apply = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if apply is None:
        raise refuse("its attention does not apply rotary embedding in the usual way")
    positions = torch.tensor([0, 1, 5, 100])
    tables = adapter.rotary_tables(positions, layer_idx, torch.float32, torch.device("cpu"))
    width = 2 * tables.cos.shape[-1]
    if width > adapter.head_dim:
        raise refuse(f"its rotary embedding is wider ({width}) than its heads ({adapter.head_dim})")
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(1, 1, len(positions), width, generator=generator)
    cos, sin = (torch.cat([table, table], -1)[None, :, 0] for table in tables)
    try:
        theirs = apply(probe, probe, cos, sin)[1][0].transpose(0, 1)
    except (RuntimeError, TypeError) as error:
        raise refuse("its attention applies rotary embedding in another form") from error
    if not torch.allclose(theirs, rotate(probe[0].transpose(0, 1), tables), atol=1e-5):
        raise refuse("its rotary embedding pairs coordinates in another order than half a rotation apart")


def _rope_types(parameters: Any) -> set[str]:
    """Return the rotary types in a configuration's parameters, which may be nested by layer type."""
    if not isinstance(parameters, dict):
        return set()
    nested = {name for value in parameters.values() for name in _rope_types(value)}
    return nested | ({str(parameters["rope_type"])} if "rope_type" in parameters else set())


def _layer_hash(layer: nn.Module) -> str:
    """Hash the layer's smallest weight that tells models apart (a constant one does not)."""
    parameters = sorted(layer.named_parameters(), key=lambda item: (item[1].numel(), item[0]))
    for _, parameter in parameters:
        flat = parameter.detach().flatten()
        if flat.is_floating_point():
            flat = flat.to(torch.bfloat16)
        flat = flat.cpu()
        if flat.numel() > 1 and not bool((flat == flat[0]).all()):
            break
    else:
        return "none"
    return hashlib.sha256(flat.contiguous().view(torch.uint8).numpy().data).hexdigest()[:16]


def _plain(value: Any) -> Any:
    """Return configuration values as JSON has them, so that a round trip through a file changes nothing."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items() if v is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if isinstance(value, (str, int, float, bool)) else str(value)
