"""One layer's codec: the method in one screen.

All vectors here are *centred*: the layer's calibration mean is taken off before anything else and put back
last. Large constant offsets of some key channels then never meet a narrow dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from aquakv.codec.predictor import AffinePredictor
from aquakv.codec.quantizer import EncodedVectors, GridQuantizer
from aquakv.codec.transform import GroupTransform
from aquakv.config import ValueInput
from aquakv.errors import ShapeError

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


class EncodedTokens(NamedTuple):
    """Codes of a block of tokens at one layer."""

    keys: EncodedVectors
    values: EncodedVectors


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
        Second and fourth stage; the third, allocation, chose the quantiser's width.
    """

    mean: Tensor
    predictor: AffinePredictor | None
    transform: GroupTransform
    quantizer: GridQuantizer

    def encode(self, centred: Tensor, inputs: tuple[Tensor, ...]) -> tuple[EncodedVectors, Tensor]:
        """Encode centred vectors ``[tokens, features]`` float32; return the codes and the reconstruction."""
        prediction = self.predict(centred, inputs)
        return self.encode_residual(centred - prediction, prediction)

    def encode_residual(self, residual: Tensor, prediction: Tensor) -> tuple[EncodedVectors, Tensor]:
        """Encode what is left of vectors once their ``prediction`` is taken off; return as `encode` does."""
        encoded, dequantized = self.quantizer.quantize(self.transform.forward(residual))
        return encoded, self.transform.inverse_add(dequantized, prediction)

    def reconstruct(self, encoded: EncodedVectors, inputs: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """Return the centred vectors ``[tokens, features]`` that codes stand for, computed in ``dtype``."""
        coefficients = self.quantizer.dequantize(encoded, dtype)
        return self.transform.inverse_add(coefficients, self.predict(coefficients, inputs))

    def predict(self, like: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        """Return the prediction of centred vectors, shaped like ``like``; zero without a predictor."""
        return torch.zeros_like(like) if self.predictor is None else self.predictor.predict(inputs)

    def to(self, device: torch.device | str) -> TensorCodec:
        """Return the codec on another device."""
        predictor = None if self.predictor is None else self.predictor.to(device)
        return TensorCodec(
            self.mean.to(device), predictor, self.transform.to(device), self.quantizer.to(device)
        )


@dataclass(frozen=True)
class LayerCodec:
    """Encode and reconstruct one layer's tokens (arXiv:2501.19392 §3).

    Attributes
    ----------
    keys, values
        The codecs of the two tensors.
    value_inputs
        What the value predictor reads, in this order.
    """

    keys: TensorCodec
    values: TensorCodec
    value_inputs: tuple[ValueInput, ...]

    @property
    def features(self) -> int:
        """``num_kv_heads * head_dim``."""
        return self.keys.mean.shape[0]

    @property
    def bytes_per_token(self) -> int:
        """Bytes stored for one token at this layer."""
        return self.keys.quantizer.bytes_per_token + self.values.quantizer.bytes_per_token

    def encode(
        self, keys: Tensor, values: Tensor, previous: Reconstruction | None
    ) -> tuple[EncodedTokens, Reconstruction]:
        """Encode a block of tokens, each independently of the others.

        Parameters
        ----------
        keys, values
            ``[tokens, num_kv_heads * head_dim]``, any float dtype; keys before rotary embedding.
        previous
            This method's reconstruction of the same tokens at the layer before; None at the first layer.

        Returns
        -------
        encoded, reconstruction
            The codes, and the float32 reconstruction that the next layer's `encode` needs.
        """
        for name, tensor in (("keys", keys), ("values", values)):
            if tensor.ndim != 2 or tensor.shape[1] != self.features:
                raise ShapeError(f"{name}: expected [tokens, {self.features}], got {list(tensor.shape)}")
        tokens = keys.shape[0]
        keys, values = pad_rows(keys.float()), pad_rows(values.float())
        if previous is not None:
            previous = Reconstruction(pad_rows(previous.keys.float()), pad_rows(previous.values.float()))
        key_codes, key_hat = self.keys.encode(keys - self.keys.mean, self.key_sources(previous))
        value_codes, value_hat = self.values.encode(
            values - self.values.mean, self.value_sources(key_hat, previous)
        )
        encoded = EncodedTokens(
            EncodedVectors(*(part[:tokens] for part in key_codes)),
            EncodedVectors(*(part[:tokens] for part in value_codes)),
        )
        return encoded, Reconstruction(key_hat[:tokens], value_hat[:tokens])

    def reconstruct(
        self, encoded: EncodedTokens, previous: Reconstruction | None, dtype: torch.dtype = torch.float32
    ) -> Reconstruction:
        """Reconstruct a block of tokens, centred, computing in ``dtype``.

        ``previous`` is the layer before's reconstruction of the same tokens, in ``dtype``.
        """
        key_hat = self.keys.reconstruct(encoded.keys, self.key_sources(previous), dtype)
        value_hat = self.values.reconstruct(encoded.values, self.value_sources(key_hat, previous), dtype)
        return Reconstruction(key_hat, value_hat)

    def key_sources(self, previous: Reconstruction | None) -> tuple[Tensor, ...]:
        """Return what the key predictor reads."""
        return () if previous is None else (previous.keys,)

    def value_sources(self, key_hat: Tensor, previous: Reconstruction | None) -> tuple[Tensor, ...]:
        """Return what the value predictor reads, in the order of ``value_inputs``."""
        available = {"keys": key_hat}
        if previous is not None:
            available["previous_values"] = previous.values
        return tuple(available[name] for name in self.value_inputs if name in available)

    def to(self, device: torch.device | str) -> LayerCodec:
        """Return the codec on another device."""
        return LayerCodec(self.keys.to(device), self.values.to(device), self.value_inputs)


def pad_rows(rows: Tensor) -> Tensor:
    """Return ``rows`` with zero rows appended up to a multiple of `ROW_QUANTUM`."""
    missing = -rows.shape[0] % ROW_QUANTUM
    return rows if missing == 0 else torch.nn.functional.pad(rows, (0, 0, 0, missing))
