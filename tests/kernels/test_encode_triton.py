"""The Triton kernels of encoding against their definition: on a GPU, or in Triton's interpreter."""

import pytest
import torch
from codec_cases import LAYERS, history_of, random_layers, record_parts, tokens_of
from interpreted import DEVICE, INTERPRETED, on_this_device

from aquakv.kernels import PagedCodes, PageLayout
from aquakv.kernels.encode import EncodeOperands, encode
from aquakv.kernels.from_codec import decode_operands, encode_operands
from aquakv.kernels.scores import next_latents
from aquakv.numerics import cubic_level_table

pytest.importorskip("triton", reason="needs triton")


#: On a GPU products are summed in another order. How many of the coefficients may lie so near the middle of
#: two levels that this decides, and how many scales so near that between two codes. In float16 cuBLAS may
#: round parts of a sum, and the coefficient itself to either of two neighbours. The interpreter's sums are
#: torch's.
TIES = dict.fromkeys((torch.float32, torch.float16), 0.0)
if not INTERPRETED:
    TIES = {torch.float32: 1e-4, torch.float16: 5e-3}


@on_this_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", LAYERS)
def test_kernels_equal_their_definition(name, dtype):
    shape = LAYERS[name]
    layer, following = random_layers(shape, seed=7)
    random = torch.Generator().manual_seed(8)
    tokens = 128 if INTERPRETED else 2048
    _, latent = history_of(layer, tokens, random, shape.spread)
    keys, values = tokens_of(layer, tokens, random, shape.spread)
    keys[5] = layer.keys.mean
    keys[70, 3] = torch.nan
    values[9, 0] = torch.inf
    operands = encode_operands(layer, following, num_kv_heads=shape.heads, dtype=dtype).to(DEVICE)
    if latent is not None:
        latent[77, 1] = torch.nan
        latent = torch.nn.functional.pad(latent, (0, operands.latent_width - shape.rank)).to(DEVICE)
    # Numbers that a model has: bfloat16 keys.
    keys, values = keys.bfloat16().to(DEVICE), values.bfloat16().to(DEVICE)
    expected = encode(keys, values, latent, operands, backend="torch")
    got = encode(keys, values, latent, operands, backend="triton")
    same_tokens = torch.ones(tokens, dtype=torch.bool)
    for kind, described in (("key_pages", operands.keys), ("value_pages", operands.values)):
        ours, theirs = (record_parts(getattr(r, kind).cpu(), described.layout) for r in (got, expected))
        assert torch.equal(ours[2], theirs[2])
        assert torch.equal(ours[1] == 255, theirs[1] == 255)
        # A token's codes follow from its scale, and those of its values from those of its keys.
        same = ours[1] == theirs[1]
        assert (~same)[same_tokens].double().mean() <= 2 * TIES[dtype]
        same &= same_tokens
        differ = (ours[0] != theirs[0])[same]
        if differ.numel():
            assert differ.double().mean() <= TIES[dtype]
            assert (ours[0].int() - theirs[0].int())[same].abs().max() <= 1
            assert theirs[0].unique().numel() > 1
        same_tokens = same & (ours[0] == theirs[0]).all(1)
    # Tokens with equal codes have the same latents and errors.
    assert same_tokens.all() or not INTERPRETED
    assert same_tokens.double().mean() > 0.3
    tolerance = {"rtol": 2e-3, "atol": 1e-3} if dtype == torch.float16 else {"rtol": 1e-4, "atol": 1e-5}
    for ours, theirs in ((got.next_latents, expected.next_latents), (got.excess, expected.excess)):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.dtype == theirs.dtype
            ours, theirs = ours.cpu()[same_tokens].float(), theirs.cpu()[same_tokens].float()
            torch.testing.assert_close(ours, theirs, equal_nan=True, **tolerance)


