"""Find out how attention rotates its keys, by letting it do so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aquakv.models.rotary import LAYOUTS, RotaryLayout, RotaryTables, rotate
from aquakv.models.versions import cache_argument

#: Far enough apart that every pair of coordinates, the slowest too, turns by an angle that can be told.
POSITIONS = (0, 1, 5, 100)


class ProbeError(Exception):
    """Attention does something that a cache cannot undo; the message completes "is not supported: …"."""


@dataclass(frozen=True)
class Findings:
    """What the attention of a model's layers was seen to do.

    Attributes
    ----------
    layout
        How rotated keys are laid out.
    unrotated
        Layers that do not rotate their keys.
    num_kv_heads, head_dim
        Shape of a token's keys and of its values.
    """

    layout: RotaryLayout
    unrotated: frozenset[int]
    num_kv_heads: int
    head_dim: int


class _Recorder:
    """Stands in for a cache and keeps what attention hands to it."""

    def __init__(self) -> None:
        self.held: tuple[Tensor, Tensor] | None = None

    def update(self, keys: Any, values: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
        self.held = keys, values
        return keys, values


def probe(
    layers: Sequence[int],
    attention_of: Callable[[int], AbstractContextManager[nn.Module]],
    device_of: Callable[[int], torch.device],
    hidden_size: int,
    embeddings: Callable[[Tensor, Tensor, int], Any],
) -> Findings:
    """Call each attention on random tokens, with its rotary embedding and with one that turns nothing.

    Parameters
    ----------
    layers
        The compressed layers' indices.
    attention_of
        Gives a layer's attention module, with weights that it can be called with in the context.
    device_of
        Returns where it computes.
    hidden_size
        Width of what they take.
    embeddings
        Returns what a layer gets as ``position_embeddings``, from a tensor whose dtype and device count,
        position ids ``[1, tokens]`` and the layer's index.

    Raises
    ------
    ProbeError
        No rule of ours gives what the modules do.
    """
    candidates, unrotated, shapes = list(LAYOUTS), set[int](), set[tuple[int, int]]()
    generator = torch.Generator().manual_seed(0)
    for index in layers:
        with attention_of(index) as attention:
            weight = next((p for p in attention.parameters() if p.is_floating_point()), None)
            if weight is None:
                raise ProbeError("its attention has no weights")
            device = device_of(index)
            hidden = torch.randn(1, len(POSITIONS), hidden_size, generator=generator)
            hidden = hidden.to(device=device, dtype=weight.dtype)
            positions = torch.tensor([POSITIONS], device=device)
            try:
                cos, sin = embeddings(hidden, positions, index)
            except Exception as error:
                raise ProbeError("its rotary embedding has another form than cosines and sines") from error
            keys, values = _keys_and_values(attention, hidden, positions, (cos, sin))
            still = torch.ones_like(cos), torch.zeros_like(sin)
            plain, _ = _keys_and_values(attention, hidden, positions, still)
        if keys.ndim != 4 or values.ndim != 4 or keys.shape[2] != len(POSITIONS):
            raise ProbeError(f"its attention caches keys as {list(keys.shape)}, expected heads by tokens")
        if keys.shape != values.shape:
            raise ProbeError(
                f"its keys {list(keys.shape[1::2])} and values {list(values.shape[1::2])} differ in shape"
            )
        shapes.add((keys.shape[1], keys.shape[3]))
        if torch.equal(keys.nan_to_num(), plain.nan_to_num()):
            unrotated.add(index)
            continue
        candidates = [layout for layout in candidates if _explains(layout, keys, plain, cos, sin)]
        if not candidates:
            raise ProbeError("its attention does not rotate keys in pairs as the last step before the cache")
    if len(shapes) > 1:
        raise ProbeError(f"its layers' keys differ in shape: {sorted(shapes)}")
    heads, dim = shapes.pop()
    return Findings(candidates[0], frozenset(unrotated), heads, dim)


def _keys_and_values(
    attention: nn.Module, hidden: Tensor, positions: Tensor, embeddings: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    recorder, failure = _Recorder(), None
    try:
        with torch.no_grad():
            attention(
                hidden_states=hidden,
                position_embeddings=embeddings,
                attention_mask=None,
                position_ids=positions,
                **{cache_argument(attention): recorder},
            )
    except Exception as error:  # what comes after the cache does not matter here
        failure = error
    held = recorder.held
    if held is None or not all(isinstance(tensor, Tensor) for tensor in held):
        raise ProbeError("its attention does not hand keys and values to a cache as usual") from failure
    return held


def _explains(layout: RotaryLayout, keys: Tensor, plain: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Tell whether ``keys`` are ``plain``, each ``[1, heads, tokens, head_dim]``, rotated in a layout."""
    tables = RotaryTables.from_model(cos, sin, layout)
    width = 2 * tables.cos.shape[-1]
    if not 0 < width <= keys.shape[-1]:
        return False
    keys, plain = (tensor[0].transpose(0, 1).float() for tensor in (keys, plain))
    ours = rotate(plain, tables)
    # The model rounds two products and their sum to its dtype; a pair is judged by its own size, beside
    # which others may be a thousand times larger.
    first, second = tables.pairs(plain.abs())
    scale = float(tables.cos.abs().max().clamp(min=1))
    allowed = 4 * torch.finfo(cos.dtype).eps * scale * (first + second) + 1e-6
    errors = [(a - b).abs() for a, b in zip(tables.pairs(keys), tables.pairs(ours), strict=True)]
    still = torch.equal(keys[..., width:].nan_to_num(), plain[..., width:].nan_to_num())
    return still and not any(bool((error > allowed).any()) for error in errors)
