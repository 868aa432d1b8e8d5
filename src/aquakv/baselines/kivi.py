"""KIVI: keys per channel, values per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from aquakv.baselines.base import Baseline, largest_group
from aquakv.baselines.encoded import TensorCoder
from aquakv.baselines.uniform import ChannelRounding, TokenRounding
from aquakv.config import WindowConfig
from aquakv.errors import ConfigError
from aquakv.models.adapter import ModelAdapter


@dataclass(frozen=True)
class Kivi(Baseline):
    """KIVI (arXiv:2402.02750, algorithm 1): asymmetric rounding, keys per channel, values per token.

    Keys (after rotary embedding) are rounded in groups of `group` successive tokens of a channel, once
    `residual` tokens have gathered; values in groups of `group` channels of a token, once `residual` newer
    tokens stand behind it. Attention in the pass that rounds tokens still sees them exactly, as in the
    authors' code. There are no sinks. Where `group` does not divide the head's size, values take the largest
    divisor below it; the paper's models know no such sizes.
    """

    bits: float = 2
    group: int = 32
    residual: int = 128

    name: ClassVar[str] = "kivi"
    source: ClassVar[str] = "arXiv:2402.02750"
    at_once: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group < 1 or self.residual < self.group or self.residual % self.group:
            raise ConfigError(
                "baseline kivi: expected a residual window of whole groups, got "
                f"residual {self.residual} and group {self.group}"
            )
        if self.window is not None and self.window.block_tokens % self.group:
            raise ConfigError(
                f"baseline kivi: expected a window with blocks of whole groups of {self.group} tokens, got "
                f"{self.window.block_tokens}"
            )

    @property
    def own_windows(self) -> tuple[WindowConfig, WindowConfig]:
        """Keys leave their window together, values one by one."""
        return WindowConfig(0, 0, self.residual), WindowConfig(0, self.residual, 1)

    def coders(self, adapter: ModelAdapter, order: int) -> tuple[TensorCoder, TensorCoder]:
        """Return the coders of keys and of values."""
        heads, head_dim, width = adapter.num_kv_heads, adapter.head_dim, int(self.bits)
        return (
            ChannelRounding(heads, head_dim, width, self.group),
            TokenRounding(heads, head_dim, width, largest_group(head_dim, self.group)),
        )
