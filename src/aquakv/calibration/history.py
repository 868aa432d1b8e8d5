"""Moments of what predictors read, kept from layer to layer: each pair of inputs is multiplied once only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from aquakv.calibration.group import Group
from aquakv.calibration.walk import Batches
from aquakv.numerics import StreamingMoments
from aquakv.numerics.moments import tensor_core_products, true_float32_products


@dataclass(frozen=True)
class Source:
    """Batches of vectors ``[sequences, tokens, width]`` and their mean ``[width]`` over fitted sequences."""

    name: str
    batches: Batches
    mean: Tensor


@dataclass
class InputMoments:
    """Second moments among sources, and of sources with targets.

    Attributes
    ----------
    fitted
        For every batch, how many of its first sequences count.
    device
        Where the arithmetic runs.
    sources
        What is known so far, by name.
    group
        The processes whose batches count together.
    scatter
        Centred products ``[width, width]`` float64 of every two sources, by both names.
    meanwhile
        Called between batches.
    """

    fitted: Sequence[int]
    device: torch.device
    group: Group = field(default_factory=Group)
    sources: dict[str, Source] = field(default_factory=dict)
    scatter: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    meanwhile: Callable[[], None] = lambda: None

    def rows(self, batches: Batches, number: int) -> Tensor:
        """Return a batch's fitted rows ``[rows, width]`` in float32 on the device."""
        return batches[number][: self.fitted[number]].to(self.device).flatten(0, 1).float()

    def mean(self, batches: Batches) -> tuple[Tensor, int]:
        """Return the mean ``[width]`` float64 over the fitted rows, and how many there are."""
        total = torch.zeros(batches[0].shape[-1], dtype=torch.float64, device=self.device)
        count = 0
        for number in range(len(batches)):
            rows = self.rows(batches, number)
            total += rows.sum(0, dtype=torch.float64)
            count += len(rows)
            self.meanwhile()
        total = self.group.add(total)
        count = int(self.group.add_numbers(count)[0])
        return total / max(count, 1), count

    def add(self, name: str, batches: Batches) -> None:
        """Add a source; its products with all sources so far are formed now."""
        source = Source(name, batches, self.mean(batches)[0])
        self.sources[name] = source
        others = list(self.sources.values())
        products = self._products(source, others)
        for other, product in zip(others, products, strict=True):
            self.scatter[name, other.name] = product
            self.scatter[other.name, name] = product.T

    def keep(self, names: Sequence[str]) -> None:
        """Forget all sources but these."""
        self.sources = {name: source for name, source in self.sources.items() if name in names}
        self.scatter = {
            pair: product for pair, product in self.scatter.items() if set(pair) <= set(self.sources)
        }

    def regression(self, names: Sequence[str], targets: Batches) -> StreamingMoments:
        """Return the moments of the named sources side by side (x) and of targets (y)."""
        mean, count = self.mean(targets)
        target = Source("", targets, mean)
        chosen = [self.sources[name] for name in names]
        products = self._products(target, [*chosen, target])
        empty = mean.new_zeros(0, len(mean))
        cross = torch.cat([empty, *(product.T for product in products[:-1])])
        rows = [torch.cat([self.scatter[a, b] for b in names], 1) for a in names]
        scatter = torch.cat(rows) if rows else mean.new_zeros(0, 0)
        mean_x = torch.cat([mean.new_zeros(0), *(source.mean for source in chosen)])
        return StreamingMoments.of_parts(count, mean_x, mean, scatter, cross, products[-1])

    def residual_covariance(
        self, names: Sequence[str], targets: Batches, factors: Sequence[Tensor], mean: Tensor, count: int
    ) -> Tensor:
        """Return the covariance of what a linear map leaves of targets, ``[width, width]`` float64.

        Both sides are centred. Products are formed of the residuals themselves: what follows from the moments
        of `regression` by subtraction has errors of the size of the targets' rounding, and where little is
        left of these it is not even positive.

        Parameters
        ----------
        names
            The sources that the map reads, side by side.
        targets
            Batches ``[sequences, tokens, width]``.
        factors
            Matrices in any float dtype, whose product ``[inputs, width]`` is the map.
        mean, count
            Of the targets, as `mean` and `regression` return them.
        """
        target = Source("", targets, mean)
        chosen = [self.sources[name] for name in names]
        maps = [factor.to(device=self.device, dtype=torch.float32) for factor in factors]
        total = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=self.device)
        for number, fitted in enumerate(self.fitted):
            if fitted:
                parts = [self._centred(source, number) for source in (target, *chosen)]
                for rows, *inputs in zip(*(part.split(_CHUNK_ROWS) for part in parts), strict=True):
                    with true_float32_products():
                        predicted = torch.cat(inputs, 1)
                        for factor in maps:
                            predicted = predicted @ factor
                    residual = rows - predicted
                    with tensor_core_products():
                        total += (residual.T @ residual).double()
            self.meanwhile()
        return self.group.add(total) / max(count, 1)

    def _products(self, first: Source, others: Sequence[Source]) -> list[Tensor]:
        """Return the centred ``firstᵀ other`` of every other source, float64."""
        widths = [len(other.mean) for other in others]
        total = torch.zeros(len(first.mean), sum(widths), dtype=torch.float64, device=self.device)
        for number, fitted in enumerate(self.fitted):
            if fitted:
                rows = self._centred(first, number)
                partners = [rows if other is first else self._centred(other, number) for other in others]
                with tensor_core_products():  # what is done meanwhile has its own precision
                    for parts in zip(*(t.split(_CHUNK_ROWS) for t in (rows, *partners)), strict=True):
                        total += (parts[0].T @ torch.cat(parts[1:], 1)).double()
            self.meanwhile()
        return list(self.group.add(total).split(widths, 1))

    def _centred(self, source: Source, number: int) -> Tensor:
        return self.rows(source.batches, number) - source.mean.float()


#: Rows whose products are summed in float32 before they go into float64 sums.
_CHUNK_ROWS = 4096
