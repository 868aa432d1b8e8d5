"""Models whose layers lie on several devices: pretended ones, where a forgotten move fails; and two GPUs."""

import dataclasses
from importlib.util import find_spec

import pytest
import torch

from aquakv import AquaCache, DecodeGraph, WindowConfig, calibrate, evaluate_quality, preset
from aquakv.errors import ConfigError, UnsupportedModelError
from aquakv.models.adapter import adapt
from aquakv.numerics import rans
from placed import place
from pretend_devices import TYPE, PretendedDevices, pretend_on
from tiny_models import (
    VARIANTS,
    WINDOW,
    build,
    codec_for,
    feed,
    random_tokens,
    same_bits,
    shared,
    variant,
    wide,
)

HERE, THERE = torch.device(TYPE, 0), torch.device(TYPE, 1)
SIZES = [25, 1, 5, 9]
MASK = torch.stack([(torch.arange(40) >= pad).long() for pad in (0, 7)])


@pytest.fixture
def spread(monkeypatch):
    """Return what places a model on pretended devices; within the test, these are there."""
    for name in ("_encode_steps", "_decode_steps"):  # tensors of inference mode cannot be dressed up
        monkeypatch.setattr(rans, name, getattr(rans, name).__wrapped__)
    with PretendedDevices():
        yield lambda model, devices=(HERE, THERE): place(model, devices, pretend_on)


def _run(model, codec, tokens, sizes=SIZES, mask=None, **options):
    """Return logits on the CPU."""
    device = adapt(model).device
    mask = None if mask is None else mask.to(device)
    cache = AquaCache(model, codec, **options)
    return feed(model, cache, tokens.to(device), sizes, mask).cpu(), cache


def test_pretended_devices_keep_tensors_apart(spread):
    here, there = (torch.arange(6.0).view(2, 3).to(device) for device in (HERE, THERE))
    assert (here.device, there.device) == (HERE, THERE)
    assert same_bits([(here @ here.T).cpu()], [(there.to(HERE) @ here.T).cpu()])
    for attempt in (
        lambda: here + there,
        lambda: here + torch.ones(2, 3),
        lambda: torch.cat([here, there]),
        lambda: here[there.long()[0] % 2],
        lambda: here.index_copy_(0, torch.zeros(1, dtype=torch.long), here[:1]),
        lambda: here.__setitem__(0, there[0]),
        lambda: torch.mul(here, here, out=there),
    ):
        with pytest.raises(RuntimeError, match="on one device"):
            attempt()


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("attention", ["fused", "general"])
def test_two_devices_give_what_one_gives(spread, kind, attention):
    codec, tokens = codec_for(kind, "decode", 8), random_tokens(2, 40, seed=3)
    expected, _ = _run(build(kind, dtype=torch.float64), codec, tokens, mask=MASK, attention=attention)
    got, cache = _run(spread(build(kind, dtype=torch.float64)), codec, tokens, mask=MASK, attention=attention)
    # The CPU has an attention of its own.
    torch.testing.assert_close(got[MASK.bool()], expected[MASK.bool()], atol=1e-10, rtol=0)
    assert {layer.device for layer in cache.layers} == {HERE, THERE}
    assert min(cache.layout.coded) >= 24


def test_latents_are_kept_where_the_layers_are(spread):
    codec, tokens = codec_for("llama", "decode"), random_tokens(2, 140, seed=4)
    model = spread(build("llama"))
    options = {
        "window": WindowConfig(sink_tokens=2, recent_window=0, block_tokens=64),
        "attention": "fused",
        "backend": "torch",
    }
    sizes = [75, *[1] * 65]  # latents are taken from a step, and made anew behind one
    expected, _ = _run(model, codec, tokens, sizes, **options)
    got, cache = _run(model, codec, tokens, sizes, **options, keep_latents=True)
    assert torch.equal(got, expected)
    assert [held.device for held in cache._state.kept_latents.tensors] == [
        layer.device for layer in cache.layers[1:]
    ]
    assert {layer.device for layer in cache.layers} == {HERE, THERE}


