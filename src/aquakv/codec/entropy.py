"""Fourth stage for storage: one uniform step, levels chosen by rate and distortion, range coding.

A coefficient is coded by one symbol, its level, with a table for coefficients of its class. Where the
deviation is more than 8 steps, levels are too many for a table, and their lowest bits as good as evenly
distributed: those go as a second symbol. Deviations up to 1024 steps, some eleven bits of rate, have all
levels that their coefficients can reach.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from aquakv.codec.encoded import EncodedStreams, EncodedVectors
from aquakv.codec.scalar import NOT_FINITE, SCALES, scale_codes
from aquakv.errors import ShapeError
from aquakv.numerics import EntropyCoded, SymbolTables, rans

#: Largest level that a table codes; a symbol is the level plus this.
MAX_LEVEL = 127
ALPHABET = 2 * MAX_LEVEL + 1

#: Coefficients are classed by log2(deviation / step), in quarter octaves from -4 to 10. There are tables up
#: to 3; beyond, each octave more makes one more bit of the level go as a low bit.
CLASSES_PER_OCTAVE = 4
LOWEST_OCTAVE = -4
MOST_LOW_BITS = 7
NUM_TABLES = 7 * CLASSES_PER_OCTAVE + 1
NUM_CLASSES = NUM_TABLES + MOST_LOW_BITS * CLASSES_PER_OCTAVE

#: Tokens per lane: their four scale bytes are the lane's initial state.
LANE_TOKENS = 4


def spread_class(ratio: Tensor) -> Tensor:
    """Return the class, uint8, of coefficients whose deviation is ``ratio`` steps."""
    octaves = ratio.double().clamp(min=1e-30).log2() - LOWEST_OCTAVE
    return (octaves * CLASSES_PER_OCTAVE).round().clamp(0, NUM_CLASSES - 1).to(torch.uint8)


def class_spreads() -> Tensor:
    """Return the nominal deviation of each class in steps, ``[NUM_CLASSES]`` float64."""
    octaves = torch.arange(NUM_CLASSES, dtype=torch.float64) / CLASSES_PER_OCTAVE + LOWEST_OCTAVE
    return torch.exp2(octaves)


def low_bits(classes: Tensor) -> Tensor:
    """Return how many low bits of a level of each class are not coded by a table, int64."""
    beyond = (classes.long() - (NUM_TABLES - 1)).clamp(min=0)
    return (beyond + CLASSES_PER_OCTAVE - 1) // CLASSES_PER_OCTAVE


def table_of(classes: Tensor) -> Tensor:
    """Return the table, int64, that codes what is left of each class's levels."""
    return classes.long() - CLASSES_PER_OCTAVE * low_bits(classes)


def most_levels() -> Tensor:
    """Return the largest level that each table can code, ``[NUM_TABLES]`` int64.

    More than any coefficient of up to 100 can reach: a token's scale is the root mean square of its
    coefficients, so the largest of n is at most √n scales off. With more, the guard has to help.
    """
    return (12 * class_spreads()[:NUM_TABLES] + 4).ceil().clamp(max=MAX_LEVEL).long()


