"""Benchmarks of caches: what they measure is right, whatever the times are."""

import dataclasses

import pytest
import torch
from transformers import DynamicCache

from aquakv import AquaCache, ModelCodec, WindowConfig
from aquakv.errors import ConfigError, DataError
from aquakv.evaluation.bench import WARM_UP, bench_decode, bench_encode, bench_memory, contestants, held_bytes
from tiny_models import build, codec_for, feed, random_tokens, shared

CODECS = {"a": ("decode", 3), "b": ("paper", 2)}
NAMES = ["exact", "a, general path", "a, fused path", "b, general path"]


@pytest.fixture(scope="module")
def codecs():
    return {name: codec_for("llama", *choice) for name, choice in CODECS.items()}


def test_contestants(codecs):
    assert [one.name for one in contestants(codecs)] == NAMES
    assert [one.name for one in contestants(codecs, both_paths=False)] == [NAMES[0], *NAMES[2:]]
    model = shared("llama")
    kinds = [one.build(model) for one in contestants(codecs)]
    assert [type(kind) for kind in kinds] == [DynamicCache, *[AquaCache] * 3]
    assert [kind._fused for kind in kinds[1:]] == [False, True, False]


@pytest.fixture(scope="module")
def paged():
    window = WindowConfig(sink_tokens=2, recent_window=0, block_tokens=64)
    codec = codec_for("llama", "decode")
    return {"a": dataclasses.replace(codec, config=dataclasses.replace(codec.config, window=window))}


def test_caches_that_keep_latents(codecs, paged):
    model, tokens = shared("llama"), random_tokens(1, 80)
    rows = bench_memory(
        model, paged | {"b": codecs["b"]}, tokens, [70], steps=3, keep_latents=True, backend="torch"
    )
    assert [row["contestant"] for row in rows] == [*NAMES[:3], "a, fused path, latents kept", NAMES[3]]
    exact, general, fused, kept, paper = rows
    assert exact["latent_bytes"] is None
    assert general["latent_bytes"] == fused["latent_bytes"] == paper["latent_bytes"] == 0
    cache = AquaCache(model, paged["a"], attention="fused", backend="torch", keep_latents=True)
    feed(model, cache, tokens[:, :73], [70, 1, 1, 1])
    assert kept["latent_bytes"] == cache.footprint().latent_bytes > 0
    # Steps make none where they are kept, so that only what is kept comes on top.
    assert kept["steady_bytes"] - fused["steady_bytes"] == pytest.approx(kept["latent_bytes"], abs=1024)


def test_predictions_of_caches_that_keep_latents(paged):
    rows = bench_decode(
        shared("llama"), paged, random_tokens(1, 90), [70], 6, keep_latents=True, backend="torch"
    )
    assert rows[2]["mean_kl"] == rows[3]["mean_kl"] > 0


def test_latents_are_not_kept_where_kernels_do_not_attend(codecs, paged):
    def asking(model, codecs, backend="auto"):
        bench_memory(model, codecs, random_tokens(1, 72), [70], keep_latents=True, backend=backend)

    with pytest.raises(ConfigError, match=r"got none: they run on a GPU, .* is on cpu"):
        asking(shared("llama"), paged)
    with pytest.raises(ConfigError, match="got none: its quantiser is grid, expected scalar"):
        asking(shared("llama"), {"b": codecs["b"]}, "torch")
    with pytest.raises(ConfigError, match=r"got none$"):
        asking(shared("llama"), {}, "torch")
    with pytest.raises(ConfigError, match="got none: they run on a GPU"):
        asking(build("llama", attn_implementation="eager"), paged)
    window = paged["a"].config.window
    codec = codec_for("smollm3", "decode")
    other = dataclasses.replace(codec, config=dataclasses.replace(codec.config, window=window))
    with pytest.raises(ConfigError, match="got none: kernels rotate every layer's keys"):
        asking(shared("smollm3"), {"a": other}, "torch")


