"""Long runs: what a cache holds grows with its tokens, and nothing else grows.

``make soak`` decodes 100,000 tokens (AQUAKV_SOAK_TOKENS); the test suite makes do with a few thousand.
"""

import gc
import os
import tracemalloc
import weakref

import pytest
import torch

from aquakv import AquaCache, WindowConfig
from aquakv.cache.fused import MOST_QUERIES
from aquakv.codec.guard import choose_outliers
from aquakv.models.adapter import adapt
from aquakv.models.rotary import unrotate
from tiny_models import build, codec_for, random_tokens, same_bits

pytestmark = pytest.mark.slow

TOKENS = int(os.environ.get("AQUAKV_SOAK_TOKENS", "2000"))
WINDOW = WindowConfig(sink_tokens=4, recent_window=16, block_tokens=64)


class _Record:
    """Keep the exact keys and values of every token, ``[tokens, num_kv_heads, head_dim]`` by layer."""

    def __init__(self, cache):
        layers = len(cache.layers)
        self.keys, self.values = (torch.empty(layers, TOKENS, 2, 16) for _ in range(2))
        self._cache, self._update = weakref.proxy(cache), type(cache).update

    def __call__(self, key_states, value_states, layer_idx, *args, **kwargs):
        first = self._cache.get_seq_length() - (key_states.shape[2] if layer_idx else 0)
        part = slice(first, first + key_states.shape[2])
        self.keys[layer_idx, part] = key_states[0].transpose(0, 1)
        self.values[layer_idx, part] = value_states[0].transpose(0, 1)
        return self._update(self._cache, key_states, value_states, layer_idx, *args, **kwargs)


def _decode(model, cache, tokens, columns, size):
    while cache.get_seq_length() < columns:
        part = slice(cache.get_seq_length(), min(columns, cache.get_seq_length() + size))
        with torch.no_grad():
            model(tokens[:, part], past_key_values=cache)


def _tensors():
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def _step_tokens(name, columns):
    """Return how many tokens a pass takes.

    `decode` attends to its codes: by single tokens, and in long runs, whose passes take tens of milliseconds,
    by as many as it attends with at most. The others reconstruct all tokens in every pass.
    """
    if name != "decode":
        return 50
    return 1 if columns <= 2000 else MOST_QUERIES


@pytest.mark.timeout(6 * 3600)
@pytest.mark.parametrize("name", ["decode", "storage", "paper"])
def test_a_long_run(name):
    """Decode on and on: the footprint is linear, nothing piles up, and codes do not drift."""
    model = build(max_position_embeddings=1 << 20)
    codec = codec_for("llama", name, window=WINDOW)
    cache = AquaCache(model, codec)
    tokens = random_tokens(1, TOKENS)
    cache.update = record = _Record(cache)
    figures = []
    tracemalloc.start()
    try:
        for part in range(1, 9):
            _decode(model, cache, tokens, TOKENS * part // 8, _step_tokens(name, TOKENS * part // 8))
            held, tensors = cache.footprint(), _tensors()
            figures.append((cache.get_seq_length(), held, tensors, tracemalloc.get_traced_memory()[0]))
            columns, _, _, traced = figures[-1]
            print(f"{name}: {columns} tokens, {held}, {tensors} tensors, {traced} bytes of Python")
    finally:
        tracemalloc.stop()
    _is_linear(figures)
    _is_what_is_encoded_at_once(model, cache, record)


def _is_linear(figures):
    columns, footprints, tensors, traced = zip(*figures, strict=True)
    bits = [held.bits_per_value for held in footprints]
    # The first blocks are few for the tokens whose positions are held, and streams differ in length.
    assert max(bits[1:]) < 1.1 * min(bits[1:])
    exact = [held.sink_bytes + held.tail_bytes for held in footprints]
    per_token = footprints[-1].exact_cache_bytes // columns[-1]
    assert max(exact) <= (WINDOW.sink_tokens + WINDOW.recent_window + 2 * WINDOW.block_tokens) * per_token
    coded = [held.coded_bytes for held in footprints]
    slope = (coded[-1] - coded[1]) / (columns[-1] - columns[1])
    for tokens, held in zip(columns[1:], coded[1:], strict=True):
        line = coded[-1] - slope * (columns[-1] - tokens)
        assert abs(held - line) < 0.05 * coded[-1] / 4 + 128 * slope
    # Codes that are no records are in chunks of up to 64 blocks, of some ten tensors a layer.
    assert max(tensors[2:]) - min(tensors[2:]) <= 64 + 30 * columns[-1] // (64 * WINDOW.block_tokens)
    # The layout's host side: a tuple of two numbers and a truth a block.
    blocks = columns[-1] // WINDOW.block_tokens
    assert traced[-1] - traced[1] < 100_000 + 400 * blocks


def _is_what_is_encoded_at_once(model, cache, record):
    """Encode all exact keys and values anew, at once: all layers have the same codes, bit for bit."""
    adapter, codec, layout = adapt(model), cache.codec, cache.layout
    coded = slice(WINDOW.sink_tokens, WINDOW.sink_tokens + layout.coded[0])
    history, most = (), codec.config.guard.most(WINDOW.block_tokens)
    for index, layer in enumerate(cache.layers):
        tables = adapter.rotary_tables(layout.positions[0, coded], index, torch.float32, torch.device("cpu"))
        keys, values = unrotate(record.keys[index, coded], tables).flatten(1), record.values[index, coded]
        own = codec.layers[index]
        codes, hat = own.encode(keys, values.flatten(1), history)
        excess = own.excess(keys, values.flatten(1), hat)
        history = own.extend(history, hat)
        chosen = None if excess is None else choose_outliers(excess, WINDOW.block_tokens, most)
        held = layer.pages.all()
        for ours, theirs in zip(held.encoded, own.seal(codes, WINDOW.block_tokens, chosen), strict=True):
            assert same_bits(list(ours), list(theirs))
        if chosen is not None and len(chosen):
            assert torch.equal(held.outliers.index.long(), chosen)
            assert torch.equal(held.outliers.values, values[chosen])
        tail = record.values[index, layout.columns - layer.exact.tail_columns :]
        assert torch.equal(layer.exact.tail_values[0], tail)
