"""What caches hold, summed over an evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from aquakv.cache import Footprint


@dataclass
class Held:
    """Bytes that caches hold and values that these stand for, summed over caches.

    Attributes
    ----------
    coded_bytes, coded_values
        Bytes of the compressed region and the values that it stands for.
    held_bytes, held_values
        The same with all exact tokens and positions; what a cache would hold by the single-pass protocol,
        which holds none.
    """

    coded_bytes: int = 0
    coded_values: int = 0
    held_bytes: int = 0
    held_values: int = 0

    @property
    def bits_per_value(self) -> float | None:
        """Measured bits per value of the compressed region; None if nothing was compressed."""
        return 8 * self.coded_bytes / self.coded_values if self.coded_values else None

    @property
    def bits_per_value_total(self) -> float | None:
        """Measured bits per value, exact tokens included; None for the exact cache."""
        return 8 * self.held_bytes / self.held_values if self.held_values else None

    def count(self, footprint: Footprint) -> None:
        """Add what a cache holds."""
        self.coded_bytes += footprint.coded_bytes if footprint.coded_values else 0
        self.coded_values += footprint.coded_values
        self.held_bytes += footprint.held_bytes
        self.held_values += footprint.total_values
