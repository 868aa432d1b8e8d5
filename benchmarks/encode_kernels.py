"""Encoding and reconstructing 8192 tokens of one Llama-3.1-8B layer on a GPU, against the layer's prefill.

    python benchmarks/encode_kernels.py --out benchmarks/results/encode-h200.json

Codes are first compared with those of the torch definition of the same precision (float16) and with the
float32 definition's; coefficients of grids with `GridQuantizer.dequantize`. Then medians over replays of CUDA
graphs; each graph goes round several sets of inputs, larger together than the L2 cache. Rows are in
milliseconds. The prefill is one layer's bf16 products and causal attention on as many tokens. "encode, host"
is the time that the host needs to launch one encoding without a graph.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aquakv.codec import EncodedVectors, GridQuantizer
from aquakv.evaluation.results import write_benchmark
from aquakv.kernels import PageLayout, record_planes, record_scales, unpack_pages
from aquakv.kernels.encode import EncodedPages, EncodeOperands, Guard, encode, triton
from aquakv.kernels.reconstruct import ReconstructOperands, grid_coefficients, reconstruct
from aquakv.numerics import load_grid
from decode_kernels import FIELD_WIDTHS, HEAD_DIM, KV_HEADS, QUERY_HEADS, WIDTH, graph_times, timing_row

TOKENS = 8192
HIDDEN, INTERMEDIATE = 4096, 14336
SETTINGS = [("1.9 bit", 64), ("1.25 bit", 32)]
SETS = 4

#: Shares of codes, and of scales, that may differ from those of the definition of the same precision: the
#: order of sums, and what cuBLAS rounds of them, decide near the middle of two levels.
TIES = {"codes": 5e-3, "scales": 5e-3}

#: The same against the float32 definition: float16 moves coefficients by some 2^-11.
MOVED = {"codes": 2e-2, "scales": 5e-2}


@dataclass
class Layer:
    """A random layer: its matrices, folded, and what tokens of it look like."""

    plain: dict[str, Any]
    layouts: tuple[PageLayout, PageLayout]
    rank: int
    generator: torch.Generator

    def encode_operands(self, dtype: torch.dtype) -> EncodeOperands:
        """Fold what encoding needs."""
        names = "key_analysis key_synthesis key_offset key_bias value_analysis value_synthesis value_offset "
        names += "value_map latent_map innovation next_offset transition guards"
        return EncodeOperands.build(
            *self.layouts, **{name: self.plain[name] for name in names.split()}, dtype=dtype
        )

    def reconstruct_operands(self) -> ReconstructOperands:
        """Fold what reconstructing needs, in bfloat16."""
        names = "key_synthesis key_bias key_mean value_synthesis value_bias value_mean value_map latent_map"
        return ReconstructOperands.build(*self.layouts, **{name: self.plain[name] for name in names.split()})

    def tokens(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Make bf16 keys and values, and the latent, whose residuals have the spectrum of the layer."""
        p = self.plain

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=self.generator, device="cuda", dtype=torch.float64)

        latent = normal(count, self.rank).half()
        noise = normal(count, KV_HEADS, HEAD_DIM) * p["key_spectrum"]
        residual = torch.einsum("thc,hcd->thd", noise, p["key_bases"]).flatten(1)
        keys = p["key_offset"] + latent.double() @ p["latent_map"] + residual
        values = (keys - p["key_mean"]) @ p["value_map"] + p["value_offset"]
        values = values + (normal(count, WIDTH) * p["value_spectrum"]) @ p["value_basis"]
        return keys.bfloat16(), values.bfloat16(), latent


def make_layer(field_widths: Sequence[int], rank: int, generator: torch.Generator) -> Layer:
    """Make a random layer whose coded coefficients are those of the largest deviations."""

    def normal(*size: int, spread: float = 1.0) -> Tensor:
        return spread * torch.randn(*size, generator=generator, device="cuda", dtype=torch.float64)

    per_head = [width for width in field_widths for _ in range(16)]
    n = len(per_head)
    keys = PageLayout(
        tuple(per_head * KV_HEADS), tuple(head for head in range(KV_HEADS) for _ in per_head), KV_HEADS
    )
    values = PageLayout(tuple(sorted(per_head * KV_HEADS, reverse=True)), (0,) * (n * KV_HEADS), 1)
    bases = torch.linalg.qr(normal(KV_HEADS, HEAD_DIM, HEAD_DIM)).Q
    basis = torch.linalg.qr(normal(WIDTH, WIDTH)).Q
    key_spectrum = 20.0 ** -torch.linspace(0, 1, HEAD_DIM, device="cuda", dtype=torch.float64)
    value_spectrum = 20.0 ** -torch.linspace(0, 1, WIDTH, device="cuda", dtype=torch.float64)
    coded = bases[:, :n] * key_spectrum[:n, None]
    bias, value_bias, key_mean, value_mean = normal(4, WIDTH)
    roots = torch.eye(HEAD_DIM, device="cuda", dtype=torch.float64).expand(KV_HEADS, -1, -1)
    plain = {
        "key_bases": bases,
        "key_spectrum": key_spectrum,
        "value_basis": basis,
        "value_spectrum": value_spectrum,
        "key_synthesis": coded.flatten(0, 1),
        "key_analysis": (bases[:, :n] / key_spectrum[:n, None]).flatten(0, 1).T,
        "key_bias": bias,
        "key_mean": key_mean,
        "key_offset": bias + key_mean,
        "value_synthesis": basis[: n * KV_HEADS] * value_spectrum[: n * KV_HEADS, None],
        "value_analysis": (basis[: n * KV_HEADS] / value_spectrum[: n * KV_HEADS, None]).T,
        "value_bias": value_bias,
        "value_mean": value_mean,
        "value_offset": value_bias + value_mean,
        "value_map": normal(WIDTH, WIDTH, spread=0.5 * WIDTH**-0.5),
        "latent_map": normal(rank, WIDTH, spread=rank**-0.5),
        "innovation": normal(n * KV_HEADS, rank, spread=0.1),
        "next_offset": normal(rank),
        "transition": normal(rank, rank, spread=rank**-0.5),
        "guards": (Guard(roots, 100.0), Guard(roots, 100.0)),
    }
    return Layer(plain, (keys, values), rank, generator)


