"""Whatever goes wrong in the middle: afterwards a cache is as it was, or done, or wants a reset.

Faults come from tensor operations, which fail as memory does when it runs out, and from the interpreter,
which may be interrupted between any two lines.
"""

import copy
import os
import sys
from collections import Counter

import pytest
import torch
import transformers.cache_utils
from torch.utils._python_dispatch import TorchDispatchMode

import aquakv.cache
from aquakv import AquaCache
from aquakv.cache import paged
from aquakv.cache.records import Records
from aquakv.codec import LayerCodec
from aquakv.errors import CacheStateError
from aquakv.models.hooks import ModelHooks
from tiny_models import build, codec_for, feed, go_on, random_tokens, shared, variant, wide

F64 = torch.float64
#: Faults of each kind that are tried in each operation, evenly spread over all places where one may come.
POINTS = int(os.environ.get("AQUAKV_FAULT_POINTS", "12"))
_LINES = (os.path.dirname(aquakv.cache.__file__), transformers.cache_utils.__file__)


class _FailingOperation(TorchDispatchMode):
    """Raise at the tensor operation of a number; count them."""

    def __init__(self, at, error):
        super().__init__()
        self.at, self.error, self.count = at, error, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        if self.count == self.at:
            raise self.error
        return function(*args, **(kwargs or {}))


class _FailingLine:
    """Raise before the line of a number, of those of the cache and of transformers' caches; count them."""

    def __init__(self, at, error):
        self.at, self.error, self.count = at, error, 0

    def _trace(self, frame, event, _):
        if event == "call":
            return self._trace if frame.f_code.co_filename.startswith(_LINES) else None
        if event == "line":
            self.count += 1
            if self.count == self.at:
                raise self.error
        return self._trace

    def __enter__(self):
        self._before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_):
        sys.settrace(self._before)


FAULTS = {
    "out of memory": (_FailingOperation, torch.OutOfMemoryError("out of memory")),
    "interrupted operation": (_FailingOperation, KeyboardInterrupt()),
    "interrupted line": (_FailingLine, KeyboardInterrupt()),
}


def _case(name):
    """Return model, codec, settings, columns held before, and the tolerance of another order of sums."""
    if name == "paged":
        return *wide(), {"backend": "torch"}, 127, 1e-3
    kind = "gemma3" if name == "gemma3" else "llama"
    codec = codec_for(kind, "decode") if kind == "gemma3" else variant(name)
    return shared(kind, F64), codec, {}, 40, 1e-9


def _mask(columns, pads=(3, 0)):
    return torch.stack([(torch.arange(columns) >= pad).long() for pad in pads])


