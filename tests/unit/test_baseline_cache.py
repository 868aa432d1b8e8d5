"""Competitors' caches in models: what they hold, what attention sees, and what they refuse."""

import copy
import dataclasses
import functools
import gc
import weakref

import pytest
import torch
from transformers import DynamicCache

from aquakv import CacheStateError, WindowConfig, evaluate_quality
from aquakv.baselines import BASELINES, RowsCache, baseline
from aquakv.baselines.encoded import Encoded
from aquakv.errors import ConfigError, UnsupportedModelError
from tiny_models import build, feed, random_tokens, shared

OURS = [name for name in BASELINES if name != "quanto"]
AT_ONCE = [name for name in OURS if BASELINES[name].at_once]
WINDOWED = [name for name in OURS if not BASELINES[name].at_once]

#: Small enough that fifty tokens are compressed several times over.
SMALL = WindowConfig(sink_tokens=2, recent_window=3, block_tokens=8)


@functools.cache
def method(name, bits=2, kind="llama", small=True):
    """A fitted competitor; those with windows get small ones, as their papers' are longer than tests."""
    bits = 8 if name == "fp8" else bits
    if name == "kivi":
        one = BASELINES[name](bits, group=8, residual=16)
    else:
        one = BASELINES[name](bits, SMALL if small and name in WINDOWED else None)
    return one.fit(shared(kind), random_tokens(6, 60, seed=3))


def fed(name, tokens, sizes, kind="llama", dtype=torch.float32, **options):
    model = shared(kind) if dtype == torch.float32 else shared(kind, dtype)
    cache = method(name, kind=kind, **options).cache(model)
    return feed(model, cache, tokens, sizes), cache


@pytest.mark.parametrize("kind", ["llama", "llama-odd", "llama-yarn", "gemma3", "glm"])
@pytest.mark.parametrize("name", OURS)
def test_many_bits_are_nearly_exact(name, kind):
    if name == "quarot":
        pytest.skip("its ranges are clipped, whatever the bits")
    tokens, model = random_tokens(2, 50), shared(kind)
    with torch.no_grad():
        exact = model(tokens).logits
    few, many = (
        fed(name, tokens, [20, 1, 20, 9], kind, bits=bits)[0].sub(exact).square().mean().sqrt()
        for bits in (2, 8)
    )
    assert float(many) < (0.08 if name == "fp8" else 0.02) * float(exact.std())
    assert name == "fp8" or float(many) < 0.2 * float(few)


@pytest.mark.parametrize("name", AT_ONCE)
def test_what_is_encoded_at_once_does_not_depend_on_chunks(name):
    tokens = random_tokens(2, 40)
    one, whole = fed(name, tokens, [40])
    other, parts = fed(name, tokens, [7, 1, 1, 20, 11])
    assert torch.allclose(one, other, atol=1e-4)
    assert parts.footprint() == whole.footprint()
    for layer, twin in zip(whole.layers[:1], parts.layers[:1], strict=True):
        for side, its_twin in zip(layer.sides, twin.sides, strict=True):
            for codes, its_codes in zip(side.encoded.codes, its_twin.encoded.codes, strict=True):
                assert torch.equal(codes, its_codes)


@pytest.mark.parametrize("name", WINDOWED)
def test_passes_that_end_in_time_give_what_single_tokens_give(name):
    tokens, one = random_tokens(2, 50), method(name)
    ends = one.pass_ends(50)
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    assert name == "kivi" or len(sizes) < 10
    # In float32 rounding would turn a code now and then.
    passes, cache = fed(name, tokens, sizes, dtype=torch.float64)
    single, twin = fed(name, tokens, [1] * 50, dtype=torch.float64)
    assert torch.allclose(passes, single, atol=1e-6)
    assert cache.footprint() == twin.footprint()
    assert cache.footprint().coded_values


@pytest.mark.parametrize("name", [name for name in OURS if name != "kvtc"])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_single_pass_gives_what_streaming_gives(name, kind):
    one = method(name, kind=kind)
    found = {
        protocol: evaluate_quality(shared(kind), random_tokens(3, 50), {"it": one}, protocol=protocol)["it"]
        for protocol in ("streaming", "single-pass")
    }
    stream, once = found["streaming"], found["single-pass"]
    assert stream.mean_kl > 1e-6
    assert once.mean_kl == pytest.approx(stream.mean_kl, rel=1e-3)
    assert once.nll == pytest.approx(stream.nll, rel=1e-6)
    assert once.bits_per_value == stream.bits_per_value
    assert once.bits_per_value_total == stream.bits_per_value_total


