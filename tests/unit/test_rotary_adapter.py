import sys

import pytest
import torch
from transformers import PhiConfig, PhiForCausalLM
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as apply_interleaved
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from aquakv import AquaCache
from aquakv.cache import AquaLayer
from aquakv.errors import CacheStateError, UnsupportedModelError
from aquakv.evaluation.single_pass import single_pass
from aquakv.models.adapter import adapt
from aquakv.models.rotary import RotaryLayout, RotaryTables, rotate, unrotate
from tiny_models import VOCAB, WINDOW, build, codec_for, feed, random_tokens, shared


def _tables(tokens, half, scale=1.0, dtype=torch.float32):
    angles = torch.outer(torch.arange(tokens) * 37.0, 10000.0 ** -(torch.arange(half) / half))
    cos, sin = ((scale * f(torch.cat([angles, angles], -1))).to(dtype)[None] for f in (torch.cos, torch.sin))
    return cos, sin


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1.3466])
@pytest.mark.parametrize(("head_dim", "half"), [(16, 8), (10, 5), (16, 4), (10, 1), (80, 16)])
def test_unrotate_undoes_rotate(head_dim, half, scale, dtype):
    tables = RotaryTables.from_model(*_tables(23, half, scale, dtype))
    vectors = torch.randn(23, 3, head_dim, generator=torch.Generator().manual_seed(0))
    before = vectors.clone()
    turned = rotate(vectors, tables)
    # float32 throughout, whatever the tables were rounded to: a few roundings of numbers below 6.
    torch.testing.assert_close(unrotate(turned, tables), vectors, atol=3e-6, rtol=0)
    torch.testing.assert_close(rotate(unrotate(vectors, tables), tables), vectors, atol=3e-6, rtol=0)
    assert torch.equal(turned[..., 2 * half :], vectors[..., 2 * half :])
    assert torch.equal(vectors, before)
    # Lengths grow by the attention scaling (bfloat16 tables are 0.4 % off).
    norms = turned[..., : 2 * half].norm(dim=-1) / vectors[..., : 2 * half].norm(dim=-1)
    torch.testing.assert_close(norms, torch.full_like(norms, scale), rtol=1e-2, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_rotate_is_what_transformers_does(dtype):
    cos, sin = _tables(23, 5)
    vectors = torch.randn(1, 3, 23, 10, generator=torch.Generator().manual_seed(0)).to(dtype)
    theirs = apply_rotary_pos_emb(vectors.float(), vectors.float(), cos, sin)[1]
    ours = rotate(vectors[0].transpose(0, 1), RotaryTables.from_model(cos, sin))
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.transpose(0, 1)[None], theirs, atol=1e-6, rtol=0)


def test_rotating_strided_and_no_tokens():
    tables = RotaryTables.from_model(*_tables(23, 5))
    vectors = torch.randn(3, 10, 46, generator=torch.Generator().manual_seed(0))
    strided = vectors[:, :, ::2].permute(2, 0, 1)
    assert torch.equal(rotate(strided, tables), rotate(strided.contiguous(), tables))
    assert rotate(strided[:0], RotaryTables(tables.cos[:0], tables.sin[:0])).shape == (0, 3, 10)


# Every supported architecture is a row of tests/compatibility.


def test_a_hybrid_models_sliding_layers_stay_as_they_are():
    model = shared("gemma3")
    adapter = adapt(model)
    assert adapter.compressed_layers == (1, 3)
    cache = AquaCache(model, codec_for("gemma3"))
    kinds = [DynamicSlidingWindowLayer, AquaLayer] * 2
    assert all(isinstance(layer, kind) for layer, kind in zip(cache.layers, kinds, strict=True))
    feed(model, cache, random_tokens(2, 43), [40, 3])
    footprint = cache.footprint()
    assert footprint.coded_values == 2 * 40 * 2 * 30 * 2
    # Two sliding layers, the 6 tokens before the next one, keys and values; storages may be larger views.
    assert footprint.other_layer_bytes >= 2 * 2 * 2 * 6 * 30 * 4
    assert len(codec_for("gemma3").layers) == 2
    assert footprint.exact_cache_bytes == 2 * 43 * 2 * 30 * 2 * 4


def test_a_hybrid_cache_can_be_reordered_and_reset():
    model, codec = shared("gemma3", torch.float64), codec_for("gemma3")
    tokens = random_tokens(3, 43, seed=2)
    cache = AquaCache(model, codec)
    feed(model, cache, tokens[:, :30], [30])
    cache.batch_select_indices(torch.tensor([2, 0, 2]))
    expected = feed(model, AquaCache(model, codec), tokens[[2, 0, 2]], [30, 13])
    got = feed(model, cache, tokens[[2, 0, 2], 30:], [13])
    torch.testing.assert_close(got, expected[:, 30:], atol=1e-9, rtol=0)
    cache.reset()
    again = feed(model, cache, tokens[[2, 0, 2]], [30, 13])
    torch.testing.assert_close(again, expected, atol=1e-9, rtol=0)


