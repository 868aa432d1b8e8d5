import copy
import dataclasses
import gc
import itertools
import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from aquakv import AquaCache, WindowConfig, evaluate_quality
from aquakv.cache.reconstruct import Reconstructor
from aquakv.codec import Reconstruction
from aquakv.codec.guard import choose_outliers
from aquakv.config import PRESETS
from aquakv.errors import CacheStateError, CodecMismatchError, ConfigError, DataError, UnsupportedModelError
from aquakv.evaluation.single_pass import SinglePassCache, single_pass, spans
from aquakv.models.adapter import adapt
from aquakv.models.rotary import unrotate
from tiny_models import (
    SUPPORTED,
    VARIANTS,
    WINDOW,
    begins_with,
    build,
    codec_for,
    decisive_prompts,
    feed,
    guarded_codec,
    random_tokens,
    row_codes,
    same_bits,
    shared,
    variant,
)

F64 = torch.float64


@pytest.fixture(params=VARIANTS)
def each(request):
    """Every preset's codec for the tiny Llama, and one with many outliers."""
    return variant(request.param)


def _pad_left(rows):
    width = max(len(row) for row in rows)
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        tokens[i, width - len(row) :] = row
        mask[i, width - len(row) :] = 1
    return tokens, mask


def _one_pass(model, codec, tokens, window=WINDOW):
    adapter = adapt(model)
    with torch.no_grad(), single_pass(adapter, codec, window) as cache:
        return model(tokens, past_key_values=cache, use_cache=True).logits


def _tensors(value, seen=None):
    """Walk all tensors that are reachable from a cache but belong neither to the model nor to the codec."""
    seen = set() if seen is None else seen
    if id(value) in seen or isinstance(value, (str, int, float, type, torch.dtype, torch.device)):
        return []
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        parts = list(value.values())
    elif isinstance(value, (list, tuple, set)):
        parts = list(value)
    else:
        parts = [v for k, v in getattr(value, "__dict__", {}).items() if k not in ("codec", "_adapter")]
    return [t for part in parts for t in _tensors(part, seen)]


def _state(cache):
    """Return copies of everything that a cache holds."""
    return [t.clone() for t in _tensors(cache)]


# --- generation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("llama", "paper"),
        ("llama-odd", "paper"),
        ("llama", "decode"),
        ("gemma3", "decode"),
        ("llama", "storage"),
        ("gemma3", "storage"),
    ],
)
def test_eight_bits_generate_what_the_exact_cache_does(kind, name, dtype):
    prompts, expected = decisive_prompts(kind, 3)
    codec = codec_for(kind, name, 8)
    for prompt, sequence in zip(prompts, expected, strict=True):
        model = shared(kind, dtype)
        cache = AquaCache(model, codec)
        out = model.generate(prompt[None], past_key_values=cache, max_new_tokens=32, do_sample=False)
        assert out[0].tolist() == sequence.tolist()
        per_token = 2 * codec.fingerprint.features * len(codec.layers)
        # The last token is never fed: 55 in the cache, 2 sinks, six whole blocks of 8.
        assert cache.footprint().coded_values == 48 * per_token


def test_eight_bits_move_logits_little_and_two_bits_much(model64, codec, codec8):
    tokens = random_tokens(2, 60, seed=5)
    exact = model64(tokens).logits
    fine = (feed(model64, AquaCache(model64, codec8), tokens, [1] * 60) - exact).abs()
    coarse = (feed(model64, AquaCache(model64, codec), tokens, [1] * 60) - exact).abs()
    # Lloyd-Max at 8 bits has a relative error of 0.6 %; the logits' standard deviation is about 0.6.
    assert 0 < fine.max() < 0.04
    assert coarse.mean() > 10 * fine.mean()
    # Until something is compressed (the 11th token is the first to see codes) nothing may differ at all.
    assert fine[:, :10].max() < 1e-12
    assert fine[:, 10:].amax((0, 2)).min() > 1e-6


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize(
    ("name", "rising"),
    [
        ("paper", (2, 4, 8)),
        ("higgs", (2, 4, 8)),
        ("decode", (1.25, 2.5, 5, 8)),
        ("storage", (0.6, 1.25, 2.5)),
        ("storage", (2.5, 4, 8)),
    ],
)
def test_more_bits_diverge_less(kind, name, rising):
    model, tokens = shared(kind, F64), random_tokens(4, 60, seed=5)
    exact = model(tokens).logits.log_softmax(-1)
    found = []
    for bits in rising:
        logits = feed(model, AquaCache(model, codec_for(kind, name, bits)), tokens, [20, 20, 20])
        found.append(float((exact.exp() * (exact - logits.log_softmax(-1)))[:, 20:].sum(-1).mean()))
    assert all(after < before for before, after in itertools.pairwise(found)), found
    assert 0 < found[-1] < found[0] / 4


@pytest.mark.parametrize(
    ("name", "bits"), [("paper", 8), ("decode", 8), ("decode", 2), ("storage", None), ("guarded", None)]
)
def test_batch_with_left_padding_is_every_row_alone(name, bits):
    kind = "llama-odd"
    model = shared(kind, F64)
    codec = guarded_codec(kind) if name == "guarded" else codec_for(kind, name, bits)
    prompts, _ = decisive_prompts(kind, 4)
    rows = [prompts[0], prompts[1, -21:], prompts[2, -12:], prompts[3, -1:]]
    tokens, mask = _pad_left(rows)
    together = AquaCache(model, codec)
    out = model.generate(
        tokens, attention_mask=mask, past_key_values=together, max_new_tokens=34, do_sample=False
    )
    values = [0, 0]
    for i, row in enumerate(rows):
        alone = AquaCache(model, codec)
        expected = model.generate(row[None], past_key_values=alone, max_new_tokens=34, do_sample=False)
        held = alone.footprint()
        values = [values[0] + held.coded_values, values[1] + held.total_values]
        assert out[i, tokens.shape[1] :].tolist() == expected[0, len(row) :].tolist()
        assert together.layout.coded[i] == alone.layout.coded[0] == (len(row) + 33 - 2) // 8 * 8
        # float64 models differ by 1e-15 between batch shapes; the encoder's float32 does not see that.
        assert same_bits(row_codes(together, i), row_codes(alone, 0))
    assert values == [together.footprint().coded_values, together.footprint().total_values]


@pytest.mark.parametrize("sizes", [[1] * 45, [20, 25], [45], [3, 17, 1, 1, 23]])
def test_padded_batch_gives_each_rows_logits(model64, each, sizes):
    model, codec = model64, each
    rows = [random_tokens(length, seed=length) for length in (45, 38, 23, 2)]
    tokens, mask = _pad_left(rows)
    logits = feed(model, AquaCache(model, codec), tokens, sizes, mask)
    for i, row in enumerate(rows):
        pad = 45 - len(row)
        ends = [0, *(e - pad for e in torch.tensor(sizes).cumsum(0).tolist() if e > pad)]
        own = [b - a for a, b in itertools.pairwise(ends)]
        alone = feed(model, AquaCache(model, codec), row[None], own)
        # Same arithmetic in float64 in another batch shape.
        torch.testing.assert_close(logits[i, pad:], alone[0], atol=1e-9, rtol=0)


def test_beam_search_gives_the_exact_caches_result(model64, codec8):
    prompts, _ = decisive_prompts("llama", 2)
    settings_ = {"num_beams": 3, "do_sample": False, "max_new_tokens": 24, "num_return_sequences": 2}
    expected = model64.generate(prompts, **settings_)
    cache = AquaCache(model64, codec8)
    out = model64.generate(prompts, past_key_values=cache, **settings_)
    assert out.tolist() == expected.tolist()
    assert cache.layout.rows == 6
    assert all(cache.layout.coded)


