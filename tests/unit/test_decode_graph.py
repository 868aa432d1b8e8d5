"""Steps that a graph repeats give what the model's own forward passes give, bit for bit."""

import copy
import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from aquakv import AquaCache, DecodeGraph, WindowConfig, calibrate, preset
from aquakv.cache.graph import CudaCapture
from aquakv.cache.paged import PagedStep
from aquakv.codec import LayerCodec
from aquakv.errors import CacheStateError, ConfigError, ShapeError
from aquakv.eviction import SnapKV
from tiny_models import (
    DECODE_BITS,
    build,
    codec_for,
    feed,
    guarded_codec,
    random_tokens,
    shared,
    two_stage_codec,
    wide,
    with_outliers,
)

PAGED = WindowConfig(sink_tokens=2, recent_window=0, block_tokens=64)


class Recording(TorchDispatchMode):
    """Takes down operations with their arguments, and refuses what brings numbers to the host."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not func.name().startswith(("aten::_local_scalar_dense", "aten::nonzero")), func
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


class Recorded:
    """Captures steps as lists of their operations, which are done again with no Python of the model's."""

    def __init__(self):
        self.captures = self.replays = 0

    def __call__(self, step):
        self.captures += 1
        with Recording() as recording:
            out = step()
        calls = [(*call, tree_leaves(old)) for *call, old in recording.calls]

        def replay():
            self.replays += 1
            made = {}

            def renewed(x):
                return [renewed(part) for part in x] if isinstance(x, (list, tuple)) else made.get(id(x), x)

            for func, args, kwargs, old in calls:
                new = func(*map(renewed, args), **{name: renewed(x) for name, x in kwargs.items()})
                new = [new] if isinstance(new, torch.Tensor) else tree_leaves(new)
                made.update(zip(map(id, old), new, strict=True))
            return made[id(out)]

        return replay


def cache_of(model, codec, window=PAGED, **changes):
    return AquaCache(model, codec, window=window, **{"attention": "fused", "backend": "torch"} | changes)


def codec_named(name, kind="llama"):
    return guarded_codec(kind, fraction=0.05) if name == "guarded" else codec_for(kind, "decode")


def padded(columns, pads):
    tokens = random_tokens(len(pads), columns, seed=3)
    mask = torch.stack([(torch.arange(columns) >= pad).long() for pad in pads])
    return tokens, mask, (mask.cumsum(1) - 1).clamp(min=0)


def stepwise(graph, tokens, first, mask=None, positions=None):
    """Step through tokens from column ``first`` on."""
    return torch.cat(
        [
            graph.step(
                tokens[:, c : c + 1],
                None if mask is None else mask[:, : c + 1],
                None if positions is None else positions[:, c : c + 1],
            )
            for c in range(first, tokens.shape[1])
        ],
        1,
    )


def same_state(one, other):
    assert (one.layout.columns, one.layout.pages) == (other.layout.columns, other.layout.pages)
    assert torch.equal(one.layout.positions, other.layout.positions)
    for ours, theirs in zip(one._compressed, other._compressed, strict=True):
        assert torch.equal(ours.exact.tail_keys, theirs.exact.tail_keys)
        assert torch.equal(ours.exact.tail_values, theirs.exact.tail_values)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize(("kind", "name"), [("llama", "decode"), ("qwen3", "guarded")])
def test_replays_are_forward_passes(kind, name, kept):
    model, codec = shared(kind), codec_named(name, kind)
    tokens = random_tokens(2, 200, seed=4)
    eager, ours = cache_of(model, codec), cache_of(model, codec, keep_latents=kept)
    expected = feed(model, eager, tokens, [115, *[1] * 85])
    recorded = Recorded()
    graph = DecodeGraph(model, ours, capture=recorded)
    found = [feed(model, ours, tokens[:, :115], [115]), stepwise(graph, tokens, 115)]
    assert torch.equal(torch.cat(found, 1), expected)
    same_state(ours, eager)
    # Only the first is the model's own. Columns 130 and 194 make a block due, to be compressed behind them.
    assert recorded.captures == 1
    assert recorded.replays == 85 - 1
    held = ours.footprint()
    assert (held.latent_bytes > 0) == kept
    assert dataclasses.replace(held, latent_bytes=0) == eager.footprint()


