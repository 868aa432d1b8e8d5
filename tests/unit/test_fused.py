"""Attending to codes gives what reconstructing and attending gives."""

import copy
import dataclasses
import gc
import threading

import pytest
import torch

from aquakv import AquaCache
from aquakv.cache.fused import MOST_QUERIES, CodedView, Visible, why_not_fused
from aquakv.cache.step import CacheStep
from aquakv.codec import LinearTransform
from aquakv.errors import CacheStateError, ConfigError
from aquakv.evaluation.single_pass import single_pass
from aquakv.models.adapter import adapt
from tiny_models import WINDOW, build, codec_for, feed, guarded_codec, random_tokens, shared, two_stage_codec

F64 = torch.float64
KINDS = ["llama", "llama-odd", "qwen2", "qwen3", "gemma3"]


@pytest.fixture(autouse=True)
def steps(monkeypatch):
    """Count the passes that attend to codes, and those that reconstruct some."""
    found = {"fused": 0, "general": 0}
    attend, reconstruct = CodedView.attend, CacheStep._reconstruct

    def count_attend(*args, **kwargs):
        found["fused"] += 1
        return attend(*args, **kwargs)

    def count_reconstruct(*args, **kwargs):
        found["general"] += 1
        return reconstruct(*args, **kwargs)

    monkeypatch.setattr(CodedView, "attend", count_attend)
    monkeypatch.setattr(CacheStep, "_reconstruct", count_reconstruct)
    return found


def both(model, codec, tokens, sizes, mask=None, **changes):
    """Return the logits by both kinds of attention."""
    return [
        feed(model, AquaCache(model, codec, attention=attention, **changes), tokens, sizes, mask)
        for attention in ("fused", "general")
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["decode", "guarded", "two-stage"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_fused_is_general(kind, name, implementation, steps):
    model = shared(kind, F64)
    if implementation == "eager":
        model = build(kind, dtype=F64, attn_implementation="eager")
    codec = {"guarded": guarded_codec, "two-stage": two_stage_codec}.get(name, lambda k: codec_for(k, name))(
        kind
    )
    tokens = random_tokens(2, 50, seed=3)
    fused, general = both(model, codec, tokens, [21, 1, 1, 3, 8, 1, 5, *[1] * 10])
    # Transformers' eager attention has its softmax in float32.
    torch.testing.assert_close(fused, general, atol=1e-9 if implementation == "sdpa" else 2e-6, rtol=0)
    layers = len(codec.layers)
    assert steps == {"fused": 16 * layers, "general": 16 * layers}


@pytest.mark.parametrize("pads", [[0, 9, 20], [3, 0, 27]])
@pytest.mark.parametrize("name", ["decode", "guarded"])
def test_rows_of_unequal_length(pads, name, steps):
    """Rows with many, few and no compressed tokens, one so short that its sinks arrive while decoding."""
    model = shared("llama-odd", F64)
    codec = guarded_codec("llama-odd") if name == "guarded" else codec_for("llama-odd", name)
    tokens = random_tokens(3, 44, seed=4)
    mask = torch.stack([(torch.arange(44) >= pad).long() for pad in pads])
    sizes = [28, 1, 1, 2, *[1] * 12]
    fused, general = both(model, codec, tokens, sizes, mask)
    for row, pad in enumerate(pads):
        torch.testing.assert_close(fused[row, pad:], general[row, pad:], atol=1e-9, rtol=0)
    assert steps["fused"] == steps["general"] > 0


def test_holes_in_the_mask_are_not_seen(steps):
    model, codec = shared("llama", F64), codec_for("llama", "decode")
    tokens = random_tokens(2, 40, seed=5)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, [1, 7, 15, 16, 33]] = 0  # a sink, compressed ones, one in the tail
    mask[1, 20:27] = 0
    fused, general = both(model, codec, tokens, [30, *[1] * 10], mask)
    whole = both(model, codec, tokens, [30, *[1] * 10])[0]
    seen = mask.bool()
    torch.testing.assert_close(fused[seen], general[seen], atol=1e-9, rtol=0)
    assert (fused - whole)[:, -1].abs().max() > 1e-3
    assert steps["fused"] > 0


def test_many_new_tokens_and_masks_of_ones_own_are_reconstructed_for(steps):
    model, codec = shared("llama", F64), codec_for("llama", "decode")
    tokens = random_tokens(1, 60, seed=6)
    cache = AquaCache(model, codec, attention="fused")
    feed(model, cache, tokens[:, :20], [20])
    layers = len(codec.layers)
    with torch.no_grad():
        model(tokens[:, 20 : 21 + MOST_QUERIES], past_key_values=cache)
        assert steps == {"fused": 0, "general": layers}
        start = 21 + MOST_QUERIES
        model(tokens[:, start : start + MOST_QUERIES], past_key_values=cache)
        assert steps == {"fused": layers, "general": layers}
        start += MOST_QUERIES
        custom = torch.ones(1, 1, 1, start + 1, dtype=torch.bool)
        custom[..., 5:9] = False
        positions = torch.tensor([[start]])
        logits = model(
            tokens[:, start : start + 1],
            past_key_values=cache,
            attention_mask=custom,
            position_ids=positions,
        ).logits
    assert steps == {"fused": layers, "general": 2 * layers}
    other = AquaCache(model, codec, attention="general")
    feed(model, other, tokens[:, :start], [start])
    with torch.no_grad():
        plain = model(tokens[:, start : start + 1], past_key_values=other, position_ids=positions).logits
    assert (plain - logits).abs().max() > 1e-4


def test_generation_and_beams(steps):
    model, codec = shared("llama", F64), codec_for("llama", "decode")
    prompt = random_tokens(2, 20, seed=7)
    for settings in ({}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}):
        outputs = []
        for attention in ("auto", "general"):
            cache = AquaCache(model, codec, attention=attention)
            outputs.append(
                model.generate(prompt, past_key_values=cache, max_new_tokens=24, do_sample=False, **settings)
            )
        assert torch.equal(*outputs)
    assert steps["fused"] > 0