#: Sizes of passes, or what is done to the cache.
OPERATIONS = {
    "a step": [1],
    "steps that compress": [1] * 6,
    "a chunk": [14],
    "taking back": lambda cache: cache.crop(-1),
    "evicting": lambda cache: cache.evict(torch.arange(cache.get_seq_length()) % 3 > 0),
    "choosing rows": lambda cache: cache.batch_select_indices([1, 0, 1]),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("name", ["paper", "guarded", "storage", "gemma3", "paged"])
def test_faults(name, operation, fault):
    if operation == "taking back" and name == "gemma3":
        pytest.skip("windows that have slid cannot go back")
    model, codec, settings, held, tolerance = _case(name)
    total = held + 24
    tokens, mask = random_tokens(2, total), _mask(total)
    base = AquaCache(model, codec, **settings)
    feed(model, base, tokens[:, :held], [held - 2, 1, 1], mask[:, :held])
    operation, (failing, error) = OPERATIONS[operation], FAULTS[fault]

    def run(cache, operation):
        if callable(operation):
            operation(cache)
        elif operation:
            go_on(model, cache, tokens, operation, mask)

    def fresh():
        """Return a copy with tables for kernels, which come with the next step."""
        cache = copy.deepcopy(base)
        run(cache, [1])
        return cache

    def state(cache):
        return cache.layout.rows, cache.get_seq_length(), cache.layout.columns

    def expected_after():
        """Return what follows on every state in which the operation may leave an intact cache."""
        parts = [[], operation]
        if not callable(operation):
            parts = [operation[:count] for count in range(len(operation) + 1)]
        found = {}
        for part in parts:
            cache = fresh()
            run(cache, part)
            before = state(cache)
            found[before] = rest(cache)
        return found

    def rest(cache):
        """Feed all that is left; return the last logits."""
        rows = [0, 1] if cache.layout.rows == 2 else [1, 0, 1]
        left = total - cache.get_seq_length()
        sizes = [1, left - 1]
        return go_on(model, cache, tokens[rows], sizes, mask[rows])[:, -3:]

    expected, cache = expected_after(), fresh()
    with failing(0, error) as counting:
        run(cache, operation)
    places = {1 + (counting.count - 1) * i // (POINTS - 1) for i in range(POINTS)}
    outcomes = Counter()
    for at in sorted(places):
        cache = fresh()
        columns = cache.get_seq_length()
        try:
            with failing(at, error):
                run(cache, operation)
        except type(error):
            pass
        else:
            pytest.fail(f"nothing was raised at {at}")
        after = state(cache)
        try:
            found = rest(cache)
        except CacheStateError:
            _refuses_everything(cache)
            cache.reset()
            feed(model, cache, tokens[:, :columns], [columns], mask[:, :columns])
            assert cache.get_seq_length() == columns
            outcomes["refused"] += 1
            continue
        torch.testing.assert_close(found, expected[after], atol=tolerance, rtol=0)
        outcomes["intact"] += 1
    assert sum(outcomes.values()) > 1


def _refuses_everything(cache):
    for use in (
        lambda: cache.crop(-1),
        lambda: cache.evict(torch.zeros(cache.get_seq_length(), dtype=torch.bool)),
        lambda: cache.batch_select_indices([0]),
        lambda: copy.deepcopy(cache),
        lambda: cache.save("/nowhere/at/all"),
        lambda: cache.steady(False),
    ):
        with pytest.raises(CacheStateError, match="reset"):
            use()


def _fails(monkeypatch, owner, name, error, at=1):
    """Let the ``at``-th call of a method fail."""
    method, calls = getattr(owner, name), []

    def call(*args, **kwargs):
        calls.append(None)
        if len(calls) == at:
            raise error
        return method(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)
    return calls


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize(("owner", "method"), [(LayerCodec, "encode"), (LayerCodec, "seal")])
def test_encoding_that_fails(monkeypatch, owner, method, at):
    model, codec, tokens = shared(), codec_for("llama", "storage"), random_tokens(1, 30)
    cache = AquaCache(model, codec)
    _fails(monkeypatch, owner, method, RuntimeError("broken"), at)
    with pytest.raises(RuntimeError, match="broken"):
        feed(model, cache, tokens, [30])
    with pytest.raises(CacheStateError, match="reset"):
        feed(model, cache, tokens, [30])
    _refuses_everything(cache)
    cache.reset()
    assert torch.equal(feed(model, cache, tokens, [30]), feed(model, AquaCache(model, codec), tokens, [30]))


@pytest.mark.parametrize("at", [1, 2, 5])
@pytest.mark.parametrize("method", ["_reserve", "_reserve_places", "make_room", "append"])
def test_growth_that_fails(monkeypatch, method, at):
    model, codec = wide()
    tokens = random_tokens(1, 200)
    cache = AquaCache(model, codec, backend="torch")
    feed(model, cache, tokens[:, :129], [129])
    with monkeypatch.context() as patch:
        _fails(patch, Records, method, torch.OutOfMemoryError("out of memory"), at)
        with pytest.raises(torch.OutOfMemoryError):
            feed(model, cache, tokens[:, 129:], [1] * 71)
    _refuses_everything(cache)
    cache.reset()
    feed(model, cache, tokens, [193, *[1] * 7])


def test_tables_that_fail_behind_the_last_layer_are_made_anew(monkeypatch):
    """What a pass added is complete by then: only what kernels read is not."""
    model, codec = wide()
    tokens, held = random_tokens(1, 290), 192
    cache, other = (AquaCache(model, codec, backend="torch") for _ in range(2))
    for one in (cache, other):
        feed(model, one, tokens[:, :held], [held - 1, 1])
    sizes = [1] * 3
    with monkeypatch.context() as patch:
        _fails(patch, paged.PagedStep, "settle", torch.OutOfMemoryError("out of memory"), at=2)
        with pytest.raises(torch.OutOfMemoryError):
            feed(model, cache, tokens[:, held : held + 3], sizes)
    assert cache.get_seq_length() == held + 2
    feed(model, other, tokens[:, held : held + 2], sizes[:2])
    left = tokens[:, held + 2 :]
    found, expected = (feed(model, one, left, [1] * left.shape[1]) for one in (cache, other))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("broken")])
def test_generation_that_is_interrupted_between_steps_goes_on(kind, error):
    model, codec, prompt = shared(kind), codec_for(kind, "decode"), random_tokens(1, 30)

    class Streamer:
        def __init__(self):
            self.seen = 0

        def put(self, value):
            self.seen += 1
            if self.seen == 9:
                raise error

        def end(self):
            pass

    whole = model.generate(
        prompt, past_key_values=AquaCache(model, codec), max_new_tokens=30, do_sample=False
    )
    cache = AquaCache(model, codec)
    with pytest.raises(type(error)):
        model.generate(prompt, past_key_values=cache, max_new_tokens=30, do_sample=False, streamer=Streamer())
    held = cache.get_seq_length()
    assert 30 < held < 45
    tokens = whole[:, : held + 1]
    out = model.generate(tokens, past_key_values=cache, max_new_tokens=59 - held, do_sample=False)
    assert torch.equal(out, whole)


def test_an_interrupted_pass_does_not_keep_the_cache_alive(codec):
    model = build()
    cache = AquaCache(model, codec)

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        feed(model, cache, random_tokens(1, 30), [30])
    handle.remove()
    hooks = ModelHooks._by_model[model]
    del cache
    assert not hooks._users
    feed(model, AquaCache(model, codec), random_tokens(1, 30), [30])


def test_a_pass_that_is_refused_at_once_changes_nothing(codec):
    model, tokens = shared(), random_tokens(2, 40)
    cache, other = (AquaCache(model, codec) for _ in range(2))
    for one in (cache, other):
        feed(model, one, tokens[:, :30], [30])
    with pytest.raises(CacheStateError, match="keys of"):
        _feed_another_dtype(cache)
    with pytest.raises(CacheStateError, match="2 sequences"):
        feed(model, cache, random_tokens(3, 1), [1])
    assert torch.equal(feed(model, cache, tokens[:, 30:], [10]), feed(model, other, tokens[:, 30:], [10]))


def _feed_another_dtype(cache):
    states = torch.zeros(2, 2, 1, 16, dtype=F64)
    cache.forward_begins(None)
    cache.positions_known(torch.tensor([[30]]))
    try:
        cache.update(states, states, 0)
    finally:
        cache.forward_ends()