def test_a_window_makes_methods_comparable():
    one = baseline("rtn:2+window")
    assert one.windows == (WindowConfig(), WindowConfig())
    one = dataclasses.replace(one, window=SMALL)
    qualities = {
        protocol: evaluate_quality(shared("llama"), random_tokens(3, 50), {"it": one}, protocol=protocol)[
            "it"
        ]
        for protocol in ("streaming", "single-pass")
    }
    assert qualities["single-pass"].mean_kl == pytest.approx(qualities["streaming"].mean_kl, rel=1e-3)
    assert qualities["streaming"].coded_values == 3 * 2 * 3 * 32 * 40
    plain = evaluate_quality(shared("llama"), random_tokens(3, 50), {"it": baseline("rtn:2")})["it"]
    assert qualities["streaming"].mean_kl < plain.mean_kl


#: Bits per value of a token with d = 32 in two heads, 1000 tokens, at 2 bits; outliers are counted apart.
HAND = {
    "rtn": 2 + 32 / 16,
    "quarot": 2 + 32 / 16,
    "kivi": 2 + 32 / 8,
    "turboquant": 2 + 16 / 16,
    "turboquant-sketch": 2 + (32 + 16) / 2 / 16,
    "higgs": 2 + 16 / 32,
    "fp8": 8,
}


@pytest.mark.parametrize("name", HAND)
def test_measured_bits_are_those_counted_by_hand(name):
    _, cache = fed(name, random_tokens(2, 50), [50])
    footprint = cache.footprint()
    assert footprint.bits_per_value == pytest.approx(HAND[name], abs=1e-9)
    windows = method(name).windows
    coded = [window.coded_tokens(50) for window in windows]
    assert footprint.coded_values == 2 * 3 * 32 * sum(coded)
    assert footprint.sink_bytes == 2 * 3 * 32 * 4 * sum(window.sink_tokens for window in windows)
    assert footprint.tail_bytes + footprint.sink_bytes == 2 * 3 * 32 * 4 * (100 - sum(coded))
    assert footprint.total_values == 2 * 3 * 2 * 32 * 50
    assert method(name).table_bytes == 0


def test_kvquants_bits_are_those_counted_by_hand():
    _, cache = fed("kvquant", random_tokens(2, 50), [50])
    footprint = cache.footprint()
    values = 2 * 3 * 2 * 32 * 49  # the first token is exact
    assert footprint.coded_values == values
    assert footprint.code_bytes * 8 == 2 * values
    assert footprint.scale_bytes * 8 == 32 * values / 2 / 32  # two float16 numbers for each token's values
    found = [side.encoded.outliers for layer in cache.layers for side in layer.sides]
    outliers = sum(len(one.values) for one in found)
    assert outliers == sum(int(one.counts.sum()) for one in found)
    assert footprint.outlier_bytes * 8 == 32 * outliers + 16 * values / 32
    assert (
        0.005 < sum(len(one.values) for one in found[::2]) / (values / 2) < 0.05
    )  # keys: 1 % of calibration's
    assert method("kvquant").table_bytes == 3 * 4 * (32 + 32 + 4 + 4)


def test_kvtcs_bytes_are_those_of_its_blocks():
    _, cache = fed("kvtc", random_tokens(2, 50), [50])
    footprint, one = cache.footprint(), method("kvtc")
    assert [len(side) for side in cache._blocks] == [5, 5]
    assert footprint.coded_values == 2 * 3 * 2 * 32 * 40
    groups = sum(len(transform.groups) for transform in one.transforms)
    assert footprint.scale_bytes == 40 * 2 * groups * 4
    payloads = [block.payload for side in cache._blocks for rows in side for block in rows]
    assert footprint.code_bytes == sum(len(payload) for payload in payloads)
    assert 0 < footprint.bits_per_value < 3.5
    assert method("kvtc", bits=1).cache(shared("llama")) is not None


