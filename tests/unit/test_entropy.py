import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aquakv.calibration.plan import first_model
from aquakv.codec import EncodedStreams, EncodedVectors, EntropyModel, EntropyQuantizer
from aquakv.codec.encoded import concatenate
from aquakv.codec.entropy import (
    ALPHABET,
    MAX_LEVEL,
    NUM_CLASSES,
    NUM_TABLES,
    LevelStatistics,
    class_spreads,
    low_bits,
    most_levels,
    spread_class,
    table_of,
)
from aquakv.codec.scalar import NOT_FINITE
from aquakv.config import QuantizerConfig
from aquakv.errors import ShapeError

MODEL = first_model(QuantizerConfig(kind="entropy"))
RATIOS = (90.0, 9.0, 3.0, 1.0, 0.5, 0.2)  # the first two have low bits: 4 and 1


def build(ratios=RATIOS, rate_weight=0.1, step=0.37, model=MODEL):
    ratios = torch.tensor(ratios)
    one = torch.ones(1)
    return EntropyQuantizer(ratios * step, spread_class(ratios), step * one, one, model, rate_weight)


def laplacian(quantizer, tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(tokens, len(quantizer.classes), generator=generator) - 0.5
    unit = -uniform.sign() * (1 - 2 * uniform.abs()).clamp(min=1e-7).log() / math.sqrt(2)
    return unit * quantizer.deviations


def ideal_bits(quantizer, rows):
    """Return the symbols' code lengths and a byte for each token's scale."""
    tables = quantizer.model.tables.bits[quantizer.symbol_rows.long()]
    symbols = tables.gather(1, rows.words.long().T)
    return float(symbols.double().sum()) + 8 * len(rows.words)


# --- quantisation -----------------------------------------------------------------------------------------


def test_classes_are_quarter_octaves():
    assert spread_class(class_spreads()).tolist() == list(range(NUM_CLASSES))
    assert spread_class(torch.tensor([0.0, 1e-9, 1.0, 1.05, 1.1, 1e9])).tolist() == [0, 0, 16, 16, 17, 56]
    assert most_levels().max() <= MAX_LEVEL
    assert (most_levels() >= 12 * class_spreads()[:NUM_TABLES]).all()


def test_wide_classes_leave_low_bits_to_a_second_symbol():
    classes = torch.arange(NUM_CLASSES)
    assert low_bits(classes).tolist() == [0] * NUM_TABLES + [k for k in range(1, 8) for _ in range(4)]
    left = class_spreads() / 2.0 ** low_bits(classes)
    assert torch.equal(spread_class(left), table_of(classes).to(torch.uint8))
    assert left.max() == 8
    rows = build().symbol_rows
    assert rows.tolist() == [26, 25, 22, 16, 12, 7, NUM_TABLES + 3, NUM_TABLES]
    even = MODEL.tables.frequencies[NUM_TABLES:]
    assert even.count_nonzero(1).tolist() == [2, 4, 8, 16, 32, 64, 128]
    assert (even.sum(1) == 1 << 14).all()


@pytest.mark.parametrize("ratio", [7.0, 9.0, 20.0, 100.0, 1000.0])
def test_no_level_is_out_of_reach(ratio):
    quantizer = build([ratio] * 12, rate_weight=0.0, step=1.0)
    # A coefficient at most √12 of the token's scale off: one that is everything.
    x = torch.diag(torch.full((12,), 50.0 * ratio))
    x = torch.cat([x, -x, laplacian(quantizer, 5000)])
    rows, hat = quantizer.quantize(x)
    scale = 2.0 ** ((rows.scales.double() - 128) / 16)
    error = (hat - x).double().abs() / scale
    assert error.max() <= 0.5 + 1e-3 + 2e-7 * 50 * ratio if ratio > 8 else error.max() < 1
    bits = ideal_bits(quantizer, EncodedVectors(rows.words[24:], rows.scales[24:])) - 8 * 5000
    entropy = math.log2(math.e * math.sqrt(2) * ratio)  # a Laplacian's, at unit steps
    assert entropy - 0.02 < bits / (5000 * 12) < entropy + 0.25
    assert bits == pytest.approx(quantizer.code_bits(rows.tail(24)) - 8 * 5000)


def test_counting_leaves_out_low_bits():
    quantizer = build((40.0, 3.0), step=1.0)
    x = laplacian(quantizer, 300)
    rows, _ = quantizer.quantize(x)
    statistics = LevelStatistics.empty("cpu")
    quantizer.count(rows, x, statistics)
    scale = 2.0 ** ((rows.scales.double() - 128) / 16)
    tables = quantizer.tables.tolist()
    for column, (table, bits) in enumerate(zip(tables, (3, 0), strict=True)):
        assert statistics.counts[table].sum() == 300
        levels, magnitudes = (
            rows.words[:, column].long() - MAX_LEVEL,
            x[:, column].abs() / scale[:, 0] / 2**bits,
        )
        assert torch.equal(statistics.counts[table], torch.bincount(levels.abs(), minlength=128).double())
        assert float(statistics.sums[table].sum()) == pytest.approx(float(magnitudes.sum()), rel=1e-5)
    assert statistics.counts.sum() == 600


def test_dequantize_is_bit_exact_and_follows_the_definition():
    quantizer = build()
    x = laplacian(quantizer, 500) * torch.logspace(-1.5, 1.5, 500)[:, None]
    rows, dequantized = quantizer.quantize(x)
    assert (rows.words.dtype, rows.scales.dtype) == (torch.uint8, torch.uint8)
    assert (rows.words.shape, rows.scales.shape) == ((500, 8), (500, 1))
    assert torch.equal(quantizer.dequantize(rows), dequantized)
    scale = 2.0 ** ((rows.scales.double() - 128) / 16)
    rms = (x.double() / quantizer.deviations).square().mean(1, keepdim=True).sqrt()
    assert ((scale / rms).log2().abs() <= 0.51 / 16).all()
    levels = rows.words[:, :6].long() - MAX_LEVEL
    magnitudes = MODEL.points[quantizer.tables].double().gather(1, levels.abs().T).T
    points = levels.sign() * magnitudes
    # Levels with low bits stand for themselves; the low bits of level 0 are half of what they can be.
    points[:, 0] = 16 * levels[:, 0] + rows.words[:, 6].long() - 8
    points[:, 1] = 2 * levels[:, 1] + rows.words[:, 7].long() - 1
    expected = points * 0.37 * scale
    torch.testing.assert_close(dequantized.double(), expected, rtol=1e-6, atol=0)
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.bfloat16, 2**-6)):
        wide = quantizer.dequantize(rows, dtype)
        assert wide.dtype == dtype
        torch.testing.assert_close(wide[:, 2:].double(), expected[:, 2:], rtol=tolerance, atol=0)
        # Small sums of what the two symbols stand for have the rounding of the larger.
        atol = 16 * 0.37 * tolerance * scale
        assert (
            (wide[:, :2].double() - expected[:, :2]).abs() <= tolerance * expected[:, :2].abs() + atol
        ).all()
    relative = (dequantized - x) / (quantizer.step * scale)
    # Steps squared: 1/12, and what the dead zone costs.
    assert relative.square().mean() < 0.3
    assert relative[:, :2].square().mean() == pytest.approx(1 / 12, rel=0.1)


