"""Random layers of the decode preset, calibrated in their structure though not on data."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from aquakv.codec import (
    AffinePredictor,
    LayerCodec,
    LinearTransform,
    OutlierGuard,
    Reconstruction,
    ScalarQuantizer,
    TensorCodec,
)
from aquakv.config import PredictorConfig
from aquakv.kernels import record_attended, record_planes, record_scales, unpack_pages
from aquakv.numerics import packed_words, symmetric_root, unpack, weighted_klt

#: Counts of coefficients by falling width, whole bytes for each.
KEY_COUNTS = {8: 1, 6: 4, 5: 8, 4: 10, 3: 16, 2: 20, 1: 24}
VALUE_COUNTS = {7: 8, 4: 14, 3: 8, 2: 24, 1: 32}

INPUTS = PredictorConfig(value_inputs=("keys",), first_layer_values=True, key_rank=64)


@dataclass(frozen=True)
class LayerShape:
    """What random layers are like; counts of coefficients are cut to what there is."""

    heads: int = 2
    head_dim: int = 64
    rank: int = 16
    next_rank: int = 24
    key_counts: tuple[tuple[int, int], ...] = tuple(KEY_COUNTS.items())
    value_counts: tuple[tuple[int, int], ...] = tuple(VALUE_COUNTS.items())
    guard: bool = True
    value_rank: int | None = None
    spread: float = 1.0

    @property
    def features(self) -> int:
        return self.heads * self.head_dim


LAYERS = {
    "plain": LayerShape(),
    "first and wide": LayerShape(rank=0, head_dim=128, next_rank=64),
    "last, one head": LayerShape(heads=1, next_rank=0, rank=64),
    "three heads, no guard": LayerShape(heads=3, guard=False, value_rank=8),
    "heads of 256": LayerShape(heads=1, head_dim=256, rank=40, next_rank=10),
    "all coefficients": LayerShape(key_counts=((2, 64), (1, 64)), value_counts=((3, 64), (1, 64))),
    "no key codes": LayerShape(key_counts=()),
    "no value codes": LayerShape(value_counts=()),
    "small numbers": LayerShape(spread=1e-3),
}


def random_covariance(width, random, spread):
    """Return a covariance with a steep spectrum, float64."""
    basis = torch.linalg.qr(torch.randn(width, width, generator=random, dtype=torch.float64))[0]
    return (basis * spread**2 * 30.0 ** -torch.linspace(0, 2, width, dtype=torch.float64)) @ basis.T


def tensor_codec(shape, counts, blocks, mean, predictor, random):
    """Return keys' or values' codec, with the transform that some covariance and metric have."""
    heads, dim, width = shape.heads, shape.head_dim, shape.features
    factors = torch.randn(heads, dim, 2 * dim, generator=random, dtype=torch.float64)
    weights = factors @ factors.mT
    weights = weights / weights.diagonal(dim1=1, dim2=2).mean() + 0.05 * torch.eye(dim, dtype=torch.float64)
    covariance = random_covariance(width, random, shape.spread)
    klt = weighted_klt(covariance, torch.block_diag(*weights), heads if blocks else None, floor=1e-9)
    widths = [w for w, n in counts for _ in range(n)][:width]
    while widths and any(widths.count(w) * w % 8 for w in set(widths)):
        widths.pop()
    n = len(widths)
    deviations = klt.variances[:n].sqrt().float()
    guard = None
    if shape.guard:
        roots = torch.stack([symmetric_root(block) for block in weights])
        guard = OutlierGuard(roots.float(), torch.tensor([0.3 * shape.spread**2 * dim]))
    transform = LinearTransform(klt.forward[:, :n].contiguous(), klt.inverse[:n].contiguous())
    quantizer = ScalarQuantizer(deviations, torch.tensor(widths, dtype=torch.uint8), True)
    return TensorCodec(mean, predictor, transform, quantizer, guard)


def random_layer(shape, rank, random):
    """Return a layer whose key predictor has a rank; 0 for none."""
    width, spread = shape.features, shape.spread

    def normal(*size, scale=1.0):
        return scale * torch.randn(*size, generator=random)

    predictor = None
    if rank:
        down = normal(width, rank, scale=width**-0.5).bfloat16()
        up = normal(rank, width, scale=0.5 * rank**-0.5).bfloat16()
        predictor = AffinePredictor((down, up), normal(width, scale=spread))
    keys = tensor_codec(shape, shape.key_counts, True, normal(width, scale=5 * spread), predictor, random)
    ranks = [width, width] if shape.value_rank is None else [width, shape.value_rank, width]
    factors = tuple(normal(a, b, scale=0.5 * a**-0.5).bfloat16() for a, b in pairwise(ranks))
    predictor = AffinePredictor(factors, normal(width, scale=spread))
    values = tensor_codec(shape, shape.value_counts, False, normal(width, scale=spread), predictor, random)
    return LayerCodec(keys, values, INPUTS)


def random_layers(shape, seed=0):
    """Return a layer's codec and the next one's, which is None if the shape has no next rank."""
    random = torch.Generator().manual_seed(seed)
    layer = random_layer(shape, shape.rank, random)
    return layer, random_layer(shape, shape.next_rank, random) if shape.next_rank else None


def plain_codes(quantizer, words):
    """Return the codes, ``[tokens, n]`` uint8, of a scalar quantiser's bytes."""
    parts = [words.new_zeros(len(words), 0)]
    for segment in quantizer.segments:
        count = segment.coefficients.stop - segment.coefficients.start
        stored = words.new_zeros(len(words), 4 * packed_words(count, segment.width))
        stored[:, : segment.stored.stop - segment.stored.start] = words[:, segment.stored]
        parts.append(unpack(stored.view(torch.int32), segment.width, count))
    return torch.cat(parts, 1)


def history_of(layer, tokens, random, spread=1.0):
    """Return random reconstructed keys of the layer before, and the latent that they give."""
    if layer.keys.predictor is None:
        return (), None
    before = spread * torch.randn(tokens, layer.features, generator=random)
    return (Reconstruction(before, before),), layer.keys.predictor.latent((before,))


def tokens_of(layer, tokens, random, spread=1.0):
    """Return keys and values around the layer's means."""
    offsets = (spread * torch.randn(tokens, layer.features, generator=random) for _ in range(2))
    return [codec.mean + o for codec, o in zip((layer.keys, layer.values), offsets, strict=True)]


def record_parts(records, layout):
    """Return codes, scale codes and which tokens are attended to of records."""
    assert not records[:, -8:].any()
    codes = unpack_pages(record_planes(records, layout), layout)
    return codes, record_scales(records).flatten(), record_attended(records).flatten()
