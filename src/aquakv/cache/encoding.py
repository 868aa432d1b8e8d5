"""Encode the blocks of a pass with `aquakv.kernels.encode`, straight into records of pages."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from aquakv.cache.paged import why_not_paged
from aquakv.codec import EncodedPages, EncodedTokens, ModelCodec
from aquakv.errors import ConfigError
from aquakv.kernels.backend import Backend, resolve_backend
from aquakv.kernels.encode import EncodeOperands, encode
from aquakv.kernels.from_codec import encode_operands
from aquakv.kernels.operands import HEAD_DIMS
from aquakv.kernels.pages import attended_bytes, write_attended

_log = logging.getLogger(__name__)


class PageEncoder:
    """Encodes the blocks that fall due in one pass, layer by layer.

    It carries latents from layer to layer, as those do who attend to the codes, in the same dtype and with
    the same matrices; no reconstruction is made.

    Parameters
    ----------
    codec
        Of the whole model; `PageEncoder.of` has found it to be one that kernels can encode for.
    backend
        ``auto``, ``torch`` or ``triton``.
    dtype
        Of the operands.
    """

    def __init__(self, codec: ModelCodec, backend: Backend, dtype: torch.dtype) -> None:
        self._codec = codec
        self._backend: Backend = backend
        self._dtype = dtype
        self._latents: Tensor | None = None

    @classmethod
    def of(
        cls,
        codec: ModelCodec,
        block_tokens: int,
        backend: Backend,
        key_states: Tensor,
        devices: Callable[[], Sequence[torch.device]] | None = None,
    ) -> PageEncoder | None:
        """Return an encoder for a pass whose keys are like these, or None where the codec encodes by itself.

        That is on a CPU, unless ``backend`` asks for the kernels' definitions; where codes are not kept in
        pages; for heads that the kernels do not take; and with a guard in another norm than its transform's.
        ``devices`` tells where each compressed layer computes, all of a kind; by default all where these
        keys are.
        """
        backend = "triton" if backend == "hopper" else backend  # which has no encoder of its own
        if codec.fingerprint.head_dim not in HEAD_DIMS or why_not_paged(codec, block_tokens) is not None:
            return None
        chosen = resolve_backend(backend, key_states)
        if backend == "auto" and chosen != "triton":
            return None
        dtype = torch.float32 if chosen == "torch" else torch.float16
        device = key_states.device
        if not codec.derived(
            ("encodes with kernels", device, dtype),
            lambda: _can_fold(codec, devices() if devices else [device] * len(codec.layers), dtype),
        ):
            return None
        return cls(codec, backend, dtype)

    def encode(self, index: int, keys: Tensor, values: Tensor) -> tuple[EncodedTokens, Tensor | None]:
        """Encode one layer's tokens; layers come in order.

        Parameters
        ----------
        index
            Which of the compressed layers.
        keys, values
            ``[tokens, num_kv_heads * head_dim]`` in any floating dtype, whole pages of 64 tokens, keys before
            rotary embedding.

        Returns
        -------
        codes, excess
            Records in which all tokens are attended to; by how much each exceeds the tolerated error,
            ``[tokens]`` float32, or None without a guard (see `LayerCodec.excess`).
        """
        latents = None if self._latents is None else self._latents.to(keys.device)
        operands = _operands_on(self._codec, index, keys.device, self._dtype)
        found = encode(keys, values, latents, operands, backend=self._backend)
        self._latents = found.next_latents
        return EncodedTokens(EncodedPages(found.key_pages), EncodedPages(found.value_pages)), found.excess

    @staticmethod
    def take_out(codes: EncodedTokens, taken: Tensor) -> None:
        """Let attention to codes from `encode` pass over the tokens of ``taken``, ``[tokens]`` bool."""
        kept = attended_bytes(~taken)
        for kind in codes:
            assert isinstance(kind, EncodedPages)
            write_attended([kind.records], [kept])


def _operands_on(codec: ModelCodec, index: int, device: torch.device, dtype: torch.dtype) -> EncodeOperands:
    """Return what the kernels multiply with at compressed layer ``index``, kept by the codec."""

    def make() -> EncodeOperands:
        following = codec.layer_on(index + 1, device) if index + 1 < len(codec.layers) else None
        heads = codec.fingerprint.num_kv_heads
        return encode_operands(codec.layer_on(index, device), following, num_kv_heads=heads, dtype=dtype)

    return codec.derived(("encode operands", index, device, dtype), make)


def _can_fold(codec: ModelCodec, devices: Sequence[torch.device], dtype: torch.dtype) -> bool:
    """Tell whether there are operands for every layer: all are made, each on its layer's device."""
    try:
        for index, device in enumerate(devices):
            _operands_on(codec, index, device, dtype)
    except ConfigError as error:
        _log.info("kernels do not encode for this codec: %s", error)
        return False
    return True
