"""Attention of one decode step at one layer, from codes alone."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from aquakv.errors import ConfigError
from aquakv.kernels import hopper
from aquakv.kernels.backend import Backend, resolve_backend
from aquakv.kernels.codes import PagedCodes
from aquakv.kernels.combine import combine
from aquakv.kernels.operands import DecodeOperands
from aquakv.kernels.rotary import PageRotary
from aquakv.kernels.scores import check_carried, check_step, next_latents, scores
from aquakv.kernels.weighted_code_sum import weighted_code_sum

__all__ = ["CodedAttention", "DecodeOperands", "PageRotary", "PagedCodes", "attend_codes", "carry_latents"]


class CodedAttention(NamedTuple):
    """What a layer's coded tokens contribute.

    Attributes
    ----------
    out
        ``[rows, query_heads, head_dim]`` float32: attention over the coded tokens alone.
    lse
        ``[rows, query_heads]`` float32: logarithm of the sum of the exponentials of their scores.
    next_latents
        ``[rows, tokens, next_width]`` float16 for the layer after; None at the last layer and where they
        were not asked for.
    """

    out: Tensor
    lse: Tensor
    next_latents: Tensor | None


def attend_codes(
    query: Tensor,
    codes: PagedCodes,
    latents: Tensor | None,
    operands: DecodeOperands,
    rotary: PageRotary,
    *,
    scaling: float,
    softcap: float | None = None,
    carry: bool = True,
    backend: Backend = "auto",
) -> CodedAttention:
    """Attend from one new token per row to a layer's coded tokens.

    Nothing waits for the device, so that a CUDA graph can capture it.

    Parameters
    ----------
    query
        ``[rows, query_heads, head_dim]`` in any floating dtype, rotated to the new token's position.
    codes
        The layer's codes.
    latents
        ``[rows, tokens, latent_width]`` float16, from the layer before; None at the first layer.
    operands, rotary
        The layer's operands (float16 for Triton); the rotary tables of the pages.
    scaling, softcap
        Scores are ``scaling * query · key``, then ``softcap * tanh(score / softcap)`` if it is given.
    carry
        Whether to return the next layer's latents; `carry_latents` returns them alone.
    backend
        ``auto`` is ``hopper`` on GPUs of that kind where it supports the layer, Triton on other GPUs and the
        plain-torch definition elsewhere.

    Raises
    ------
    ShapeError
        A tensor does not fit the operands.
    ConfigError
        The backend cannot run here.
    """
    if _may_be_hopper(backend, query):
        check_step(query, codes, latents, operands)
        if _is_hopper(backend, query, codes, operands, rotary):
            found = hopper.attend(query, codes, latents, operands, rotary, scaling, softcap, carry)
            return CodedAttention(*found)
    scored = scores(
        query, codes, latents, operands, rotary, scaling=scaling, softcap=softcap, backend=backend
    )
    carries = carry and operands.next_width
    following = next_latents(codes, latents, operands, backend=backend) if carries else None
    summed = weighted_code_sum(scored, codes, latents, operands, backend=backend)
    out, lse = combine(summed, scored.maxima, operands, backend=backend)
    return CodedAttention(out, lse, following)


def carry_latents(
    codes: PagedCodes,
    latents: Tensor | None,
    operands: DecodeOperands,
    rotary: PageRotary,
    *,
    query: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Return the next layer's latents, as `attend_codes` does, without attending.

    They follow from a layer's latents and key codes alone, so they stay the same until pages change.

    Parameters
    ----------
    codes, latents, operands, rotary, backend
        As for `attend_codes`; the operands must have a next layer.
    query
        One like those of the steps that are to use them, of which its shape and dtype count (it may be on the
        meta device): ``auto`` chooses as it does for such a step, so that latents are the same bit for bit.
        Without one, as for few query heads a KV head.

    Returns
    -------
    Tensor
        ``[rows, tokens, next_width]`` float16 (torch: float32); beyond a row's length arbitrary.

    Raises
    ------
    ShapeError
        A tensor does not fit the operands, or these have no next layer.
    ConfigError
        The backend cannot run here.
    """
    if _may_be_hopper(backend, codes.key_pages):
        check_carried(codes, latents, operands)
        if _is_hopper(backend, query, codes, operands, rotary):
            return hopper.carry(codes, latents, operands, rotary)
    return next_latents(codes, latents, operands, backend=backend)


def _may_be_hopper(backend: Backend, like: Tensor) -> bool:
    """Tell whether a step on a tensor's device is one for the Hopper kernels, if they support it."""
    chosen = resolve_backend(backend, like, whole_step=True)
    return chosen == "hopper" or (backend == "auto" and chosen == "triton")


def _is_hopper(
    backend: Backend, query: Tensor | None, codes: PagedCodes, operands: DecodeOperands, rotary: PageRotary
) -> bool:
    """Tell whether they support it; raise `ConfigError` if they do not, but were asked for."""
    reason = hopper.why_not(query, operands, rotary) if codes.pages else "expected pages, got none"
    if reason is not None and backend == "hopper":
        raise ConfigError(f"backend hopper: {reason}; choose triton or auto")
    return reason is None