@pytest.mark.parametrize(("name", "bits"), [("paper", 8), ("decode", 8), ("storage", 3)])
def test_half_precision_generates_and_keeps_its_dtype(name, bits):
    for dtype in (torch.bfloat16, torch.float16):
        model = build("llama", dtype=torch.bfloat16).to(dtype)  # as checkpoints come
        cache = AquaCache(model, codec_for("llama", name, bits))
        tokens = random_tokens(2, 45, seed=2)
        logits = feed(model, cache, tokens, [20, 1, 24])
        assert logits.dtype == dtype
        exact = model(tokens).logits
        # bfloat16 rounds to 0.4 %, about as much as 8-bit codes do; logits are below 4.
        assert (logits - exact).abs().max() < 0.1
        assert cache.layers[0].exact.tail_keys.dtype == dtype


# --- the two protocols ------------------------------------------------------------------------------------


_PUBLISHED = [("paper", 2), ("paper", 3), ("paper", 4), ("higgs", 2)]
_FITTED = [("storage", None), ("storage", 3), ("decode", None), ("decode", 3.5), ("guarded", None)]


@pytest.mark.parametrize(
    ("kind", "name", "bits"),
    [
        *(("llama", *which) for which in _PUBLISHED + _FITTED),
        *(("llama-odd", *which) for which in _PUBLISHED),
        *((kind, name, None) for kind in ("gemma3", "qwen2") for name in ("storage", "decode", "guarded")),
    ],
)
def test_streaming_equals_single_pass(kind, name, bits):
    model = shared(kind, F64)
    codec = guarded_codec(kind) if name == "guarded" else codec_for(kind, name, bits)
    tokens = random_tokens(2, 43, seed=7)
    with torch.no_grad(), single_pass(adapt(model), codec, WINDOW) as once:
        expected = model(tokens, past_key_values=once, use_cache=True).logits
    assert (expected - model(tokens).logits).abs().max() > 1e-3  # or there is nothing to compare
    blocks = [10, *[8] * 4, 1]  # ends where the cache compresses
    for sizes in ([1] * 43, blocks, [5, 5, 4, 4, 8, 3, 5, 8, 1]):
        cache = AquaCache(model, codec)
        logits = feed(model, cache, tokens, sizes)
        # The same float64 arithmetic in another order; wrong tokens or tables would show at 1e-3.
        torch.testing.assert_close(logits, expected, atol=1e-9, rtol=0)
        footprint = cache.footprint()
        assert once.coded_bytes == footprint.coded_bytes - footprint.position_bytes
        assert once.coded_values == footprint.coded_values


@pytest.mark.parametrize(
    "window", [WindowConfig(0, 0, 8), WindowConfig(3, 5, 4), WindowConfig(1, 0, 1), WindowConfig(4, 16, 8)]
)
def test_streaming_equals_single_pass_for_any_window(model64, each, window):
    codec = each
    tokens = random_tokens(2, 37, seed=8)
    cache = AquaCache(model64, codec, window=window)
    logits = feed(model64, cache, tokens, [1] * 37)
    torch.testing.assert_close(logits, _one_pass(model64, codec, tokens, window), atol=1e-9, rtol=0)
    assert cache.layout.coded == [window.coded_tokens(37)] * 2


@pytest.mark.parametrize("length", [2, 9, 10, 11, 37, 42, 44])
def test_single_pass_tells_all_that_a_cache_would_hold(model64, each, length):
    tokens = random_tokens(3, length, seed=8)
    stream, single = (
        evaluate_quality(model64, tokens, {"it": each}, protocol=protocol, batch_size=2)["it"]
        for protocol in ("streaming", "single-pass")
    )
    assert (single.held_bytes, single.held_values) == (stream.held_bytes, stream.held_values)
    assert single.coded_values == stream.coded_values
    assert single.bits_per_value_total == stream.bits_per_value_total is not None


def test_evaluate_quality_agrees_between_protocols_and_batch_sizes(model64, codec):
    tokens = random_tokens(3, 43, seed=9)
    codecs = {"paper": codec, "guarded": guarded_codec(), "exact": None}
    stream = evaluate_quality(model64, tokens, codecs, protocol="streaming", batch_size=1)
    single = evaluate_quality(model64, tokens, codecs, protocol="single-pass", batch_size=3)
    logits = model64(tokens).logits[:, :-1]
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    compressed = _one_pass(model64, codec, tokens)[:, :-1]
    p, q = logits.log_softmax(-1), compressed.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean()
    for quality in (stream["paper"], single["paper"]):
        assert quality.tokens == 3 * 42
        # Distributions are compared in float32: 1e-7 relative, some terms of opposite sign.
        assert quality.baseline_perplexity == pytest.approx(math.exp(nll), rel=1e-6)
        assert quality.mean_kl == pytest.approx(float(kl), abs=1e-6)
        assert quality.top1_agreement == pytest.approx(
            float((logits.argmax(-1) == compressed.argmax(-1)).double().mean()), abs=1e-12
        )
    assert stream["paper"].nll == pytest.approx(single["paper"].nll, abs=1e-5)
    assert stream["paper"].kl > 1e-3
    # The last pass here is of one token, and such passes make room for positions ahead: two int32 a row.
    assert single["paper"].held_bytes == stream["paper"].held_bytes - 3 * 2 * 4
    # Bits and one fp16 scale for 32 values; 4 bits in the first layer. Positions only when streaming.
    bits = (4 + 2 + 2) / 3 + 16 / 32
    assert single["paper"].bits_per_value == pytest.approx(bits, abs=1e-12)
    assert stream["paper"].bits_per_value > bits
    positions = stream["paper"].bits_per_value - bits
    assert stream["guarded"].kl == pytest.approx(single["guarded"].kl, abs=1e-6)
    assert stream["guarded"].bits_per_value == pytest.approx(single["guarded"].bits_per_value + positions)
    # A quarter of the tokens is kept: 32 values of 64 bits and half an index of 32.
    outliers = 0.25 * (64 + 16 / 32)
    assert single["guarded"].bits_per_value == pytest.approx(guarded_codec().bits_per_value + outliers)
    for quality in (stream["exact"], single["exact"]):
        assert (quality.kl, quality.nll, quality.relative_increase) == (0, quality.exact_nll, 0)
        assert quality.bits_per_value is None


def test_evaluate_quality_refuses_impossible_lengths(model, codec):
    with pytest.raises(DataError, match="256"):
        evaluate_quality(model, random_tokens(1, 257), {"c": codec})
    with pytest.raises(DataError, match="two tokens"):
        evaluate_quality(model, random_tokens(2, 1), {"c": codec})


def test_single_pass_with_eager_attention_agrees_and_leaves_no_hooks(codec):
    eager = build("llama", dtype=F64, attn_implementation="eager")
    tokens = random_tokens(2, 43, seed=7)
    # Eager attention takes its softmax in float32.
    torch.testing.assert_close(
        _one_pass(eager, codec, tokens), _one_pass(shared("llama", F64), codec, tokens), atol=1e-5, rtol=0
    )
    assert not any(module._forward_pre_hooks for module in eager.modules())
    assert eager.config._attn_implementation == "eager"
    eager.config._attn_implementation = "flex_attention"
    with pytest.raises(UnsupportedModelError, match="sdpa or eager"):
        _one_pass(eager, codec, tokens)


