"""Undo and redo rotary position embedding.

A pair of coordinates ``(x1, x2)``, half a rotary dimension apart, becomes ``(x1 c - x2 s, x2 c + x1 s)``. The
tables ``c`` and ``s`` are the model's own, rounded to the model's dtype as it rounds them, so undoing divides
by ``c^2 + s^2``: that is 1 up to rounding, or the squared attention scaling of YaRN-like embeddings.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RotaryTables(NamedTuple):
    """Cosines and sines of a list of tokens.

    Attributes
    ----------
    cos, sin
        ``[tokens, 1, rotary_dim // 2]`` float32, broadcast over heads.
    """

    cos: Tensor
    sin: Tensor

    @classmethod
    def from_model(cls, cos: Tensor, sin: Tensor) -> RotaryTables:
        """Build from a model's ``cos`` and ``sin`` ``[1, tokens, rotary_dim]``, whose halves are equal."""
        half = cos.shape[-1] // 2
        return cls(cos[0, :, None, :half].float(), sin[0, :, None, :half].float())

    def to(self, device: torch.device) -> RotaryTables:
        """Return the tables on another device."""
        return RotaryTables(self.cos.to(device), self.sin.to(device))


def rotate(vectors: Tensor, tables: RotaryTables) -> Tensor:
    """Apply rotary embedding in float32.

    Parameters
    ----------
    vectors
        ``[tokens, heads, head_dim]``; dimensions past ``rotary_dim`` are left alone.
    tables
        Tables of the same tokens.

    Returns
    -------
    Tensor
        Same shape, float32.
    """
    return _rotate(vectors, tables.cos, tables.sin)


def unrotate(vectors: Tensor, tables: RotaryTables) -> Tensor:
    """Undo `rotate` with the same tables, in float32."""
    norm = tables.cos.square() + tables.sin.square()
    return _rotate(vectors, tables.cos / norm, -tables.sin / norm)


def _rotate(vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    out = (
        vectors.float().clone() if vectors.shape[-1] > 2 * half else vectors.new_empty(vectors.shape).float()
    )
    first, second = vectors[..., :half].float(), vectors[..., half : 2 * half].float()
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half : 2 * half]).addcmul_(first, sin)
    return out
