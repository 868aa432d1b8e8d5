"""Undo and redo rotary position embedding.

A pair of coordinates ``(x1, x2)`` becomes ``(x1 c - x2 s, x2 c + x1 s)``. Which coordinates are a pair
depends on the model: those half a rotary dimension apart, or neighbours (interleaved). The tables ``c`` and
``s`` are the model's own, rounded to the model's dtype as it rounds them, so undoing divides by
``c^2 + s^2``: that is 1 up to rounding, or the squared attention scaling of YaRN-like embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class RotaryLayout:
    """How a model lays out what it rotates.

    Attributes
    ----------
    interleaved
        Whether pairs are neighbours; otherwise they are half a rotary dimension apart.
    tables
        How often the model's tables hold the number of each pair: ``once``; ``halves``: twice, the second
        half repeating the first; ``neighbours``: twice, side by side.
    """

    interleaved: bool = False
    tables: Literal["once", "halves", "neighbours"] = "halves"

    def of_pairs(self, table: Tensor) -> Tensor:
        """Return one number for each pair, ``[…, pairs]``, of a model's table ``[…, width]``."""
        if self.tables == "neighbours":
            return table[..., ::2]
        return table if self.tables == "once" else table[..., : table.shape[-1] // 2]


#: All that are tried, the most usual first.
LAYOUTS = (
    RotaryLayout(),
    RotaryLayout(tables="once"),
    RotaryLayout(interleaved=True),
    RotaryLayout(interleaved=True, tables="neighbours"),
    RotaryLayout(interleaved=True, tables="once"),
)


class RotaryTables(NamedTuple):
    """Cosines and sines of a list of tokens.

    Attributes
    ----------
    cos, sin
        ``[tokens, 1, rotary_dim // 2]`` float32, broadcast over heads.
    interleaved
        Whether pairs are neighbours; otherwise they are half a rotary dimension apart.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = False

    @classmethod
    def from_model(cls, cos: Tensor, sin: Tensor, layout: RotaryLayout = LAYOUTS[0]) -> RotaryTables:
        """Build from a model's ``cos`` and ``sin``, each ``[1, tokens, width]`` as the layout has them."""
        cos, sin = (layout.of_pairs(table)[0, :, None].float() for table in (cos, sin))
        return cls(cos, sin, layout.interleaved)

    def to(self, device: torch.device) -> RotaryTables:
        """Return the tables on another device."""
        return self._replace(cos=self.cos.to(device), sin=self.sin.to(device))

    def inverse(self) -> RotaryTables:
        """Return tables by which `rotate` undoes what it does by these."""
        norm = self.cos.square() + self.sin.square()
        return self._replace(cos=self.cos / norm, sin=-self.sin / norm)

    def turning_nothing(self) -> RotaryTables:
        """Return tables of the same tokens that leave every vector as it is."""
        return self._replace(cos=torch.ones_like(self.cos), sin=torch.zeros_like(self.sin))

    def pairs(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Return views of the first and the second coordinate of every pair, ``[…, rotary_dim // 2]``."""
        half = self.cos.shape[-1]
        if self.interleaved:
            return vectors[..., 0 : 2 * half : 2], vectors[..., 1 : 2 * half : 2]
        return vectors[..., :half], vectors[..., half : 2 * half]


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
    half = tables.cos.shape[-1]
    whole = vectors.shape[-1] == 2 * half
    made = {"dtype": torch.float32, "device": vectors.device}
    out = torch.empty(vectors.shape, **made) if whole else vectors.to(**made, copy=True)
    first, second = tables.pairs(vectors)
    out_first, out_second = tables.pairs(out)
    torch.mul(first, tables.cos, out=out_first).addcmul_(second, tables.sin, value=-1)
    torch.mul(second, tables.cos, out=out_second).addcmul_(first, tables.sin)
    return out


def unrotate(vectors: Tensor, tables: RotaryTables) -> Tensor:
    """Undo `rotate` with the same tables, in float32."""
    return rotate(vectors, tables.inverse())
