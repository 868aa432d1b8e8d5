"""Outliers that come block by block are where grouping all of them anew puts them."""

import pytest
import torch

from aquakv.cache.outlier_rows import OutlierRows, Taken
from aquakv.cache.tables import PageTables

BLOCK, MOST, ROOM, ROUNDS = 64, 3, 60, 5


def tables_of(rows, block_rows):
    numbers = torch.zeros(rows, dtype=torch.int64)
    return PageTables(
        torch.zeros(rows, 8), numbers, None, numbers, numbers, torch.tensor(block_rows), [], ROUNDS + 1, 0
    )


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_one_by_one_or_all_at_once(rows, seed):
    """Layers have different numbers of outliers, also none, and rows get one block, two or none."""
    random = torch.Generator().manual_seed(seed)
    sources = [torch.zeros(ROOM, dtype=torch.int32) for _ in range(4)]
    counts, block_rows, tables = [0] * 4, list(range(rows)), tables_of(rows, list(range(rows)))
    held = [tables.group(source, 0, BLOCK, 3 * MOST) for source in sources]
    for _ in range(ROUNDS - 1):
        new = sorted(torch.randint(rows, (rows,), generator=random).tolist())
        which = torch.zeros(4, len(new), BLOCK, dtype=torch.bool)
        for block in which.flatten(0, 1):
            block[
                torch.randperm(BLOCK, generator=random)[: int(torch.randint(MOST + 1, (), generator=random))]
            ] = True
        which[int(torch.randint(4, (), generator=random))] = False
        which = which.flatten(1)
        taken = Taken.read(which)
        for layer, source in enumerate(sources):
            own = which[layer].nonzero().squeeze(1)
            assert taken.counts[layer] == len(own)
            source[counts[layer] : counts[layer] + len(own)] = own + len(block_rows) * BLOCK
            counts[layer] += len(own)
        block_rows += new
        tables = tables_of(rows, block_rows)
        OutlierRows.extend(held, taken, new, BLOCK)
        for one, source, count in zip(held, sources, counts, strict=True):
            again = tables.group(source, count, BLOCK, 3 * MOST)
            assert one.count == count
            assert torch.equal(one.present, again.present)
            if rows > 1:
                assert torch.equal(one.index, again.index)
