"""Policies: what they have seen is the model's own attention, and what they keep follows from it."""

import copy

import pytest
import torch

from aquakv import H2O, AquaCache, SnapKV, WindowConfig, evaluate_pruning
from aquakv.cache.fused import CodedView
from aquakv.errors import ConfigError, DataError
from aquakv.evaluation.pruned import Contestant, default_context, exact_codec
from aquakv.eviction import EvictionPolicy, PassScores
from aquakv.eviction.policy import newest
from aquakv.models.adapter import adapt
from tiny_models import VARIANTS, build, codec_for, feed, go_on, random_tokens, shared, variant

F64 = torch.float64
ALL_EXACT = WindowConfig(sink_tokens=2, recent_window=1000, block_tokens=8)


class Watching(EvictionPolicy):
    """Evicts nothing; keeps what it is told."""

    accumulates = True

    def __init__(self):
        self.found = []

    def watched(self, new_columns):
        return new_columns

    def choose(self, found):
        self.found.append(found)


def _padded(columns, pads):
    return torch.stack([(torch.arange(columns) >= pad).long() for pad in pads])


# --- what is seen -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "gemma3", "gpt-oss"])
@pytest.mark.parametrize("sizes", [[30], [11, 1, 1, 12, 5]])
def test_scores_are_the_models_attention(kind, sizes):
    """Softcaps, learned sinks, padding and causality included: as eager attention says."""
    model = build(kind)
    model.set_attn_implementation("eager")
    tokens, mask = random_tokens(3, 30, seed=1), _padded(30, [6, 0, 1])
    with torch.no_grad():
        whole = model(
            tokens,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            output_attentions=True,
        )
    layers = adapt(model).compressed_layers
    real = mask[:, None, :, None]
    expected = sum((whole.attentions[layer][..., :30] * real).sum((1, 2)) for layer in layers)
    policy = Watching()
    cache = AquaCache(model, codec_for(kind, "decode"), window=ALL_EXACT, eviction=policy)
    feed(model, cache, tokens, sizes, mask)
    found = policy.found[-1]
    torch.testing.assert_close(found.scores * mask, expected * mask, atol=1e-4, rtol=1e-4)
    assert torch.equal(found.held, mask.bool())
    assert found.fed.tolist() == [24, 30, 29]


def test_large_passes_are_watched_in_parts(monkeypatch):
    model, tokens, found = shared(), random_tokens(2, 40), []
    for most in (2**24, 1000):
        monkeypatch.setattr("aquakv.eviction.weights.MOST_WEIGHTS", most)
        policy = Watching()
        feed(model, AquaCache(model, codec_for(), eviction=policy), tokens, [33, 7])
        found.append(policy.found[-1].scores)
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)
    per_query = 3 * 4  # layers and heads
    torch.testing.assert_close(found[0].sum(1), torch.full((2,), 40.0 * per_query), atol=1e-3, rtol=0)


def test_scores_follow_the_rows():
    model, tokens, policy = shared(), random_tokens(3, 40), Watching()
    cache = AquaCache(model, codec_for(), window=ALL_EXACT, eviction=policy)
    feed(model, cache, tokens[:, :30], [30])
    cache.crop(-4)
    cache.batch_select_indices([2, 0])
    other = copy.deepcopy(cache)
    feed(model, cache, tokens[[2, 0], 26:31], [5])
    fresh = Watching()
    feed(model, AquaCache(model, codec_for(), window=ALL_EXACT, eviction=fresh), tokens[[2, 0], :31], [26, 5])
    columns = policy.found[-1].scores, fresh.found[-1].scores
    # What the tokens that were taken back had attended to stays counted.
    assert (columns[0] >= columns[1] - 1e-4).all()
    assert (columns[0][:, 26:] - columns[1][:, 26:]).abs().max() < 1e-4
    feed(model, other, tokens[[2, 0], 26:31], [5])
    assert torch.equal(policy.found[-1].scores, columns[0])
    cache.reset()
    feed(model, cache, tokens[:, :9], [9])
    assert policy.found[-1].fed.tolist() == [9] * 3


# --- what stays -------------------------------------------------------------------------------------------


def _found(scores, fed=None, new=100, held=None):
    scores = torch.tensor([scores])
    held = torch.ones_like(scores, dtype=torch.bool) if held is None else torch.tensor([held])
    return PassScores(scores, held, torch.tensor([scores.shape[1] if fed is None else fed]), new)


