"""The 8-bit floating-point cache that serving engines ship."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from aquakv.baselines.base import Baseline
from aquakv.baselines.encoded import Encoded, TensorCoder
from aquakv.models.adapter import ModelAdapter

#: Largest value of the format: greater ones saturate.
_MOST = 448.0


class Float8Cast:
    """Casts to float8 e4m3."""

    def encode(self, states: Tensor) -> Encoded:
        """Encode ``[tokens, rows, num_kv_heads, head_dim]`` float32."""
        # As bytes: rows of float8 tensors cannot be selected on every device.
        return Encoded((states.clamp(-_MOST, _MOST).to(torch.float8_e4m3fn).view(torch.uint8),))

    def decode(self, encoded: Encoded) -> Tensor:
        """Return ``[tokens, rows, num_kv_heads, head_dim]`` float32."""
        return encoded.codes[0].view(torch.float8_e4m3fn).float()


@dataclass(frozen=True)
class Float8(Baseline):
    """FP8 (arXiv:2209.05433), format e4m3 with scale 1, as serving engines do by default.

    Every token is cast as it comes, keys after rotary embedding; beyond ±448 values saturate. Calibrated
    scales, which engines offer besides, are left out.
    """

    bits: float = 8

    name: ClassVar[str] = "fp8"
    source: ClassVar[str] = "arXiv:2209.05433"
    choices: ClassVar[tuple[float, ...]] = (8,)
    default_bits: ClassVar[float] = 8

    def coders(self, adapter: ModelAdapter, order: int) -> tuple[TensorCoder, TensorCoder]:
        """Return the same coder for keys and values."""
        coder = Float8Cast()
        return coder, coder