def test_an_interrupted_single_pass_leaves_the_model_as_it_was(codec, monkeypatch):
    model = build("llama")
    before = model.config._attn_implementation

    def interrupt(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(SinglePassCache, "update", interrupt)
    with pytest.raises(KeyboardInterrupt):
        _one_pass(model, codec, random_tokens(2, 43))
    assert model.config._attn_implementation == before
    assert not any(module._forward_pre_hooks for module in model.modules())
    with torch.no_grad():
        assert torch.isfinite(model(random_tokens(1, 9)).logits).all()


@pytest.mark.parametrize(
    ("sinks", "recent", "block", "seq_len"), [(2, 0, 8, 43), (0, 0, 8, 43), (3, 5, 4, 30), (4, 0, 128, 100)]
)
def test_spans_are_what_a_token_by_token_cache_would_hold(sinks, recent, block, seq_len):
    window = WindowConfig(sinks, recent, block)
    coded = window.coded_tokens(seq_len - 1)
    columns = list(
        range(coded + seq_len)
    )  # codes first: those of the tokens behind the sinks; then all tokens
    seen_by = {}
    for queries, parts in spans(window, seq_len, len(columns)):
        seen = [column for part in parts for column in columns[part]]
        own = list(range(seq_len))[queries]
        assert seen[len(seen) - len(own) :] == [coded + t for t in own]
        for t in own:
            seen_by[t] = seen[: len(seen) - (own[-1] - t)]
    assert sorted(seen_by) == list(range(seq_len))
    for t, seen in seen_by.items():
        held = window.coded_tokens(t)
        tokens = [column + sinks if column < coded else column - coded for column in seen]
        assert sorted(tokens) == list(range(t + 1))  # each earlier token once
        assert sum(column < coded for column in seen) == held


# --- codes do not depend on how tokens arrive -------------------------------------------------------------


def _encode_all(codec, keys, values, sizes):
    """Encode layer after layer, in chunks; return codes, reconstructions and the guard's verdicts, joined."""
    columns = None
    start = 0
    for size in sizes:
        part, history = [], ()
        for layer, k, v in zip(codec.layers, keys[:, start:], values[:, start:], strict=True):
            encoded, hat = layer.encode(k[:size], v[:size], history)
            history = layer.extend(history, hat)
            excess = layer.excess(k[:size], v[:size], hat)
            part += [*(t for pair in encoded for t in pair), *hat, *([] if excess is None else [excess])]
        columns = (
            [[t] for t in part] if columns is None else [[*c, t] for c, t in zip(columns, part, strict=True)]
        )
        start += size
    return [torch.cat(column) for column in columns]


@settings(max_examples=50, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 150), max_size=6),
    order=st.randoms(use_true_random=False),
    which=st.sampled_from(
        [
            ("llama", "paper", 2),
            ("llama-odd", "paper", 3),
            ("llama-odd", "higgs", 5),
            ("llama", "storage", None),
            ("llama-odd", "storage", 2.5),
            ("llama", "decode", 3),
            ("llama-odd", "decode", None),
        ]
    ),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, F64]),
)
def test_codes_do_not_depend_on_chunks_nor_on_batch_order(cuts, order, which, dtype):
    codec = codec_for(*which)
    generator = torch.Generator().manual_seed(0)
    shape = (3, 150, codec.fingerprint.features)
    keys, values = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    whole = _encode_all(codec, keys, values, [150])
    ends = [0, *sorted(cuts), 150]
    sizes = [b - a for a, b in itertools.pairwise(ends)]
    assert same_bits(_encode_all(codec, keys, values, sizes), whole)
    rows = list(range(150))
    order.shuffle(rows)
    permuted = _encode_all(codec, keys[:, rows], values[:, rows], [150])
    assert same_bits(permuted, [t[rows] for t in whole])


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("tokens", [0, 1, 127, 128, 129, 300])
def test_codes_of_one_row_at_a_time_and_of_strided_input(name, tokens):
    codec = codec_for("llama-odd", name)
    generator = torch.Generator().manual_seed(1)
    keys, values = (torch.randn(3, 300, 30, generator=generator) for _ in range(2))
    whole = _encode_all(codec, keys, values, [300])
    first = _encode_all(codec, keys[:, :tokens], values[:, :tokens], [tokens])
    assert same_bits(first, [t[:tokens] for t in whole])
    strided = torch.randn(3, 30, 600, generator=generator)
    strided[:, :, ::2] = keys.transpose(1, 2)
    assert same_bits(
        _encode_all(codec, strided[:, :, ::2].transpose(1, 2), values.flip(1).flip(1), [300]), whole
    )
    if tokens == 129:
        assert same_bits(_encode_all(codec, keys[:, :9], values[:, :9], [1] * 9), [t[:9] for t in whole])


@pytest.mark.parametrize("name", PRESETS)
def test_codes_do_not_depend_on_threads(name):
    codec = codec_for("llama-odd", name)
    keys, values = torch.randn(2, 3, 700, 30, generator=torch.Generator().manual_seed(2))
    one = _encode_all(codec, keys, values, [700])
    torch.set_num_threads(3)
    try:
        assert same_bits(_encode_all(codec, keys, values, [700]), one)
    finally:
        torch.set_num_threads(1)


def test_reconstruct_is_what_encode_returned(each):
    keys, values = torch.randn(2, 3, 40, 32, generator=torch.Generator().manual_seed(3))
    encoder = decoder = ()
    for layer, k, v in zip(each.layers, keys, values, strict=True):
        codes, expected = layer.encode(k, v, encoder)
        kept = layer.unseal(layer.seal(codes, 8), 8)
        assert same_bits([t for pair in kept for t in pair], [t for pair in codes for t in pair])
        hat = layer.reconstruct(kept, decoder)
        # The same float32 sums, over other numbers of rows.
        torch.testing.assert_close(hat.keys, expected.keys, atol=1e-5, rtol=0)
        torch.testing.assert_close(hat.values, expected.values, atol=1e-5, rtol=0)
        encoder, decoder = layer.extend(encoder, expected), layer.extend(decoder, hat)


def test_codes_of_a_sequence_do_not_depend_on_its_prefill_once_tokens_are_exact(model64, each):
    """One prefill, and that prefill followed by single tokens, code the first blocks alike."""
    tokens = random_tokens(1, 60, seed=4)
    short, long = (AquaCache(model64, each) for _ in range(2))
    feed(model64, short, tokens[:, :30], [30])
    feed(model64, long, tokens, [30] + [1] * 30)
    assert (short.layout.coded, long.layout.coded) == ([24], [56])
    assert begins_with(row_codes(long, 0), row_codes(short, 0))


# --- what stays exact -------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [WINDOW, WindowConfig(3, 6, 8), WindowConfig(0, 1, 5)])
def test_sinks_and_tail_are_bitwise_what_the_exact_cache_holds(model, each, window):
    tokens = random_tokens(3, 41, seed=6)
    exact, cache = DynamicCache(config=model.config), AquaCache(model, each, window=window)
    expected = feed(model, exact, tokens, [41])
    logits = feed(model, cache, tokens, [41])
    # Nothing was coded before this call, so its attention saw exact keys only, also of what it compressed.
    assert torch.equal(logits, expected)
    coded = window.coded_tokens(41)
    assert coded > 0
    assert cache.layout.coded == [coded] * 3
    tail = window.sink_tokens + coded
    assert 41 - tail >= window.recent_window
    for ours, theirs in zip(cache.layers, exact.layers, strict=True):
        for name in ("keys", "values"):
            full = getattr(theirs, name).transpose(1, 2)
            assert torch.equal(getattr(ours.exact, f"sink_{name}"), full[:, : window.sink_tokens])
            assert torch.equal(getattr(ours.exact, f"tail_{name}"), full[:, tail:])


