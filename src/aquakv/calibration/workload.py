"""The sizes that tell what a calibration takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aquakv.calibration.planner import MOST_PROBES, TOKENS_PER_PROBE, measures, needs_weights
from aquakv.codec.model import predictor_widths
from aquakv.config import CodecConfig
from aquakv.models.adapter import ModelAdapter
from aquakv.models.weights import StreamedWeights

#: Keys and values of all layers that are held at once to plan the allocation; beyond, a part must do.
MOST_OBSERVED_BYTES = 6 << 30
#: The same if trial fits would otherwise see less than `PLAN_TOKENS` and so on ask for.
MOST_NEEDED_BYTES = 16 << 30

#: Trial fits that plan the allocation see at least this many tokens, and this many per predictor input (with
#: fewer, residuals look smaller than they are): all text would tell the water level hardly better.
PLAN_TOKENS = 32768
_PLAN_TOKENS_PER_INPUT = 24


@dataclass(frozen=True)
class Workload:
    """Sizes that tell what a calibration takes.

    Attributes
    ----------
    device
        Where it computes.
    layers, compressed
        Decoder layers in all, and those that are compressed.
    hidden_size, features, query_features
        Lengths of a token's hidden state, of its keys, and of its queries.
    itemsize
        Bytes of a number in the model's dtype.
    tokens, seq_len, batch_tokens
        Tokens of one process, of a sequence and of a batch.
    observed, trial, observed_tokens
        Sequences that are observed to plan with, batches that trial fits see, and tokens of the former.
    layer_bytes, input_bytes, output_bytes, model_bytes
        Weights of the largest layer, of what comes before and after the layers, and of all.
    streamed
        Whether only the layer at hand and the next are in memory.
    layer_flop
        Operations of a token in all layers' matrices; attention apart.
    inner
        Numbers that a layer's widest part makes of a token at once.
    inputs
        Inputs of the largest predictor.
    history, current
        Layers' tensors that are kept for predictors, and those of the layer at hand, for all configurations.
    moment_flop, encode_flop
        Operations of a token in a layer, for second moments and for reconstructions.
    probes
        Sequences that errors are sent through, 0 if none.
    adaptive
        Configurations that are planned.
    vocabulary
        Tokens that the head knows.
    processes
        How many share the text.
    spread
        Whether layers are on several devices.
    """

    device: torch.device
    layers: int
    compressed: int
    hidden_size: int
    features: int
    query_features: int
    itemsize: int
    tokens: int
    seq_len: int
    batch_tokens: int
    observed: int
    trial: int
    observed_tokens: int
    layer_bytes: int
    input_bytes: int
    output_bytes: int
    model_bytes: int
    streamed: bool
    layer_flop: float
    inner: int
    inputs: int
    history: int
    current: int
    moment_flop: float
    encode_flop: float
    probes: int
    adaptive: int
    vocabulary: int
    processes: int = 1
    spread: bool = False

    @property
    def hidden_bytes(self) -> int:
        """Hidden states of all sequences."""
        return self.tokens * self.hidden_size * self.itemsize

    @property
    def vector_bytes(self) -> int:
        """One layer's keys, or its values, of all sequences."""
        return self.tokens * self.features * self.itemsize