@on_this_device
def test_every_width_finds_the_nearest_level():
    widths = tuple(8 - i // 8 for i in range(64))  # each field mixes two
    layout, nothing = PageLayout(widths, (0,) * 64, 1), PageLayout((), (), 1)
    identity, none = torch.eye(64, dtype=torch.float64), torch.zeros(64, dtype=torch.float64)
    operands = EncodeOperands.build(
        layout,
        nothing,
        key_analysis=identity,
        key_synthesis=identity,
        key_offset=none,
        key_bias=none,
        value_analysis=torch.zeros(64, 0),
        value_synthesis=torch.zeros(0, 64),
        value_offset=none,
        dtype=torch.float32,
    ).to(DEVICE)
    random = torch.Generator().manual_seed(14)
    # In each token the coefficients of one width reach further than the levels do.
    tokens = 512 if INTERPRETED else 2048
    keys = 0.5 * torch.randn(tokens, 8, 8, generator=random)
    index = torch.arange(tokens)
    keys[index, index % 8] = 10 * torch.rand(tokens, 8, generator=random) - 5
    keys = keys.flatten(1)
    keys[0], keys[1, ::2] = 0.0, -0.0
    keys[2] = 1000 * keys[2]
    got = encode(keys.to(DEVICE), keys.to(DEVICE), None, operands, backend="triton")
    codes, scales, _ = record_parts(got.key_pages.cpu(), layout)
    assert (record_parts(got.value_pages.cpu(), nothing)[1] == 128).all()
    relative = keys.double() / 2.0 ** ((scales[:, None].double() - 128) / 16)
    for i, width in enumerate(widths):
        levels = cubic_level_table(width).double()
        distance = (relative[:, i, None] - levels).abs()
        own = distance.gather(1, codes[:, i, None].long())[:, 0]
        assert (own <= distance.amin(1) + 1e-6 * levels.max()).all()
        if i % 8 == 0:
            seen = codes[:, i : i + 8].unique()
            assert seen[0] == 0
            assert seen[-1] == (1 << width) - 1
            assert len(seen) > 0.9 * (1 << width)


@on_this_device
def test_no_tokens_give_no_pages():
    layer, following = random_layers(LAYERS["plain"])
    operands = encode_operands(layer, following).to(DEVICE)
    nothing = torch.zeros(0, 128, device=DEVICE)
    got = encode(nothing, nothing, torch.zeros(0, 16, device=DEVICE), operands, backend="triton")
    assert got.key_pages.shape == (0, operands.keys.layout.record_bytes)
    assert got.next_latents.shape == (0, 32)
    assert got.excess.shape == (0,)


@on_this_device
@pytest.mark.parametrize("name", ["plain", "first and wide", "all coefficients"])
def test_encoder_and_decoder_carry_the_same_latents(name):
    shape = LAYERS[name]
    layer, following = random_layers(shape, seed=9)
    random = torch.Generator().manual_seed(10)
    _, latent = history_of(layer, 128, random)
    keys, values = (t.to(DEVICE) for t in tokens_of(layer, 128, random))
    operands = encode_operands(layer, following).to(DEVICE)
    if latent is not None:
        latent = torch.nn.functional.pad(latent, (0, operands.latent_width - shape.rank)).half().to(DEVICE)
    got = encode(keys, values, latent, operands, backend="triton")
    table = torch.arange(2, dtype=torch.int32, device=DEVICE)[None]
    lengths = torch.tensor([128], dtype=torch.int32, device=DEVICE)
    codes = PagedCodes(got.key_pages, got.value_pages, table, lengths)
    latents = None if latent is None else latent[None]
    decoder = decode_operands(layer, following).to(DEVICE)
    (expected,) = next_latents(codes, latents, decoder, backend="triton")
    assert got.next_latents.dtype == expected.dtype == torch.float16
    # Sums in another order, rounded to the same float16 or its neighbour.
    assert (got.next_latents == expected).double().mean() > 0.9
    size = float(expected.float().abs().max())
    torch.testing.assert_close(got.next_latents, expected, rtol=2**-10, atol=2**-12 * size)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_encoding_can_be_captured():
    layer, following = random_layers(LAYERS["first and wide"])
    operands = encode_operands(layer, following).to("cuda")
    keys, values = torch.randn(2, 256, layer.features, device="cuda").bfloat16()
    encode(keys, values, None, operands)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = encode(keys, values, None, operands)
    keys.copy_(keys.flip(0))
    graph.replay()
    again = encode(keys, values, None, operands)
    assert torch.equal(captured.key_pages, again.key_pages)
    assert torch.equal(captured.value_pages, again.value_pages)