@pytest.mark.parametrize(("given", "kept"), [(True, True), (False, False)])
def test_left_padding(given, kept):
    """Rows with two, one and no compressed pages; one has yet to fill its sinks."""
    model, codec, pads = shared("llama"), codec_named("guarded"), (0, 60, 99, 140)
    tokens, mask, positions = padded(200, pads)
    eager, ours = cache_of(model, codec), cache_of(model, codec, keep_latents=kept)
    expected = feed(model, eager, tokens, [141, *[1] * 59], mask)
    recorded = Recorded()
    graph = DecodeGraph(model, ours, capture=recorded)
    feed(model, ours, tokens[:, :141], [141], mask[:, :141])
    # Without them the cache goes by what it knows: where rows begin, and their last positions.
    extra = (mask, positions) if given else (None, None)
    found = stepwise(graph, tokens, 141, *extra)
    assert torch.equal(found, expected[:, 141:])
    same_state(ours, eager)
    assert recorded.captures == 1
    assert recorded.replays > 50


def test_a_hole_among_the_newest_tokens():
    model, codec = shared("llama"), codec_named("decode")
    tokens, mask, positions = padded(110, (0, 9))
    mask[0, 78] = 0
    mask[1, 10] = 0  # a sink
    eager, ours = cache_of(model, codec), cache_of(model, codec)
    expected = feed(model, eager, tokens, [80, *[1] * 30], mask)
    recorded = Recorded()
    feed(model, ours, tokens[:, :80], [80], mask[:, :80])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = stepwise(DecodeGraph(model, ours, capture=recorded), tokens, 80, mask, positions)
    assert torch.equal(found, expected[:, 80:])
    assert recorded.replays == 29


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"output_hidden_states": True}])
def test_generation(settings):
    model, codec = build("llama"), codec_named("decode")
    prompt, mask = random_tokens(3, 115, seed=7), torch.ones(3, 115, dtype=torch.long)
    prompt[1, :11], mask[1, :11] = 0, 0
    settings = {"max_new_tokens": 35, "do_sample": False, "return_dict_in_generate": True, **settings}

    def run(around):
        cache = cache_of(model, codec)
        recorded = Recorded()
        if not around:
            return model.generate(prompt, attention_mask=mask, past_key_values=cache, **settings), recorded
        with DecodeGraph(model, cache, capture=recorded):
            return model.generate(prompt, attention_mask=mask, past_key_values=cache, **settings), recorded

    (theirs, _), (ours, recorded) = run(False), run(True)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert "forward" not in vars(model)
    if not settings.keys() & {"num_beams", "output_hidden_states"}:
        assert recorded.captures == 1
        assert recorded.replays > 30


@pytest.mark.parametrize("kept", [False, True])
def test_what_comes_between(kept):
    """A graph is not repeated once anything that it rests on has changed."""
    model, codec = shared("llama"), codec_named("guarded")
    tokens, recorded = random_tokens(2, 128, seed=3), Recorded()
    ours, eager = cache_of(model, codec, keep_latents=kept), cache_of(model, codec)
    graph = DecodeGraph(model, ours, capture=recorded)

    def both(columns, change=None):
        nonlocal tokens
        if change is not None:
            change(ours)
            change(eager)
        start = ours.get_seq_length()
        part = tokens[: ours.layout.rows, start : start + columns]
        assert torch.equal(stepwise(graph, part, 0), feed(model, eager, part, [1] * columns))
        same_state(ours, eager)

    for cache in (ours, eager):
        feed(model, cache, tokens[:, :75], [75])
    both(4)
    assert (recorded.captures, recorded.replays) == (1, 3)
    both(4, lambda cache: feed(model, cache, tokens[:, 79:80], [1]))  # is such a step too
    assert (recorded.captures, recorded.replays) == (1, 7)
    both(4, lambda cache: feed(model, cache, tokens[:, 84:87], [3]))
    assert (recorded.captures, recorded.replays) == (2, 10)
    both(4, lambda cache: cache.crop(-3))
    assert (recorded.captures, recorded.replays) == (3, 13)
    both(4, lambda cache: cache.reorder_cache(torch.tensor([1, 0])))
    assert (recorded.captures, recorded.replays) == (4, 16)
    both(4, lambda cache: cache.reorder_cache(torch.tensor([0, 1])))  # changes nothing
    assert (recorded.captures, recorded.replays) == (4, 20)
    both(4, lambda cache: cache.batch_select_indices([1]))
    assert (recorded.captures, recorded.replays) == (5, 23)
    twin = copy.deepcopy(ours)
    assert torch.equal(
        feed(model, twin, tokens[:1, 104:106], [1, 1]), feed(model, eager, tokens[:1, 104:106], [1, 1])
    )
    assert stepwise(graph, tokens[:1, 104:106], 0).isfinite().all()
    assert recorded.replays == 25

    def again(cache):
        cache.reset()
        feed(model, cache, tokens[:, :75], [75])

    both(4, again)
    assert (recorded.captures, recorded.replays) == (6, 28)
    mask = torch.ones(2, 80, dtype=torch.long)
    one = graph.step(tokens[:, 79:80], mask)
    other = feed(model, eager, tokens[:, 79:80], [1])
    assert torch.equal(one, other)
    assert (recorded.captures, recorded.replays) == (6, 28)


