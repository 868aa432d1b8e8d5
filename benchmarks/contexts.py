"""What would contexts save in entropy coding? Code lengths of levels given their neighbours.

    python benchmarks/contexts.py CODEC --data-dir DIR --out benchmarks/results/contexts-demo.json

Encodes text with a storage codec. On a third of the sequences, frequencies of levels are learned for every
class of coefficients and context; on the others their code length is compared with that of the codec's own
tables. A context is a mean magnitude of neighbouring levels, in six steps: of the same coefficient at the
tokens before, of the coefficients before, or of both. Needs no coder: it is the ideal length.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aquakv import ModelCodec
from aquakv.calibration.walk import LayerWalk
from aquakv.codec import EncodedVectors, EntropyQuantizer
from aquakv.codec.entropy import ALPHABET, MAX_LEVEL, NUM_TABLES
from aquakv.data import token_sequences
from aquakv.evaluation.results import write_benchmark
from aquakv.models.adapter import adapt
from aquakv.models.loading import LoadedModel, load_model

EDGES = torch.tensor([0.01, 0.3, 0.7, 1.3, 2.5], dtype=torch.float64)
PRIOR = 64.0  # what the codec's own table counts as, in symbols


class Levels(NamedTuple):
    """Levels ``[sequences, tokens, n]`` of one tensor, and the table of every coefficient ``[n]``."""

    classes: Tensor
    levels: Tensor


def before(magnitudes: Tensor, dim: int, weights: tuple[float, ...]) -> Tensor:
    """Return the weighted mean of the values before each one along a dimension, zero at the start."""
    total = torch.zeros_like(magnitudes)
    for distance, weight in enumerate(weights, 1):
        length = magnitudes.shape[dim] - distance
        total.narrow(dim, distance, length).add_(magnitudes.narrow(dim, 0, length), alpha=weight)
    return total


CONTEXTS: dict[str, Callable[[Tensor], Tensor]] = {
    "none, tables learned anew": torch.zeros_like,
    "token before": lambda m: before(m, 1, (1.0,)),
    "two tokens before": lambda m: before(m, 1, (0.6, 0.4)),
    "three coefficients before": lambda m: before(m, 2, (0.5, 0.3, 0.2)),
    "both": lambda m: before(m, 1, (0.5,)) + before(m, 2, (0.25, 0.15, 0.1)),
}


def observe(loaded: LoadedModel, codec: ModelCodec, tokens: Tensor) -> list[Levels]:
    """Return the levels of every layer's keys and values."""
    walk = LayerWalk(adapt(loaded.model), tokens, len(tokens), loaded.model.device)
    window, found, history = codec.config.window, [], ()
    coded = slice(window.sink_tokens, window.sink_tokens + window.coded_tokens(tokens.shape[1]))
    for index, layer_idx in enumerate(walk.adapter.compressed_layers):
        with torch.no_grad():
            ((keys, values),) = walk.advance(layer_idx, lambda: None)
        layer = codec.layers[index]
        codes, hat = layer.encode(keys[:, coded].flatten(0, 1), values[:, coded].flatten(0, 1), history)
        history = layer.extend(history, hat)
        for part, rows in ((layer.keys, codes.keys), (layer.values, codes.values)):
            assert isinstance(part.quantizer, EntropyQuantizer)
            assert isinstance(rows, EncodedVectors)
            symbols = rows.words[:, : len(part.quantizer.tables)]  # low bits aside: nothing predicts them
            levels = symbols.view(len(tokens), -1, symbols.shape[1]).long() - MAX_LEVEL
            found.append(Levels(part.quantizer.tables, levels))
    return found


def code_length(
    tensors: list[Levels], learned: int, context: Callable[[Tensor], Tensor], own: Tensor
) -> float:
    """Return the bits of all sequences but the first ``learned``, with tables learned on those."""
    counts = PRIOR * (own / own.sum(1, keepdim=True))[:, None].repeat(1, len(EDGES) + 1, 1)

    def cells(tensor: Levels, rows: slice) -> Tensor:
        levels = tensor.levels[rows]
        buckets = torch.bucketize(context(levels.abs().double()), EDGES)
        return ((tensor.classes * (len(EDGES) + 1) + buckets) * ALPHABET + levels + MAX_LEVEL).flatten()

    for tensor in tensors:
        index = cells(tensor, slice(learned))
        counts.view(-1).index_add_(0, index, torch.ones(len(index), dtype=torch.float64))
    lengths = -(counts / counts.sum(-1, keepdim=True)).clamp(min=1e-12).log2().flatten()
    return sum(float(lengths[cells(tensor, slice(learned, None))].sum()) for tensor in tensors)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("codec", type=Path)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--data", nargs="+", default=["wikitext2:test", "longbench/multi_news"])
    parser.add_argument("--samples", type=int, default=6)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    loaded, codec = load_model("demo", "bfloat16", "cpu"), ModelCodec.load(options.codec)
    tokens = token_sequences(
        options.data, loaded.tokenizer, options.samples, options.seq_len, options.data_dir
    )
    tensors, learned = observe(loaded, codec, tokens), options.samples // 3
    quantizer = codec.layers[0].keys.quantizer
    assert isinstance(quantizer, EntropyQuantizer)
    own = quantizer.model.frequencies.double()
    assert own.shape == (NUM_TABLES, ALPHABET)
    bits = quantizer.model.tables.bits.double()
    plain = sum(float(bits[t.classes, t.levels[learned:] + MAX_LEVEL].sum()) for t in tensors)
    values = sum(t.levels[learned:, :, 0].numel() for t in tensors) * codec.fingerprint.features
    rows: list[dict[str, Any]] = []
    for name, length in [
        ("the codec's own tables", plain),
        *((name, code_length(tensors, learned, context, own)) for name, context in CONTEXTS.items()),
    ]:
        row = {
            "contestant": name,
            "data": options.data,
            "samples": options.samples - learned,
            "seq_len": options.seq_len,
            "code_bits_per_value": length / values,
            "saved": 1 - length / plain,
        }
        print(row, flush=True)
        rows.append(row)
    write_benchmark(options.out, rows)


if __name__ == "__main__":
    main()
