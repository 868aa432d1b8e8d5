"""What a calibration is to do, and how: decided before it begins."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from aquakv._version import __version__
from aquakv.calibration.fit import CodecFit
from aquakv.calibration.forecast import choose_waiting
from aquakv.calibration.group import Group
from aquakv.calibration.observe import LayerObservation, Observer, Waiting
from aquakv.calibration.plan import Plan
from aquakv.calibration.planner import TRIALS, Harm, Planner
from aquakv.calibration.progress import Phase, Report, Ticker
from aquakv.calibration.store import tokens_digest
from aquakv.calibration.sweep import Split
from aquakv.calibration.walk import LayerWalk
from aquakv.calibration.workload import most_inputs, workload_of
from aquakv.config import CodecConfig, to_dict
from aquakv.errors import DataError
from aquakv.models.adapter import ModelAdapter


@dataclass(frozen=True)
class Job:
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
        overlap: bool | None,
        planned_layers: int | None,
    ) -> Job:
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
            choose_waiting(workload, offload, overlap),
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
        group = Group.current(self.adapter.device)
        return Planner(self.adapter, self.tokens, adaptive, self.trial, held_out, sizes, ticker, group)


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
