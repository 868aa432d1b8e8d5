"""Records with room for more are the records."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from aquakv.cache.records import LEAST_SPARE_BLOCKS, SPARE_BLOCKS, Chunk, Outliers, Records
from aquakv.codec import EncodedPages, EncodedTokens
from aquakv.evaluation.bench import allocated

BLOCK, EACH = 128, 2
RANDOM = torch.Generator().manual_seed(0)


def normal(count):
    return torch.randn(count, 2, 4, generator=RANDOM)


def chunk_of(pages, outliers=()):
    codes = [
        EncodedPages(torch.randint(256, (pages * EACH, size), dtype=torch.uint8, generator=RANDOM))
        for size in (7, 5)
    ]
    kept = None
    if outliers:
        index = torch.tensor(outliers, dtype=torch.int32)
        kept = Outliers(index, normal(len(index)), normal(len(index)))
    return Chunk(pages, EncodedTokens(*codes), kept)


def same(records, chunks):
    held = records.chunk
    for place, kind in enumerate(held.encoded):
        assert torch.equal(kind.records, torch.cat([chunk.encoded[place].records for chunk in chunks]))
    starts = torch.tensor([0, *(chunk.pages * BLOCK for chunk in chunks)]).cumsum(0)[:-1].tolist()
    expected = Outliers.join([chunk.outliers for chunk in chunks], starts)
    if expected is None:
        assert held.outliers is None
    else:
        for one, other in zip(held.outliers.tensors, expected.tensors, strict=True):
            assert torch.equal(one, other)
    assert held.pages == records.blocks == sum(chunk.pages for chunk in chunks)


def first_block(chunk):
    """Return codes and outliers of a chunk's first block."""
    codes = EncodedTokens(*(EncodedPages(kind.records[:EACH]) for kind in chunk.encoded))
    return codes, chunk.outliers.select(torch.tensor([0]), BLOCK)


@pytest.mark.parametrize("most", [0, 3])
def test_what_is_appended_is_there(most):
    chunks = [chunk_of(5, [0, 5] if most else ())]
    records = Records.of(chunks[0], BLOCK)
    assert (records.block_records, records.capacity, records.room) == (EACH, 5, 0)
    # Its own bytes, no one else's.
    assert records.footprint()[0] == 5 * EACH * 12
    assert records.footprint()[2] == 0
    records.make_room(2, most, normal(1), normal(1))
    assert (records.capacity, records.room) == (5 + 2 * LEAST_SPARE_BLOCKS, 2 * LEAST_SPARE_BLOCKS)
    before = [tensor.data_ptr() for tensor in records.tensors]
    assert len(before) == (5 if most else 2)
    while records.room >= 2:
        same(records, chunks)
        chunks.append(chunk_of(2, [3, 4, 130] if most else ()))
        records.append(chunks[-1])
        records.make_room(0, most, normal(1), normal(1))
    same(records, chunks)
    assert [tensor.data_ptr() for tensor in records.tensors] == before
    codes, outliers, spare = records.footprint()
    assert spare == sum(tensor.nbytes for tensor in records.tensors) - codes - outliers
    chunks.append(chunk_of(70))  # as a long pass adds them
    records.append(chunks[-1])
    same(records, chunks)
    assert records.room == 0
    records.make_room(1, most, normal(1), normal(1))
    assert records.room == max(LEAST_SPARE_BLOCKS, records.blocks // SPARE_BLOCKS)
    same(records, chunks)


def test_blocks_may_have_no_outliers_yet():
    records = Records.of(chunk_of(1), BLOCK)
    records.make_room(1, 2, normal(1), normal(1))
    assert records.chunk.outliers is None
    assert len(records.places.index) == 2 * LEAST_SPARE_BLOCKS
    assert records.places.keys.shape == (2 * LEAST_SPARE_BLOCKS, 2, 4)


def test_room_is_a_small_part():
    records = Records.of(chunk_of(1000), BLOCK)
    records.make_room(8, 0, normal(1), normal(1))
    assert records.capacity == 1050
    records.make_room(8, 0, normal(1), normal(1))
    assert records.capacity == 1050


def test_one_buffer_moves_at_a_time():
    chunk, one = chunk_of(2000), normal(1)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        records = Records.of(chunk, BLOCK)
        records.make_room(1, 0, one, one)
    peak = max(level for _, level in allocated(profiler))
    assert peak <= 1.01 * (chunk.encoded.nbytes + records.keys.nbytes)


def test_selected_blocks_are_copies_with_the_same_room():
    first, second = chunk_of(2, [5, 200]), chunk_of(1, [7])
    records = Records.of(first, BLOCK)
    records.make_room(1, 1, normal(1), normal(1))
    records.append(second)
    chosen = records.select(torch.tensor([2, 0, 2]))
    assert (chosen.blocks, chosen.room) == (3, LEAST_SPARE_BLOCKS - 1)
    same(chosen, [second, Chunk(1, *first_block(first)), second])
    assert chosen.chunk.outliers.index.tolist() == [7, 128 + 5, 256 + 7]
    assert torch.equal(chosen.chunk.encoded.keys.records[:EACH], second.encoded.keys.records)
    before = [tensor.data_ptr() for tensor in chosen.tensors]
    assert not set(before) & {tensor.data_ptr() for tensor in records.tensors}
    chosen.make_room(1, 1, normal(1), normal(1))
    assert [tensor.data_ptr() for tensor in chosen.tensors] == before
    twice = records.select(torch.tensor([1, 1]))
    assert twice.chunk.outliers.index.tolist() == [72, 128 + 72]
    assert records.select(torch.tensor([], dtype=torch.long)) is None
