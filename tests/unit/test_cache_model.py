"""Random sequences of cache operations, against a plain model of what a cache holds.

The model is lists of tokens. A token is what was fed: its column, its position, its exact keys and values at
every layer, and what the codec makes of them when it is given this token alone. Which tokens are compressed
follows from the window. Keys and values are fed without running the model, so that every token's are known.
"""

import copy
import dataclasses
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aquakv import AquaCache, WindowConfig
from aquakv.errors import CacheStateError
from aquakv.models.adapter import adapt
from aquakv.models.rotary import rotate, unrotate
from tiny_models import WINDOW, shared, variant

MOST_ROWS = 4


@dataclasses.dataclass
class Token:
    """A token that was fed; keys and values ``[layers, 2, heads, head_dim]``, exact and from codes."""

    column: int
    exact: torch.Tensor
    coded: torch.Tensor


@dataclasses.dataclass
class Row:
    """A sequence: sinks, where those that were evicted leave None, compressed tokens, and the rest."""

    sinks: list
    coded: list
    tail: list
    position: int = 0

    def tokens(self):
        return [token for token in (*self.sinks, *self.coded, *self.tail) if token is not None]

    def compress(self, window):
        while not self.coded and self.tail and len(self.sinks) < window.sink_tokens:
            self.sinks.append(self.tail.pop(0))
        while len(self.tail) >= window.recent_window + window.block_tokens:
            self.coded += self.tail[: window.block_tokens]
            del self.tail[: window.block_tokens]

    def keep(self, stays):
        self.coded = [token for token in self.coded if stays(token)]
        self.tail = [token for token in self.tail if stays(token)]
        self.sinks = [token if token is not None and stays(token) else None for token in self.sinks]
        if not self.coded:
            self.tail = [token for token in self.sinks if token is not None] + self.tail
            self.sinks = []

    def copy(self):
        return Row(list(self.sinks), list(self.coded), list(self.tail), self.position)


