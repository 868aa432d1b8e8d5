"""Interleaved range-ANS entropy coding in plain integer tensor operations, bit-exact on every device.

The format
----------
Data come as independent *blocks* of ``lanes`` x ``steps`` symbols. Step ``t`` is coded with the frequency
table ``rows[t]``; a table's frequencies sum to 2^14, and ``start[s]`` is the sum of those before ``s``. Every
lane has a state ``x``, 2^16 <= x < 2^32. A decoder starts from the stored ``states`` and does at every step,
from the first to the last::

    slot = x mod 2^14
    symbol = the s with start[s] <= slot < start[s] + frequency[s]
    x = frequency[symbol] * (x div 2^14) + slot - start[symbol]
    if x < 2^16: x = 2^16 * x + the next word of the block

All lanes of a block share one stream of 16-bit words; within a step they take theirs in the order of lanes.
At the end ``x`` is the state from which the encoder started, 2^16 plus the lane's *payload*: any number from
0 to 2^32 - 2^16 - 1, so that the 32 bits of a state are not lost. The blocks' words follow one another
without gaps; ``lengths`` counts those of each block. Words and states are bit patterns in int16 and int32.

A damaged stream decodes to other symbols, always within the alphabet and in the same number of steps.

The recurrence is rANS of arXiv:1311.2540; interleaving is that of arXiv:1402.3392. One word per symbol is
always enough, because a step divides a state of at least 2^16 by at most 2^14.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle
from typing import NamedTuple

import torch
from torch import Tensor

from aquakv.errors import InputError, ShapeError

PRECISION_BITS = 14
TOTAL = 1 << PRECISION_BITS
MAX_ALPHABET = 256
WORD_BITS = 16
LOWEST_STATE = 1 << 16
#: Payloads are below this.
PAYLOAD_LIMIT = (1 << 32) - LOWEST_STATE

# Symbols whose frequencies or slots are looked up at once; more save calls until they leave the caches.
_CHUNK_SYMBOLS = 1 << 16


def _constant(value: int) -> Tensor:
    """Return a scalar for inner loops: converting a Python number takes as long as a small operation."""
    return torch.tensor(value, dtype=torch.int64, device="cpu")


_SLOT_MASK = _constant(TOTAL - 1)
_PRECISION = _constant(PRECISION_BITS)
_WORD = _constant(WORD_BITS)
_LOWEST = _constant(LOWEST_STATE)


@dataclass(frozen=True, eq=False)
class SymbolTables:
    """Frequency tables, one per row, with what coding derives from them.

    Attributes
    ----------
    frequencies
        ``[tables, alphabet]`` int32 with 1 to 256 symbols: not negative, every row sums to 2^14. A symbol of
        frequency 0 cannot be coded.

    Raises
    ------
    ShapeError
        If ``frequencies`` has another shape or dtype.
    InputError
        On a CPU, if a frequency is negative or a row has another sum.
    """

    frequencies: Tensor

    def __post_init__(self) -> None:
        frequencies = self.frequencies
        if (
            frequencies.dim() != 2
            or frequencies.dtype != torch.int32
            or not 1 <= frequencies.shape[1] <= MAX_ALPHABET
        ):
            raise ShapeError(
                f"frequencies must be int32 [tables, 1..{MAX_ALPHABET}], got {_describe(frequencies)}"
            )
        if frequencies.device.type == "cpu":
            bad = (frequencies < 0).any(1) | (frequencies.sum(1) != TOTAL)
            if bool(bad.any()):
                table = int(bad.nonzero()[0, 0])
                raise InputError(
                    f"frequencies must not be negative and sum to {TOTAL}, those of table {table} sum to "
                    f"{int(frequencies[table].sum())}; SymbolTables.from_probabilities makes such tables"
                )

    @classmethod
    def from_probabilities(cls, probabilities: Tensor, used: Tensor | None = None) -> SymbolTables:
        """Round probabilities to frequencies, so that the expected code length is the least possible.

        Parameters
        ----------
        probabilities : Tensor
            ``[tables, alphabet]`` float64, finite and not negative, of any positive sum over the used symbols
            of a row.
        used : Tensor, optional
            ``[tables, alphabet]`` bool: which symbols can be coded; each gets at least frequency 1, the
            others 0. By default those of positive probability.

        Returns
        -------
        SymbolTables
            On the device of ``probabilities``; computed on a CPU, hence the same for every device.

        Raises
        ------
        ShapeError
            If a shape or dtype is another.
        InputError
            If a probability is negative or not finite, or those used in a row sum to 0.
        """
        if (
            probabilities.dim() != 2
            or probabilities.dtype != torch.float64
            or not 1 <= probabilities.shape[1] <= MAX_ALPHABET
        ):
            raise ShapeError(
                f"probabilities must be float64 [tables, 1..{MAX_ALPHABET}], got {_describe(probabilities)}"
            )
        if used is not None and (used.shape != probabilities.shape or used.dtype != torch.bool):
            raise ShapeError(f"used must be bool {list(probabilities.shape)}, got {_describe(used)}")
        values = probabilities.detach().cpu()
        mask = values > 0 if used is None else used.cpu()
        values = torch.where(mask, values, 0.0)
        sums = values.sum(1, keepdim=True)
        if not bool(((values >= 0).all(1, keepdim=True) & (sums > 0) & sums.isfinite()).all()):
            raise InputError("probabilities must be finite, not negative and of positive sum in every table")
        return cls(_round_to_total(values / sums, mask).to(probabilities.device))

    @cached_property
    def cumulative(self) -> Tensor:
        """``[tables, alphabet]`` int32: sum of the frequencies before each symbol."""
        return (self.frequencies.cumsum(1) - self.frequencies).to(torch.int32)

    @cached_property
    def bits(self) -> Tensor:
        """``[tables, alphabet]`` float32: code length of each symbol, infinite where it cannot be coded."""
        return (PRECISION_BITS - self.frequencies.double().log2()).float()

    @cached_property
    def symbol_of_slot(self) -> Tensor:
        """``[tables, 2^14]`` uint8: the symbol that each slot belongs to."""
        slots = torch.arange(TOTAL, device=self.frequencies.device).expand(self.frequencies.shape[0], TOTAL)
        ends = self.frequencies.cumsum(1)
        symbols = torch.searchsorted(ends, slots.contiguous(), right=True)
        return symbols.clamp_(max=self.frequencies.shape[1] - 1).to(torch.uint8)

    @cached_property
    def _encoder(self) -> tuple[Tensor, Tensor]:
        """Frequencies and starts, each int64 ``[tables * 256]``: every byte is a valid index."""
        excess = MAX_ALPHABET - self.frequencies.shape[1]
        pair = (self.frequencies, self.cumulative)
        frequency, start = (torch.nn.functional.pad(part.long(), (0, excess)).flatten() for part in pair)
        return frequency, start

    @cached_property
    def _decoder(self) -> tuple[Tensor, ...]:
        """For each table ``[2^14]``: frequency and offset of a slot, two int64 seen as one scalar."""
        symbols = self.symbol_of_slot.long()
        slots = torch.arange(TOTAL, device=symbols.device)
        frequency = self.frequencies.long().gather(1, symbols)
        offset = slots - self.cumulative.long().gather(1, symbols)
        # Gathering one scalar of 16 bytes is several times as fast as gathering two of 8 or a row of two.
        return torch.stack([frequency, offset], -1).view(torch.complex128).squeeze(-1).unbind(0)

    def to(self, device: torch.device | str) -> SymbolTables:
        """Return the tables on another device."""
        moved = self.frequencies.to(device)
        return self if moved is self.frequencies else SymbolTables(moved)


class EntropyCoded(NamedTuple):
    """Coded blocks, in the format at the head of this module.

    Attributes
    ----------
    words
        ``[total_words]`` int16: uint16 bit patterns.
    lengths
        ``[blocks]`` int32: words of each block.
    states
        ``[blocks, lanes]`` int32: uint32 bit patterns.
    """

    words: Tensor
    lengths: Tensor
    states: Tensor


def encode(symbols: Tensor, rows: Tensor, tables: SymbolTables, payload: Tensor) -> EntropyCoded:
    """Code blocks of symbols.

    Parameters
    ----------
    symbols : Tensor
        ``[blocks, lanes, steps]`` uint8, any strides.
    rows : Tensor
        ``[steps]``, any integer dtype: table of each step. On whichever device; a CPU saves waiting.
    tables : SymbolTables
        On the device of ``symbols``.
    payload : Tensor
        ``[blocks, lanes]`` int64, ``0 <= payload < 2^32 - 2^16``: comes back from `decode` at no cost.

    Returns
    -------
    EntropyCoded
        On the device of ``symbols``.

    Raises
    ------
    ShapeError
        If a shape, dtype or device is another.
    InputError
        If a row has no table or, on a CPU, a symbol has frequency 0 or a payload is out of range. On other
        devices these checks would wait for the device: the block's result is undefined there.
    """
    if symbols.dim() != 3 or symbols.dtype != torch.uint8:
        raise ShapeError(f"symbols must be uint8 [blocks, lanes, steps], got {_describe(symbols)}")
    blocks, lanes, steps = symbols.shape
    if payload.shape != (blocks, lanes) or payload.dtype != torch.int64 or payload.device != symbols.device:
        raise ShapeError(
            f"payload must be int64 [{blocks}, {lanes}] on {symbols.device}, got {_describe(payload)}"
        )
    table_of_step = _check_rows(rows, tables, symbols.device)
    if len(table_of_step) != steps:
        raise ShapeError(f"rows must be [{steps}] for {steps} steps, got {_describe(rows)}")
    checked = symbols.device.type == "cpu"
    if checked and payload.numel():
        low, high = (int(bound) for bound in payload.aminmax())
        if low < 0 or high >= PAYLOAD_LIMIT:
            raise InputError(f"payload must be in 0..{PAYLOAD_LIMIT - 1}, got {low}..{high}")
    state = (payload + LOWEST_STATE).flatten()
    emitted = torch.empty((steps, blocks * lanes), dtype=torch.bool, device=symbols.device)
    words = torch.empty((steps, blocks * lanes), dtype=torch.int16, device=symbols.device)
    by_step = symbols.permute(2, 0, 1).contiguous().view(steps, blocks * lanes)
    row_index = torch.tensor(table_of_step, dtype=torch.int64).to(symbols.device)
    if state.numel():
        _encode_steps(by_step, row_index, tables._encoder, state, emitted, words, checked=checked)
    emitted, words = (part.view(steps, blocks, lanes).transpose(0, 1).flatten() for part in (emitted, words))
    lengths = emitted.view(blocks, steps * lanes).count_nonzero(1).to(torch.int32)
    words = words.index_select(0, emitted.nonzero().squeeze(1))
    return EntropyCoded(words, lengths, state.view(blocks, lanes).to(torch.int32))


def decode(coded: EntropyCoded, rows: Tensor, tables: SymbolTables) -> tuple[Tensor, Tensor]:
    """Undo `encode`.

    Parameters
    ----------
    coded : EntropyCoded
        Blocks coded with the same rows and tables.
    rows : Tensor
        ``[steps]``, any integer dtype: table of each step. On whichever device; a CPU saves waiting.
    tables : SymbolTables
        On the device of ``coded``.

    Returns
    -------
    symbols : Tensor
        ``[blocks, lanes, steps]`` uint8, contiguous.
    payload : Tensor
        ``[blocks, lanes]`` int64.

    Raises
    ------
    ShapeError
        If a shape, dtype or device is another.
    InputError
        If a row has no table or, on a CPU, the parts do not fit together or a block takes another number of
        words than it has. On other devices that check would wait for the device; the result is undefined.
    """
    _check_coded(coded)
    words, lengths, states = coded
    device = words.device
    table_of_step = _check_rows(rows, tables, device)
    (blocks, lanes), steps = states.shape, len(table_of_step)
    state = (states.long() & 0xFFFFFFFF).flatten()
    if device.type == "cpu":
        if bool((lengths < 0).any()) or int(lengths.sum()) != words.numel():
            raise InputError(
                f"coded blocks are damaged: lengths count {int(lengths.sum())} words of {words.numel()}"
            )
        if bool((state < LOWEST_STATE).any()):
            raise InputError(f"coded blocks are damaged: a state is below {LOWEST_STATE}")
    # A word's index counts from 1; the zeros behind the last catch whatever a damaged block takes too much.
    stream = torch.zeros(1 + words.numel() + steps * lanes, dtype=torch.int64, device=device)
    stream[1 : 1 + words.numel()] = words.long() & 0xFFFF
    ends = lengths.long().clamp(min=0).cumsum(0).clamp_(max=words.numel())
    taken = torch.nn.functional.pad(ends, (1, 0))[:blocks, None].clone()
    by_step = torch.empty((steps, blocks * lanes), dtype=torch.uint8, device=device)
    if state.numel():
        _decode_steps(stream, table_of_step, tables._decoder, tables.symbol_of_slot, state, taken, by_step)
    if device.type == "cpu" and not torch.equal(taken[:, 0], ends):
        block = int((taken[:, 0] != ends).nonzero()[0, 0])
        excess = int(taken[block, 0] - ends[block])
        raise InputError(
            f"coded block {block} is damaged or was coded with other rows or tables: decoding takes "
            f"{int(lengths[block]) + excess} words, it has {int(lengths[block])}"
        )
    symbols = by_step.view(steps, blocks, lanes).permute(1, 2, 0).contiguous()
    return symbols, state.view(blocks, lanes) - LOWEST_STATE


def concatenate(parts: Sequence[EntropyCoded]) -> EntropyCoded:
    """Join blocks of the same number of lanes.

    Raises
    ------
    ShapeError
        If there are no parts or their numbers of lanes differ.
    """
    lanes = {part.states.shape[-1] for part in parts}
    if len(lanes) != 1:
        raise ShapeError(
            f"parts must be one or more, all of the same lanes, got {len(parts)} of {sorted(lanes)}"
        )
    words, lengths, states = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return EntropyCoded(words, lengths, states)


def select(coded: EntropyCoded, blocks: Tensor) -> EntropyCoded:
    """Copy blocks.

    Parameters
    ----------
    coded : EntropyCoded
        Blocks to choose from.
    blocks : Tensor
        ``[chosen]`` int64 on the device of ``coded``: which, in any order, repeats allowed.

    Raises
    ------
    ShapeError
        If a shape, dtype or device is another.
    InputError
        On a CPU, if there is no such block.
    """
    _check_coded(coded)
    words, lengths, states = coded
    if blocks.dim() != 1 or blocks.dtype != torch.int64 or blocks.device != words.device:
        raise ShapeError(f"blocks must be int64 [chosen] on {words.device}, got {_describe(blocks)}")
    if blocks.device.type == "cpu" and blocks.numel():
        low, high = (int(bound) for bound in blocks.aminmax())
        if low < 0 or high >= lengths.numel():
            raise InputError(f"blocks must be in 0..{lengths.numel() - 1}, got {low}..{high}")
    chosen = lengths.index_select(0, blocks)
    counts = chosen.long()
    starts = (lengths.long().cumsum(0) - lengths).index_select(0, blocks)
    index = torch.repeat_interleave(starts - (counts.cumsum(0) - counts), counts)
    index += torch.arange(index.numel(), device=index.device)
    return EntropyCoded(words.index_select(0, index), chosen, states.index_select(0, blocks))


# Inference mode takes a quarter off the time of a small operation. Tensors that get out are made outside.
@torch.inference_mode()
def _encode_steps(
    symbols: Tensor,
    rows: Tensor,
    encoder: tuple[Tensor, Tensor],
    state: Tensor,
    emitted: Tensor,
    words: Tensor,
    *,
    checked: bool,
) -> None:
    """Code ``symbols`` ``[steps, n]``, the last step first; fill ``emitted``, ``words``, ``state``."""
    steps, n = symbols.shape
    chunk = max(1, _CHUNK_SYMBOLS // n)
    # Row t + 1 of the chunk is the state ahead of coding its step t, row t the one after it.
    states = torch.empty((chunk + 1, n), dtype=torch.int64, device=state.device)
    renormalised, quotient = torch.empty_like(state), torch.empty_like(state)
    for end in range(steps, 0, -chunk):
        begin = max(0, end - chunk)
        index = (symbols[begin:end].long() + MAX_ALPHABET * rows[begin:end, None]).flatten()
        frequency, start = (part.index_select(0, index).view(-1, n) for part in encoder)
        if checked and not bool(frequency.all()):
            step, place = (int(i) for i in (frequency == 0).nonzero()[0])
            raise InputError(
                f"symbol {int(symbols[begin + step, place])} at step {begin + step} has frequency 0 in table "
                f"{int(rows[begin + step])}; give all symbols that occur a frequency"
            )
        # From this state on, coding would reach 2^32: a word goes out first.
        limit = frequency << (32 - PRECISION_BITS)
        complement = TOTAL - frequency
        rest = states[: end - begin + 1]
        rest[-1].copy_(state)
        mask = emitted[begin:end]
        per_step = zip(
            *(part.unbind(0) for part in (rest[1:], rest[:-1], mask, limit, frequency, complement, start)),
            strict=True,
        )
        for before, after, emit, most, freq, comp, first in reversed(list(per_step)):
            torch.ge(before, most, out=emit)
            torch.bitwise_right_shift(before, _WORD, out=renormalised)
            torch.where(emit, renormalised, before, out=renormalised)
            torch.div(renormalised, freq, rounding_mode="trunc", out=quotient)
            # 2^14 * (x div f) + x mod f + start, the remainder being x - f * (x div f)
            torch.addcmul(renormalised, quotient, comp, out=after)
            after.add_(first)
        words[begin:end] = rest[1:]  # the low 16 bits
        state.copy_(rest[0])


@torch.inference_mode()
def _decode_steps(
    stream: Tensor,
    rows: Sequence[int],
    decoder: Sequence[Tensor],
    symbol_of_slot: Tensor,
    state: Tensor,
    taken: Tensor,
    symbols: Tensor,
) -> None:
    """Fill ``symbols`` ``[steps, n]``, ``state`` and ``taken``, each block's last word, in place."""
    steps, n = symbols.shape
    blocks = taken.shape[0]
    chunk = max(1, _CHUNK_SYMBOLS // n)
    slots = torch.empty((min(chunk, steps), n), dtype=torch.int64, device=state.device)
    row_starts = torch.tensor(rows, dtype=torch.int64).to(state.device)[:, None] * TOTAL
    entry = torch.empty(n, dtype=torch.complex128, device=state.device)
    frequency, offset = torch.view_as_real(entry).view(torch.int64).unbind(-1)
    word = torch.empty_like(state)
    low = torch.empty(n, dtype=torch.bool, device=state.device)
    low_of_block = low.view(blocks, -1)
    counts = torch.empty((blocks, n // blocks), dtype=torch.int64, device=state.device)
    # Two in turn: the last column of one is where the next step starts.
    indices = torch.empty((2, *counts.shape), dtype=torch.int64, device=state.device)
    turns = cycle([(index, index.view(-1), index[:, -1:]) for index in indices])
    last = taken
    for begin in range(0, steps, chunk):
        end = min(steps, begin + chunk)
        slots = slots[: end - begin]
        for slot, row, (index, flat, next_last) in zip(slots.unbind(0), rows[begin:end], turns, strict=False):
            torch.bitwise_and(state, _SLOT_MASK, out=slot)
            torch.index_select(decoder[row], 0, slot, out=entry)
            torch.bitwise_right_shift(state, _PRECISION, out=state)
            torch.addcmul(offset, state, frequency, out=state)
            torch.lt(state, _LOWEST, out=low)
            torch.cumsum(low_of_block, 1, out=counts)
            torch.add(last, counts, out=index)
            torch.index_select(stream, 0, flat, out=word)
            torch.add(word, state, alpha=LOWEST_STATE, out=word)
            torch.where(low, word, state, out=state)
            last = next_last
        slots += row_starts[begin:end]
        torch.index_select(symbol_of_slot.view(-1), 0, slots.view(-1), out=symbols[begin:end].view(-1))
    taken.copy_(last)


def _round_to_total(probabilities: Tensor, used: Tensor) -> Tensor:
    """Round ``[tables, alphabet]`` float64 of row sums 1 to int32 that sum to 2^14, at least 1 where used.

    Code length is convex in each frequency, so that moving single counts to where they save most, until no
    move saves anything, ends at the least expected code length.
    """
    frequencies = (probabilities * TOTAL).floor().clamp(min=1) * used
    first = torch.arange(len(frequencies))
    while True:
        excess = frequencies.sum(1) - TOTAL
        gain = probabilities * torch.log2((frequencies + 1) / frequencies)
        gain[~used] = -torch.inf
        loss = probabilities * torch.log2(frequencies / (frequencies - 1))
        loss[frequencies <= 1] = torch.inf
        most, grow = gain.max(1)
        least, shrink = loss.min(1)
        # The margin keeps rounding errors from moving a count to and fro for ever.
        swap = (excess == 0) & (most > least * (1 + 1e-9))
        growing, shrinking = swap | (excess < 0), swap | (excess > 0)
        if not bool((growing | shrinking).any()):
            return frequencies.to(torch.int32)
        frequencies[first, grow] += growing.double()
        frequencies[first, shrink] -= shrinking.double()


def _check_rows(rows: Tensor, tables: SymbolTables, device: torch.device) -> list[int]:
    if tables.frequencies.device != device:
        raise ShapeError(f"tables must be on {device}, got {tables.frequencies.device}; use tables.to")
    if rows.dim() != 1 or rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool:
        raise ShapeError(f"rows must be an integer tensor [steps], got {_describe(rows)}")
    table_of_step = rows.tolist()
    num_tables = tables.frequencies.shape[0]
    if table_of_step and not 0 <= min(table_of_step) <= max(table_of_step) < num_tables:
        raise InputError(
            f"rows must be in 0..{num_tables - 1}, got {min(table_of_step)}..{max(table_of_step)}"
        )
    return table_of_step


def _check_coded(coded: EntropyCoded) -> None:
    words, lengths, states = coded
    if (
        (words.dtype, lengths.dtype, states.dtype) != (torch.int16, torch.int32, torch.int32)
        or (words.dim(), lengths.dim(), states.dim()) != (1, 1, 2)
        or lengths.shape[0] != states.shape[0]
        or not words.device == lengths.device == states.device
    ):
        raise ShapeError(
            "coded blocks must be words int16 [total_words], lengths int32 [blocks] and states int32 "
            f"[blocks, lanes] on one device, got {', '.join(_describe(part) for part in coded)}"
        )


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