def test_partial_rotary_embedding_leaves_the_rest_of_the_head():
    torch.manual_seed(0)
    config = PhiConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        rope_parameters={"rope_theta": 10000.0, "partial_rotary_factor": 0.5, "rope_type": "default"},
        max_position_embeddings=128,
        eos_token_id=None,
        bos_token_id=None,
        initializer_range=0.1,
    )
    from aquakv import calibrate, preset

    model = PhiForCausalLM(config).eval().requires_grad_(False)
    adapter = adapt(model)
    tables = adapter.rotary_tables(torch.arange(4), 0, torch.float32, torch.device("cpu"))
    assert 2 * tables.cos.shape[-1] == 8 < adapter.head_dim == 16
    codec = calibrate(model, random_tokens(8, 48), preset("paper", 8))
    model.double()
    tokens = random_tokens(1, 43)
    cache = AquaCache(model, codec, window=WINDOW)
    logits = feed(model, cache, tokens, [1] * 43)
    assert cache.layout.coded == [40]
    with single_pass(adapter, codec, WINDOW) as one:
        expected = model(tokens, past_key_values=one, use_cache=True).logits
    torch.testing.assert_close(logits, expected, atol=1e-9, rtol=0)
    # 8-bit codes: relative errors of 0.6 %; keys turned wrongly are off by their own size.
    assert (logits - model(tokens).logits).abs().max() < 0.05


def test_neighbours_are_rotated_as_glm_does():
    cos, sin = _tables(23, 5)
    vectors = torch.randn(1, 3, 23, 12, generator=torch.Generator().manual_seed(0))
    theirs = apply_interleaved(vectors, vectors, cos, sin)[1][0].transpose(0, 1)
    tables = RotaryTables.from_model(cos, sin, RotaryLayout(interleaved=True))
    plain = vectors[0].transpose(0, 1)
    torch.testing.assert_close(rotate(plain, tables), theirs, atol=1e-6, rtol=0)
    torch.testing.assert_close(unrotate(theirs, tables), plain, atol=3e-6, rtol=0)
    nothing = tables.turning_nothing()
    assert torch.equal(rotate(plain, nothing), plain)
    assert torch.equal(unrotate(plain, nothing), plain)


@pytest.mark.parametrize(
    ("kind", "layout", "unrotated"),
    [
        ("llama", RotaryLayout(), set()),
        ("gpt-oss", RotaryLayout(tables="once"), set()),
        ("glm4", RotaryLayout(interleaved=True), set()),
        ("cohere", RotaryLayout(interleaved=True, tables="neighbours"), set()),
        ("smollm3", RotaryLayout(), {1, 3}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layouts_are_found(kind, layout, unrotated, dtype):
    adapter = adapt(shared(kind, dtype))
    assert (adapter.layout, adapter.unrotated) == (layout, unrotated)
    assert adapter.rotates_by_halves == (not layout.interleaved and not unrotated)


def test_attention_that_rotates_in_no_known_way_is_refused(monkeypatch):
    model = build("llama")
    module = sys.modules[type(model).__module__]
    monkeypatch.setattr(module, "apply_rotary_pos_emb", lambda q, k, cos, sin: (q * cos, k * (cos + sin)))
    with pytest.raises(UnsupportedModelError, match=r"'llama' is not supported: .*rotate keys in pairs"):
        adapt(model)


# --- frequencies that change ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama-dynamic", "phi3-longrope"])
def test_frequencies_that_change_are_refused_and_change_nothing(kind):
    model, codec = build(kind, dtype=torch.float64), codec_for(kind)
    tokens = random_tokens(1, 131, seed=3)
    cache = AquaCache(model, codec, window=WINDOW)
    feed(model, cache, tokens[:, :120], [120])
    with pytest.raises(CacheStateError, match=r"changes its frequencies, but the cache holds 120 tokens"):
        feed(model, cache, tokens[:, 120:], [11])
    assert cache.layout.columns == 120
    # What goes on within the length is as if nothing had been tried, though the model has other tables now.
    other = AquaCache(model, codec, window=WINDOW)
    expected = feed(model, other, tokens[:, :124], [120, 4])[:, 120:]
    positions = torch.arange(120, 124)[None]
    with torch.no_grad():
        got = model(tokens[:, 120:124], position_ids=positions, past_key_values=cache).logits
    torch.testing.assert_close(got, expected, atol=1e-9, rtol=0)


def test_a_sequence_that_begins_with_the_longer_frequencies_goes_on():
    model, codec = build("phi3-longrope", dtype=torch.float64), codec_for("phi3-longrope", bits=8)
    tokens = random_tokens(1, 150, seed=3)
    cache = AquaCache(model, codec, window=WINDOW)
    logits = feed(model, cache, tokens, [132, *[1] * 18])
    assert (logits - model(tokens).logits).abs().max() < 0.05
    assert cache.why_no_graphs() is not None


def test_adapter_facts():
    adapter = adapt(build("llama-odd"))
    assert (adapter.name, adapter.num_kv_heads, adapter.head_dim, adapter.features) == ("llama", 3, 10, 30)
    assert adapter.compressed_layers == (0, 1, 2)
    assert adapter.max_length == 256