@pytest.mark.parametrize(
    ("name", "pads", "masked", "more"), [("decode", (0,), False, 3), ("guarded", (0, 31, 61), True, 2)]
)
def test_one_graph_for_many_blocks(name, pads, masked, more, monkeypatch):
    """Until their room is full, what the graph reads stays where it is; rows compress at different times."""
    monkeypatch.setattr("aquakv.cache.records.LEAST_SPARE_BLOCKS", 2)
    model, codec = shared("llama"), codec_named(name)
    steps = 64 * more + 10
    tokens, mask, positions = padded(130 + steps, pads)
    eager, ours = cache_of(model, codec), cache_of(model, codec, keep_latents=masked)
    expected = feed(model, eager, tokens, [130, *[1] * steps], mask)
    feed(model, ours, tokens[:, :130], [130], mask[:, :130])
    recorded = Recorded()
    graph = DecodeGraph(model, ours, capture=recorded)
    extra = (mask, positions) if masked else (None, None)
    found, captures, capacity = [], [], []
    for column in range(130, 130 + steps):
        given = [None if one is None else one[:, : column + 1] for one in extra]
        found.append(stepwise(graph, tokens[:, : column + 1], column, *given))
        captures.append(recorded.captures)
        capacity.append(ours._compressed[0].pages.records.capacity)
    assert torch.equal(torch.cat(found, 1), expected[:, 130:])
    same_state(ours, eager)
    blocks = len(ours.layout.pages)
    before = 2 if len(pads) == 1 else 2 + 1 + 1
    assert blocks == before + more * len(pads)
    # The room is for two blocks of each row. Once it is full everything moves, one step is the model's, and
    # the next is captured.
    assert captures[-1] == 2
    assert capacity[0] == before + 2 * len(pads)
    grown = next(step for step, one in enumerate(capacity) if one > capacity[0])
    second = captures.index(2)
    assert set(captures[1:second]) == {1}
    assert second - grown == 1
    assert recorded.replays == steps - 2


def test_a_hole_that_is_compressed_ends_repeating():
    """Kernels cannot pass over it, so the model's own steps go on another way."""
    model, codec = shared("llama"), codec_named("guarded")
    for positions_too in (True, False):
        tokens, mask, positions = padded(140, (0, 9))
        mask[0, 78] = 0
        if positions_too:
            positions = (mask.cumsum(1) - 1).clamp(min=0)
        eager, ours = cache_of(model, codec), cache_of(model, codec)
        recorded, outputs = Recorded(), []
        feed(model, eager, tokens[:, :110], [110], mask[:, :110])
        feed(model, ours, tokens[:, :110], [110], mask[:, :110])
        found = stepwise(DecodeGraph(model, ours, capture=recorded), tokens, 110, mask, positions)
        for column in range(110, 140):
            with torch.no_grad():
                outputs.append(
                    model(
                        tokens[:, column : column + 1],
                        attention_mask=mask[:, : column + 1],
                        position_ids=positions[:, column : column + 1],
                        past_key_values=eager,
                    ).logits
                )
        assert torch.equal(found, torch.cat(outputs, 1))
        assert (recorded.captures, recorded.replays) == (1, 129 - 110)


def test_a_policy_of_eviction_sees_the_passes_that_compress():
    model, codec = shared("llama"), codec_named("guarded")
    tokens, recorded = random_tokens(1, 140, seed=3), Recorded()
    eager, ours = (cache_of(model, codec, eviction=SnapKV(keep=1000)) for _ in range(2))
    expected = feed(model, eager, tokens, [115, *[1] * 25])
    graph = DecodeGraph(model, ours, capture=recorded)
    found = [feed(model, ours, tokens[:, :115], [115]), stepwise(graph, tokens, 115)]
    assert torch.equal(torch.cat(found, 1), expected)
    same_state(ours, eager)
    assert (recorded.captures, recorded.replays) == (1, 25 - 1 - 1)  # the first, and column 130


