"""Third stage: how many bits every coefficient gets."""

from __future__ import annotations

from aquakv.config import AllocationConfig


def equal_widths(config: AllocationConfig, features: int, is_first_layer: bool) -> tuple[int, ...]:
    """Return the whole number of bits of each of ``features`` coefficients of one layer's keys or values."""
    return (config.layer_bits(is_first_layer),) * features