@dataclass(frozen=True)
class EntropyModel:
    """What is known in advance of the levels of all coefficients, by class; shared by all layers.

    Attributes
    ----------
    frequencies
        ``[NUM_TABLES, ALPHABET]`` int32: of the levels ``-MAX_LEVEL … MAX_LEVEL``, out of 2^14, symmetric up
        to rounding.
    points
        ``[NUM_TABLES, MAX_LEVEL + 1]`` float32: what the levels 0, 1, … stand for, in steps.
    tables
        The coder's: those of ``frequencies``, and one for every number of low bits.
    lengths
        ``[NUM_TABLES, MAX_LEVEL + 1]`` float32: code lengths of the levels 0, 1, … in bits, both signs' mean.
    """

    frequencies: Tensor
    points: Tensor
    tables: SymbolTables = field(init=False, repr=False, compare=False)
    lengths: Tensor = field(init=False, repr=False, compare=False)
    _placed: dict[torch.device, EntropyModel] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        shapes = (tuple(self.frequencies.shape), tuple(self.points.shape))
        if shapes != ((NUM_TABLES, ALPHABET), (NUM_TABLES, MAX_LEVEL + 1)):
            raise ShapeError(
                f"entropy model: expected frequencies [{NUM_TABLES}, {ALPHABET}] and points "
                f"[{NUM_TABLES}, {MAX_LEVEL + 1}], got {list(shapes[0])} and {list(shapes[1])}"
            )
        tables = SymbolTables(torch.cat([self.frequencies, _even_frequencies().to(self.frequencies)]))
        object.__setattr__(self, "tables", tables)
        bits = tables.bits[:NUM_TABLES]  # both signs' mean: levels are chosen without regard to sign
        both = 0.5 * (bits[:, MAX_LEVEL:] + bits[:, : MAX_LEVEL + 1].flip(1))
        object.__setattr__(self, "lengths", both)

    @classmethod
    def fit(cls, statistics: LevelStatistics) -> EntropyModel:
        """Fit the model to levels that were seen, with a Laplacian's levels as prior."""
        counts = statistics.counts.cpu()
        sums = statistics.sums.cpu()
        spreads = class_spreads()[:NUM_TABLES]
        levels = torch.arange(MAX_LEVEL + 1, dtype=torch.float64)
        prior = torch.exp(-levels[None] / (0.7 * spreads[:, None]).clamp(min=0.15))
        prior[:, 1:] *= 2
        prior /= prior.sum(1, keepdim=True)
        strength = 32.0
        magnitude = counts + strength * prior
        used = levels[None] <= most_levels()[:, None]
        magnitude = torch.where(used, magnitude, 0.0)
        half = magnitude[:, 1:] / 2
        whole = _smooth(torch.cat([half.flip(1), magnitude[:, :1], half], 1), spreads)
        both = torch.cat([used[:, 1:].flip(1), used], 1)
        tables = SymbolTables.from_probabilities(whole / whole.sum(1, keepdim=True), both)
        points = (sums + 8 * levels[None]) / (counts + 8)
        points[:, 0] = 0
        return cls(tables.frequencies.to(torch.int32), points.float())

    def mean_lengths(self) -> Tensor:
        """Return the mean code length of each class's levels in bits, ``[NUM_CLASSES]`` float64."""
        share = self.frequencies.double() / self.frequencies.sum(1, keepdim=True)
        bits = torch.where(share > 0, -share.clamp(min=1e-12).log2(), 0.0)
        by_table = (share * bits).sum(1).cpu()
        classes = torch.arange(NUM_CLASSES)
        return by_table[table_of(classes)] + low_bits(classes)

    def to(self, device: torch.device | str) -> EntropyModel:
        """Return the model on another device; all users there share it."""
        device = torch.empty(0, device=device).device
        if device == self.frequencies.device:
            return self
        if device not in self._placed:
            self._placed[device] = EntropyModel(self.frequencies.to(device), self.points.to(device))
        return self._placed[device]


def _even_frequencies() -> Tensor:
    """Return the tables of 1, 2, … low bits, ``[MOST_LOW_BITS, ALPHABET]`` int32."""
    symbols = torch.arange(ALPHABET)
    rows = [torch.where(symbols < 1 << bits, rans.TOTAL >> bits, 0) for bits in range(1, MOST_LOW_BITS + 1)]
    return torch.stack(rows).to(torch.int32)


def _smooth(counts: Tensor, spreads: Tensor) -> Tensor:
    """Smooth each class's counts ``[classes, ALPHABET]`` over levels, by a sixth of its spread.

    Wide distributions have more levels than calibration has samples of; their shape is smooth.
    """
    distance = torch.arange(ALPHABET, dtype=torch.float64)
    distance = distance[:, None] - distance[None]
    smoothed = counts.clone()
    for index, spread in enumerate(spreads.tolist()):
        width = spread / 6
        if width < 0.5:
            continue
        kernel = torch.exp(-0.5 * (distance / width).square())
        smoothed[index] = counts[index] @ (kernel / kernel.sum(1, keepdim=True))
    return smoothed


@dataclass
class LevelStatistics:
    """Levels seen so far, by table, both signs together; low bits cut off.

    Attributes
    ----------
    counts, sums
        ``[NUM_TABLES, MAX_LEVEL + 1]`` float64: how often each level came, and the summed magnitudes, in
        steps, of the coefficients that it stood for.
    """

    counts: Tensor
    sums: Tensor

    @classmethod
    def empty(cls, device: torch.device | str) -> LevelStatistics:
        """Return statistics of nothing."""
        shape = (NUM_TABLES, MAX_LEVEL + 1)
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for _ in range(2)))

    def add(self, tables: Tensor, levels: Tensor, magnitudes: Tensor) -> None:
        """Add coefficients: their tables ``[n]``, levels and magnitudes ``[tokens, n]``, both positive."""
        index = (tables.long() * (MAX_LEVEL + 1) + levels.long()).flatten()
        ones = torch.ones((), dtype=torch.float64, device=index.device).expand(index.shape)
        self.counts.view(-1).index_add_(0, index, ones)
        self.sums.view(-1).index_add_(0, index, magnitudes.flatten().double())