@pytest.mark.parametrize("name", OURS)
def test_attention_sees_what_the_bytes_say(name):
    tokens = random_tokens(1, 51)
    _, cache = fed(name, tokens[:, :50], [50])
    _, twin = fed(name, tokens[:, :50], [50])
    if name == "kvtc":
        for rows in twin._blocks[0]:
            rows[:] = [dataclasses.replace(block, scales=block.scales * 0) for block in rows]
    else:
        side = twin.layers[0].sides[0]
        side.encoded = Encoded(
            tuple(torch.zeros_like(codes) for codes in side.encoded.codes),
            side.encoded.scales,
            side.encoded.outliers,
        )
    one, other = (feed(shared("llama"), each, tokens[:, 50:], [1]) for each in (cache, twin))
    assert not torch.allclose(one, other, atol=1e-3)


@pytest.mark.parametrize("name", OURS)
def test_rows_are_coded_as_if_alone_and_can_be_chosen(name):
    tokens = random_tokens(3, 51)
    together, cache = fed(name, tokens[:, :50], [30, 20])
    alone, _ = fed(name, tokens[1:2, :50], [30, 20])
    assert torch.allclose(together[1:2], alone, atol=1e-4)
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    order = [2, 2, 0, 0]
    twin = fed(name, tokens[order, :50], [30, 20])[1]
    assert cache.footprint().coded_values == twin.footprint().coded_values
    one, other = (feed(shared("llama"), each, tokens[order, 50:], [1]) for each in (cache, twin))
    assert torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("name", OURS)
def test_padded_rows_are_what_they_are_alone(name, kind):
    # In float32 rounding would turn a code now and then.
    model, one = shared(kind, torch.float64), method(name, kind=kind)
    lengths, tokens = [44, 17, 31], random_tokens(3, 50)
    mask = torch.ones(3, 50, dtype=torch.int64)
    for row, length in enumerate(lengths):
        mask[row, : 44 - length] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache, logits, start = RowsCache(model, one), [], 0
    for size in (20, 24, 1, 1, 4):  # the shortest row begins in the second pass
        own = slice(start, start + size)
        start += size
        with torch.no_grad():
            logits.append(
                model(
                    tokens[:, own],
                    attention_mask=mask[:, :start],
                    position_ids=positions[:, own],
                    past_key_values=cache,
                ).logits
            )
    together, alone = torch.cat(logits, 1), []
    for row, length in enumerate(lengths):
        pad = 44 - length
        sizes = [20 - pad, 24, 1, 1, 4] if pad < 20 else [44 - pad, 1, 1, 4]
        own, found = fed(name, tokens[row : row + 1, pad:], sizes, kind, torch.float64)
        assert torch.allclose(together[row : row + 1, pad:], own, atol=1e-6)
        alone.append(found.footprint())
    footprint = cache.footprint()
    assert footprint.coded_values == sum(each.coded_values for each in alone) > 0
    assert footprint.total_bytes == sum(each.total_bytes for each in alone)


@pytest.mark.parametrize("name", OURS)
def test_caches_leave_at_once_without_the_garbage_collector(name):
    model, tokens = shared("llama"), random_tokens(2, 50)
    gc.disable()
    try:
        for make in (method(name).cache, functools.partial(RowsCache, baseline=method(name))):
            cache = make(model)
            feed(model, cache, tokens, [50])
            gone = weakref.ref(cache)
            del cache
            assert gone() is None
    finally:
        gc.enable()


def test_rows_share_kvtcs_bases():
    one, device = method("kvtc"), torch.device("meta")
    assert one.transforms_on(device)[0] is one.transforms_on(device)[0]