def workload_of(
    adapter: ModelAdapter,
    sequences: int,
    seq_len: int,
    configs: Mapping[str, CodecConfig],
    batch_size: int,
    processes: int = 1,
    planned_layers: int | None = None,
    streamed: bool | None = None,
) -> Workload:
    """Return the sizes of a calibration with ``sequences`` of ``seq_len`` tokens.

    It is planned with as many sequences as a model of ``planned_layers`` compressed layers would be.
    ``streamed`` tells whether weights will come and go, if the adapter is not the one that will be used.
    """
    config: Any = adapter.config
    features, itemsize = adapter.features, adapter.model.dtype.itemsize
    compressed = len(adapter.compressed_layers)
    observed = _observed_sequences(adapter, sequences, seq_len, configs, planned_layers or compressed)
    layers = [dict(layer.named_parameters()) for layer in adapter.layers]
    sizes = [_bytes(layer) for layer in layers]
    total = _bytes(dict(adapter.model.named_parameters()))
    weights = adapter.weights
    streamed = isinstance(weights, StreamedWeights) if streamed is None else streamed
    inputs = _bytes(weights.tensors_of("input")) if isinstance(weights, StreamedWeights) else 0
    outputs = _bytes(weights.tensors_of("output")) if isinstance(weights, StreamedWeights) else 0
    batches = -(-sequences // batch_size)
    own = -(-batches // processes) * batch_size
    probing = any(measures(config) for config in configs.values())
    kept = [_kept_tensors(one) for one in configs.values()]
    return Workload(
        device=adapter.device,
        layers=len(layers),
        compressed=compressed,
        hidden_size=config.hidden_size,
        features=features,
        query_features=config.num_attention_heads * adapter.head_dim,
        itemsize=itemsize,
        tokens=min(own, sequences) * seq_len,
        seq_len=seq_len,
        batch_tokens=min(batch_size, sequences) * seq_len,
        observed=observed,
        trial=_trial_batches(adapter, observed, seq_len, batch_size, configs) if observed else 0,
        observed_tokens=observed * seq_len,
        layer_bytes=max(sizes),
        input_bytes=inputs,
        output_bytes=outputs,
        model_bytes=total,
        streamed=streamed,
        layer_flop=sum(_flop(layer, config)[0] for layer in layers),
        inner=max(_flop(layer, config)[1] for layer in layers),
        inputs=max(most_inputs(one, features) for one in configs.values()),
        history=sum(history for history, _ in kept),
        current=sum(current for _, current in kept),
        moment_flop=sum(_moment_flop(one, features) for one in configs.values()),
        encode_flop=sum(_encode_flop(one, features, adapter.head_dim) for one in configs.values()),
        probes=min(MOST_PROBES, 1 + sequences * seq_len // TOKENS_PER_PROBE) if probing else 0,
        adaptive=sum(one.allocation.kind == "water-filling" for one in configs.values()),
        vocabulary=config.vocab_size,
        processes=processes,
        spread=len({adapter.device, *(adapter.layer_device(index) for index in range(len(layers)))}) > 1,
    )


def _flop(parameters: Mapping[str, Tensor], config: Any) -> tuple[float, int]:
    """Return a layer's operations for a token, and the most numbers that it makes of one at once."""
    flop, inner = 0.0, 0
    chosen = getattr(config, "num_experts_per_tok", None) or getattr(config, "top_k", None) or 1
    for parameter in parameters.values():
        if parameter.ndim == 2:
            flop += 2.0 * parameter.numel()
            inner = max(inner, 3 * max(parameter.shape) if max(parameter.shape) > config.hidden_size else 0)
        elif parameter.ndim == 3:  # experts side by side
            experts = parameter.shape[0]
            flop += 2.0 * parameter.numel() / experts * min(chosen, experts)
            inner = max(inner, 2 * chosen * (max(parameter.shape[1:]) + config.hidden_size))
    return flop, inner


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _kept_tensors(config: CodecConfig) -> tuple[int, int]:
    """Return how many tensors of earlier layers predictors read, and how many of the layer at hand."""
    if config.predictor.kind != "linear":
        return 0, 1
    reads = {*config.predictor.key_inputs, *config.predictor.value_inputs} - {"keys"}
    return len(reads) * config.predictor.history, 2


def _moment_flop(config: CodecConfig, features: int) -> float:
    """Return the operations of a token in a layer that second moments take."""
    widths = predictor_widths(config, features, config.predictor.history)
    flop = sum(2.0 * features * (width + features) for width in widths.values())
    history, current = _kept_tensors(config)
    if config.predictor.kind == "linear":
        flop += 2.0 * features * features * (history + current)
    if config.transform.kind == "klt":
        flop += 2.0 * features * features * len(widths)  # what residuals leave
    return flop


def _encode_flop(config: CodecConfig, features: int, head_dim: int) -> float:
    """Return the operations of a token in a layer that reconstruction takes, all coefficients being kept."""
    widths = predictor_widths(config, features, config.predictor.history)
    flop = 0.0
    for kind, width in widths.items():
        rank = config.predictor.key_rank if kind == "keys" else config.predictor.value_rank
        predict = 2.0 * (width * features if rank is None else rank * (width + features))
        # Where a transform is fitted, its residuals are formed once more.
        flop += predict * (2 if config.transform.kind == "klt" else 1)
        flop += 4.0 * features * features
        flop += 2.0 * features * head_dim * (config.guard.threshold is not None)
    return flop


def _observed_sequences(
    adapter: ModelAdapter, sequences: int, seq_len: int, configs: Mapping[str, CodecConfig], layers: int
) -> int:
    """Return of how many sequences the keys and values of all layers are held at once, to plan with."""
    if not any(needs_weights(config) for config in configs.values()):
        return 0
    size = 2 * adapter.features * layers * seq_len * adapter.model.dtype.itemsize
    needed = min(_needed_sequences(adapter, seq_len, configs), MOST_NEEDED_BYTES // size)
    return min(sequences, max(2, needed, MOST_OBSERVED_BYTES // size))


def _needed_sequences(adapter: ModelAdapter, seq_len: int, configs: Mapping[str, CodecConfig]) -> int:
    """Return how many sequences trial fits want to see."""
    inputs = max(most_inputs(config, adapter.features) for config in configs.values())
    return -(-max(PLAN_TOKENS, _PLAN_TOKENS_PER_INPUT * inputs) // seq_len)


def _trial_batches(
    adapter: ModelAdapter, observed: int, seq_len: int, batch_size: int, configs: Mapping[str, CodecConfig]
) -> int:
    """Return how many batches of the observed sequences, at least two sequences, trial fits see."""
    return -(-min(observed, max(2, _needed_sequences(adapter, seq_len, configs))) // batch_size)


def most_inputs(config: CodecConfig, features: int) -> int:
    """Return the number of inputs of a configuration's largest predictor."""
    return max(predictor_widths(config, features, config.predictor.history).values())
