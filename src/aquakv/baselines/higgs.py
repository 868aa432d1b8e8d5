"""HIGGS: a rotation over all heads, then points of a Gaussian grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from aquakv.baselines.base import Baseline, largest_group
from aquakv.baselines.encoded import Encoded, TensorCoder
from aquakv.codec.encoded import EncodedVectors
from aquakv.codec.quantizer import GridQuantizer, build_quantizer
from aquakv.config import QuantizerConfig, WindowConfig
from aquakv.models.adapter import ModelAdapter
from aquakv.numerics.orthogonal import orthogonal_matrix

#: Features of a group in the paper and in AQUA-KV's code.
GROUP = 1024


@dataclass(frozen=True)
class RotatedGrid:
    """Rotates groups of features, over heads, and rounds to the points of a Gaussian grid."""

    heads: int
    head_dim: int
    grid: GridQuantizer

    def encode(self, states: Tensor) -> Encoded:
        """Encode ``[tokens, rows, num_kv_heads, head_dim]`` float32."""
        tokens, rows = states.shape[:2]
        rotation = orthogonal_matrix(self.grid.group_size, states.device)
        groups = states.reshape(tokens * rows, self.grid.groups, self.grid.group_size) @ rotation
        found, _ = self.grid.to(states.device).quantize(groups.flatten(1))
        return Encoded((found.words.view(tokens, rows, -1),), (found.scales.view(tokens, rows, -1),))

    def decode(self, encoded: Encoded) -> Tensor:
        """Return ``[tokens, rows, num_kv_heads, head_dim]`` float32."""
        (words,), (scales,) = encoded.codes, encoded.scales
        rotation = orthogonal_matrix(self.grid.group_size, words.device)
        vectors = self.grid.dequantize(EncodedVectors(words.flatten(0, 1), scales.flatten(0, 1)))
        groups = vectors.view(-1, self.grid.groups, self.grid.group_size) @ rotation.T
        return groups.view(*words.shape[:2], self.heads, self.head_dim)


@dataclass(frozen=True)
class Higgs(Baseline):
    """HIGGS (arXiv:2411.17525) as AQUA-KV's ablation without predictors uses it (arXiv:2501.19392 §4).

    A token's keys before rotary embedding, or values, all heads together, are divided into groups, which are
    rotated, divided by a float16 scale and rounded to an MSE-optimal grid: of pairs at 2 to 4 bits, scalar at
    others. The first 4 tokens stay exact, and up to 127 of the newest, as in AQUA-KV. The published code pads
    to groups of 1024 features; here a group is the largest divisor of their number up to that.
    """

    bits: float = 2

    name: ClassVar[str] = "higgs"
    source: ClassVar[str] = "arXiv:2411.17525"
    pre_rope: ClassVar[bool] = True
    at_once: ClassVar[bool] = False

    @property
    def own_windows(self) -> tuple[WindowConfig, WindowConfig]:
        """AQUA-KV's own."""
        return WindowConfig(), WindowConfig()

    def coders(self, adapter: ModelAdapter, order: int) -> tuple[TensorCoder, TensorCoder]:
        """Return the same coder for keys and values."""
        group = largest_group(adapter.features, GROUP)
        grid = build_quantizer(QuantizerConfig(), adapter.features, group, [int(self.bits)])
        coder = RotatedGrid(adapter.num_kv_heads, adapter.head_dim, grid)
        return coder, coder
