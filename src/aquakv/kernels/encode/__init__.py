"""Encode a layer's tokens straight into the records of their pages."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from aquakv.errors import ShapeError
from aquakv.kernels.backend import Backend, resolve_backend
from aquakv.kernels.encode import reference
from aquakv.kernels.encode.columns import CodeColumns
from aquakv.kernels.encode.operands import EncodeOperands, Guard
from aquakv.kernels.launch import on_device_of
from aquakv.kernels.pages import PAGE_TOKENS

__all__ = ["CodeColumns", "EncodeOperands", "EncodedPages", "Guard", "encode"]


class EncodedPages(NamedTuple):
    """A block of tokens in pages, and what encoding them has shown.

    Attributes
    ----------
    key_pages, value_pages
        ``[tokens / 64, record_bytes]`` uint8: records (`aquakv.kernels.pages`) whose tokens are all attended
        to as codes; `aquakv.kernels.pages.clear_attended` takes outliers out.
    next_latents
        ``[tokens, next_width]`` in the operands' dtype; None at the last layer.
    excess
        ``[tokens]`` float32: the larger of the squared errors of keys and values, over the guard's limits:
        above 1 for outliers. Not-a-number where a coefficient is not finite. None without a guard.
    """

    key_pages: Tensor
    value_pages: Tensor
    next_latents: Tensor | None
    excess: Tensor | None


def encode(
    keys: Tensor,
    values: Tensor,
    latents: Tensor | None,
    operands: EncodeOperands,
    *,
    backend: Backend = "auto",
) -> EncodedPages:
    """Encode tokens, each independently of the others.

    Codes are the nearest levels of coefficients that products in the operands' dtype, summed in float32,
    give: with float32 operands those of `aquakv.codec.LayerCodec.encode` except where a coefficient lies
    within rounding of the middle between two levels. A token with a coefficient that is not finite gets scale
    code 255, and with its keys its values that are predicted from them. Where nothing is coded scale codes
    are 128.

    Nothing waits for the device.

    Parameters
    ----------
    keys, values
        ``[tokens, kv_heads * head_dim]`` in any floating dtype, keys before rotary embedding; whole pages of
        64 tokens.
    latents
        ``[tokens, latent_width]`` float16 or float32, from the layer before; None at the first layer. They
        are rounded to the operands' dtype: with float16 operands encoder and decoder carry the same numbers,
        so that no error gathers over the layers.
    operands
        The layer's operands.
    backend
        ``auto`` is Triton on a GPU and the plain-torch definition elsewhere.

    Raises
    ------
    ShapeError
        A tensor does not fit the operands.
    ConfigError
        The backend cannot run here.
    """
    chosen = resolve_backend(backend, keys)
    _check(keys, values, latents, operands)
    if chosen == "torch":
        return EncodedPages(*reference.encode(keys, values, latents, operands))
    from aquakv.kernels.encode import triton

    latents = None if latents is None else latents.contiguous()
    with on_device_of(keys):
        return EncodedPages(*triton.encode(keys.contiguous(), values.contiguous(), latents, operands))


def _check(keys: Tensor, values: Tensor, latents: Tensor | None, operands: EncodeOperands) -> None:
    tokens = keys.shape[0]
    for name, tensor in (("keys", keys), ("values", values)):
        shape = (tokens, operands.features)
        if tuple(tensor.shape) != shape or tokens % PAGE_TOKENS or not tensor.is_floating_point():
            raise ShapeError(
                f"encode: expected floating {name} [multiple of {PAGE_TOKENS}, {operands.features}], got "
                f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            )
    width = operands.latent_width
    if (latents is None) != (width == 0):
        raise ShapeError(f"encode: expected {'some' if width else 'no'} latents at this layer")
    if latents is not None and (
        tuple(latents.shape) != (tokens, width) or latents.dtype not in (torch.float16, torch.float32)
    ):
        raise ShapeError(
            f"encode: expected float16 or float32 latents [{tokens}, {width}], got "
            f"{str(latents.dtype).removeprefix('torch.')} {list(latents.shape)}"
        )
