"""Calibrate codecs: one pass over the layers, hidden states from the uncompressed model."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from aquakv.calibration.ahead import Lanes
from aquakv.calibration.group import Group
from aquakv.calibration.job import Job, library_versions
from aquakv.calibration.loop import LayerLoop
from aquakv.calibration.observe import LayerObservation
from aquakv.calibration.plan import Plan
from aquakv.calibration.progress import Report
from aquakv.calibration.store import RunStore
from aquakv.codec import ModelCodec
from aquakv.config import CodecConfig
from aquakv.models.adapter import ModelAdapter, adapt


def calibrate(
    model: PreTrainedModel | ModelAdapter,
    tokens: Tensor,
    config: CodecConfig,
    *,
    batch_size: int = 4,
    held_out: int | None = None,
    offload: str = "auto",
    overlap: bool | None = None,
    record: Mapping[str, Any] | None = None,
    progress: Report | None = None,
    store: RunStore | None = None,
) -> ModelCodec:
    """Calibrate one codec; see `calibrate_many`."""
    codecs = calibrate_many(
        model,
        tokens,
        {"": config},
        batch_size=batch_size,
        held_out=held_out,
        offload=offload,
        overlap=overlap,
        record=record,
        progress=progress,
        store=store,
    )
    return codecs[""]


@torch.no_grad()
def calibrate_many(
    model: PreTrainedModel | ModelAdapter,
    tokens: Tensor,
    configs: Mapping[str, CodecConfig],
    *,
    batch_size: int = 4,
    held_out: int | None = None,
    offload: str = "auto",
    overlap: bool | None = None,
    record: Mapping[str, Any] | None = None,
    progress: Report | None = None,
    store: RunStore | None = None,
    timings: dict[str, Any] | None = None,
    planned_layers: int | None = None,
) -> dict[str, ModelCodec]:
    """Calibrate several codecs in one pass over the model (arXiv:2501.19392 §3).

    At any time the exact keys and values of one layer are held, and for each codec the reconstructions of
    that layer and those before that its predictors read. Codecs that allocate bits over the whole model are
    planned first, on as many sequences as `MOST_OBSERVED_BYTES` of keys and values allow.

    In a process group of `torch.distributed` each process takes every n-th batch, and all return the same
    codecs: those of one process but for the rounding of float64 sums.

    Parameters
    ----------
    model
        The model, whose weights and device are left alone; or an adapter whose weights come and go layer by
        layer (`aquakv.models.streaming.open_streamed(…).adapter`).
    tokens
        ``[sequences, seq_len]`` int64 token ids without padding.
    configs
        What to build, by name.
    batch_size
        Sequences that go through a layer at once.
    held_out
        Sequences kept from the fit, for the record's figures; an eighth of them, at least one, if None.
    offload
        What waits in host memory between layers: ``none``, ``hidden`` (all sequences' hidden states), ``all``
        (keys, values and reconstructions too), or ``auto``, the first of these that the device has room for.
    overlap
        Fit a layer while the next one is observed, whose keys and values are held too; the codecs are the
        same. If None, on a GPU if there is room for it where batches wait; it is given up before more waits
        in host memory.
    record
        Further entries for the codecs' calibration records, such as the data's name.
    progress
        Called after every batch of every sweep.
    store
        Where finished layers are kept, to go on from after an interruption. The caller discards it.
    timings
        Filled with the seconds of every phase (``phases``), the same by layer (``layers``), ``waiting`` and
        ``overlap``.
    planned_layers
        Plan with as much text as for a model of so many compressed layers, of which this is a part.

    Raises
    ------
    DataError
        Too few sequences or tokens, or sequences longer than the model takes.
    ResourceError
        The device or the machine has too little memory.
    UnsupportedModelError
        The model cannot be compressed correctly.
    """
    adapter = model if isinstance(model, ModelAdapter) else adapt(model)
    job = Job.of(adapter, tokens, configs, batch_size, held_out, offload, overlap, planned_layers)
    started = time.perf_counter()
    group = Group.current(adapter.device)
    identities: list[str] = []
    fits = {name: job.fit(config, group) for name, config in configs.items()}
    if store is not None:
        store.open(job.identity(), group)
        identities = store.restore_layers(list(fits.values()))
    kept = None if store is None else store.load_plan()
    ticker = job.ticker(group, len(identities), kept is not None, progress)
    observations: list[LayerObservation] = []
    plans, harm = kept or ({}, None)
    if kept is None and job.observed:
        plans, harm, observations = job.plan(ticker)
        if store is not None:
            store.save_plan(plans, harm)
    if job.observed < len(tokens) or group.size > 1 or identities:
        observations = []
    lanes = Lanes(adapter.device, job.waiting.overlap)
    for name, fit in fits.items():
        fit.begin(plans.get(name, Plan()), ticker, lanes.meanwhile)
    loop = LayerLoop(job, group, ticker, list(fits.values()), harm, store, lanes)
    if observations:
        loop.over(observations)
    else:
        loop.over_model(identities)
    shared = {
        **(record or {}),
        "sequences": len(tokens),
        "held_out_sequences": job.held_out,
        "seq_len": tokens.shape[1],
        "tokens": tokens.numel(),
        "seconds": round(time.perf_counter() - started, 3),
        "device": _devices(adapter),
        "model_dtype": str(adapter.model.dtype).removeprefix("torch."),
        "versions": library_versions(),
    }
    if timings is not None:
        timings.update(
            phases=dict(ticker.seconds),
            layers=dict(ticker.by_layer),
            waiting=job.waiting.name,
            overlap=job.waiting.overlap,
        )
    fingerprint = adapter.fingerprint()
    return {name: fit.finish(shared, fingerprint) for name, fit in fits.items()}


def _devices(adapter: ModelAdapter) -> str:
    """Return the names of the devices that compute, in order."""
    used = [adapter.device, *(adapter.layer_device(index) for index in range(len(adapter.layers)))]
    return ", ".join(dict.fromkeys(map(str, used)))
