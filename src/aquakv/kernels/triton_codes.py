"""Unpacking of pages in Triton kernels. Import only where Triton is installed."""

# Compile-time constants are upper case, as everywhere in Triton; its tuples grow by concatenation. Its types
# describe neither launches nor what it makes of loops and tuples.
# ruff: noqa: N803, RUF005
# pyright: reportMissingImports=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

import triton
import triton.language as tl

#: Four bytes to four float16 levels x. The mask selects the field; each byte becomes the low byte of a
#: float16 1024 + byte. Two subtractions, since 1024 plus half a code is no float16.
_BYTES_TO_LEVELS = tl.constexpr("""{
.reg .b32 field, bias, low, high;
and.b32 field, $2, $3;
mov.b32 bias, 0xE400E400;
prmt.b32 low, field, 0x64646464, 0x4140;
prmt.b32 high, field, 0x64646464, 0x4342;
add.rn.f16x2 low, low, bias;
add.rn.f16x2 high, high, bias;
fma.rn.f16x2 low, low, $4, $6;
fma.rn.f16x2 high, high, $5, $7;
mov.b32 $0, low;
mov.b32 $1, high;
}""")
_PRODUCT = tl.constexpr("mul.rn.f16x2 $0, $1, $2;")


@triton.jit
def half_of(bits):
    """Return the float16 whose bits are the lower half of an int32."""
    return (bits & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def record_scales(record, record_bytes, tokens):
    """Load the scale codes, uint8, of tokens of the record at ``record``."""
    return tl.load(record + (record_bytes - 80) + tokens)


@triton.jit
def record_attended(record, record_bytes, tokens):
    """Return whether tokens of the record at ``record`` are attended to as codes."""
    bits = tl.load(record + (record_bytes - 16) + tokens // 8).to(tl.int32)
    return (bits >> (tokens % 8)) & 1 != 0


@triton.jit
def token_scale(codes):
    """Return the scales, float32, of uint8 scale codes."""
    scale = tl.exp2((codes.to(tl.float32) - 128.0) * 0.0625)
    return tl.where(codes == 255, float("nan"), scale)


@triton.jit
def field_words(fields, first, COUNT: tl.constexpr):
    """Load the descriptions of COUNT fields from ``first`` on: two tuples of int32."""
    places = ()
    halves = ()
    for i in tl.static_range(COUNT):
        places = places + (tl.load(fields + 2 * (first + i)),)
        halves = halves + (tl.load(fields + 2 * (first + i) + 1),)
    return places, halves


@triton.jit
def field_bytes(pages, cells, places, COUNT: tl.constexpr):
    """Load the planes of COUNT fields, a tuple of uint8 [tokens, 16].

    ``cells`` [tokens, 16] says where a plane's bytes are, from ``pages`` plus the plane's offset on. Kernels
    load all fields of a page at once, because what follows waits for barriers.
    """
    raw = ()
    for i in tl.static_range(COUNT):
        # A product with 1024, the bytes of a plane, tells the compiler that loads are aligned.
        raw = raw + (tl.load(pages + (places[i] & 0xFFFFF) * 1024 + cells),)
    return raw


@triton.jit
def field_levels(raw, place, halves, gains, scale, SCALED: tl.constexpr, ASM: tl.constexpr):
    """Return one field's levels, float16 [tokens, 16], times the tokens' scales [tokens, 1] if SCALED."""
    mask = ((place >> 20) & 0xFF).to(tl.uint8)
    unit = half_of(halves)
    shift = half_of(halves >> 16)
    if ASM:
        levels = tl.inline_asm_elementwise(
            _BYTES_TO_LEVELS,
            "=r,=r,r,r,r,r,r,r",
            [raw, mask, unit, shift],
            dtype=tl.float16,
            is_pure=True,
            pack=4,
        )
    else:
        biased = ((raw & mask).to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True)
        levels = (biased - 1024.0) * unit + shift
    if place >> 28:
        gain = tl.load(gains + tl.arange(0, 16))[None, :]
        levels = levels * (levels * levels * gain + 1.0)
    if SCALED:
        if ASM:
            levels = tl.inline_asm_elementwise(
                _PRODUCT, "=r,r,r", [levels, scale], dtype=tl.float16, is_pure=True, pack=2
            )
        else:
            levels = levels * scale
    return levels


@triton.jit
def chunk_levels(
    raw,
    places,
    halves,
    gains,
    scale,
    FIRST: tl.constexpr,
    SIZE: tl.constexpr,
    SCALED: tl.constexpr,
    ASM: tl.constexpr,
):
    """Return the levels of SIZE (1, 2 or 4) fields from FIRST on, float16 [tokens, SIZE * 16] by slot."""
    tokens: tl.constexpr = raw[0].shape[0]
    parts = ()
    for k in tl.static_range(FIRST, FIRST + SIZE):
        level = field_levels(raw[k], places[k], halves[k], gains + 16 * k, scale, SCALED, ASM)
        parts = parts + (level,)
    if SIZE == 1:
        levels = parts[0]
    elif SIZE == 2:
        levels = tl.reshape(tl.permute(tl.join(parts[0], parts[1]), (0, 2, 1)), (tokens, 32))
    else:
        even = tl.join(parts[0], parts[2])
        both = tl.join(even, tl.join(parts[1], parts[3]))
        levels = tl.reshape(tl.permute(both, (0, 2, 3, 1)), (tokens, 64))
    return levels