@dataclass(frozen=True)
class EntropyQuantizer:
    """Uniform quantisation relative to the token's own scale, then range coding.

    Attributes
    ----------
    deviations
        ``[n]`` float32: calibrated standard deviation of every coefficient; a token's scale is the root mean
        square of its coefficients over these.
    classes
        ``[n]`` uint8, see `spread_class`: how a coefficient's levels are coded.
    step
        ``[1]`` float32: distance of levels at scale 1.
    rate_bits
        ``[1]`` float32: mean bits per token, scale included, on held-out calibration text; for planning only.
    model
        Shared by all layers.
    rate_weight
        Weight of a bit against the squared error, in squared steps.
    low_bits, tables
        ``[n]`` int64: how many low bits each coefficient's levels have, and which table codes the rest.
    symbol_rows
        ``[symbols]`` int32, on the CPU: the coder's table of every symbol of a token, low bits last.
    """

    deviations: Tensor
    classes: Tensor
    step: Tensor
    rate_bits: Tensor
    model: EntropyModel
    rate_weight: float
    low_bits: Tensor = field(init=False, repr=False, compare=False)
    tables: Tensor = field(init=False, repr=False, compare=False)
    symbol_rows: Tensor = field(init=False, repr=False, compare=False)
    _wide: Tensor = field(init=False, repr=False, compare=False)
    _values: dict[torch.dtype, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        bits = low_bits(self.classes)
        wide = bits.nonzero().squeeze(1)
        tables = table_of(self.classes)
        object.__setattr__(self, "low_bits", bits)
        object.__setattr__(self, "tables", tables)
        object.__setattr__(self, "_wide", wide)
        rows = torch.cat([tables, NUM_TABLES - 1 + bits[wide]]).int().cpu()
        object.__setattr__(self, "symbol_rows", rows)

    @property
    def bytes_per_token(self) -> float:
        """Expected bytes for each vector; the true number depends on the vector."""
        return float(self.rate_bits) / 8

    def quantize(self, coefficients: Tensor) -> tuple[EncodedVectors, Tensor]:
        """Quantise coefficients ``[tokens, n]`` float32; return the symbols and what they stand for.

        A token with a coefficient that is not finite comes back as not-a-number.
        """
        if coefficients.ndim != 2 or coefficients.shape[1] != len(self.deviations):
            raise ShapeError(
                f"quantizer: expected [tokens, {len(self.deviations)}], got {list(coefficients.shape)}"
            )
        levels, codes = self.levels(coefficients)
        signed = torch.where(coefficients < 0, -levels, levels)
        symbols = signed + MAX_LEVEL
        if len(self._wide):
            bits = self.low_bits[self._wide]
            shifted = signed[:, self._wide] + (1 << bits >> 1)
            symbols[:, self._wide] = (shifted >> bits) + MAX_LEVEL
            symbols = torch.cat([symbols, shifted & ((1 << bits) - 1)], 1)
        rows = EncodedVectors(symbols.to(torch.uint8), codes)
        return rows, self.dequantize(rows)

    def levels(self, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        """Return levels without sign, ``[tokens, n]`` int64, and scale codes, ``[tokens, 1]`` uint8."""
        codes = scale_codes(coefficients / self.deviations)
        codes = torch.where(codes == NOT_FINITE, codes, codes.clamp(max=NOT_FINITE - 2))
        scales = SCALES.to(coefficients.device)[codes.long()]
        magnitudes = (coefficients.abs() / (scales * self.step)).nan_to_num(0.0)
        points, lengths = self.model.points[self.tables], self.model.lengths[self.tables]
        most = most_levels().to(self.tables.device)[self.tables]
        first = torch.arange(len(self.tables), device=self.tables.device) * (MAX_LEVEL + 1)

        def cost(level: Tensor) -> Tensor:
            index = first + level
            error = magnitudes - points.flatten()[index]
            return error.square_().add_(lengths.flatten()[index], alpha=self.rate_weight)

        below = torch.minimum(magnitudes.clamp(max=MAX_LEVEL).floor().long(), most)
        above = torch.minimum(below + 1, most)
        best, chosen = cost(below), below
        for candidate in (above, torch.zeros_like(below)):
            price = cost(candidate)
            better = price < best
            best, chosen = torch.where(better, price, best), torch.where(better, candidate, chosen)
        if len(self._wide):  # code lengths of neighbouring levels are as good as equal there
            most = most << self.low_bits
            nearest = torch.minimum(
                magnitudes.clamp(max=float(MAX_LEVEL << MOST_LOW_BITS)).round().long(), most
            )
            chosen = torch.where(self.low_bits > 0, nearest, chosen)
        return chosen, codes

    def dequantize(self, rows: EncodedVectors, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the coefficients, ``[tokens, n]`` in ``dtype``, that symbols stand for."""
        n, device = len(self.classes), rows.words.device
        table = self._table(device, dtype)
        first = torch.arange(n, device=device) * ALPHABET
        values = table.index_select(0, (rows.words[:, :n].long() + first).flatten()).view(-1, n)
        if len(self._wide):
            low = rows.words[:, n:].long() - (1 << self.low_bits[self._wide] >> 1)
            values[:, self._wide] += low.to(dtype) * self.step.to(dtype)
        return values * SCALES.to(device)[rows.scales.long()].to(dtype)

    def count(self, rows: EncodedVectors, coefficients: Tensor, statistics: LevelStatistics) -> None:
        """Add coefficients ``[tokens, n]`` and the symbols that code them to statistics."""
        scale = SCALES.to(coefficients.device)[rows.scales.long()] * self.step
        levels = (rows.words[:, : len(self.tables)].long() - MAX_LEVEL).abs()
        statistics.add(self.tables, levels, coefficients.abs() / scale / (1 << self.low_bits))

    def code_bits(self, rows: EncodedVectors) -> float:
        """Return the ideal code length of tokens in bits, scales included."""
        lengths = self.model.tables.bits[self.symbol_rows.long().to(rows.words.device)].flatten()
        first = torch.arange(len(self.symbol_rows), device=lengths.device) * ALPHABET
        index = rows.words.long() + first
        return float(lengths[index].sum(dtype=torch.float64)) + 8.0 * len(index)

    def seal(self, rows: EncodedVectors, block_tokens: int) -> EncodedStreams:
        """Entropy-code whole blocks of tokens, each block for itself."""
        n, lanes = len(self.symbol_rows), -(-block_tokens // LANE_TOKENS)
        blocks = rows.words.shape[0] // block_tokens
        spare = lanes * LANE_TOKENS - block_tokens
        symbols = rows.words.view(blocks, block_tokens, n)
        scales = ((rows.scales.long() + 1) & 255).view(blocks, block_tokens)
        if spare:
            level_zero = [MAX_LEVEL] * len(self.classes) + [0] * len(self._wide)  # and no low bits
            fill = torch.tensor(level_zero, dtype=torch.uint8).to(symbols.device)
            symbols = torch.cat([symbols, fill.expand(blocks, spare, n)], 1)
            scales = torch.nn.functional.pad(scales, (0, spare))
        shifts = 8 * torch.arange(LANE_TOKENS, device=scales.device)
        payload = (scales.view(blocks, lanes, LANE_TOKENS) << shifts).sum(-1)
        coded = rans.encode(
            symbols.reshape(blocks, lanes, LANE_TOKENS * n),
            self.symbol_rows.repeat(LANE_TOKENS),
            self.model.tables,
            payload,
        )
        return EncodedStreams(coded.words, coded.lengths, coded.states)

    def unseal(self, streams: EncodedStreams, block_tokens: int) -> EncodedVectors:
        """Undo `seal`."""
        n, (blocks, lanes) = len(self.symbol_rows), streams.states.shape
        symbols, payload = rans.decode(
            EntropyCoded(*streams), self.symbol_rows.repeat(LANE_TOKENS), self.model.tables
        )
        shifts = 8 * torch.arange(LANE_TOKENS, device=payload.device)
        scales = (((payload[..., None] >> shifts) & 255) + 255) & 255
        scales = scales.view(blocks, lanes * LANE_TOKENS)[:, :block_tokens]
        symbols = symbols.view(blocks, lanes * LANE_TOKENS, n)[:, :block_tokens]
        return EncodedVectors(symbols.reshape(-1, n), scales.reshape(-1, 1).to(torch.uint8))

    def to(self, device: torch.device | str) -> EntropyQuantizer:
        """Return the quantiser on another device."""
        return EntropyQuantizer(
            self.deviations.to(device),
            self.classes.to(device),
            self.step.to(device),
            self.rate_bits.to(device),
            self.model.to(device),
            self.rate_weight,
        )

    def _table(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return what the table's symbol of every coefficient stands for at scale 1, ``[n * ALPHABET]``."""
        if dtype not in self._values or self._values[dtype].device != device:
            exact = torch.arange(MAX_LEVEL + 1, device=self.low_bits.device) << self.low_bits[:, None]
            points = torch.where(self.low_bits[:, None] > 0, exact.float(), self.model.points[self.tables])
            points = points * self.step
            signed = torch.cat([-points[:, 1:].flip(1), points], 1)
            self._values[dtype] = signed.to(device=device, dtype=dtype).flatten()
        return self._values[dtype]
