"""Hopper kernels: their operands everywhere, compiling where NVRTC is, the kernels on a Hopper GPU."""

import contextlib
import math
import re
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from decode_cases import SHAPES, Shape, codes_to, make_case

from aquakv.errors import ConfigError
from aquakv.kernels import attend_codes, carry_latents, hopper
from aquakv.kernels.hopper.compiler import compile_source, nvrtc_path, source_of
from aquakv.kernels.hopper.operands import (
    SCALE_ROOM,
    HopperOperands,
    bits_factor,
    pair_angles,
    split_pairs,
    unsupported,
)
from aquakv.kernels.hopper.order import LINEAR_WIDTH, cubic_tiles, latent_order, score_order, sum_order
from aquakv.kernels.pages import PageLayout, level_slopes
from aquakv.kernels.rotary import PageRotary
from aquakv.kernels.scores import next_latents

#: Fields of 16 that have one width each, as codecs of the preset have them.
UNIFORM = tuple(width for width in (4, 3, 2, 1) for _ in range(16))
FITTING = {
    "plain": Shape(widths=UNIFORM, key_coefficients=(64, 48), value_coefficients=80),
    "wide heads, group of 4": Shape(
        head_dim=128,
        group=4,
        rank=64,
        next_rank=64,
        key_coefficients=(128, 96),
        value_coefficients=256,
        widths=UNIFORM,
        masked=True,
    ),
    "eight heads, long rows": Shape(
        head_dim=128,
        kv_heads=8,
        group=4,
        rank=16,
        next_rank=32,
        key_coefficients=(64,) * 8,
        value_coefficients=576,
        widths=UNIFORM,
        lengths=(2000, 1999),
        pages=32,
        masked=True,
    ),
    "group of 3": Shape(
        group=3,
        kv_heads=3,
        key_coefficients=(64, 16, 32),
        value_coefficients=16,
        widths=UNIFORM,
        masked=True,
    ),
    "first layer": Shape(
        rank=0, group=1, value_map=False, key_coefficients=(64, 64), value_coefficients=64, widths=UNIFORM
    ),
    "last layer": Shape(
        next_rank=0,
        rank=32,
        softcap=20.0,
        key_coefficients=(64, 64),
        value_coefficients=128,
        widths=UNIFORM,
    ),
    "partial rotary": Shape(
        rotary_dim=32,
        lengths=(70, 0),
        pages=2,
        key_coefficients=(64, 64),
        value_coefficients=128,
        widths=UNIFORM,
    ),
}
#: Float16 operands, and a polynomial of first order for slow pairs.
TOLERANCE = 2e-3


def on_hopper(test):
    missing = not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0)
    return pytest.mark.gpu(pytest.mark.skipif(missing, reason="needs a Hopper GPU")(test))


def relative_error(actual, expected):
    """Compare where there are numbers, and that the same places have none."""
    assert actual.shape == expected.shape
    assert torch.equal(actual.isnan(), expected.isnan())
    finite = expected.isfinite()
    assert torch.equal(actual[~finite].nan_to_num(), expected[~finite].to(actual.dtype).nan_to_num())
    actual, expected = actual[finite].double(), expected[finite].double()
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-9))


def step_of(case, device="cpu"):
    operands = case.operands(torch.float16).to(device)
    rotary = case.rotary(torch.float32)
    rotary = PageRotary(*(table.to(device) for table in vars(rotary).values()))
    latents = case.stored_latents(operands.latent_width, torch.float16)
    latents = None if latents is None else latents.to(device)
    return case.query.half().to(device), codes_to(case.codes(), device), latents, operands, rotary


def from_image(image, rows):
    """Undo the arrangement of a right operand: bytes to ``[rows, k]``."""
    blocks = image.view(torch.float16).view(-1, rows, 8, 8)
    plain = torch.empty_like(blocks)
    for row in range(rows):
        for chunk in range(8):
            plain[:, row, chunk] = blocks[:, row, chunk ^ (row % 8)]
    return plain.transpose(0, 1).reshape(rows, -1)