def test_the_model_attends_in_its_own_way_before_and_after():
    model = build("llama")
    codec = codec_for("llama", "decode")
    tokens = random_tokens(1, 30, seed=8)
    before = model(tokens).logits
    cache = AquaCache(model, codec)
    feed(model, cache, tokens[:, :26], [25, 1])
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(tokens).logits, before)

    def fail(*args, **kwargs):
        raise RuntimeError("on purpose")

    handle = model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        feed(model, cache, tokens[:, 26:27], [1])
    handle.remove()
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(tokens).logits, before)


def _interrupted(model, cache, tokens):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    handle = model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        feed(model, cache, tokens, [tokens.shape[1]])
    handle.remove()


def test_an_interrupt_leaves_the_model_usable(steps):
    """Hooks behind a module do not run then."""
    model, codec, tokens = build("llama"), codec_for("llama", "decode"), random_tokens(1, 30, seed=8)
    before = model(tokens).logits
    cache = AquaCache(model, codec)
    feed(model, cache, tokens[:, :25], [25])
    _interrupted(model, cache, tokens[:, 25:26])
    fresh = AquaCache(model, codec, attention="fused")
    assert torch.equal(model(tokens).logits, before)
    feed(model, fresh, tokens, [25, *[1] * 5])
    assert steps["fused"] == 5 * 3 + 2  # two layers before the interrupt
    config = model.config
    del cache, fresh
    gc.collect()
    assert all(layer.self_attn.config is config for layer in model.model.layers)


def test_masks_in_other_forms_are_not_missed(steps):
    """By position, and as a dictionary of what layers see, which only the model understands."""
    model, codec = shared("qwen3", F64), codec_for("qwen3", "decode")
    tokens, pads = random_tokens(2, 40, seed=5), (0, 11)
    mask = torch.stack([(torch.arange(40) >= pad).long() for pad in pads])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = {}
    for form in ("keyword", "position", "dictionary"):
        cache, outputs, start = AquaCache(model, codec, attention="fused"), [], 0
        for size in (30, *[1] * 10):
            part = slice(start, start + size)
            start += size
            new, where, seen = tokens[:, part], positions[:, part], mask[:, :start]
            with torch.no_grad():
                if form == "keyword" or (form == "dictionary" and size == 30):
                    out = model.model(new, attention_mask=seen, position_ids=where, past_key_values=cache)
                elif form == "position":
                    out = model.model(new, seen, where, cache)
                else:
                    four = {"full_attention": seen[:, None, None].bool()}
                    out = model.model(new, attention_mask=four, position_ids=where, past_key_values=cache)
            outputs.append(out.last_hidden_state)
        found[form] = torch.cat(outputs, 1)
    for form in ("position", "dictionary"):
        for row, pad in enumerate(pads):
            torch.testing.assert_close(found[form][row, pad:], found["keyword"][row, pad:], atol=1e-9, rtol=0)
    assert steps["fused"] == 2 * 10 * len(codec.layers)
    assert steps["general"] == 10 * len(codec.layers)


