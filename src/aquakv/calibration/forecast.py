"""What a calibration will take: bytes, floating-point operations, and what waits where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aquakv.calibration.observe import Waiting
from aquakv.calibration.planner import (
    MOST_PROBES,
    PROBE_TOKENS,
    TOKENS_PER_PROBE,
    TRIALS,
    measures,
    needs_weights,
)
from aquakv.codec.model import predictor_widths
from aquakv.config import CodecConfig
from aquakv.errors import ConfigError, ResourceError
from aquakv.models.adapter import ModelAdapter
from aquakv.models.weights import StreamedWeights

OFFLOADS = ("none", "hidden", "all")

#: Keys and values of all layers that are held at once to plan the allocation; beyond, a part must do.
MOST_OBSERVED_BYTES = 6 << 30
#: The same if trial fits would otherwise see less than `PLAN_TOKENS` and so on ask for.
MOST_NEEDED_BYTES = 16 << 30

#: Trial fits that plan the allocation see at least this many tokens, and this many per predictor input (with
#: fewer, residuals look smaller than they are): all text would tell the water level hardly better.
PLAN_TOKENS = 32768
_PLAN_TOKENS_PER_INPUT = 24

#: Float32 copies of a batch's vectors that encoding and its figures have at once.
_ENCODE_COPIES = 12

#: What Python and libraries take of host memory, without and with a GPU's driver.
_PROCESS_BYTES = {"cpu": 1 << 30, "cuda": 3 << 30}

#: Part of the free memory that a plan may fill: allocators leave gaps.
_USABLE = 0.94


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

    @property
    def hidden_bytes(self) -> int:
        """Hidden states of all sequences."""
        return self.tokens * self.hidden_size * self.itemsize

    @property
    def vector_bytes(self) -> int:
        """One layer's keys, or its values, of all sequences."""
        return self.tokens * self.features * self.itemsize


@dataclass(frozen=True)
class Item:
    """Something that takes memory: what, where (``device`` or ``host``), how many bytes."""

    what: str
    where: str
    size: int


@dataclass(frozen=True)
class Forecast:
    """What is resident where at the fullest moment, and how much there is to do.

    Attributes
    ----------
    items
        What is in memory.
    flop
        Floating-point operations by phase.
    read_bytes
        Read from disk in all.
    """

    items: tuple[Item, ...]
    flop: Mapping[str, float]
    read_bytes: int

    def total(self, where: str) -> int:
        """Return the bytes at a place."""
        return sum(item.size for item in self.items if item.where == where)


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
    )


def forecast(work: Workload, waiting: Waiting) -> Forecast:
    """Return what a calibration takes if batches wait at the given places."""
    device = {"none": (True, True), "hidden": (False, True), "all": (False, False)}[waiting.name]
    hidden_at, vectors_at = ("device" if here else "host" for here in device)
    held = work.layer_bytes * 2 if work.streamed else work.model_bytes
    weights = Item("weights" if not work.streamed else "weights of two layers", "device", held)
    forward = (
        work.batch_tokens
        * work.itemsize
        * max(work.inner + 3 * work.hidden_size, 5 * work.query_features + 3 * work.hidden_size)
        + 16 * work.seq_len * work.query_features
    )
    encode = 4 * work.batch_tokens * (_ENCODE_COPIES * work.features + work.inputs)
    sweep = [
        weights,
        Item("hidden states", hidden_at, work.hidden_bytes),
        Item("keys and values of a layer", vectors_at, 2 * work.vector_bytes),
        Item("reconstructions of earlier layers", vectors_at, work.history * work.vector_bytes),
    ]
    fullest = max(
        [*sweep, Item("a batch in a layer", "device", forward)],
        [
            *sweep,
            Item("reconstructions of the layer", vectors_at, work.current * work.vector_bytes),
            Item("a batch being coded", "device", encode),
        ],
        key=_on_device,
    )
    planning: list[Item] = []
    if work.observed:
        tokens = work.observed_tokens
        variants = 2 * work.compressed * work.probes * PROBE_TOKENS
        planning = [
            weights,
            Item("observed hidden states", hidden_at, tokens * work.hidden_size * work.itemsize),
            Item(
                "observed keys and values of all layers",
                vectors_at,
                2 * work.compressed * tokens * work.features * work.itemsize,
            ),
            Item("disturbed hidden states", "device", 2 * variants * work.hidden_size * work.itemsize),
            Item("a batch in a layer", "device", max(forward, encode)),
        ]
    start = [
        Item("embedding", "device", work.input_bytes),
        *([weights] if not work.streamed else [Item("weights of a layer", "device", work.layer_bytes)]),
        Item("hidden states", hidden_at, work.hidden_bytes),
    ]
    chosen = max(fullest, planning, start, key=_on_device)
    host = [Item("Python and libraries", "host", _process(work.device))]
    if work.streamed:
        host.append(Item("a layer on its way", "host", work.layer_bytes))
    own_host = max(fullest, planning, key=lambda items: sum(i.size for i in items if i.where == "host"))
    items = [item for item in chosen if item.where == "device"]
    items += [item for item in own_host if item.where == "host"] + host
    sweeps = 1 + (work.observed > 0)
    if work.observed >= work.tokens // work.seq_len:
        sweeps = 1
    return Forecast(
        tuple(item for item in items if item.size),
        _operations(work),
        work.model_bytes * sweeps if work.streamed else 0,
    )


