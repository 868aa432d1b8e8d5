"""Operands folded from a codec do what the codec does."""

import dataclasses

import pytest
import torch
from codec_cases import LAYERS, random_layers

from aquakv.errors import ConfigError
from aquakv.kernels import PagedCodes, PageRotary, attend_codes, pack_records
from aquakv.kernels.from_codec import coefficient_heads, decode_operands
from tiny_models import codec_for, variant


def close(actual, expected):
    """Compare float32 products of 64 to 192 terms with such products in another order."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=3e-5 * float(expected.abs().max()))


def history_of(layer, tokens, random):
    """Return random reconstructed keys of the layer before, and the latent that they give."""
    if layer.keys.predictor is None:
        return (), None
    from aquakv.codec import Reconstruction

    before = torch.randn(tokens, layer.features, generator=random)
    return (Reconstruction(before, before),), layer.keys.predictor.latent((before,))


@pytest.mark.parametrize("name", LAYERS)
def test_decoding_with_folded_operands_attends_to_what_the_codec_reconstructs(name):
    shape = LAYERS[name]
    layer, following = random_layers(shape)
    random = torch.Generator().manual_seed(1)
    tokens, heads, dim = 128, shape.heads, shape.head_dim
    history, latent = history_of(layer, tokens, random)
    keys, values = (shape.spread * torch.randn(tokens, shape.features, generator=random) for _ in range(2))
    codes, hat = layer.encode(layer.keys.mean + keys, layer.values.mean + values, history)
    operands = decode_operands(layer, following, num_kv_heads=heads, dtype=torch.float32)

    def records(part, encoded, layout):
        scales = encoded.scales[:, 0] if encoded.scales.shape[1] else encoded.scales.new_full((tokens,), 128)
        return pack_records(part.quantizer.unpack(encoded.words), scales, layout)

    packed = PagedCodes(
        records(layer.keys, codes.keys, operands.keys.layout),
        records(layer.values, codes.values, operands.values.layout),
        torch.arange(2, dtype=torch.int32)[None],
        torch.tensor([tokens], dtype=torch.int32),
    )
    latents = None
    if latent is not None:
        latents = torch.nn.functional.pad(latent, (0, operands.latent_width - shape.rank))[None]
    query = torch.randn(1, heads, dim, generator=random)
    still = PageRotary.build(torch.zeros(dim // 2), torch.zeros(1, 2), dtype=torch.float32)
    got = attend_codes(query, packed, latents, operands, still, scaling=dim**-0.5)
    own_keys, own_values = (
        (h + c.mean).view(tokens, heads, dim) for h, c in ((hat.keys, layer.keys), (hat.values, layer.values))
    )
    weights = (torch.einsum("hd,thd->ht", query[0], own_keys) * dim**-0.5).softmax(-1)
    close(got.out[0], torch.einsum("ht,thd->hd", weights, own_values))
    if following is None:
        assert got.next_latents is None
    else:
        expected = following.keys.predictor.latent((hat.keys,))
        close(got.next_latents[0, :, : shape.next_rank], expected)


def test_other_codecs_are_refused():
    paper = codec_for("llama", "paper", 2).layers
    with pytest.raises(ConfigError, match="does not tell its heads"):
        decode_operands(paper[0], paper[1])
    with pytest.raises(ConfigError, match="rank None of previous_keys"):
        decode_operands(paper[1], None, num_kv_heads=2)
    with pytest.raises(ConfigError, match="keys with a klt transform"):
        decode_operands(paper[0], None, num_kv_heads=2)
    mixed = variant("two-stage").layers
    with pytest.raises(ConfigError, match="some that mix heads"):
        decode_operands(mixed[0], mixed[1])
    layer, _ = random_layers(LAYERS["plain"])
    with pytest.raises(ConfigError, match="divides 128 features, got 3"):
        decode_operands(layer, None, num_kv_heads=3)
    quantizer = dataclasses.replace(layer.keys.quantizer, arithmetic=False)
    tables = dataclasses.replace(layer, keys=dataclasses.replace(layer.keys, quantizer=quantizer))
    with pytest.raises(ConfigError, match="keys with levels by a cubic"):
        decode_operands(tables, None)
    inputs = dataclasses.replace(layer.inputs, value_inputs=("keys", "previous_values"))
    with pytest.raises(ConfigError, match="from keys only, got keys, previous_values"):
        decode_operands(dataclasses.replace(layer, inputs=inputs), None)


def test_a_coefficient_belongs_to_the_head_that_it_describes():
    layer = codec_for("llama", "decode").layers[0]
    heads = coefficient_heads(layer.keys.transform, 2)
    synthesis = layer.keys.transform.synthesis.view(-1, 2, 16)
    assert set(heads.tolist()) == {0, 1}
    for own, head in zip(synthesis, heads.tolist(), strict=True):
        assert own[head].abs().sum() > 0
        assert own[1 - head].abs().sum() == 0
