"""Tables of kernels: attention to codes and encoding."""

from __future__ import annotations

from tables.cells import measured_with, table
from tables.committed import rows


def kernels() -> str:
    content, all_rows = rows("decode-h200")
    found = {(row["shape"], row["setting"], row["contestant"]): row for row in all_rows}
    parts = list(dict.fromkeys(row["contestant"] for row in all_rows if row["setting"]))
    lines = []
    for shape, setting in dict.fromkeys((row["shape"], row["setting"]) for row in all_rows if row["setting"]):
        chain, exact = found[shape, setting, "chain"], found[shape, "", "bf16 attention"]
        times = [
            f"{1e3 * row['median_ms']:.0f}" for row in (exact, *(found[shape, setting, p] for p in parts))
        ]
        bits, ratio = f"{chain['bits_per_value']:.2f}", f"{chain['ratio_to_bf16']:.2f}"
        kept = f"{found[shape, setting, 'chain, latents kept']['ratio_to_bf16']:.2f}"
        lines.append([shape, setting, bits, *times, ratio, kept])
    titles = [
        "tokens",
        "setting",
        "bits per value",
        "bf16 attention",
        *parts,
        "chain to bf16",
        "kept to bf16",
    ]
    return table(titles, lines, f"Microseconds, medians; {measured_with(content)}.")


def encode_kernels() -> str:
    content, all_rows = rows("encode-h200")
    lines = []
    for row in all_rows:
        ratio = f"{100 * row['ratio_to_prefill']:.1f} %" if "ratio_to_prefill" in row else ""
        lines.append([row["contestant"], row["setting"], f"{1e3 * row['median_ms']:.0f}", ratio])
    titles = ["operation", "setting", "µs", "of a layer's prefill"]
    return table(titles, lines, f"{all_rows[0]['shape']} tokens, medians; {measured_with(content)}.")


def encode_precision() -> str:
    _, all_rows = rows("encode-precision-demo")
    lines = []
    for row in all_rows:
        shares = [f"{100 * row[name]:.2f} %" for name in ("codes_moved", "scales_moved")]
        ratios = [f"{row[name]:.4f}" for name in ("error_ratio", "decoded_error_ratio")]
        lines.append([row["contestant"], *shares, *ratios])
    first = all_rows[0]
    return table(
        ["operands", "codes moved", "scales moved", "error, encoder's", "error, of records"],
        lines,
        f"The demo model's keys and values of {first['tokens']} tokens of {first['data']}, all layers. Codes "
        "and scales against float32 operands; mean weighted squared errors relative to those of "
        "`LayerCodec.encode`, each precision with its own latents.",
    )
