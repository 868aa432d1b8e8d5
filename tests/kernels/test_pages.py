import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aquakv.errors import ConfigError, ShapeError
from aquakv.kernels import (
    PageLayout,
    clear_attended,
    pack_pages,
    pack_records,
    record_attended,
    record_planes,
    record_scales,
    unpack_pages,
)


def random_codes(widths, tokens, seed):
    limits = 2 ** torch.tensor(widths, dtype=torch.float64)
    random = torch.rand(tokens, len(widths), generator=torch.Generator().manual_seed(seed))
    return (random * limits).to(torch.uint8)


@given(
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 2)), max_size=90),
    st.integers(0, 130),
    st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_unpacking_inverts_packing(coefficients, tokens, seed):
    widths, groups = tuple(w for w, _ in coefficients), tuple(g for _, g in coefficients)
    layout = PageLayout(widths, groups, 3)
    codes = random_codes(widths, tokens, seed)
    pages = pack_pages(codes, layout)
    assert pages.shape == (-(-tokens // 64), layout.planes, 64, 16)
    assert torch.equal(unpack_pages(pages, layout, tokens), codes)
    # Every bit that no field claims is zero, and every field claims bits of its own.
    claimed = [0] * layout.planes
    for f in layout.fields:
        assert claimed[f.plane] & f.mask == 0
        claimed[f.plane] |= f.mask
        assert f.mask < 256
    for plane, mask in enumerate(claimed):
        assert not (pages[:, plane] & (255 - mask)).any()


def test_the_format_is_as_documented():
    # Head 0: sixteen of 4 bits, then 1 of 4 and 2 of 2 bits in a field of 4. Head 1: one of 1 bit.
    widths, groups = (2, *[4] * 17, 2, 0, 1), (*[0] * 20, 1)
    layout = PageLayout(widths, groups, 2)
    assert [(f.group, f.width, f.plane, f.shift, f.coefficients) for f in layout.fields] == [
        (0, 4, 0, 0, tuple(range(1, 17))),
        (0, 4, 0, 4, (17, 0, 18)),
        (1, 1, 1, 0, (20,)),
    ]
    assert layout.bytes_per_token == 32
    codes = torch.zeros(70, 21, dtype=torch.uint8)
    codes[65] = torch.tensor([3, *range(1, 16), 0, 9, 1, 0, 1])
    pages = pack_pages(codes, layout)
    codes_of_two_bits_lie_in_the_middle_of_four = 6
    assert pages[1, 0, 1].tolist() == [
        1 | 9 << 4,
        2 | (3 + codes_of_two_bits_lie_in_the_middle_of_four) << 4,
        3 | (1 + codes_of_two_bits_lie_in_the_middle_of_four) << 4,
        *range(4, 16),
        0,
    ]
    assert pages[1, 1, 1].tolist() == [1, *[0] * 15]
    assert not pages[1, :, 6:].any()


def test_records_are_as_documented():
    layout = PageLayout((4, 2), (0, 0), 1)
    codes, scales = random_codes((4, 2), 70, 0), torch.arange(100, 170, dtype=torch.uint8)
    attended = torch.ones(70, dtype=torch.bool)
    attended[[3, 15, 64]] = False
    records = pack_records(codes, scales, layout, attended)
    assert records.shape == (2, layout.record_bytes) == (2, 1024 + 80)
    assert torch.equal(records[:, :1024].view(2, 1, 64, 16), pack_pages(codes, layout))
    assert records[0, 1024:1088].tolist() == list(range(100, 164))
    assert records[1, 1024:1088].tolist() == [*range(164, 170), *[0] * 58]
    assert records[:, 1088:].tolist() == [
        [0b11110111, 0b01111111, *[255] * 6, *[0] * 8],
        [0b00111110, *[0] * 15],
    ]
    assert torch.equal(unpack_pages(record_planes(records, layout), layout, 70), codes)
    assert torch.equal(record_scales(records).flatten()[:70], scales)
    assert torch.equal(record_attended(records).flatten()[:70], attended)
    assert not record_attended(records)[1, 6:].any()

    whole = pack_records(codes, scales, layout)
    assert record_attended(whole).sum() == 70
    clear_attended(whole, torch.tensor([3, 15, 64], dtype=torch.int32))
    assert torch.equal(whole, records)


def test_records_without_coefficients_hold_scales_and_bits():
    layout = PageLayout((), (), 1)
    records = pack_records(torch.zeros(64, 0, dtype=torch.uint8), torch.full((64,), 9).byte(), layout)
    assert records.tolist() == [[9] * 64 + [255] * 8 + [0] * 8]


def test_two_bits_a_value_take_240_bits_a_head():
    widths = [w for w in (4, 2, 2, 2, 2, 1, 1, 1) for _ in range(16)] * 8
    layout = PageLayout(tuple(widths), tuple(h for h in range(8) for _ in range(128)), 8)
    assert layout.bytes_per_token * 8 == 8 * 240


def test_wrong_layouts_and_tensors_are_refused():
    with pytest.raises(ConfigError, match="0 to 8 bits"):
        PageLayout((9,), (0,), 1)
    with pytest.raises(ConfigError, match="groups 0 to 0"):
        PageLayout((1,), (1,), 1)
    with pytest.raises(ShapeError, match="one group for each width"):
        PageLayout((1,), (), 1)
    layout = PageLayout((1, 2), (0, 0), 1)
    with pytest.raises(ShapeError, match=r"uint8 codes \[tokens, 2\]"):
        pack_pages(torch.zeros(3, 1, dtype=torch.uint8), layout)
    with pytest.raises(ShapeError, match=r"uint8 \[pages, 1, 64, 16\]"):
        unpack_pages(torch.zeros(1, 2, 64, 16, dtype=torch.uint8), layout)
    with pytest.raises(ShapeError, match=r"scales uint8 \[3\]"):
        pack_records(torch.zeros(3, 2, dtype=torch.uint8), torch.zeros(2, dtype=torch.uint8), layout)
    with pytest.raises(ShapeError, match=r"attended bool \[3\]"):
        pack_records(
            torch.zeros(3, 2, dtype=torch.uint8), torch.zeros(3, dtype=torch.uint8), layout, torch.zeros(3)
        )
    with pytest.raises(ShapeError, match=r"uint8 \[\.\.\., 1104\]"):
        record_planes(torch.zeros(1, 1024, dtype=torch.uint8), layout)
