"""Observe a layer while the one before it is being fitted, with one thread and two streams of a GPU.

A fit pauses: for factorisations and eigendecompositions, which are long chains of small kernels, and for
numbers that the host needs. The forward pass through the next layer needs nothing of it and fills the pauses.

One thread starts the work of both, the fit's on a stream of its own and, between its steps, a few batches of
the next layer on the stream that was there. So everything that belongs to a thread or a process (how float32
matrices are multiplied, gradients, exceptions, the order in which processes talk to each other) is as if one
came after the other, and so are the results: the same operations on the same operands, in two queues.

The fit's stream goes first: its kernels are small, and nobody waits for the next layer before it is done.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from aquakv.calibration.observe import LayerObservation, Observer
from aquakv.calibration.progress import Ticker
from aquakv.calibration.walk import LayerWalk

#: Batches of the next layer that are under way at a time: enough to bridge a fit's longest pause, not so many
#: that the queue of kernels is full and starting one waits.
AHEAD = 8


def most_ahead(batches: int) -> int:
    """Return how many of a layer's batches are begun while the layer before it is fitted.

    Keys and values of the others need no room beside the fit. Large models are fitted in a quarter of the
    time that observing takes; with small ones, whose fits keep a GPU busy, going further gains nothing.
    """
    return -(-batches // 2)


class Lanes:
    """Streams for observing and for fitting, if these go on side by side.

    Parameters
    ----------
    device
        Where both compute.
    overlap
        Whether they do.

    Attributes
    ----------
    ahead
        What is observed while fits go on, if anything is.
    """

    def __init__(self, device: torch.device, overlap: bool) -> None:
        self.overlap = overlap
        self.ahead: Lookahead | None = None
        two = overlap and device.type == "cuda"
        self.stream = torch.cuda.Stream(device, priority=-1) if two else None

    def meanwhile(self) -> None:
        """Go on observing; what fits call now and then."""
        if self.ahead is not None:
            self.ahead.go_on()

    def take_over(self, tensors: Iterable[Tensor]) -> None:
        """Let fits free tensors that were not made by them."""
        for tensor in tensors:
            if self.stream is not None and tensor.device.type == "cuda":
                tensor.record_stream(self.stream)

    @contextmanager
    def fitting(self) -> Iterator[None]:
        """Start work inside a ``with`` block on the fits' stream; leave when it is done.

        Nothing that it reads may be freed inside the block unless it was made in such a block or taken over:
        the memory would go back to the other stream at once.
        """
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            self.stream.synchronize()


class Lookahead:
    """A layer's observation, which goes on batch by batch.

    Its work is on the stream that is current when this is made.

    Parameters
    ----------
    observer, walk
        Who observes, and where the text has come to.
    layer_idx, then
        The layer, and the one that will be wanted next.
    ticker
        Told of the batches that were begun while something else was timed.
    """

    def __init__(
        self, observer: Observer, walk: LayerWalk, layer_idx: int, then: int | None, ticker: Ticker
    ) -> None:
        self.layer_idx = layer_idx
        self._weights = observer.adapter.weights
        self._ticker = ticker
        self._steps: Generator[None, None, LayerObservation | None] = observer.layer(walk, layer_idx, then)
        self._left = most_ahead(len(walk.hidden))
        self._begun = False
        device = observer.adapter.device
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._under_way: deque[Any] = deque()  # events

    def go_on(self) -> None:
        """Begin some batches, `most_ahead` in all, without waiting for weights that are still on their way.

        The others, and what comes behind the last one, are left to `finish`: processes that observe a layer
        together talk to each other then, and have to do so in one order.
        """
        for _ in range(min(self._left, self._room())):
            if not (self._begun or self._weights.ready(self.layer_idx)):
                return
            self._begun = True
            with self._ticker.beside("observe", self.layer_idx), self._lane():
                next(self._steps)
                if self._stream is not None:
                    self._under_way.append(self._stream.record_event())
            self._left -= 1

    def finish(self) -> LayerObservation | None:
        """Do the rest and return what is observed, None of a layer that is not compressed."""
        self._ticker.reach(self.layer_idx)
        while True:
            try:
                next(self._steps)
            except StopIteration as done:
                return done.value

    def close(self) -> None:
        """Let go of the layer's weights if it is not finished."""
        with self._lane():
            self._steps.close()

    def _room(self) -> int:
        """Return how many batches to begin; one where none is ever under way."""
        if self._stream is None:
            return 1
        while self._under_way and self._under_way[0].query():
            self._under_way.popleft()
        return AHEAD - len(self._under_way)

    def _lane(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
