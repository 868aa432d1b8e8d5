import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aquakv.codec.encoded import EncodedVectors
from aquakv.codec.scalar import NOT_FINITE, SCALES, ScalarQuantizer, scale_codes
from aquakv.errors import ConfigError, ShapeError
from aquakv.numerics import cubic_levels, load_grid, unit_distortions, unpack

WIDTHS = range(1, 9)
# Counts of each width, the widest first; none of the segments but the first starts on a word.
MIXED = {8: 3, 7: 8, 6: 4, 5: 8, 4: 2, 3: 8, 2: 4, 1: 16}


def build(counts: dict[int, int], arithmetic: bool = True, seed: int = 0) -> ScalarQuantizer:
    widths = torch.tensor([w for w, count in counts.items() for _ in range(count)], dtype=torch.uint8)
    generator = torch.Generator().manual_seed(seed)
    deviations = torch.exp(2 * torch.randn(len(widths), generator=generator))
    return ScalarQuantizer(deviations, widths, arithmetic)


def gaussian(quantizer: ScalarQuantizer, tokens: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, quantizer.features, generator=generator) * quantizer.deviations


@pytest.mark.parametrize("arithmetic", [True, False])
@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize(
    "counts", [MIXED, {4: 2}, {8: 1}, {1: 8}, {8: 5, 2: 4}, {7: 40}, {}, {5: 3, 3: 10, 1: 9}, {6: 1}]
)
def test_dequantize_is_bit_exact(counts, tokens, arithmetic):
    quantizer = build(counts, arithmetic)
    n = sum(counts.values())
    coefficients = gaussian(quantizer, tokens)
    encoded, dequantized = quantizer.quantize(coefficients)
    assert encoded.words.dtype == encoded.scales.dtype == torch.uint8
    assert encoded.words.shape == (tokens, sum(math.ceil(w * n / 8) for w, n in counts.items()))
    assert encoded.scales.shape == (tokens, 1 if n else 0)
    assert encoded.words.shape[1] == quantizer.words_per_token
    assert quantizer.bytes_per_token == encoded.words.shape[1] + encoded.scales.shape[1]
    assert dequantized.shape == (tokens, n)
    assert dequantized.dtype == torch.float32
    assert torch.equal(quantizer.dequantize(encoded), dequantized)
    double = quantizer.dequantize(encoded, torch.float64)
    assert double.dtype == torch.float64
    assert torch.allclose(double.float(), dequantized, rtol=1e-6, atol=0)
    half = quantizer.dequantize(encoded, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert torch.allclose(half.float(), dequantized, rtol=2e-2, atol=0)


@pytest.mark.parametrize("arithmetic", [True, False])
def test_values_are_the_levels_of_the_documented_formula(arithmetic):
    quantizer = build(MIXED, arithmetic)
    encoded, dequantized = quantizer.quantize(gaussian(quantizer, 9))
    scale = 2.0 ** ((encoded.scales.double() - 128) / 16)
    start = first = 0
    for width, count in MIXED.items():
        stop = start + count * width // 8
        stored = torch.nn.functional.pad(encoded.words[:, start:stop], (0, -(stop - start) % 4))
        codes = unpack(stored.contiguous().view(torch.int32), width, count)
        if arithmetic:
            x = codes.double() - (2**width - 1) / 2
            levels = x * (cubic_levels(width).linear + cubic_levels(width).cubic * x**2)
        else:
            levels = load_grid(1, 2**width).points[codes.long(), 0].double()
        part = slice(first, first + count)
        expected = levels * scale * quantizer.deviations[part].double()
        assert torch.allclose(dequantized[:, part].double(), expected, rtol=1e-6, atol=0)
        start, first = stop, first + count


@pytest.mark.parametrize("arithmetic", [True, False])
def test_every_value_gets_its_nearest_level(arithmetic):
    quantizer = build(MIXED, arithmetic)
    coefficients = gaussian(quantizer, 200)
    encoded, dequantized = quantizer.quantize(coefficients)
    spread = SCALES[encoded.scales.long()] * quantizer.deviations
    first = 0
    for width, count in MIXED.items():
        part = slice(first, first + count)
        first += count
        if arithmetic:
            x = torch.arange(2**width) - (2**width - 1) / 2
            levels = x * (cubic_levels(width).linear + cubic_levels(width).cubic * x**2)
        else:
            levels = load_grid(1, 2**width).points[:, 0]
        relative = coefficients[:, part] / spread[:, part]
        nearest = (relative[..., None] - levels).abs().min(-1).values
        chosen = (relative - dequantized[:, part] / spread[:, part]).abs()
        assert torch.allclose(chosen, nearest, atol=1e-5)


@pytest.mark.parametrize("arithmetic", [True, False])
@pytest.mark.parametrize("width", WIDTHS)
def test_error_on_gaussian_data_is_the_theory_s(width, arithmetic):
    # Many coefficients: the scale of each token is then close to 1 and only rounded, to 1/16 of an octave.
    quantizer = build({width: 512}, arithmetic)
    coefficients = gaussian(quantizer, 512) * 3.7
    _, dequantized = quantizer.quantize(coefficients)
    error = float(((dequantized - coefficients) / (3.7 * quantizer.deviations)).square().mean())
    theory = unit_distortions((width,), arithmetic)[width]
    # A scale up to 2 % off matters in the tails of many levels; it costs 7 % at 8 bits, 1 % at 4 and fewer.
    assert 0.97 * theory < error < (1.1 if width > 4 else 1.02) * theory


def test_scale_adapts_to_the_token():
    quantizer = build({4: 64})
    coefficients = gaussian(quantizer, 1).repeat(4, 1) * torch.tensor([[1.0], [2.0], [0.01], [100.0]])
    encoded, dequantized = quantizer.quantize(coefficients)
    error = (dequantized - coefficients).square().sum(1) / coefficients.square().sum(1)
    assert float(error.max()) < 0.05
    assert int(encoded.scales[1]) - int(encoded.scales[0]) == 16
    assert torch.equal(encoded.words[0], encoded.words[1])
    assert torch.equal(2 * dequantized[0], dequantized[1])


def test_scale_codes():
    assert SCALES.dtype == torch.float32
    assert SCALES[:255].double().tolist() == pytest.approx(
        [2 ** ((c - 128) / 16) for c in range(255)], rel=1e-7
    )
    assert math.isnan(float(SCALES[NOT_FINITE]))
    rows = SCALES[:255, None].expand(255, 3)
    assert scale_codes(rows).flatten().tolist() == list(range(255))
    extreme = torch.tensor([[0.0], [1e-30], [1e30], [math.nan], [math.inf], [-math.inf]])
    assert scale_codes(extreme).flatten().tolist() == [0, 0, 254, 255, 255, 255]


@settings(max_examples=50, deadline=None)
@given(factor=st.floats(2**-7.9, 2**7.8))
def test_scale_is_within_half_a_code_of_the_rms(factor):
    codes = scale_codes(torch.tensor([[1.0, -1.0, 1.0]]) * factor)
    assert abs(math.log2(float(SCALES[int(codes)]) / factor)) <= 1 / 32 + 1e-6


@pytest.mark.parametrize("arithmetic", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("column", [0, 30, -1])
def test_tokens_that_are_not_finite_come_back_as_nan_and_harm_no_other(arithmetic, bad, column):
    quantizer = build(MIXED, arithmetic)
    coefficients = gaussian(quantizer, 3)
    clean, expected = quantizer.quantize(coefficients)
    coefficients[1, column] = bad
    encoded, dequantized = quantizer.quantize(coefficients)
    assert encoded.scales.flatten().tolist()[1] == NOT_FINITE
    for result in (dequantized, quantizer.dequantize(encoded), quantizer.dequantize(encoded, torch.float16)):
        assert bool(result[1].isnan().all())
    assert torch.equal(dequantized[::2], expected[::2])
    assert torch.equal(encoded.words[::2], clean.words[::2])
    zeros, _ = quantizer.quantize(torch.zeros(1, quantizer.features))
    assert torch.equal(encoded.words[1:2], zeros.words)


@pytest.mark.parametrize("arithmetic", [True, False])
def test_extreme_but_finite_tokens_stay_finite(arithmetic):
    quantizer = build({8: 2, 4: 4, 1: 8}, arithmetic)
    coefficients = torch.stack([torch.zeros(14), torch.full((14,), 3e38), quantizer.deviations * 1e-20])
    encoded, dequantized = quantizer.quantize(coefficients * torch.ones(14))
    assert encoded.scales.flatten().tolist()[::2] == [0, 0]
    assert bool(dequantized[::2].isfinite().all())
    assert float((dequantized[::2] / quantizer.deviations).abs().max()) <= 2**-8
    assert int(encoded.scales[1]) >= 254


@settings(max_examples=40, deadline=None)
@given(data=st.data(), arithmetic=st.booleans(), tokens=st.integers(1, 12))
def test_chunks_have_the_codes_of_the_whole(data, arithmetic, tokens):
    quantizer = build(MIXED, arithmetic)
    coefficients = gaussian(quantizer, tokens, seed=data.draw(st.integers(0, 99)))
    encoded, dequantized = quantizer.quantize(coefficients)
    cut = data.draw(st.integers(0, tokens))
    parts = [quantizer.quantize(part) for part in (coefficients[:cut], coefficients[cut:])]
    assert torch.equal(encoded.words, torch.cat([part.words for part, _ in parts]))
    assert torch.equal(encoded.scales, torch.cat([part.scales for part, _ in parts]))
    assert torch.equal(dequantized, torch.cat([values for _, values in parts]))


def test_views_of_larger_buffers_decode():
    quantizer = build(MIXED)
    spread = torch.full((7, 2 * quantizer.features), math.nan)
    spread[1::3, ::2] = gaussian(quantizer, 2)
    encoded, dequantized = quantizer.quantize(spread[1::3, ::2])
    assert torch.equal(dequantized, quantizer.quantize(gaussian(quantizer, 2))[1])
    buffer = torch.full((7, quantizer.words_per_token + 5), 255, dtype=torch.uint8)
    buffer[1::3, 3:-2] = encoded.words
    scales = torch.full((7, 3), 7, dtype=torch.uint8)
    scales[1::3, 1:2] = encoded.scales
    for rows in (slice(1, None, 3), slice(1, 2)):
        view = EncodedVectors(buffer[rows, 3:-2], scales[rows, 1:2])
        assert torch.equal(quantizer.dequantize(view), dequantized[: len(view.words)])


def test_moved_quantizer_is_the_same():
    quantizer = build(MIXED, arithmetic=False)
    moved = quantizer.to("cpu")
    coefficients = gaussian(quantizer, 4)
    assert torch.equal(moved.quantize(coefficients)[1], quantizer.quantize(coefficients)[1])
    assert moved.segments == quantizer.segments


def test_bad_input_is_refused():
    ones = torch.ones(8)
    for widths, message in (
        ([1] * 7 + [2], "8 down to 1"),
        ([2] * 4 + [0] * 4, "8 down to 1"),
        ([9] * 8, "8 down to 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            ScalarQuantizer(ones, torch.tensor(widths, dtype=torch.uint8), True)
    eight = torch.full((8,), 1, dtype=torch.uint8)
    for value in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match="deviations"):
            ScalarQuantizer(ones * value, eight, True)
    for deviations, widths in ((ones.double(), eight), (ones[:7], eight), (ones, eight.int())):
        with pytest.raises(ShapeError, match="uint8"):
            ScalarQuantizer(deviations, widths, True)
    quantizer = ScalarQuantizer(ones, eight, True)
    for coefficients in (torch.ones(2, 7), torch.ones(8), torch.ones(2, 8).double()):
        with pytest.raises(ShapeError):
            quantizer.quantize(coefficients)
    words, scales = quantizer.quantize(torch.ones(2, 8))[0]
    for bad in ((words[:, :0], scales), (words, scales[:1]), (words.int(), scales)):
        with pytest.raises(ShapeError):
            quantizer.dequantize(EncodedVectors(*bad))
