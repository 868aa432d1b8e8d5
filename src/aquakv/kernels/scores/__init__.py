"""Scores of coded keys, and the next layer's latents, without reconstructing keys."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from aquakv.errors import ShapeError
from aquakv.kernels.backend import Backend, resolve_backend
from aquakv.kernels.codes import PagedCodes, check_tensor
from aquakv.kernels.launch import on_device_of, splits_for
from aquakv.kernels.operands import DecodeOperands
from aquakv.kernels.rotary import PageRotary
from aquakv.kernels.scores import reference

__all__ = ["Scores", "check_step", "next_latents", "scores"]


class Scores(NamedTuple):
    """Scores of all tokens, and what the softmax starts from.

    Attributes
    ----------
    scores
        ``[rows, query_heads, tokens]`` float32, scaled and capped; -inf where a token is not attended to or
        lies beyond its row's length.
    maxima
        ``[rows, query_heads, splits]`` float32: their maximum over each split of the tokens.
    """

    scores: Tensor
    maxima: Tensor


def scores(
    query: Tensor,
    codes: PagedCodes,
    latents: Tensor | None,
    operands: DecodeOperands,
    rotary: PageRotary,
    *,
    scaling: float,
    softcap: float | None = None,
    backend: Backend = "auto",
) -> Scores:
    """Score every query head of one new token per row against the coded keys.

    Parameters
    ----------
    query
        ``[rows, query_heads, head_dim]`` in any floating dtype, rotated to the new token's position. Query
        heads of one KV head are neighbours.
    codes
        The layer's codes; only those of the keys are read.
    latents
        ``[rows, tokens, latent_width]`` float16, from the layer before; None at the first layer.
    operands, rotary
        The layer's operands; the rotary tables of the pages.
    scaling, softcap
        Scores are ``scaling * query · key``, then ``softcap * tanh(score / softcap)`` if it is given.
    backend
        ``auto`` is Triton on a GPU.

    Raises
    ------
    ShapeError
        A tensor does not fit the operands.
    ConfigError
        The backend cannot run here.
    """
    chosen = resolve_backend(backend, query)
    check_step(query, codes, latents, operands)
    rows = len(query)
    if chosen == "torch":
        return Scores(*reference.scores(query, codes, latents, operands, rotary, scaling, softcap))
    operands.require_triton()
    from aquakv.kernels.scores import triton

    splits = splits_for(query.device, rows * operands.num_kv_heads, codes.pages, 2)
    with on_device_of(query):
        return Scores(
            *triton.scores(query.contiguous(), codes, latents, operands, rotary, scaling, softcap, splits)
        )


def next_latents(
    codes: PagedCodes, latents: Tensor | None, operands: DecodeOperands, *, backend: Backend = "auto"
) -> Tensor:
    """Return the next layer's latents, ``[rows, tokens, next_width]`` float16 (torch: float32).

    They follow from this layer's latents and key codes alone; what lies beyond a row's length is arbitrary.

    Parameters
    ----------
    codes, latents, operands, backend
        As for `scores`; the operands must have an innovation.

    Raises
    ------
    ShapeError
        A tensor does not fit the operands, or these have no innovation.
    ConfigError
        The backend cannot run here.
    """
    chosen = resolve_backend(backend, codes.key_pages)
    check_carried(codes, latents, operands)
    if chosen == "torch":
        return reference.next_latents(codes, latents, operands)
    from aquakv.kernels.scores import triton

    with on_device_of(codes.key_pages):
        return triton.next_latents(codes, latents, operands)


def check_carried(codes: PagedCodes, latents: Tensor | None, operands: DecodeOperands) -> None:
    """Raise `ShapeError` unless the next layer's latents follow from these."""
    codes.check(operands)
    _check_latents(latents, codes, operands)
    if not operands.next_width:
        raise ShapeError("next latents: expected operands with an innovation, got none (the last layer?)")


def check_step(query: Tensor, codes: PagedCodes, latents: Tensor | None, operands: DecodeOperands) -> None:
    """Raise `ShapeError` unless a step's tensors fit a layer's operands."""
    codes.check(operands)
    _check_latents(latents, codes, operands)
    rows, query_heads, dim = query.shape
    if rows != codes.rows or dim != operands.head_dim or query_heads % operands.num_kv_heads:
        raise ShapeError(
            f"scores: expected query [{codes.rows}, multiple of {operands.num_kv_heads}, "
            f"{operands.head_dim}], got {list(query.shape)}"
        )


def _check_latents(latents: Tensor | None, codes: PagedCodes, operands: DecodeOperands) -> None:
    width = operands.latent_width
    if (latents is None) != (width == 0):
        raise ShapeError(f"latents: expected {'some' if width else 'none'} at this layer")
    if latents is not None:
        check_tensor("latents", latents, (codes.rows, codes.capacity, width), (torch.float16, torch.float32))
