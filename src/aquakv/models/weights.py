"""Where a model's weights are while it is walked: in memory throughout, or one part at a time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from aquakv.errors import ModelError
from aquakv.models.placement import name_of, owner_of

#: A decoder layer by its index; what comes before the layers; or what comes after them.
Part = int | Literal["input", "output"]


class LayerWeights(Protocol):
    """Has the weights of one part of a model at hand when they are wanted."""

    @property
    def device(self) -> torch.device | None:
        """Where parts are when at hand; None if that is where the model is."""
        ...

    @property
    def identities(self) -> dict[int, str] | None:
        """Those of the layers seen so far (see `ModelAdapter.layer_identity`); None if none need be noted."""
        ...

    def holding(self, part: Part, then: Part | None = None) -> AbstractContextManager[None]:
        """Have a part at hand inside a ``with`` block; ``then`` is what will be wanted next."""
        ...

    def ready(self, part: Part) -> bool:
        """Tell whether `holding` would have a part at once."""
        ...

    def probed(self, layer_idx: int, attention: nn.Module) -> AbstractContextManager[None]:
        """Have a layer's attention callable to see what it does, though not with what weights."""
        ...


class AlwaysThere:
    """Weights of a model that was loaded as a whole."""

    device = None
    identities = None

    def holding(self, part: Part, then: Part | None = None) -> AbstractContextManager[None]:
        """Do nothing."""
        return nullcontext()

    def ready(self, part: Part) -> bool:
        """Return True."""
        return True

    def probed(self, layer_idx: int, attention: nn.Module) -> AbstractContextManager[None]:
        """Do nothing."""
        return nullcontext()


ALWAYS_THERE = AlwaysThere()


#: Numbers that are repeated: a prime, so that no two rows of a matrix are alike.
_QUICK = 65537


class Reader(Protocol):
    """Brings tensors of a model from where they are kept."""

    def read(self, model: PreTrainedModel, names: list[str], device: torch.device) -> None:
        """Set the named parameters and buffers of a model, on the CPU or on ``device``.

        Raises
        ------
        ModelError
            One of them cannot be had.
        """
        ...


