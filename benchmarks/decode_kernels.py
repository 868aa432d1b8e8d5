"""Decode attention straight on codes against bf16 attention on a GPU, one Llama-3.1-8B layer at a time.

    python benchmarks/decode_kernels.py --out benchmarks/results/decode-h200.json

Every operation is first compared with its float32 definition. Then medians over replays of CUDA graphs; each
graph goes round several sets of inputs, larger together than the L2 cache. Rows are in milliseconds a layer.
The floor is the bytes of codes, scales, latents and operands over the bandwidth of a large sum.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aquakv.evaluation.results import write_benchmark
from aquakv.kernels import DecodeOperands, PagedCodes, PageLayout, PageRotary, attend_codes, hopper
from aquakv.kernels.combine import combine
from aquakv.kernels.hopper import decode as hopper_decode
from aquakv.kernels.hopper.operands import HopperOperands
from aquakv.kernels.scores import next_latents, scores
from aquakv.kernels.weighted_code_sum import weighted_code_sum

KV_HEADS, QUERY_HEADS, HEAD_DIM = 8, 32, 128
WIDTH = KV_HEADS * HEAD_DIM
SCALING = HEAD_DIM**-0.5

#: Widths of the fields of 16 coefficients of every head, for keys and values. The last two are as calibration
#: plans them on SmolLM2, at 2.2 and 1.7 bits: as many fields a coordinate, of as many bits.
FIELD_WIDTHS = {
    "1.9 bit": ((4, 2, 2, 2, 2, 1, 1, 1),) * 2,
    "1.25 bit": ((4, 2, 2, 1, 1),) * 2,
    "2.2 bit, planned": ((4, 4, 3, 2, 2, 1), (4, 3, 3, 3, 2, 2, 1, 1)),
    "1.7 bit, planned": ((4, 3, 2, 1, 1, 1), (3, 3, 2, 2, 2, 1, 1)),
}
SETTINGS = [
    ("1.9 bit", 64),
    ("1.9 bit", 32),
    ("1.9 bit", 16),
    ("1.25 bit", 64),
    ("1.25 bit", 32),
    ("2.2 bit, planned", 64),
    ("1.7 bit, planned", 64),
]
SHAPES = [(1, 32768), (8, 32768), (1, 131072)]

#: Input sets of a graph hold at least this together: several times the L2 cache of an H100.
ROTATED_BYTES = 150 << 20

#: Attention alone, where the next layer's latents are there already.
KEPT = "chain, latents kept"

#: Largest relative error of an output that counts as correct: float16 operands.
TOLERANCE = 3e-3


@dataclass
class Inputs:
    """One set of inputs of a decode step."""

    query: Tensor
    codes: PagedCodes
    latents: Tensor
    operands: DecodeOperands
    rotary: PageRotary

    @property
    def step(self) -> tuple[Tensor, PagedCodes, Tensor, DecodeOperands, PageRotary]:
        """The arguments of an operation."""
        return self.query, self.codes, self.latents, self.operands, self.rotary


def make_operands(
    field_widths: Sequence[Sequence[int]], rank: int, random: torch.Generator
) -> DecodeOperands:
    """Make a random layer whose scores spread by about one."""
    of_keys, of_values = ([width for width in widths for _ in range(16)] for widths in field_widths)

    def normal(*size: int, spread: float = 1.0) -> Tensor:
        return spread * torch.randn(*size, generator=random, device="cuda")

    key_groups = tuple(head for head in range(KV_HEADS) for _ in of_keys)
    keys = PageLayout(tuple(of_keys * KV_HEADS), key_groups, KV_HEADS)
    values = PageLayout(tuple(of_values * KV_HEADS), (0,) * (len(of_values) * KV_HEADS), 1)
    return DecodeOperands.build(
        keys,
        values,
        key_synthesis=normal(keys.coefficients, HEAD_DIM, spread=0.05),
        key_bias=torch.zeros(WIDTH, device="cuda"),
        key_mean=normal(WIDTH),
        value_synthesis=normal(values.coefficients, WIDTH, spread=WIDTH**-0.5),
        # No constants: the errors of outputs should be relative to what codes and latents contribute.
        value_offset=torch.zeros(WIDTH, device="cuda"),
        value_map=normal(WIDTH, WIDTH, spread=WIDTH**-0.5),
        latent_map=normal(rank, WIDTH, spread=0.1),
        innovation=normal(keys.coefficients, rank, spread=0.02),
        next_offset=normal(rank),
        transition=normal(rank, rank, spread=rank**-0.5),
    )


def make_inputs(rows: int, tokens: int, operands: DecodeOperands, random: torch.Generator) -> Inputs:
    """Make random codes (every byte of a page is some code), scales, latents and queries."""
    pages = tokens // 64

    def random_bytes(*size: int, low: int = 0, high: int = 256) -> Tensor:
        return torch.randint(low, high, size, dtype=torch.uint8, device="cuda", generator=random)

    def records(layout: PageLayout) -> Tensor:
        made = random_bytes(rows * pages, layout.record_bytes)
        made[:, layout.page_bytes : -16] = random_bytes(rows * pages, 64, low=116, high=140)
        made[:, -16:-8], made[:, -8:] = 255, 0
        return made

    table = torch.arange(rows * pages, dtype=torch.int32, device="cuda").view(rows, pages)
    lengths = torch.full((rows,), tokens, dtype=torch.int32, device="cuda")
    codes = PagedCodes(records(operands.keys.layout), records(operands.values.layout), table, lengths)
    latents = torch.randn(rows, tokens, operands.latent_width, device="cuda", generator=random).half()
    query = torch.randn(rows, QUERY_HEADS, HEAD_DIM, device="cuda", generator=random).half()
    frequencies = 500000.0 ** (
        -torch.arange(HEAD_DIM // 2, device="cuda", dtype=torch.float64) * 2 / HEAD_DIM
    )
    positions = torch.arange(pages, device="cuda").expand(rows, pages) * 64
    rotary = PageRotary.build(frequencies, positions, dtype=torch.float32)
    return Inputs(query, codes, latents, operands, rotary)


def graph_times(functions: Sequence[Callable[[], Any]], replays: int) -> list[float]:
    """Return the sorted milliseconds of a call, one for each replay of a graph of all the calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for function in functions:
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for function in functions:
            function()
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / len(functions))
    return sorted(times)


