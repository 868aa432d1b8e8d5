"""Attention to exact tokens beside coded ones: the definition, and Triton kernels against it."""

import re
from dataclasses import replace

import pytest
import torch
from interpreted import DEVICE, INTERPRETED, on_this_device

from aquakv.errors import ShapeError
from aquakv.kernels.exact import HeldTokens, attend_exact

#: rows, query heads, KV heads, head_dim, sinks, columns, outliers, whether an index tells whose
CASES = {
    "one row": (1, 4, 2, 64, 4, 128, 5, False),
    "rows": (3, 12, 4, 64, 2, 64, 9, True),
    "no outliers, no sinks": (2, 8, 8, 128, 0, 70, 0, False),
    "many": (1, 8, 1, 64, 4, 128, 300, False),
}

#: Everything with everything; in the interpreter, which takes a second for each, all pairs of choices.
COMBINATIONS = [
    (name, sinks, softcap)
    for number, name in enumerate(CASES)
    for sinks in (False, True)
    for softcap in (None, 0.7)
    if not INTERPRETED or (number + sinks + (softcap is None)) % 2
]


def make_case(name, dtype=torch.float32):
    rows, heads, kv_heads, dim, sinks, columns, outliers, indexed = CASES[name]
    random = torch.Generator().manual_seed(3)

    def normal(*size):
        return torch.randn(*size, generator=random).to(dtype)

    vectors = [normal(rows, n, kv_heads, dim) for n in (sinks, sinks, columns, columns)]
    index, beside, beside_seen = None, (None, None), None
    if outliers:
        beside = normal(outliers, kv_heads, dim), normal(outliers, kv_heads, dim)
        beside_seen = torch.rand(rows, 4 if indexed else outliers, generator=random) < 0.7
    if indexed:
        index = torch.randint(outliers, (rows, 4), generator=random)
    seen = torch.rand(rows, sinks + columns, generator=random) < 0.7
    coded = torch.randn(rows, heads, dim, generator=random), torch.randn(rows, heads, generator=random) + 2
    return normal(rows, heads, dim), HeldTokens(*vectors, *beside, index, seen, beside_seen), coded


def plain(query, held, coded, scaling, softcap, sink_logits):
    """Attend row by row and head by head in float64."""
    rows, heads, _ = query.shape
    group = heads // held.tail_keys.shape[2]
    out = torch.zeros(query.shape, dtype=torch.float64)
    for row in range(rows):
        own = [[held.sink_keys[row], held.tail_keys[row]], [held.sink_values[row], held.tail_values[row]]]
        if held.outlier_keys is not None:
            which = slice(None) if held.outlier_index is None else held.outlier_index[row]
            own[0].append(held.outlier_keys[which])
            own[1].append(held.outlier_values[which])
        seen = held.seen[row]
        if held.outliers_seen is not None:
            seen = torch.cat([seen, held.outliers_seen[row]])
        keys, values = (torch.cat(parts).double()[seen] for parts in own)
        for head in range(heads):
            scores = scaling * keys[:, head // group] @ query[row, head].double()
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            more = [coded[1][row, head].double()[None]]
            if sink_logits is not None:
                more.append(sink_logits[head].double()[None])
            weights = torch.cat([scores, *more]).softmax(0)
            out[row, head] = weights[: len(scores)] @ values[:, head // group]
            out[row, head] += weights[len(scores)] * coded[0][row, head].double()
    return out


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_the_definition_is_one_softmax(name, softcap, sinks):
    query, held, coded = make_case(name)
    logits = torch.randn(query.shape[1]) if sinks else None
    options = {"scaling": 0.2, "softcap": softcap, "sink_logits": logits}
    got = attend_exact(query, held, *coded, **options, backend="torch")
    expected = plain(query, held, coded, **options)
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=0)


def test_what_does_not_fit_is_refused():
    query, held, (out, lse) = make_case("rows")
    with pytest.raises(ShapeError, match=r"expected seen \[2, 66\], got \[3, 66\]"):
        attend_exact(query[:2], held, out, lse, scaling=1.0)
    for seen in (None, held.outliers_seen[:, :2]):
        with pytest.raises(ShapeError, match=r"expected outliers_seen \[3, 4\], got"):
            attend_exact(query, replace(held, outliers_seen=seen), out, lse, scaling=1.0)
    with pytest.raises(ShapeError, match="coded_out"):
        attend_exact(query, held, out[:, :1], lse, scaling=1.0)


@on_this_device
@pytest.mark.parametrize(("name", "sinks", "softcap"), COMBINATIONS)
def test_kernels_equal_the_definition(name, softcap, sinks):
    dtype = torch.float16 if softcap is None else torch.float32
    query, held, coded = make_case(name, dtype)
    logits = torch.randn(query.shape[1]).to(DEVICE) if sinks else None
    # Neither unseen tokens nor rows that see nothing may show.
    held.tail_keys[0, ~held.seen[0, held.sink_keys.shape[1] :][: held.tail_keys.shape[1]]] = torch.nan
    held.tail_values[0, ~held.seen[0, held.sink_keys.shape[1] :][: held.tail_keys.shape[1]]] = torch.nan
    if len(query) > 1:
        held.seen[1] = False
        if held.outliers_seen is not None:
            held.outliers_seen[1] = False
        coded[0][1], coded[1][1] = 0, -torch.inf
    held = HeldTokens(*(None if t is None else t.to(DEVICE) for t in vars(held).values()))
    query, coded = query.to(DEVICE), [t.to(DEVICE) for t in coded]
    options = {"scaling": 0.2, "softcap": softcap, "sink_logits": logits}
    got = attend_exact(query, held, *coded, **options, backend="triton")
    expected = attend_exact(query, held, *coded, **options, backend="torch")
    assert got.dtype == query.dtype
    assert got.shape == query.shape
    assert got.isfinite().all()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)
    if len(query) > 1:
        assert not got[1].any()


