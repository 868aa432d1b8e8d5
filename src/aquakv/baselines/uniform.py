"""Asymmetric round-to-nearest: the quantiser that several competitors share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aquakv.baselines.encoded import Encoded
from aquakv.numerics.packing import pack, unpack

_MOST = 65504.0


def quantize(groups: Tensor, width: int, clip: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Round groups to equally spaced levels between their least and their greatest value.

    Parameters
    ----------
    groups
        ``[…, group]`` float32.
    width
        Bits of a code.
    clip
        Below 1, which part of the range, zero included, the levels span: 0.95 takes a twentieth off each end.

    Returns
    -------
    codes, steps, zeros
        ``[…, group]`` uint8, and twice ``[…, 1]`` float16: a code stands for ``zero + code * step``. Codes
        are chosen for the rounded steps and zeros, those that are stored.
    """
    low, high = (bound.clamp(-_MOST, _MOST) for bound in groups.aminmax(dim=-1, keepdim=True))
    if clip < 1:
        low, high = low.clamp(max=0) * clip, high.clamp(min=0) * clip
    zeros = low.half()
    steps = ((high - zeros.float()) / ((1 << width) - 1)).clamp(0, _MOST).half()
    wide = steps.float()
    codes = ((groups - zeros.float()) / torch.where(wide == 0, 1.0, wide)).round()
    return codes.clamp(0, (1 << width) - 1).to(torch.uint8), steps, zeros


def dequantize(codes: Tensor, steps: Tensor, zeros: Tensor) -> Tensor:
    """Return what `quantize`'s codes stand for, float32."""
    return codes.float() * steps.float() + zeros.float()


@dataclass(frozen=True)
class TokenRounding:
    """Rounds groups of neighbouring features of each token and head.

    Attributes
    ----------
    heads, head_dim
        Shape of a token.
    width
        Bits of a code.
    group
        Features that share a step and a zero point, a divisor of ``head_dim``.
    clip
        Which part of the range is kept.
    """

    heads: int
    head_dim: int
    width: int
    group: int
    clip: float = 1.0

    def encode(self, states: Tensor) -> Encoded:
        """Encode ``[tokens, rows, num_kv_heads, head_dim]`` float32."""
        tokens, rows = states.shape[:2]
        codes, steps, zeros = quantize(states.reshape(tokens, rows, -1, self.group), self.width, self.clip)
        return Encoded((pack(codes.flatten(2), self.width),), (steps[..., 0], zeros[..., 0]))

    def decode(self, encoded: Encoded) -> Tensor:
        """Return ``[tokens, rows, num_kv_heads, head_dim]`` float32."""
        (words,), (steps, zeros) = encoded.codes, encoded.scales
        codes = unpack(words, self.width, self.heads * self.head_dim)
        groups = codes.view(*codes.shape[:2], -1, self.group)
        states = dequantize(groups, steps[..., None], zeros[..., None])
        return states.view(*codes.shape[:2], self.heads, self.head_dim)


@dataclass(frozen=True)
class ChannelRounding:
    """Rounds groups of successive tokens of each channel.

    Attributes
    ----------
    heads, head_dim
        Shape of a token.
    width
        Bits of a code.
    group
        Tokens that share a step and a zero point; runs have a multiple of that.
    """

    heads: int
    head_dim: int
    width: int
    group: int

    def encode(self, states: Tensor) -> Encoded:
        """Encode ``[tokens, rows, num_kv_heads, head_dim]`` float32, tokens a multiple of ``group``."""
        tokens, rows = states.shape[:2]
        groups = states.view(tokens // self.group, self.group, rows, -1).permute(0, 2, 3, 1)
        codes, steps, zeros = quantize(groups, self.width)
        return Encoded((pack(codes.flatten(2), self.width),), (steps[..., 0], zeros[..., 0]))

    def decode(self, encoded: Encoded) -> Tensor:
        """Return ``[tokens, rows, num_kv_heads, head_dim]`` float32."""
        (words,), (steps, zeros) = encoded.codes, encoded.scales
        units, rows = words.shape[:2]
        codes = unpack(words, self.width, self.heads * self.head_dim * self.group)
        groups = codes.view(units, rows, -1, self.group)
        states = dequantize(groups, steps[..., None], zeros[..., None])
        return states.permute(0, 3, 1, 2).reshape(units * self.group, rows, self.heads, self.head_dim)