def timing_row(contestant: str, shape: str, setting: str, times: list[float]) -> dict[str, Any]:
    """Return the row of some times."""
    return {
        "contestant": contestant,
        "shape": shape,
        "setting": setting,
        "median_ms": statistics.median(times),
        "p20_ms": times[len(times) // 5],
        "p80_ms": times[-1 - len(times) // 5],
    }


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the relative error, not-a-number if there is one."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def errors(operands: DecodeOperands, random: torch.Generator) -> dict[str, float]:
    """Compare a step on 2 × 4096 tokens with its definition."""
    inputs = make_inputs(2, 4096, operands, random)
    scored = scores(*inputs.step, scaling=SCALING, backend="triton")
    expected = scores(*inputs.step, scaling=SCALING, backend="torch")
    got = attend_codes(*inputs.step, scaling=SCALING)
    portable = attend_codes(*inputs.step, scaling=SCALING, backend="triton")
    whole = attend_codes(*inputs.step, scaling=SCALING, backend="torch")
    assert got.next_latents is not None
    assert whole.next_latents is not None
    return {
        "scores": relative_error(scored.scores, expected.scores),
        "out": relative_error(got.out, whole.out),
        "lse": relative_error(got.lse, whole.lse),
        "next_latents": relative_error(got.next_latents, whole.next_latents),
        "Triton out": relative_error(portable.out, whole.out),
    }


def read_bandwidth() -> float:
    """Return the bytes read per millisecond by a large sum; a copy is slower for its writes."""
    source = torch.ones(1 << 28, device="cuda")
    return source.nbytes / statistics.median(graph_times([lambda: source.sum()], 10))


def bf16_times(rows: int, tokens: int, replays: int) -> list[float]:
    """Time PyTorch's grouped attention on bfloat16 keys and values."""
    sets = 3 if rows * tokens < 1 << 16 else 2
    attention = torch.nn.functional.scaled_dot_product_attention
    query = torch.randn(rows, QUERY_HEADS, 1, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    pairs = [
        torch.randn(2, rows, KV_HEADS, tokens, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        for _ in range(sets)
    ]
    return graph_times(
        [lambda kv=kv: attention(query, kv[0], kv[1], enable_gqa=True) for kv in pairs], replays
    )


def runs_on_hopper(inputs: Inputs) -> bool:
    """Tell whether attend_codes takes the Hopper kernels by itself."""
    return hopper.why_not(inputs.query, inputs.operands, inputs.rotary) is None


def triton_calls(sets: Sequence[Inputs]) -> dict[str, list[Callable[[], Any]]]:
    """Return the operations of a step with Triton."""
    scored = [scores(*s.step, scaling=SCALING) for s in sets]
    summed = [
        weighted_code_sum(one, s.codes, s.latents, s.operands) for one, s in zip(scored, sets, strict=True)
    ]
    return {
        "scores": [lambda s=s: scores(*s.step, scaling=SCALING) for s in sets],
        "next_latents": [lambda s=s: next_latents(s.codes, s.latents, s.operands) for s in sets],
        "weighted_code_sum": [
            lambda s=s, one=one: weighted_code_sum(one, s.codes, s.latents, s.operands)
            for one, s in zip(scored, sets, strict=True)
        ],
        "combine": [
            lambda s=s, one=one, sums=sums: combine(sums, one.maxima, s.operands)
            for s, one, sums in zip(sets, scored, summed, strict=True)
        ],
    }


def hopper_calls(sets: Sequence[Inputs]) -> dict[str, list[Callable[[], Any]]]:
    """Return the operations of a step with the Hopper kernels."""
    arranged = HopperOperands.build(sets[0].operands, sets[0].rotary)
    calls: dict[str, list[Callable[[], Any]]] = {
        name: [] for name in ("scores", "next_latents", "weighted_code_sum", "combine")
    }
    for s in sets:
        keys = s.codes.key_pages, s.codes.table, s.codes.lengths
        query = s.query, *keys, s.latents, arranged, arranged.page_turns(s.rotary), SCALING, None
        scored, maxima = hopper_decode.scores(*query)
        weighted = scored, maxima, keys[0], s.codes.value_pages, *keys[1:], s.latents, arranged
        means, totals = hopper_decode.code_sums(*weighted)
        calls["scores"].append(lambda a=query: hopper_decode.scores(*a))
        calls["next_latents"].append(lambda a=(*keys, s.latents, arranged): hopper_decode.next_latents(*a))
        calls["weighted_code_sum"].append(lambda a=weighted: hopper_decode.code_sums(*a))
        calls["combine"].append(lambda a=(means, totals, maxima, arranged): hopper_decode.combine(*a))
    return calls


def setting_rows(
    shape: tuple[int, int],
    setting: str,
    operands: DecodeOperands,
    bandwidth: float,
    replays: int,
    random: torch.Generator,
) -> list[dict[str, Any]]:
    """Time every operation and the chain."""
    rows, tokens = shape
    name = f"{rows} x {tokens}"
    layouts = operands.keys.layout, operands.values.layout
    code_bytes = sum(layout.record_bytes for layout in layouts) / 64  # scales and attended bits included
    token_bytes = code_bytes + 2 * (operands.latent_width + operands.next_width)
    operand_bytes = sum(t.nbytes for t in vars(operands).values() if isinstance(t, Tensor))
    total = int(rows * tokens * token_bytes) + operand_bytes
    count = max(2, -(-ROTATED_BYTES // total))
    sets = [make_inputs(rows, tokens, operands, random) for _ in range(count)]
    contestants = (hopper_calls if runs_on_hopper(sets[0]) else triton_calls)(sets)
    contestants["Triton chain"] = [
        lambda s=s: attend_codes(*s.step, scaling=SCALING, backend="triton") for s in sets
    ]
    contestants[KEPT] = [lambda s=s: attend_codes(*s.step, scaling=SCALING, carry=False) for s in sets]
    contestants["chain"] = [lambda s=s: attend_codes(*s.step, scaling=SCALING) for s in sets]
    result = [timing_row(c, name, setting, graph_times(f, replays)) for c, f in contestants.items()]
    bits = code_bytes * 8 / (2 * WIDTH)
    for row in result:
        row["bits_per_value"] = bits
    result[-1] |= {"floor_ms": total / bandwidth, "bytes_moved": total}  # the chain's
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--replays", type=int, default=25)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("decode_kernels: needs a CUDA GPU")
    random = torch.Generator(device="cuda")
    random.manual_seed(0)
    layers: dict[str, DecodeOperands] = {}
    checked: dict[str, dict[str, float]] = {}
    for widths, rank in SETTINGS:
        setting = f"{widths}, rank {rank}"
        layers[setting] = make_operands(FIELD_WIDTHS[widths], rank, random)
        checked[setting] = errors(layers[setting], random)
        print(setting, {k: f"{v:.1e}" for k, v in checked[setting].items()}, flush=True)
        if not max(checked[setting].values()) < TOLERANCE:
            sys.exit(f"decode_kernels: wrong results at {setting}: no times are taken")
    bandwidth = read_bandwidth()
    rows = []
    for shape in SHAPES:
        times = bf16_times(*shape, options.replays)
        base = timing_row("bf16 attention", f"{shape[0]} x {shape[1]}", "", times)
        base |= {"ratio_to_bf16": 1.0, "bits_per_value": 16.0}
        base["floor_ms"] = shape[0] * shape[1] * WIDTH * 4 / bandwidth
        rows.append(base)
        for setting, operands in layers.items():
            found = setting_rows(shape, setting, operands, bandwidth, options.replays, random)
            found[-1]["relative_errors"] = {"measured_on": "2 x 4096", **checked[setting]}
            rows.extend(row | {"ratio_to_bf16": row["median_ms"] / base["median_ms"]} for row in found)
            torch.cuda.empty_cache()
        write_benchmark(options.out, rows)
    print_table(rows)


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print microseconds by shape and setting."""
    print(torch.cuda.get_device_name())
    columns = ["scores", "next_latents", "weighted_code_sum", "combine", "Triton chain", "chain", KEPT]
    heads = [*(column[:9] for column in columns[:-1]), "kept"]
    print(f"{'shape':12} {'setting':25} {'bf16':>7}", *(f"{h:>9}" for h in heads), "floor  ratio  kept")
    bf16 = {row["shape"]: row["median_ms"] for row in rows if row["contestant"] == "bf16 attention"}
    by_case: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        if row["setting"]:
            by_case.setdefault((row["shape"], row["setting"]), {})[row["contestant"]] = row
    for (shape, setting), found in by_case.items():
        numbers = " ".join(f"{found[c]['median_ms'] * 1e3:9.1f}" for c in columns)
        chain = found["chain"]
        print(
            f"{shape:12} {setting:25} {bf16[shape] * 1e3:7.1f} {numbers} {chain['floor_ms'] * 1e3:5.1f} "
            f"{chain['ratio_to_bf16']:6.2f} {found[KEPT]['ratio_to_bf16']:6.2f}"
        )


if __name__ == "__main__":
    main()
