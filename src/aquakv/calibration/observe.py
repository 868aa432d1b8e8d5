"""See one layer after another: keys, values, and what attention feels of errors in them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from aquakv.calibration.group import Group
from aquakv.calibration.metrics import Metric, QueryMoments, key_weight, value_weight
from aquakv.calibration.walk import Batches, LayerWalk, lay
from aquakv.models.adapter import ModelAdapter


@dataclass
class LayerObservation:
    """What calibration sees of one compressed layer.

    Attributes
    ----------
    layer
        Its index in the decoder.
    keys, values
        Batches ``[sequences, seq_len, num_kv_heads * head_dim]`` in the model's dtype, sinks included, keys
        before rotary embedding.
    key_weight, value_weight
        ``[num_kv_heads, head_dim, head_dim]`` float64, not normalised; None if nobody asked for them.
    """

    layer: int
    keys: Batches
    values: Batches
    key_weight: Tensor | None = None
    value_weight: Tensor | None = None

    @property
    def batch_sizes(self) -> list[int]:
        """Sequences of each batch."""
        return [len(batch) for batch in self.keys]

    def head(self, batches: int) -> LayerObservation:
        """Return the first batches, with the weights that all tell."""
        return replace(self, keys=self.keys[:batches], values=self.values[:batches])

    def metrics(self, floor: float) -> dict[str, Metric]:
        """Return the normalised weights of errors in keys and in values."""
        assert self.key_weight is not None
        assert self.value_weight is not None
        return {"keys": Metric.of(self.key_weight, floor), "values": Metric.of(self.value_weight, floor)}


class Waiting(NamedTuple):
    """Where batches wait until they are needed.

    Attributes
    ----------
    hidden
        The device of all sequences' hidden states.
    vectors
        That of a layer's keys, values and reconstructions.
    name
        What this is called as ``offload`` of `calibrate_many`.
    overlap
        Whether a layer is fitted while the next one is observed, whose keys and values wait too.
    """

    hidden: torch.device
    vectors: torch.device
    name: str = "none"
    overlap: bool = False

    @classmethod
    def on(cls, device: torch.device | str) -> Waiting:
        """Return that all wait on one device."""
        return cls(torch.device(device), torch.device(device))


@dataclass
class Observer:
    """Walk a model and observe its compressed layers.

    Attributes
    ----------
    adapter
        The model.
    batch_size
        Sequences that go through a layer at once.
    waiting
        Where keys, values and hidden states wait.
    on_batch
        Called after every batch at every layer.
    weights
        Whether to observe what attention feels of errors.
    on_layer
        Called with every layer's index before its first batch.
    group
        The processes whose text counts together.
    """

    adapter: ModelAdapter
    batch_size: int
    waiting: Waiting
    on_batch: Callable[[], None]
    weights: bool
    on_layer: Callable[[int], None] = lambda layer: None
    group: Group = field(default_factory=Group)

    def walk(self, tokens: Tensor) -> Iterator[LayerObservation]:
        """Yield an observation of every compressed layer, in order, for tokens ``[sequences, seq_len]``."""
        walk = LayerWalk(self.adapter, tokens, self.batch_size, self.waiting.hidden)
        for _, observation in self.steps(walk, self.adapter.compressed_layers[-1] + 1):
            if observation is not None:
                yield observation

    def steps(
        self, walk: LayerWalk, end: int, start: int = 0, weights: bool | None = None
    ) -> Iterator[tuple[int, LayerObservation | None]]:
        """Walk layers ``start`` to ``end`` - 1, each with its weights at hand while it is yielded.

        Yields its index and, of compressed layers, what is observed; ``weights`` in place of the attribute.
        """
        weights = self.weights if weights is None else weights
        for layer_idx in range(start, end):
            with self._at_hand(layer_idx, layer_idx + 1 if layer_idx + 1 < end else None):
                # No name for the observation here: it would keep one layer's keys and values too long.
                yield layer_idx, _result(self._batches(walk, layer_idx, weights))

    def layer(
        self, walk: LayerWalk, layer_idx: int, then: int | None
    ) -> Generator[None, None, LayerObservation | None]:
        """Walk one layer, yielding behind every batch; its weights are let go of at the end.

        ``then`` is the layer that will be wanted next. Returns what is observed, None if the layer is not
        compressed. Processes talk to each other behind the last batch only.
        """
        with self._at_hand(layer_idx, then):
            return (yield from self._batches(walk, layer_idx, self.weights))

    @contextmanager
    def _at_hand(self, layer_idx: int, then: int | None) -> Iterator[None]:
        """Have a layer's weights, and note what they are."""
        self.on_layer(layer_idx)
        weights = self.adapter.weights
        with weights.holding(layer_idx, then=then):
            if weights.identities is not None and layer_idx in self.adapter.compressed_layers:
                self.adapter.layer_identity(layer_idx)  # while it is here
            yield

    def _batches(
        self, walk: LayerWalk, layer_idx: int, weights: bool
    ) -> Generator[None, None, LayerObservation | None]:
        adapter = self.adapter
        if layer_idx not in adapter.compressed_layers:
            for _ in walk.advance(layer_idx, self.on_batch):
                yield
            return None
        device = adapter.layer_device(layer_idx)
        moments = QueryMoments.empty(adapter, device)
        tables = adapter.rotary_tables(torch.arange(walk.seq_len), layer_idx, walk.dtype, device)
        keys: Batches = []
        values: Batches = []
        on_queries = partial(moments.add, tables=tables) if weights else None
        for vectors in walk.advance(layer_idx, self.on_batch, on_queries):
            assert vectors is not None  # the layer is compressed
            keys.append(lay(vectors[0], self.waiting.vectors))
            values.append(lay(vectors[1], self.waiting.vectors))
            del vectors
            yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # whoever reads them on the CPU finds them there
        if not weights:
            return LayerObservation(layer_idx, keys, values)
        moments.share(self.group)
        felt = key_weight(adapter, layer_idx, moments, walk.seq_len), value_weight(adapter, layer_idx)
        # What is fitted to them is fitted in one place.
        return LayerObservation(layer_idx, keys, values, *(weight.to(adapter.device) for weight in felt))


def _result(steps: Generator[None, None, LayerObservation | None]) -> LayerObservation | None:
    """Go through all steps and return what they come to."""
    while True:
        try:
            next(steps)
        except StopIteration as done:
            return done.value
