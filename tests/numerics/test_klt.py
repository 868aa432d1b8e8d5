import pytest
import torch

from aquakv.errors import ConfigError, InputError, ShapeError
from aquakv.numerics import shrink_covariance, symmetric_root, two_stage_klt, weighted_klt


def spd(n: int, seed: int, rank: int | None = None, decay: float = 0.7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(n, rank or n, generator=generator, dtype=torch.float64)
    return (factor * decay ** torch.arange(rank or n)) @ (factor * decay ** torch.arange(rank or n)).T


@pytest.mark.parametrize("n", [1, 2, 7, 32])
def test_symmetric_root(n):
    matrix = spd(n, 0) + 0.1 * torch.eye(n, dtype=torch.float64)
    root = symmetric_root(matrix)
    assert torch.allclose(root, root.T, atol=1e-12)
    assert torch.allclose(root @ root, matrix, atol=1e-10)
    assert torch.linalg.eigvalsh(root)[0] > 0
    unroot = symmetric_root(matrix, inverse=True)
    assert torch.allclose(unroot @ root, torch.eye(n, dtype=torch.float64), atol=1e-9)


def test_inverse_root_of_a_singular_matrix_is_the_pseudo_inverse():
    matrix = spd(8, 1, rank=3)
    product = symmetric_root(matrix) @ symmetric_root(matrix, inverse=True)
    assert torch.allclose(product @ product, product, atol=1e-8)
    assert float(product.trace()) == pytest.approx(3, abs=1e-8)
    assert torch.equal(symmetric_root(torch.zeros(2, 2).double(), inverse=True), torch.zeros(2, 2).double())


@pytest.mark.parametrize(("n", "blocks"), [(1, None), (5, 1), (24, None), (24, 3), (24, 24), (64, 4)])
def test_transform_is_invertible_decorrelates_and_turns_the_metric_into_squared_error(n, blocks):
    covariance, metric, floor = spd(n, 2) + 0.01 * torch.eye(n).double(), spd(n, 3, decay=0.9), 1e-2
    klt = weighted_klt(covariance, metric, blocks, floor)
    assert klt.forward.dtype == klt.inverse.dtype == torch.float32
    assert klt.variances.dtype == torch.float64
    width = n // (blocks or 1)
    mask = torch.block_diag(*[torch.ones(width, width).double()] * (blocks or 1))
    forward, inverse = klt.forward.double(), klt.inverse.double()
    assert torch.allclose(forward @ inverse, torch.eye(n).double(), atol=2e-5)

    coefficients = forward.T @ (covariance * mask) @ forward
    assert torch.allclose(coefficients, klt.variances.diag(), atol=3e-6 * float(klt.variances[0]))
    assert bool((klt.variances.diff() <= 0).all())
    assert bool((klt.variances >= 0).all())

    expected = (metric / metric.diagonal().mean()) * mask + floor * torch.eye(n).double()
    assert torch.allclose(forward @ forward.T, expected, atol=1e-5 * float(expected.max()))

    assert klt.block_of.dtype == torch.int64
    assert sorted(klt.block_of.tolist()) == sorted(list(range(blocks or 1)) * width)
    inside = torch.arange(n)[:, None] // width == klt.block_of
    assert bool((klt.forward[~inside] == 0).all())
    assert bool((klt.inverse.T[~inside] == 0).all())


def test_blocks_share_one_normalisation():
    metric = torch.diag(torch.tensor([1.0, 1.0, 9.0, 9.0], dtype=torch.float64))
    klt = weighted_klt(torch.eye(4).double(), metric, 2, floor=1e-6)
    assert klt.variances.tolist() == pytest.approx([1.8, 1.8, 0.2, 0.2], rel=1e-4)
    assert klt.block_of.tolist() == [1, 1, 0, 0]


def test_singular_inputs_stay_invertible():
    for metric in (spd(16, 4, rank=2), torch.zeros(16, 16).double()):
        klt = weighted_klt(spd(16, 5, rank=3), metric)
        assert torch.allclose(klt.forward @ klt.inverse, torch.eye(16), atol=1e-4)
        assert klt.variances[3:].max() < 1e-9 * klt.variances[0]


def test_a_head_of_rounding_noise_is_no_error():
    noise = torch.diag(torch.tensor([1.0, 1.0, 1e-17, -1e-17], dtype=torch.float64))
    for klt in (weighted_klt(noise, spd(4, 11), 2), weighted_klt(spd(4, 11), noise, 2)):
        assert torch.allclose(klt.forward @ klt.inverse, torch.eye(4), atol=1e-4)
        assert bool((klt.variances >= 0).all())


def test_sign_and_result_are_reproducible():
    covariance, metric = spd(16, 6), spd(16, 7)
    klt = weighted_klt(covariance, metric)
    peaks = klt.forward.gather(0, klt.forward.abs().argmax(0, keepdim=True))
    assert bool((peaks > 0).all())
    assert torch.equal(klt.forward, weighted_klt(covariance, 4 * metric).forward)


def test_beats_the_unweighted_transform_in_the_weighted_error_of_few_coefficients():
    covariance, metric = spd(32, 8, decay=0.9), spd(32, 9, decay=0.8)
    metric = metric / metric.diagonal().mean() + 1e-3 * torch.eye(32).double()

    def weighted_error(klt, kept):
        matrix = (klt.forward[:, :kept] @ klt.inverse[:kept]).double()
        lost = torch.eye(32).double() - matrix
        return float((lost.T @ covariance @ lost @ metric).trace())

    weighted = weighted_klt(covariance, metric, floor=1e-12)
    plain = weighted_klt(covariance, torch.eye(32).double(), floor=1e-12)
    for kept in (2, 4, 8):
        assert weighted_error(weighted, kept) < 0.95 * weighted_error(plain, kept)


def test_shrinkage():
    covariance = spd(6, 10)
    assert torch.equal(shrink_covariance(covariance, 0.0), covariance)
    white = shrink_covariance(covariance, 1.0)
    assert torch.allclose(white, covariance.diagonal().mean() * torch.eye(6).double())
    half = shrink_covariance(covariance, 0.5)
    assert torch.allclose(half, (covariance + white) / 2)
    with pytest.raises(ConfigError, match=r"0\.\.1"):
        shrink_covariance(covariance, 1.5)


def test_bad_input_is_refused():
    eye = torch.eye(4).double()
    for bad in (eye[:3], eye.float(), eye[0]):
        with pytest.raises(ShapeError):
            weighted_klt(bad, bad)
        with pytest.raises(ShapeError):
            symmetric_root(bad)
    with pytest.raises(ShapeError, match="one shape"):
        weighted_klt(eye, torch.eye(5).double())
    with pytest.raises(ShapeError, match="at least one row"):
        weighted_klt(eye[:0, :0], eye[:0, :0])
    for blocks in (0, 3, -1):
        with pytest.raises(ConfigError, match="divide 4"):
            weighted_klt(eye, eye, blocks)
    for floor in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="floor"):
            weighted_klt(eye, eye, floor=floor)
    mixed = torch.diag(torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64))
    for matrices in ((eye, -eye), (-eye, eye), (eye, mixed), (mixed, eye), (eye * float("nan"), eye)):
        with pytest.raises(InputError):
            weighted_klt(*matrices)