def test_what_rows_refuse():
    model, tokens = shared("llama"), random_tokens(2, 20)
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[0, 5:9] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = RowsCache(model, method("rtn"))
    with pytest.raises(CacheStateError, match="on the left only"), torch.no_grad():
        model(tokens, attention_mask=mask, position_ids=positions, past_key_values=cache)
    mask[0, :5] = 0
    with pytest.raises(CacheStateError, match="successive positions"), torch.no_grad():
        model(tokens, attention_mask=mask, past_key_values=cache)
    with pytest.raises(CacheStateError, match="outside a forward pass"):
        cache.update(torch.zeros(2, 2, 1, 8), torch.zeros(2, 2, 1, 8), 0)
    # What was refused has changed nothing.
    right = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        model(tokens, attention_mask=mask, position_ids=right, past_key_values=cache)
    assert cache.get_seq_length() == 20
    longer = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    step = {"attention_mask": longer, "position_ids": torch.tensor([[11], [20]]), "past_key_values": cache}
    hook = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), torch.no_grad():
        model(tokens[:, :1], **step)
    hook.remove()
    with pytest.raises(CacheStateError, match="stopped halfway"), torch.no_grad():
        model(tokens[:, :1], **step)
    for refused in (
        lambda: cache.crop(-1),
        lambda: cache.reorder_cache(torch.tensor([1, 0])),
        lambda: copy.deepcopy(cache),
    ):
        with pytest.raises(CacheStateError, match="run rows one by one"):
            refused()


@pytest.mark.parametrize("name", OURS)
def test_what_is_kept_decoded_is_what_the_codes_say(name):
    tokens = random_tokens(2, 60)
    _, cache = fed(name, tokens[:, :59], [20, 1, 1, 20, 17])
    again = copy.deepcopy(cache)
    for layer in again.layers:
        for side in layer.sides:
            side.seen = None
    getattr(again, "_decoded", {}).clear()
    one, other = (feed(shared("llama"), each, tokens[:, 59:], [1]) for each in (cache, again))
    assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OURS)
def test_half_precision(name, dtype):
    model = shared(dtype=dtype)
    cache = method(name).cache(model)
    logits = feed(model, cache, random_tokens(1, 40), [39, 1])
    assert logits.dtype == dtype
    assert bool(logits.isfinite().all())
    tail = [side.tail for layer in cache.layers for side in layer.sides]
    assert all(part.dtype == dtype for part in tail)
    footprint = cache.footprint()
    assert footprint.exact_cache_bytes == 2 * footprint.total_values


@pytest.mark.parametrize("name", ["kivi", "kvquant", "kvtc"])
def test_generation_with_beams_and_reset(name):
    model, prompt = build(), random_tokens(2, 30)
    cache = method(name, bits=8).cache(model)
    settings = {"max_new_tokens": 12, "num_beams": 3, "do_sample": False}
    first = model.generate(prompt, past_key_values=cache, **settings)
    assert first.shape == (2, 42)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(model.generate(prompt, past_key_values=cache, **settings), first)


@pytest.mark.parametrize("name", ["kvquant", "kivi", "kvtc"])
def test_copies_go_their_own_way(name):
    tokens = random_tokens(2, 60)
    _, cache = fed(name, tokens[:, :50], [50], kind="gemma3")
    twin = copy.deepcopy(cache)
    model = shared("gemma3")
    one = feed(model, twin, tokens[:, 50:], [10])
    assert cache.get_seq_length() == 50
    assert torch.equal(feed(model, cache, tokens[:, 50:], [10]), one)
    assert cache.footprint() == twin.footprint()


def test_crop_reaches_back_to_what_is_compressed():
    tokens = random_tokens(1, 50)
    _, cache = fed("higgs", tokens[:, :48], [48])  # 2 sinks, 40 compressed, 6 exact
    with pytest.raises(CacheStateError, match="only 6"):
        cache.crop(-7)
    assert cache.get_seq_length() == 48
    cache.crop(-5)
    assert cache.get_seq_length() == 43
    feed(shared("llama"), cache, tokens[:, 43:50], [1, 6])
    assert cache.layers[0].sides[0].coded == 40
    assert cache.get_seq_length() == 50
    _, short = fed("higgs", tokens[:, :5], [5])
    short.crop(1)
    assert short.get_seq_length() == 1


def test_what_the_caches_refuse():
    model, tokens = shared("llama"), random_tokens(2, 10)
    cache = method("rtn").cache(model)
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, :3] = 0
    with torch.no_grad():
        with pytest.raises(CacheStateError, match="without padding"):
            model(tokens, attention_mask=mask, past_key_values=cache)
        with pytest.raises(CacheStateError, match="successive positions"):
            model(tokens, position_ids=torch.arange(5, 15)[None], past_key_values=cache)
        assert cache.get_seq_length() == 0
        model(tokens, attention_mask=torch.ones(2, 10), past_key_values=cache)
    states = torch.zeros(2, 2, 1, 16)
    with pytest.raises(CacheStateError, match="outside a forward pass"):
        cache.update(states, states, 0)
    one = build("llama")
    one.requires_grad_(True)
    with pytest.raises(CacheStateError, match="no_grad"):
        one(tokens, past_key_values=method("rtn").cache(one))


