"""Tables of kernels: attention to codes and encoding."""

from __future__ import annotations

from tables.committed import rows


def kernels() -> str:
    content, all_rows = rows("decode-h200")
    found = {(row["shape"], row["setting"], row["contestant"]): row for row in all_rows}
    parts = list(dict.fromkeys(row["contestant"] for row in all_rows if row["setting"]))
    lines = [
        f"| tokens | setting | bits per value | bf16 attention | {' | '.join(parts)} | chain to bf16 |",
        "| --- " * (len(parts) + 5) + "|",
    ]
    for shape, setting in dict.fromkeys((row["shape"], row["setting"]) for row in all_rows if row["setting"]):
        chain, exact = found[shape, setting, "chain"], found[shape, "", "bf16 attention"]
        times = [
            f"{1e3 * row['median_ms']:.0f}" for row in (exact, *(found[shape, setting, p] for p in parts))
        ]
        bits, ratio = f"{chain['bits_per_value']:.2f}", f"{chain['ratio_to_bf16']:.2f}"
        lines.append(f"| {' | '.join([shape, setting, bits, *times, ratio])} |")
    lines += ["", f"Microseconds, medians; torch {content['versions']['torch']}, {content['device']}."]
    return "\n".join(lines)


def encode_kernels() -> str:
    content, all_rows = rows("encode-h200")
    lines = ["| operation | setting | µs | of a layer's prefill |", "| --- | --- | --- | --- |"]
    for row in all_rows:
        ratio = f"{100 * row['ratio_to_prefill']:.1f} %" if "ratio_to_prefill" in row else ""
        cells = [row["contestant"], row["setting"], f"{1e3 * row['median_ms']:.0f}", ratio]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"{all_rows[0]['shape']} tokens, medians; torch {content['versions']['torch']}, {content['device']}.",
    ]
    return "\n".join(lines)


def encode_precision() -> str:
    _, all_rows = rows("encode-precision-demo")
    lines = [
        "| operands | codes moved | scales moved | error, encoder's | error, of records |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in all_rows:
        shares = [f"{100 * row[name]:.2f} %" for name in ("codes_moved", "scales_moved")]
        ratios = [f"{row[name]:.4f}" for name in ("error_ratio", "decoded_error_ratio")]
        lines.append(f"| {' | '.join([row['contestant'], *shares, *ratios])} |")
    first = all_rows[0]
    lines += [
        "",
        f"The demo model's keys and values of {first['tokens']} tokens of {first['data']}, all layers. Codes "
        "and scales against float32 operands; mean weighted squared errors relative to those of "
        "`LayerCodec.encode`, each precision with its own latents.",
    ]
    return "\n".join(lines)