@pytest.mark.parametrize("rate_weight", [0.0, 0.1, 0.5])
def test_levels_are_the_cheapest(rate_weight):
    # At most 8 steps of deviation: beyond, the nearest is taken.
    quantizer = build((8.0, 7.0, 3.0, 1.0, 0.5, 0.2), rate_weight=rate_weight)
    x = laplacian(quantizer, 2000)
    levels, codes = quantizer.levels(x)
    magnitudes = x.abs() / (2.0 ** ((codes.double() - 128) / 16) * quantizer.step)
    classes = quantizer.classes.long()
    points, lengths = MODEL.points[classes].double(), MODEL.lengths[classes].double()
    costs = (magnitudes[..., None] - points).square() + rate_weight * lengths
    allowed = torch.arange(MAX_LEVEL + 1) <= most_levels()[classes][:, None]
    costs[:, ~allowed] = math.inf
    mine = costs.gather(2, levels[..., None])[..., 0]
    best, cheapest = costs.min(2)
    most = most_levels()[classes]
    below = magnitudes.floor().long().minimum(most)
    for other in (below, (below + 1).minimum(most), torch.zeros_like(below)):
        assert (mine <= costs.gather(2, other[..., None])[..., 0] + 1e-3).all()  # float32: 100² + 1e-3
    assert float(mine.mean()) <= 1.001 * float(best.mean())
    assert float((levels == cheapest).double().mean()) > 0.99


