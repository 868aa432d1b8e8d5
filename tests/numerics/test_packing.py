import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aquakv.errors import ConfigError, ShapeError
from aquakv.numerics.packing import byte_table, pack, packed_words, unpack, unpack_lookup

WIDTHS = range(1, 9)
LENGTHS = (0, 1, 2, 3, 5, 7, 8, 9, 16, 17, 31, 32, 33, 63, 96, 100, 192)


def random_codes(*shape: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << width, shape, generator=generator).to(torch.uint8)


def words_by_definition(codes: list[int], width: int) -> list[int]:
    stream = sum(code << (j * width) for j, code in enumerate(codes))
    words = [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(-(-len(codes) * width // 32))]
    return [word - (1 << 32) if word >> 31 else word for word in words]


@settings(max_examples=150, deadline=None)
@given(data=st.data(), width=st.integers(1, 8))
def test_pack_follows_the_format_and_unpack_undoes_it(data, width):
    codes = data.draw(st.lists(st.integers(0, (1 << width) - 1), max_size=70))
    words = pack(torch.tensor(codes, dtype=torch.int64), width)
    assert words.dtype == torch.int32
    assert words.tolist() == words_by_definition(codes, width)
    assert unpack(words, width, len(codes)).tolist() == codes


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("num_codes", LENGTHS)
def test_round_trip_of_batches(width, num_codes):
    codes = random_codes(2, 3, num_codes, width=width)
    words = pack(codes, width)
    assert words.shape == (2, 3, packed_words(num_codes, width))
    restored = unpack(words, width, num_codes)
    assert restored.dtype == torch.uint8
    assert torch.equal(restored, codes)


@pytest.mark.parametrize("width", WIDTHS)
def test_zero_rows(width):
    words = pack(torch.empty(0, 5, dtype=torch.uint8), width)
    assert words.shape == (0, packed_words(5, width))
    assert unpack(words, width, 5).shape == (0, 5)
    assert unpack_lookup(words, width, 5, torch.randn(1 << width, 2)).shape == (0, 10)


@pytest.mark.parametrize("width", WIDTHS)
def test_non_contiguous_input(width):
    codes = random_codes(37, 4, width=width).T
    words = pack(codes, width)
    assert torch.equal(words, pack(codes.contiguous(), width))
    spread = torch.full((words.shape[0] * 2, words.shape[1] * 2), -1, dtype=torch.int32)
    spread[::2, ::2] = words
    assert torch.equal(unpack(spread[::2, ::2], width, 37), codes)


@pytest.mark.parametrize("width", WIDTHS)
def test_pad_bits_are_zero_and_ignored(width):
    codes = random_codes(4, 5, width=width)
    words = pack(codes, width)
    used = 5 * width - 32 * (words.shape[-1] - 1)
    if used < 32:
        assert torch.all((words[:, -1].to(torch.int64) & 0xFFFFFFFF) >> used == 0)
        dirty = words.clone()
        dirty[:, -1] |= -1 << used
        assert torch.equal(unpack(dirty, width, 5), codes)


@pytest.mark.parametrize(
    ("width", "dim", "dtype"),
    [*itertools.product(WIDTHS, (1, 2, 3), (torch.float32, torch.bfloat16)), (4, 2, torch.float64)],
)
def test_lookup_equals_unpack_then_index(width, dim, dtype):
    table = torch.randn(1 << width, dim).to(dtype)
    codes = random_codes(3, 29, width=width)
    words = pack(codes, width)
    expected = table[codes.long()].reshape(3, 29 * dim)
    expanded = byte_table(table, width)
    misaligned = torch.cat([table.new_zeros(1), expanded.reshape(-1)])[1:].view_as(expanded)
    for given_table in (table, expanded, misaligned):
        values = unpack_lookup(words, width, 29, given_table)
        assert values.dtype == dtype
        assert values.is_contiguous()
        assert torch.equal(values, expected)


def test_one_row_without_batch_dimension():
    codes = random_codes(13, width=6)
    assert torch.equal(unpack(pack(codes, 6), 6, 13), codes)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_integer_dtypes(dtype):
    codes = random_codes(11, width=5)
    assert torch.equal(pack(codes.to(dtype), 5), pack(codes, 5))


@pytest.mark.parametrize("width", [0, 9, -1, 2.0, True, None])
def test_bad_width(width):
    with pytest.raises(ConfigError, match="from 1 to 8"):
        pack(torch.zeros(4, dtype=torch.uint8), width)
    with pytest.raises(ConfigError, match="from 1 to 8"):
        packed_words(4, width)
    with pytest.raises(ConfigError, match="from 1 to 8"):
        unpack(torch.zeros(1, dtype=torch.int32), width, 4)


def test_bad_codes():
    with pytest.raises(ShapeError, match=r"0\.\.15, got 0\.\.16"):
        pack(torch.tensor([0, 16]), 4)
    with pytest.raises(ShapeError, match=r"got -1\.\.0"):
        pack(torch.tensor([0, -1]), 4)
    for codes in (torch.zeros(4), torch.tensor(3), torch.zeros(4, dtype=torch.bool)):
        with pytest.raises(ShapeError, match="integer tensor"):
            pack(codes, 4)


def test_bad_words_and_tables():
    words = pack(random_codes(2, 9, width=4), 4)
    with pytest.raises(ShapeError, match=r"int32 \[\.\.\., 3\]"):
        unpack(words, 4, 17)
    with pytest.raises(ShapeError, match="int32"):
        unpack(words.to(torch.int64), 4, 9)
    with pytest.raises(ConfigError, match="negative"):
        unpack(words, 4, -1)
    for table in (torch.randn(15, 2), torch.randn(16)):
        with pytest.raises(ShapeError, match=r"\[16, dim\]"):
            unpack_lookup(words, 4, 9, table)
    with pytest.raises(ShapeError, match="move it"):
        unpack_lookup(words, 4, 9, torch.empty(16, 2, device="meta"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("width", WIDTHS)
def test_cuda_equals_cpu(width):
    codes = random_codes(5, 29, width=width)
    table = torch.randn(1 << width, 2)
    words = pack(codes.cuda(), width)
    assert torch.equal(words.cpu(), pack(codes, width))
    assert torch.equal(unpack(words, width, 29).cpu(), codes)
    values = unpack_lookup(words, width, 29, table.cuda())
    assert torch.equal(values.cpu(), unpack_lookup(words.cpu(), width, 29, table))
