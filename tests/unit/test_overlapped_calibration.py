"""A layer is fitted while the next one is observed: the codec is the same, to the last bit."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from aquakv import calibrate, calibrate_many, preset
from aquakv.calibration import RunStore, ahead
from aquakv.calibration import fit as fit_module
from aquakv.calibration.job import Job
from aquakv.calibration.walk import LayerWalk
from aquakv.evaluation.bench_calibrate import synthetic
from aquakv.evaluation.shapes import random_tokens
from aquakv.models.weights import StreamedWeights
from calibrating import (
    TOKENS,
    Killed,
    config,
    killer,
    same_codec,
    streamed,
    together,
)
from tiny_models import build

NAMES = ("paper", "higgs", "storage", "decode")


@pytest.fixture
def begun(monkeypatch):
    """Let the main sweep see text that planning has not; count batches that were begun beside fits."""
    monkeypatch.setattr("aquakv.calibration.workload.MOST_OBSERVED_BYTES", 1)
    monkeypatch.setattr("aquakv.calibration.workload.MOST_NEEDED_BYTES", 1)
    # Layers are here when they are wanted: how far a test goes must not depend on the disk.
    monkeypatch.setattr(StreamedWeights, "ready", lambda self, part: True)
    found, go_on = [], ahead.Lookahead.go_on

    def counted(self):
        left = self._left
        try:
            go_on(self)
        finally:
            found.extend([self.layer_idx] * (left - self._left))

    monkeypatch.setattr(ahead.Lookahead, "go_on", counted)
    return found


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt-oss"])
def test_the_codec_is_the_same(kind, batch_size, checkpoint, begun):
    configs = {name: config(name) for name in NAMES}
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint(kind))
    whole = calibrate_many(loaded, TOKENS, configs, batch_size=batch_size, overlap=False)
    assert not begun
    for model in (loaded, streamed(checkpoint(kind))):
        timings = {}
        found = calibrate_many(model, TOKENS, configs, batch_size=batch_size, overlap=True, timings=timings)
        assert begun
        begun.clear()
        for name in NAMES:
            assert same_codec(found[name], whole[name])
            assert found[name].calibration["layers"] == whole[name].calibration["layers"]
        assert timings["overlap"]
        assert timings["phases"].keys() == {
            "plan: observe", "plan: fit", "plan: harm", "observe", "fit", "fit, beside observing"
        }  # fmt: skip


def test_a_cpu_does_one_after_the_other_unless_asked(begun):
    timings = {}
    calibrate_many(build(), TOKENS, {"": config("paper")}, timings=timings)
    assert not begun
    assert not timings["overlap"]
    assert "fit, beside observing" not in timings["phases"]


def test_time_counts_once_and_batches_where_they_belong(begun):
    seen, timings = [], {}
    calibrate_many(
        build(),
        TOKENS,
        {"": config("paper")},
        batch_size=2,
        overlap=True,
        progress=seen.append,
        timings=timings,
    )
    assert [state.done for state in seen] == list(range(1, seen[-1].total + 1))
    for layer in range(3):
        of = [state.phase for state in seen if state.layer == layer]
        assert (of.count("observe"), of.count("fit")) == (6, 12)
    order = [(state.layer, state.phase) for state in seen]
    assert order.index((1, "observe")) < order.index((0, "fit"))  # the next layer's first batch comes at once
    assert sum(timings["phases"].values()) == pytest.approx(seen[-1].seconds, rel=0.5)
    assert {key for key in timings["layers"] if "fit" in key[1]} == {
        (0, "fit, beside observing"), (1, "fit, beside observing"), (2, "fit")
    }  # fmt: skip
    assert begun.count(1) <= 6
    assert begun.count(2) <= 6


@pytest.mark.parametrize("due", ["never", "now and then", "always"])
@pytest.mark.parametrize("names", [("paper",), ("storage", "decode")])
def test_going_on_gives_the_same_codec(names, due, tmp_path, monkeypatch, checkpoint, begun):
    asked = []

    def is_due(self, walk, fits):
        asked.append(None)
        return due == "always" or (due == "now and then" and len(asked) % 2 == 1)

    monkeypatch.setattr(RunStore, "is_due", is_due)
    configs, seen = {name: config(name) for name in names}, []
    whole = calibrate_many(streamed(checkpoint()), TOKENS, configs, overlap=False, progress=seen.append)
    total = seen[-1].total
    kills = (
        {total // 9, *range(total - 16 * len(names), total, 4 * len(names) ** 2)}
        if due == "now and then"
        else {total - 7}
    )
    for when in kills:
        directory, model = tmp_path / str(when), streamed(checkpoint())
        with pytest.raises(Killed):
            calibrate_many(
                model, TOKENS, configs, overlap=True, progress=killer(when), store=RunStore(directory)
            )
        assert not any(model.weights._held.values())
        for overlap in (False, True):
            store, again = RunStore(directory, resume=True), streamed(checkpoint())
            with pytest.raises(Killed):  # once more, a little further
                calibrate_many(again, TOKENS, configs, overlap=overlap, progress=killer(5), store=store)
        store = RunStore(directory, resume=True)
        codecs = calibrate_many(streamed(checkpoint()), TOKENS, configs, overlap=True, store=store)
        for name in names:
            assert same_codec(codecs[name], whole[name])
            assert codecs[name].calibration["layers"] == whole[name].calibration["layers"]


class OddError(Exception):
    pass


@pytest.mark.parametrize("where", ["fit", "observe"])
def test_errors_on_either_side_come_out_as_they_are(where, tmp_path, checkpoint, monkeypatch, begun):
    adapter = streamed(checkpoint())
    if where == "fit":
        own = fit_module.CodecFit._predictor

        def fails(self, *args):
            if len(self.layers) == 1:
                raise OddError("here")
            return own(self, *args)

        monkeypatch.setattr(fit_module.CodecFit, "_predictor", fails)
    else:

        def fails(*args, **kwargs):
            if begun:  # beside the fit, not after it
                raise OddError("here")

        adapter.layers[2].register_forward_pre_hook(fails)  # behind the first, activations are kept
    with pytest.raises(OddError, match="here"):
        calibrate(
            adapter, TOKENS, config("paper"), batch_size=2, overlap=True, store=RunStore(tmp_path / "run")
        )
    assert begun
    assert not any(adapter.weights._held.values())
    monkeypatch.undo()
    store = RunStore(tmp_path / "run", resume=True)
    codec = calibrate(streamed(checkpoint()), TOKENS, config("paper"), batch_size=2, store=store)
    assert same_codec(codec, calibrate(streamed(checkpoint()), TOKENS, config("paper"), batch_size=2))


def test_layers_that_are_still_being_read_are_not_waited_for(checkpoint, monkeypatch, begun):
    monkeypatch.setattr(StreamedWeights, "ready", lambda self, part: False)
    codec = calibrate(streamed(checkpoint()), TOKENS, config("paper"), overlap=True)
    assert not begun
    assert same_codec(codec, calibrate(streamed(checkpoint()), TOKENS, config("paper")))


class _Stream:
    """Stands in for a stream of a GPU; what was begun on it is done after some more has been."""

    device = torch.device("cpu")

    def __init__(self, name):
        self.name, self.events, self.waits = name, [], []

    def record_event(self):
        event = SimpleNamespace(query=lambda: len(self.events) - number >= 6)
        number = len(self.events)
        self.events.append(event)
        return event

    def wait_stream(self, other):
        self.waits.append(other.name)

    def synchronize(self):
        self.waits.append("host")


def test_each_side_is_on_its_own_stream(monkeypatch, begun):
    """On a GPU: at most so many batches are under way, and fits begin when the observation is there."""
    observing, fitting, used, under_way = _Stream("observing"), _Stream("fitting"), set(), []
    current = [observing]

    @contextlib.contextmanager
    def on(stream):
        current.append(stream)
        try:
            yield
        finally:
            current.pop()

    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: current[-1])
    lanes, lookahead = ahead.Lanes.__init__, ahead.Lookahead.__init__
    encode, layer, room = fit_module.CodecFit._encode_batch, LayerWalk.advance, ahead.Lookahead._room

    def with_streams(self, *args):
        lanes(self, *args)
        self.stream = fitting

    def with_stream(self, *args):
        lookahead(self, *args)
        self._stream = current[-1]

    def encoding(self, *args):
        used.add(("encode", current[-1].name))
        return encode(self, *args)

    def advancing(self, *args):
        for vectors in layer(self, *args):
            used.add(("advance", current[-1].name))
            yield vectors

    def counting(self):
        found = room(self)
        under_way.append(len(self._under_way) + found)
        return found

    whole = calibrate(build(), TOKENS, config("paper"), batch_size=1, overlap=False)
    monkeypatch.setattr(ahead.Lanes, "__init__", with_streams)
    monkeypatch.setattr(ahead.Lookahead, "__init__", with_stream)
    monkeypatch.setattr(ahead.Lookahead, "_room", counting)
    monkeypatch.setattr(fit_module.CodecFit, "_encode_batch", encoding)
    monkeypatch.setattr(LayerWalk, "advance", advancing)
    codec = calibrate(build(), TOKENS, config("paper"), batch_size=1, overlap=True)
    assert same_codec(codec, whole)
    assert used == {("encode", "fitting"), ("advance", "observing")}
    assert fitting.waits == ["observing", "host"] * 3
    assert begun == 6 * [1] + 6 * [2]  # half of what there is
    assert set(under_way) == {ahead.AHEAD}
    assert current == [observing]


def test_processes_that_go_ahead_differently_do_not_wait_for_each_other(tmp_path, checkpoint):
    """How far a process gets beside a fit depends on its GPU: what they exchange comes in one order."""
    first = """
