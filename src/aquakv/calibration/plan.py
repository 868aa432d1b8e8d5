"""Decide once, for the whole model, what a bit is worth: the third stage's water level."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aquakv.codec.entropy import NUM_TABLES, EntropyModel, LevelStatistics, class_spreads, spread_class
from aquakv.config import AllocationConfig, QuantizerConfig
from aquakv.numerics import plane_gains, theta_for, unit_distortions
from aquakv.numerics.pages import FIELD_COLUMNS, PAGE_TOKENS, PLANE_BYTES, TAIL_BYTES


@dataclass(frozen=True)
class Spectrum:
    """What allocation needs to know of one layer's keys or values.

    Attributes
    ----------
    variances
        ``[coefficients]`` float64: of the coefficients, in the metric's norm.
    weight
        Harm of a unit of that error, relative to other layers and to values against keys.
    features
        Values that the coefficients stand for; bits are counted by these.
    groups
        ``[coefficients]`` int64: coefficients of one number can share a field; None if all can.
    """

    variances: Tensor
    weight: float
    features: int
    groups: Tensor | None = None

    @property
    def fields(self) -> list[Tensor]:
        """The coefficients, int64 indices, of every field of up to 16 of one group, in falling variance."""
        order = self.variances.argsort(descending=True, stable=True)
        groups = torch.zeros_like(order) if self.groups is None else self.groups[order]
        return [
            field
            for group in groups.unique().tolist()
            for field in order[groups == group].split(FIELD_COLUMNS)
        ]

    @property
    def energies(self) -> Tensor:
        """``[fields]`` float64: each field's summed variances, times the weight."""
        return self.weight * torch.stack([self.variances[field].sum() for field in self.fields])


@dataclass(frozen=True)
class Plan:
    """Choices that hold for all layers.

    Attributes
    ----------
    planes
        Byte planes of every layer's keys and values in turn (fixed widths shared by a field).
    theta
        Price of a bit (fixed widths of every coefficient), in units of weighted squared error.
    step
        Step at weight 1 (entropy coding).
    model
        Levels' statistics (entropy coding).
    """

    planes: tuple[int, ...] | None = None
    theta: float | None = None
    step: float | None = None
    model: EntropyModel | None = None


def level_options(
    allocation: AllocationConfig, quantizer: QuantizerConfig
) -> tuple[list[int], dict[int, float]]:
    """Return the widths that a coefficient can have, 0 first, and each one's distortion at unit variance."""
    widths = [0, *allocation.widths]
    return widths, unit_distortions(widths, quantizer.arithmetic)


def first_model(quantizer: QuantizerConfig) -> EntropyModel:
    """Return a model of levels before any were seen: those of Laplacians."""
    generator = torch.Generator().manual_seed(0)
    statistics = LevelStatistics.empty("cpu")
    uniform = torch.rand(4096, 1, generator=generator, dtype=torch.float64)
    magnitudes = -uniform.log() / math.sqrt(2) * class_spreads()[:NUM_TABLES]
    # The dead zone that a rate term makes is half a step wide and then some.
    levels = (magnitudes + 0.5 - min(0.25, quantizer.rate_weight)).floor().clamp(max=127)
    statistics.add(torch.arange(NUM_TABLES), levels, magnitudes)
    return EntropyModel.fit(statistics)


def fixed_rate_plan(
    spectra: Sequence[Spectrum], allocation: AllocationConfig, quantizer: QuantizerConfig
) -> Plan:
    """Return the plan by which the widths of all layers together meet the mean bits.

    Levels by arithmetic are for pages: a field of coefficients shares a width, and what pages hold beside
    codes counts.
    """
    if quantizer.arithmetic:
        return Plan(planes=plane_plan(spectra, allocation))
    widths, distortions = level_options(allocation, quantizer)
    weighted = [spectrum.variances.cpu() * spectrum.weight for spectrum in spectra]
    bits = allocation.bits * sum(s.features for s in spectra) / sum(len(s.variances) for s in spectra)
    return Plan(theta=theta_for(weighted, widths, distortions, bits))


def plane_plan(spectra: Sequence[Spectrum], allocation: AllocationConfig) -> tuple[int, ...]:
    """Return how many byte planes each tensor gets: one after the other to whichever gains most by it.

    At least one plane in all, otherwise as many as keep records within the mean bits.
    """
    beside = 8 * TAIL_BYTES * len(spectra)
    asked = allocation.bits * PAGE_TOKENS * sum(spectrum.features for spectrum in spectra)
    # A mean such as 2.3 is no exact number: it must still buy the planes that it stands for.
    planes = max(1, math.floor((asked - beside) / (8 * PLANE_BYTES) * (1 + 1e-12)))
    options = level_options(allocation, QuantizerConfig(kind="scalar"))
    gains = [plane_gains(spectrum.energies, *options) for spectrum in spectra]
    owner = torch.arange(len(gains)).repeat_interleave(torch.tensor([len(part) for part in gains]))
    pooled = torch.cat(gains)
    bought = pooled.argsort(descending=True, stable=True)[:planes]
    bought = bought[pooled[bought] > 0]
    return tuple(torch.bincount(owner[bought], minlength=len(gains)).tolist())


def entropy_plan(spectra: Sequence[Spectrum], model: EntropyModel, bits: float) -> Plan:
    """Return the step at which the code lengths of all layers together meet the mean bits."""
    rates = model.mean_lengths()
    low, high = -60.0, 60.0
    for _ in range(60):
        middle = (low + high) / 2
        step = math.exp(middle)
        total = count = 0.0
        for spectrum in spectra:
            ratio = spectrum.variances.cpu().sqrt() * math.sqrt(spectrum.weight) / step
            total += expected_bits(ratio, rates)
            count += spectrum.features
        low, high = (middle, high) if total > bits * count else (low, middle)
    return Plan(step=math.exp(high), model=model)


def expected_bits(ratio: Tensor, rates: Tensor) -> float:
    """Return the expected code length of a token's coefficients with deviations of ``ratio`` steps."""
    coded = ratio > SMALLEST_RATIO
    beyond = (ratio / class_spreads()[-1]).clamp(min=1).log2()
    return float((rates[spread_class(ratio).long()] + beyond)[coded].sum())


#: Coefficients whose deviation is below this many steps are not coded: their levels would be 0 but for one in
#: hundreds, and knowing so costs more than it gives.
SMALLEST_RATIO = 0.18
