import functools
import math

import pytest
import torch

from aquakv.codec import AffinePredictor, EncodedVectors, LinearTransform, OutlierGuard
from aquakv.codec.allocation import equal_widths
from aquakv.codec.guard import choose_outliers
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
    assert equal_widths(config, 5, is_first_layer=True) == (4,) * 5
    assert equal_widths(config, 5, is_first_layer=False) == (3,) * 5


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


@pytest.mark.parametrize("rank", [None, 6])
def test_predictor_is_an_affine_map_of_its_inputs_in_order(rank):
    shapes = [(50, 30)] if rank is None else [(50, rank), (rank, 30)]
    factors = tuple(_random(*shape, seed=4 + i).to(torch.bfloat16) for i, shape in enumerate(shapes))
    bias = _random(30, seed=1)
    predictor = AffinePredictor(factors, bias)
    weight = functools.reduce(torch.matmul, [factor.double() for factor in factors])
    a, b = _random(7, 30, seed=2), _random(7, 20, seed=3)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 3e-4)):
        got = predictor.predict((a.to(dtype), b.to(dtype)))
        expected = torch.cat([a, b], 1).double() @ weight + bias.double()
        assert got.dtype == dtype
        # Sums of 50 products of order one, then of 6 of order seven.
        torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=0)
    assert (predictor.in_features, predictor.rank) == (50, rank)
    assert predictor.predict((a[:0], b[:0])).shape == (0, 30)


def test_latent_is_what_the_second_factor_reads():
    down, up = _random(50, 6).to(torch.bfloat16), _random(6, 30, seed=1).to(torch.bfloat16)
    predictor = AffinePredictor((down, up), _random(30, seed=2))
    a, b = _random(7, 30, seed=3).double(), _random(7, 20, seed=4).double()
    latent = predictor.latent((a, b))
    torch.testing.assert_close(latent, torch.cat([a, b], 1) @ down.double(), atol=1e-12, rtol=0)
    expected = latent @ up.double() + predictor.bias.double()
    torch.testing.assert_close(predictor.predict((a, b)), expected, atol=1e-12, rtol=0)
    with pytest.raises(ShapeError, match="no latent"):
        AffinePredictor((down,), torch.zeros(6)).latent((a, b))


@pytest.mark.parametrize(
    ("shapes", "bias"),
    [
        ([(4, 3)], (4,)),
        ([(4,)], (4,)),
        ([(4, 3)], (3, 1)),
        ([], (3,)),
        ([(4, 2), (3, 5)], (5,)),
        ([(4, 2), (2, 5)], (2,)),
        ([(4, 2), (2, 2), (2, 5)], (5,)),
    ],
)
def test_predictor_refuses_factors_that_do_not_chain(shapes, bias):
    with pytest.raises(ShapeError, match="factors"):
        AffinePredictor(tuple(torch.zeros(shape) for shape in shapes), torch.zeros(bias))


def test_predictor_refuses_wrong_inputs():
    for factors in ((torch.zeros(5, 3),), (torch.zeros(5, 2), torch.zeros(2, 3))):
        with pytest.raises(ShapeError, match="expected inputs of 5 features in all, got"):
            AffinePredictor(factors, torch.zeros(3)).predict((torch.zeros(2, 3), torch.zeros(2, 3)))


# --- fitted transform -------------------------------------------------------------------------------------


def test_linear_transform_keeps_some_coefficients():
    analysis = _random(12, 12)
    synthesis = torch.linalg.inv(analysis)
    x, base = _random(9, 12, seed=1), _random(9, 12, seed=2)
    whole = LinearTransform(analysis, synthesis)
    part = LinearTransform(analysis[:, :5], synthesis[:5])
    assert (whole.coefficients, part.coefficients) == (12, 5)
    # float32, and a random matrix of condition some 100
    torch.testing.assert_close(whole.inverse(whole.forward(x)), x, atol=1e-4, rtol=0)
    torch.testing.assert_close(part.forward(x), whole.forward(x)[:, :5], atol=1e-5, rtol=0)
    z = part.forward(x)
    torch.testing.assert_close(part.inverse_add(z, base), base + z @ synthesis[:5], atol=1e-5, rtol=0)
    torch.testing.assert_close(part.inverse(z), z @ synthesis[:5], atol=1e-5, rtol=0)
    none = LinearTransform(analysis[:, :0], synthesis[:0])
    assert torch.equal(none.inverse_add(none.forward(x), base), base)
    with pytest.raises(ShapeError, match="12"):
        whole.forward(torch.zeros(3, 11))
    with pytest.raises(ShapeError, match="transform"):
        LinearTransform(analysis[:, :5], synthesis)


# --- outlier guard ----------------------------------------------------------------------------------------


def test_guard_measures_in_its_own_norm():
    roots = _random(3, 4, 4)
    guard = OutlierGuard(roots, torch.tensor([2.5]))
    error = _random(8, 12, seed=1)
    whole = torch.block_diag(*(root.double() @ root.double().T for root in roots))
    expected = torch.einsum("ti,ij,tj->t", error.double(), whole, error.double())
    torch.testing.assert_close(guard.weighted_error(error).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(guard.excess(error).double(), expected / 2.5, rtol=1e-5, atol=1e-5)
    for shape, limit in (((3, 4, 5), (1,)), ((4, 4), (1,)), ((3, 4, 4), ())):
        with pytest.raises(ShapeError, match="guard"):
            OutlierGuard(torch.zeros(shape), torch.zeros(limit))


def test_outliers_are_the_furthest_of_each_block():
    excess = torch.tensor([0.5, 3.0, 2.0, 2.0, math.nan, 1.0, 0.0, 9.0, math.inf, 5.0, 1e30, 1.5])
    # Ties go to the earlier token; exactly at the limit is no outlier, not-a-number neither.
    assert choose_outliers(excess, 4, 2).tolist() == [1, 2, 7, 8, 10]
    assert choose_outliers(excess, 4, 9).tolist() == [1, 2, 3, 7, 8, 9, 10, 11]
    assert choose_outliers(excess, 12, 1).tolist() == [8]
    assert choose_outliers(excess[:0], 4, 2).tolist() == []
    assert choose_outliers(torch.ones(8), 4, 2).dtype == torch.int64
