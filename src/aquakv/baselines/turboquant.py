"""TurboQuant: a random rotation, then the best scalar quantiser for what comes out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from aquakv.baselines.base import Baseline
from aquakv.baselines.encoded import Encoded, TensorCoder
from aquakv.baselines.lloyd_max import sphere_levels
from aquakv.models.adapter import ModelAdapter
from aquakv.numerics.packing import pack, unpack

_MOST = 65504.0


@lru_cache(maxsize=16)
def random_rotation(dim: int) -> Tensor:
    """Return a random rotation ``[dim, dim]`` float32: Q of a Gaussian matrix, always the same one."""
    gaussian = torch.randn(dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q, r = torch.linalg.qr(gaussian)
    return (q * r.diagonal().sign()).float()  # without the signs Q would not be uniform


@lru_cache(maxsize=16)
def sketch_matrix(dim: int) -> Tensor:
    """Return the Gaussian matrix ``[dim, dim]`` float32 of the sketch, always the same one."""
    return torch.randn(dim, dim, generator=torch.Generator().manual_seed(1))


def _norms(vectors: Tensor) -> Tensor:
    return vectors.norm(dim=-1, keepdim=True).clamp(max=_MOST).half()


@dataclass(frozen=True)
class RotatedLloydMax:
    """A float16 norm a head, and Lloyd–Max codes of the rotated direction.

    Attributes
    ----------
    heads, head_dim
        Shape of a token.
    width
        Bits of a code.
    sketch
        Whether the signs of a Gaussian sketch of what the codes leave are kept too, with its norm.
    """

    heads: int
    head_dim: int
    width: int
    sketch: bool = False

    def encode(self, states: Tensor) -> Encoded:
        """Encode ``[tokens, rows, num_kv_heads, head_dim]`` float32."""
        norms = _norms(states)
        codes: tuple[Tensor, ...] = ()
        scales: tuple[Tensor, ...] = (norms[..., 0],)
        if self.width:
            wide = norms.float()
            unit = states / torch.where(wide == 0, 1.0, wide) * math.sqrt(self.head_dim)
            levels = sphere_levels(self.head_dim, self.width).to(states.device)
            borders = (levels[1:] + levels[:-1]) / 2
            rotated = unit @ random_rotation(self.head_dim).to(states.device)
            found = torch.bucketize(rotated, borders)
            codes = (pack(found.flatten(2), self.width),)
        if self.sketch:
            left = states - self._levels_of(codes, norms)
            signs = (left @ sketch_matrix(self.head_dim).to(states.device).T) >= 0
            codes += (pack(signs.to(torch.uint8).flatten(2), 1),)
            scales += (_norms(left)[..., 0],)
        return Encoded(codes, scales)

    def decode(self, encoded: Encoded) -> Tensor:
        """Return ``[tokens, rows, num_kv_heads, head_dim]`` float32."""
        states = self._levels_of(encoded.codes, encoded.scales[0][..., None])
        if not self.sketch:
            return states
        signs = unpack(encoded.codes[-1], 1, self.heads * self.head_dim).view(states.shape).float() * 2 - 1
        length = encoded.scales[1][..., None].float()
        return states + math.sqrt(math.pi / 2) / self.head_dim * length * (
            signs @ sketch_matrix(self.head_dim).to(states.device)
        )

    def _levels_of(self, codes: tuple[Tensor, ...], norms: Tensor) -> Tensor:
        """Return what norms ``[tokens, rows, heads, 1]`` and codes alone say, float32."""
        if not self.width:
            return norms.new_zeros(*norms.shape[:-1], self.head_dim, dtype=torch.float32)
        found = unpack(codes[0], self.width, self.heads * self.head_dim).long()
        levels = sphere_levels(self.head_dim, self.width).to(norms.device) / math.sqrt(self.head_dim)
        unit = levels[found].view(*norms.shape[:-1], self.head_dim)
        return unit @ random_rotation(self.head_dim).to(norms.device).T * norms.float()


@dataclass(frozen=True)
class TurboQuant(Baseline):
    """TurboQuant for mean squared error (arXiv:2504.19874, algorithm 1), keys and values alike.

    Each head's vector is stored as a norm and the rotated direction's codes; keys after rotary embedding,
    every token as it comes, as in the paper's experiments. Their fractional rates, in which some outlier
    channels get a bit more than the others, are left out.
    """

    bits: float = 2

    name: ClassVar[str] = "turboquant"
    source: ClassVar[str] = "arXiv:2504.19874"

    def coders(self, adapter: ModelAdapter, order: int) -> tuple[TensorCoder, TensorCoder]:
        """Return the same coder for keys and values."""
        coder = RotatedLloydMax(adapter.num_kv_heads, adapter.head_dim, int(self.bits))
        return coder, coder


@dataclass(frozen=True)
class TurboQuantSketch(Baseline):
    """TurboQuant for inner products (arXiv:2504.19874, algorithm 2) on keys.

    One of a key's bits is the sign of a Gaussian sketch of what the others leave, which makes its inner
    products right in the mean. Values, which are averaged rather than multiplied with, are stored as by
    `TurboQuant`; the paper does not say which of its two algorithms values get.
    """

    bits: float = 2

    name: ClassVar[str] = "turboquant-sketch"
    source: ClassVar[str] = "arXiv:2504.19874"

    def coders(self, adapter: ModelAdapter, order: int) -> tuple[TensorCoder, TensorCoder]:
        """Return the coders of keys and of values."""
        heads, head_dim, width = adapter.num_kv_heads, adapter.head_dim, int(self.bits)
        return RotatedLloydMax(heads, head_dim, width - 1, True), RotatedLloydMax(heads, head_dim, width)