def test_before_anything_is_compressed_the_cache_is_the_exact_one(model, codec):
    tokens = random_tokens(2, 10, seed=6)
    exact, cache = DynamicCache(config=model.config), AquaCache(model, codec)
    assert torch.equal(feed(model, cache, tokens, [4, 1, 5]), feed(model, exact, tokens, [4, 1, 5]))
    assert cache.layout.coded == [8, 8]


def test_recent_window_keeps_the_newest_tokens(model, codec):
    cache = AquaCache(model, codec, window=WindowConfig(2, 20, 8))
    for count in range(1, 41):
        feed(model, cache, random_tokens(1, 1, seed=count), [1])
        assert cache.layout.coded == [max(0, count - 22) // 8 * 8]
        held = cache.layers[0].exact.tail_keys.shape[1]
        assert held >= min(count, 20) - (2 if count < 22 else 0)
        assert held < 20 + 8


def test_update_returns_all_columns_in_the_models_layout_and_dtype(codec):
    for dtype in (torch.float32, F64, torch.bfloat16):
        model, seen = shared("llama", dtype), []
        cache = AquaCache(model, codec)
        update = cache.update

        def spy(*args, update=update, seen=seen, **kwargs):
            seen.append((args[0], *update(*args, **kwargs)))
            return seen[-1][1:]

        cache.update = spy
        feed(model, cache, random_tokens(3, 30, seed=1), [20, 1, 9])
        columns = [20] * 3 + [21] * 3 + [30] * 3
        assert [(tuple(k.shape), k.dtype) for _, k, _ in seen] == [((3, 2, c, 16), dtype) for c in columns]
        assert [(tuple(v.shape), v.dtype) for _, _, v in seen] == [((3, 2, c, 16), dtype) for c in columns]
        for new, keys, _ in seen:
            assert torch.equal(keys[:, :, -new.shape[2] :], new)
        del cache.update


# --- the protocol -----------------------------------------------------------------------------------------


def test_lengths_and_mask_sizes(model, codec):
    cache = AquaCache(model, codec)
    assert cache.get_seq_length() == 0
    assert cache.get_mask_sizes(5, 0) == (5, 0)
    assert (cache.get_max_length(), cache.is_compileable, cache.is_sliding) == (-1, False, [False] * 3)
    feed(model, cache, random_tokens(2, 31), [30, 1])
    assert [cache.get_seq_length(i) for i in range(3)] == [31] * 3
    assert cache.get_mask_sizes(4, 1) == (35, 0)
    assert cache.batch_size == 2
    assert len(cache) == 3
    assert not cache.is_croppable


def test_reset_makes_the_cache_new(model, each):
    tokens = random_tokens(2, 40, seed=3)
    cache = AquaCache(model, each)
    feed(model, cache, random_tokens(3, 37, seed=4), [20, 17])
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.footprint().total_bytes == 0
    assert cache.footprint().bits_per_value is None
    new = AquaCache(model, each)
    assert torch.equal(feed(model, cache, tokens, [33, 7]), feed(model, new, tokens, [33, 7]))
    assert same_bits(_state(cache), _state(new))


def test_deepcopy_is_independent(model, each):
    tokens = random_tokens(2, 60, seed=3)
    cache = AquaCache(model, each)
    feed(model, cache, tokens[:, :35], [35])
    before = _state(cache)
    other = copy.deepcopy(cache)
    assert other.codec is each
    assert same_bits(_state(other), before)
    assert not {t.data_ptr() for t in _tensors(other)} & {t.data_ptr() for t in _tensors(cache)}
    theirs = feed(model, other, tokens[:, 35:], [25])
    assert same_bits(_state(cache), before)
    assert cache.get_seq_length() == 35
    assert torch.equal(feed(model, cache, tokens[:, 35:], [25]), theirs)


@pytest.mark.parametrize("removed", [1, 5, 7])
def test_crop_inside_the_exact_tail_undoes_tokens(model64, each, removed):
    tokens = random_tokens(2, 60, seed=3)
    cache, never = AquaCache(model64, each), AquaCache(model64, each)
    feed(model64, cache, tokens[:, : 41 - removed], [41 - removed])
    feed(model64, cache, random_tokens(2, removed, seed=9), [removed])
    assert cache.layout.columns == 41
    assert cache.layout.coded == [32, 32]  # so 2 + 32 + 7 tokens: all of the tail may go
    cache.crop(-removed)
    feed(model64, never, tokens[:, : 41 - removed], [41 - removed])
    assert same_bits(_state(cache), _state(never))
    assert cache.footprint() == never.footprint()
    rest = tokens[:, 41 - removed :]
    assert torch.equal(
        feed(model64, cache, rest, [rest.shape[1]]), feed(model64, never, rest, [rest.shape[1]])
    )


def test_crop_to_a_length_to_nothing_and_by_nothing(model64, codec):
    model, tokens = model64, random_tokens(1, 20, seed=3)
    cache = AquaCache(model, codec)
    cache.crop(-3)
    feed(model, cache, tokens[:, :9], [9])  # nothing compressed yet
    before = _state(cache)
    for nothing in (0, 9, 100):
        cache.crop(nothing)
        assert same_bits(_state(cache), before)
    cache.crop(1)  # inside the sinks
    assert cache.get_seq_length() == 1
    again = feed(model, cache, tokens[:, 1:], [19])
    fresh = feed(model, AquaCache(model, codec), tokens, [1, 19])
    # The first token's keys come from passes of other lengths: float64 rounding.
    torch.testing.assert_close(again, fresh[:, 1:], atol=1e-9, rtol=0)
    whole = AquaCache(model, codec)
    feed(model, whole, tokens[:, :9], [9])
    whole.crop(-9)
    assert whole.get_seq_length() == 0
    assert torch.equal(feed(model, whole, tokens, [20]), feed(model, AquaCache(model, codec), tokens, [20]))


def test_crop_of_a_padded_batch(model64, each):
    rows = [random_tokens(length, seed=length) for length in (30, 22, 5)]
    tokens, mask = _pad_left(rows)
    cache, never = AquaCache(model64, each), AquaCache(model64, each)
    feed(model64, cache, tokens, [28, 2], mask)
    # Rows have coded 24, 16 and 0 tokens; their exact tails are 4, 4 and 3 long.
    cache.crop(-2)
    feed(model64, never, tokens[:, :28], [28], mask[:, :28])
    assert same_bits(_state(cache), _state(never))


def test_crop_beyond_the_tail_is_refused_and_changes_nothing(model, each):
    cache = AquaCache(model, each)
    feed(model, cache, random_tokens(2, 41), [41])
    before, layout = _state(cache), copy.deepcopy(cache.layout)
    for tokens in (-8, -20, -41, -100, 5):
        with pytest.raises(CacheStateError, match=r"7 of sequence 0.*recent_window"):
            cache.crop(tokens)
    assert same_bits(_state(cache), before)
    assert (cache.layout.columns, cache.layout.coded, cache.layout.pages) == (41, layout.coded, layout.pages)


def test_crop_of_a_hybrid_model_changes_all_or_nothing():
    model, codec = shared("gemma3"), codec_for("gemma3")
    cache = AquaCache(model, codec)
    feed(model, cache, random_tokens(1, 30), [30])  # longer than the sliding window of 7
    before = _state(cache)
    with pytest.raises((CacheStateError, RuntimeError)):
        cache.crop(-2)
    assert cache.get_seq_length(1) == 30
    assert same_bits(_state(cache), before)


@pytest.mark.parametrize("rows", [[0], [2, 0], [1, 1, 2, 0, 1], [2, 2, 2]])
@pytest.mark.parametrize("operation", ["batch_select_indices", "reorder_cache"])
def test_selecting_rows_is_a_run_of_these_rows(model64, each, rows, operation):
    lengths = (44, 29, 12)
    tokens, mask = _pad_left([random_tokens(n, seed=n) for n in lengths])
    later = random_tokens(3, 12, seed=77)
    cache, fresh = AquaCache(model64, each), AquaCache(model64, each)
    feed(model64, cache, tokens, [30, 14], mask)
    getattr(cache, operation)(torch.tensor(rows))
    feed(model64, fresh, tokens[rows], [30, 14], mask[rows])

    def go_on(one):
        full = torch.cat([mask[rows], torch.ones(len(rows), 12, dtype=torch.long)], 1)
        with torch.no_grad():
            return model64(
                later[rows],
                attention_mask=full,
                position_ids=(full.cumsum(1) - 1)[:, -12:],
                past_key_values=one,
            ).logits

    # Another batch shape: float64 rounding.
    torch.testing.assert_close(go_on(cache), go_on(fresh), atol=1e-9, rtol=0)
    for i in range(len(rows)):
        assert same_bits(row_codes(cache, i), row_codes(fresh, i))
    assert cache.layout.starts == fresh.layout.starts
    assert cache.layout.coded == fresh.layout.coded
    assert cache.footprint().code_bytes == fresh.footprint().code_bytes


def test_repeat_interleave(model64, each):
    tokens = random_tokens(2, 41, seed=1)
    cache, fresh = AquaCache(model64, each), AquaCache(model64, each)
    cache.batch_repeat_interleave(3)  # nothing to repeat yet
    feed(model64, cache, tokens, [41])
    cache.batch_repeat_interleave(3)
    feed(model64, fresh, tokens.repeat_interleave(3, 0), [41])
    assert cache.batch_size == 6
    assert all(same_bits(row_codes(cache, i), row_codes(fresh, i)) for i in range(6))
    more = random_tokens(6, 9, seed=2)
    torch.testing.assert_close(
        feed(model64, cache, more, [9]), feed(model64, fresh, more, [9]), atol=1e-9, rtol=0
    )


def test_selecting_rows_takes_what_tensors_take(model, each):
    """transformers' own layers index their tensors: negative rows and masks mean what they mean there."""
    caches = [AquaCache(model, each) for _ in range(3)]
    for cache in caches:
        feed(model, cache, random_tokens(3, 41, seed=1), [41])
    caches[0].batch_select_indices(torch.tensor([2, 0]))
    caches[1].batch_select_indices(torch.tensor([-1, -3]))
    assert same_bits(_state(caches[0]), _state(caches[1]))
    caches[0].batch_select_indices([1])
    caches[2].batch_select_indices(torch.tensor([True, False, False]))
    assert same_bits(_state(caches[0]), _state(caches[2]))


def test_selecting_a_row_that_is_not_there_is_refused_and_changes_nothing(model, codec):
    cache = AquaCache(model, codec)
    feed(model, cache, random_tokens(3, 41), [41])
    before = _state(cache)
    for rows in ([0, 3], [-4]):
        with pytest.raises((CacheStateError, IndexError)):
            cache.batch_select_indices(torch.tensor(rows))
    assert same_bits(_state(cache), before)
    assert cache.batch_size == 3


def test_another_batch_size_is_refused(model, codec):
    cache = AquaCache(model, codec)
    feed(model, cache, random_tokens(2, 20), [20])
    before = _state(cache)
    with pytest.raises((CacheStateError, ValueError)):
        feed(model, cache, random_tokens(3, 2), [2])
    cache_again = copy.deepcopy(cache)
    assert same_bits(_state(cache_again), before)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), name=st.sampled_from(VARIANTS), kind=st.sampled_from(["llama", "gemma3"]))