def test_a_pass_that_stopped_halfway_is_noticed():
    model, tokens = build(), random_tokens(1, 10)
    cache = method("rtn").cache(model)
    handle = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with torch.no_grad(), pytest.raises(ZeroDivisionError):
        model(tokens, past_key_values=cache)
    handle.remove()
    with torch.no_grad():
        with pytest.raises(CacheStateError, match="reset"):
            model(tokens, past_key_values=cache)
        cache.reset()
        model(tokens, past_key_values=cache)


@pytest.mark.parametrize("name", ["kvquant", "kvtc"])
def test_methods_that_have_to_be_fitted_say_so(name):
    with pytest.raises(ConfigError, match="fit"):
        baseline(name).cache(shared("llama"))
    with pytest.raises(ConfigError, match="fit it anew"):
        method(name).cache(shared("llama-odd"))


@pytest.mark.parametrize("name", ["kvquant", "kvtc"])
def test_one_fit_serves_all_bits(name):
    again = dataclasses.replace(method(name, bits=2), bits=4)
    tokens, model = random_tokens(1, 50), shared("llama")
    one, other = (feed(model, each.cache(model), tokens, [50]) for each in (again, method(name, bits=4)))
    assert torch.equal(one, other)
    assert again.table_bytes == method(name, bits=4).table_bytes


def test_frequencies_that_change_are_refused():
    model = shared("llama-dynamic")
    cache = baseline("kvquant:4").fit(model, random_tokens(4, 60)).cache(model)
    with torch.no_grad():
        model(random_tokens(1, 120), past_key_values=cache)
        with pytest.raises(CacheStateError, match="changes its frequencies"):
            model(random_tokens(1, 20), past_key_values=cache)


def test_single_passes_that_cannot_be_followed():
    tokens = random_tokens(1, 50)
    for name in ("kvtc", "quanto"):
        with pytest.raises(ConfigError, match="--protocol streaming"):
            evaluate_quality(shared("llama"), tokens, {"it": baseline(name)}, protocol="single-pass")
    with pytest.raises(UnsupportedModelError, match="s_aux"):
        evaluate_quality(
            shared("gpt-oss"), tokens, {"it": method("kivi", kind="gpt-oss")}, protocol="single-pass"
        )
    streamed = evaluate_quality(shared("gpt-oss"), tokens, {"it": method("kivi", kind="gpt-oss")})["it"]
    assert 0 < streamed.mean_kl < 1


def test_quanto_is_transformers_own_cache_or_says_why_not():
    method_, model = baseline("quanto:4"), shared("llama")
    try:
        import optimum.quanto  # noqa: F401
    except ImportError:
        with pytest.raises(ConfigError, match=r"optimum-quanto.*aquakv\[quanto\]"):
            method_.cache(model)
        return
    tokens = random_tokens(1, 300)
    cache = method_.cache(build(max_position_embeddings=512))
    model = build(max_position_embeddings=512)
    feed(model, cache, tokens, [128, 128, 44])
    footprint = method_.footprint(cache)
    coded = footprint.coded_values // (3 * 2 * 32)
    assert coded in (256, 300)  # some versions of transformers quantise a full window one pass later
    assert footprint.total_values == 3 * 2 * 32 * 300
    assert footprint.bits_per_value == 4 + 2 * 32 / 16  # scales in the model's float32
    assert footprint.tail_bytes == 3 * 2 * 32 * (300 - coded) * 4
    exact = feed(model, DynamicCache(config=model.config), tokens, [128, 128, 44])
    quality = evaluate_quality(model, tokens, {"it": method_})["it"]
    assert 0 < quality.mean_kl < 0.1
    assert exact.shape == (1, 300, 40)
    with pytest.raises(UnsupportedModelError, match="refuses the model"):
        method_.cache(shared("gemma3"))