@pytest.mark.parametrize("bits", [0.05, 0.2, 0.5])
def test_layers_without_coefficients(bits, steps):
    model, codec = shared("llama", F64), codec_for("llama", "decode", bits)
    widths = [part.quantizer.features for layer in codec.layers for part in (layer.keys, layer.values)]
    assert bits > 0.1 or 0 in widths
    fused, general = both(model, codec, random_tokens(2, 40, seed=5), [30, *[1] * 10])
    torch.testing.assert_close(fused, general, atol=1e-9, rtol=0)
    assert steps["fused"] > 0


def test_what_is_not_a_number_stays_in_its_row():
    model, codec = build("llama", dtype=F64), codec_for("llama", "decode")
    with torch.no_grad():
        model.model.embed_tokens.weight[39] = torch.nan
    tokens, pads = random_tokens(2, 44, seed=5).clamp(max=38), (0, 20)
    tokens[0, 5] = 39  # compressed, and the first in storage
    mask = torch.stack([(torch.arange(44) >= pad).long() for pad in pads])
    fused, general = both(model, codec, tokens, [34, *[1] * 10], mask)
    assert general[0, 10:].isnan().all()
    assert fused[0, 10:].isnan().all()
    torch.testing.assert_close(fused[1, 20:], general[1, 20:], atol=1e-9, rtol=0)


def test_sums_of_many_tokens_stay_in_range():
    """Of weights that are not divided by their sum, float16 would hold 65504 at most."""
    view, keys, _, _ = _view(rows=1, tokens=3)
    many = 40_000
    half = dataclasses.replace(
        view,
        keys=torch.zeros(many, *view.keys.shape[1:]),
        key_coefficients=torch.full((many, view.key_coefficients.shape[1]), 0.5, dtype=torch.float16),
        value_coefficients=torch.full((many, view.value_coefficients.shape[1]), 3.0, dtype=torch.float16),
        latent=torch.full((many, view.latent.shape[1]), 3.0, dtype=torch.float16),
        visible=Visible(None, torch.ones(1, 1, many, dtype=torch.bool), view.visible.exact, False),
    )
    query = torch.zeros(1, 4, 1, keys.shape[3])
    assert half.attend(query, 1.0).isfinite().all()