def test_any_history_of_a_cache_is_a_fresh_run(data, name, kind):
    """Appends, choices of rows and crops, in any order: as if it had been fed what is left of them."""
    model, codec = shared(kind, F64), variant(name, kind)
    cache = AquaCache(model, codec, keep_decoded=data.draw(st.booleans(), label="keep decoded"))
    pads = data.draw(st.lists(st.integers(0, 12), min_size=1, max_size=3), label="padding")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99), label="seed"))
    tokens, sizes = torch.empty(len(pads), 0, dtype=torch.long), []

    def mask(columns):
        return torch.stack([(torch.arange(columns) >= pad).long() for pad in pads])

    def append(size):
        nonlocal tokens
        new = torch.randint(1, 40, (len(pads), size), generator=generator)
        tokens = torch.cat([tokens, new], 1)
        sizes.append(size)
        full = mask(tokens.shape[1])
        positions = (full.cumsum(1) - 1).clamp(min=0)[:, -size:]
        with torch.no_grad():
            return model(new, attention_mask=full, position_ids=positions, past_key_values=cache).logits

    append(data.draw(st.integers(1, 30), label="prefill"))
    for operation in data.draw(st.lists(st.sampled_from(["append", "select", "crop"]), max_size=5)):
        if operation == "append":
            append(data.draw(st.integers(1, 14), label="appended"))
        elif operation == "select":
            rows = data.draw(st.lists(st.integers(0, len(pads) - 1), min_size=1, max_size=3), label="rows")
            cache.batch_select_indices(rows)
            tokens, pads = tokens[rows], [pads[row] for row in rows]
        else:
            removed = min(data.draw(st.integers(1, 9), label="removed"), tokens.shape[1])
            left = tokens.shape[1] - removed
            ends = [start + WINDOW.block_tokens for _, start in cache.layout.pages]
            if any(end > left for end in ends) or (kind == "gemma3" and tokens.shape[1] >= 7):
                with pytest.raises(CacheStateError):
                    cache.crop(-removed)
                continue
            cache.crop(-removed)
            tokens = tokens[:, :left]
            while sum(sizes) > left:
                sizes[-1] -= min(sizes[-1], sum(sizes) - left)
                sizes = [size for size in sizes if size]
    logits, fresh = append(5), AquaCache(model, codec)
    expected = feed(model, fresh, tokens, sizes, mask(tokens.shape[1]))
    # Another order of the same float64 arithmetic.
    torch.testing.assert_close(logits, expected[:, -5:], atol=1e-9, rtol=0)
    assert (cache.layout.starts, cache.layout.coded) == (fresh.layout.starts, fresh.layout.coded)
    for row in range(len(pads)):
        assert same_bits(row_codes(cache, row), row_codes(fresh, row))


def _decoded_tokens(monkeypatch):
    """Return a list to which every reconstruction of a layer adds its tokens."""
    counts, plain = [], Reconstructor.reconstruct

    def spy(self, index, encoded, block_tokens, history, like):
        hat = plain(self, index, encoded, block_tokens, history, like)
        counts.append(len(hat.keys))
        return hat

    monkeypatch.setattr(Reconstructor, "reconstruct", spy)
    return counts