def test_a_higher_weight_of_rate_buys_bits_with_error():
    figures = []
    for rate_weight in (0.0, 0.05, 0.1, 0.2, 0.4):
        quantizer = build(rate_weight=rate_weight)
        x = laplacian(quantizer, 2000)
        rows, hat = quantizer.quantize(x)
        figures.append((ideal_bits(quantizer, rows), float((hat - x).square().sum())))
    bits, errors = zip(*figures, strict=True)
    assert all(a > b for a, b in pairwise(bits))
    assert all(a < b for a, b in pairwise(errors))


def test_magnitudes_saturate():
    quantizer = build((40.0, 1.0, 1.0))
    x = torch.tensor([[1.0, 0.0, -1.0]]) * torch.tensor([1e4, 1e10, 1e20, 1e30, 1e37])[:, None]
    rows, hat = quantizer.quantize(x)
    assert hat.isfinite().all()
    assert torch.equal(hat.sign(), x.sign())
    assert torch.equal(hat[1:], hat[1:2].expand(4, 3))
    assert (rows.scales < NOT_FINITE - 1).all()
    assert torch.equal(quantizer.unseal(quantizer.seal(rows, 5), 5).words, rows.words)


def test_tiny_and_zero_tokens():
    quantizer = build()
    x = torch.zeros(3, 6)
    x[1], x[2] = 1e-30, -1e-12
    rows, hat = quantizer.quantize(x)
    assert rows.scales.tolist() == [[0]] * 3
    assert torch.equal(hat, torch.zeros(3, 6))


def test_other_shapes_are_refused():
    for shape in ((3, 5), (6,), (1, 3, 6)):
        with pytest.raises(ShapeError, match=r"\[tokens, 6\]"):
            build().quantize(torch.zeros(shape))
    with pytest.raises(ShapeError, match="entropy model"):
        EntropyModel(MODEL.frequencies[:-1], MODEL.points)
    with pytest.raises(ShapeError, match="entropy model"):
        EntropyModel(MODEL.frequencies, MODEL.points[:, :-1])


# --- streams ----------------------------------------------------------------------------------------------

SPECIAL = st.sampled_from([0.0, -1e-38, 1e-20, 1e5, -1e12, 1e25, 3e38, math.inf, -math.inf, math.nan])


