"""How far a calibration is, and where its time goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch

#: What a calibration does: the planning sweep's parts first, then those of the sweep that counts.
Phase = Literal[
    "plan: observe",
    "plan: harm",
    "plan: fit",
    "replay",
    "observe",
    "fit",
    "fit, beside observing",
    "checkpoint",
]

#: Phases that count the batches of another: the time is that of a fit with the next layer being observed, and
#: what is left of that layer afterwards is in ``observe``.
_COUNTED_AS: Mapping[Phase, Phase] = {"fit, beside observing": "fit"}


@dataclass(frozen=True)
class CalibrationProgress:
    """How far a calibration is.

    Attributes
    ----------
    done, total
        Batches processed, over all layers and sweeps.
    layer, num_layers
        The decoder layer at hand, and how many there are.
    phase
        What is being done there.
    tokens_per_second
        Tokens that went through this phase in its last batch's time.
    seconds, seconds_left
        Time since the beginning, and the time that the rest will take if every phase goes on as it did.
    """

    done: int
    total: int
    layer: int
    num_layers: int
    phase: Phase = "observe"
    tokens_per_second: float = 0.0
    seconds: float = 0.0
    seconds_left: float | None = None


Report = Callable[[CalibrationProgress], None]


@dataclass
class Ticker:
    """Counts batches by phase, and time.

    Attributes
    ----------
    expected
        Batches that each phase will have.
    num_layers
        Decoder layers.
    batch_tokens
        Tokens of a batch.
    device
        Whose work belongs to a phase's time.
    report
        Called after every batch.
    seconds
        Time of each phase so far; no time counts twice. On a GPU work on the current stream is awaited at
        every change of phase.
    by_layer
        The same by layer and phase.
    """

    expected: Mapping[Phase, int]
    num_layers: int
    batch_tokens: int
    device: torch.device
    report: Report | None = None
    seconds: dict[Phase, float] = field(default_factory=dict)
    by_layer: dict[tuple[int, Phase], float] = field(default_factory=dict)
    _counts: dict[Phase, int] = field(default_factory=dict)
    _last: dict[Phase, float] = field(default_factory=dict)
    _phase: Phase = "observe"
    _counted: Phase = "observe"
    _layer: int = 0

    def __post_init__(self) -> None:
        self._started = self._entered = time.perf_counter()

    def reach(self, layer: int) -> None:
        """Note that work on a layer begins."""
        self._layer = layer

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """Do a phase's work inside a ``with`` block; the phase around it waits."""
        around = self._phase
        self._enter(phase)
        try:
            yield
        finally:
            self._enter(around)

    @contextmanager
    def beside(self, phase: Phase, layer: int) -> Iterator[None]:
        """Count batches of another phase and layer inside a ``with`` block; time stays that of this one."""
        around = self._counted, self._layer
        self._counted, self._layer = phase, layer
        try:
            yield
        finally:
            self._counted, self._layer = around

    def __call__(self) -> None:
        """Count a batch."""
        phase = self._counted
        self._counts[phase] = self._counts.get(phase, 0) + 1
        now = time.perf_counter()
        rate = self.batch_tokens / max(now - self._last.get(phase, self._entered), 1e-9)
        self._last[phase] = now
        if self.report is not None:
            done, total = sum(self._counts.values()), sum(self.expected.values())
            elapsed = now - self._started
            left = self._left(now)
            self.report(
                CalibrationProgress(done, total, self._layer, self.num_layers, phase, rate, elapsed, left)
            )

    def _left(self, now: float) -> float | None:
        """Return the seconds left; a phase that has not begun counts as dear as the others on average."""
        spent: dict[Phase, float] = {}
        clocks: set[Phase] = {*self.seconds, self._phase}
        for phase in clocks:
            seconds = self._spent(now) if phase == self._phase else self.seconds[phase]
            counted = _COUNTED_AS.get(phase, phase)
            spent[counted] = spent.get(counted, 0.0) + seconds
        known = sum(self._counts.values())
        if not known:
            return None
        mean = sum(spent.get(phase, 0.0) for phase in self._counts) / known
        left = 0.0
        for phase, count in self.expected.items():
            have = self._counts.get(phase, 0)
            left += max(0, count - have) * (spent.get(phase, 0.0) / have if have else mean)
        return left

    def _spent(self, now: float) -> float:
        """Return the seconds of the phase at hand so far."""
        return self.seconds.get(self._phase, 0.0) + now - self._entered

    def _enter(self, phase: Phase) -> None:
        """End the time of the phase at hand and begin that of another."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        now = time.perf_counter()
        key = (self._layer, self._phase)
        self.by_layer[key] = self.by_layer.get(key, 0.0) + now - self._entered
        self.seconds[self._phase] = self._spent(now)
        self._entered = now
        self._phase, self._counted = phase, _COUNTED_AS.get(phase, phase)
        self._last[self._counted] = now
