"""QuaRot: Hadamard rotation, then round-to-nearest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from aquakv.baselines.base import Baseline
from aquakv.baselines.encoded import Encoded, TensorCoder
from aquakv.baselines.uniform import TokenRounding
from aquakv.models.adapter import ModelAdapter
from aquakv.numerics.orthogonal import orthogonal_matrix

#: Part of the range that the paper's cache quantiser keeps (arXiv:2404.00456 §5).
CLIP = 0.95


@dataclass(frozen=True)
class HeadRotation:
    """Rotates every head by a Hadamard matrix before another coder, and back behind it."""

    inner: TokenRounding

    def encode(self, states: Tensor) -> Encoded:
        """Encode ``[tokens, rows, num_kv_heads, head_dim]`` float32."""
        return self.inner.encode(states @ orthogonal_matrix(self.inner.head_dim, states.device))

    def decode(self, encoded: Encoded) -> Tensor:
        """Return ``[tokens, rows, num_kv_heads, head_dim]`` float32."""
        rotated = self.inner.decode(encoded)
        return rotated @ orthogonal_matrix(self.inner.head_dim, rotated.device).T


@dataclass(frozen=True)
class QuaRot(Baseline):
    """QuaRot's KV cache (arXiv:2404.00456 §4.2): each head rotated, then asymmetric round-to-nearest.

    Keys are rotated after rotary embedding, as there. One step and zero point a head and token, range clipped
    to 0.95, every token encoded as it comes. Weights and activations, which the paper quantises too, stay as
    they are. Values are rotated per head (the paper folds that into the projections, which gives the same);
    where no Hadamard matrix of the head's size exists, an orthogonal one with entries of even size serves.
    """

    bits: float = 2

    name: ClassVar[str] = "quarot"
    source: ClassVar[str] = "arXiv:2404.00456"

    def coders(self, adapter: ModelAdapter, order: int) -> tuple[TensorCoder, TensorCoder]:
        """Return the same coder for keys and values."""
        heads, head_dim = adapter.num_kv_heads, adapter.head_dim
        coder = HeadRotation(TokenRounding(heads, head_dim, int(self.bits), head_dim, CLIP))
        return coder, coder
