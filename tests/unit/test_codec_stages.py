import math

import pytest
import torch

from aquakv.codec import AffinePredictor, EncodedVectors
from aquakv.codec.allocation import allocate
from aquakv.codec.quantizer import MAX_SCALE, build_quantizer
from aquakv.codec.transform import build_transform, largest_group
from aquakv.config import AllocationConfig, QuantizerConfig, TransformConfig
from aquakv.errors import ConfigError, ShapeError


def _random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _quantizer(features, bits, group=None, grid_dim=2):
    return build_quantizer(
        QuantizerConfig(grid_dim=grid_dim), features, group or features, (bits,) * features
    )


# --- transform --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("features", "limit", "group"),
    [
        (192, 1024, 192),
        (30, 1024, 30),
        (2048, 1024, 1024),
        (1536, 1024, 768),
        (30, 8, 6),
        (7, 4, 1),
        (35, 1024, 35),
    ],
)
def test_groups_divide_the_vector(features, limit, group):
    assert largest_group(features, limit) == group
    assert build_transform(TransformConfig(max_group_size=limit), features).group_size == group


@pytest.mark.parametrize(
    ("features", "limit"), [(192, 1024), (30, 1024), (30, 10), (35, 1024), (7, 3), (1, 8), (256, 64)]
)
def test_transform_is_orthogonal_and_undone_by_its_inverse(features, limit):
    transform = build_transform(TransformConfig(max_group_size=limit), features)
    x = _random(11, features)
    y = transform.forward(x)
    # float32 sums of up to 256 products: a few times 1e-7 of a unit.
    torch.testing.assert_close(transform.inverse(y), x, atol=1e-5, rtol=0)
    torch.testing.assert_close(y.square().sum(1), x.square().sum(1), atol=0, rtol=1e-5)
    base = _random(11, features, seed=1)
    torch.testing.assert_close(transform.inverse_add(y, base), base + x, atol=1e-5, rtol=0)
    groups = y.view(11, -1, transform.group_size).square().sum(-1)
    own = x.view(11, -1, transform.group_size).square().sum(-1)
    torch.testing.assert_close(groups, own, atol=1e-5, rtol=1e-5)  # nothing crosses groups


def test_hadamard_spreads_one_coordinate_evenly():
    transform = build_transform(TransformConfig(), 192)
    spread = transform.forward(torch.eye(192)[:5]).abs()
    assert spread.max() < 1.01 / math.sqrt(192)


def test_identity_transform_does_nothing():
    transform = build_transform(TransformConfig(kind="identity"), 30)
    x = _random(4, 30)
    assert torch.equal(transform.forward(x), x)
    assert torch.equal(transform.inverse(x), x)
    assert torch.equal(transform.inverse_add(x, x), 2 * x)


def test_transform_refuses_other_shapes():
    transform = build_transform(TransformConfig(), 30)
    for shape in ((4, 31), (30,), (2, 4, 30)):
        with pytest.raises(ShapeError, match="30"):
            transform.forward(torch.zeros(shape))


# --- allocation -------------------------------------------------------------------------------------------


def test_allocation():
    config = AllocationConfig(bits=3)
    assert allocate(config, 5, is_first_layer=True) == (4,) * 5
    assert allocate(config, 5, is_first_layer=False) == (3,) * 5


