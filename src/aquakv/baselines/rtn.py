"""Uniform round-to-nearest, token by token: what one writes first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from aquakv.baselines.base import Baseline, largest_group
from aquakv.baselines.encoded import TensorCoder
from aquakv.baselines.uniform import TokenRounding
from aquakv.models.adapter import ModelAdapter


@dataclass(frozen=True)
class RoundToNearest(Baseline):
    """Asymmetric round-to-nearest of keys after rotary embedding and of values, per token.

    The plain baseline of the field (as in arXiv:2402.02750 §3.1, arXiv:2303.06865 §4.4). Every token is
    encoded as it comes, none stays exact. A step and a zero point in float16 for every `group` neighbouring
    features of a head, or the largest divisor of the head's size below that.
    """

    bits: float = 2
    group: int = 64

    name: ClassVar[str] = "rtn"
    source: ClassVar[str] = "arXiv:2402.02750 §3.1"

    def coders(self, adapter: ModelAdapter, order: int) -> tuple[TensorCoder, TensorCoder]:
        """Return the same coder for keys and values."""
        group = largest_group(adapter.head_dim, self.group)
        coder = TokenRounding(adapter.num_kv_heads, adapter.head_dim, int(self.bits), group)
        return coder, coder