def differences(ours: EncodedPages, theirs: EncodedPages, operands: EncodeOperands) -> dict[str, float]:
    """Return the shares of scales and of codes of equal scale that differ, and errors of the rest."""
    found: dict[str, float] = {"codes": 0.0, "scales": 0.0}
    for name in ("key", "value"):
        layout = getattr(operands, f"{name}s").layout
        pair = [getattr(one, f"{name}_pages") for one in (ours, theirs)]
        codes = [unpack_pages(record_planes(one, layout).contiguous(), layout) for one in pair]
        scales = [record_scales(one).flatten() for one in pair]
        same = scales[0] == scales[1]
        found["scales"] = max(found["scales"], float((~same).double().mean()))
        found["codes"] = max(found["codes"], float((codes[0] != codes[1])[same].double().mean()))
    for name in ("next_latents", "excess"):
        own, other = (getattr(one, name).double() for one in (ours, theirs))
        found[name] = float((own - other).norm() / other.norm())
    return found


def check_encoding(layer: Layer) -> dict[str, dict[str, float]]:
    """Compare the kernels with the definitions of their precision and of float32; exit if they are wrong."""
    tokens = layer.tokens(2048)
    operands, exact = (layer.encode_operands(dtype) for dtype in (torch.float16, torch.float32))
    got = encode(*tokens, operands, backend="triton")
    found = {
        "float16 definition": differences(got, encode(*tokens, operands, backend="torch"), operands),
        "float32 definition": differences(got, encode(*tokens, exact, backend="torch"), operands),
    }
    for (name, errors), limits in zip(found.items(), (TIES, MOVED), strict=True):
        print(name, {k: f"{v:.1e}" for k, v in errors.items()}, flush=True)
        if not all(errors[k] <= limit for k, limit in limits.items()) or not errors["excess"] < 1e-2:
            sys.exit(f"encode_kernels: codes are not those of the {name}: no times are taken")
    whole = layer.reconstruct_operands()
    pages = got.key_pages, got.value_pages, tokens[2]
    ours, theirs = (reconstruct(*pages, whole, backend=backend) for backend in ("triton", "torch"))
    for name, own, other in zip(("keys", "values"), ours, theirs, strict=True):
        error = float((own.double() - other.double()).norm() / other.double().norm())
        found["reconstruction"] = found.get("reconstruction", {}) | {name: error}
        if not error < 5e-3:
            sys.exit(f"encode_kernels: reconstructed {name} are {error:.1e} off: no times are taken")
    return found


def prefill_layer() -> list[Callable[[], Any]]:
    """Return one layer's prefill in bf16, without norms, rotation and activation."""

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device="cuda", dtype=torch.bfloat16) * size[-1] ** -0.5

    hidden = normal(TOKENS, HIDDEN)
    qkv = normal(HIDDEN + 2 * WIDTH, HIDDEN)
    out, gate_up, down = (
        normal(HIDDEN, HIDDEN),
        normal(2 * INTERMEDIATE, HIDDEN),
        normal(HIDDEN, INTERMEDIATE),
    )
    linear, attention = torch.nn.functional.linear, torch.nn.functional.scaled_dot_product_attention

    def run() -> Tensor:
        mixed = linear(hidden, qkv).view(1, TOKENS, -1, HEAD_DIM).transpose(1, 2)
        query, key, value = mixed.split((QUERY_HEADS, KV_HEADS, KV_HEADS), 1)
        attended = attention(query, key, value, is_causal=True, enable_gqa=True)
        after = linear(attended.transpose(1, 2).reshape(TOKENS, HIDDEN), out)
        gate, up = linear(after, gate_up).split(INTERMEDIATE, 1)
        return linear(gate * up, down)

    return [run]


