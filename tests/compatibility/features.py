"""The features of the compatibility table: what each has to do with a tiny model.

Codecs have 8 bits. Two references are used. What is generated greedily has to be what the exact cache gives,
from prompts where no choice is close (`prompts`). Elsewhere logits are compared: with those of the same codec
along the same tokens, which differ by rounding only in float64; and with those of the exact cache, which are
nearer than `NEAR`.
"""

import dataclasses

import torch
from accelerate import cpu_offload
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from aquakv import AquaCache, WindowConfig, calibrate, preset
from aquakv.cache import AquaLayer
from aquakv.evaluation.single_pass import single_pass
from aquakv.models.adapter import adapt
from aquakv.models.rotary import rotate, unrotate
from placed import place
from pretend_devices import TYPE, PretendedDevices, pretend_on
from tiny_models import (
    VOCAB,
    WINDOW,
    build,
    codec_for,
    decisive_prompts,
    feed,
    go_on,
    random_tokens,
    same_bits,
    shared,
)

F64 = torch.float64
LENGTH, NEW = 28, 12
TOTAL = LENGTH + NEW
GREEDY = {"max_new_tokens": NEW, "do_sample": False}

#: Logits of tiny models are a few units; 8-bit codes move them by less than a hundredth, wrong ones by units.
NEAR = 0.1


def same(kind, got, expected):
    """Require logits that differ by the order of sums only: of float64, or of float32 in eager softmax."""
    eager = shared(kind, F64).config._attn_implementation == "eager"
    torch.testing.assert_close(got, expected, atol=1e-5 if eager else 1e-8, rtol=0)


def setting(kind, dtype=F64, window=WINDOW, **options):
    """Return a model and a fresh cache for it; codecs are calibrated in float32."""
    codec = codec_for(kind, "decode", 8)
    return shared(kind, dtype), AquaCache(shared(kind, dtype), codec, window=window, **options)


def prompts(kind, count=2):
    """Return prompts ``[count, LENGTH]`` and what the exact cache makes of them ``[count, TOTAL]``."""
    return decisive_prompts(kind, count, LENGTH, NEW)


def exact_logits(model, tokens, mask=None):
    """Return the exact cache's logits."""
    extra = {}
    if mask is not None:
        extra = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    with torch.no_grad():
        return model(tokens, **extra).logits


def along(kind, tokens, sizes):
    """Return the logits of a fresh cache along tokens that are fed in chunks."""
    model, cache = setting(kind)
    return feed(model, cache, tokens, sizes)


def near(got, expected):
    """Require logits that differ, for the cache is compressed, and by little."""
    distance = float((got - expected).abs().max())
    assert 0 < distance < NEAR, distance


def coded(cache, rows):
    """Require that most of every row is compressed."""
    assert cache.layout.coded == [cache.window.coded_tokens(cache.layout.columns)] * rows
    assert min(cache.layout.coded) >= 16


# --- rotation and streaming -------------------------------------------------------------------------------


def rotation(kind):
    """Keys of single tokens, rotated back, are those at position 0, which turns nothing; and forth again."""
    model, adapter = shared(kind, F64), adapt(shared(kind, F64))
    positions = torch.tensor([0, 1, 2, 7, 33, 100])
    tokens = random_tokens(1, 1).expand(len(positions), 1)
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    with torch.no_grad():
        for cache, ids in zip(caches, (positions, torch.zeros_like(positions)), strict=True):
            model(tokens, position_ids=ids[:, None], past_key_values=cache)
    for layer in adapter.compressed_layers:
        turned, still = (cache.layers[layer].keys[:, :, 0] for cache in caches)
        tables = adapter.rotary_tables(positions, layer, F64, torch.device("cpu"))
        at_zero = adapter.rotary_tables(torch.zeros_like(positions), layer, F64, torch.device("cpu"))
        plain = unrotate(still, at_zero)
        # Rotation is undone in float32.
        torch.testing.assert_close(unrotate(turned, tables), plain, atol=1e-5, rtol=0)
        torch.testing.assert_close(rotate(plain, tables), turned.float(), atol=1e-5, rtol=0)
        assert (layer in adapter.unrotated) == torch.equal(turned, still)


