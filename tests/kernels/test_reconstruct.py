"""Reconstruction from pages and of grids: definitions against the codec, kernels against definitions."""

import pytest
import torch
from codec_cases import LAYERS, history_of, random_layers, tokens_of
from interpreted import DEVICE, INTERPRETED, on_this_device

from aquakv.codec import EncodedVectors, GridQuantizer
from aquakv.errors import ShapeError
from aquakv.kernels.encode import encode
from aquakv.kernels.from_codec import encode_operands, reconstruct_operands
from aquakv.kernels.reconstruct import grid_coefficients, reconstruct, reconstruct_grid
from aquakv.numerics import load_grid
from tiny_models import codec_for

#: Features, group and grid (dimension, points): all widths, a straddling last code, several groups.
GRIDS = [
    (64, 64, 2, 16),
    (48, 24, 2, 64),
    (200, 40, 2, 256),
    (40, 8, 1, 2),
    (36, 12, 1, 32),
    (14, 14, 1, 128),
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

#: Triton's interpreter cuts float32 off to bfloat16 instead of rounding it, so that nothing is equal there.
ROUNDED = DTYPES[:2] if INTERPRETED else DTYPES

#: Levels, matrices and results are rounded to the dtype. The largest error relative to the largest number.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def close(actual, expected, tolerance):
    assert actual.shape == expected.shape
    assert torch.equal(actual.isnan(), expected.isnan())
    difference = (actual.double() - expected.double()).nan_to_num()
    assert float(difference.abs().max()) <= tolerance * float(expected.double().nan_to_num().abs().max())


def encoded_case(name, tokens=128):
    """Return a layer, its history, its tokens' records and the latents, padded."""
    shape = LAYERS[name]
    layer, _ = random_layers(shape, seed=11)
    random = torch.Generator().manual_seed(12)
    history, latent = history_of(layer, tokens, random, shape.spread)
    keys, values = tokens_of(layer, tokens, random, shape.spread)
    operands = encode_operands(layer, None, num_kv_heads=shape.heads, dtype=torch.float32)
    if latent is not None:
        latent = torch.nn.functional.pad(latent, (0, operands.latent_width - shape.rank))
    return layer, history, (keys, values), latent, encode(keys, values, latent, operands)


@pytest.mark.parametrize("name", LAYERS)
def test_records_stand_for_what_the_codec_reconstructs(name):
    layer, history, (keys, values), latent, got = encoded_case(name)
    operands = reconstruct_operands(layer, num_kv_heads=LAYERS[name].heads, dtype=torch.float32)
    _, hat = layer.encode(keys, values, history)
    centred = reconstruct(*got[:2], latent, operands, centred=True)
    whole = reconstruct(*got[:2], latent, operands)
    for ours, centred_ours, theirs, codec in zip(
        whole, centred, hat, (layer.keys, layer.values), strict=True
    ):
        # All but the odd token, whose code lies on the other side of a tie.
        error = (centred_ours - theirs).abs().amax(1)
        assert float(error.quantile(0.97)) < 2e-6 * float(theirs.abs().max())
        torch.testing.assert_close(ours, centred_ours + codec.mean, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_dtypes_stay_near(dtype):
    layer, _, _, latent, got = encoded_case("plain")
    exact, narrow = (reconstruct_operands(layer, dtype=d) for d in (torch.float32, dtype))
    expected = reconstruct(*got[:2], latent, exact)
    for ours, theirs in zip(reconstruct(*got[:2], latent, narrow), expected, strict=True):
        assert ours.dtype == dtype
        close(ours, theirs, TOLERANCE[dtype])


def test_what_does_not_fit_is_refused():
    layer, _, _, latent, got = encoded_case("plain")
    operands = reconstruct_operands(layer)
    with pytest.raises(ShapeError, match="key_pages: expected contiguous uint8"):
        reconstruct(got.key_pages[:, 1:], got.value_pages, latent, operands)
    with pytest.raises(ShapeError, match="value_pages"):
        reconstruct(got.key_pages, got.value_pages[:1], latent, operands)
    with pytest.raises(ShapeError, match="some latents"):
        reconstruct(got.key_pages, got.value_pages, None, operands)
    with pytest.raises(ShapeError, match="latents"):
        reconstruct(got.key_pages, got.value_pages, latent[:64], operands)
    quantizer = GridQuantizer(64, 64, load_grid(2, 16))
    codes, _ = quantizer.quantize(torch.randn(3, 64))
    with pytest.raises(ShapeError, match="grid coefficients: words"):
        grid_coefficients(EncodedVectors(codes.words[:, 1:], codes.scales), quantizer, torch.float32)
    with pytest.raises(ShapeError, match="a codec with grids"):
        reconstruct_grid(layer.keys, codes, (), torch.float32)


def test_layers_with_grids_are_reconstructed_as_their_codec_does():
    layer = codec_for("llama", "paper", 3).layers[1]
    inputs = tuple(
        torch.randn(9, layer.features, generator=torch.Generator().manual_seed(0)) for _ in range(2)
    )
    for codec, given in ((layer.keys, inputs[:1]), (layer.values, inputs)):
        codes, hat = codec.encode(torch.randn(9, layer.features), given)
        torch.testing.assert_close(reconstruct_grid(codec, codes, given, torch.float32), hat)


@on_this_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYERS)
def test_kernels_equal_their_definition(name, dtype):
    layer, _, _, latent, got = encoded_case(name)
    operands = reconstruct_operands(layer, num_kv_heads=LAYERS[name].heads, dtype=dtype).to(DEVICE)
    key_pages, value_pages = got.key_pages.clone().to(DEVICE), got.value_pages.clone().to(DEVICE)
    key_pages[0, -80 + 5] = 255
    value_pages[1, -80 + 9] = 255
    latent = None if latent is None else latent.half().to(DEVICE)
    for centred in (False, True):
        arguments = (key_pages, value_pages, latent, operands)
        expected = reconstruct(*arguments, centred=centred, backend="torch")
        ours = reconstruct(*arguments, centred=centred, backend="triton")
        for one, other in zip(ours, expected, strict=True):
            assert one.dtype == dtype
            # The same numbers in another order of summation, then one rounding.
            close(one.cpu(), other.cpu(), max(3e-6, 2 * torch.finfo(dtype).eps))
        if operands.keys.layout.fields:
            assert ours.keys.isnan().any(1).nonzero().flatten().tolist() == [5]


@on_this_device
@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("grid", GRIDS)
def test_grid_kernel_equals_its_definition(grid, dtype):
    features, group, dim, points = grid
    quantizer = GridQuantizer(features, group, load_grid(dim, points, DEVICE))
    random = torch.Generator().manual_seed(1)
    numbers = torch.randn(37, features, generator=random) * torch.rand(37, 1, generator=random).exp2() ** 8
    numbers[3] = 0
    numbers[4, 0] = torch.nan
    codes, _ = quantizer.quantize(numbers.to(DEVICE))
    expected = grid_coefficients(codes, quantizer, dtype, backend="torch")
    ours = grid_coefficients(codes, quantizer, dtype, backend="triton")
    assert ours.dtype == dtype
    assert torch.equal(ours.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert expected[:3].unique().numel() > min(points, 5)
    assert grid_coefficients(codes.head(0), quantizer, dtype, backend="triton").shape == (0, features)


@on_this_device
def test_no_pages_give_no_tokens():
    layer, _, _, latent, got = encoded_case("plain")
    operands = reconstruct_operands(layer).to(DEVICE)
    pages = (records[:0].to(DEVICE) for records in got[:2])
    keys, values = reconstruct(*pages, latent[:0].to(DEVICE), operands, backend="triton")
    assert keys.shape == values.shape == (0, 128)