def test_h2o_keeps_the_heavy_and_the_new():
    scores = [9.0, 1, 5, 2, 7, 1, 0, 0]
    stays = H2O(0.5, every=1).choose(_found(scores))
    assert stays.nonzero()[:, 1].tolist() == [0, 4, 6, 7]
    assert H2O(3, recent=0.4, every=1).choose(_found(scores)).nonzero()[:, 1].tolist() == [0, 4, 7]
    assert H2O(0.5, every=5).choose(_found(scores)) is None
    gone = [False, True, True, True, True, True, True, False]
    assert H2O(0.5, every=1).choose(_found(scores, held=gone)).nonzero()[:, 1].tolist() == [2, 4, 5, 6]


def test_snapkv_keeps_the_window_and_what_it_looks_at():
    scores = [0.0, 0, 6, 0, 0, 0, 1, 0, 0, 0]
    stays = SnapKV(0.5, window=2, pool=3).choose(_found(scores, new=10))
    assert stays.nonzero()[:, 1].tolist() == [1, 2, 3, 8, 9]
    assert SnapKV(0.5, window=2, pool=1).choose(_found(scores, new=10)).nonzero()[:, 1].tolist() == [
        0,
        2,
        6,
        8,
        9,
    ]
    assert SnapKV(0.5, window=2).choose(_found(scores, new=2)) is None
    assert SnapKV(1, window=2).choose(_found(scores, new=10)).nonzero()[:, 1].tolist() == [8, 9]


def test_newest():
    held = torch.tensor([True, False, True, True, False])
    assert newest(held, 2).tolist() == [False, False, True, True, False]
    assert newest(held, 9).tolist() == held.tolist()
    assert not newest(held, 0).any()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: H2O(0.0), "H2O: keep: expected a fraction"),
        (lambda: SnapKV(1.5), "SnapKV: keep"),
        (lambda: SnapKV(0), "keep"),
        (lambda: H2O(True), "keep"),
        (lambda: H2O(recent=1.1), "H2O: recent"),
        (lambda: H2O(every=0), "H2O: every"),
        (lambda: SnapKV(window=0), "SnapKV: window"),
        (lambda: SnapKV(pool=4), "SnapKV: pool: expected an odd"),
    ],
)
def test_impossible_settings(make, says):
    with pytest.raises(ConfigError, match=says):
        make()


# --- with a cache -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("policy", [H2O(0.5, every=8), SnapKV(0.5, window=4), H2O(20, every=1)])
def test_generation_within_the_budget(name, policy):
    model, cache = shared(), AquaCache(shared(), variant(name), eviction=policy)
    tokens, mask = random_tokens(3, 60, seed=2), _padded(60, [7, 0, 20])
    model.generate(tokens, attention_mask=mask, past_key_values=cache, max_new_tokens=21, do_sample=False)
    assert cache.get_seq_length() == 80
    held = cache.layout.held_columns().sum(1).tolist()
    prompts, fed = [53, 60, 40], [73, 80, 60]
    if isinstance(policy, SnapKV):
        assert held == [round(0.5 * prompt) + 20 for prompt in prompts]
    else:
        budgets = [20 if policy.keep == 20 else round(0.5 * count) for count in fed]
        assert all(b <= h < b + policy.every for b, h in zip(budgets, held, strict=True))
    assert cache.footprint().bits_per_original_value < 12


@pytest.mark.parametrize("num_beams", [1, 3])
def test_beams(num_beams):
    model = shared()
    cache = AquaCache(model, codec_for("llama", "decode"), eviction=H2O(0.5, every=4))
    out = model.generate(
        random_tokens(2, 30), past_key_values=cache, max_new_tokens=12, num_beams=num_beams, do_sample=False
    )
    assert out.shape == (2, 42)
    assert cache.layout.held_columns().sum(1).max() < 26


def test_decoding_after_snapkv_attends_to_codes(monkeypatch):
    calls, attend = [], CodedView.attend
    monkeypatch.setattr(CodedView, "attend", lambda *args: calls.append(None) or attend(*args))
    model = shared()
    cache = AquaCache(model, codec_for("llama", "decode"), eviction=SnapKV(0.5, window=4))
    feed(model, cache, random_tokens(2, 50), [45, 1, 1, 1, 2])
    assert len(calls) == 4 * 3
    cache.eviction = H2O()
    feed(model, cache, random_tokens(2, 2), [1, 1])
    assert len(calls) == 4 * 3
    cache.eviction = None
    assert cache.eviction is None
    feed(model, cache, random_tokens(2, 1), [1])
    assert len(calls) == 5 * 3


