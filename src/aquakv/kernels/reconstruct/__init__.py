"""Keys and values from the records of pages, and coefficients from the codes of grids."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from aquakv.codec import EncodedVectors, GridQuantizer, TensorCodec
from aquakv.errors import ShapeError
from aquakv.kernels.backend import Backend, resolve_backend
from aquakv.kernels.codes import check_tensor
from aquakv.kernels.launch import on_device_of
from aquakv.kernels.pages import PAGE_TOKENS
from aquakv.kernels.reconstruct import reference
from aquakv.kernels.reconstruct.operands import DTYPES, FieldTables, ReconstructOperands

__all__ = [
    "FieldTables",
    "ReconstructOperands",
    "Reconstructed",
    "grid_coefficients",
    "reconstruct",
    "reconstruct_grid",
]


class Reconstructed(NamedTuple):
    """What pages stand for.

    Attributes
    ----------
    keys, values
        ``[tokens, kv_heads * head_dim]`` in the operands' dtype; keys before rotary embedding.
    """

    keys: Tensor
    values: Tensor


def reconstruct(
    key_pages: Tensor,
    value_pages: Tensor,
    latents: Tensor | None,
    operands: ReconstructOperands,
    *,
    centred: bool = False,
    backend: Backend = "auto",
) -> Reconstructed:
    """Reconstruct all tokens of pages; tokens whose scale code is 255 are not-a-number.

    Scaled levels are float32 arithmetic rounded to the operands' dtype; products are summed in float32.

    Parameters
    ----------
    key_pages, value_pages
        ``[pages, record_bytes]`` uint8, as from `aquakv.kernels.encode.encode`.
    latents
        ``[pages * 64, latent_width]`` float16 or float32, from the layer before; None at the first layer.
    operands
        The layer's operands.
    centred
        Leave the calibration means off.
    backend
        ``auto`` is Triton on a GPU and the plain-torch definition elsewhere.

    Raises
    ------
    ShapeError
        A tensor does not fit the operands.
    ConfigError
        The backend cannot run here, or Triton does not take the operands.
    """
    chosen = resolve_backend(backend, key_pages)
    pages = key_pages.shape[0]
    for name, records, tables in (("key", key_pages, operands.keys), ("value", value_pages, operands.values)):
        check_tensor(
            f"reconstruct: {name}_pages", records, (pages, tables.layout.record_bytes), (torch.uint8,)
        )
    width = operands.latent_width
    if (latents is None) != (width == 0):
        raise ShapeError(f"reconstruct: expected {'some' if width else 'no'} latents at this layer")
    if latents is not None:
        wanted = (torch.float16, torch.float32)
        check_tensor("reconstruct: latents", latents, (pages * PAGE_TOKENS, width), wanted)
    if chosen == "torch":
        return Reconstructed(*reference.reconstruct(key_pages, value_pages, latents, operands, centred))
    operands.require_triton()
    from aquakv.kernels.reconstruct import triton

    with on_device_of(key_pages):
        return Reconstructed(*triton.reconstruct(key_pages, value_pages, latents, operands, centred))


def grid_coefficients(
    codes: EncodedVectors, quantizer: GridQuantizer, dtype: torch.dtype, *, backend: Backend = "auto"
) -> Tensor:
    """Return the coefficients, ``[tokens, features]`` in ``dtype``, that codes of a grid stand for.

    One kernel unpacks, looks up and scales; the definition is `GridQuantizer.dequantize`, bit for bit.

    Parameters
    ----------
    codes
        ``words`` ``[tokens, words_per_token]`` int32 and ``scales`` ``[tokens, groups]`` float16.
    quantizer
        Their quantiser, on the same device.
    dtype
        float16, bfloat16 or float32.
    backend
        ``auto`` is Triton on a GPU.

    Raises
    ------
    ShapeError
        The codes are not this quantiser's, or Triton is to compute another dtype.
    ConfigError
        The backend cannot run here.
    """
    chosen = resolve_backend(backend, codes.words)
    tokens = codes.words.shape[0]
    for name, tensor, width, kind in (
        ("words", codes.words, quantizer.words_per_token, torch.int32),
        ("scales", codes.scales, quantizer.groups, torch.float16),
    ):
        check_tensor(f"grid coefficients: {name}", tensor, (tokens, width), (kind,))
    if chosen == "torch":
        return quantizer.dequantize(codes, dtype)
    if dtype not in DTYPES:
        raise ShapeError(f"grid coefficients: expected float16, bfloat16 or float32, got {dtype}")
    from aquakv.kernels.reconstruct import triton

    with on_device_of(codes.words):
        return triton.grid_coefficients(codes.words, codes.scales, quantizer, dtype)


def reconstruct_grid(
    codec: TensorCodec,
    codes: EncodedVectors,
    inputs: tuple[Tensor, ...],
    dtype: torch.dtype,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Do what `TensorCodec.reconstruct` does for a codec with grids, with `grid_coefficients`.

    The inverse group transform and the prediction stay matrix products.
    """
    if not isinstance(codec.quantizer, GridQuantizer):
        raise ShapeError(
            f"reconstruct grid: expected a codec with grids, got {type(codec.quantizer).__name__}"
        )
    coefficients = grid_coefficients(codes, codec.quantizer, dtype, backend=backend)
    return codec.transform.inverse_add(coefficients, codec.predict(coefficients, inputs))