def test_decode_rows(codecs):
    model, tokens, seen = shared("llama", torch.float64), random_tokens(2, 60), []
    rows = bench_decode(model, codecs, tokens, [20, 40], 6, seen.append)
    assert [(row["context"], row["contestant"]) for row in rows] == [(c, n) for c in (20, 40) for n in NAMES]
    for row in rows:
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert (row["rows"], row["steps"], row["dtype"]) == (2, 6, "float64")
    for start in (0, 4):
        exact, general, fused, paper = rows[start : start + 4]
        assert (exact["ratio_to_exact"], exact["mean_kl"], exact["bits_per_value"]) == (1.0, 0.0, 64.0)
        # Two ways to the same predictions; those of another codec are others.
        assert 0 < fused["mean_kl"] == pytest.approx(general["mean_kl"], rel=1e-6)
        assert paper["mean_kl"] != pytest.approx(general["mean_kl"], rel=1e-3)
        assert general["bits_per_value"] == fused["bits_per_value"] < paper["bits_per_value"] * 2
        assert general["ratio_to_exact"] == pytest.approx(general["median_ms"] / exact["median_ms"])
    # The divergence is the mean over all steps, those of warming up included.
    cache = AquaCache(model, codecs["b"])
    full = feed(model, DynamicCache(config=model.config), tokens[:, : 20 + 6 + WARM_UP], [28])
    ours = feed(model, cache, tokens[:, : 20 + 6 + WARM_UP], [20, *[1] * (6 + WARM_UP)])
    p, q = (logits[:, 20:].log_softmax(-1) for logits in (full, ours))
    assert rows[3]["mean_kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-6)
    assert [state.done for state in seen] == list(range(1, seen[-1].total + 1))


def test_encode_rows(codecs):
    rows = bench_encode(shared("llama"), codecs, random_tokens(1, 50), [30], 3)
    assert [row["contestant"] for row in rows] == [NAMES[0], *NAMES[2:]]
    for row in rows:
        assert row["encoding_share"] == pytest.approx(row["ratio_to_exact"] - 1)
        assert row["tokens_per_second"] == pytest.approx(1e3 * 30 / row["median_ms"])
    assert rows[0]["bits_per_value"] == 32.0
    assert rows[1]["bits_per_value"] < rows[0]["bits_per_value"] / 4


def test_memory_rows(codecs):
    model, tokens = shared("llama"), random_tokens(2, 50)
    rows = bench_memory(model, codecs, tokens, [40])
    assert [row["contestant"] for row in rows] == NAMES
    exact = DynamicCache(config=model.config)
    feed(model, exact, tokens[:, :40], [40])
    assert rows[0]["held_bytes"] == held_bytes(exact) == 2 * 3 * 2 * 40 * 32 * 4  # k, v; layers; rows
    cache = AquaCache(model, codecs["a"])
    feed(model, cache, tokens[:, :40], [40])
    assert rows[2]["held_bytes"] == rows[1]["held_bytes"] == cache.footprint().total_bytes
    assert rows[2]["code_bytes"] == cache.footprint().coded_bytes
    assert rows[0]["code_bytes"] is None
    for row in rows:
        # The step holds the cache with one more token, and something to compute with, for all layers' sake
        # less than five times what the model's activations and one layer need.
        assert row["held_bytes"] < row["peak_bytes"] < row["held_bytes"] + 400_000
        assert row["held_ratio_to_exact"] == pytest.approx(row["held_bytes"] / rows[0]["held_bytes"])
        assert row["peak_ratio_to_exact"] == pytest.approx(row["peak_bytes"] / rows[0]["peak_bytes"])


def test_memory_of_prefill_and_of_several_steps(codecs):
    model, tokens = shared("llama"), random_tokens(1, 130)
    rows = bench_memory(model, codecs, tokens, [120], steps=10, prefill_chunk=50)
    whole = bench_memory(model, codecs, tokens, [120], steps=10)
    for row, other in zip(rows, whole, strict=True):
        assert (row["steps"], row["prefill_chunk"], other["prefill_chunk"]) == (10, 50, 120)
        assert row["held_bytes"] < row["prefill_peak_bytes"]
        # Later chunks attend to what earlier ones were compressed to, so other tokens may be outliers.
        held, others = (one["held_bytes"] - (one["outlier_bytes"] or 0) for one in (row, other))
        assert held == others
        assert row["steady_bytes"] < row["peak_bytes"]
    exact, general, fused, _ = rows
    assert exact["steady_bytes"] == 2 * 3 * 130 * 32 * 4
    # Two tails, one full of tokens and one not, and a block of codes more.
    for row, codec in ((general, codecs["a"]), (fused, codecs["a"])):
        cache = AquaCache(model, codec)
        feed(model, cache, tokens, [50, 50, 20, *[1] * 10])
        assert row["steady_bytes"] == pytest.approx(cache.footprint().total_bytes, rel=0.02)
        assert row["outlier_bytes"] < row["code_bytes"] < row["held_bytes"]


def test_memory_that_is_not_enough(codecs, monkeypatch):
    model, tokens, kind = shared("llama"), random_tokens(1, 50), DynamicCache.update

    def scarce(self, *args, **kwargs):
        out = kind(self, *args, **kwargs)
        if out[0].shape[2] > 30:
            raise torch.OutOfMemoryError
        return out

    monkeypatch.setattr(DynamicCache, "update", scarce)
    rows = bench_memory(model, codecs, tokens, [20, 40])
    assert all(row["peak_ratio_to_exact"] > 0 for row in rows[:4])
    assert rows[4]["held_bytes"] is rows[4]["peak_bytes"] is rows[4]["peak_ratio_to_exact"] is None
    assert rows[5]["held_bytes"] > 0
    assert rows[5]["held_ratio_to_exact"] is None


def test_memory_sees_what_a_step_takes(codecs, monkeypatch):
    model, tokens, forward = shared("llama"), random_tokens(1, 50), DynamicCache.update

    def wasteful(self, *args, **kwargs):
        scratch = torch.ones(1 << 20)
        out = forward(self, *args, **kwargs)
        del scratch
        return out

    before = bench_memory(model, {}, tokens, [40])[0]["peak_bytes"]
    monkeypatch.setattr(DynamicCache, "update", wasteful)
    after = bench_memory(model, {}, tokens, [40])[0]["peak_bytes"]
    assert 4 << 20 <= after < before + (4 << 20) + 65536


def test_memory_is_the_same_whoever_comes_first(codecs):
    model, tokens = shared("llama"), random_tokens(1, 50)
    fresh = {
        name: ModelCodec(codec.config, codec.fingerprint, codec.layers) for name, codec in codecs.items()
    }
    first, second = (bench_memory(model, fresh, tokens, [20, 40]) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert one["peak_bytes"] == pytest.approx(other["peak_bytes"], abs=4096)


def test_too_few_tokens(codecs):
    model = shared("llama")
    for call in (
        lambda t: bench_decode(model, codecs, t, [40], 9),
        lambda t: bench_memory(model, codecs, t, [50]),
        lambda t: bench_encode(model, codecs, t, [51], 2),
    ):
        with pytest.raises(DataError, match="benchmark: expected tokens"):
            call(random_tokens(1, 50))
