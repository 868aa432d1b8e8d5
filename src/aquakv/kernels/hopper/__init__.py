"""Kernels for Hopper GPUs (sm_90): attention to codes by asynchronous matrix products, compiled at run time.

The same four operations as in the folders beside this one, with intermediate results of their own form, so
they come as a whole. The plain-torch definitions are those of `aquakv.kernels.scores`, `.weighted_code_sum`
and `.combine`.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from aquakv.kernels.codes import PagedCodes
from aquakv.kernels.hopper import decode
from aquakv.kernels.hopper.compiler import nvrtc_path
from aquakv.kernels.hopper.operands import MAX_GROUP, HopperOperands, unsupported
from aquakv.kernels.operands import DecodeOperands
from aquakv.kernels.rotary import PageRotary

_log = logging.getLogger(__name__)
_turns: WeakKeyDictionary[PageRotary, dict[Any, tuple[HopperOperands, Tensor]]] = WeakKeyDictionary()


@lru_cache(maxsize=16)
def why_not_on(device: torch.device) -> str | None:
    """Return why these kernels cannot run on a device, or None; logged once for CUDA devices."""
    if device.type != "cuda":
        return f"expected tensors on a CUDA device, got {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        reason = f"expected a GPU of compute capability 9.0, got {capability[0]}.{capability[1]}"
    elif nvrtc_path() is None:
        reason = "NVRTC was not found; install nvidia-cuda-nvrtc"
    else:
        _log.info("decode kernels on %s: hopper", torch.cuda.get_device_name(device))
        return None
    _log.info("decode kernels on %s: not hopper: %s", torch.cuda.get_device_name(device), reason)
    return reason


def why_not(query: Tensor | None, operands: DecodeOperands, rotary: PageRotary) -> str | None:
    """Return why these kernels cannot take a step, or None.

    Of the query shape and dtype count; without one it is of a kind that they take.
    """
    reason = why_not_on(operands.epilogue.device)
    if reason is None and query is not None:
        reason = _why_not_query(query, operands.num_kv_heads)
    if reason is None and rotary.offset_cos.dtype != torch.float32:
        reason = f"expected float32 tables of offsets, got {rotary.offset_cos.dtype}"
    if reason is not None:
        return reason
    found = _arranged(operands, rotary)  # only now, as that makes them
    return found if isinstance(found, str) else None


def _why_not_query(query: Tensor, num_kv_heads: int) -> str | None:
    group = query.shape[1] // num_kv_heads
    if group > MAX_GROUP:
        return f"expected at most {MAX_GROUP} query heads a KV head, got {group}"
    if query.shape[1] > 64:
        return f"expected at most 64 query heads, got {query.shape[1]}"
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"expected float32, float16 or bfloat16 queries, got {query.dtype}"
    return None


def attend(
    query: Tensor,
    codes: PagedCodes,
    latents: Tensor | None,
    operands: DecodeOperands,
    rotary: PageRotary,
    scaling: float,
    softcap: float | None,
    carry: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return output, log-sum-exp and next latents; see `aquakv.kernels.attend_codes`.

    A layer's operands are arranged at its first step, which waits for the device; later steps do not.
    `why_not` must find nothing.
    """
    arranged = _arranged(operands, rotary)
    assert isinstance(arranged, HopperOperands)
    if latents is not None and latents.dtype != torch.float16:
        latents = latents.half()
    turns = _page_turns(arranged, rotary)
    with torch.cuda.device(query.device):
        pages = codes.key_pages, codes.table, codes.lengths
        following = decode.empty_latents(codes.table, arranged) if carry and operands.next_width else None
        scored, maxima = decode.scores(query.contiguous(), *pages, latents, arranged, turns, scaling, softcap)
        means, totals = decode.code_sums(
            scored, maxima, codes.key_pages, codes.value_pages, codes.table, codes.lengths, latents, arranged
        )
        out, lse = decode.combine(means, totals, maxima, arranged)
        if following is not None:
            following = decode.next_latents(*pages, latents, arranged, following)
    return out, lse, following


def carry(codes: PagedCodes, latents: Tensor | None, operands: DecodeOperands, rotary: PageRotary) -> Tensor:
    """Return next latents; see `aquakv.kernels.carry_latents`. `why_not` must find nothing."""
    arranged = _arranged(operands, rotary)
    assert isinstance(arranged, HopperOperands)
    if latents is not None and latents.dtype != torch.float16:
        latents = latents.half()
    with torch.cuda.device(codes.table.device):
        return decode.next_latents(codes.key_pages, codes.table, codes.lengths, latents, arranged)


def kept_turns(rotary: PageRotary) -> tuple[Tensor, ...]:
    """Return the pages' turns that are kept with rotary tables of pages, half a kilobyte a page."""
    return tuple(turns for _, turns in _turns.get(rotary, {}).values())


def renew_turns(rotary: PageRotary) -> None:
    """Bring the turns that are kept with rotary tables up to date, in place, once these have changed."""
    for arranged, turns in _turns.get(rotary, {}).values():
        turns.copy_(arranged.page_turns(rotary))


def _page_turns(arranged: HopperOperands, rotary: PageRotary) -> Tensor:
    """Return the pages' turns, shared by all layers with the same pairs and kept with the tables."""
    shared = _turns.setdefault(rotary, {})
    key = (arranged.fast_pairs, arranged.slow_pairs, arranged.plain.head_dim)
    if key in shared:
        return shared[key][1]
    turns = arranged.page_turns(rotary)
    # What a graph being captured computes is not there before its first replay.
    if not torch.cuda.is_current_stream_capturing():
        shared[key] = arranged, turns
    return turns


def _arranged(operands: DecodeOperands, rotary: PageRotary) -> HopperOperands | str:
    """Return a layer's operands for these kernels, or why they do not support it."""
    # Kept in the operands themselves: what is arranged refers to them; a table of weak keys would keep both.
    kept: dict[str, Any] = vars(operands)
    if "_hopper" in kept:
        return kept["_hopper"]
    reason = unsupported(operands)
    if reason is None:
        arranged = HopperOperands.build(operands, rotary)
        most = max(decode.score_shared_bytes(arranged), decode.latent_shared_bytes(arranged))
        if most <= decode.MAX_BLOCK_BYTES:
            # Kernels read operands before they wait for the kernel ahead of them on the stream.
            torch.cuda.current_stream(operands.epilogue.device).synchronize()
            kept["_hopper"] = arranged
            return arranged
        reason = f"operands need {most} bytes of shared memory, there are {decode.MAX_BLOCK_BYTES}"
    _log.info("decode kernels: not hopper: %s", reason)
    kept["_hopper"] = reason
    return reason
