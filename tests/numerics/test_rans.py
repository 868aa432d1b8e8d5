import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aquakv.errors import InputError, ShapeError
from aquakv.numerics.rans import (
    LOWEST_STATE,
    PAYLOAD_LIMIT,
    TOTAL,
    EntropyCoded,
    SymbolTables,
    concatenate,
    decode,
    encode,
    select,
)


def laplacian_tables(num_tables: int, alphabet: int) -> SymbolTables:
    """Tables from nearly deterministic to nearly flat, all symbols used."""
    spreads = torch.logspace(-1.5, 2, num_tables, dtype=torch.float64)[:, None]
    distance = (torch.arange(alphabet, dtype=torch.float64) - alphabet // 2).abs()
    return SymbolTables.from_probabilities(
        torch.exp(-distance / spreads), torch.ones(num_tables, alphabet, dtype=torch.bool)
    )


def draw(tables: SymbolTables, rows: torch.Tensor, blocks: int, lanes: int, seed: int = 0) -> torch.Tensor:
    """Symbols that follow their tables."""
    generator = torch.Generator().manual_seed(seed)
    shape = (blocks * lanes, rows.numel())
    slots = torch.randint(0, TOTAL, shape, generator=generator)
    return tables.symbol_of_slot[rows.long(), slots].view(blocks, lanes, rows.numel())


def random_payload(blocks: int, lanes: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, PAYLOAD_LIMIT, (blocks, lanes), generator=generator)


def example(blocks=5, lanes=7, steps=40, num_tables=6, alphabet=31, seed=0):
    tables = laplacian_tables(num_tables, alphabet)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, num_tables, (steps,), generator=generator, dtype=torch.int32)
    symbols = draw(tables, rows, blocks, lanes, seed)
    payload = random_payload(blocks, lanes, seed)
    return symbols, rows, tables, payload, encode(symbols, rows, tables, payload)