@settings(max_examples=60, deadline=None)
@given(
    block_tokens=st.sampled_from([1, 3, 4, 8, 128]),
    blocks=st.integers(1, 3),
    seed=st.integers(0, 2**32),
    spread=st.sampled_from([0.0, 1.0, 4.0]),
    specials=st.lists(st.tuples(st.integers(0, 127), st.integers(0, 5), SPECIAL), max_size=6),
)
def test_seal_and_unseal(block_tokens, blocks, seed, spread, specials):
    quantizer = build()
    clean = laplacian(quantizer, block_tokens * blocks, seed)
    generator = torch.Generator().manual_seed(seed)
    clean *= torch.exp(spread * torch.randn(len(clean), 1, generator=generator))
    x = clean.clone()
    for token, place, value in specials:
        x[token % len(x), place] = value
    rows, hat = quantizer.quantize(x)
    lost = ~(x / quantizer.deviations).isfinite().all(1)
    assert torch.equal(hat.isnan().all(1), lost)
    assert hat[~lost].isfinite().all()
    touched = torch.zeros(len(x), dtype=torch.bool)
    touched[[token % len(x) for token, _, _ in specials]] = True
    assert torch.equal(hat[~touched], quantizer.quantize(clean)[1][~touched])
    streams = quantizer.seal(rows, block_tokens)
    assert streams.lengths.shape == (blocks,)
    assert streams.states.shape == (blocks, -(-block_tokens // 4))
    back = quantizer.unseal(streams, block_tokens)
    assert torch.equal(back.words, rows.words)
    assert torch.equal(back.scales, rows.scales)
    assert back.scales.dtype == torch.uint8
    # Every page is decodable by itself, and pages can be taken and joined.
    pages = torch.randint(0, blocks, (4,), generator=generator)
    chosen = quantizer.unseal(streams.select(pages, block_tokens), block_tokens)
    expected = rows.select(pages, block_tokens)
    assert torch.equal(chosen.words, expected.words)
    assert torch.equal(chosen.scales, expected.scales)
    apart = [quantizer.seal(EncodedVectors(*part), block_tokens) for part in _pages(rows, block_tokens)]
    joined = concatenate(apart)
    assert isinstance(joined, EncodedStreams)
    for mine, theirs in zip(joined, streams, strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)


def _pages(rows, block_tokens):
    return zip(*(tensor.split(block_tokens) for tensor in rows), strict=True)


def test_rows_can_be_joined_taken_and_owned():
    rows, _ = build().quantize(laplacian(build(), 12))
    parts = [EncodedVectors(*part) for part in _pages(rows, 4)]
    joined = concatenate(parts)
    assert torch.equal(joined.words, rows.words)
    assert torch.equal(joined.scales, rows.scales)
    taken = rows.select(torch.tensor([2, 0]), 4)
    assert torch.equal(taken.words, torch.cat([rows.words[8:], rows.words[:4]]))
    assert torch.equal(rows.head(5).words, rows.words[:5])
    for encoded in (rows.head(1), build().seal(rows, 4).select(torch.tensor([1]), 4)):
        for copy, tensor in zip(encoded.clone(), encoded, strict=True):
            assert torch.equal(copy, tensor)
            assert copy.untyped_storage().nbytes() == copy.numel() * copy.element_size()


@pytest.mark.parametrize("scale", [1.0, 0.05, 30.0])
def test_streams_are_as_short_as_their_symbols_allow(scale):
    quantizer = build(RATIOS * 8)
    rows, _ = quantizer.quantize(laplacian(quantizer, 1024) * scale)
    streams = quantizer.seal(rows, 128)
    bits = 16 * streams.words.numel() + 32 * streams.states.numel()
    assert streams.lengths.sum() == streams.words.numel()
    ideal = ideal_bits(quantizer, rows)
    lanes = streams.states.numel()
    # Above a lane's state, of which 16 bits hold nothing, ANS loses about a thousandth.
    assert ideal - 16 * lanes < bits < 1.002 * ideal + 16 * lanes


# --- the model of levels ----------------------------------------------------------------------------------


def _observed(index, probabilities, count, shift=0.25):
    """Return statistics of one class, its levels' magnitudes ``shift`` above the level."""
    statistics = LevelStatistics.empty("cpu")
    generator = torch.Generator().manual_seed(0)
    levels = torch.multinomial(probabilities, count, replacement=True, generator=generator)[:, None]
    statistics.add(torch.tensor([index], dtype=torch.uint8), levels, levels + shift)
    return statistics, levels


def test_statistics_count_levels_and_sum_magnitudes():
    statistics = LevelStatistics.empty("cpu")
    classes = torch.tensor([3, 7, 3], dtype=torch.uint8)
    levels = torch.tensor([[0, 2, 1], [1, 2, 127]])
    statistics.add(classes, levels, levels + 0.25)
    statistics.add(classes, levels[:1], levels[:1].float())
    counts = torch.zeros(NUM_TABLES, MAX_LEVEL + 1, dtype=torch.float64)
    counts[3, 0], counts[3, 1], counts[3, 127], counts[7, 2] = 2, 3, 1, 3
    sums = torch.zeros_like(counts)
    sums[3, 0], sums[3, 1], sums[3, 127], sums[7, 2] = 0.25, 3.5, 127.25, 6.5
    assert torch.equal(statistics.counts, counts)
    assert torch.equal(statistics.sums, sums)


def _assert_valid(model):
    frequencies = model.frequencies
    assert frequencies.shape == (NUM_TABLES, ALPHABET)
    assert frequencies.dtype == torch.int32
    assert (frequencies.sum(1) == 1 << 14).all()
    levels = torch.arange(ALPHABET) - MAX_LEVEL
    assert torch.equal(frequencies > 0, levels.abs() <= most_levels()[:, None])
    assert ((frequencies - frequencies.flip(1)).abs() <= 1).all()
    assert (model.points[:, 0] == 0).all()
    assert (model.points.diff(dim=1) > 0).all()


def test_what_is_expected_of_levels_never_seen():
    model = EntropyModel.fit(LevelStatistics.empty("cpu"))
    _assert_valid(model)
    positive = model.frequencies[:, MAX_LEVEL:]
    assert (positive.diff(dim=1) <= 1).all()  # rounding aside, larger levels are rarer
    assert (model.mean_lengths().diff() > -1e-3).all()
    # A Laplacian of deviation s has log2(e √2 s) bits at unit steps.
    wide = torch.arange(20, NUM_CLASSES)
    expected = (math.e * math.sqrt(2) * class_spreads()[wide]).log2()
    assert (model.mean_lengths()[wide] - expected).abs().max() < 0.25
    assert torch.equal(model.points, torch.arange(MAX_LEVEL + 1.0).expand_as(model.points))


def test_a_model_learns_the_levels_it_sees_and_nothing_of_other_classes():
    prior = EntropyModel.fit(LevelStatistics.empty("cpu"))
    probabilities = torch.zeros(MAX_LEVEL + 1)
    probabilities[:3] = torch.tensor([0.5, 0.1, 0.4])  # nothing like a Laplacian
    index = 12
    statistics, levels = _observed(index, probabilities, 100_000)
    model = EntropyModel.fit(statistics)
    _assert_valid(model)
    share = model.frequencies[index, MAX_LEVEL : MAX_LEVEL + 3].double() / 2**14
    torch.testing.assert_close(share, torch.tensor([0.5, 0.05, 0.2]).double(), atol=5e-3, rtol=0)
    others = torch.arange(NUM_TABLES) != index
    assert torch.equal(model.frequencies[others], prior.frequencies[others])
    assert torch.equal(model.points[others], prior.points[others])
    torch.testing.assert_close(model.points[index, 1:3], torch.tensor([1.25, 2.25]), atol=1e-3, rtol=0)
    assert model.points[index, 3] == 3
    # The expected length of what was seen is close to its entropy, a sign for each level but 0 included.
    entropy = -(probabilities[:3] * probabilities[:3].log2()).sum() + 0.5
    mean = model.lengths[index][levels].mean()
    assert float(mean) == pytest.approx(float(entropy), abs=0.02)


def test_wide_classes_are_smoothed():
    index = NUM_TABLES - 1
    few = torch.exp(-torch.arange(MAX_LEVEL + 1.0) / 6)
    few[::2] = 0  # as if every other level had not come up
    statistics, _ = _observed(index, few, 100_000)
    row = EntropyModel.fit(statistics).frequencies[index, MAX_LEVEL + 1 : MAX_LEVEL + 20].double()
    assert (row[1:] / row[:-1]).log2().abs().max() < 0.5


def test_a_model_is_placed_once_per_device():
    assert MODEL.to("cpu") is MODEL
    assert MODEL.to("meta") is MODEL.to("meta")