def choose_waiting(work: Workload, offload: str) -> Waiting:
    """Return where batches wait, and see that there is room.

    Raises
    ------
    ConfigError
        ``offload`` is not known.
    ResourceError
        There is too little memory.
    """
    if offload not in ("auto", *OFFLOADS):
        raise ConfigError(f"offload: expected auto, {', '.join(OFFLOADS)}, got {offload!r}")
    cpu = torch.device("cpu")
    ways = {
        "none": Waiting(work.device, work.device, "none"),
        "hidden": Waiting(cpu, work.device, "hidden"),
        "all": Waiting(cpu, cpu, "all"),
    }
    if work.device.type == "cpu":
        offload = "none"
    device_bytes, host_bytes = free_bytes(work.device)
    tried = OFFLOADS if offload == "auto" else (offload,)
    for name in tried:
        if fits(forecast(work, ways[name]), device_bytes, host_bytes):
            return ways[name]
    return _refuse(forecast(work, ways[tried[-1]]), tried[-1], device_bytes, host_bytes)


def fits(found: Forecast, device_bytes: int | None, host_bytes: int) -> bool:
    """Tell whether there is room; on a CPU, where ``device_bytes`` is None, all of it is host memory."""
    if device_bytes is None:
        return found.total("device") + found.total("host") <= _USABLE * host_bytes
    return found.total("device") <= _USABLE * device_bytes and found.total("host") <= _USABLE * host_bytes


def free_bytes(device: torch.device) -> tuple[int | None, int]:
    """Return the free bytes of a GPU (None for the CPU), and of host memory."""
    on_device = None
    if device.type == "cuda":
        on_device = torch.cuda.mem_get_info(device)[0]
        on_device += torch.cuda.memory_reserved(device)  # what is ours already
    return on_device, _free_host()


def _refuse(found: Forecast, offload: str, device_bytes: int | None, host_bytes: int) -> Waiting:
    where = "host" if device_bytes is None or found.total("device") <= _USABLE * device_bytes else "device"
    wanted = found.total(where) + (found.total("device") if device_bytes is None else 0)
    have = device_bytes if where == "device" and device_bytes is not None else host_bytes
    advice = "use fewer --samples, a shorter --seq-len or a smaller --batch-size"
    if where == "device" and offload != "all":
        advice += ", or --offload all"
    raise ResourceError(
        f"expected at most {_gib(_USABLE * have)} of {where} memory, the calibration would take "
        f"{_gib(wanted)}; {advice}"
    )


def _process(device: torch.device) -> int:
    return _PROCESS_BYTES.get(device.type, max(_PROCESS_BYTES.values()))


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def _free_host() -> int:
    """Return the memory that the machine, or this process's control group, has left."""
    found = 1 << 62
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            found = next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable"))
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:
            most = file.read().strip()
        if most != "max":
            with open("/sys/fs/cgroup/memory.stat", encoding="ascii") as file:
                taken = next(int(line.split()[1]) for line in file if line.startswith("anon "))
            found = min(found, int(most) - taken)
    except (OSError, StopIteration, ValueError):
        pass
    return found


def _on_device(items: list[Item]) -> int:
    return sum(item.size for item in items if item.where == "device")


def _operations(work: Workload) -> dict[str, float]:
    """Return floating-point operations by phase."""
    attention = 2.0 * work.seq_len * work.query_features * work.layers  # causal: half of all pairs
    token = work.layer_flop + attention
    variants = work.compressed * (work.layers + 1) * work.probes * PROBE_TOKENS  # layers times variants
    trial_tokens = min(work.trial * work.batch_tokens, work.observed_tokens)
    fit = (work.moment_flop + work.encode_flop) * work.compressed
    found = {
        "plan: observe": token * work.observed_tokens,
        "plan: harm": work.layer_flop / work.layers * variants,
        "plan: fit": fit * trial_tokens * TRIALS,
        "observe": token * work.tokens if work.observed_tokens < work.tokens else 0.0,
        "fit": fit * work.tokens,
    }
    return {phase: flop for phase, flop in found.items() if flop}


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
    return flop


def _encode_flop(config: CodecConfig, features: int, head_dim: int) -> float:
    """Return the operations of a token in a layer that reconstruction takes, all coefficients being kept."""
    widths = predictor_widths(config, features, config.predictor.history)
    flop = 0.0
    for kind, width in widths.items():
        rank = config.predictor.key_rank if kind == "keys" else config.predictor.value_rank
        flop += 2.0 * (width * features if rank is None else rank * (width + features))
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