def test_what_is_kept_decoded_is_decoded_once(model64, each, monkeypatch):
    counts = _decoded_tokens(monkeypatch)
    tokens, sizes = random_tokens(2, 60), [30, *[1] * 20, 10]
    caches = [AquaCache(model64, each, attention="general", keep_decoded=keep) for keep in (False, True)]
    logits, decoded = [], []
    for cache in caches:
        counts.clear()
        logits.append(feed(model64, cache, tokens, sizes))
        decoded.append(sum(counts))
    torch.testing.assert_close(*logits, atol=1e-9, rtol=0)
    assert same_bits(row_codes(caches[0], 1), row_codes(caches[1], 1))
    plain, kept = (cache.footprint() for cache in caches)
    layers, seen = len(each.layers), caches[1].layers[0].pages.decoded
    assert decoded[1] == layers * len(seen.keys) < decoded[0]
    assert kept.decoded_bytes == layers * 2 * seen.keys.nbytes > plain.decoded_bytes == 0
    assert kept.total_bytes - kept.decoded_bytes == plain.total_bytes
    assert kept.bits_per_value_total == plain.bits_per_value_total
    caches[1].forget_decoded()
    assert caches[1].footprint() == plain
    one, other = (feed(model64, cache, tokens[:, :1], [1]) for cache in caches)
    torch.testing.assert_close(one, other, atol=1e-9, rtol=0)


def test_nothing_is_kept_decoded_where_nothing_is_decoded(model, codec):
    with pytest.raises(ConfigError, match="use attention general or auto"):
        AquaCache(model, codec, attention="fused", keep_decoded=True)


# --- the guard: compressed tokens that stay exact -----------------------------------------------------------


def _spied(model, cache, tokens):
    """Feed tokens; return what attention sees at every layer: keys and values."""
    seen, update = [], cache.update

    def spy(*args, **kwargs):
        seen.append(update(*args, **kwargs))
        return seen[-1]

    cache.update = spy
    feed(model, cache, tokens, [tokens.shape[1]])
    del cache.update
    return seen


def _furthest_off(model, codec, exact, most):
    """Return for each layer the columns furthest off, naively: the heads' weighted errors block by block."""
    adapter, found, history = adapt(model), [], ()
    positions = torch.arange(2, 42)
    for index, (layer, held) in enumerate(zip(codec.layers, exact.layers, strict=True)):
        tables = adapter.rotary_tables(positions, index, held.keys.dtype, torch.device("cpu"))
        keys = unrotate(held.keys[0, :, 2:42].transpose(0, 1), tables).flatten(1)
        values = held.values[0, :, 2:42].transpose(0, 1).flatten(1)
        _, hat = layer.encode(keys, values, history)
        history = layer.extend(history, hat)
        shares = []
        for part, vectors, approximate in ((layer.keys, keys, hat.keys), (layer.values, values, hat.values)):
            error = (vectors.double() - part.mean - approximate).view(40, 2, 16)
            weighted = torch.einsum("thi,hij->thj", error, part.guard.roots.double())
            shares.append(weighted.square().sum((1, 2)) / part.guard.limit)
        worst = torch.maximum(*shares).view(5, 8).topk(most).indices + 8 * torch.arange(5)[:, None]
        found.append(sorted((worst.flatten() + 2).tolist()))
    return found


@pytest.mark.parametrize(("fraction", "most"), [(0.25, 2), (0.01, 1), (0.49, 3), (1.0, 8)])
def test_the_guard_keeps_the_tokens_that_are_furthest_off(fraction, most):
    model, codec = shared("llama"), guarded_codec(fraction=fraction)
    tokens = random_tokens(1, 43, seed=11)
    exact, cache = DynamicCache(config=model.config), AquaCache(model, codec, attention="general")
    feed(model, exact, tokens[:, :42], [42])
    feed(model, cache, tokens[:, :42], [42])
    expected = _furthest_off(model, codec, exact, most)
    assert len({tuple(columns) for columns in expected}) == 3 or most == 8, "every layer chooses for itself"
    seen = _spied(model, cache, tokens[:, 42:])
    for layer, columns, (keys, values), theirs in zip(
        cache.layers, expected, seen, exact.layers, strict=True
    ):
        outliers = layer.pages.all().outliers
        assert (outliers.index + 2).tolist() == columns
        coded = [column for column in range(2, 42) if column not in columns]
        for ours, full in ((keys, theirs.keys), (values, theirs.values)):
            assert torch.equal(ours[:, :, columns], full[:, :, columns])
            assert (ours[:, :, coded] != full[:, :, coded]).any(-1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
def test_outliers_are_counted(dtype):
    model, codec = shared("llama", dtype), guarded_codec()
    cache, without = AquaCache(model, codec), AquaCache(model, guarded_codec(limit=1e30))
    for one in (cache, without):
        feed(model, one, random_tokens(2, 43), [20, 23])
    footprint, less = cache.footprint(), without.footprint()
    # Two tokens of each of 5 blocks, 2 rows, 3 layers; int32 index.
    assert footprint.outlier_bytes == 60 * (4 + 2 * 32 * dtype.itemsize)
    assert less.outlier_bytes == 0
    assert all(chunk.outliers is None for layer in without.layers for chunk in layer.pages.chunks)
    extra = 8 * footprint.outlier_bytes / footprint.coded_values
    assert footprint.bits_per_value == pytest.approx(less.bits_per_value + extra)
    assert footprint.total_bytes == less.total_bytes + footprint.outlier_bytes
    assert "outliers 0.0" in str(footprint)


@pytest.mark.parametrize("name", ["paper", "higgs"])
def test_without_a_guard_there_are_no_outliers(model, name):
    cache = AquaCache(model, codec_for("llama", name))
    feed(model, cache, random_tokens(2, 43), [20, 23])
    assert cache.footprint().outlier_bytes == 0
    assert all(chunk.outliers is None for layer in cache.layers for chunk in layer.pages.chunks)


def test_the_guard_compares_with_its_limit(model64):
    """Half-way between two tokens' errors the limit keeps those above only, whatever the cap allows."""
    codec = guarded_codec(limit=1.0, fraction=1.0)
    tokens = random_tokens(1, 42, seed=11)
    kept = []
    for limit in (0.005, 0.05, 0.5):
        cache = AquaCache(model64, guarded_codec(limit=limit, fraction=1.0))
        feed(model64, cache, tokens, [42])
        found = [layer.pages.all().outliers for layer in cache.layers]
        kept.append([set() if one is None else set(one.index.tolist()) for one in found])
    for fewer, more in zip(kept[1:], kept, strict=False):
        assert all(a <= b for a, b in zip(fewer, more, strict=True))
        assert sum(map(len, fewer)) < sum(map(len, more))
    exact, history = DynamicCache(config=model64.config), ()
    feed(model64, exact, tokens, [42])
    layer, held = codec.layers[0], exact.layers[0]
    tables = adapt(model64).rotary_tables(torch.arange(2, 42), 0, F64, torch.device("cpu"))
    keys = unrotate(held.keys[0, :, 2:42].transpose(0, 1), tables).flatten(1)
    values = held.values[0, :, 2:42].transpose(0, 1).flatten(1)
    excess = layer.excess(keys, values, layer.encode(keys, values, history)[1])
    for found, limit in zip(kept, (0.005, 0.05, 0.5), strict=True):
        assert found[0] == set((excess > limit).nonzero().flatten().tolist())


# --- memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[43], [1] * 43, [10, 30, 1, 1, 1]])
def test_footprint_is_everything_that_is_held(model, each, sizes):
    rows, mask = _pad_left([random_tokens(n, seed=n) for n in (43, 30, 9)])
    cache = AquaCache(model, each)
    for i in range(len(sizes)):
        end = sum(sizes[: i + 1])
        part = mask[:, :end]
        with torch.no_grad():
            model(
                rows[:, end - sizes[i] : end],
                attention_mask=part,
                position_ids=(part.cumsum(1) - 1).clamp(min=0)[:, -sizes[i] :],
                past_key_values=cache,
            )
        footprint = cache.footprint()
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(cache)}
        assert sum(storages.values()) == footprint.total_bytes
    coded = sum(cache.layout.coded)
    assert coded == 40 + 24 + 0
    assert footprint.position_bytes == 4 * 3 * 43
    assert footprint.sink_bytes == 3 * 2 * 2 * 32 * 4 * 3
    # The third row (starting at column 34) has nothing coded: its tail begins behind its sinks, at column 36.
    # The first row's begins at 42, the second's at 13 + 2 + 24 = 39; so columns 36 to 42 are held.
    assert footprint.tail_bytes == 3 * 7 * 2 * 32 * 4 * 3
    assert footprint.coded_values == coded * 2 * 32 * 3
    assert footprint.exact_cache_bytes == 3 * 43 * 2 * 32 * 3 * 4
    assert footprint.to_dict()["bits_per_value"] == 8 * footprint.coded_bytes / footprint.coded_values