@dataclass
class RandomWeights:
    """Normal random weights, the same for a name at every call; ones in norms, zeros in biases.

    Attributes
    ----------
    deviation
        Standard deviation of weights.
    quick
        Repeat a few thousand numbers over and over: good enough to see what a module does.
    """

    deviation: float = 0.02
    quick: bool = False

    def read(self, model: PreTrainedModel, names: list[str], device: torch.device) -> None:
        """Make the named tensors on a device."""
        for name in names:
            module, leaf = owner_of(model, name)
            old: Tensor = getattr(module, leaf)
            new = torch.empty(old.shape, dtype=old.dtype, device=device)
            if not old.is_floating_point() or leaf == "bias":
                new.zero_()
            elif old.ndim < 2:
                new.fill_(1)
            else:
                generator = torch.Generator(device).manual_seed(_seed(name))
                few = new.flatten()[:_QUICK] if self.quick else new
                few.normal_(0, self.deviation, generator=generator)
                if self.quick:
                    repeated = few.clone().repeat(-(-new.numel() // _QUICK))
                    new.view(-1).copy_(repeated[: new.numel()])
            place_tensor(module, leaf, new)


@dataclass(eq=False)
class StreamedWeights:
    """Weights of which only the part at hand, and the next one meanwhile, are in memory.

    The model is built without weights (see `aquakv.models.skeleton`); its tensors are replaced by real ones
    for as long as a part is held.

    Attributes
    ----------
    model, decoder
        The model and its stack of layers.
    reader
        Where the weights come from.
    device
        Where the parts at hand are.
    identities
        Of layers, noted by whoever computes them.
    waited
        Seconds that somebody waited for a part.
    """

    model: PreTrainedModel
    decoder: nn.Module
    reader: Reader
    device: torch.device
    identities: dict[int, str] = field(default_factory=dict)
    waited: float = 0.0
    _held: dict[Part, int] = field(default_factory=dict)
    _coming: dict[Part, Future[None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._absent: dict[str, Tensor] = dict(self.model.state_dict(keep_vars=True))
        self._parts = _parts(self.model, self.decoder, list(self._absent))
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        # One thread: parts are read in the order in which they are wanted.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="aquakv-weights")

    @classmethod
    def of(cls, model: PreTrainedModel, reader: Reader, device: torch.device) -> StreamedWeights:
        """Return the weights of a model that was built without any."""
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())  # as tensors say it
        return cls(model, find_decoder(model), reader, device)

    def tensors_of(self, part: Part) -> dict[str, Tensor]:
        """Return a part's tensors by name, without values."""
        return {name: self._absent[name] for name in self._parts.get(part, [])}

    @property
    def names(self) -> list[str]:
        """Names of all tensors that any part needs."""
        return [name for names in self._parts.values() for name in names]

    @contextmanager
    def holding(self, part: Part, then: Part | None = None) -> Iterator[None]:
        """Have a part at hand; what comes ``then`` is read meanwhile."""
        if not self._held.get(part):
            started = time.perf_counter()
            self._begin(part)
            self._coming.pop(part).result()
            self.waited += time.perf_counter() - started
            in_vain: list[Part] = [other for other in self._coming if other != then]
            for other in in_vain:
                self._coming.pop(other).result()
                self._drop(self._parts[other])
        self._held[part] = self._held.get(part, 0) + 1
        if then is not None and then in self._parts and not self._held.get(then):
            self._begin(then)
        try:
            yield
        finally:
            self._held[part] -= 1
            if not self._held[part]:
                self._drop(self._parts[part])

    def ready(self, part: Part) -> bool:
        """Tell whether `holding` would have a part at once."""
        return bool(self._held.get(part)) or (part in self._coming and self._coming[part].done())

    @contextmanager
    def probed(self, layer_idx: int, attention: nn.Module) -> Iterator[None]:
        """Give an attention random weights: how it rotates keys does not depend on which."""
        prefix = f"{name_of(self.model, attention)}."
        names = [name for name in self.tensors_of(layer_idx) if name.startswith(prefix)]
        self._materialise(names, RandomWeights(quick=True))
        try:
            yield
        finally:
            self._drop(names)

    def _begin(self, part: Part) -> None:
        if part not in self._coming:
            self._coming[part] = self._pool.submit(self._read, part)

    def _read(self, part: Part) -> None:
        with torch.no_grad():
            self._materialise(self._parts[part], self.reader)

    def _materialise(self, names: list[str], reader: Reader) -> None:
        # Its own stream, so that copies do not queue behind the work on the layer before.
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            reader.read(self.model, names, self.device)
            for name in names:
                module, leaf = owner_of(self.model, name)
                tensor: Tensor = getattr(module, leaf)
                if tensor.device.type == "meta":
                    raise ModelError(f"the weights are incomplete: tensor {name} is missing")
                if tensor.device != self.device:
                    place_tensor(module, leaf, tensor.to(self.device))
        if self._stream is not None:
            self._stream.synchronize()

    def _drop(self, names: list[str]) -> None:
        if self._stream is not None:
            # The memory goes back to the stream that reads ahead: kernels must be done with it.
            torch.cuda.current_stream(self.device).synchronize()
        for name in names:
            module, leaf = owner_of(self.model, name)
            place_tensor(module, leaf, self._absent[name])


def find_decoder(model: PreTrainedModel) -> nn.Module:
    """Return a model's stack of decoder layers, embedding and final norm."""
    decoder = model.get_decoder()
    # The model itself is what transformers returns where it finds none.
    return getattr(model, "model", model) if decoder is model else decoder


def place_tensor(module: nn.Module, leaf: str, tensor: Tensor) -> None:
    """Set a module's parameter or buffer to a tensor, without a copy."""
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
    elif isinstance(tensor, nn.Parameter):
        module._parameters[leaf] = tensor
    else:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


def _parts(model: PreTrainedModel, decoder: nn.Module, names: list[str]) -> dict[Part, list[str]]:
    """Return the names of each part's tensors; those outside the text decoder belong to none."""
    stem = name_of(model, decoder)
    stem = f"{stem}." if stem else ""
    layers: Any = decoder.layers
    parts: dict[Part, list[str]] = {"input": [], **{index: [] for index in range(len(layers))}, "output": []}
    head = model.get_output_embeddings()
    head_stem = None if head is None else f"{name_of(model, head)}."
    for name in names:
        if name.startswith(f"{stem}layers."):
            parts[int(name.removeprefix(f"{stem}layers.").split(".", 1)[0])].append(name)
        elif name.startswith(f"{stem}norm.") or (head_stem is not None and name.startswith(head_stem)):
            parts["output"].append(name)
        elif name.startswith(stem):
            parts["input"].append(name)
    return parts


def _seed(name: str) -> int:
    """Return a seed that follows from a name, on every machine."""
    seed = 0
    for byte in name.encode():
        seed = (seed * 257 + byte) % (1 << 61)
    return seed
