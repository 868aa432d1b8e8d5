"""Operands of the Hopper kernels: a layer's matrices as they lie in shared memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aquakv.errors import ConfigError
from aquakv.kernels.hopper.order import cubic_tiles, latent_order, score_order, sum_order
from aquakv.kernels.operands import CHUNK_SLOTS, DecodeOperands, rotary_order
from aquakv.kernels.pages import FIELD_COLUMNS, PAGE_TOKENS, PLANE_BYTES, Field, PageLayout, level_slopes
from aquakv.kernels.rotary import PageRotary

#: Pairs of coordinates that turn by less than this angle (radians) within half a page are not rotated token
#: by token: their part of a score is a polynomial of first order in the token's offset from the page's
#: centre. What that leaves out is at most half the square of the angle, 0.5 % of the pair's part at the ends.
SLOW_ANGLE = 0.1

#: Most query heads of a KV head.
MAX_GROUP = 4

#: Most fields of a head: what fits registers.
MAX_HEAD_FIELDS = 8

#: The innovation's largest entry is brought near this power of two.
LARGEST_EXPONENT = 14

#: What scores divide by the token's scale is divided by this too, so that halves stay in range.
SCALE_ROOM = 16.0


@dataclass(frozen=True, eq=False)
class HopperOperands:
    """What the kernels in this folder read, besides codes; `build` makes it from a layer's `DecodeOperands`.

    Attributes
    ----------
    plain
        The operands that these were made of.
    fast_pairs, slow_pairs
        Pairs of coordinates that are rotated token by token, and those that are not; each padded.
    score_images
        uint8: synthesis and its slow part, for every KV head; of codes over `SCALE_ROOM`.
    score_offsets, pair_order, pair_index, pair_angles, offset_turns
        Tables in the order of the pairs, by falling angle: offsets of the keys, coordinates, where each pair
        is in rotary tables (beyond their end if it does not turn), radians of 32 tokens, turns in a page.
    score_fields
        ``[kv_heads, fields, 8]`` int32: ``Field`` of common.cuh.
    sum_fields, cubic_tiles
        ``[fields, 8]`` int32: ``Bits`` of common.cuh, of keys and values in the order of `sum_order`; and how
        many of a team's first tiles have unequally spaced levels.
    score_planes
        ``[kv_heads, planes]`` int32: where the planes with a head's codes are in a record, -1 past the last;
        offsets of `score_fields` count from the first.
    field_order
        For every head its fields, as numbers in the layout's order, in the order that these operands have.
    cubic_fields, exact_fields
        Fields of a head whose levels may be unequally spaced, and those whose codes may have to be numbers
        before they are centred, as 1024 plus half a number is no half: the first ones.
    plane_loads
        Bit by bit which fields of a head are not in the plane of the field after them, with any head.
    latent_images, latent_constants
        uint8: innovation and transition; ``[2, next_width]`` float32: what the codes that are level 0 add up
        to where they are used as they are, and the offset. None at the last layer.
    latent_fields, general_chunks
        Fields of keys, likewise, in the order of `latent_order`, and how many chunks are general.
    epilogue
        ``[kv_heads, slots, head_dim]`` float16: fields of keys and of values in the order of `sum_order`,
        then the latent.
    """

    plain: DecodeOperands
    fast_pairs: int
    slow_pairs: int
    score_images: Tensor
    score_offsets: Tensor
    pair_order: Tensor
    pair_index: Tensor
    pair_angles: Tensor
    offset_turns: Tensor
    score_fields: Tensor
    sum_fields: Tensor
    cubic_tiles: int
    score_planes: Tensor
    field_order: list[list[int]]
    cubic_fields: int
    exact_fields: int
    plane_loads: int
    latent_images: Tensor | None
    latent_constants: Tensor | None
    latent_fields: Tensor
    general_chunks: int
    latent_exponent: int
    epilogue: Tensor

    @property
    def head_fields(self) -> int:
        """Fields of a head, the most of any."""
        return self.score_fields.shape[1]

    @classmethod
    def build(cls, plain: DecodeOperands, rotary: PageRotary) -> HopperOperands:
        """Arrange a layer's operands; waits for the device.

        Parameters
        ----------
        plain
            float16 operands.
        rotary
            Tables of any pages, float32 offsets for full accuracy: the pairs' angles are taken from them.

        Raises
        ------
        ConfigError
            The kernels do not support the layer; see `unsupported`.
        """
        reason = unsupported(plain)
        if reason is not None:
            raise ConfigError(f"backend hopper: {reason}; choose triton")
        dim, heads = plain.head_dim, plain.num_kv_heads
        device = plain.score_synthesis.device
        half = dim // 2
        angles = torch.nn.functional.pad(pair_angles(rotary), (0, half - plain.rotary_dim // 2))
        by_angle = angles.abs().argsort(descending=True, stable=True)
        fast, slow = split_pairs(angles, dim)
        order = torch.full((fast + slow,), -1, dtype=torch.int64)
        order[:half] = by_angle  # any padding follows the slow pairs
        columns = torch.stack([order, torch.where(order >= 0, order + half, -1)], 1)
        head_fields = max(1, plain.keys.layout.max_group_fields)
        steps = head_fields + plain.latent_width // 16
        slots = -(-steps // 4) * CHUNK_SLOTS
        rows = plain.score_synthesis.new_zeros(heads, slots, dim + 1)
        table = plain.keys.layout
        gains = level_slopes(table)[1]
        own_fields: list[list[Field]] = []
        order_of_fields: list[list[int]] = []
        cubic = exact = loads = 0
        for head in range(heads):
            found = table.group_fields(head)
            kinds = [0 if gains[f.coefficients[0]] != 0 else 1 if f.shift == 0 else 2 for f in found]
            by_kind = score_order(kinds, [f.plane for f in found])
            order_of_fields.append(by_kind)
            own_fields.append([found[i] for i in by_kind])
            for number, i in enumerate(by_kind):
                following = by_kind[number + 1 : number + 2]
                if not following or found[i].plane != found[following[0]].plane:
                    loads |= 1 << number
            cubic, exact = max(cubic, kinds.count(0)), max(exact, kinds.count(0) + kinds.count(1))
            for place, i in enumerate(by_kind):
                part = plain.score_synthesis[head, i * FIELD_COLUMNS : (i + 1) * FIELD_COLUMNS]
                start = place * FIELD_COLUMNS
                rows[head, start : start + FIELD_COLUMNS, :dim] = part / SCALE_ROOM
        if plain.latent_synthesis is not None:
            start = head_fields * FIELD_COLUMNS
            rows[:, start : start + plain.latent_width, :dim] = plain.latent_synthesis
        # Column dim, zero, stands for coordinates that do not exist.
        places = _step_order(slots, device)
        code_slots = head_fields * FIELD_COLUMNS
        places[code_slots:] = torch.arange(code_slots, slots, device=device)  # latents are not permuted
        picked = rows[:, places][..., columns.flatten().to(device) % (dim + 1)]
        # Rotated pairs: first coordinates of eight pairs, then their second ones.
        turned = picked[..., : 2 * fast].unflatten(-1, (-1, 8, 2)).transpose(-1, -2).flatten(-3)
        still = picked[..., 2 * fast :]
        synthesis = _images(turned.transpose(1, 2))
        padding = CHUNK_SLOTS - still.shape[-1]
        slow_rows = torch.nn.functional.pad(still, (0, padding)).unflatten(1, (-1, CHUNK_SLOTS))
        images = torch.cat([synthesis, _images(slow_rows).flatten(1)], 1)
        offsets = torch.nn.functional.pad(plain.key_offset, (0, 1))[
            :, columns.flatten().to(device) % (dim + 1)
        ]
        tables = (table, plain.values.layout)
        own_planes = [sorted({field.plane for field in own}) for own in own_fields]
        by_head = [
            _describe(table, own, head_fields, planes, exact)
            for own, planes in zip(own_fields, own_planes, strict=True)
        ]
        most_planes = max(1, *map(len, own_planes))
        orders = [sum_order(t.fields) for t in tables]
        sums = [_describe_bits(t, len(o))[o] for t, o in zip(tables, orders, strict=True)]
        summed = [
            _field_slots(o, device) + 4 * n * FIELD_COLUMNS
            for o, n in zip(orders, (0, plain.keys.chunks), strict=True)
        ]
        spread = angles[by_angle]
        rotation = torch.arange(PAGE_TOKENS, dtype=torch.float64)[:, None] - (PAGE_TOKENS - 1) / 2
        rotation = rotation * torch.nn.functional.pad(spread, (0, fast))[:fast]
        # Thread (warp, group, quad) has tokens 16 * warp + group and the eighth after it, and, of every eight
        # pairs, 2 * quad and the next: their cosines, then sines.
        turns = torch.stack([rotation.cos(), rotation.sin()]).half()
        turns = turns.view(2, 4, 2, 8, fast // 8, 4, 2).permute(4, 1, 3, 5, 2, 0, 6).contiguous()
        epilogue = plain.epilogue.transpose(1, 2)
        numbers, general = latent_order(table.fields)
        latent_fields = _describe_bits(table, len(numbers))[numbers].to(device)
        latent, constants, exponent = _latent_operands(plain, numbers, general)
        coordinate = torch.cat([rotary_order(dim, plain.rotary_dim), torch.tensor([-1])])
        return cls(
            plain,
            fast,
            slow,
            images.contiguous(),
            offsets.float().contiguous(),
            coordinate[columns].int().contiguous().to(device),
            torch.where(order >= 0, order, half).to(device),
            (torch.nn.functional.pad(spread, (0, fast + slow - half)) * 32).float().to(device),
            turns.to(device),
            torch.stack(by_head).to(device),
            torch.cat(sums).to(device),
            max(cubic_tiles(t.fields, o) for t, o in zip(tables, orders, strict=True)),
            torch.tensor(
                [
                    [plane * PLANE_BYTES for plane in planes] + [-1] * (most_planes - len(planes))
                    for planes in own_planes
                ],
                dtype=torch.int32,
                device=device,
            ),
            order_of_fields,
            cubic,
            exact,
            loads | 1 << head_fields - 1,
            latent,
            constants,
            latent_fields,
            general,
            exponent,
            torch.cat([epilogue[:, torch.cat(summed)], epilogue[:, sum(map(len, summed)) :]], 1),
        )

    def page_turns(self, rotary: PageRotary) -> Tensor:
        """Return cosines and sines at the pages' centres, ``[rows, pages, pairs, 2]`` float32."""
        turning = rotary.page_cos.shape[-1]
        centre = (self.pair_angles.double() * ((PAGE_TOKENS - 1) / 2 / 32)).float()
        order = self.pair_index
        still = order >= turning
        index = order.clamp(max=turning - 1) if turning else order
        if not turning:
            ones = rotary.page_cos.new_ones(*rotary.page_cos.shape[:2], len(order))
            return torch.stack([ones, torch.zeros_like(ones)], -1)
        start_cos = rotary.page_cos[..., index].masked_fill(still, 1.0)
        start_sin = rotary.page_sin[..., index].masked_fill(still, 0.0)
        cos, sin = centre.cos(), centre.sin()
        both = start_cos * cos - start_sin * sin, start_sin * cos + start_cos * sin
        return torch.stack(both, -1)