def decode_by_definition(coded: EntropyCoded, rows: list[int], frequencies: list[list[int]]):
    """The head of the module, in whole numbers."""
    words, decoded, payload = [word & 0xFFFF for word in coded.words.tolist()], [], []
    for length, states in zip(coded.lengths.tolist(), coded.states.tolist(), strict=True):
        stream, words = words[:length], words[length:]
        states = [state & 0xFFFFFFFF for state in states]
        out = [[] for _ in states]
        for row in rows:
            for lane, x in enumerate(states):
                slot, symbol, start = x % TOTAL, 0, 0
                while start + frequencies[row][symbol] <= slot:
                    start += frequencies[row][symbol]
                    symbol += 1
                x = frequencies[row][symbol] * (x // TOTAL) + slot - start
                states[lane] = (x << 16) + stream.pop(0) if x < LOWEST_STATE else x
                out[lane].append(symbol)
        assert not stream
        decoded.append(out)
        payload.append([x - LOWEST_STATE for x in states])
    assert not words
    return decoded, payload


@st.composite
def frequency_tables(draw_from):
    """Tables with unused symbols, and some where one symbol takes all."""
    num_tables, alphabet = draw_from(st.integers(1, 4)), draw_from(st.sampled_from((1, 2, 3, 17, 255, 256)))
    weights = draw_from(
        st.lists(
            st.lists(st.integers(0, 40), min_size=alphabet, max_size=alphabet).filter(any),
            min_size=num_tables,
            max_size=num_tables,
        )
    )
    values = torch.tensor(weights, dtype=torch.float64)
    return SymbolTables.from_probabilities(torch.where(values > 0, torch.exp2(values), 0.0))


@settings(max_examples=60, deadline=None)
@given(
    tables=frequency_tables(),
    blocks=st.integers(0, 3),
    lanes=st.integers(1, 5),
    steps=st.integers(0, 20),
    extreme=st.sampled_from((None, 0, PAYLOAD_LIMIT - 1)),
    seed=st.integers(0, 1000),
)
def test_round_trip_and_the_format(tables, blocks, lanes, steps, extreme, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, len(tables.frequencies), (steps,), generator=generator).to(torch.int16)
    # Every symbol that can be coded as often as any other, so that rare ones occur.
    chances = (tables.frequencies > 0).double()[rows.long()]
    symbols = torch.empty(blocks, lanes, steps, dtype=torch.uint8)
    if symbols.numel():
        drawn = torch.multinomial(chances, blocks * lanes, replacement=True, generator=generator)
        symbols = drawn.T.reshape(blocks, lanes, steps).to(torch.uint8)
    payload = random_payload(blocks, lanes, seed)
    if extreme is not None:
        payload.fill_(extreme)
    coded = encode(symbols, rows, tables, payload)
    assert (coded.words.dtype, coded.lengths.dtype, coded.states.dtype) == (
        torch.int16,
        torch.int32,
        torch.int32,
    )
    assert coded.states.shape == (blocks, lanes)
    restored, returned = decode(coded, rows, tables)
    assert (restored.dtype, returned.dtype) == (torch.uint8, torch.int64)
    assert torch.equal(restored, symbols)
    assert torch.equal(returned, payload)
    expected = decode_by_definition(coded, rows.tolist(), tables.frequencies.tolist())
    assert expected == (symbols.tolist(), payload.tolist())


@pytest.mark.parametrize("chunk", [1, 15, 16 * 35, 1 << 16])
def test_chunks_leave_no_trace(chunk, monkeypatch):
    symbols, rows, tables, payload, coded = example(blocks=5, lanes=7, steps=40)
    monkeypatch.setattr("aquakv.numerics.rans._CHUNK_SYMBOLS", chunk)
    again = encode(symbols, rows, tables, payload)
    assert all(torch.equal(a, b) for a, b in zip(coded, again, strict=True))
    restored, returned = decode(coded, rows, tables)
    assert torch.equal(restored, symbols)
    assert torch.equal(returned, payload)


def test_strides_do_not_matter():
    symbols, rows, tables, payload, coded = example()
    spread = torch.full((5, 14, 80), 255, dtype=torch.uint8)
    spread[:, ::2, ::2] = symbols
    again = encode(spread[:, ::2, ::2], rows.repeat_interleave(2)[::2], tables, payload.T.contiguous().T)
    assert all(torch.equal(a, b) for a, b in zip(coded, again, strict=True))


def test_inputs_are_not_changed_and_outputs_can_be():
    symbols, rows, tables, payload, coded = example()
    kept = [tensor.clone() for tensor in (symbols, payload, *coded)]
    restored, returned = decode(coded, rows, tables)
    assert all(torch.equal(a, b) for a, b in zip(kept, (symbols, payload, *coded), strict=True))
    for tensor in (restored, returned, *coded):
        assert not tensor.is_inference()


def log2_of_states(states: torch.Tensor) -> float:
    return float((states.long() & 0xFFFFFFFF).double().log2().sum())


@pytest.mark.parametrize(("blocks", "lanes", "steps"), [(1, 32, 1000), (4, 32, 700), (2, 1, 4000)])
def test_size_is_the_ideal_one(blocks, lanes, steps):
    symbols, rows, tables, payload, coded = example(blocks, lanes, steps, num_tables=45, alphabet=255)
    ideal = float(tables.bits[rows.long(), symbols.long()].double().sum())
    paid = 16 * coded.words.numel() + log2_of_states(coded.states) - float((payload + 65536).log2().sum())
    assert ideal * 0.999 - 16 * blocks < paid < ideal * 1.001 + 16 * blocks
    # With nothing to carry, the states are the only excess, and never more than their upper halves.
    empty = encode(symbols, rows, tables, torch.zeros_like(payload))
    assert 16 * empty.words.numel() < ideal * 1.001 + 16 * blocks
    assert 16 * empty.words.numel() > ideal * 0.999 - 16 * blocks * lanes


def test_a_certain_symbol_costs_nothing():
    tables = SymbolTables(torch.tensor([[0, TOTAL, 0]], dtype=torch.int32))
    payload = random_payload(2, 3)
    symbols = torch.ones(2, 3, 50, dtype=torch.uint8)
    coded = encode(symbols, torch.zeros(50, dtype=torch.int16), tables, payload)
    assert coded.words.numel() == 0
    assert torch.equal(coded.states.long() & 0xFFFFFFFF, payload + LOWEST_STATE)


@pytest.mark.parametrize("frequency", [1, 3, 8192, TOTAL - 1])
@pytest.mark.parametrize("first", [True, False])
def test_a_word_goes_out_exactly_when_the_state_would_overflow(frequency, first):
    counts = [frequency, TOTAL - frequency] if first else [TOTAL - frequency, frequency]
    tables = SymbolTables(torch.tensor([counts], dtype=torch.int32))
    payload = (frequency << 18) - LOWEST_STATE + torch.tensor([[-1], [0], [1]])
    symbols = torch.full((3, 1, 1), 0 if first else 1, dtype=torch.uint8)
    rows = torch.zeros(1, dtype=torch.int32)
    coded = encode(symbols, rows, tables, payload)
    assert coded.lengths.tolist() == [0, 1, 1]
    restored, returned = decode(coded, rows, tables)
    assert torch.equal(restored, symbols)
    assert torch.equal(returned, payload)


def test_blocks_are_independent():
    symbols, rows, tables, payload, coded = example(blocks=6)
    singles = [encode(symbols[b : b + 1], rows, tables, payload[b : b + 1]) for b in range(6)]
    joined = concatenate(singles)
    assert all(torch.equal(a, b) for a, b in zip(coded, joined, strict=True))
    for b in range(6):
        alone = select(coded, torch.tensor([b]))
        assert all(torch.equal(a, s) for a, s in zip(alone, singles[b], strict=True))


@pytest.mark.parametrize("chosen", [[], [3], [5, 0, 0, 2, 5], [5, 4, 3, 2, 1, 0]])
def test_select(chosen):
    symbols, rows, tables, payload, coded = example(blocks=6)
    index = torch.tensor(chosen, dtype=torch.int64)
    restored, returned = decode(select(coded, index), rows, tables)
    assert torch.equal(restored, symbols[index])
    assert torch.equal(returned, payload[index])


def test_concatenate():
    symbols, rows, tables, payload, coded = example(blocks=6)
    none = select(coded, torch.empty(0, dtype=torch.int64))
    restored, returned = decode(concatenate([none, coded, coded]), rows, tables)
    assert torch.equal(restored, symbols.repeat(2, 1, 1))
    assert torch.equal(returned, payload.repeat(2, 1))
    with pytest.raises(ShapeError, match="one or more"):
        concatenate([])
    with pytest.raises(ShapeError, match="same lanes"):
        concatenate([coded, example(lanes=8)[-1]])


def test_truncated_blocks_raise():
    *_, rows, tables, _, coded = example()
    with pytest.raises(InputError, match="lengths count"):
        decode(coded._replace(words=coded.words[:-1]), rows, tables)
    with pytest.raises(InputError, match="damaged"):
        decode(coded._replace(words=torch.cat([coded.words, coded.words[:1]])), rows, tables)
    for block in range(5):
        end = int(coded.lengths[: block + 1].sum())
        lengths = coded.lengths.clone()
        lengths[block] -= 1
        words = torch.cat([coded.words[: end - 1], coded.words[end:]])
        with pytest.raises(InputError, match=f"coded block {block} is damaged"):
            decode(coded._replace(words=words, lengths=lengths), rows, tables)
    lengths = coded.lengths.clone()
    lengths[0] = -1
    with pytest.raises(InputError, match="damaged"):
        decode(coded._replace(lengths=lengths), rows, tables)
    states = coded.states.clone()
    states[2, 3] = LOWEST_STATE - 1
    with pytest.raises(InputError, match="a state is below"):
        decode(coded._replace(states=states), rows, tables)


@settings(max_examples=100, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 0xFFFF), states=st.booleans())
def test_altered_bits_never_pass_for_the_original(place, flip, states):
    symbols, rows, tables, payload, coded = example()
    damaged = EntropyCoded(*(tensor.clone() for tensor in coded))
    part = (damaged.states if states else damaged.words).view(-1)
    part[int(place * part.numel())] ^= torch.tensor(flip).to(part.dtype)
    try:
        restored, returned = decode(damaged, rows, tables)
    except InputError:
        return
    assert int(restored.max()) < tables.frequencies.shape[1]
    assert not (torch.equal(restored, symbols) and torch.equal(returned, payload))


