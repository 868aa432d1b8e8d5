"""Outliers that many layers take out of blocks at once, and a layer's outliers by row.

What the host has to know of all layers it reads in one go, and what it makes of that for all layers it sends
in one go: it never waits for one layer after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Taken:
    """Which tokens of the same blocks layers have taken out, as the host knows it.

    Attributes
    ----------
    counts
        How many each layer has.
    tokens
        ``[n]`` int64 on the CPU: number of the token in the blocks, layer by layer, rising.
    """

    counts: list[int]
    tokens: Tensor

    @classmethod
    def read(cls, taken: Tensor) -> Taken:
        """Read them off a device, ``[layers, tokens]`` bool; waits for it, once."""
        layers, tokens = taken.cpu().nonzero(as_tuple=True)
        return cls(torch.bincount(layers, minlength=len(taken)).tolist(), tokens)

    @property
    def layers(self) -> Tensor:
        """``[n]`` int64 on the CPU: the layer of each."""
        counts = torch.tensor(self.counts, device=_CPU)
        return torch.arange(len(counts), device=_CPU).repeat_interleave(counts)


@dataclass
class OutlierRows:
    """A layer's outliers by row.

    Attributes
    ----------
    source
        Their index in the layer's records, to know them by, with room for more.
    index
        ``[rows, most]`` int64: which of the layer's outliers; None for a single row, which has them all.
    present
        ``[rows, most]`` bool: whether there is such an outlier.
    count
        How many there are in all. They are only ever added behind the others.
    totals
        ``[rows]`` int64 on the CPU: how many each row has, once the host has asked.
    """

    source: Tensor
    index: Tensor | None
    present: Tensor
    count: int
    totals: Tensor | None = None

    def fits(self, source: Tensor, shape: tuple[int, int]) -> bool:
        """Tell whether outliers out of ``source`` can be held in place, ``[rows, most]`` of them."""
        return source is self.source and tuple(self.present.shape) == shape

    def renew(self, other: OutlierRows) -> None:
        """Hold what another does, in place."""
        if self.index is not None and other.index is not None:
            self.index.copy_(other.index)
        self.present.copy_(other.present)
        self.count, self.totals = other.count, other.totals

    @staticmethod
    def extend(
        held: Sequence[OutlierRows], taken: Taken, block_rows: Sequence[int], block_tokens: int
    ) -> None:
        """Add the outliers that layers have taken out of new blocks, in place.

        Parameters
        ----------
        held
            Of each layer, all on one device; there is room.
        taken
            The outliers, already in the records.
        block_rows
            Row of each of the new blocks, rising.
        block_tokens
            Tokens of a block.
        """
        before = [one.count for one in held]
        for one, new in zip(held, taken.counts, strict=True):
            if one.index is None and new:
                one.present.narrow(1, one.count, new).fill_(True)
            one.count += new
        if held[0].index is None or not len(taken.tokens):
            return
        rows, layers = len(held[0].present), taken.layers
        row = torch.tensor(block_rows, device=_CPU)[taken.tokens // block_tokens]
        # Of all layers' rows, one behind the other: how many are new, and which of these each is.
        whose = layers * rows + row
        new = torch.bincount(whose, minlength=len(held) * rows)
        order = torch.arange(len(whose), device=_CPU)
        number = order - (new.cumsum(0) - new)[whose]
        totals = _totals(held)
        widths = torch.tensor([one.present.shape[1] for one in held], device=_CPU)
        place = row * widths[layers] + totals.flatten()[whose] + number
        counts = torch.tensor([before, [0, *taken.counts[:-1]]], device=_CPU)
        first = counts[0] - counts[1].cumsum(0)
        which = order + first[layers]
        places, outliers = torch.stack([place, which]).to(held[0].present.device, non_blocking=True)
        parts = zip(held, places.split(taken.counts), outliers.split(taken.counts), strict=True)
        for one, own, outlier in parts:
            if one.index is not None and len(own):
                one.index.view(-1).index_copy_(0, own, outlier)
                one.present.view(-1).index_fill_(0, own, True)
        for one, total in zip(held, totals + new.view(len(held), rows), strict=True):
            one.totals = total

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those that kernels read."""
        return self.present, *(() if self.index is None else (self.index,))


def _totals(held: Sequence[OutlierRows]) -> Tensor:
    """Return how many outliers each row has at each layer, ``[layers, rows]`` on the CPU.

    Waits for the device if the host does not know it of some layer.
    """
    if any(one.totals is None for one in held):
        found = torch.stack([one.present.sum(1) for one in held]).cpu()
        for one, totals in zip(held, found, strict=True):
            one.totals = totals
    return torch.stack([one.totals for one in held if one.totals is not None])