class Meddling(torch.nn.Module):
    """An attention that does something to values behind the cache."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.config, self.layer_idx = inner, inner.config, inner.layer_idx

    def forward(self, hidden_states, past_key_values=None, **kwargs):
        class Doubling:
            def update(self, *args, **more):
                keys, values = past_key_values.update(*args, **more)
                return keys, values * 2 / 2

        return self.inner(hidden_states, past_key_values=past_key_values and Doubling(), **kwargs)


def test_attention_that_needs_tensors_is_left_to_the_model(steps, monkeypatch):
    model = build("llama")
    monkeypatch.setattr(Meddling, "__module__", type(model.model.layers[0].self_attn).__module__)
    codec = codec_for("llama", "decode")
    for layer in model.model.layers:
        layer.self_attn = Meddling(layer.self_attn)
    with pytest.raises(ConfigError, match="needs keys and values as tensors"):
        AquaCache(model, codec, attention="fused")
    feed(model, AquaCache(model, codec), random_tokens(1, 24), [20, 1, 1, 1, 1])
    assert steps["fused"] == 0 < steps["general"]


def test_arguments_that_views_do_not_know_are_refused(monkeypatch):
    model, codec = build("llama"), codec_for("llama", "decode")
    cache, tokens = AquaCache(model, codec, attention="fused"), random_tokens(1, 26)
    feed(model, cache, tokens[:, :25], [25])
    with pytest.raises(CacheStateError, match="position_bias"), torch.no_grad():
        model(tokens[:, 25:], past_key_values=cache, position_bias=torch.zeros(1))


def test_single_pass_beside_a_cache_leaves_it_working(steps):
    model, codec = shared("llama", F64), codec_for("llama", "decode")
    tokens = random_tokens(2, 44, seed=7)
    cache = AquaCache(model, codec, attention="fused")
    first = feed(model, cache, tokens[:, :30], [1] * 30)
    with torch.no_grad(), single_pass(adapt(model), codec, WINDOW) as once:
        expected = model(tokens, past_key_values=once, use_cache=True).logits
    rest = feed(model, cache, tokens[:, 30:], [1] * 14)
    torch.testing.assert_close(torch.cat([first, rest], 1), expected, atol=1e-9, rtol=0)
    assert steps["fused"] == (44 - 10) * 3


def test_another_thread_may_use_the_model():
    model, codec, tokens = build("llama"), codec_for("llama", "decode"), random_tokens(1, 60, seed=8)
    plain = model(tokens).logits
    expected = feed(model, AquaCache(model, codec), tokens, [25, *[1] * 35])
    done, found = threading.Event(), []

    def other():
        with torch.no_grad():
            while not done.is_set():
                found.append(model(tokens).logits)

    thread = threading.Thread(target=other)
    thread.start()
    try:
        logits = feed(model, AquaCache(model, codec), tokens, [25, *[1] * 35])
    finally:
        done.set()
        thread.join()
    torch.testing.assert_close(logits, expected)
    assert found
    assert all(torch.allclose(one, plain, atol=1e-5) for one in found)


def test_a_copied_model_works_by_itself():
    model, codec, tokens = build("llama"), codec_for("llama", "decode"), random_tokens(1, 30, seed=8)
    before = model(tokens).logits
    cache = AquaCache(model, codec)
    twin = copy.deepcopy(model)
    feed(model, cache, tokens, [25, *[1] * 5])
    assert torch.equal(twin(tokens).logits, before)
    other = AquaCache(twin, codec)
    assert torch.equal(
        feed(twin, other, tokens, [25, *[1] * 5]),
        feed(model, AquaCache(model, codec), tokens, [25, *[1] * 5]),
    )
    del other
    gc.collect()
    assert torch.equal(twin(tokens).logits, before)


def test_a_mask_that_is_too_short_is_the_models_affair(steps):
    model, codec = shared("llama", F64), codec_for("llama", "decode")
    tokens, logits = random_tokens(1, 27), []
    for attention in ("fused", "general"):
        cache = AquaCache(model, codec, attention=attention)
        feed(model, cache, tokens[:, :25], [25], torch.ones(1, 25, dtype=torch.long))
        before = dict(steps)
        with torch.no_grad():
            short = torch.ones(1, 20, dtype=torch.long)
            logits.append(model(tokens[:, 25:26], attention_mask=short, past_key_values=cache).logits)
        assert steps["fused"] == before["fused"]
    assert torch.equal(*logits)


@pytest.mark.parametrize("name", ["paper", "higgs", "storage"])
def test_codecs_that_cannot_be_attended_to(name, steps):
    model, codec = shared("llama"), codec_for("llama", name)
    assert why_not_fused(codec) is not None
    with pytest.raises(ConfigError, match="quantiser is"):
        AquaCache(model, codec, attention="fused")
    feed(model, AquaCache(model, codec), random_tokens(1, 24), [20, 1, 1, 1, 1])
    assert steps["fused"] == 0 < steps["general"]


def test_eager_attention_keeps_its_weights_unless_asked(steps):
    model, codec = build("llama", attn_implementation="eager"), codec_for("llama", "decode")
    cache, tokens = AquaCache(model, codec), random_tokens(1, 26)
    feed(model, cache, tokens[:, :25], [25])
    with torch.no_grad():
        found = model(tokens[:, 25:], past_key_values=cache, output_attentions=True).attentions
    assert [weights.shape for weights in found] == [(1, 4, 1, 26)] * 3
    assert steps == {"fused": 0, "general": 3}


def test_copies_attend_alike(steps):
    model, codec = shared("llama"), codec_for("llama", "decode")
    tokens = random_tokens(1, 30, seed=2)
    for attention in ("auto", "fused", "general"):
        cache = AquaCache(model, codec, attention=attention)
        feed(model, cache, tokens[:, :25], [25])
        before = dict(steps)
        feed(model, copy.deepcopy(cache), tokens[:, 25:], [1] * 5)
        kind = "general" if attention == "general" else "fused"
        assert steps == {**before, kind: before[kind] + 15}


def test_other_choices_are_refused():
    model, codec = shared("llama"), codec_for("llama", "decode")
    with pytest.raises(ConfigError, match="auto, fused or general"):
        AquaCache(model, codec, attention="fast")
    values = dataclasses.replace(codec.config.predictor, value_inputs=("keys", "previous_values"))
    layers = tuple(dataclasses.replace(layer, inputs=values) for layer in codec.layers)
    assert "previous_values" in why_not_fused(dataclasses.replace(codec, layers=layers))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes(dtype, steps):
    model, codec = shared("llama", dtype), codec_for("llama", "decode", 4)
    tokens = random_tokens(2, 40, seed=9)
    fused, general = both(model, codec, tokens, [30, *[1] * 10])
    exact = model(tokens).logits
    noise = (general - shared("llama", F64)(tokens).logits).abs().max()
    assert fused.dtype == dtype
    assert (fused - general).abs().max() < {torch.float32: 1e-5}.get(dtype, 0.05)
    assert (fused.double() - exact.double()).abs().max() < 2 * noise + 0.05
    assert steps["fused"] > 0


# --- softcap and sink logits, which no tiny model here has ------------------------------------------------


def _view(rows=2, tokens=24, heads=2, dim=8, held=5, latent=True, seed=0):
    """Return a view of random codes, and all keys and values that it stands for, densely."""
    codec = codec_for("llama", "decode").layers[1 if latent else 0]
    heads, dim = 2, codec.features // 2
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=F64)

    count = rows * tokens
    u, y = (normal(count, part.quantizer.features) for part in (codec.keys, codec.values))
    assert isinstance(codec.keys.transform, LinearTransform)
    key_hat, c = u @ codec.keys.transform.synthesis.double(), None
    if latent:
        c = normal(count, codec.keys.predictor.rank)
        key_hat += c @ codec.keys.predictor.factors[-1].double() + codec.keys.predictor.bias.double()
    value_hat = y @ codec.values.transform.synthesis.double() + codec.values.mean.double()
    value_hat += codec.values.predictor.predict((key_hat,))
    keys = (key_hat + codec.keys.mean.double()).view(count, heads, dim)
    exact_keys, exact_values = normal(rows, held, heads, dim), normal(rows, held, heads, dim)
    grid = torch.arange(count).view(tokens, rows).T.contiguous()  # storage order is not that of rows
    coded = torch.rand(rows, 1, tokens, generator=generator) > 0.2
    seen = torch.rand(rows, 1, held, generator=generator) > 0.2
    view = CodedView(
        codec, keys, u, y, c, None, exact_keys, exact_values, Visible(grid, coded, seen.expand(-1, 1, -1))
    )
    all_keys = torch.cat([keys[grid], exact_keys], 1)
    all_values = torch.cat([value_hat.view(count, heads, dim)[grid], exact_values], 1)
    return view, all_keys, all_values, torch.cat([coded, seen], 2)


@pytest.mark.parametrize("latent", [True, False])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sinks", [False, True])
def test_attend_is_attention(latent, softcap, sinks):
    view, keys, values, seen = _view(latent=latent)
    rows, _, heads, dim = keys.shape
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(rows, 3 * heads, 1, dim, generator=generator, dtype=F64)
    sink_logits = torch.randn(3 * heads, generator=generator, dtype=F64) if sinks else None
    out = view.attend(query, 0.3, softcap, sink_logits)
    scores = torch.einsum("bhqd,bthd->bhqt", query, keys.repeat_interleave(3, 2)) * 0.3
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    if sink_logits is not None:
        scores = torch.cat([scores, sink_logits.view(1, -1, 1, 1).expand(rows, -1, 1, 1)], 3)
    weights = scores.softmax(-1)[..., : keys.shape[1]]
    expected = torch.einsum("bhqt,bthd->bqhd", weights, values.repeat_interleave(3, 2))
    torch.testing.assert_close(out, expected, atol=1e-10, rtol=0)


def test_a_row_of_padding_gets_zeros():
    view, *_ = _view()
    nothing = Visible(view.visible.grid, view.visible.coded.clone(), view.visible.exact.clone())
    nothing.coded[1], nothing.exact[1] = False, False
    query = torch.randn(2, 4, 1, view.keys.shape[2], dtype=F64)
    out = dataclasses.replace(view, visible=nothing).attend(query, 1.0)
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert out[0].abs().max() > 0
