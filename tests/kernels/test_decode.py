"""The plain-torch definitions against attention over reconstructed keys and values."""

import logging
from dataclasses import replace

import pytest
import torch
from decode_cases import SHAPES, Shape, dense, make_case

from aquakv.errors import ConfigError, ShapeError
from aquakv.kernels import attend_codes, carry_latents, decode, hopper
from aquakv.kernels.backend import _auto
from aquakv.kernels.scores import scores

# Float32 arithmetic on float32 operands; scores of size 10 add up 64 to 128 products.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def close(actual, expected):
    torch.testing.assert_close(actual.double(), expected, **TOLERANCE)


@pytest.mark.parametrize("name", SHAPES)
def test_definitions_equal_reconstruction(name):
    case = make_case(SHAPES[name])
    operands, codes = case.operands(torch.float32), case.codes()
    rotary = case.rotary(torch.float32)
    latents = case.stored_latents(operands.latent_width, torch.float32)
    options = {"scaling": case.scaling, "softcap": case.shape.softcap}
    query = case.query.float()
    expected = dense(case)
    scored = scores(query, codes, latents, operands, rotary, **options)
    got = attend_codes(query, codes, latents, operands, rotary, **options)
    close(got.out, expected.out)
    close(got.lse, expected.lse)
    assert (got.next_latents is None) == (case.shape.next_rank == 0)
    for row, length in enumerate(case.shape.lengths):
        close(scored.scores[row, :, :length], expected.scores[row])
        assert (scored.scores[row, :, length:] == float("-inf")).all()
        if got.next_latents is not None:
            seen = case.scales[0, row, :length] != 255
            own = got.next_latents[row, :length, : case.shape.next_rank]
            close(own[seen], expected.next_latents[row][seen])
    alone = attend_codes(query, codes, latents, operands, rotary, carry=False, **options)
    assert torch.equal(alone.out, got.out)
    assert alone.next_latents is None
    if got.next_latents is None:
        with pytest.raises(ShapeError, match="next latents"):
            carry_latents(codes, latents, operands, rotary)
    else:
        carried = carry_latents(codes, latents, operands, rotary)
        for row, length in enumerate(case.shape.lengths):  # what is beyond is arbitrary
            torch.testing.assert_close(
                carried[row, :length], got.next_latents[row, :length], rtol=0, atol=0, equal_nan=True
            )


def test_no_records_at_all():
    case = make_case(Shape(lengths=(0, 0), pages=2))
    codes = case.codes()
    codes = replace(codes, key_pages=codes.key_pages[:0], value_pages=codes.value_pages[:0])
    operands = case.operands(torch.float32)
    latents = case.stored_latents(operands.latent_width, torch.float32)
    got = attend_codes(case.query.float(), codes, latents, operands, case.rotary(torch.float32), scaling=1.0)
    assert (got.out == 0).all()
    assert (got.lse == float("-inf")).all()


def step(**changes):
    case = make_case(SHAPES["plain"])
    operands = case.operands(torch.float16)
    arguments = {
        "query": case.query.float(),
        "codes": case.codes(),
        "latents": case.stored_latents(operands.latent_width, torch.float16),
        "operands": operands,
        "rotary": case.rotary(torch.float16),
    }
    return attend_codes(*(arguments | changes).values(), scaling=case.scaling)


def test_wrong_shapes_are_refused():
    with pytest.raises(ShapeError, match="expected query"):
        step(query=torch.zeros(2, 3, 64))
    with pytest.raises(ShapeError, match="latents: expected some"):
        step(latents=None)
    with pytest.raises(ShapeError, match=r"latents: expected contiguous .* \[2, 192, 16\]"):
        step(latents=torch.zeros(2, 192, 8))
    with pytest.raises(ShapeError, match="paged codes: key_pages"):
        step(codes=make_case(SHAPES["no key codes"]).codes())
    codes = make_case(SHAPES["plain"]).codes()
    with pytest.raises(
        ShapeError, match=r"paged codes: table: expected contiguous int32 \[2, 3\], got int64"
    ):
        step(codes=replace(codes, table=codes.table.long()))
    with pytest.raises(ShapeError, match="paged codes: value_pages"):
        step(codes=replace(codes, value_pages=codes.value_pages[1:]))


def test_a_backend_that_cannot_run_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    case = make_case(SHAPES["plain"])
    operands = case.operands(torch.float16)
    latents = case.stored_latents(operands.latent_width, torch.float16)
    arguments = (case.query, case.codes(), latents, operands, case.rotary(torch.float16))
    with pytest.raises(ConfigError, match="backend triton: "):
        attend_codes(*arguments, scaling=1.0, backend="triton")
    with pytest.raises(ConfigError, match="backend hopper: "):
        carry_latents(*arguments[1:], backend="hopper")
    with pytest.raises(ConfigError, match="expected one of auto, torch, triton"):
        attend_codes(*arguments, scaling=1.0, backend="cuda")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("heads", "dtype", "expected"),
    [
        (8, torch.bfloat16, "hopper"),
        (10, torch.bfloat16, "not"),
        (8, torch.float64, "not"),
        (None, None, "hopper"),
    ],
)
def test_latents_are_made_by_the_kernels_of_steps(monkeypatch, heads, dtype, expected):
    case = make_case(SHAPES["plain"])
    operands = case.operands(torch.float16)
    latents = case.stored_latents(operands.latent_width, torch.float16)
    rest = (case.codes(), latents, operands, case.rotary(torch.float32))
    query = None if heads is None else torch.empty(2, heads, case.shape.head_dim, dtype=dtype, device="meta")
    arranged, ran = [], []

    def stop(name):
        def raising(*args, **kwargs):
            ran.append(name)
            raise RuntimeError

        return raising

    monkeypatch.setattr(decode, "resolve_backend", lambda *args, **kwargs: "triton")
    monkeypatch.setattr(hopper, "why_not_on", lambda device: None)
    monkeypatch.setattr(hopper, "_arranged", lambda *args: arranged.append(args))
    for name in ("attend", "carry"):
        monkeypatch.setattr(hopper, name, stop("hopper"))
    for name in ("scores", "next_latents"):
        monkeypatch.setattr(decode, name, stop("not"))
    with pytest.raises(RuntimeError):
        carry_latents(*rest, query=query)
    if query is not None:
        with pytest.raises(RuntimeError):
            attend_codes(query, *rest, scaling=1.0)
    assert set(ran) == {expected}
    assert bool(arranged) == (expected == "hopper")  # operands that nothing uses are not made


def test_the_automatic_choice_is_logged_once(caplog):
    _auto.cache_clear()
    with caplog.at_level(logging.INFO, "aquakv.kernels.backend"):
        step()
        step()
    assert [record.getMessage() for record in caplog.records] == ["decode kernels on cpu: torch"]
