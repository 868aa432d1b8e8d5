"""Calibrate codecs: one pass over the layers, hidden states from the uncompressed model."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from aquakv._version import __version__
from aquakv.calibration.fit import CodecFit
from aquakv.calibration.forecast import choose_waiting
from aquakv.calibration.group import Group
from aquakv.calibration.observe import LayerObservation, Observer, Waiting
from aquakv.calibration.plan import Plan
from aquakv.calibration.planner import TRIALS, Harm, Planner, fit_observation
from aquakv.calibration.progress import Phase, Report, Ticker
from aquakv.calibration.store import RunStore, tokens_digest
from aquakv.calibration.sweep import Split
from aquakv.calibration.walk import LayerWalk
from aquakv.calibration.workload import most_inputs, workload_of
from aquakv.codec import ModelCodec
from aquakv.config import CodecConfig, to_dict
from aquakv.errors import CheckpointError, DataError
from aquakv.models.adapter import ModelAdapter, adapt


def calibrate(
    model: PreTrainedModel | ModelAdapter,
    tokens: Tensor,
    config: CodecConfig,
    *,
    batch_size: int = 4,
    held_out: int | None = None,
    offload: str = "auto",
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
    record
        Further entries for the codecs' calibration records, such as the data's name.
    progress
        Called after every batch of every sweep.
    store
        Where finished layers are kept, to go on from after an interruption. The caller discards it.
    timings
        Filled with the seconds of every phase (``phases``), the same by layer (``layers``), and ``waiting``.
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
    job = _Job.of(adapter, tokens, configs, batch_size, held_out, offload, planned_layers)
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
    for name, fit in fits.items():
        fit.begin(plans.get(name, Plan()), ticker)
    sweep = _Sweep(job, group, ticker, list(fits.values()), harm, store)
    if observations:
        sweep.over(observations)
    else:
        sweep.over_model(identities)
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
        timings.update(phases=dict(ticker.seconds), layers=dict(ticker.by_layer), waiting=job.waiting.name)
    fingerprint = adapter.fingerprint()
    return {name: fit.finish(shared, fingerprint) for name, fit in fits.items()}


@dataclass(frozen=True)
class _Job:
    """What is to be done, and how."""

    adapter: ModelAdapter
    tokens: Tensor
    configs: Mapping[str, CodecConfig]
    batch_size: int
    held_out: int
    observed: int
    trial: int
    waiting: Waiting

    @classmethod
    def of(
        cls,
        adapter: ModelAdapter,
        tokens: Tensor,
        configs: Mapping[str, CodecConfig],
        batch_size: int,
        held_out: int | None,
        offload: str,
        planned_layers: int | None,
    ) -> _Job:
        """Check everything, and decide what waits where."""
        sequences, seq_len = _check_tokens(tokens, adapter)
        held_out = max(1, sequences // 8) if held_out is None else held_out
        if not 1 <= held_out < sequences:
            raise DataError(f"expected between 1 and {sequences - 1} held-out sequences, got {held_out}")
        for name, config in configs.items():
            fitted = (sequences - held_out) * max(0, seq_len - config.window.sink_tokens)
            _check_enough(name, config, adapter.features, fitted)
        processes = Group.current(adapter.device).size
        if processes > -(-sequences // batch_size):
            raise DataError(
                f"expected at least one batch for each of {processes} processes, got {sequences} sequences "
                f"in batches of {batch_size}; use a smaller --batch-size or more --samples"
            )
        workload = workload_of(adapter, sequences, seq_len, configs, batch_size, processes, planned_layers)
        return cls(
            adapter,
            tokens,
            configs,
            batch_size,
            held_out,
            workload.observed,
            workload.trial,
            choose_waiting(workload, offload),
        )

    def identity(self) -> dict[str, Any]:
        """Return what two runs must have in common for one to go on where the other was interrupted."""
        versions = library_versions()
        parts = {
            "configs": [to_dict(config) for config in self.configs.values()],
            "names": list(self.configs),
            "tokens": tokens_digest(self.tokens),
            "batch_size": self.batch_size,
            "held_out": self.held_out,
            "model": to_dict(self.adapter.fingerprint(identities=False)),
            "dtype": str(self.adapter.model.dtype),
            "processes": Group.current(self.adapter.device).size,
            "device": self.adapter.device.type,
            "versions": {name: versions[name] for name in ("aquakv", "torch", "transformers")},
        }
        return json.loads(json.dumps(parts))

    def fit(self, config: CodecConfig, group: Group) -> CodecFit:
        """Return an empty fit to this process's batches."""
        split = Split.of([len(batch) for batch in self.tokens.split(self.batch_size)], self.held_out)
        shape = self.adapter.fingerprint(identities=False)
        return CodecFit(
            config, shape, split.share(group), self.adapter.device, lambda: None, Plan(), group=group
        )

    def ticker(self, group: Group, finished: int, planned: bool, report: Report | None) -> Ticker:
        """Foresee how many batches there are to do."""
        adapter = self.adapter
        compressed, batches = len(adapter.compressed_layers), -(-len(self.tokens) // self.batch_size)
        own, few = -(-(batches - group.rank) // group.size), -(-self.observed // self.batch_size)
        expected: dict[Phase, int] = {}
        if self.observed and not planned:
            planner = self._planner(None)
            adaptive = sum(config.allocation.kind == "water-filling" for config in self.configs.values())
            expected["plan: observe"] = few * planner.layers
            expected["plan: fit"] = self.trial * adaptive * TRIALS * CodecFit.SWEEPS * compressed
        again = self.observed < len(self.tokens) or group.size > 1 or finished > 0 or planned
        end = adapter.compressed_layers[-1] + 1
        done = adapter.compressed_layers[finished - 1] + 1 if finished else 0
        if again:
            expected["replay"] = own * done
            expected["observe"] = own * (end - done)
        expected["fit"] = own * CodecFit.SWEEPS * (compressed - finished) * len(self.configs)
        tokens = self.batch_size * self.tokens.shape[1]
        return Ticker(expected, end, tokens, adapter.device, report)

    def plan(self, ticker: Ticker) -> tuple[dict[str, Plan], Harm | None, list[LayerObservation]]:
        """Observe some sequences at all layers and plan the allocation with them."""
        planner = self._planner(ticker)
        observer = Observer(self.adapter, self.batch_size, self.waiting, ticker, True, ticker.reach)
        with ticker.phase("plan: observe"):
            walk = LayerWalk(self.adapter, self.tokens[: self.observed], self.batch_size, self.waiting.hidden)
            planner.observe(observer.steps(walk, planner.layers))
            del walk
        return *planner.plan(), planner.observations

    def _planner(self, ticker: Ticker | None) -> Planner:
        sizes = [len(batch) for batch in self.tokens[: self.observed].split(self.batch_size)]
        tried = sum(sizes[: self.trial])
        adaptive = {n: c for n, c in self.configs.items() if c.allocation.kind == "water-filling"}
        held_out = max(1, tried * self.held_out // len(self.tokens))
        return Planner(self.adapter, self.tokens, adaptive, self.trial, held_out, sizes, ticker)


@dataclass
class _Sweep:
    """The sweep over the layers that counts."""

    job: _Job
    group: Group
    ticker: Ticker
    fits: list[CodecFit]
    harm: Harm | None
    store: RunStore | None

    def over(self, observations: Sequence[LayerObservation]) -> None:
        """Fit all layers, already observed."""
        for observation in observations:
            self.ticker.reach(observation.layer)
            self._fit(observation)

    def over_model(self, identities: Sequence[str]) -> None:
        """Observe and fit layer after layer; finished ones, whose identities these are, are replayed."""
        adapter, job = self.job.adapter, self.job
        if len(identities) == len(adapter.compressed_layers):
            self._check_identity(adapter.compressed_layers[0], identities)
            self._note_identities(adapter.compressed_layers[-1] + 1, identities)
            return
        batches = job.tokens.split(job.batch_size)[self.group.rank :: self.group.size]
        empty = job.tokens[:0]
        walk = LayerWalk(adapter, torch.cat([empty, *batches]), job.batch_size, job.waiting.hidden)
        observer = Observer(
            adapter, job.batch_size, job.waiting, self.ticker, job.observed > 0, self.ticker.reach, self.group
        )
        start, done = 0, 0
        if identities:
            assert self.store is not None
            done = adapter.compressed_layers[len(identities) - 1] + 1
            self._check_identity(adapter.compressed_layers[len(identities) - 1], identities)
            start = self.store.restore_activations(walk, self.fits, job.waiting.vectors)
            self._note_identities(start, identities)
            with self.ticker.phase("replay"):
                for layer_idx, observation in observer.steps(walk, done, start, weights=False):
                    if observation is not None:
                        self._check_identity(layer_idx, identities)
                        self._replay(observation)
            self.store.restore_moments(self.fits)
        with self.ticker.phase("observe"):
            for layer_idx, observation in observer.steps(walk, adapter.compressed_layers[-1] + 1, done):
                if observation is None:
                    continue
                self._fit(observation)
                del observation  # before the next layer's keys and values come
                if self.store is not None and layer_idx != adapter.compressed_layers[-1]:
                    with self.ticker.phase("checkpoint"):
                        self.store.save_activations(walk, self.fits, layer_idx)

    def _fit(self, observation: LayerObservation) -> None:
        order = len(self.fits[0].layers)
        with self.ticker.phase("fit"):
            for fit in self.fits:
                fit_observation(fit, observation, None if self.harm is None else self.harm[order])
        if self.store is not None:
            with self.ticker.phase("checkpoint"):
                self.store.save_layer(self.fits, self.job.adapter.layer_identity(observation.layer))

    def _replay(self, observation: LayerObservation) -> None:
        for fit in self.fits:
            sinks = fit.config.window.sink_tokens
            fit.replay_layer(
                [batch[:, sinks:] for batch in observation.keys],
                [batch[:, sinks:] for batch in observation.values],
            )

    def _note_identities(self, start: int, identities: Sequence[str]) -> None:
        """Take over identities of layers that need not be read again; check them where that is free."""
        noted = self.job.adapter.weights.identities
        for layer_idx, found in zip(self.job.adapter.compressed_layers, identities, strict=False):
            if noted is None:
                self._check_identity(layer_idx, identities)
            elif layer_idx < start:
                noted.setdefault(layer_idx, found)

    def _check_identity(self, layer_idx: int, identities: Sequence[str]) -> None:
        order = self.job.adapter.compressed_layers.index(layer_idx)
        if self.job.adapter.layer_identity(layer_idx) != identities[order]:
            raise CheckpointError(
                f"the interrupted calibration was of other weights: layer {layer_idx} differs; calibrate "
                "with the same model, or without --resume"
            )


def _devices(adapter: ModelAdapter) -> str:
    """Return the names of the devices that compute, in order."""
    used = [adapter.device, *(adapter.layer_device(index) for index in range(len(adapter.layers)))]
    return ", ".join(dict.fromkeys(map(str, used)))


def library_versions() -> dict[str, str]:
    """Return the versions of everything that can change a figure."""
    return {
        "aquakv": __version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _check_tokens(tokens: Tensor, adapter: ModelAdapter) -> tuple[int, int]:
    if tokens.ndim != 2 or tokens.shape[0] < 2:
        raise DataError(
            f"calibration tokens: expected at least 2 sequences of equal length, got {list(tokens.shape)}"
        )
    sequences, seq_len = tokens.shape
    adapter.require_length(seq_len)
    return sequences, seq_len


def _check_enough(name: str, config: CodecConfig, features: int, tokens: int) -> None:
    needed = max(1, most_inputs(config, features))
    if tokens < needed:
        raise DataError(
            f"{name or config.preset}: expected at least {needed} calibration tokens beside held-out ones "
            f"and sinks (a predictor's number of inputs), got {tokens}; use more or longer sequences"
        )