def test_compressing_that_fails_leaves_a_cache_to_be_reset(monkeypatch):
    model, codec = shared("llama"), codec_named("decode")
    tokens, cache = random_tokens(1, 140, seed=3), cache_of(model, codec)
    graph = DecodeGraph(model, cache, capture=Recorded())
    feed(model, cache, tokens[:, :120], [120])
    stepwise(graph, tokens[:, :129], 120)

    def fail(self, *arguments):
        raise RuntimeError("no memory")

    monkeypatch.setattr(PagedStep, "compress_layer", fail)
    assert graph.repeats
    with pytest.raises(RuntimeError, match="no memory"):
        graph.step(tokens[:, 129:130])
    with pytest.raises(CacheStateError, match="reset"):
        graph.step(tokens[:, 130:131])


def test_not_captured_shortly_before_everything_moves():
    model, codec = shared("llama"), codec_named("decode")
    tokens, recorded = random_tokens(1, 330, seed=3), Recorded()
    cache = cache_of(model, codec)
    feed(
        model, cache, tokens[:, :314], [70, *[1] * 244]
    )  # three blocks have come since room for four was made
    graph = DecodeGraph(model, cache, capture=recorded)
    stepwise(graph, tokens[:, :323], 314)  # the step of the fourth block is the last but one
    assert recorded.captures == 0
    stepwise(graph, tokens, 323)
    assert recorded.captures == 1
    cache = cache_of(model, codec)
    feed(model, cache, tokens[:, :122], [122])
    stepwise(DecodeGraph(model, cache, capture=recorded), tokens[:, :130], 122)  # but this one has
    assert recorded.captures == 2


def test_a_capture_that_fails_leaves_a_cache_to_be_reset():
    model, codec = shared("llama"), codec_named("decode")
    tokens, cache = random_tokens(1, 90, seed=3), cache_of(model, codec)

    def fail(step):
        raise RuntimeError("no memory")

    graph = DecodeGraph(model, cache, capture=fail)
    feed(model, cache, tokens[:, :70], [70])
    graph.step(tokens[:, 70:71])
    assert not graph.repeats
    with pytest.raises(RuntimeError, match="no memory"):
        graph.step(tokens[:, 71:72])
    with pytest.raises(CacheStateError, match="reset"):
        graph.step(tokens[:, 72:73])
    with pytest.raises(CacheStateError, match="reset"):
        feed(model, cache, tokens[:, 72:73], [1])
    cache.reset()
    feed(model, cache, tokens[:, :70], [70])
    graph.step(tokens[:, 70:71])


def test_errors():
    model, codec = shared("llama"), codec_named("decode")
    with pytest.raises(ConfigError, match="expected a model on one CUDA device, got one on cpu"):
        DecodeGraph(model, cache_of(model, codec))
    for cache, reason in (
        (cache_of(model, codec, attention="general"), "reconstructs"),
        (cache_of(model, codec, WindowConfig(2, 0, 96)), "no whole pages"),
        (cache_of(model, two_stage_codec("llama")), "rows of tokens"),
    ):
        with pytest.raises(ConfigError, match=f"no step can be captured: .*{reason}"):
            DecodeGraph(model, cache, capture=Recorded())
    other = shared("gemma3")
    with pytest.raises(ConfigError, match="sliding windows"):
        DecodeGraph(other, cache_of(other, codec_for("gemma3", "decode")), capture=Recorded())
    with pytest.raises(ConfigError, match="another model"):
        DecodeGraph(build("llama"), cache_of(model, codec), capture=Recorded())
    cache = cache_of(model, codec)
    graph = DecodeGraph(model, cache, capture=Recorded())
    with pytest.raises(CacheStateError, match="the cache is empty"):
        graph.step(torch.ones(1, 1, dtype=torch.long))
    feed(model, cache, random_tokens(2, 70), [70])
    with pytest.raises(ShapeError, match=r"expected input_ids \[2, 1\], got \[2, 2\]"):
        graph.step(torch.ones(2, 2, dtype=torch.long))
    with graph, pytest.raises(CacheStateError, match="entered twice"), graph:
        pass


# --- on a GPU ---------------------------------------------------------------------------------------------