@on_this_device
@pytest.mark.parametrize("name", CASES)
def test_kernels_are_as_exact_as_float32(name):
    """Weights of half precision alone would be off by 1e-4."""
    _, held, coded = make_case(name, torch.float16)
    query = make_case(name)[0].to(DEVICE)
    held = HeldTokens(*(None if t is None else t.to(DEVICE) for t in vars(held).values()))
    coded = [t.to(DEVICE) for t in coded]
    got = attend_exact(query, held, *coded, scaling=0.2, backend="triton")
    expected = attend_exact(query, held, *coded, scaling=0.2, backend="torch")
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize(
    ("group", "dim", "dtype"),
    [(4, 128, torch.bfloat16), (8, 64, torch.float16), (1, 256, torch.float16), (24, 128, torch.float32)],
)
def test_kernels_compile(capability, group, dim, dtype):
    pytest.importorskip("triton", reason="needs triton")
    from test_compile import compile_kernel

    from aquakv.kernels.exact.triton import (
        LEAST_ROWS,
        merge_kernel,
        partial_attention_kernel,
        program_tokens,
    )

    held = ("query", "sink_keys", "sink_values", "tail_keys", "tail_values", "outlier_keys", "outlier_values")
    arguments = dict.fromkeys(held, dtype)
    arguments |= dict.fromkeys(("means", "maxima", "totals", "coded_out", "coded_lse"), torch.float32)
    arguments |= {
        "outlier_index": "*i64",
        "seen": "*i1",
        "outliers_seen": "*i1",
        "out": dtype,
        "sink_logits": dtype,
    }
    arguments |= dict.fromkeys(("scaling", "softcap"), "fp32")
    arguments |= dict.fromkeys(("sinks", "columns", "most", "splits"), "i32")
    padded = max(LEAST_ROWS, 1 << (group - 1).bit_length())
    tokens = program_tokens(dim, dtype.itemsize)
    shape = {"KV_HEADS": 8, "GROUP": group, "PADDED": padded, "DIM": dim, "TOKENS": tokens}
    flags = {"SOFTCAP": True, "OUTLIERS": True, "INDEXED": True}
    for kernel, constants in (
        (partial_attention_kernel, shape | flags),
        (merge_kernel, {"QUERY_HEADS": 8 * group, "DIM": dim, "SPLITS": 16, "TOGETHER": 8, "SINK": True}),
    ):
        compiled = compile_kernel(kernel, capability, arguments, constants, num_warps=4)
        assert re.search(rf"\.target sm_{capability}", compiled.asm["ptx"])
        assert compiled.metadata.shared <= 99 * 1024