# --- quantiser --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("features", "group"), [(192, 192), (30, 30), (30, 10), (35, 35), (35, 7), (64, 32)])
def test_quantizer_round_trip_and_bytes(features, group, bits):
    quantizer = _quantizer(features, bits, group)
    x = _random(400, features) * torch.logspace(-3, 3, 400)[:, None]
    encoded, dequantized = quantizer.quantize(x)
    assert torch.equal(quantizer.dequantize(encoded), dequantized)
    assert encoded.words.dtype == torch.int32
    assert encoded.scales.dtype == torch.float16
    bytes_held = sum(t.numel() * t.element_size() for t in encoded)
    assert bytes_held == 400 * quantizer.bytes_per_token
    # Packed densely: codes to the next 32-bit word, one fp16 scale a group.
    assert quantizer.bytes_per_token == 4 * math.ceil(features * bits / 32) + 2 * (features // group)
    error = (dequantized - x).square().sum(1) / x.square().sum(1)
    if group >= 30:
        # The grid's expected error on unit Gaussians; divided by their own root mean square, groups are close
        # to that only when they are large.
        assert float(error.mean()) == pytest.approx(quantizer.grid.mse, rel=0.15)
    # The scale is the group's root mean square, and every code the nearest point, by brute force.
    rms = x.view(400, -1, group).square().mean(-1).sqrt()
    torch.testing.assert_close(encoded.scales.float(), rms, rtol=2**-11, atol=6e-8)  # fp16 rounds once
    wide = encoded.scales.double().repeat_interleave(group, 1)
    points = (x.double() / wide).view(-1, quantizer.grid.dim)
    best = torch.cdist(points, quantizer.grid.points.double()).amin(1)
    mine = (points - (dequantized.double() / wide).view_as(points)).norm(dim=1)
    # Products in float32; points are some 1 apart or nearer, so that ties are within that.
    torch.testing.assert_close(mine, best, atol=2e-6, rtol=0)


def test_published_distortion():
    """Unit-variance MSE of the published grids (arXiv:2411.17525), at 2, 3 and 4 bits."""
    for bits, mse in ((2, 0.108), (3, 0.0296), (4, 0.0077)):
        quantizer = _quantizer(64, bits)
        assert quantizer.grid.dim == 2
        # The table gives three digits.
        assert quantizer.grid.mse == pytest.approx(mse, rel=0.02)


def test_zero_vectors_are_exact_and_tiny_ones_harmless():
    quantizer = _quantizer(30, 2, 10)
    x = torch.zeros(3, 30)
    x[1, 10:20] = 1e-12  # below the smallest fp16
    x[2, :10] = 1.0
    encoded, dequantized = quantizer.quantize(x)
    assert torch.equal(dequantized[0], torch.zeros(30))
    assert encoded.scales[0].tolist() == [0, 0, 0]
    assert torch.equal(dequantized[1], torch.zeros(30))
    assert dequantized[2, 10:].abs().max() == 0
    assert dequantized[2, :10].abs().min() > 0


@pytest.mark.parametrize("magnitude", [2e5, 1e10, 1e18])
def test_scales_saturate_instead_of_becoming_infinite(magnitude):
    quantizer = _quantizer(32, 4)
    encoded, dequantized = quantizer.quantize(_random(5, 32).clamp(-1, 1) * magnitude)
    assert (encoded.scales == MAX_SCALE).all()
    assert dequantized.isfinite().all()
    assert torch.equal(quantizer.dequantize(encoded), dequantized)


def test_values_whose_squares_overflow_are_not_hidden():
    _, dequantized = _quantizer(32, 4).quantize(_random(5, 32) * 1e30)
    assert not dequantized.isfinite().any()


def test_what_is_not_finite_spoils_its_own_group_only():
    quantizer = _quantizer(30, 3, 10)
    x = _random(4, 30)
    clean = quantizer.quantize(x)[1]
    for bad in (math.nan, math.inf, -math.inf):
        y = x.clone()
        y[2, 13] = bad
        encoded, dequantized = quantizer.quantize(y)
        assert not dequantized[2, 10:20].isfinite().any()
        assert not quantizer.dequantize(encoded)[2, 10:20].isfinite().any()
        dequantized[2, 10:20] = clean[2, 10:20]
        assert torch.equal(dequantized, clean)


def test_signs_and_order_survive_at_one_bit():
    quantizer = _quantizer(35, 1)
    x = _random(9, 35)
    assert torch.equal(quantizer.quantize(x)[1].sign(), x.sign())


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-7), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)]
)
def test_dequantize_in_other_dtypes(dtype, tolerance):
    quantizer = _quantizer(30, 3, 10)
    encoded, expected = quantizer.quantize(_random(50, 30))
    got = quantizer.dequantize(encoded, dtype)
    assert got.dtype == dtype
    # Table, scale and product are each rounded once.
    torch.testing.assert_close(got.float(), expected, rtol=2 * tolerance, atol=1e-6)


def test_odd_groups_take_scalar_grids():
    assert _quantizer(35, 2).grid.dim == 1
    assert _quantizer(30, 2, 15).grid.dim == 1
    assert _quantizer(30, 2, 10).grid.dim == 2
    assert _quantizer(30, 2, 10, grid_dim=1).grid.dim == 1


def test_no_tokens():
    encoded, dequantized = _quantizer(30, 2).quantize(torch.empty(0, 30))
    assert dequantized.shape == (0, 30)
    assert encoded.words.shape == (0, 2)
    assert _quantizer(30, 2).dequantize(EncodedVectors(*encoded)).shape == (0, 30)


def test_quantizer_refuses_what_it_cannot_do():
    with pytest.raises(ConfigError, match="one width"):
        build_quantizer(QuantizerConfig(), 4, 4, (2, 2, 3, 3))
    with pytest.raises(ConfigError, match="groups of 7"):
        _quantizer(30, 2, 7)
    for shape in ((3, 29), (30,), (1, 3, 30)):
        with pytest.raises(ShapeError, match=r"\[tokens, 30\]"):
            _quantizer(30, 2).quantize(torch.zeros(shape))


# --- predictor --------------------------------------------------------------------------------------------


def test_predictor_is_an_affine_map_of_its_inputs_in_order():
    weight, bias = _random(50, 30).to(torch.bfloat16), _random(30, seed=1)
    predictor = AffinePredictor(weight, bias)
    a, b = _random(7, 30, seed=2), _random(7, 20, seed=3)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        got = predictor.predict((a.to(dtype), b.to(dtype)))
        expected = torch.cat([a, b], 1).double() @ weight.double() + bias.double()
        assert got.dtype == dtype
        # Sums of 50 products of order one.
        torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=0)
    assert predictor.in_features == 50
    assert predictor.predict((a[:0], b[:0])).shape == (0, 30)


def test_predictor_refuses_wrong_shapes():
    with pytest.raises(ShapeError, match="weight"):
        AffinePredictor(torch.zeros(4, 3), torch.zeros(4))
    with pytest.raises(ShapeError, match="weight"):
        AffinePredictor(torch.zeros(4), torch.zeros(4))
    predictor = AffinePredictor(torch.zeros(5, 3), torch.zeros(3))
    with pytest.raises(ShapeError, match="expected inputs of 5 features in all, got"):
        predictor.predict((torch.zeros(2, 3), torch.zeros(2, 3)))
