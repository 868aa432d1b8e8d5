"""The sweep over the layers that counts: observe a layer, fit it, keep what is finished."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from aquakv.calibration.ahead import Lanes, Lookahead
from aquakv.calibration.fit import CodecFit
from aquakv.calibration.group import Group
from aquakv.calibration.job import Job
from aquakv.calibration.observe import LayerObservation, Observer
from aquakv.calibration.planner import Harm, fit_observation
from aquakv.calibration.progress import Ticker
from aquakv.calibration.store import RunStore
from aquakv.calibration.walk import LayerWalk
from aquakv.errors import CheckpointError


@dataclass
class LayerLoop:
    """The sweep over the layers that counts.

    Attributes
    ----------
    job
        What is to be done.
    group
        The processes that do it together.
    ticker
        Told of progress.
    fits
        The codecs in the making.
    harm
        What errors in each layer do, if that was measured.
    store
        Where finished layers are kept, if they are.
    lanes
        Where fits and observing go on.
    """

    job: Job
    group: Group
    ticker: Ticker
    fits: list[CodecFit]
    harm: Harm | None
    store: RunStore | None
    lanes: Lanes

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
        start = self._go_on(observer, walk, identities) if identities else 0
        try:
            with self.ticker.phase("observe"):
                self._layers(observer, walk, start)
        finally:
            if self.lanes.ahead is not None:
                self.lanes.ahead.close()
                self.lanes.ahead = None

    def _go_on(self, observer: Observer, walk: LayerWalk, identities: Sequence[str]) -> int:
        """Take up what an interrupted run has finished; return the first layer that it has not."""
        assert self.store is not None
        compressed = self.job.adapter.compressed_layers
        done = compressed[len(identities) - 1] + 1
        self._check_identity(compressed[len(identities) - 1], identities)
        start = self.store.restore_activations(walk, self.fits, self.job.waiting.vectors)
        self.lanes.take_over(batch for fit in self.fits for hats in fit.hats.values() for batch in hats)
        self._note_identities(start, identities)
        with self.ticker.phase("replay"):
            for layer_idx, observation in observer.steps(walk, done, start, weights=False):
                if observation is not None:
                    self._check_identity(layer_idx, identities)
                    self._replay(observation)
        with self.lanes.fitting():
            self.store.restore_moments(self.fits)
        return done

    def _layers(self, observer: Observer, walk: LayerWalk, start: int) -> None:
        """Observe and fit layers from ``start`` on."""
        last = self.job.adapter.compressed_layers[-1]

        def ahead(layer_idx: int) -> Lookahead:
            then = layer_idx + 1 if layer_idx < last else None
            return Lookahead(observer, walk, layer_idx, then, self.ticker)

        for layer_idx in range(start, last + 1):
            if self.lanes.ahead is None:
                self.lanes.ahead = ahead(layer_idx)
            observation = self.lanes.ahead.finish()
            self.lanes.ahead = None
            if observation is None:
                continue
            # What is kept of the activations is as they are behind this layer: then the next one has to wait.
            keeps = self.store is not None and layer_idx < last and self.store.is_due(walk, self.fits)
            if self.lanes.overlap and layer_idx < last and not keeps:
                self.lanes.ahead = ahead(layer_idx + 1)
            self._fit(observation)
            del observation  # before the next layer's keys and values come, unless these are there already
            if self.store is not None and keeps:
                with self.ticker.phase("checkpoint"):
                    self.store.save_activations(walk, self.fits, layer_idx)

    def _fit(self, observation: LayerObservation) -> None:
        order = len(self.fits[0].layers)
        with self.lanes.fitting():
            with self.ticker.phase("fit" if self.lanes.ahead is None else "fit, beside observing"):
                self.lanes.meanwhile()
                for fit in self.fits:
                    fit_observation(fit, observation, None if self.harm is None else self.harm[order])
            if self.store is not None:
                with self.ticker.phase("checkpoint"):
                    self.lanes.meanwhile()
                    self.store.save_layer(self.fits, self.job.adapter.layer_identity(observation.layer))

    def _replay(self, observation: LayerObservation) -> None:
        with self.lanes.fitting():
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