def pair_angles(rotary: PageRotary) -> Tensor:
    """Return the angle of every pair per position, float64 on the host, from tables of offsets."""
    cos, sin = rotary.offset_cos.double().cpu(), rotary.offset_sin.double().cpu()
    angles = torch.atan2(sin[1], cos[1])
    last = PAGE_TOKENS - 1
    # A small angle is told better from many steps of it.
    return torch.where(angles.abs() * last < 1, torch.atan2(sin[last], cos[last]) / last, angles)


def split_pairs(angles: Tensor, dim: int) -> tuple[int, int]:
    """Return how many pairs are rotated token by token, a multiple of 8, and how many are not, of 8.

    At most 32 pairs may be slow: 64 numbers are a row of an operand in shared memory.
    """
    half = dim // 2
    fast = int((angles.abs() * (PAGE_TOKENS / 2) > SLOW_ANGLE).sum())
    fast = max(8, half - 32, -(-fast // 8) * 8)
    slow = max(8, -(-(half - min(half, fast)) // 8) * 8)
    return fast, slow


def unsupported(plain: DecodeOperands) -> str | None:
    """Return why the kernels cannot run a layer, or None."""
    if plain.head_dim not in (64, 128):
        return f"expected heads of 64 or 128, got {plain.head_dim}"
    if not (plain.keys.layout.fields and plain.values.layout.fields):
        return "expected codes of keys and of values"
    if plain.epilogue.dtype != torch.float16:
        return f"expected float16 operands, got {plain.epilogue.dtype}"
    if plain.keys.layout.max_group_fields > MAX_HEAD_FIELDS:
        return f"expected at most {MAX_HEAD_FIELDS} fields a head, got {plain.keys.layout.max_group_fields}"
    for layout in (plain.keys.layout, plain.values.layout):
        gains = level_slopes(layout)[1]
        if any(len(set(gains[list(field.coefficients)].tolist())) > 1 for field in layout.fields):
            return "expected one width for all coefficients of a field"
    return None


def _latent_operands(
    plain: DecodeOperands, places: Sequence[int], general: int
) -> tuple[Tensor | None, Tensor | None, int]:
    """Return images, constants and exponent of the next latent; see `HopperOperands`."""
    if plain.innovation is None or plain.next_offset is None:
        return None, None, 0
    device, width = plain.innovation.device, plain.next_width
    innovation = plain.innovation[_field_slots(places, device)].double()
    fields = plain.keys.layout.fields
    factors, centres = torch.zeros(2, len(places), dtype=torch.float64)
    for place, number in enumerate(places):
        if number < len(fields):
            leveled = place < 4 * general
            factors[place] = 1 / bits_factor(fields[number], leveled)
            centres[place] = 0.0 if leveled else fields[number].centre
    factors, centres = (each.to(device).repeat_interleave(FIELD_COLUMNS) for each in (factors, centres))
    raised = innovation * factors[:, None]
    largest = float(raised.abs().max())
    exponent = math.floor(LARGEST_EXPONENT - math.log2(largest)) if largest > 0 else 0
    constants = torch.stack([centres @ innovation * 2.0**exponent, plain.next_offset.double()]).float()
    rows = (raised * 2.0**exponent).half()
    order = _byte_order(len(rows), device)
    parts = [rows[order]]
    if plain.transition is not None:
        transition = _pad_slots(plain.transition)
        parts.append(transition[_step_order(len(transition), device)])
    whole = torch.cat(parts)
    # A thread has two of eight neighbouring columns of a product: its columns of four products (or two, where
    # the width is not a multiple of 32) are neighbours in the latent.
    column = torch.arange(width, device=device)
    tile, pair, odd = column // 8, column % 8 // 2, column % 2
    runs = torch.where(tile // 4 * 4 + 4 <= width // 8, 4, 2)
    order = tile // 4 * 32 + 2 * runs * pair + 2 * (tile % 4) + odd
    images = _images(whole[:, order].T[None])[0]
    return images.contiguous(), constants.contiguous(), exponent


def _field_slots(order: Sequence[int], device: torch.device) -> Tensor:
    """Return the slots of some fields, 16 each."""
    fields = torch.tensor(list(order), dtype=torch.int64, device=device)
    return (fields[:, None] * FIELD_COLUMNS + torch.arange(FIELD_COLUMNS, device=device)).flatten()


def _describe(
    layout: PageLayout, fields: Sequence[Field], count: int, planes: Sequence[int], exact: int
) -> Tensor:
    """Return ``[count, 8]`` int32, ``Field`` of common.cuh; zero (all codes 0) past the fields.

    Offsets are those in 16 tokens of these planes, one behind the other. The centre of fields past the first
    ``exact`` has what `unpack_at_once` subtracts.
    """
    gains = level_slopes(layout)[1]
    words = torch.zeros(count, 8, dtype=torch.int32)
    for number, (row, field) in enumerate(zip(words, fields, strict=False)):
        unit = 2.0**-field.shift
        room = 1024 * unit if number >= exact else 0.0
        twice = _half_pairs([unit, -field.centre - room, float(gains[field.coefficients[0]])])
        parts = [planes.index(field.plane) * PLANE_BYTES // 4, field.mask * 0x01010101, *twice]
        row[: len(parts)] = torch.tensor([_signed(part) for part in parts])
    return words


def _describe_bits(layout: PageLayout, count: int) -> Tensor:
    """Return ``[count, 8]`` int32, ``Bits`` of common.cuh of all fields; zero (all codes 0) past them."""
    gains = level_slopes(layout)[1]
    words = torch.zeros(count, 8, dtype=torch.int32)
    for row, field in zip(words, layout.fields, strict=False):
        gain = float(gains[field.coefficients[0]])
        twice = _half_pairs([-field.centre * 2.0 ** (field.shift - 9), gain * 2.0 ** (18 - 2 * field.shift)])
        factor = 1 / bits_factor(field, gain != 0)
        floats = torch.tensor([factor, 0.0 if gain else field.centre], dtype=torch.float32)
        parts = [
            field.plane * PLANE_BYTES,
            field.mask * 0x00010001,
            *twice,
            *floats.view(torch.int32).tolist(),
        ]
        row[: len(parts)] = torch.tensor([_signed(part) for part in parts])
    return words


def bits_factor(field: Field, leveled: bool) -> float:
    """Return what products see of a field over its levels or, where none are made, over its codes."""
    return 2.0 ** (field.shift - (9 if leveled else 24))


def _half_pairs(numbers: Sequence[float]) -> list[int]:
    """Return words with a float16 number twice each."""
    halves = torch.tensor(list(numbers), dtype=torch.float64).half().view(torch.int16).tolist()
    return [(bits & 0xFFFF) * 0x10001 for bits in halves]


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


def _step_order(slots: int, device: torch.device) -> Tensor:
    """Return the slot at each place of the right operand.

    A thread has four neighbouring columns of a field; the left operand wants the first two of them in its
    lower eight columns, the others in its upper eight.
    """
    within = torch.arange(FIELD_COLUMNS, device=device)
    column = (within % 8) // 2 * 4 + within % 2 + 2 * (within // 8)
    return (torch.arange(0, slots, FIELD_COLUMNS, device=device)[:, None] + column).flatten()


def _byte_order(slots: int, device: torch.device) -> Tensor:
    """Return the slot at each place of the right operand, where codes are used where they lie.

    The left operand has bytes 0 and 2 of a thread's words in its lower eight columns, bytes 1 and 3 in its
    upper eight.
    """
    within = torch.arange(FIELD_COLUMNS, device=device)
    column = (within % 8) // 2 * 4 + within % 2 * 2 + within // 8
    return (torch.arange(0, slots, FIELD_COLUMNS, device=device)[:, None] + column).flatten()


def _images(rows: Tensor) -> Tensor:
    """Arrange ``[batch…, n, k]`` float16 as the products' right operands: bytes ``[batch…, -1]``.

    For every 64 of k one block of n rows of 128 bytes, whose sixteen-byte chunks are exchanged by the row's
    number modulo 8.
    """
    *batch, n, k = rows.shape
    blocks = rows.reshape(*batch, n, k // 64, 8, 8).movedim(-3, -4)  # [batch…, blocks, n, chunks, 8]
    number = torch.arange(n, device=rows.device)[:, None] % 8
    chunk = torch.arange(8, device=rows.device) ^ number
    index = chunk[..., None].expand(*blocks.shape)
    return blocks.gather(-2, index).contiguous().view(torch.uint8).flatten(len(batch))


def _pad_slots(matrix: Tensor) -> Tensor:
    missing = -len(matrix) % CHUNK_SLOTS
    return torch.nn.functional.pad(matrix, (0, 0, 0, missing))