def streaming(kind):
    """A cache fed in chunks gives the logits of one pass in which tokens see what a cache would hold."""
    model, codec = shared(kind, F64), codec_for(kind, "decode", 8)
    tokens = random_tokens(2, 43, seed=3)
    with torch.no_grad(), single_pass(adapt(model), codec, WINDOW) as cache:
        expected = model(tokens, past_key_values=cache, use_cache=True).logits
    near(expected, exact_logits(model, tokens))
    for sizes in ([1] * 43, [10, 8, 8, 3, 5, 8, 1]):
        same(kind, along(kind, tokens, sizes), expected)


def past_original_length(kind):
    """A sequence that outgrows the 128 tokens at which some rotary embeddings change their frequencies."""
    model, cache = setting(kind)
    tokens = random_tokens(1, 132, seed=5)
    near(feed(model, cache, tokens, [126, *[1] * 6]), exact_logits(model, tokens))


# --- generation --------------------------------------------------------------------------------------------


def greedy(kind):
    model, cache = setting(kind)
    tokens, expected = prompts(kind)
    assert model.generate(tokens, past_key_values=cache, **GREEDY).tolist() == expected.tolist()
    coded(cache, 2)


def sampling(kind):
    """The distribution that is sampled from is the codec's own along what was sampled."""
    model, cache = setting(kind)
    torch.manual_seed(0)
    out = model.generate(
        random_tokens(2, LENGTH, seed=6),
        past_key_values=cache,
        max_new_tokens=NEW,
        do_sample=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    _along_generated(kind, out)


def return_sequences(kind):
    """As `sampling`, with several sequences for each prompt."""
    model, cache = setting(kind)
    torch.manual_seed(0)
    out = model.generate(
        random_tokens(2, LENGTH, seed=7),
        past_key_values=cache,
        max_new_tokens=NEW,
        do_sample=True,
        num_return_sequences=2,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert len({tuple(row) for row in out.sequences.tolist()}) == 4
    _along_generated(kind, out)


def _along_generated(kind, out):
    logits = along(kind, out.sequences, [LENGTH, *[1] * NEW])[:, LENGTH - 1 : -1]
    torch.testing.assert_close(torch.stack(out.logits, 1).double(), logits, atol=1e-5, rtol=0)
    near(logits, exact_logits(shared(kind, F64), out.sequences)[:, LENGTH - 1 : -1])


def beam_search(kind):
    """The scores of the beams that are returned are those of their tokens along a fresh cache."""
    model, cache = setting(kind)
    out = model.generate(
        random_tokens(2, LENGTH, seed=8),
        past_key_values=cache,
        num_beams=3,
        num_return_sequences=3,
        output_scores=True,
        return_dict_in_generate=True,
        length_penalty=0.0,
        **GREEDY,
    )
    beams = out.beam_indices[:, :NEW] % 3
    assert any(len(set(row)) > 1 for row in beams.tolist()), "no beam was reordered"
    logits = along(kind, out.sequences, [LENGTH, *[1] * NEW])
    chosen = logits.log_softmax(-1)[:, LENGTH - 1 : -1].gather(2, out.sequences[:, LENGTH:, None])
    torch.testing.assert_close(out.sequences_scores.double(), chosen.sum((1, 2)), atol=1e-4, rtol=0)


def contrastive(kind):
    model, cache = setting(kind)
    model.generate(prompts(kind)[0][:1], past_key_values=cache, penalty_alpha=0.6, top_k=4, **GREEDY)


#: Wide enough for the tokens that assisted decoding takes back.
_REACH = WindowConfig(sink_tokens=2, recent_window=8, block_tokens=8)


def assisted(kind):
    """A draft model whose proposals are partly refused, so that tokens are taken back."""
    model, cache = setting(kind, window=_REACH)
    expected = prompts(kind)[1]
    taken_back = _count_crops(cache)
    for row in (0, 1):
        cache.reset()
        answer = expected[row : row + 1]
        out = model.generate(
            answer[:, :LENGTH], past_key_values=cache, assistant_model=_draft(answer), **GREEDY
        )
        assert out.tolist() == answer.tolist()
    assert max(taken_back) > 0
    assert cache.layout.coded[0] >= 16


def assisted_beyond(kind):
    """As `assisted`, where tokens that are to be taken back are compressed already."""
    model, cache = setting(kind)
    expected = prompts(kind)[1]
    for row in (0, 1):
        cache.reset()
        answer = expected[row : row + 1]
        out = model.generate(
            answer[:, :LENGTH], past_key_values=cache, assistant_model=_draft(answer), **GREEDY
        )
        assert out.tolist() == answer.tolist()


def prompt_lookup(kind):
    """Proposals come from the prompt, which holds the first tokens of the answer and others behind them."""
    model, cache = setting(kind, window=_REACH)
    taken_back = _count_crops(cache)
    for row, whole in enumerate(prompts(kind)[1]):
        cache.reset()
        out = model.generate(
            whole[None, :LENGTH], past_key_values=cache, prompt_lookup_num_tokens=4,
            max_matching_ngram_size=1, **GREEDY,
        )  # fmt: skip
        assert out[0].tolist() == prompts(kind)[1][row].tolist()
    assert max(taken_back) > 0


def _count_crops(cache):
    """Note how many tokens a cache is told to take back."""
    counts, crop = [], cache.crop

    def counted(tokens_to_remove):
        counts.append(abs(tokens_to_remove))
        crop(tokens_to_remove)

    cache.crop = counted
    return counts


def _draft(answer):
    """Return a draft model that proposes a known answer ``[1, tokens]``, every third token wrongly."""
    draft = build("llama")

    def say(module, args, output):
        known = output.past_key_values.get_seq_length()
        last = torch.arange(known - output.logits.shape[1], known) + 1
        wanted = answer[0, last.clamp(max=answer.shape[1] - 1)] + (last % 3 == 0).long()
        output.logits = 50 * torch.nn.functional.one_hot(wanted % VOCAB, VOCAB)[None].float()
        return output

    draft.register_forward_hook(say)
    settings = draft.generation_config
    settings.num_assistant_tokens, settings.num_assistant_tokens_schedule = 5, "constant"
    settings.assistant_confidence_threshold = 0.0
    return draft


def chunked_prefill(kind):
    model, cache = setting(kind)
    tokens, expected = prompts(kind)
    out = model.generate(tokens, past_key_values=cache, prefill_chunk_size=9, **GREEDY)
    assert out.tolist() == expected.tolist()
    coded(cache, 2)


def several_turns(kind):
    """One cache through three calls of `generate`, each with the whole conversation."""
    model, cache = setting(kind)
    tokens, expected = prompts(kind)
    out = model.generate(tokens, past_key_values=cache, max_new_tokens=NEW - 8, do_sample=False)
    mask = torch.ones(
        2, TOTAL + 5, dtype=torch.long
    )  # token 0, which is also padding, may be among the answers
    out = model.generate(
        out, attention_mask=mask[:, : TOTAL - 8], past_key_values=cache, max_new_tokens=8, do_sample=False
    )
    assert out.tolist() == expected.tolist()
    more = torch.cat([out, random_tokens(2, 5, seed=9)], 1)
    got = model.generate(
        more, attention_mask=mask, past_key_values=cache, max_new_tokens=4, do_sample=False,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    near(torch.stack(got.logits, 1), exact_logits(model, got.sequences)[:, more.shape[1] - 1 : -1])
    coded(cache, 2)


def left_padding(kind):
    """Rows of unequal length, generated together, are each row alone."""
    # In float64, transformers' eager attention turns rows that see nothing into NaN.
    eager = shared(kind, F64).config._attn_implementation == "eager"
    model, cache = setting(kind, torch.float32 if eager else F64)
    tokens, expected = prompts(kind)
    batch = torch.stack([torch.cat([torch.zeros_like(row[:7]), row]) for row in tokens])
    batch[1, :7] = random_tokens(7, seed=4)
    mask = torch.ones_like(batch)
    mask[0, :7] = 0
    out = model.generate(batch, attention_mask=mask, past_key_values=cache, **GREEDY)
    assert out[0, 7:].tolist() == expected[0].tolist()
    assert min(cache.layout.coded) >= 16
    together, alone = (AquaCache(model, cache.codec, window=WINDOW) for _ in range(2))
    sizes = [20, 5, 1, 9]
    both = feed(model, together, batch, sizes, mask)
    alone = feed(model, alone, batch[1:], sizes)
    torch.testing.assert_close(both[1], alone[0], atol=1e-4 if eager else 1e-8, rtol=0)


def right_padding(kind):
    """A shorter row, padded on the right, goes on behind the padding as with the exact cache."""
    model, cache = setting(kind)
    tokens = random_tokens(2, 44, seed=10)
    mask = torch.ones_like(tokens)
    mask[1, 25:30] = 0
    got = feed(model, cache, tokens[:, :30], [30], mask[:, :30])
    got = torch.cat([got, go_on(model, cache, tokens, [1, 8, 5], mask)], 1)
    real = mask.bool()
    near(got[real], exact_logits(model, tokens, mask)[real])
    assert min(cache.layout.coded) >= 16


def select_and_repeat(kind):
    """Rows of a filled cache, chosen and repeated, go on as those rows do in a fresh one."""
    model, cache = setting(kind)
    tokens, more = random_tokens(3, 31, seed=11), random_tokens(4, 6, seed=12)
    feed(model, cache, tokens, [31])
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    whole = torch.cat([tokens[[2, 2, 0, 0]], more], 1)
    got = feed(model, cache, more, [1, 5])
    same(kind, got, along(kind, whole, [31, 1, 5])[:, 31:])
    near(got, exact_logits(model, whole)[:, 31:])


def evict(kind):
    """Half of a prompt's tokens are evicted, others in each row.

    Without compression that is what a mask hides from an exact cache. With it, attention to codes and to what
    they stand for agree.
    """
    model, tokens = shared(kind, F64), random_tokens(2, 44, seed=14)
    keep = torch.rand(2, 31, generator=torch.Generator().manual_seed(1)) < 0.5
    hidden, sizes = torch.nn.functional.pad(keep.long(), (0, 13), value=1), [1, 5, 7]
    exact, plain = DynamicCache(config=model.config), setting(kind, window=WindowConfig(2, 100, 8))[1]
    caches = [setting(kind, attention=attention)[1] for attention in ("auto", "general")]
    for cache in (exact, plain, *caches):
        feed(model, cache, tokens[:, :31], [31])
        if cache is not exact:
            cache.evict(keep)
    ones = torch.ones_like(tokens)
    position = torch.arange(44).expand(2, -1)
    expected, start = [], 31
    for size in sizes:
        part = slice(start, start + size)
        with torch.no_grad():
            out = model(
                tokens[:, part],
                past_key_values=exact,
                attention_mask=hidden[:, : part.stop],
                position_ids=position[:, part],
            )
        expected.append(out.logits)
        start += size
    same(kind, go_on(model, plain, tokens, sizes, ones), torch.cat(expected, 1))
    outs = [go_on(model, cache, tokens, sizes, ones) for cache in caches]
    torch.testing.assert_close(*outs, atol=1e-5, rtol=0)
    assert min(caches[0].layout.coded) >= 16
    assert caches[0].layout.columns < 44


def streamer(kind):
    class Collector(BaseStreamer):
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    model, cache = setting(kind)
    tokens, expected = prompts(kind)
    collector = Collector()
    model.generate(tokens[:1], past_key_values=cache, streamer=collector, **GREEDY)
    assert collector.ended
    assert collector.tokens == expected[0].tolist()


def compiled(kind):
    """A step of a model that torch.compile compiles is the step uncompiled; tracing more takes seconds."""
    model, cache = setting(kind)
    tokens = random_tokens(1, 26, seed=13)
    expected = feed(model, setting(kind)[1], tokens, [25, 1])[:, 25:]
    feed(model, cache, tokens[:, :25], [25])
    torch._dynamo.reset()
    try:
        got = feed(torch.compile(model, backend="eager"), cache, tokens[:, 25:], [1])
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    finally:
        torch._dynamo.reset()
    same(kind, got, expected)


def attention_to_codes(kind):
    """Steps that attend to codes give what steps give that reconstruct keys and values."""
    tokens, sizes = random_tokens(2, 40, seed=14), [30, 1, 1, 5, 1, 1, 1]
    model, fused = setting(kind, attention="fused")
    got = feed(model, fused, tokens, sizes)
    expected = feed(model, setting(kind, attention="general")[1], tokens, sizes)
    # Keys and values are reconstructed in float32, and combined in another order.
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    near(got, exact_logits(model, tokens))


def cpu_offloaded(kind):
    """A model whose weights are elsewhere but while a module computes gives what it gives otherwise."""
    model, tokens, sizes = build(kind, dtype=F64), random_tokens(2, 40, seed=16), [25, 1, 5, 9]
    cpu_offload(model, torch.device("cpu"))
    assert all(parameter.device.type == "meta" for parameter in model.model.layers.parameters())
    got = feed(model, AquaCache(model, codec_for(kind, "decode", 8), window=WINDOW), tokens, sizes)
    same(kind, got, along(kind, tokens, sizes))
    config = dataclasses.replace(preset("decode", 8), window=WINDOW)
    ours = calibrate(model, random_tokens(2, 48, seed=1), config, held_out=1)
    theirs = calibrate(shared(kind, F64), random_tokens(2, 48, seed=1), config, held_out=1)
    assert same_bits([part.keys.mean for part in ours.layers], [part.keys.mean for part in theirs.layers])


def two_devices(kind):
    """Layers on two devices in turn give what they give on one (devices that only pretend to be such)."""
    model, tokens, sizes = build(kind, dtype=F64), random_tokens(2, 24, seed=17), [18, 1, 5]
    expected = along(kind, tokens, sizes)
    with PretendedDevices():
        here, there = (torch.device(TYPE, index) for index in (0, 1))
        place(model, [here, there], pretend_on)
        cache = AquaCache(model, codec_for(kind, "decode", 8), window=WINDOW)
        got = feed(model, cache, tokens.to(here), sizes).cpu()
    assert {layer.device for layer in cache.layers} == {here, there}
    same(kind, got, expected)


def float32(kind):
    _in_dtype(kind, torch.float32, NEAR)


def float16(kind):
    _in_dtype(kind, torch.float16, 0.2)


def bfloat16(kind):
    # The exact cache's own logits are up to a third off those in float32.
    _in_dtype(kind, torch.bfloat16, 1.0)


def _in_dtype(kind, dtype, bound):
    """Generate in a dtype; logits are as near the exact cache's as 8 bits and rounding allow."""
    model, cache = setting(kind, dtype)
    out = model.generate(
        random_tokens(2, LENGTH, seed=15), past_key_values=cache, output_logits=True,
        return_dict_in_generate=True, **GREEDY,
    )  # fmt: skip
    coded(cache, 2)
    assert {layer.dtype for layer in cache.layers if isinstance(layer, AquaLayer)} == {dtype}
    expected = exact_logits(shared(kind, F64), out.sequences)[:, LENGTH - 1 : -1]
    got = torch.stack(out.logits, 1).double()
    assert got.shape == (2, NEW, VOCAB)
    assert float((got - expected).abs().max()) < bound


#: Column of the table: what checks it.
FEATURES = {
    "rotation undone": rotation,
    "streaming = one pass": streaming,
    "attention to codes": attention_to_codes,
    "past 128 tokens": past_original_length,
    "greedy": greedy,
    "sampling": sampling,
    "several sequences": return_sequences,
    "beam search": beam_search,
    "contrastive": contrastive,
    "assisted": assisted,
    "assisted, no exact window": assisted_beyond,
    "prompt lookup": prompt_lookup,
    "chunked prefill": chunked_prefill,
    "several turns": several_turns,
    "left padding": left_padding,
    "right padding": right_padding,
    "select, repeat": select_and_repeat,
    "evict": evict,
    "streamer": streamer,
    "torch.compile": compiled,
    "CPU offload": cpu_offloaded,
    "two devices": two_devices,
    "float32": float32,
    "float16": float16,
    "bfloat16": bfloat16,
}
