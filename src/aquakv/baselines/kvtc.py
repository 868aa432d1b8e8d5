"""KVTC: principal components over layers and heads, bits by dynamic programming, DEFLATE."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar, Self

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from aquakv.baselines.base import Baseline
from aquakv.baselines.encoded import TensorCoder
from aquakv.baselines.kvtc_plan import Group, plan
from aquakv.baselines.uniform import dequantize, quantize
from aquakv.calibration.observe import Observer, Waiting
from aquakv.config import WindowConfig
from aquakv.errors import ConfigError, DataError
from aquakv.models.adapter import ModelAdapter, adapt
from aquakv.numerics.packing import pack, packed_words, unpack

#: Tokens of calibration text on which groups' errors are measured.
SAMPLE = 512


@dataclass(frozen=True)
class CodedBlock:
    """A block of tokens of one sequence, keys or values of all layers.

    Attributes
    ----------
    payload
        ``[bytes]`` uint8: the packed codes, deflated.
    scales
        ``[tokens, groups, 2]`` float16: steps and zero points.
    """

    payload: Tensor
    scales: Tensor


@dataclass(frozen=True)
class Transform:
    """Principal components of the keys, or values, of all layers and heads.

    Attributes
    ----------
    mean
        ``[features]`` float32, features those of all layers one behind the other.
    basis
        ``[features, components]`` float32, orthonormal, by falling variance.
    groups
        Which components are stored, and how.
    """

    mean: Tensor
    basis: Tensor
    groups: tuple[Group, ...]

    def encode(self, vectors: Tensor) -> CodedBlock:
        """Encode ``[tokens, features]`` float32."""
        tokens, device = len(vectors), vectors.device
        stop = self.groups[-1].stop if self.groups else 0
        components = (vectors - self.mean) @ self.basis[:, :stop]
        packed, scales = [], []
        for group in self.groups:
            codes, steps, zeros = quantize(components[:, group.start : group.stop], group.width)
            # Component by component: what follows each other is alike, for DEFLATE to find.
            packed.append(pack(codes.T.reshape(-1), group.width))
            scales.append(torch.cat([steps, zeros], 1))
        raw = torch.cat(packed).cpu().numpy().tobytes() if packed else b""
        payload = torch.frombuffer(bytearray(zlib.compress(raw, 9)), dtype=torch.uint8)
        held = torch.stack(scales, 1) if scales else vectors.new_zeros(tokens, 0, 2, dtype=torch.float16)
        return CodedBlock(payload.to(device), held)

    def decode(self, block: CodedBlock) -> Tensor:
        """Return ``[tokens, features]`` float32."""
        tokens, device = len(block.scales), block.scales.device
        raw = bytearray(zlib.decompress(block.payload.cpu().numpy().tobytes()))
        words = torch.frombuffer(raw, dtype=torch.int32).to(device) if raw else None
        stop = self.groups[-1].stop if self.groups else 0
        components = torch.zeros(tokens, stop, device=device)
        start = 0
        for index, group in enumerate(self.groups):
            assert words is not None  # there are groups
            count = tokens * (group.stop - group.start)
            end = start + packed_words(count, group.width)
            codes = unpack(words[start:end], group.width, count).view(-1, tokens).T
            steps, zeros = (block.scales[:, index, which, None] for which in (0, 1))
            components[:, group.start : group.stop] = dequantize(codes, steps, zeros)
            start = end
        return components @ self.basis[:, :stop].T + self.mean

    def to(self, device: torch.device) -> Transform:
        """Return the transform on another device."""
        return Transform(self.mean.to(device), self.basis.to(device), self.groups)


@dataclass(frozen=True)
class Components:
    """Principal components as fitted, without a choice of bits.

    Attributes
    ----------
    mean, basis
        As in `Transform`.
    sample
        ``[tokens, components]`` float32 of calibration text.
    """

    mean: Tensor
    basis: Tensor
    sample: Tensor

    @classmethod
    def fit(cls, vectors: Tensor) -> Components:
        """Fit to ``[tokens, features]``, any floating dtype, which is overwritten where it is float32."""
        vectors = vectors.float()
        mean = vectors.mean(0)
        vectors -= mean
        count, features = vectors.shape
        if count > features:
            _, basis = torch.linalg.eigh(vectors.T @ vectors)
            basis = basis.flip(1)
        else:
            _, _, rows = torch.linalg.svd(vectors, full_matrices=False)
            basis = rows.T
        chosen = vectors[:: max(1, count // SAMPLE)][:SAMPLE]
        return cls(mean, basis.contiguous(), chosen @ basis)

    def transform(self, bits: float) -> Transform:
        """Return the transform with so many bits per feature."""
        return Transform(self.mean, self.basis, plan(self.sample, bits, len(self.mean)))


@dataclass(frozen=True)
class Kvtc(Baseline):
    """KVTC-like transform coding (arXiv:2511.01815).

    Keys before rotary embedding, and values, of a token at all layers and heads are one vector each. It is
    projected on principal components of calibration text; groups of 16, 64 or 256 components have a width of
    0, 1, 2, 4 or 8 bits, chosen by dynamic programming on errors measured; tokens have a step and a zero
    point in float16 for each group; codes are packed and deflated block by block. The first 4 tokens and at
    least 128 of the newest stay exact, as there.

    `bits` is what codes, steps and zero points take before DEFLATE; measured bits are less. Ours deviates in
    that blocks of 128 tokens are compressed as they leave the window, where the paper compresses whole
    prompts between turns, in that zlib stands for its GPU library, in that float8 is not among the types, and
    in that all components are fitted where the paper stops at a rank. A token's layers are coded together, so
    one forward pass over whole sequences cannot tell what streaming gives.
    """

    bits: float = 2
    fitted: tuple[Components, Components] | None = field(default=None, compare=False, repr=False)

    name: ClassVar[str] = "kvtc"
    source: ClassVar[str] = "arXiv:2511.01815"
    pre_rope: ClassVar[bool] = True
    at_once: ClassVar[bool] = False
    needs_fit: ClassVar[bool] = True
    single_pass: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.bits <= 8:
            raise ConfigError(f"baseline kvtc: expected bits above 0 and up to 8, got {self.bits:g}")

    @property
    def own_windows(self) -> tuple[WindowConfig, WindowConfig]:
        """The paper's sinks and window."""
        return WindowConfig(4, 128, 128), WindowConfig(4, 128, 128)

    @cached_property
    def transforms(self) -> tuple[Transform, Transform]:
        """Of keys and of values.

        Raises
        ------
        ConfigError
            The method was not fitted.
        """
        if self.fitted is None:
            raise ConfigError("baseline kvtc: expected a fitted method; call fit(model, tokens) first")
        keys, values = (part.transform(self.bits) for part in self.fitted)
        return keys, values

    @cached_property
    def _moved(self) -> dict[torch.device, tuple[Transform, Transform]]:
        return {}

    def transforms_on(self, device: torch.device) -> tuple[Transform, Transform]:
        """Return `transforms` on a device, where all caches share them."""
        if device not in self._moved:
            keys, values = self.transforms
            self._moved[device] = keys.to(device), values.to(device)
        return self._moved[device]

    @property
    def table_bytes(self) -> int:
        """Bytes of the means and of the components that are stored."""
        stored = [(part, part.groups[-1].stop if part.groups else 0) for part in self.transforms]
        return sum(4 * len(part.mean) * (1 + stop) for part, stop in stored)

    def fit(self, model: PreTrainedModel, tokens: Tensor) -> Self:
        """Fit principal components; other `bits` can be set afterwards, without fitting anew.

        Holds keys and values of all tokens at all layers, and a square matrix of all layers' features.

        Raises
        ------
        DataError
            The sequences have no tokens behind their sinks.
        """
        sinks = self.own_windows[0].sink_tokens
        if tokens.shape[1] <= sinks:
            raise DataError(
                f"baseline kvtc: expected sequences of more than {sinks} tokens, got {tokens.shape[1]}"
            )
        with torch.no_grad():
            observer = Observer(adapt(model), 4, Waiting.on("cpu"), lambda: None, weights=False)
            seen = list(observer.walk(tokens))

            def fitted(kind: str) -> Components:
                layers = []
                for one in seen:
                    layers.append(torch.cat([batch[:, sinks:].flatten(0, 1) for batch in getattr(one, kind)]))
                    setattr(one, kind, [])
                return Components.fit(torch.cat(layers, 1))

            return replace(self, fitted=(fitted("keys"), fitted("values")))

    def coders(self, adapter: ModelAdapter, order: int) -> tuple[TensorCoder, TensorCoder] | None:
        """Return None: all layers are encoded together."""
        return None

    def cache(self, model: PreTrainedModel) -> Cache:
        """Return an empty cache for a model."""
        from aquakv.baselines.kvtc_cache import KvtcCache

        return KvtcCache(model, self)
