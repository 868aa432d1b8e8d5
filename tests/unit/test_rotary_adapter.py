import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    DynamicCache,
    GlmConfig,
    GlmForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from aquakv import AquaCache
from aquakv.cache import AquaLayer
from aquakv.errors import UnsupportedModelError
from aquakv.evaluation.single_pass import single_pass
from aquakv.models.adapter import adapt
from aquakv.models.rotary import RotaryTables, rotate, unrotate
from tiny_models import (
    SUPPORTED,
    VOCAB,
    WINDOW,
    build,
    codec_for,
    decisive_prompts,
    feed,
    random_tokens,
    shared,
)


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


@pytest.mark.parametrize("kind", SUPPORTED)
def test_tables_are_the_models_own(kind):
    """Keys that the model rotated, rotated back, are the projection's output (after QK norm)."""
    model = shared(kind, torch.float64)
    adapter = adapt(model)
    layer = adapter.compressed_layers[0]
    attention, before = adapter.layers[layer].self_attn, []
    source = getattr(attention, "k_norm", attention.k_proj)
    handle = source.register_forward_hook(lambda module, args, output: before.append(output))
    keys = []

    class Spy(DynamicCache):
        def update(self, key_states, value_states, layer_idx, *args, **kwargs):
            keys.append(key_states)
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    positions = torch.tensor([[3, 4, 9, 60]])
    with torch.no_grad():
        model(random_tokens(1, 4), position_ids=positions, past_key_values=Spy(config=model.config))
    handle.remove()
    raw = before[0].reshape(4, -1) if before[0].ndim == 3 else None
    if raw is None:  # a norm over [rows, tokens, heads, dim], or with heads before tokens
        raw = before[0][0] if before[0].shape[1] == 4 else before[0][0].transpose(0, 1)
        raw = raw.reshape(4, -1)
    tables = adapter.rotary_tables(positions[0], layer, torch.float64, torch.device("cpu"))
    ours = unrotate(keys[layer][0].transpose(0, 1), tables).reshape(4, -1)
    # The rotation is undone in float32.
    torch.testing.assert_close(ours.double(), raw, atol=1e-5, rtol=0)


# --- every supported architecture -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SUPPORTED)
def test_streaming_equals_single_pass(kind):
    model, codec = shared(kind, torch.float64), codec_for(kind)
    tokens = random_tokens(2, 43, seed=3)
    with torch.no_grad(), single_pass(adapt(model), codec, WINDOW) as cache:
        expected = model(tokens, past_key_values=cache, use_cache=True).logits
    assert (expected - model(tokens).logits).abs().max() > 1e-3
    for sizes in ([1] * 43, [10, 8, 8, 3, 5, 8, 1]):
        logits = feed(model, AquaCache(model, codec), tokens, sizes)
        # The same float64 arithmetic in another order.
        torch.testing.assert_close(logits, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("kind", SUPPORTED)
def test_eight_bits_generate_what_the_exact_cache_does(kind):
    model, (prompts, expected) = shared(kind, torch.float64), decisive_prompts(kind, 2)
    cache = AquaCache(model, codec_for(kind, bits=8))
    out = model.generate(prompts, past_key_values=cache, max_new_tokens=32, do_sample=False)
    assert out.tolist() == expected.tolist()
    assert cache.layout.coded == [48, 48]
    assert cache.footprint().coded_values > 0


@pytest.mark.parametrize("kind", SUPPORTED)
def test_left_padding_changes_no_row(kind):
    model, codec = shared(kind, torch.float64), codec_for(kind)
    rows = [random_tokens(n, seed=n) for n in (31, 24)]
    tokens = torch.stack([rows[0], torch.cat([torch.zeros(7, dtype=torch.long), rows[1]])])
    mask = torch.tensor([[1] * 31, [0] * 7 + [1] * 24])
    together = feed(model, AquaCache(model, codec), tokens, [20, 5, 1, 5], mask)
    for i, sizes in ((0, [20, 5, 1, 5]), (1, [13, 5, 1, 5])):
        alone = feed(model, AquaCache(model, codec), rows[i][None], sizes)
        torch.testing.assert_close(together[i, -len(rows[i]) :], alone[0], atol=1e-9, rtol=0)


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


# --- what is refused --------------------------------------------------------------------------------------

_SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}


def _t5():
    return T5ForConditionalGeneration(
        T5Config(vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )


REFUSED = {
    "t5": (_t5, "encoder-decoder"),
    "gpt2": (
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=16, n_layer=2, n_head=2)),
        "decoder layers",
    ),
    "glm": (lambda: GlmForCausalLM(GlmConfig(**_SMALL, head_dim=16)), "pairs coordinates|interleav"),
    "cohere": (lambda: CohereForCausalLM(CohereConfig(**_SMALL)), "pairs coordinates|interleav"),
    "mistral": (lambda: MistralForCausalLM(MistralConfig(**_SMALL, sliding_window=8)), "sliding windows"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_be_compressed_are_refused_with_the_reason(name):
    make, reason = REFUSED[name]
    model = make().eval()
    for attempt in (lambda: adapt(model), lambda: AquaCache(model, codec_for("llama"))):
        with pytest.raises(UnsupportedModelError, match=f"'{name}' is not supported: .*({reason})") as error:
            attempt()
        assert str(error.value).isprintable()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_adapter_facts():
    adapter = adapt(build("llama-odd"))
    assert (adapter.name, adapter.num_kv_heads, adapter.head_dim, adapter.features) == ("llama", 3, 10, 30)
    assert adapter.compressed_layers == (0, 1, 2)
    assert adapter.max_length == 256