class Rig:
    """A cache and its plain model, side by side."""

    def __init__(self, name, window, rows, attention):
        self.model, self.window, self.attention = shared(), window, attention
        kept = attention == "kept decoded"
        self.settings = {"attention": "general" if kept else attention, "keep_decoded": kept}
        self.adapter = adapt(self.model)
        self.cache = AquaCache(self.model, variant(name), window=window, **self.settings)
        self.codec = self.cache.codec
        self.rows = [Row([], [], []) for _ in range(rows)]
        self.real = torch.zeros(rows, 0, dtype=torch.long)

    @property
    def seen(self):
        return self.real.shape[1]

    # --- operations -------------------------------------------------------------------------------------

    def append(self, count, seed, pads=0):
        """Feed tokens; rows begin with up to ``pads`` columns of padding, each with another number."""
        rows, new, old = len(self.rows), torch.Generator().manual_seed(seed), self.seen
        real = torch.ones(rows, count, dtype=torch.long)
        for row in range(rows):
            if not old:
                real[row, : min(count, pads * row)] = 0
        counted = torch.tensor([row.position for row in self.rows])[:, None] + real.cumsum(1) - 1
        positions = counted.clamp(min=0)
        shape = (len(self.codec.layers), 2, rows, count, self.adapter.num_kv_heads, self.adapter.head_dim)
        exact = torch.randn(shape, generator=new)
        coded = self.from_codes(exact.flatten(2, 3), positions.flatten()).view(shape)
        self.real = torch.cat([self.real, real], 1)
        before = copy.deepcopy(self.cache) if self.attention == "fused" else None
        if before is not None:
            before._fused = False
            columns = self.through(before, exact, positions)
        else:
            columns = self.through(self.cache, exact, positions)
        self.check(columns, exact)
        if before is not None:
            self.check_attention(self.through(self.cache, exact, positions), columns, new)
        for index, row in enumerate(self.rows):
            for place in range(count):
                if real[index, place]:
                    parts = (values[:, :, index, place] for values in (exact, coded))
                    row.tail.append(Token(old + place, *parts))
            row.position += int(real[index].sum())
            row.compress(self.window)

    def evict(self, share, seed):
        draw = torch.Generator().manual_seed(seed)
        keep = torch.rand(len(self.rows), self.seen, generator=draw) < share
        if seed % 3 == 0:  # a run of columns, the same of all rows
            first, last = sorted(torch.randint(0, self.seen + 1, (2,), generator=draw).tolist())
            column = torch.arange(self.seen)
            keep = ((column < first) | (column >= last)).expand(len(self.rows), -1)
        self.cache.evict(keep[0] if seed % 3 == 0 else keep)
        for own, row in zip(keep.tolist(), self.rows, strict=True):
            row.keep(lambda token, own=own: own[token.column])
            row.compress(self.window)

    def crop(self, count):
        count, after = min(count, self.seen), self.seen - min(count, self.seen)
        if any(token.column >= after for row in self.rows for token in row.coded):
            with pytest.raises(CacheStateError, match="recent_window"):
                self.cache.crop(-count)
            return
        self.cache.crop(-count if count % 2 else after) if after else self.cache.crop(-count)
        for index, row in enumerate(self.rows):
            # A position is used up by each real column, evicted or not.
            row.position -= int(self.real[index, after:].sum())
            sinks = row.sinks
            row.keep(lambda token: token.column < after)
            assert not row.coded or row.sinks == sinks
            row.compress(self.window)
        self.real = self.real[:, :after]

    def select(self, seed, how):
        draw = torch.Generator().manual_seed(seed)
        present = len(self.rows)
        if how == "reorder":
            chosen = torch.randint(0, present, (present,), generator=draw)
            self.cache.reorder_cache(chosen)
        elif how == "repeat" and 2 * present <= MOST_ROWS:
            chosen = torch.arange(present).repeat_interleave(2)
            self.cache.batch_repeat_interleave(2)
        else:
            chosen = torch.randint(0, present, (1 + seed % MOST_ROWS,), generator=draw)
            self.cache.batch_select_indices(chosen)
        self.rows = [self.rows[index].copy() for index in chosen]
        self.real = self.real[chosen]

    def replace(self, how):
        if how == "copy":
            self.cache = copy.deepcopy(self.cache)
            return
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "cache"
            self.cache.save(path)
            self.cache = AquaCache.load(path, self.model, self.codec, **self.settings)

    # --- what is compared ---------------------------------------------------------------------------------

    def through(self, cache, exact, positions):
        """Feed keys and values as a model's pass does; return what each layer attends to."""
        padded = not bool(self.real.all())
        cache.forward_begins(self.real if padded else None)
        cache.positions_known(positions)
        out = []
        with torch.no_grad():
            for layer, (keys, values) in enumerate(exact):
                out.append(cache.update(keys.transpose(1, 2), values.transpose(1, 2), layer))
                if not isinstance(out[-1][0], torch.Tensor):  # attended to layer by layer, as they come
                    query = torch.randn(len(keys), 4, keys.shape[1], 16, generator=torch.Generator())
                    out[-1] = (query, out[-1][0].attend(query, 0.25))
        cache.forward_ends()
        return out

    def from_codes(self, exact, positions):
        """Return what the codec makes of tokens ``[layers, 2, tokens, heads, dim]``."""
        history, out = (), []
        for layer, (keys, values) in enumerate(exact):
            codec = self.codec.layers[layer]
            tables = self.adapter.rotary_tables(positions, layer, torch.float32, torch.device("cpu"))
            _, hat = codec.encode(unrotate(keys, tables).flatten(1), values.flatten(1), history)
            history = codec.extend(history, hat)
            key_hat = rotate((hat.keys + codec.keys.mean).view(keys.shape), tables)
            out.append(torch.stack([key_hat, (hat.values + codec.values.mean).view(values.shape)]))
        return torch.stack(out)

    def check(self, columns, new):
        """Require what layers attend to, and what masks hide, to be the model's tokens."""
        count, rows, old = new.shape[3], len(self.rows), self.seen - new.shape[3]
        assert self.cache.layout.rows in (rows, 0)
        found = torch.stack(
            [torch.stack(layer) for layer in columns]
        )  # [layers, 2, rows, heads, columns, dim]
        assert found.shape[4] == self.seen
        found = found.transpose(3, 4)
        assert torch.equal(found[:, :, :, old:], new)
        held = torch.zeros(rows, self.seen, dtype=torch.bool)
        held[:, old:] = True
        outliers = 0
        for index, row in enumerate(self.rows):
            for token in row.tokens():
                held[index, token.column] = True
            exact = [token for token in (*row.sinks, *row.tail) if token is not None]
            for token in exact:
                assert torch.equal(found[:, :, index, token.column], token.exact)
            if not row.coded:
                continue
            at = [token.column for token in row.coded]
            got = found[:, :, index, at].transpose(0, 2)
            wanted, exactly = (
                torch.stack([getattr(token, name) for token in row.coded]).transpose(1, 2)
                for name in ("coded", "exact")
            )
            near = ((got - wanted).abs() < 1e-4).flatten(3).all(-1)
            same = (got == exactly).flatten(3).all(-1)
            assert bool((near | same).all(1).all())
            outliers += int(same.sum())
        if self.codec.layers[0].keys.guard is None:
            assert outliers == 0
        hidden = self.cache.mask_for_model(None, torch.zeros(rows, count))
        if hidden is not None:
            assert torch.equal(hidden[:, :old].bool() & self.real[:, :old].bool(), held[:, :old])
        else:
            assert torch.equal(self.real[:, :old].bool(), held[:, :old])

    def check_attention(self, attended, columns, draw):
        """Require attention to codes to be what attention to all columns is."""
        held = torch.zeros_like(self.real, dtype=torch.bool)
        for index, row in enumerate(self.rows):
            held[index, [token.column for token in row.tokens()]] = True
        for (query, out), (keys, values) in zip(attended, columns, strict=True):
            if query.shape[1] != 4:
                continue  # this pass put all in columns
            count = query.shape[2]
            held[:, self.seen - count :] = self.real[:, self.seen - count :].bool()
            later = torch.arange(self.seen) > torch.arange(self.seen - count, self.seen)[:, None]
            seen = (held[:, None] & ~later)[:, None]
            scores = 0.25 * query @ keys.repeat_interleave(2, 1).transpose(2, 3)
            weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num()
            expected = (weights @ values.repeat_interleave(2, 1)).transpose(1, 2)
            some = self.real[:, self.seen - count :].bool()
            torch.testing.assert_close(out[some], expected[some], atol=1e-3, rtol=1e-3)

    def check_size(self):
        """Require the footprint to be what these tokens need, and fewer than a block of fillers a row."""
        footprint, block = self.cache.footprint(), self.window.block_tokens
        per_token = 2 * self.codec.fingerprint.features * len(self.codec.layers)
        assert footprint.coded_values == per_token * sum(len(row.coded) for row in self.rows)
        assert footprint.original_values == per_token * len(self.rows) * self.seen
        assert [-(-len(row.coded) // block) * block for row in self.rows] == self.cache.layout.coded
        longest = max(len(row.tail) for row in self.rows)
        assert all(layer.exact.tail_columns <= longest + block for layer in self.cache.layers)
        assert self.cache.get_seq_length() == self.seen


_OPERATIONS = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 14), st.integers(0, 999)),
    st.tuples(st.just("append"), st.just(1), st.integers(0, 999)),
    st.tuples(st.just("evict"), st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), st.integers(0, 999)),
    st.tuples(st.just("evict"), st.sampled_from([0.3, 0.7]), st.integers(0, 999)),
    st.tuples(st.just("crop"), st.integers(0, 12)),
    st.tuples(st.just("select"), st.integers(0, 999), st.sampled_from(["reorder", "repeat", "select"])),
    st.tuples(st.just("replace"), st.sampled_from(["copy", "save and load"])),
)