def test_noise_decodes_or_raises():
    *_, rows, tables, _, coded = example(blocks=1)
    generator = torch.Generator().manual_seed(0)
    outcomes = set()
    for _ in range(20):
        words = torch.randint(-(1 << 15), 1 << 15, coded.words.shape, generator=generator).to(torch.int16)
        try:
            decode(coded._replace(words=words), rows, tables)
            outcomes.add("decoded")
        except InputError:
            outcomes.add("raised")
    assert "raised" in outcomes


def test_wrong_rows_or_tables_are_noticed():
    *_, rows, tables, _, coded = example(steps=400)
    with pytest.raises(InputError, match="other rows or tables"):
        decode(coded, rows.flip(0), tables)
    with pytest.raises(InputError, match="other rows or tables"):
        decode(coded, rows[:-5], tables)


def test_what_cannot_be_coded_is_refused():
    symbols, rows, tables, payload, _ = example(alphabet=31)
    bad = symbols.clone()
    bad[1, 2, 3] = 31
    with pytest.raises(InputError, match=rf"symbol 31 at step 3 has frequency 0 in table {int(rows[3])}"):
        encode(bad, rows, tables, payload)
    without = SymbolTables(torch.tensor([[0, TOTAL]], dtype=torch.int32))
    with pytest.raises(InputError, match="symbol 0 at step 0 has frequency 0"):
        encode(torch.zeros(1, 1, 1, dtype=torch.uint8), torch.zeros(1).int(), without, payload[:1, :1])
    for value in (-1, PAYLOAD_LIMIT):
        wrong = payload.clone()
        wrong[1, 1] = value
        with pytest.raises(InputError, match="payload must be in"):
            encode(symbols, rows, tables, wrong)
    for row in (-1, 6):
        with pytest.raises(InputError, match=r"rows must be in 0\.\.5"):
            encode(symbols, torch.full_like(rows, row), tables, payload)


