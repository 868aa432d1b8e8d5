"""Decide once, for the whole model, what a bit is worth: the third stage's water level."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aquakv.codec.entropy import NUM_TABLES, EntropyModel, LevelStatistics, class_spreads, spread_class
from aquakv.config import AllocationConfig, QuantizerConfig
from aquakv.numerics import theta_for, unit_distortions


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
    """

    variances: Tensor
    weight: float
    features: int


@dataclass(frozen=True)
class Plan:
    """Choices that hold for all layers.

    Attributes
    ----------
    theta
        Price of a bit (fixed widths), in units of weighted squared error; None for entropy coding.
    step
        Step at weight 1 (entropy coding); None for fixed widths.
    model
        Levels' statistics (entropy coding).
    """

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
    """Return the price at which the widths of all layers together meet the mean bits."""
    widths, distortions = level_options(allocation, quantizer)
    weighted = [spectrum.variances.cpu() * spectrum.weight for spectrum in spectra]
    bits = allocation.bits * sum(s.features for s in spectra) / sum(len(s.variances) for s in spectra)
    return Plan(theta=theta_for(weighted, widths, distortions, bits))


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
