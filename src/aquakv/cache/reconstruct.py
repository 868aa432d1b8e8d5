"""A layer's keys and values out of its codes: by `aquakv.kernels.reconstruct`, or else by the codec."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aquakv.codec import (
    EncodedPages,
    EncodedTokens,
    EncodedVectors,
    GridQuantizer,
    History,
    LayerCodec,
    ModelCodec,
    Reconstruction,
)
from aquakv.kernels.backend import Backend, resolve_backend
from aquakv.kernels.from_codec import reconstruct_operands
from aquakv.kernels.operands import HEAD_DIMS, MAX_RANK
from aquakv.kernels.reconstruct import ReconstructOperands, reconstruct, reconstruct_grid
from aquakv.kernels.reconstruct.operands import DTYPES


@dataclass(frozen=True)
class Reconstructor:
    """Reconstructs layers of a cache, on whatever devices they are.

    Kernels apply to codes in pages and to grids, in float16, bfloat16 and float32. With ``auto`` they do the
    work on a GPU with Triton, with ``torch`` their definitions do it anywhere, and ``triton`` insists. There
    are none of Hopper's own: ``hopper`` is as ``auto``. Where they do not apply, the codec does the work.

    Attributes
    ----------
    codec
        The model's.
    backend
        The cache's.
    """

    codec: ModelCodec
    backend: Backend

    def reconstruct(
        self, index: int, encoded: EncodedTokens, block_tokens: int, history: History, like: Tensor
    ) -> Reconstruction:
        """Return what a layer's codes stand for, centred, as `LayerCodec.reconstruct` does up to rounding.

        Beside the result, ``[tokens, features]`` twice, kernels take scratch for the latents and scaled
        levels of all tokens, in pages ``[tokens, len(operands.value_synthesis)]`` and for grids ``[tokens,
        features]``. The codec takes more: the codes as rows and as bytes, the levels, and coefficients.
        Operands of codes in pages are kept with the codec, about as large as its own matrices.

        Parameters
        ----------
        index
            Of the compressed layer.
        encoded
            Its codes, as they are kept, in blocks of ``block_tokens``.
        history
            Reconstructions of the same tokens at the layers before, in the dtype of ``like``.
        like
            Any tensor of the dtype to compute in, on the layer's device.

        Raises
        ------
        ConfigError
            The backend cannot run there.
        """
        codec = self.codec.layer_on(index, like.device)
        backend = self._kernels(encoded, like)
        if backend is None:
            return codec.reconstruct(codec.unseal(encoded, block_tokens), history, like.dtype)
        keys, values = encoded
        if isinstance(keys, EncodedPages):
            assert isinstance(values, EncodedPages)  # keys and values are kept in one form
            operands = self._operands(index, like)
            latents = _latents(codec, operands, history)
            found = reconstruct(
                keys.records, values.records, latents, operands, centred=True, backend=backend
            )
            return Reconstruction(*found)
        assert isinstance(keys, EncodedVectors)  # see `_kernels`
        assert isinstance(values, EncodedVectors)
        key_hat = reconstruct_grid(codec.keys, keys, codec.key_sources(history), like.dtype, backend=backend)
        sources = codec.value_sources(key_hat, history)
        return Reconstruction(
            key_hat, reconstruct_grid(codec.values, values, sources, like.dtype, backend=backend)
        )

    def _kernels(self, encoded: EncodedTokens, like: Tensor) -> Backend | None:
        """Return the backend that reconstructs codes, or None if the codec does."""
        if like.dtype not in DTYPES:
            return None
        paged = isinstance(encoded.keys, EncodedPages)
        if paged:
            ranks = [part.keys.predictor.rank or 0 for part in self.codec.layers if part.keys.predictor]
            if max(ranks, default=0) > MAX_RANK:
                return None
        elif not all(
            isinstance(part.quantizer, GridQuantizer)
            for part in (self.codec.layers[0].keys, self.codec.layers[0].values)
        ):
            return None
        if self.backend not in ("auto", "hopper"):
            return resolve_backend(self.backend, like)
        chosen = resolve_backend("auto", like)
        fits = not paged or self.codec.fingerprint.head_dim in HEAD_DIMS
        return chosen if chosen == "triton" and fits else None

    def _operands(self, index: int, like: Tensor) -> ReconstructOperands:
        def make() -> ReconstructOperands:
            return reconstruct_operands(
                self.codec.layer_on(index, like.device),
                num_kv_heads=self.codec.fingerprint.num_kv_heads,
                dtype=like.dtype,
            )

        return self.codec.derived(("reconstruct operands", index, like.device, like.dtype), make)


def _latents(codec: LayerCodec, operands: ReconstructOperands, history: History) -> Tensor | None:
    """Return the latents that the key predictor reads, as wide as the operands want them."""
    if codec.keys.predictor is None:
        return None
    latents = codec.keys.predictor.latent(codec.key_sources(history))
    if latents.dtype == torch.bfloat16:
        latents = latents.float()  # what kernels take; they round to the operands' dtype again
    return torch.nn.functional.pad(latents, (0, operands.latent_width - latents.shape[1]))