@pytest.mark.parametrize("name", ["paper", "storage", "two-stage"])
def test_other_codecs(spread, name):
    tokens = random_tokens(2, 40, seed=4)
    expected, _ = _run(build(), variant(name), tokens)
    got, cache = _run(spread(build()), variant(name), tokens)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    assert [layer.device for layer in cache.layers] == [HERE, THERE, HERE]


@pytest.mark.parametrize("size", [1, 2])
def test_kernels_definitions(spread, size):
    model, codec = wide()
    tokens = random_tokens(size, 144, seed=6)
    sizes = [140, *[1] * 4]
    expected, _ = _run(model, codec, tokens, sizes, backend="torch")
    got, cache = _run(
        spread(build("llama", hidden_size=64, head_dim=64, vocab_size=300)),
        codec,
        tokens,
        sizes,
        backend="torch",
    )
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=0)
    assert cache.layout.coded == [128] * size
    assert all(layer.pages.records is not None for layer in cache.layers)


def test_rows_are_chosen_and_tokens_taken_back(spread):
    window = WindowConfig(sink_tokens=2, recent_window=4, block_tokens=8)
    tokens, codec = random_tokens(3, 30, seed=5), codec_for("llama", "storage")
    found = []
    for model in (build(), spread(build())):
        _, cache = _run(model, codec, tokens, [30], window=window)
        cache.batch_select_indices(torch.tensor([2, 0]))
        cache.crop(-2)
        more = random_tokens(2, 9, seed=6).to(adapt(model).device)
        found.append(feed(model, cache, more, [1, 8]).cpu())
    torch.testing.assert_close(*found, atol=1e-4, rtol=0)


def test_a_saved_cache_goes_back_to_its_devices(spread, tmp_path):
    model, codec = spread(build()), codec_for("llama", "decode")
    _, cache = _run(model, codec, random_tokens(2, 30, seed=5), [30])
    cache.save(tmp_path / "cache.safetensors")
    loaded = AquaCache.load(tmp_path / "cache.safetensors", model, codec)
    assert [layer.exact.sink_keys.device for layer in loaded.layers] == [HERE, THERE, HERE]
    more = random_tokens(2, 9, seed=6).to(HERE)
    assert torch.equal(feed(model, loaded, more, [1, 8]).cpu(), feed(model, cache, more, [1, 8]).cpu())


@pytest.mark.parametrize(("name", "waiting"), [("paper", "none"), ("decode", "none"), ("decode", "all")])
def test_calibration(spread, name, waiting):
    config, tokens = dataclasses.replace(preset(name), window=WINDOW), random_tokens(8, 48, seed=1)
    model = spread(build())
    codec = calibrate(model, tokens, config, offload=waiting)
    assert codec.calibration["device"] == f"{HERE}, {THERE}"
    alone = calibrate(spread(build(), [HERE]), tokens, config)
    mine, theirs = (one.content()[1] for one in (codec, alone))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert all(type(tensor) is torch.Tensor for tensor in mine.values())


@pytest.mark.parametrize("protocol", ["streaming", "single-pass"])
def test_evaluation(spread, protocol):
    codec, tokens = codec_for("llama", "decode"), random_tokens(2, 40, seed=5)
    one, two = (
        evaluate_quality(model, tokens, {"codec": codec}, protocol=protocol)["codec"].mean_kl
        for model in (spread(build(), [HERE]), spread(build()))
    )
    assert two == one


def test_graphs_are_refused(spread):
    _, codec = wide()
    model = spread(build("llama", hidden_size=64, head_dim=64, vocab_size=300))
    cache = AquaCache(model, codec, backend="torch")
    with pytest.raises(ConfigError, match=f"one CUDA device, got one on {HERE}, {THERE}"):
        DecodeGraph(model, cache, capture=lambda step: step)


def test_devices_of_two_kinds_are_refused(spread):
    model = spread(build(), [HERE])
    model.model.layers[1] = build().model.layers[1]
    with pytest.raises(UnsupportedModelError, match=rf"devices of different kinds \(cpu, {TYPE}\)"):
        AquaCache(model, codec_for())


# --- two GPUs ---------------------------------------------------------------------------------------------

two_gpus = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


def _by_hooks(model):
    return place(model, [torch.device("cuda", 0), torch.device("cuda", 1)])