import random
from aquakv.calibration import ahead, workload
workload.MOST_OBSERVED_BYTES = workload.MOST_NEEDED_BYTES = 1
chance = random.Random(Group.current(place).rank)
ahead.Lookahead._room = lambda self: chance.choice([0, 0, 1, 2])
"""
    found = together(checkpoint(), tmp_path, NAMES, overlaps=(True, False), first=first)
    for name in NAMES:
        (one, other), (plain, _) = found[name, True], found[name, False]
        assert same_codec(one, other)
        assert same_codec(one, plain)


# --- on a GPU ---------------------------------------------------------------------------------------------

ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def gpu(test):
    for mark in ON_GPU:
        test = mark(test)
    return test


@pytest.fixture
def planned_once(monkeypatch):
    """Plan once: sums of levels' statistics depend on the order in which a GPU's threads come to add."""
    found, plan = [], Job.plan

    def first(self, ticker):
        if not found:
            found.append(plan(self, ticker))
        return (*found[0][:2], [])

    monkeypatch.setattr(Job, "plan", first)


@gpu
@pytest.mark.usefixtures("planned_once")
@pytest.mark.parametrize("offload", ["none", "hidden", "all"])
@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_gives_the_same_codec(name, offload, checkpoint, tmp_path, begun):
    directory, cuda, seen = checkpoint("llama"), torch.device("cuda"), []
    whole = calibrate(streamed(directory, cuda), TOKENS, config(name), batch_size=1, overlap=False)
    assert not begun
    found = calibrate(
        streamed(directory, cuda),
        TOKENS,
        config(name),
        batch_size=1,
        offload=offload,
        overlap=True,
        progress=seen.append,
    )
    assert begun
    assert same_codec(found, whole)
    with pytest.raises(Killed):
        calibrate(
            streamed(directory, cuda),
            TOKENS,
            config(name),
            batch_size=1,
            offload=offload,
            overlap=True,
            progress=killer(seen[-1].done - 8),
            store=RunStore(tmp_path / "run"),
        )
    again = calibrate(
        streamed(directory, cuda),
        TOKENS,
        config(name),
        batch_size=1,
        offload=offload,
        overlap=True,
        store=RunStore(tmp_path / "run", resume=True),
    )
    assert same_codec(again, whole)


@gpu
@pytest.mark.usefixtures("planned_once")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_a_busy_gpu_gives_the_same_codec(name, dtype, begun):
    """Layers large enough that both streams have work at the same time."""
    adapter = synthetic("llama-3.2-1b", 5, dtype, torch.device("cuda"))
    tokens = random_tokens(adapter.model, 24, 1024)
    whole = calibrate(adapter, tokens, preset(name), batch_size=2, overlap=False)
    for offload in ("none", "hidden", "all"):
        found = calibrate(adapter, tokens, preset(name), batch_size=2, offload=offload, overlap=True)
        assert begun
        begun.clear()
        assert same_codec(found, whole)
