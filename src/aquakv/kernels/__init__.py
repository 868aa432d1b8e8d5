"""Attention of one decode step straight on codes: neither keys nor values are ever reconstructed."""

from aquakv.kernels.codes import PagedCodes
from aquakv.kernels.decode import CodedAttention, attend_codes, carry_latents
from aquakv.kernels.operands import DecodeOperands
from aquakv.kernels.pages import (
    PAGE_TOKENS,
    PageLayout,
    clear_attended,
    pack_pages,
    pack_records,
    record_attended,
    record_planes,
    record_scales,
    unpack_pages,
)
from aquakv.kernels.rotary import PageRotary

__all__ = [
    "PAGE_TOKENS",
    "CodedAttention",
    "DecodeOperands",
    "PageLayout",
    "PageRotary",
    "PagedCodes",
    "attend_codes",
    "carry_latents",
    "clear_attended",
    "pack_pages",
    "pack_records",
    "record_attended",
    "record_planes",
    "record_scales",
    "unpack_pages",
]