class Waits(TorchDispatchMode):
    """Counts what the host would wait for on a GPU, but not in encoding, which kernels do there."""

    OPERATIONS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal")

    def __init__(self, monkeypatch):
        super().__init__()
        self.count, self.paused = 0, 0
        for name in ("tolist", "cpu", "item", "numpy"):
            monkeypatch.setattr(torch.Tensor, name, self._counted(getattr(torch.Tensor, name)))
        for name in ("encode", "seal"):
            monkeypatch.setattr(LayerCodec, name, self._pausing(getattr(LayerCodec, name)))

    def _counted(self, method):
        def call(*args, **kwargs):
            self.count += not self.paused
            return method(*args, **kwargs)

        return call

    def _pausing(self, method):
        def call(*args, **kwargs):
            self.paused += 1
            try:
                return method(*args, **kwargs)
            finally:
                self.paused -= 1

        return call

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_bools = func.name().startswith("aten::index") and any(
            isinstance(part, torch.Tensor) and part.dtype == torch.bool for part in tree_leaves(args[1])
        )
        self.count += not self.paused and (by_bools or func.name().startswith(self.OPERATIONS))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("pads", [(0,), (0, 0, 9)])
def test_compressing_waits_no_more_often_for_more_layers(pads, monkeypatch):
    """Outliers of all layers are read at once."""
    found, waits = {}, Waits(monkeypatch)
    tokens, mask, _ = padded(210, pads)
    for layers in (2, 5):
        model = build("llama", num_hidden_layers=layers)
        codec = calibrate(model, random_tokens(8, 48, seed=1), preset("decode", DECODE_BITS))
        cache, recorded = cache_of(model, with_outliers(codec, 1e-12, 0.05)), Recorded()
        graph = DecodeGraph(model, cache, capture=recorded)
        feed(model, cache, tokens[:, :120], [120], mask[:, :120])
        # At the first block the host asks how many outliers each row has, and knows it from then on.
        stepwise(graph, tokens[:, :150], 120)
        found[layers], captures = [], recorded.captures
        for column in range(150, 210):
            compresses = cache.compresses_next
            waits.count = 0
            with waits:
                stepwise(graph, tokens[:, : column + 1], column)
            if compresses:
                found[layers].append((column, waits.count))
        assert recorded.captures == captures
        assert all(
            layer.pages.records.outlier_count == 3 * len(cache.layout.pages) for layer in cache._compressed
        )
    assert [column for column, _ in found[2]] == [193 + pad for pad in sorted(set(pads))]
    assert found[2] == found[5]
    assert all(0 < count < 10 for _, count in found[2])


ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def on_gpu(test):
    for mark in ON_GPU:
        test = mark(test)
    return test


@on_gpu
@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize(
    ("dtype", "kept"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]
)
@pytest.mark.parametrize("pads", [(0,), (0, 60, 131)])
def test_a_cuda_graph_is_the_forward_passes(pads, dtype, kept, backend):
    plain, codec = wide()
    model = copy.deepcopy(plain).to("cuda", dtype)
    tokens, mask, _ = padded(440, pads)
    tokens, mask = tokens.cuda(), mask.cuda()
    eager, ours = (cache_of(model, codec, backend=backend, keep_latents=keep) for keep in (False, kept))
    expected = feed(model, eager, tokens, [140, *[1] * 300], mask)
    feed(model, ours, tokens[:, :140], [140], mask[:, :140])
    capture, captures = CudaCapture(torch.device("cuda", torch.cuda.current_device())), []

    def counted(step):
        captures.append(1)
        return capture(step)

    graph, replays = DecodeGraph(model, ours, capture=counted), 0
    for column in range(140, 440):
        steady = graph.repeats and not ours.compresses_next
        # What is captured already never waits for the device, unless a block is compressed behind it.
        torch.cuda.set_sync_debug_mode("error" if steady else "default")
        try:
            found = graph.step(tokens[:, column : column + 1])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        replays += steady
        assert torch.equal(found, expected[:, column : column + 1]), column
    same_state(ours, eager)
    assert len(captures) == 2  # more room was made once
    assert replays > 270


@on_gpu
def test_generation_repeats_a_cuda_graph(monkeypatch):
    plain, codec = wide()
    model = copy.deepcopy(plain).cuda()
    prompt, mask, _ = padded(140, (0, 60))
    prompt, mask = prompt.cuda(), mask.cuda()
    settings = {"attention_mask": mask, "max_new_tokens": 200, "do_sample": False}
    theirs = model.generate(prompt, past_key_values=cache_of(model, codec, backend="auto"), **settings)
    replays, replay = [], torch.cuda.CUDAGraph.replay

    def counting(self):
        replays.append(1)
        replay(self)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counting)
    cache = cache_of(model, codec, backend="auto")
    with DecodeGraph(model, cache):
        ours = model.generate(prompt, past_key_values=cache, **settings)
    assert torch.equal(ours, theirs)
    assert len(replays) > 150