@pytest.mark.parametrize("name", ["paper", "higgs", "decode", "guarded"])
def test_fixed_rate_codes_take_what_was_predicted(model, name):
    codec, cache = variant(name), AquaCache(model, variant(name))
    feed(model, cache, random_tokens(2, 43), [20, 23])
    footprint = cache.footprint()
    assert footprint.coded_values == 80 * 2 * 32 * 3
    stored = footprint.code_bytes + footprint.scale_bytes
    assert stored == codec.bits_per_value * footprint.coded_values / 8
    if name == "paper":
        # d = 32: 4 bits in the first layer, 2 in the others, keys and values; one fp16 scale each.
        assert footprint.code_bytes == 80 * 2 * (16 + 8 + 8)
        assert footprint.scale_bytes == 80 * 2 * 3 * 2
    elif name != "higgs":
        assert footprint.scale_bytes == 80 * 2 * 3  # one byte


def test_entropy_coded_pages_take_the_sum_of_their_streams(model):
    codec = codec_for("llama", "storage")
    cache = AquaCache(model, codec)
    feed(model, cache, random_tokens(2, 43), [20, 23])
    footprint = cache.footprint()
    words = states = 0
    for layer, layer_codec in zip(cache.layers, codec.layers, strict=True):
        chunk = layer.pages.all()
        rows = layer_codec.unseal(chunk.encoded, 8)
        for page in range(10):
            # Every page is decodable, and coded, by itself.
            alone = layer_codec.seal(type(rows)(*(kind.select(torch.tensor([page]), 8) for kind in rows)), 8)
            kept = [kind.select(torch.tensor([page]), 8) for kind in chunk.encoded]
            assert same_bits([t for kind in alone for t in kind], [t for kind in kept for t in kind])
            words += sum(kind.words.numel() for kind in alone)
            states += sum(kind.states.numel() for kind in alone)
    assert states == 3 * 2 * 10 * 2  # a lane for four tokens
    assert footprint.code_bytes == 2 * words + 4 * 3 * 2 * 10
    assert footprint.scale_bytes == 4 * states


def test_codes_are_append_only(model, each):
    cache, snapshots = AquaCache(model, each), []
    tokens = random_tokens(2, 90, seed=2)
    for i in range(90):
        feed(model, cache, tokens[:, i : i + 1], [1])
        snapshots.append([row_codes(cache, row) for row in range(2)])
    assert cache.layout.coded == [88, 88]
    now = [row_codes(cache, row) for row in range(2)]
    assert not any(codes for snapshot in snapshots[:9] for codes in snapshot)
    for snapshot in snapshots[9:]:
        assert all(begins_with(now[row], snapshot[row]) for row in range(2))
    # Merged like a binary counter, so that a long cache does not become a long list of small tensors.
    assert len(cache.layers[0].pages.chunks) <= 4


@pytest.mark.parametrize("name", ["paper", "storage", "guarded"])
def test_pages_of_many_blocks_are_merged_and_keep_their_order(model, name):
    codec, window = variant(name), WindowConfig(0, 0, 1)
    cache = AquaCache(model, codec, window=window)
    tokens = random_tokens(1, 140, seed=2)
    feed(model, cache, tokens, [1] * 140)
    other = AquaCache(model, codec, window=window)
    feed(model, other, tokens[:, :90], [1] * 90)
    # Two full chunks of 64 pages and the binary digits of the remaining 12.
    assert [chunk.pages for chunk in cache.layers[0].pages.chunks] == [64, 64, 8, 4]
    assert begins_with(row_codes(cache, 0), row_codes(other, 0))


# --- hooks and misuse -------------------------------------------------------------------------------------


def _hooks(model):
    return sum(
        len(m._forward_pre_hooks) + len(m._forward_hooks) + len(m._forward_hooks_always_called)
        for m in model.modules()
    )


def test_hooks_come_with_the_first_cache_and_go_with_the_last(codec):
    model = build("llama")
    assert _hooks(model) == 0
    first = AquaCache(model, codec)
    installed = _hooks(model)
    assert installed > 0
    second = AquaCache(model, codec)
    assert _hooks(model) == installed
    feed(model, first, random_tokens(1, 20), [20])
    feed(model, second, random_tokens(2, 30), [30])
    assert (first.get_seq_length(), second.get_seq_length()) == (20, 30)
    del first
    gc.collect()
    assert _hooks(model) == installed
    feed(model, second, random_tokens(2, 3), [3])
    del second
    gc.collect()
    assert _hooks(model) == 0
    third = AquaCache(model, codec)
    feed(model, third, random_tokens(2, 30), [30])
    assert _hooks(model) == installed


def test_hooks_do_not_touch_passes_without_the_cache(codec):
    model = build("llama")
    tokens = random_tokens(2, 30)
    before = model(tokens).logits
    cache = AquaCache(model, codec)
    assert torch.equal(model(tokens).logits, before)
    exact = DynamicCache(config=model.config)
    assert torch.equal(feed(model, exact, tokens, [30]), before)
    assert cache.get_seq_length() == 0


def test_a_cache_leaves_at_once_without_the_garbage_collector(codec):
    model = build("llama")
    gc.collect()
    gc.disable()
    try:
        cache = AquaCache(model, codec)
        feed(model, cache, random_tokens(1, 30), [30])
        watched = weakref.ref(cache)
        del cache
        assert watched() is None
        assert _hooks(model) == 0
    finally:
        gc.enable()


def test_nothing_keeps_a_model_alive(codec):
    model = build("llama")
    cache = AquaCache(model, codec)
    feed(model, cache, random_tokens(1, 30), [30])
    watched = weakref.ref(model)
    del cache
    del model
    gc.collect()
    assert watched() is None


def test_a_cache_for_another_models_codec_is_refused_and_leaves_no_hooks(codec):
    for other in (build("llama", seed=1), build("llama-odd")):
        with pytest.raises(CodecMismatchError, match=r"layer_hashes|num_kv_heads"):
            AquaCache(other, codec)
        gc.collect()
        assert _hooks(other) == 0


def test_a_cache_used_with_another_model_is_refused(codec):
    model, other = build("llama"), build("llama", seed=1)
    cache = AquaCache(model, codec)
    with pytest.raises(CacheStateError, match="outside a forward pass of the model"):
        feed(other, cache, random_tokens(1, 30), [30])
    assert cache.get_seq_length() == 0
    feed(model, cache, random_tokens(1, 30), [30])


def test_a_cache_used_with_another_model_that_has_caches_too_is_refused(codec):
    model, other = build("llama"), build("llama", seed=1)
    cache = AquaCache(model, codec)
    others = AquaCache(other, codec_for("llama", seed=1))
    with pytest.raises(CacheStateError, match="model"):
        feed(other, cache, random_tokens(1, 30), [30])
    feed(other, others, random_tokens(1, 30), [30])
    assert others.get_seq_length() == 30