_WINDOWS = (WINDOW, WindowConfig(sink_tokens=2, recent_window=5, block_tokens=8), WindowConfig(0, 0, 4))


def _run(name, attention, rows, pads, window, operations):
    rig = Rig(name, window, rows, attention)
    rig.append(1 + 9 * rows, 0, pads)
    for operation, *arguments in operations:
        getattr(rig, operation)(*arguments)
        if rig.seen:
            rig.check_size()
    rig.append(1, 1)
    rig.append(9, 2)


_CASES = [
    ("paper", "general", 110),
    ("paper", "kept decoded", 40),
    ("higgs", "general", 60),
    ("storage", "general", 40),
    ("storage", "kept decoded", 20),
    ("decode", "general", 60),
    ("decode", "fused", 60),
    ("guarded", "general", 60),
    ("guarded", "kept decoded", 20),
    ("guarded", "fused", 60),
    ("two-stage", "fused", 60),
]


@pytest.mark.parametrize(("name", "attention", "sequences"), _CASES)
def test_random_operations(name, attention, sequences):
    """A cache holds what its plain model does, whatever was done to it."""

    @settings(max_examples=sequences, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        rows=st.integers(1, 3),
        pads=st.integers(0, 6),
        window=st.sampled_from(_WINDOWS),
        operations=st.lists(_OPERATIONS, min_size=1, max_size=8),
    )
    def run(rows, pads, window, operations):
        _run(name, attention, rows, pads, window, operations)

    run()


def test_there_are_five_hundred():
    assert sum(sequences for *_, sequences in _CASES) >= 500
