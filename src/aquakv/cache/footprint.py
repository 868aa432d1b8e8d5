"""What a cache holds, in bytes taken from its tensors' storages."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aquakv.cache.aqua_layer import AquaLayer
from aquakv.cache.layout import TokenLayout
from aquakv.cache.records import storage_bytes


@dataclass(frozen=True)
class Footprint:
    """Bytes of a cache by part.

    Attributes
    ----------
    code_bytes, scale_bytes
        Codes and scales of the compressed tokens, all layers.
    outlier_bytes
        Compressed tokens that are kept exactly beside their codes, with their indices; counted with the
        compressed region.
    position_bytes
        Position ids of all tokens, where these are in the model's columns once some are evicted, what a
        policy keeps of them, and tables of pages for kernels, with the room that these have for more; counted
        with the compressed region.
    spare_bytes
        Room for more codes and outliers, which steps of one token a row make ahead; part of all that is held,
        but of no compressed value.
    sink_bytes, tail_bytes
        Tokens kept in the model's dtype: sinks, and the newest ones, with the room that a layer has for more.
    other_layer_bytes
        Layers that are not compressed (sliding windows).
    decoded_bytes
        What codes were decoded to, where a cache keeps that.
    latent_bytes
        Latents of compressed tokens, with room for more, where a cache keeps them; part of all that is held,
        but not counted with the compressed region, whose codes they follow from.
    coded_values
        Key and value entries that the compressed region stands for.
    total_values
        Key and value entries of all tokens held at the compressed layers, without padding.
    original_values
        The same with those of evicted tokens and padding.
    exact_cache_bytes
        What an exact cache, from which nothing is evicted, holds at the compressed layers.
    """

    code_bytes: int
    scale_bytes: int
    outlier_bytes: int
    position_bytes: int
    spare_bytes: int
    sink_bytes: int
    tail_bytes: int
    other_layer_bytes: int
    coded_values: int
    total_values: int
    original_values: int
    exact_cache_bytes: int
    decoded_bytes: int = 0
    latent_bytes: int = 0

    @property
    def coded_bytes(self) -> int:
        """Bytes of the compressed region, without room for more."""
        return self.code_bytes + self.scale_bytes + self.outlier_bytes + self.position_bytes

    @property
    def total_bytes(self) -> int:
        """Bytes of everything that the cache holds."""
        return self.held_bytes + self.other_layer_bytes + self.decoded_bytes

    @property
    def held_bytes(self) -> int:
        """Bytes that the compressed layers hold, without what they keep decoded."""
        return self.coded_bytes + self.latent_bytes + self.spare_bytes + self.sink_bytes + self.tail_bytes

    @property
    def bits_per_value(self) -> float | None:
        """Measured bits per value of the compressed region; None while nothing is compressed."""
        return 8 * self.coded_bytes / self.coded_values if self.coded_values else None

    @property
    def bits_per_value_total(self) -> float | None:
        """Measured bits per value of the compressed layers, exact tokens and room included."""
        return 8 * self.held_bytes / self.total_values if self.total_values else None

    @property
    def bits_per_original_value(self) -> float | None:
        """Measured bits, as `bits_per_value_total`, per value of all tokens, evicted ones included."""
        return 8 * self.held_bytes / self.original_values if self.original_values else None

    def to_dict(self) -> dict[str, int | float | None]:
        """Return all figures by name."""
        derived = (
            "coded_bytes",
            "total_bytes",
            "bits_per_value",
            "bits_per_value_total",
            "bits_per_original_value",
        )
        return {**dataclasses.asdict(self), **{name: getattr(self, name) for name in derived}}

    def __str__(self) -> str:
        bits = "nothing compressed yet"
        if self.bits_per_value is not None:
            bits = f"{self.bits_per_value:.3f} bits per value"
        exact_tokens = self.sink_bytes + self.tail_bytes
        latents = f", latents {self.latent_bytes / 2**20:.2f}" if self.latent_bytes else ""
        decoded = f", kept decoded {self.decoded_bytes / 2**20:.2f}" if self.decoded_bytes else ""
        return (
            f"{self.total_bytes / 2**20:.2f} MiB (codes {self.code_bytes / 2**20:.2f}, scales "
            f"{self.scale_bytes / 2**20:.2f}, outliers {self.outlier_bytes / 2**20:.2f}, room for more "
            f"{self.spare_bytes / 2**20:.2f}, exact tokens {exact_tokens / 2**20:.2f}{latents}{decoded}; "
            f"{bits}); an exact cache holds {self.exact_cache_bytes / 2**20:.2f} MiB"
        )


def measure(
    layers: Sequence[Any], layout: TokenLayout, features: int, *, table_bytes: int, latent_bytes: int
) -> Footprint:
    """Return what a cache holds.

    Parameters
    ----------
    layers
        All of the cache's, compressed or not.
    layout
        Its tokens.
    features
        Numbers in a token's keys at one layer.
    table_bytes, latent_bytes
        What it holds beside its layers and positions.
    """
    words = scales = outliers = spare = sinks = tail = other = decoded = itemsize = compressed = 0
    for layer in layers:
        if not isinstance(layer, AquaLayer):
            other += storage_bytes(layer.keys, layer.values)
            continue
        compressed += 1
        codes, layer_scales, layer_outliers, room = layer.pages.footprint()
        words, scales, outliers = words + codes, scales + layer_scales, outliers + layer_outliers
        spare += room
        decoded += layer.pages.decoded_bytes()
        if layer.exact is not None:
            layer_sinks, layer_tail = layer.exact.footprint()
            sinks, tail = sinks + layer_sinks, tail + layer_tail
            itemsize = layer.dtype.itemsize
    per_token = 2 * features * compressed
    original_values = layout.rows * layout.seen * per_token
    return Footprint(
        code_bytes=words,
        scale_bytes=scales,
        outlier_bytes=outliers,
        position_bytes=storage_bytes(layout.positions) + table_bytes,
        spare_bytes=spare,
        sink_bytes=sinks,
        tail_bytes=tail,
        other_layer_bytes=other,
        coded_values=(sum(layout.coded) - layout.fillers()) * per_token,
        total_values=layout.held_tokens() * per_token,
        original_values=original_values,
        exact_cache_bytes=original_values * itemsize,
        decoded_bytes=decoded,
        latent_bytes=latent_bytes,
    )