def test_update_outside_a_forward_pass_is_refused(model, codec):
    cache = AquaCache(model, codec)
    keys = torch.randn(1, 2, 4, 16)
    with pytest.raises(CacheStateError, match="outside a forward pass"):
        cache.update(keys, keys, 0)
    with pytest.raises(CacheStateError, match="out of turn"):
        cache.update(keys, keys, 1)
    with pytest.raises(CacheStateError, match=r"AquaCache\.update"):
        cache.layers[0].update(keys, keys)
    feed(model, cache, random_tokens(1, 30), [30])
    with pytest.raises(CacheStateError, match="outside a forward pass"):
        cache.update(keys, keys, 0)
    feed(model, cache, random_tokens(1, 3), [3])
    assert cache.get_seq_length() == 33


class _InterruptError(Exception):
    pass


def _break_once(module):
    def fail(*_args):
        handle.remove()
        raise _InterruptError

    handle = module.register_forward_pre_hook(fail)


@pytest.mark.parametrize(
    ("kind", "layer"), [("llama", 0), ("llama", 1), ("gemma3", 0), ("gemma3", 1), ("gemma3", 3)]
)
def test_after_an_interrupted_pass_the_cache_wants_a_reset(kind, layer):
    """In Gemma3 the layers 0 and 2 slide: layers 0 to ``layer`` hold tokens that the others do not."""
    model, codec = build(kind), codec_for(kind)
    cache = AquaCache(model, codec)
    tokens = random_tokens(2, 30)
    feed(model, cache, tokens, [20, 10])
    # Before the attention of the layer after, so that this one's tokens are in and the next one's are not.
    block = model.model.layers[layer]
    _break_once(block.mlp if layer < len(model.model.layers) - 1 else block.self_attn)
    with pytest.raises(_InterruptError):
        feed(model, cache, tokens[:, :3], [3])
    for use in (
        lambda: feed(model, cache, tokens[:, :1], [1]),
        lambda: cache.crop(-1),
        lambda: cache.batch_select_indices([1]),
        lambda: copy.deepcopy(cache),
    ):
        with pytest.raises(CacheStateError, match="reset"):
            use()
    cache.reset()
    again = feed(model, cache, tokens, [20, 10])
    assert torch.equal(again, feed(model, AquaCache(model, codec), tokens, [20, 10]))


def test_a_pass_that_fails_before_any_layer_leaves_the_cache_usable(model, codec):
    cache = AquaCache(model, codec)
    tokens = random_tokens(2, 30)
    feed(model, cache, tokens[:, :20], [20])
    with pytest.raises(IndexError):
        feed(model, cache, torch.full((2, 1), 10**6), [1])
    expected = AquaCache(model, codec)
    feed(model, expected, tokens[:, :20], [20])
    assert torch.equal(feed(model, cache, tokens[:, 20:], [10]), feed(model, expected, tokens[:, 20:], [10]))


def test_gradients_are_refused_and_cost_nothing(codec):
    model = build("llama").requires_grad_(True)
    cache = AquaCache(model, codec)
    with pytest.raises(CacheStateError, match="no_grad"):
        model(random_tokens(1, 30), past_key_values=cache)
    assert cache.get_seq_length() == 0
    feed(model, cache, random_tokens(1, 30), [30])  # under no_grad, in the same cache
    with torch.inference_mode():
        model(random_tokens(1, 3), past_key_values=cache)
    feed(model, cache, random_tokens(1, 8), [8])
    assert cache.get_seq_length() == 41


def test_another_dtype_than_before_is_refused(codec):
    model = build("llama")
    cache = AquaCache(model, codec)
    feed(model, cache, random_tokens(1, 30), [30])
    model.double()
    with pytest.raises(CacheStateError, match=r"float32.*float64"):
        feed(model, cache, random_tokens(1, 3), [3])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_not_hidden(each, bad):
    keys, values = torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(0))
    history = (Reconstruction(torch.randn(24, 32), torch.randn(24, 32)),)
    layer = each.layers[1]
    clean, clean_hat = layer.encode(keys, values, history)
    keys[7, 3] = bad
    codes, hat = layer.encode(keys, values, history)
    again = layer.reconstruct(layer.unseal(layer.seal(codes, 8), 8), history)
    others = [i for i in range(24) if i != 7]
    for result in (hat, again):
        # The whole group (here all 32) was mixed with the bad coordinate.
        assert not result.keys[7].isfinite().any()
        reads_keys = layer.values.predictor is not None
        assert result.values[7].isfinite().any() != reads_keys
    for ours, theirs in zip(
        (codes.keys, codes.values, hat), (clean.keys, clean.values, clean_hat), strict=True
    ):
        assert same_bits([t[others] for t in ours], [t[others] for t in theirs])
    assert again.keys[others].isfinite().all()
    assert again.values[others].isfinite().all()
    excess = layer.excess(keys, values, hat)
    if excess is not None:
        assert 7 not in choose_outliers(excess, 8, 2)
        assert excess[others].isfinite().all()


def test_not_a_number_in_the_model_reaches_the_logits_through_codes(each):
    model = build("llama", dtype=F64)
    tokens = random_tokens(1, 30, seed=1)
    tokens[tokens == 7] = 8
    tokens[0, 5] = 7
    model.model.embed_tokens.weight[7] = math.nan
    cache = AquaCache(model, each)
    feed(model, cache, tokens, [30])
    assert cache.layout.coded == [24]
    assert feed(model, cache, tokens[:, :1], [1]).isnan().all()


# --- settings ---------------------------------------------------------------------------------------------


def test_codec_from_a_file_gives_the_same(model, each, tmp_path):
    path = tmp_path / "codec.safetensors"
    each.save(path)
    tokens = random_tokens(2, 43)
    a, b, c = (AquaCache(model, which) for which in (each, path, str(path)))
    expected = feed(model, a, tokens, [20, 23])
    assert torch.equal(feed(model, b, tokens, [20, 23]), expected)
    assert torch.equal(feed(model, c, tokens, [20, 23]), expected)
    assert b.window == WINDOW
    with pytest.raises(CodecMismatchError, match=r"codec\.safetensors"):
        AquaCache(build("llama", seed=1), path)


def test_position_ids_are_those_that_the_model_used(model64, codec):
    """Shifted positions are rotated back by the same tables: nothing but the model's own result."""
    tokens = random_tokens(1, 41, seed=1)
    cache = AquaCache(model64, codec)
    shifted, plain = [], []
    reference = AquaCache(model64, codec)
    for start, end in ((0, 30), (30, 41)):
        positions = torch.arange(start, end)[None]
        with torch.no_grad():
            shifted.append(
                model64(tokens[:, start:end], position_ids=positions + 50, past_key_values=cache).logits
            )
            plain.append(model64(tokens[:, start:end], past_key_values=reference).logits)
    # Rotary attention depends on differences of positions only. Tables are float32, and the keys' rounding
    # differs, so that a code in thousands may turn.
    assert cache.layout.positions[0, 0] == 50
    difference = (torch.cat(shifted, 1) - torch.cat(plain, 1)).abs()
    assert difference.max() < 0.05
    assert difference.median() < 1e-3


def test_all_supported_kinds_are_tested():
    assert len(SUPPORTED) >= 8


def test_window_must_make_sense():
    from aquakv.errors import ConfigError

    for changes in ({"sink_tokens": -1}, {"recent_window": -1}, {"block_tokens": 0}):
        with pytest.raises(ConfigError, match=next(iter(changes))):
            dataclasses.replace(WINDOW, **changes)