@pytest.mark.parametrize("name", FITTING)
def test_images_hold_the_operands(name):
    case = make_case(FITTING[name])
    plain, rotary = case.operands(torch.float16), case.rotary(torch.float32)
    arranged = HopperOperands.build(plain, rotary)
    half, fast = plain.head_dim // 2, arranged.fast_pairs
    columns = 2 * fast
    steps = arranged.head_fields + plain.latent_width // 16
    size = -(-steps // 4) * columns * 128
    pairs = arranged.pair_index.tolist()
    # A thread's four neighbouring columns of a field are products' columns 2q, 2q + 1, 2q + 8, 2q + 9.
    places = [4 * ((k % 8) // 2) + k % 2 + 2 * (k // 8) for k in range(16)]
    for head in range(plain.num_kv_heads):
        image = from_image(arranged.score_images[head, :size], columns)
        slow = [from_image(block, 64) for block in arranged.score_images[head, size:].view(-1, 64 * 128)]
        rows = plain.score_synthesis[head]
        for field in range(arranged.head_fields):
            for k, place in enumerate(places):
                order = arranged.field_order[head]
                slot = 16 * (order[field] if field < len(order) else field) + place
                expected = rows[slot] / SCALE_ROOM if slot < len(rows) else torch.zeros(plain.head_dim).half()
                for number, pair in enumerate(pairs):
                    if pair >= half:
                        continue
                    if number < fast:
                        at = number // 8 * 16 + number % 8
                        got = image[[at, at + 8], field * 16 + k]
                    else:
                        got = slow[field // 4][
                            field % 4 * 16 + k, [2 * (number - fast), 2 * (number - fast) + 1]
                        ]
                    assert torch.equal(got, expected[[pair, pair + half]])
    assert sorted(p for p in pairs if p < half) == list(range(half))


def stored_codes(record, field):
    """Return a field's codes in a record, ``[64, 16]`` float64."""
    plane = record[field.plane * 1024 : (field.plane + 1) * 1024].view(64, 16)
    return ((plane >> field.shift) & ((1 << field.width) - 1)).double()


def levels(layout, field, codes):
    """Return what stored codes stand for, up to the factor that matrices have."""
    x = codes - field.centre
    return x * (1 + float(level_slopes(layout)[1][field.coefficients[0]]) * x**2)


def levels_from_bits(described, codes):
    """Return what code_sum.cu makes of codes, in the same float16 steps, corrected as its sums are."""
    mask, *halves = (int(word) & 0xFFFF for word in described[1:4])
    centre, gain = torch.tensor(halves, dtype=torch.int32).short().view(torch.float16)
    factor, middle = described[4:6].view(torch.float32).double()
    shift = (mask & -mask).bit_length() - 1
    bits = (codes << shift).short().view(torch.float16)  # far below the normal numbers
    if gain:
        x = (bits.double() * 2**15 + centre.double()).half()
        bits = x * (x * x * gain + 1)
    return bits.double() * factor - middle


@pytest.mark.parametrize("name", [name for name in FITTING if FITTING[name].next_rank])
def test_next_latents_follow_from_images_and_constants(name):
    """What next_latents.cu computes, in float64."""
    case = make_case(FITTING[name])
    _, codes, latents, plain, rotary = step_of(case)
    arranged = HopperOperands.build(plain, rotary)
    layout, width, rank = plain.keys.layout, plain.next_width, plain.latent_width
    places, general = latent_order(layout.fields)
    image = from_image(arranged.latent_images, width).double()
    within = torch.tensor([4 * ((k % 8) // 2) + k % 2 + 2 * (k // 8) for k in range(16)])
    runs = [(start, 4 if start + 4 <= width // 8 else 2) for start in range(0, width // 8, 4)]
    columns = [
        8 * start + 2 * count * quad + 2 * tile + odd
        for start, count in runs
        for tile in range(count)
        for quad in range(4)
        for odd in range(2)
    ]
    matrix = torch.empty_like(image)
    matrix[columns] = image
    record = codes.key_pages[codes.table[0, 0]]
    scale = 2 ** ((record[-80:-16].double() - 128) / 16)
    scale[record[-80:-16] == 255] = math.nan
    total = -arranged.latent_constants[0].double().expand(64, -1)
    bytewise = torch.tensor([4 * ((k % 8) // 2) + 2 * (k % 2) + k // 8 for k in range(16)])
    for place, index in enumerate(places):
        if index < len(layout.fields):
            field = layout.fields[index]
            stored = stored_codes(record, field)
            used = levels(layout, field, stored) if place < 4 * general else stored
            used = used * bits_factor(field, place < 4 * general)
            total = total + used[:, bytewise] @ matrix[:, 16 * place : 16 * place + 16].T
    total = total / 2.0**arranged.latent_exponent
    assert 2**13 < float(matrix[:, : 16 * len(places)].abs().max()) <= 2**14
    got = scale[:, None] * total + arranged.latent_constants[1]
    if latents is not None:
        own = latents[0, :64].double()[:, (torch.arange(0, rank, 16)[:, None] + within).flatten()]
        got = got + own @ matrix[:, 16 * len(places) : 16 * len(places) + rank].T
    expected = next_latents(codes, latents, plain, backend="torch")[0, :64]
    count = min(64, case.shape.lengths[0])
    assert relative_error(got[:count], expected[:count]) < TOLERANCE


@pytest.mark.parametrize("name", FITTING)
def test_latent_order_pairs_fields_of_a_plane(name):
    layouts = make_case(FITTING[name]).key_layout, make_case(FITTING[name]).value_layout
    for fields in (layout.fields for layout in layouts):
        places, general = latent_order(fields)
        assert sorted(places) == list(range(-(-len(fields) // 4) * 4))
        paired = [fields[i] for i in places[4 * general :]]
        assert all(a.plane == b.plane for a, b in zip(paired[::2], paired[1::2], strict=True))
        assert all(f.width <= LINEAR_WIDTH for f in paired)


@pytest.mark.parametrize("name", FITTING)
def test_sums_and_epilogue_have_one_order(name):
    plain, rotary = (case := make_case(FITTING[name])).operands(torch.float16), case.rotary(torch.float32)
    arranged = HopperOperands.build(plain, rotary)
    epilogue = plain.epilogue.transpose(1, 2)
    start = 0
    for layout in (plain.keys.layout, plain.values.layout):
        order = sum_order(layout.fields)
        assert sorted(order) == list(range(-(-len(layout.fields) // 4) * 4))
        for place, index in enumerate(order, start):
            slots = slice(16 * (start + index), 16 * (start + index + 1))
            assert torch.equal(arranged.epilogue[:, 16 * place : 16 * place + 16], epilogue[:, slots])
            described = arranged.sum_fields[place]
            if index < len(layout.fields):
                field = layout.fields[index]
                assert described[:2].tolist() == [field.plane * 1024, field.mask * 0x00010001]
                cubic = field.width > LINEAR_WIDTH
                assert not cubic or (place - start) // 12 < arranged.cubic_tiles
                got = levels_from_bits(described, torch.arange(1 << field.width))
                torch.testing.assert_close(
                    got, levels(layout, field, torch.arange(1 << field.width).double()), rtol=2e-3, atol=0
                )
            else:
                assert not described.any()
        start += len(order)
    assert torch.equal(arranged.epilogue[:, 16 * start :], epilogue[:, 16 * start :])
    assert len(arranged.sum_fields) == start


def test_scores_take_fields_of_a_plane_one_after_the_other():
    kinds, planes = [0, 2, 2, 1, 2, 2, 2, 2], [0, 0, 0, 1, 1, 1, 1, 1]
    order = score_order(kinds, planes)
    assert sorted(order) == list(range(8))
    assert [kinds[i] for i in order] == sorted(kinds)
    backwards = [planes[i] for i in order[::-1]]
    assert sum(a != b for a, b in pairwise([-1, *backwards])) == 3  # 8 without an order


@pytest.mark.parametrize("name", FITTING)
def test_planes_are_loaded_where_they_change(name):
    case = make_case(FITTING[name])
    layout = case.key_layout
    arranged = HopperOperands.build(case.operands(torch.float16), case.rotary(torch.float32))
    for head, order in enumerate(arranged.field_order):
        fields = layout.group_fields(head)
        held = None
        for number in reversed(range(arranged.head_fields)):
            plane = fields[order[number]].plane if number < len(order) else None
            if arranged.plane_loads >> number & 1:
                held = plane
            assert plane in (held, None)


@pytest.mark.parametrize("groups", [1, 8])
def test_a_warp_sums_fields_of_a_plane_one_after_the_other(groups):
    widths = [width for width in (4, 2, 2, 2, 2, 1, 1, 1) for _ in range(16)] * 8
    layout = PageLayout(tuple(widths), tuple(i * groups // 1024 for i in range(1024)), groups)
    fields = [layout.fields[index] for index in sum_order(layout.fields)]
    runs = [fields[4 * team + warp :: 12] for team in range(3) for warp in range(4)]
    loads = sum(a.plane != b.plane for run in runs for a, b in zip([run[-1], *run], run, strict=False))
    assert loads <= 32  # 64 without an order
    wide = [[f.width > LINEAR_WIDTH for f in run] for run in runs]
    assert max(map(sum, wide)) == cubic_tiles(layout.fields, sum_order(layout.fields)) == 1
    assert all(run == sorted(run, reverse=True) for run in wide)


def test_blocks_of_combine_are_there_at_once():
    assert hopper.decode.combined_slots(132, 8, 2112) == 144  # 15 blocks a head, 120 of 132 multiprocessors
    for rows, splits in ((1, 66), (2, 33), (8, 8), (28, 2), (96, 1)):
        block_rows, shared = hopper.decode.combined_rows(rows, splits, 4, 144, 128)
        assert 1 <= block_rows <= rows
        assert (1 + (rows > 1)) * (shared + 1024) <= 228 * 1024
    assert hopper.decode.combined_rows(1, 66, 4, 192, 128)[1] <= hopper.decode.MAX_BLOCK_BYTES


def test_angles_come_from_the_tables():
    frequencies = 500000.0 ** (-torch.arange(64, dtype=torch.float64) / 64)
    rotary = PageRotary.build(frequencies, torch.zeros(1, 1), dtype=torch.float32)
    torch.testing.assert_close(pair_angles(rotary), frequencies, rtol=1e-6, atol=1e-9)
    fast, slow = split_pairs(frequencies, 128)
    assert (fast, slow) == (32, 32)
    assert float(32 * frequencies[fast]) < 0.1
    arranged_at = PageRotary.build(frequencies, torch.tensor([[0, 64000]]), dtype=torch.float32)
    case = make_case(FITTING["wide heads, group of 4"])
    arranged = HopperOperands.build(case.operands(torch.float16), arranged_at)
    turns = arranged.page_turns(arranged_at)
    angle = torch.tensor([31.5, 64031.5], dtype=torch.float64)[:, None] * frequencies[arranged.pair_index]
    torch.testing.assert_close(turns[0, ..., 0].double(), angle.cos(), rtol=0, atol=2e-6)
    torch.testing.assert_close(turns[0, ..., 1].double(), angle.sin(), rtol=0, atol=2e-6)


def test_what_is_not_supported_is_told():
    reasons = {name: unsupported(make_case(SHAPES[name]).operands(torch.float16)) for name in SHAPES}
    assert "one width for all coefficients" in reasons["plain"]
    assert "heads of 64 or 128, got 256" in reasons["heads of 256"]
    assert "codes of keys and of values" in reasons["no key codes"]
    assert "float16" in unsupported(make_case(FITTING["plain"]).operands(torch.float32))
    step = step_of(make_case(FITTING["plain"]))
    with pytest.raises(ConfigError, match="backend hopper: expected tensors on a CUDA device, got cpu"):
        attend_codes(*step, scaling=1.0, backend="hopper")


@pytest.mark.parametrize("capturing", [False, True])
def test_what_steps_share(monkeypatch, capturing):
    """Operands are arranged once; pages' turns are shared by layers, but not what a graph will compute."""
    calls = []

    def launched(name, result):
        def launch(*arguments):
            calls.append((name, arguments))
            return result

        return launch

    for name, result in {"scores": (1, 2), "code_sums": (4, 5), "combine": (6, 7), "next_latents": 3}.items():
        monkeypatch.setattr(hopper.decode, name, launched(name, result))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: SimpleNamespace(synchronize=lambda: None)
    )
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    step = step_of(make_case(FITTING["plain"]))
    results = [hopper.attend(*step, 0.5, None, True) for _ in range(2)]
    assert results == [(6, 7, 3)] * 2
    assert [name for name, _ in calls] == ["scores", "code_sums", "combine", "next_latents"] * 2
    (first, turns), (second, again) = (call[1][5:7] for call in calls[::4])
    assert first is second
    assert (turns is again) != capturing
    assert torch.equal(turns, again)
    assert hopper.attend(*step, 0.5, None, False) == (6, 7, None)
    assert hopper.carry(*step[1:]) == 3
    assert [name for name, _ in calls[8:]] == ["scores", "code_sums", "combine", "next_latents"]
    assert calls[-1][1][4] is first  # arguments: pages, table, lengths, latents, operands


@pytest.mark.skipif(nvrtc_path() is None, reason="needs NVRTC")
@pytest.mark.parametrize(
    ("name", "constants", "products"),
    [
        (
            "scores",
            {
                "DIM": 128,
                "FAST": 64,
                "SLOW": 64,
                "FIELDS": 8,
                "RANK": 64,
                "TEAMS": 3,
                "PLANES": 2,
                "CUBIC": 2,
                "EXACT": 4,
                "LOADS": 0b11111111,
                "QUERY": 2,
                "SOFTCAP": 0,
            },
            {"wgmma_64": 64, "wgmma_columns": 64, "wgmma_8": 8},
        ),
        (
            "scores",
            {
                "DIM": 64,
                "FAST": 48,
                "SLOW": 16,
                "FIELDS": 4,
                "RANK": 0,
                "TEAMS": 3,
                "PLANES": 2,
                "CUBIC": 2,
                "EXACT": 4,
                "LOADS": 0b1001,
                "QUERY": 0,
                "SOFTCAP": 1,
            },
            {"wgmma_64": 64, "wgmma_columns": 48, "wgmma_8": 8},
        ),
        ("next_latents", {"RANK": 64, "WIDTH": 64, "LATE": 1}, {"wgmma_width": 64}),
        ("next_latents", {"RANK": 16, "WIDTH": 32, "LATE": 0}, {"wgmma_width": 32}),
        ("next_latents", {"RANK": 0, "WIDTH": 16, "LATE": 1}, {"wgmma_width": 16}),
        ("next_latents", {"RANK": 64, "WIDTH": 48, "LATE": 1}, {"wgmma_width": 48}),
        *(
            (
                "code_sum",
                dict(zip(("QUERIES", "TILES", "CUBIC", "RANK", "BUFFERS", "STAGES"), numbers, strict=True)),
                {"wgmma_queries": numbers[0]},
            )
            for numbers in [
                (32, 6, 1, 64, 3, 6),
                (32, 6, 6, 16, 3, 5),
                (64, 3, 1, 16, 2, 2),
                (64, 3, 1, 64, 3, 4),
                (32, 1, 1, 0, 3, 6),
            ]
        ),
        ("combine", {"QUERIES": 32, "DIM": 128, "CHUNK": 144}, {}),
        ("combine", {"QUERIES": 32, "DIM": 64, "CHUNK": 64}, {}),
    ],
)
def test_kernels_compile_without_spills_or_serialised_products(name, constants, products):
    shape = {"KV_HEADS": 8, "GROUP": 4, "DEPENDENT": 1}
    binary, remarks = compile_source(source_of(name, shape | constants, products), name)
    assert len(binary) > 1000
    assert "serialized" not in remarks
    assert re.search(r"\b0 bytes spill stores", remarks)


@on_hopper
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", FITTING)
def test_steps_equal_the_definition(name, dtype):
    case = make_case(FITTING[name], seed=1)
    query, *rest = step_of(case, "cuda")
    query = query.to(dtype)
    options = {"scaling": case.scaling, "softcap": case.shape.softcap}
    expected = attend_codes(query, *rest, **options, backend="torch")
    got = attend_codes(query, *rest, **options, backend="hopper")
    assert not got.out.isnan().any()
    assert relative_error(got.out, expected.out) < TOLERANCE
    assert relative_error(got.lse, expected.lse) < TOLERANCE
    if expected.next_latents is not None:
        for row, length in enumerate(case.shape.lengths):
            if length:
                part = got.next_latents[row, :length], expected.next_latents[row, :length]
                assert relative_error(*part) < TOLERANCE
        carried = carry_latents(*rest, backend="hopper")
        for row, length in enumerate(case.shape.lengths):
            torch.testing.assert_close(
                carried[row, :length], got.next_latents[row, :length], rtol=0, atol=0, equal_nan=True
            )
    alone = attend_codes(query, *rest, **options, carry=False, backend="hopper")
    assert alone.next_latents is None
    assert torch.equal(alone.out, got.out)
    # Once more: counters are as they were, and nothing depends on chance.
    again = attend_codes(query, *rest, **options, backend="hopper")
    assert torch.equal(again.out, got.out)
    assert torch.equal(again.lse, got.lse)


@on_hopper
def test_steps_can_be_captured_in_a_graph():
    case = make_case(FITTING["wide heads, group of 4"], seed=2)
    query, *rest = step_of(case, "cuda")
    query, scaling = query.clone(), case.scaling
    attend_codes(query, *rest, scaling=scaling, backend="hopper")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend_codes(query, *rest, scaling=scaling, backend="hopper")
    query.mul_(-0.5)
    graph.replay()
    expected = attend_codes(query, *rest, scaling=scaling, backend="torch")
    assert relative_error(captured.out, expected.out) < TOLERANCE


@on_hopper
def test_a_lost_token_is_seen_only_if_it_is_attended_to():
    shape = replace(FITTING["wide heads, group of 4"], masked=False)
    case = make_case(shape, seed=3)
    scales = case.scales.clone()
    scales[:, 0, 5] = 255
    case.scales = scales
    hidden = torch.ones(2, shape.pages * 64, dtype=torch.bool)
    for seen in (True, False):
        hidden[0, 5] = seen
        case.attended = hidden
        got = attend_codes(*step_of(case, "cuda"), scaling=case.scaling, backend="hopper")
        assert bool(got.out[0].isnan().any()) == seen
        assert not got.out[1].isnan().any()


@on_hopper
def test_auto_chooses_it():
    query, codes, latents, operands, rotary = step_of(make_case(FITTING["plain"]), "cuda")
    assert hopper.why_not(query, operands, rotary) is None
    assert math.isfinite(float(attend_codes(query, codes, latents, operands, rotary, scaling=1.0).lse[0, 0]))


@on_hopper
@pytest.mark.parametrize(("group", "on_hopper_kernels"), [(4, True), (6, False)])
def test_latents_by_themselves_are_those_of_automatic_steps(group, on_hopper_kernels):
    shape = replace(FITTING["wide heads, group of 4"], group=group)
    query, *rest = step_of(make_case(shape, seed=2), "cuda")
    assert (hopper.why_not(query, *rest[2:]) is None) == on_hopper_kernels
    got = attend_codes(query, *rest, scaling=1.0).next_latents
    carried = carry_latents(*rest, query=query.to("meta"))
    for row, length in enumerate(shape.lengths):
        torch.testing.assert_close(carried[row, :length], got[row, :length], rtol=0, atol=0, equal_nan=True)
