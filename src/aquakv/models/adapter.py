"""What aquakv needs to know of a transformers model, found by rules rather than by model name."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from aquakv.codec import ModelFingerprint
from aquakv.codec.fingerprint import sample_text
from aquakv.errors import DataError, UnsupportedModelError
from aquakv.models.placement import callable_alone, execution_device, name_of, weight_of
from aquakv.models.probe import Findings, ProbeError, probe
from aquakv.models.rotary import LAYOUTS, RotaryLayout, RotaryTables
from aquakv.models.versions import fresh_layers
from aquakv.models.weights import ALWAYS_THERE, LayerWeights, find_decoder

#: Rotary types whose frequencies change when a sequence outgrows a length: what was rotated with one table
#: cannot be undone with another.
_CHANGING_ROPE_TYPES = frozenset({"dynamic", "longrope"})

#: What probing a model found: its modules do not change.
_found: WeakKeyDictionary[PreTrainedModel, Findings] = WeakKeyDictionary()


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
    layout
        How keys are rotated there.
    unrotated
        Those of them that do not rotate keys.
    weights
        Where its weights are.
    """

    model: PreTrainedModel
    decoder: nn.Module
    config: PreTrainedConfig
    rotary: nn.Module
    compressed_layers: tuple[int, ...]
    num_kv_heads: int
    head_dim: int
    layout: RotaryLayout = LAYOUTS[0]
    unrotated: frozenset[int] = frozenset()
    weights: LayerWeights = ALWAYS_THERE

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
    def device(self) -> torch.device:
        """Where token ids go."""
        if self.weights.device is not None:
            return self.weights.device
        return execution_device(self.model, self.model.get_input_embeddings()) or self.layer_device(0)

    def attention(self, layer_idx: int) -> AbstractContextManager[Any]:
        """Have a layer's attention module ready to be called by itself, with inputs on `layer_device`.

        Hooks on the model are seen to, not `weights`.
        """
        return callable_alone(self.model, f"{self.layer_name(layer_idx)}.self_attn")

    @contextmanager
    def _probed_attention(self, layer_idx: int) -> Iterator[nn.Module]:
        """Have an attention module that can be called to see what it does, though not with what weights."""
        with self.attention(layer_idx) as module, self.weights.probed(layer_idx, module):
            yield module

    def layer(self, layer_idx: int) -> AbstractContextManager[nn.Module]:
        """Have a decoder layer ready to be called by itself, likewise with hidden states."""
        return callable_alone(self.model, self.layer_name(layer_idx))

    def part(self, module: nn.Module) -> AbstractContextManager[nn.Module]:
        """Have any other module of the model ready to be called by itself, likewise."""
        return callable_alone(self.model, name_of(self.model, module))

    @cached_property
    def _decoder_name(self) -> str:
        return name_of(self.model, self.decoder)

    def layer_name(self, layer_idx: int) -> str:
        """Return what a decoder layer is called in the model."""
        return f"{self._decoder_name}.layers.{layer_idx}".lstrip(".")

    def layer_device(self, layer_idx: int) -> torch.device:
        """Return where a layer's keys and values are made."""
        if self.weights.device is not None:
            return self.weights.device
        device = execution_device(self.model, self.layers[layer_idx].get_submodule("self_attn"))
        assert device is not None  # `adapt` has seen to it
        return device

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

    @cached_property
    def changing_rope_type(self) -> str | None:
        """The rotary type whose frequencies change as sequences grow; None if they never do."""
        types = _rope_types(getattr(self.config, "rope_parameters", None))
        return next(iter(sorted(types & _CHANGING_ROPE_TYPES)), None)

    @property
    def rotates_by_halves(self) -> bool:
        """Whether all compressed layers rotate their keys, in pairs half a rotary dimension apart."""
        return not self.unrotated and not self.layout.interleaved

    def rotary_kind(self, layer_idx: int) -> str:
        """Return what layers have in common whose `rotary_tables` of the same tokens are the same."""
        if layer_idx in self.unrotated:
            return "none"
        return self.config.layer_types[layer_idx] if self._rotary_takes_layer_type else "all"

    def frequencies(self, position_ids: Tensor) -> int:
        """Return a number that tells a forward pass's rotary frequencies from others'.

        Parameters
        ----------
        position_ids
            ``[rows, tokens]`` of the pass. Their values are read (which waits for their device) only where
            frequencies change.
        """
        if self.changing_rope_type is None:
            return 0
        longest = int(position_ids.max()) + 1
        if self.changing_rope_type == "longrope":
            return int(longest > self.config.rope_parameters["original_max_position_embeddings"])
        original: Any = self.rotary.original_max_seq_len
        return 0 if longest < original else longest

    def rotary_tables(
        self, positions: Tensor, layer_idx: int, dtype: torch.dtype, device: torch.device
    ) -> RotaryTables:
        """Return the model's own cosines and sines, with the frequencies of its last forward pass.

        Parameters
        ----------
        positions
            ``[tokens]`` position ids, any integer dtype.
        layer_idx
            Layer whose rotary embedding is meant (some models have several, and layers without).
        dtype
            The model's dtype: the tables are rounded to it, as the model does.
        device
            Where the tables are wanted.
        """
        like = torch.empty(1, 0, dtype=dtype, device=device)
        positions = positions.to(device=device, dtype=torch.long)[None]
        tables = RotaryTables.from_model(*self.rotary_embeddings(like, positions, layer_idx), self.layout)
        return tables.turning_nothing() if layer_idx in self.unrotated else tables

    def rotary_embeddings(self, like: Tensor, positions: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Return cosines and sines as the model's attention gets them, in dtype and device of ``like``."""
        # Layers elsewhere get them from where they are made: another device's might differ by rounding.
        home = execution_device(self.model, self.rotary) or like.device
        arguments: list[Any] = [like.to(home), positions.to(home)]
        if self._rotary_takes_layer_type:
            arguments.append(self.config.layer_types[layer_idx])
        if self.changing_rope_type is None:
            # Not __call__: our own hooks are for the model's own passes.
            cos, sin = self.rotary.forward(*arguments)
        else:
            # What wraps it would change the frequencies, for the model's next passes too.
            cos, sin = inspect.unwrap(type(self.rotary).forward)(self.rotary, *arguments)
        return cos.to(like.device), sin.to(like.device)

    def exact_layers(self) -> list[Any]:
        """Return fresh transformers cache layers, one for every decoder layer."""
        return fresh_layers(self.config)

    def layer_identity(self, layer_idx: int) -> str:
        """Return hash and sample of a layer's weights, with a space between.

        Of weights that come and go it is noted when first asked for.
        """
        noted = self.weights.identities
        if noted is not None and layer_idx in noted:
            return noted[layer_idx]
        with self.weights.holding(layer_idx):
            found = " ".join(_identity(self.model, self.layer_name(layer_idx), layer_idx))
        if noted is not None:
            noted[layer_idx] = found
        return found

    def fingerprint(self, identities: bool = True) -> ModelFingerprint:
        """Return what ties a codec to this model; without ``identities`` what can be told without weights."""
        rotary = getattr(self.config, "rope_parameters", None) or {}
        layers = self.compressed_layers if identities else ()
        found = [self.layer_identity(index).split(" ") for index in layers]
        return ModelFingerprint(
            architecture=self.name,
            num_layers=len(self.layers),
            compressed_layers=self.compressed_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            rotary=_plain(rotary),
            layer_hashes=tuple(hash_ for hash_, _ in found),
            layer_samples=tuple(sample for _, sample in found),
        )


def adapt(model: PreTrainedModel, weights: LayerWeights = ALWAYS_THERE) -> ModelAdapter:
    """Look a model over and return its adapter.

    ``weights`` tells where its weights are.

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
    if getattr(config, "kv_lora_rank", None) is not None:
        raise refuse("it caches a latent (multi-head latent attention) rather than keys and values")
    if getattr(config, "num_kv_shared_layers", 0):
        raise refuse("its layers share keys and values")
    cache_layers = DynamicCache(config=config).layers
    for layer in cache_layers:
        if "LinearAttention" in type(layer).__name__:
            raise refuse("it has layers of linear attention or state spaces, which keep no keys and values")
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise refuse(f"it needs a cache layer of type {type(layer).__name__}")
    decoder = find_decoder(model)
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not all(hasattr(layer, "self_attn") for layer in layers):
        raise refuse("expected a stack of decoder layers, each with a self_attn module")
    if len(cache_layers) != len(layers):
        raise refuse(f"expected a cache layer for each of {len(layers)} layers, found {len(cache_layers)}")
    compressed = tuple(i for i, layer in enumerate(cache_layers) if type(layer) is DynamicLayer)
    if not compressed:
        raise refuse("all its layers attend through sliding windows, whose caches do not grow")
    rotary = getattr(decoder, "rotary_emb", None)
    if not isinstance(rotary, nn.Module):
        raise refuse("expected rotary position embedding in a module named rotary_emb")
    parameters: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    homes = [execution_device(model, layer.get_submodule("self_attn")) for layer in layers]
    if None in homes and weights.device is None:
        raise refuse(
            f"the weights of layer {homes.index(None)} are on no device, and no hook of accelerate's loads "
            "them"
        )
    kinds = sorted({home.type for home in homes if home is not None})
    if len(kinds) > 1:
        raise refuse(f"its layers compute on devices of different kinds ({', '.join(kinds)})")
    changing = sorted(_rope_types(parameters) & _CHANGING_ROPE_TYPES)
    if changing and "rope_type" not in parameters:
        raise refuse(f"it has several rotary embeddings, and the frequencies of one ({changing[0]}) change")
    found = _found.get(model)
    if found is None:
        unknown = ModelAdapter(model, decoder, config, rotary, compressed, 0, 0, weights=weights)
        try:
            found = probe(
                compressed,
                unknown._probed_attention,
                unknown.layer_device,
                config.hidden_size,
                unknown.rotary_embeddings,
            )
        except ProbeError as error:
            raise refuse(str(error)) from error
        _found[model] = found
    return ModelAdapter(
        model,
        decoder,
        config,
        rotary,
        compressed,
        found.num_kv_heads,
        found.head_dim,
        found.layout,
        found.unrotated,
        weights,
    )


def _rope_types(parameters: Any) -> set[str]:
    """Return the rotary types in a configuration's parameters, which may be nested by layer type."""
    if not isinstance(parameters, dict):
        return set()
    nested = {name for value in parameters.values() for name in _rope_types(value)}
    return nested | ({str(parameters["rope_type"])} if "rope_type" in parameters else set())


def _identity(model: nn.Module, layer: str, layer_idx: int) -> tuple[str, str]:
    """Return hash and sample of a layer's smallest weight that tells models apart (a constant one does not).

    ``layer`` is its name in the model.
    """
    parameters = model.get_submodule(layer).named_parameters()
    for _, name in sorted((parameter.numel(), name) for name, parameter in parameters):
        with weight_of(model, f"{layer}.{name}") as weight:
            if weight is None:
                raise UnsupportedModelError(
                    f"the weight {name} of layer {layer_idx} is on no device, and no hook of accelerate's "
                    "loads it; load the model with from_pretrained"
                )
            flat = weight.flatten()
            rounded = (flat.to(torch.bfloat16) if flat.is_floating_point() else flat).cpu()
            if rounded.numel() > 1 and not bool((rounded == rounded[0]).all()):
                digest = hashlib.sha256(rounded.contiguous().view(torch.uint8).numpy().data).hexdigest()
                return digest[:16], sample_text(flat)
    return "none", ""


def _plain(value: Any) -> Any:
    """Return configuration values as JSON has them, so that a round trip through a file changes nothing."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items() if v is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if isinstance(value, (str, int, float, bool)) else str(value)