def _by_accelerate(model):
    from accelerate import dispatch_model

    count = len(model.model.layers)
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    places.update({f"model.layers.{index}": int(2 * index >= count) for index in range(count)})
    return dispatch_model(model, places)


def _offloaded(model):
    """As `_by_accelerate`; the last layer computes on cuda:0; its weights are on the CPU between calls."""
    from accelerate import dispatch_model

    count = len(model.model.layers)
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    places.update({f"model.layers.{index}": index % 2 for index in range(count - 1)})
    return dispatch_model(model, {**places, f"model.layers.{count - 1}": "cpu"}, main_device=0)


needs_accelerate = pytest.mark.skipif(find_spec("accelerate") is None, reason="needs accelerate")
WAYS = [
    pytest.param(_by_hooks, id="hooks", marks=two_gpus),
    pytest.param(_by_accelerate, id="accelerate", marks=[*two_gpus, needs_accelerate]),
    pytest.param(_offloaded, id="offloaded", marks=[*two_gpus, needs_accelerate]),
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["auto", "triton", "torch"])
def test_kernels_on_two_gpus(way, dtype, backend):
    """With one GPU as the current one throughout, kernels have to go to the other by themselves."""
    _, codec = wide()
    tokens, sizes = random_tokens(2, 200, seed=6), [140, *[1] * 60]
    models = [build("llama", hidden_size=64, head_dim=64, vocab_size=300, dtype=dtype) for _ in range(2)]
    expected, _ = _run(models[0].cuda(0), codec, tokens, sizes, backend=backend)
    got, cache = _run(way(models[1]), codec, tokens, sizes, backend=backend)
    assert {layer.device.index for layer in cache.layers} == {0, 1}
    assert min(cache.layout.coded) == 192
    assert torch.cuda.current_device() == 0
    # The same kernels on the same numbers; matrix products may be other ones on the other GPU.
    tolerance = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("attention", ["fused", "general"])
@pytest.mark.parametrize("name", VARIANTS)
def test_two_gpus_give_what_one_gives(way, name, attention):
    if attention == "fused" and name not in ("decode", "guarded", "two-stage"):
        pytest.skip("such codes are reconstructed")
    codec, tokens = variant(name), random_tokens(2, 40, seed=3)
    options = {"mask": MASK, "attention": attention, "backend": "torch"}
    expected, _ = _run(build(dtype=torch.float64).cuda(0), codec, tokens, **options)
    got, _ = _run(way(build(dtype=torch.float64)), codec, tokens, **options)
    torch.testing.assert_close(got[MASK.bool()], expected[MASK.bool()], atol=1e-6, rtol=0)


@pytest.mark.parametrize("way", WAYS)
def test_generation_on_two_gpus(way):
    codec, tokens = codec_for("llama", "decode", 8), random_tokens(2, 30, seed=7).cuda(0)
    found = []
    for model in (build().cuda(0), way(build())):
        cache = AquaCache(model, codec)
        found.append(
            model.generate(tokens, past_key_values=cache, max_new_tokens=20, num_beams=2, do_sample=False)
        )
        assert cache.footprint().coded_values > 0
    assert found[0].tolist() == found[1].tolist()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["paper", "decode", "storage"])
def test_calibration_on_two_gpus(way, name):
    config, tokens = dataclasses.replace(preset(name), window=WINDOW), random_tokens(8, 48, seed=1)
    one, two = (calibrate(model, tokens, config) for model in (build().cuda(0), way(build())))
    assert two.fingerprint == one.fingerprint == adapt(shared()).fingerprint()
    assert two.bits_per_value == pytest.approx(one.bits_per_value, rel=0.05)
    for mine, theirs in zip(two.layers, one.layers, strict=True):
        torch.testing.assert_close(mine.keys.mean, theirs.keys.mean, atol=1e-4, rtol=0)


@pytest.mark.parametrize("way", WAYS)
def test_graphs_on_two_gpus_are_refused(way):
    _, codec = wide()
    model = way(build("llama", hidden_size=64, head_dim=64, vocab_size=300))
    with pytest.raises(ConfigError, match=r"one CUDA device, got one on cuda:0, cuda:1|offloaded"):
        DecodeGraph(model, AquaCache(model, codec))