def test_other_caches_of_the_model_are_not_watched():
    model, policy = shared(), Watching()
    watched, other = (AquaCache(model, codec_for(), eviction=one) for one in (policy, None))
    feed(model, watched, random_tokens(1, 20), [20])
    feed(model, other, random_tokens(1, 20), [20])
    with torch.no_grad():
        model(random_tokens(1, 20))
    before = policy.found[-1].scores.clone()
    feed(model, watched, random_tokens(1, 1), [1])
    assert len(policy.found) == 2
    added = policy.found[-1].scores.sum() - before.sum()
    assert added == pytest.approx(12, abs=1e-3)  # one query, in 3 layers of 4 heads


def test_a_loaded_cache_goes_on_with_its_policy(tmp_path):
    model, tokens = shared(), random_tokens(2, 60)
    cache = AquaCache(model, codec_for(), eviction=SnapKV(0.5, window=4))
    feed(model, cache, tokens[:, :40], [40])
    cache.save(tmp_path / "cache")
    loaded = AquaCache.load(tmp_path / "cache", model, codec_for(), eviction=SnapKV(0.5, window=4))
    ones = torch.ones_like(tokens)
    found, expected = (go_on(model, one, tokens, [1, 19], ones) for one in (loaded, cache))
    assert torch.equal(found, expected)
    assert torch.equal(loaded.layout.held_columns(), cache.layout.held_columns())


# --- evaluation -------------------------------------------------------------------------------------------


def test_evaluation_compares_what_follows_a_pruned_context():
    model, tokens, codec = shared("llama", F64), random_tokens(3, 90, seed=1), codec_for("llama", "decode", 8)
    contestants = {
        "exact": Contestant(),
        "codec": Contestant(codec),
        "all": Contestant(None, SnapKV(1.0, window=4)),
        "half": Contestant(None, H2O(0.5, every=1)),
        "both": Contestant(codec, H2O(0.5, every=1)),
    }
    steps = []
    found = evaluate_pruning(model, tokens, contestants, 42, batch_size=2, progress=steps.append)
    assert (steps[-1].done, steps[-1].total) == (18, 18)
    for name, quality in found.items():
        assert quality.tokens == 3 * 47
        assert quality.baseline_perplexity == found["exact"].baseline_perplexity
        if name in ("exact", "all"):
            assert abs(quality.mean_kl) < 1e-6
            assert quality.top1_agreement == 1
    assert found["codec"].mean_kl < found["both"].mean_kl
    assert found["half"].mean_kl > 1e-4
    assert found["half"].bits_per_original_value == pytest.approx(
        found["exact"].bits_per_original_value / 2, rel=0.01
    )
    assert found["both"].held_values * 2 == found["both"].original_values
    assert found["codec"].bits_per_value == pytest.approx(found["both"].bits_per_value, rel=0.3)


def test_evaluation_is_token_by_token():
    """The blocks in which the rest is fed change nothing."""
    model, tokens, codec = shared("llama", F64), random_tokens(1, 70, seed=1), codec_for("llama", "paper")
    policy = SnapKV(0.5, window=4)
    found = evaluate_pruning(model, tokens, {"": Contestant(codec, policy)}, 37)[""]
    cache = AquaCache(model, codec, eviction=policy)
    feed(model, cache, tokens[:, :37], [37])
    logits = feed(model, cache, tokens[:, 37:], [1] * 33)[:, :-1]
    nll = torch.nn.functional.cross_entropy(logits[0].float(), tokens[0, 38:])
    assert found.nll / found.tokens == pytest.approx(float(nll), abs=1e-5)


def test_contexts():
    assert default_context(2048, WindowConfig()) == 4 + 7 * 128
    assert default_context(2048, WindowConfig(recent_window=100)) == 104 + 7 * 128
    assert default_context(2048, exact_codec(shared()).config.window) == 4 + 7 * 128
    assert default_context(100, WindowConfig()) == 50
    with pytest.raises(DataError, match="a context of 1 to 18"):
        evaluate_pruning(shared(), random_tokens(1, 20), {}, 19)
