"""What a calibration keeps on disk while it runs, so that it can go on after an interruption at any point.

A directory holds, each file checksummed and put in place by renaming:

* ``plan.safetensors``: the allocation's plan;
* ``layer-00012.safetensors``: the codecs of a finished layer, which it is once this file is there;
* ``moments-00012.safetensors``: what the next layer's predictors read, in second moments; the last one only;
* ``activations-00012/``: hidden states and reconstructions behind that layer, not for every layer. Going on
  means to send the text through the finished layers behind the last of these, without fitting them again.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aquakv.calibration.fit import CodecFit
from aquakv.calibration.group import Group
from aquakv.calibration.history import Source
from aquakv.calibration.plan import Plan
from aquakv.calibration.planner import Harm
from aquakv.calibration.walk import LayerWalk, lay
from aquakv.codec import ModelCodec, ModelFingerprint
from aquakv.codec.entropy import EntropyModel
from aquakv.codec.file import FileKind, read_file, write_file
from aquakv.codec.model import layer_tensors
from aquakv.errors import CheckpointError, OutputError

#: Activations are saved once so many times the time that this takes has gone by.
_PATIENCE = 10
#: What saving is taken to run at before it was measured, bytes a second.
_FIRST_GUESS = 500e6

_FILE = FileKind(
    what="calibration checkpoint",
    format="aquakv-calibration",
    version=1,
    entries=frozenset({"identity", "content"}),
    error=CheckpointError,
    if_missing="calibrate again without --resume",
    if_other_version="calibrate again without --resume, with this version of aquakv",
)


@dataclass
class RunStore:
    """A calibration's directory.

    Attributes
    ----------
    directory
        Made when there is something to keep.
    resume
        Go on with what is in it; otherwise there must be nothing in it.
    """

    directory: Path
    resume: bool = False
    group: Group = field(default_factory=Group)
    identity: dict[str, Any] = field(default_factory=dict)
    _saved: tuple[float, float] = (0.0, 0.0)

    def open(self, identity: Mapping[str, Any], group: Group) -> None:
        """Tell what is being calibrated, by which processes.

        Raises
        ------
        CheckpointError
            Something is there though nobody asked to go on with it, or something else was being calibrated.
        """
        self.identity, self.group = dict(identity), group
        self._saved = (time.monotonic(), 0.0)
        found = sorted(self.directory.glob("*.safetensors")) if self.directory.is_dir() else []
        if found and not self.resume:
            raise CheckpointError(
                f"an unfinished calibration lies in {self.directory}; go on with it (--resume) or delete it"
            )
        for path in found:
            self._read(path)
        group.wait()

    def save_plan(self, plans: Mapping[str, Plan], harm: Harm | None) -> None:
        """Keep the plans by configuration, and the harm of errors."""
        content: dict[str, Any] = {"harm": harm, "plans": []}
        tensors: dict[str, Tensor] = {}
        for number, (name, plan) in enumerate(plans.items()):
            content["plans"].append([name, plan.planes, plan.theta, plan.step])
            if plan.model is not None:
                tensors[f"{number}.frequencies"] = plan.model.frequencies
                tensors[f"{number}.points"] = plan.model.points
        self._write("plan", content, tensors)

    def load_plan(self) -> tuple[dict[str, Plan], Harm | None] | None:
        """Return what `save_plan` kept, or None."""
        path = self.directory / "plan.safetensors"
        if not path.is_file():
            return None
        content, tensors = self._read(path)
        plans = {}
        for number, (name, planes, theta, step) in enumerate(content["plans"]):
            model = None
            if f"{number}.points" in tensors:
                model = EntropyModel(tensors[f"{number}.frequencies"], tensors[f"{number}.points"])
            plans[name] = Plan(None if planes is None else tuple(planes), theta, step, model)
        return plans, content["harm"]

    def save_layer(self, fits: Sequence[CodecFit], layer_identity: str) -> None:
        """Keep the layer that the fits finished last."""
        order = len(fits[0].layers) - 1
        moments: dict[str, Tensor] = {}
        codecs: dict[str, Tensor] = {}
        for number, fit in enumerate(fits):
            names = list(fit.inputs.sources)
            for index, name in enumerate(names):
                moments[f"{number}.mean.{name}"] = fit.inputs.sources[name].mean
                for other in names[: index + 1]:
                    moments[f"{number}.scatter.{name}.{other}"] = fit.inputs.scatter[name, other]
            for name, tensor in layer_tensors(fit.layers[order], order).items():
                codecs[f"{number}.{name}"] = tensor
        content = {"sources": [list(fit.inputs.sources) for fit in fits]}
        self._write(f"moments-{order:05}", content, moments)
        records = [fit.record[-1] for fit in fits]
        self._write(f"layer-{order:05}", {"records": records, "layer_identity": layer_identity}, codecs)
        if self.group.rank == 0:
            (self.directory / f"moments-{order - 1:05}.safetensors").unlink(missing_ok=True)

    def restore_layers(self, fits: Sequence[CodecFit]) -> list[str]:
        """Give fits the layers that are finished; return the identities of the model's layers then."""
        identities: list[str] = []
        tensors: dict[str, Tensor] = {}
        while (path := self.directory / f"layer-{len(identities):05}.safetensors").is_file():
            content, found = self._read(path)
            identities.append(content["layer_identity"])
            tensors.update(found)
            for fit, record in zip(fits, content["records"], strict=True):
                fit.record.append(record)
        for number, fit in enumerate(fits):
            if identities:
                stem = f"{number}."
                own = {k.removeprefix(stem): v for k, v in tensors.items() if k.startswith(stem)}
                codec = ModelCodec.from_content(
                    {
                        "config": self.identity["configs"][number],
                        "fingerprint": vars(_first(fit.fingerprint, len(identities))),
                        "calibration": {},
                    },
                    own,
                    str(self.directory),
                )
                fit.layers.extend(codec.layers)
        return identities

    def restore_moments(self, fits: Sequence[CodecFit]) -> None:
        """Give fits the moments behind the last finished layer, once that has been replayed."""
        path = self.directory / f"moments-{len(fits[0].layers) - 1:05}.safetensors"
        content, tensors = self._read(path)
        for number, (fit, names) in enumerate(zip(fits, content["sources"], strict=True)):
            for index, name in enumerate(names):
                mean = tensors[f"{number}.mean.{name}"].to(fit.device)
                fit.inputs.sources[name] = Source(name, fit.hats[name], mean)
                for other in names[: index + 1]:
                    product = tensors[f"{number}.scatter.{name}.{other}"].to(fit.device)
                    fit.inputs.scatter[name, other] = product
                    if other != name:
                        fit.inputs.scatter[other, name] = product.T

    def is_due(self, walk: LayerWalk, fits: Sequence[CodecFit]) -> bool:
        """Tell whether it is time to keep hidden states and reconstructions, and there is room for them."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in walk.hidden)
        size += sum(t.numel() * t.element_size() for fit in fits for b in fit.hats.values() for t in b)
        last, took = self._saved
        due = time.monotonic() - last > _PATIENCE * (took or size / _FIRST_GUESS)
        _make(self.directory)
        room = size < 0.5 * shutil.disk_usage(self.directory).free
        return bool(self.group.first(float(due and room)))

    def save_activations(self, walk: LayerWalk, fits: Sequence[CodecFit], layer_idx: int) -> None:
        """Keep hidden states and reconstructions behind a layer."""
        started = time.monotonic()
        target = self._activations(len(fits[0].layers) - 1)
        shutil.rmtree(target, ignore_errors=True)
        _make(target)
        for number, hidden in enumerate(walk.hidden):
            tensors = {"hidden": hidden}
            for index, fit in enumerate(fits):
                tensors.update({f"{index}.{name}": batches[number] for name, batches in fit.hats.items()})
            self._write_here(target / f"batch-{number:05}.safetensors", {}, tensors)
        self._write_here(target / "complete.safetensors", {"layer": layer_idx}, {})
        self.group.wait()
        self._remove_activations(but=target)
        self._saved = (time.monotonic(), time.monotonic() - started)

    def restore_activations(self, walk: LayerWalk, fits: Sequence[CodecFit], place: torch.device) -> int:
        """Put hidden states back, and reconstructions to ``place``; return the layer to go on from."""
        found = []
        for order in range(len(fits[0].layers)):
            path = self._activations(order)
            if self.group.first(float((path / "complete.safetensors").is_file())):
                found.append((order, path))
        if not found:
            return 0
        order, path = found[-1]
        self._remove_activations(but=path)
        for number, old in enumerate(walk.hidden):
            _, tensors = self._read(path / f"batch-{number:05}.safetensors")
            on_gpu = tensors.pop("hidden").to(walk.adapter.device)
            walk.hidden[number] = lay(on_gpu, walk.device, old)
            for name, tensor in tensors.items():
                index, _, kind = name.partition(".")
                back = lay(tensor.to(walk.adapter.device), place)
                fits[int(index)].hats.setdefault(kind, []).append(back)
        for fit in fits:
            fit.replayed = order + 1
        return self._read(path / "complete.safetensors")[0]["layer"] + 1

    def discard(self) -> None:
        """Delete the directory: what it was kept for is done."""
        self.group.wait()
        if self.group.rank == 0:
            shutil.rmtree(self.directory, ignore_errors=True)

    def _activations(self, order: int) -> Path:
        return self.directory / f"activations-{order:05}" / f"rank-{self.group.rank}"

    def _remove_activations(self, but: Path) -> None:
        self.group.wait()
        if self.group.rank == 0:
            for path in self.directory.glob("activations-*"):
                if path != but.parent:
                    shutil.rmtree(path, ignore_errors=True)

    def _write(self, name: str, content: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        if self.group.rank == 0:
            _make(self.directory)
            self._write_here(self.directory / f"{name}.safetensors", content, tensors)
        self.group.wait()

    def _write_here(self, path: Path, content: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        write_file(path, _FILE, {"identity": self.identity, "content": content}, tensors)

    def _read(self, path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
        header, tensors = read_file(path, _FILE)
        for key, ours in self.identity.items():
            theirs = header["identity"].get(key)
            if theirs != ours:
                raise CheckpointError(
                    f"the calibration in {self.directory} was another one: {key} was {_short(theirs)}, now "
                    f"{_short(ours)}; calibrate as then, or delete the directory and calibrate afresh"
                )
        return header["content"], tensors


def _first(fingerprint: ModelFingerprint, layers: int) -> ModelFingerprint:
    """Return the fingerprint of a model that ends with so many compressed layers."""
    found = fingerprint.compressed_layers[:layers]
    return replace(fingerprint, compressed_layers=found, layer_hashes=("",) * layers)


def _make(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot make the directory {directory} for checkpoints ({error.strerror}); choose another place"
        ) from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"


def tokens_digest(tokens: Tensor) -> str:
    """Return a SHA-256, in hex, of token ids."""
    plain = tokens.to(torch.int64).cpu().contiguous()
    return hashlib.sha256(plain.view(torch.uint8).numpy().data).hexdigest()
