"""One layer's codec: the method in one screen.

All vectors here are *centred*: the layer's calibration mean is taken off before anything else and put back
last. Large constant offsets of some key channels then never meet a narrow dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from aquakv.codec.encoded import Encoded, EncodedPages, EncodedStreams, EncodedTokens, EncodedVectors
from aquakv.codec.entropy import EntropyQuantizer
from aquakv.codec.guard import OutlierGuard
from aquakv.codec.predictor import AffinePredictor
from aquakv.codec.quantizer import GridQuantizer
from aquakv.codec.scalar import CODE_OF_ONE, ScalarQuantizer
from aquakv.codec.transform import GroupTransform, LinearTransform
from aquakv.config import PredictorConfig
from aquakv.errors import ShapeError
from aquakv.numerics.pages import (
    PAGE_TOKENS,
    PageLayout,
    pack_records,
    record_planes,
    record_scales,
    unpack_pages,
)

#: The encoder works on whole multiples of this many tokens (the rest is padded and cut off), so that matrix
#: products take the same code path, and give the same bits, however the tokens were chunked or batched.
ROW_QUANTUM = 128


class Reconstruction(NamedTuple):
    """What the decoder can reconstruct of one layer, centred.

    Attributes
    ----------
    keys, values
        ``[tokens, num_kv_heads * head_dim]``; keys before rotary embedding.
    """

    keys: Tensor
    values: Tensor

    def to(self, device: torch.device) -> Reconstruction:
        """Return the reconstruction on another device."""
        return Reconstruction(self.keys.to(device), self.values.to(device))


#: Reconstructions of the layers before, the nearest first, as many as predictors read.
History = tuple[Reconstruction, ...]


@dataclass(frozen=True)
class TensorCodec:
    """Predictor, transform and quantiser for the keys or the values of one layer.

    Attributes
    ----------
    mean
        ``[features]`` float32, subtracted before coding.
    predictor
        Map from the available reconstructions, or None to code the centred vector itself.
    transform, quantizer
        Second and fourth stage; the third, allocation, chose the quantiser's widths or step.
    guard
        Tells outliers, or None.
    pages
        How codes lie in pages if they are kept so; None if rows of tokens are kept.
    """

    mean: Tensor
    predictor: AffinePredictor | None
    transform: GroupTransform | LinearTransform
    quantizer: GridQuantizer | ScalarQuantizer | EntropyQuantizer
    guard: OutlierGuard | None = None
    pages: PageLayout | None = None

    def encode(self, centred: Tensor, inputs: tuple[Tensor, ...]) -> tuple[EncodedVectors, Tensor]:
        """Encode centred vectors ``[tokens, features]`` float32; return the codes and the reconstruction."""
        prediction = self.predict(centred, inputs)
        return self.encode_residual(centred - prediction, prediction)

    def encode_residual(self, residual: Tensor, prediction: Tensor) -> tuple[EncodedVectors, Tensor]:
        """Encode what is left of vectors once their ``prediction`` is taken off; return as `encode` does."""
        codes, dequantized = self.quantizer.quantize(self.transform.forward(residual))
        return codes, self.transform.inverse_add(dequantized, prediction)

    def reconstruct(self, codes: EncodedVectors, inputs: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """Return the centred vectors ``[tokens, features]`` that codes stand for, computed in ``dtype``."""
        coefficients = self.quantizer.dequantize(codes, dtype)
        like = coefficients.new_empty(coefficients.shape[0], len(self.mean))
        return self.transform.inverse_add(coefficients, self.predict(like, inputs))

    def predict(self, like: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        """Return the prediction of centred vectors, shaped like ``like``; zero without a predictor."""
        return torch.zeros_like(like) if self.predictor is None else self.predictor.predict(inputs)

    def seal(self, codes: EncodedVectors, block_tokens: int, exact: Tensor | None = None) -> Encoded:
        """Bring codes of whole blocks into the form in which they are kept; see `LayerCodec.seal`."""
        if isinstance(self.quantizer, EntropyQuantizer):
            return self.quantizer.seal(codes, block_tokens)
        if self.pages is None or block_tokens % PAGE_TOKENS:
            return codes
        assert isinstance(self.quantizer, ScalarQuantizer)  # only these are given pages
        attended = torch.ones(len(codes.words), dtype=torch.bool, device=codes.words.device)
        if exact is not None:
            attended[exact.long()] = False
        scales = (
            codes.scales[:, 0]
            if self.quantizer.groups
            else torch.full_like(attended, CODE_OF_ONE, dtype=torch.uint8)
        )
        return EncodedPages(pack_records(self.quantizer.unpack(codes.words), scales, self.pages, attended))

    def kept_bytes_per_token(self, block_tokens: int) -> float:
        """Bytes kept for each token of blocks of ``block_tokens``: see `seal`."""
        if self.pages is None or block_tokens % PAGE_TOKENS:
            return self.quantizer.bytes_per_token
        return self.pages.record_bytes / PAGE_TOKENS

    def unseal(self, encoded: Encoded, block_tokens: int) -> EncodedVectors:
        """Undo `seal`."""
        if isinstance(encoded, EncodedStreams):
            if not isinstance(self.quantizer, EntropyQuantizer):
                raise ShapeError(
                    "codec: got entropy-coded streams, but this layer's codes are rows of tokens"
                )
            return self.quantizer.unseal(encoded, block_tokens)
        if isinstance(encoded, EncodedPages):
            quantizer, planes, scales = self._planes(encoded)
            assert self.pages is not None  # or there were no planes
            return EncodedVectors(quantizer.pack(unpack_pages(planes, self.pages)), scales.contiguous())
        return encoded

    def dequantize(self, encoded: Encoded, dtype: torch.dtype) -> Tensor:
        """Return the coefficients, ``[tokens, n]`` in ``dtype``, of codes as rows or in pages."""
        if isinstance(encoded, EncodedPages):
            quantizer, planes, scales = self._planes(encoded)
            assert self.pages is not None  # or there were no planes
            if self.pages.is_uniform:
                return quantizer.dequantize_planes(planes, scales, self.pages, dtype)
            return quantizer.dequantize_codes(unpack_pages(planes, self.pages), scales, dtype)
        if isinstance(encoded, EncodedStreams):
            raise ShapeError("codec: got entropy-coded streams, expected rows of tokens; unseal them first")
        return self.quantizer.dequantize(encoded, dtype)

    def _planes(self, encoded: EncodedPages) -> tuple[ScalarQuantizer, Tensor, Tensor]:
        """Return the quantiser, byte planes, and scale codes ``[tokens, 1]`` (``[tokens, 0]`` if n is 0)."""
        if self.pages is None or not isinstance(self.quantizer, ScalarQuantizer):
            raise ShapeError("codec: got codes in pages, but this layer's codes are rows of tokens")
        scales = record_scales(encoded.records).reshape(-1, 1)
        return self.quantizer, record_planes(encoded.records, self.pages), scales[:, : self.quantizer.groups]

    def to(self, device: torch.device | str) -> TensorCodec:
        """Return the codec on another device."""
        return TensorCodec(
            self.mean.to(device),
            None if self.predictor is None else self.predictor.to(device),
            self.transform.to(device),
            self.quantizer.to(device),
            None if self.guard is None else self.guard.to(device),
            self.pages,
        )


@dataclass(frozen=True)
class LayerCodec:
    """Encode and reconstruct one layer's tokens (arXiv:2501.19392 §3).

    Attributes
    ----------
    keys, values
        The codecs of the two tensors.
    inputs
        What the predictors read.
    """

    keys: TensorCodec
    values: TensorCodec
    inputs: PredictorConfig

    @property
    def features(self) -> int:
        """``num_kv_heads * head_dim``."""
        return self.keys.mean.shape[0]

    @property
    def bytes_per_token(self) -> float:
        """Bytes of one token's codes and scales; an expectation where codes have no fixed length."""
        return self.keys.quantizer.bytes_per_token + self.values.quantizer.bytes_per_token

    def kept_bytes_per_token(self, block_tokens: int) -> float:
        """Bytes kept for each token of blocks of ``block_tokens``: see `seal`."""
        return sum(part.kept_bytes_per_token(block_tokens) for part in (self.keys, self.values))

    def encode(
        self, keys: Tensor, values: Tensor, history: History = ()
    ) -> tuple[EncodedTokens, Reconstruction]:
        """Encode tokens, each independently of the others.

        Parameters
        ----------
        keys, values
            ``[tokens, num_kv_heads * head_dim]``, any float dtype; keys before rotary embedding.
        history
            This method's reconstructions of the same tokens at the layers before; see `extend`.

        Returns
        -------
        codes, reconstruction
            The codes as rows of tokens (see `seal`), and the float32 reconstruction that the next layers'
            `encode` needs.
        """
        for name, tensor in (("keys", keys), ("values", values)):
            if tensor.ndim != 2 or tensor.shape[1] != self.features:
                raise ShapeError(f"{name}: expected [tokens, {self.features}], got {list(tensor.shape)}")
        tokens = keys.shape[0]
        keys, values = pad_rows(keys.float()), pad_rows(values.float())
        history = tuple(Reconstruction(*(pad_rows(tensor.float()) for tensor in hat)) for hat in history)
        key_codes, key_hat = self.keys.encode(keys - self.keys.mean, self.key_sources(history))
        value_codes, value_hat = self.values.encode(
            values - self.values.mean, self.value_sources(key_hat, history)
        )
        codes = EncodedTokens(key_codes.head(tokens), value_codes.head(tokens))
        return codes, Reconstruction(key_hat[:tokens], value_hat[:tokens])

    def reconstruct(
        self, codes: EncodedTokens, history: History = (), dtype: torch.dtype = torch.float32
    ) -> Reconstruction:
        """Reconstruct tokens from their codes as rows, centred, computing in ``dtype``.

        ``history`` are the layers before's reconstructions of the same tokens, in ``dtype``.
        """
        assert isinstance(codes.keys, EncodedVectors)
        assert isinstance(codes.values, EncodedVectors)
        key_hat = self.keys.reconstruct(codes.keys, self.key_sources(history), dtype)
        value_hat = self.values.reconstruct(codes.values, self.value_sources(key_hat, history), dtype)
        return Reconstruction(key_hat, value_hat)

    def seal(self, codes: EncodedTokens, block_tokens: int, exact: Tensor | None = None) -> EncodedTokens:
        """Bring the codes of whole blocks of tokens into the form in which they are kept.

        A block is decodable by itself. Where kernels can attend to codes, and 64 divides the block, they are
        kept in records of pages; other codes of a fixed rate are kept as they are.

        Parameters
        ----------
        codes
            From `encode`, of a multiple of ``block_tokens`` tokens.
        block_tokens
            Tokens of a block.
        exact
            ``[n]`` any integer dtype: tokens that attention sees otherwise, which only pages tell.
        """
        assert isinstance(codes.keys, EncodedVectors)
        assert isinstance(codes.values, EncodedVectors)
        return EncodedTokens(
            self.keys.seal(codes.keys, block_tokens, exact),
            self.values.seal(codes.values, block_tokens, exact),
        )

    def unseal(self, encoded: EncodedTokens, block_tokens: int) -> EncodedTokens:
        """Undo `seal`."""
        return EncodedTokens(
            self.keys.unseal(encoded.keys, block_tokens), self.values.unseal(encoded.values, block_tokens)
        )

    def excess(self, keys: Tensor, values: Tensor, hat: Reconstruction) -> Tensor | None:
        """Return by how much tokens exceed the tolerated error, ``[tokens]``; None without a guard.

        Parameters
        ----------
        keys, values
            As for `encode`.
        hat
            Their reconstruction.
        """
        if self.keys.guard is None or self.values.guard is None:
            return None
        key_excess = self.keys.guard.excess(pad_rows(keys.float() - self.keys.mean - hat.keys))
        value_excess = self.values.guard.excess(pad_rows(values.float() - self.values.mean - hat.values))
        return torch.maximum(key_excess, value_excess)[: keys.shape[0]]

    def extend(self, history: History, hat: Reconstruction) -> History:
        """Return the history that the next layer reads, once this layer's reconstruction is known."""
        return (hat, *history)[: self.inputs.history]

    def key_sources(self, history: History) -> tuple[Tensor, ...]:
        """Return what the key predictor reads."""
        return tuple(_pick(hat, name) for hat in history for name in self.inputs.key_inputs)

    def value_sources(self, key_hat: Tensor, history: History) -> tuple[Tensor, ...]:
        """Return what the value predictor reads."""
        own = (key_hat,) if "keys" in self.inputs.value_inputs else ()
        names = [name for name in self.inputs.value_inputs if name != "keys"]
        return (*own, *(_pick(hat, name) for hat in history for name in names))

    def to(self, device: torch.device | str) -> LayerCodec:
        """Return the codec on another device."""
        return LayerCodec(self.keys.to(device), self.values.to(device), self.inputs)


def _pick(hat: Reconstruction, name: str) -> Tensor:
    return hat.keys if name == "previous_keys" else hat.values


def pad_rows(rows: Tensor) -> Tensor:
    """Return ``rows`` with zero rows appended up to a multiple of `ROW_QUANTUM`."""
    missing = -rows.shape[0] % ROW_QUANTUM
    return rows if missing == 0 else torch.nn.functional.pad(rows, (0, 0, 0, missing))