def test_shapes_and_dtypes_are_checked():
    symbols, rows, tables, payload, coded = example()
    with pytest.raises(ShapeError, match="symbols must be uint8"):
        encode(symbols.int(), rows, tables, payload)
    with pytest.raises(ShapeError, match="payload must be int64"):
        encode(symbols, rows, tables, payload[:, :-1])
    with pytest.raises(ShapeError, match="rows must be"):
        encode(symbols, rows[1:], tables, payload)
    with pytest.raises(ShapeError, match="rows must be an integer"):
        decode(coded, rows.float(), tables)
    with pytest.raises(ShapeError, match="coded blocks must be"):
        decode(coded._replace(lengths=coded.lengths[1:]), rows, tables)
    with pytest.raises(ShapeError, match="blocks must be int64"):
        select(coded, torch.tensor([0], dtype=torch.int32))
    for block in (-1, 5):
        with pytest.raises(InputError, match=r"blocks must be in 0\.\.4"):
            select(coded, torch.tensor([block]))


def test_tables_are_checked():
    with pytest.raises(ShapeError, match="frequencies must be int32"):
        SymbolTables(torch.full((1, 4), TOTAL // 4))
    with pytest.raises(ShapeError, match="frequencies must be int32"):
        SymbolTables(torch.full((1, 512), TOTAL // 512, dtype=torch.int32))
    with pytest.raises(InputError, match="table 1"):
        SymbolTables(torch.tensor([[TOTAL, 0], [TOTAL, 1]], dtype=torch.int32))
    with pytest.raises(InputError, match="not be negative"):
        SymbolTables(torch.tensor([[TOTAL + 1, -1]], dtype=torch.int32))
    used = torch.ones(1, 2, dtype=torch.bool)
    for values in ([0.0, 0.0], [math.nan, 1.0], [-0.1, 1.1], [math.inf, 1.0]):
        with pytest.raises(InputError, match="probabilities must be"):
            SymbolTables.from_probabilities(torch.tensor([values], dtype=torch.float64), used)
    with pytest.raises(ShapeError, match="probabilities must be float64"):
        SymbolTables.from_probabilities(torch.ones(1, 2))
    with pytest.raises(ShapeError, match="used must be bool"):
        SymbolTables.from_probabilities(torch.ones(1, 2, dtype=torch.float64), torch.ones(1, 3).bool())


def test_what_tables_derive():
    tables = SymbolTables(torch.tensor([[4096, 0, 8192, 4096]], dtype=torch.int32))
    assert tables.cumulative.tolist() == [[0, 4096, 4096, 12288]]
    assert tables.bits.tolist() == [[2.0, math.inf, 1.0, 2.0]]
    slots = tables.symbol_of_slot
    assert slots.dtype == torch.uint8
    assert slots[0, [0, 4095, 4096, 12287, 12288, 16383]].tolist() == [0, 0, 2, 2, 3, 3]
    assert tables.to("cpu") is tables


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.one_of(st.just(0.0), st.floats(1e-9, 1e6)), min_size=1, max_size=256).filter(any),
    spare=st.booleans(),
)
def test_rounding_of_probabilities(weights, spare):
    values = torch.tensor([weights], dtype=torch.float64)
    used = torch.ones_like(values, dtype=torch.bool) if spare else None
    frequencies = SymbolTables.from_probabilities(values, used).frequencies[0]
    coded = torch.ones(len(weights), dtype=torch.bool) if spare else values[0] > 0
    assert int(frequencies.sum()) == TOTAL
    assert bool((frequencies[coded] >= 1).all())
    assert not bool(frequencies[~coded].any())
    # No count is better placed elsewhere.
    share = (values / values.sum())[0][coded]
    counts = frequencies[coded].double()
    gain = share * torch.log2((counts + 1) / counts)
    loss = torch.where(counts > 1, share * torch.log2(counts / (counts - 1)), torch.inf)
    assert float(gain.max()) <= float(loss.min()) * (1 + 1e-6)


def test_unused_symbols_have_no_share():
    values = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64)
    used = torch.tensor([[True, False, True]])
    frequencies = SymbolTables.from_probabilities(values, used).frequencies
    assert frequencies.tolist() == [[10923, 0, 5461]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_devices_agree():
    symbols, rows, tables, payload, coded = example(blocks=3, lanes=32, steps=200)
    there = tables.to("cuda")
    again = encode(symbols.cuda(), rows.cuda(), there, payload.cuda())
    assert all(torch.equal(a, b.cpu()) for a, b in zip(coded, again, strict=True))
    restored, returned = decode(again, rows, there)
    assert torch.equal(restored.cpu(), symbols)
    assert torch.equal(returned.cpu(), payload)
    index = torch.tensor([2, 0, 0])
    chosen = select(again, index.cuda())
    assert all(torch.equal(a, b.cpu()) for a, b in zip(select(coded, index), chosen, strict=True))
    # Unchecked there, but harmless: whatever the lengths and words say, no index leaves its tensor.
    hostile = EntropyCoded(again.words.flip(0), again.lengths * 1000, again.states ^ 0x7FFFFFFF)
    assert int(decode(hostile, rows, there)[0].max()) < 31