# --- two stages -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "blocks", "first"), [(24, 3, 5), (24, 3, 0), (24, 24, 4), (32, 4, 32), (6, 1, 2)]
)
def test_two_stages_are_complete_and_their_errors_add_up(n, blocks, first):
    covariance, metric, floor = spd(n, 2) + 0.01 * torch.eye(n).double(), spd(n, 3, decay=0.9), 1e-2
    klt = two_stage_klt(covariance, metric, blocks, first, floor)
    assert klt.forward.shape == (n, first + n)
    assert klt.inverse.shape == (first + n, n)
    assert bool((klt.variances.diff() <= 0).all())
    forward, inverse = klt.forward.double(), klt.inverse.double()
    assert torch.allclose(forward @ inverse, torch.eye(n).double(), atol=2e-5)

    width = n // blocks
    of_first = klt.block_of == -1
    assert int(of_first.sum()) == first
    assert sorted(klt.block_of[~of_first].tolist()) == sorted(list(range(blocks)) * width)
    # A coefficient of the second stage is decoded within its head.
    outside = (torch.arange(n)[:, None] // width != klt.block_of) & ~of_first
    assert bool((klt.inverse.T[outside] == 0).all())

    # Each coefficient has the variance that it says; stages are uncorrelated; so is each head in itself.
    moments = forward.T @ covariance @ forward
    tolerance = 3e-6 * float(klt.variances[0])
    assert torch.allclose(moments.diagonal(), klt.variances, atol=tolerance)
    one_group = (klt.block_of[:, None] == klt.block_of) | of_first | of_first[:, None]
    assert float((moments - moments.diagonal().diag())[one_group].abs().max()) < tolerance

    # The metric's squared error of independent errors is the sum of their squares.
    blocked = (metric / metric.diagonal().mean()) * torch.block_diag(*[torch.ones(width, width)] * blocks)
    lengths = (inverse @ (blocked + floor * torch.eye(n).double()) @ inverse.T).diagonal()
    assert torch.allclose(lengths, torch.ones(first + n).double(), atol=1e-5)


def test_a_first_stage_of_nothing_is_the_transform_per_head():
    covariance, metric = spd(24, 6), spd(24, 7)
    plain, staged = weighted_klt(covariance, metric, 3), two_stage_klt(covariance, metric, 3, 0)
    assert torch.allclose(plain.variances, staged.variances, rtol=1e-9, atol=1e-12)
    assert torch.allclose(plain.forward, staged.forward, atol=1e-5)


def test_a_first_stage_takes_what_heads_have_in_common():
    # Two heads that are nearly copies: one coefficient for both leaves next to nothing in each.
    head = spd(4, 8, rank=1)
    covariance = torch.cat([torch.cat([head, head], 1)] * 2) + 1e-4 * torch.eye(8).double()
    eye = torch.eye(8).double()
    apart = weighted_klt(covariance, eye, 2).variances
    staged = two_stage_klt(covariance, eye, 2, 1).variances
    assert float(apart[1]) > 0.4 * float(staged[0])
    assert float(staged[1]) < 1e-3 * float(staged[0])


@pytest.mark.parametrize("first", [-1, 5])
def test_a_first_stage_out_of_range_is_refused(first):
    eye = torch.eye(4).double()
    with pytest.raises(ConfigError, match="0 to 4"):
        two_stage_klt(eye, eye, 2, first)