def encode_rows(name: str, layer: Layer, prefill_ms: float, replays: int) -> list[dict[str, Any]]:
    """Time encoding, its parts and reconstructing."""
    operands, whole = layer.encode_operands(torch.float16), layer.reconstruct_operands()
    sets = [layer.tokens(TOKENS) for _ in range(SETS)]
    found = [triton.coefficients(*tokens, operands) for tokens in sets]
    columns = [triton.value_columns(one.inputs.nan_to_num(), operands) for one in found]
    encoded = [encode(*tokens, operands) for tokens in sets]
    excess = encoded[0].excess
    contestants: dict[str, list[Callable[[], Any]]] = {
        "coefficients": [lambda t=t: triton.coefficients(*t, operands) for t in sets],
        "quantise keys": [
            lambda t=t, one=one: triton.quantise_keys(*one, t[2], operands)
            for t, one in zip(sets, found, strict=True)
        ],
        "value product": [lambda one=one: triton.value_columns(one.inputs, operands) for one in found],
        "quantise values": [lambda c=c: triton.quantise_values(c, excess, operands) for c in columns],
        "encode": [lambda t=t: encode(*t, operands) for t in sets],
        "reconstruct": [
            lambda t=t, e=e: reconstruct(e.key_pages, e.value_pages, t[2], whole)
            for t, e in zip(sets, encoded, strict=True)
        ],
    }
    shape = f"1 x {TOKENS}"
    rows = [timing_row(c, shape, name, graph_times(f, replays)) for c, f in contestants.items()]
    rows.append(timing_row("encode, host", shape, name, host_times(contestants["encode"][0], replays)))
    keys, values, latents = sets[0]
    records = encoded[0].key_pages.nbytes + encoded[0].value_pages.nbytes
    for row in rows:
        row["ratio_to_prefill"] = row["median_ms"] / prefill_ms
        row["bits_per_value"] = 8 * records / (TOKENS * 2 * WIDTH)
        if row["contestant"] == "encode":
            row["bytes_moved"] = keys.nbytes + values.nbytes + 2 * latents.nbytes + records
            rows_of, columns_of = operands.value_analysis.shape
            row["flop"] = 2 * TOKENS * (rows_of * columns_of + WIDTH * (HEAD_DIM + layer.rank))
    return rows


def host_times(function: Callable[[], Any], replays: int) -> list[float]:
    """Return the sorted milliseconds that the host needs to launch a call."""
    function()
    times = []
    for _ in range(replays):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        times.append((time.perf_counter() - start) * 1e3)
    return sorted(times)


def grid_rows(replays: int, random: torch.Generator) -> list[dict[str, Any]]:
    """Time coefficients of grids, as the preset paper has them, by the kernel and by torch."""
    rows, dtype = [], torch.bfloat16
    for bits, points in ((2, 16), (4, 256)):
        quantizer = GridQuantizer(WIDTH, WIDTH, load_grid(2, points, "cuda"))
        sets: list[EncodedVectors] = [
            quantizer.quantize(torch.randn(TOKENS, WIDTH, generator=random, device="cuda"))[0]
            for _ in range(2 * SETS)
        ]
        if not torch.equal(
            grid_coefficients(sets[0], quantizer, dtype, backend="triton"),
            quantizer.dequantize(sets[0], dtype),
        ):
            sys.exit("encode_kernels: coefficients of grids are wrong: no times are taken")
        for name, function in (
            ("grid coefficients", lambda s, q=quantizer: grid_coefficients(s, q, dtype)),
            ("grid coefficients, torch", lambda s, q=quantizer: q.dequantize(s, dtype)),
        ):
            times = graph_times([lambda s=s, f=function: f(s) for s in sets], replays)
            rows.append(timing_row(name, f"1 x {TOKENS}", f"paper, {bits} bit", times))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--replays", type=int, default=25)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("encode_kernels: needs a CUDA GPU")
    random = torch.Generator(device="cuda")
    random.manual_seed(0)
    layers, checked = {}, {}
    for widths, rank in SETTINGS:
        name = f"{widths}, rank {rank}"
        layers[name] = make_layer(FIELD_WIDTHS[widths][0], rank, random)
        checked[name] = check_encoding(layers[name])
    times = graph_times(prefill_layer(), options.replays)
    rows = [timing_row("bf16 prefill", f"1 x {TOKENS}", "", times)]
    prefill_ms = rows[0]["median_ms"]
    for name, layer in layers.items():
        found = encode_rows(name, layer, prefill_ms, options.replays)
        for row in found:
            if row["contestant"] == "encode":
                row["differences"] = {"measured_on": "1 x 2048", **checked[name]}
        rows += found
        torch.cuda.empty_cache()
    rows += grid_rows(options.replays, random)
    write_benchmark(options.out, rows)
    print(torch.cuda.get_device_name())
    for row in rows:
        ratio = f"{row['ratio_to_prefill']:7.4f}" if "ratio_to_prefill" in row else ""
        print(f"{row['contestant']:26} {row['setting']:18} {row['median_ms'] * 1e3:9.1f} us {ratio}")


if __name__ == "__main__":
    main()
