"""What a calibration will take: bytes, floating-point operations, and what waits where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from aquakv.calibration.ahead import most_ahead
from aquakv.calibration.observe import Waiting
from aquakv.calibration.planner import PROBE_TOKENS, TRIALS
from aquakv.calibration.workload import Workload
from aquakv.errors import ConfigError, ResourceError

OFFLOADS = ("none", "hidden", "all")

#: Float32 copies of a batch's vectors that encoding and its figures have at once.
_ENCODE_COPIES = 12

#: What Python and libraries take of host memory, without and with a GPU's driver.
_PROCESS_BYTES = {"cpu": 1 << 30, "cuda": 3 << 30}

#: Part of the free memory that a plan may fill: allocators leave gaps.
_USABLE = 0.94


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
    batches = -(-work.tokens // work.batch_tokens)
    ahead = most_ahead(batches) / batches if waiting.overlap else 0
    layers = "a layer and of what is ahead" if waiting.overlap else "a layer"
    sweep = [
        weights,
        Item("hidden states", hidden_at, work.hidden_bytes),
        Item(f"keys and values of {layers}", vectors_at, int(2 * (1 + ahead) * work.vector_bytes)),
        Item("reconstructions of earlier layers", vectors_at, work.history * work.vector_bytes),
    ]
    walking = [Item("a batch in a layer", "device", forward)]
    coding = [
        Item("reconstructions of the layer", vectors_at, work.current * work.vector_bytes),
        Item("a batch being coded", "device", encode),
    ]
    if waiting.overlap:  # of two streams, neither of which uses memory that the other has freed
        fullest = [*sweep, *walking, *coding]
    else:
        fullest = max([*sweep, *walking], [*sweep, *coding], key=_on_device)
    planning: list[Item] = []
    if work.observed:
        tokens = work.observed_tokens
        variants = -(-2 * work.compressed // work.processes) * work.probes * PROBE_TOKENS
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


def choose_waiting(work: Workload, offload: str, overlap: bool | None = None) -> Waiting:
    """Return where batches wait, and see that there is room.

    Parameters
    ----------
    work
        The calibration.
    offload, overlap
        As for `calibrate_many`.

    Raises
    ------
    ConfigError
        ``offload`` is not known, or layers on several devices are to overlap.
    ResourceError
        There is too little memory.
    """
    tried = ways_to_wait(work, offload, overlap)
    device_bytes, host_bytes = free_bytes(work.device)
    for waiting in tried:
        if fits(forecast(work, waiting), device_bytes, host_bytes):
            return waiting
    return _refuse(forecast(work, tried[-1]), tried[-1], device_bytes, host_bytes)


def ways_to_wait(work: Workload, offload: str, overlap: bool | None = None) -> list[Waiting]:
    """Return where batches may wait, the fastest first; raises `ConfigError` as `choose_waiting` does.

    Fits side by side with observing are given up before more is offloaded: what they save are pauses, while
    what is offloaded has to cross the bus twice at every layer.
    """
    if offload not in ("auto", *OFFLOADS):
        raise ConfigError(f"offload: expected auto, {', '.join(OFFLOADS)}, got {offload!r}")
    if overlap and work.spread:
        raise ConfigError(
            "overlap: expected a model on one device, got layers on several; leave overlap to be chosen"
        )
    cpu = torch.device("cpu")
    ways = {
        "none": Waiting(work.device, work.device, "none"),
        "hidden": Waiting(cpu, work.device, "hidden"),
        "all": Waiting(cpu, cpu, "all"),
    }
    if work.device.type == "cpu":
        offload = "none"
    chosen = list(ways.values()) if offload == "auto" else [ways[offload]]
    if work.processes == 1 and work.observed_tokens >= work.tokens:
        return chosen  # planned with all text: nothing is left to observe
    if overlap is not None:
        return [way._replace(overlap=overlap) for way in chosen]
    if work.device.type == "cpu" or work.spread:
        return chosen
    return [way._replace(overlap=beside) for way in chosen for beside in (True, False)]


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


def _refuse(found: Forecast, waiting: Waiting, device_bytes: int | None, host_bytes: int) -> Waiting:
    where = "host" if device_bytes is None or found.total("device") <= _USABLE * device_bytes else "device"
    wanted = found.total(where) + (found.total("device") if device_bytes is None else 0)
    have = device_bytes if where == "device" and device_bytes is not None else host_bytes
    advice = "use fewer --samples, a shorter --seq-len or a smaller --batch-size"
    if waiting.overlap:
        advice += ", or --no-overlap"
    if where == "device" and waiting.name != "all":
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
    # Layers times variants: each goes through the layers behind its own.
    variants = work.compressed * (work.layers + 1) * work.probes * PROBE_TOKENS / work.processes
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
