"""Small literal results of every kind that a report takes."""

import json

ENVIRONMENT = {
    "versions": {"aquakv": "0.1.0", "torch": "2.13.0", "python": "3.11.7"},
    "device": "AMD EPYC, 2 threads",
    "git_sha": "0123456789abcdef0123456789abcdef01234567-dirty",
}
METHODS = {"storage 1.25": 1.3, "decode 2.3": 2.31, "kivi:2": 3.0, "kvquant:3+window": 3.53, "exact": 16.0}


def quality(contestant, bits, increase, **more):
    return {
        "contestant": contestant,
        "model": "demo",
        "data": "wikitext2:test",
        "seq_len": 2048,
        "samples": 4,
        "dtype": "bfloat16",
        "bits_per_value": bits,
        "bits_per_value_total": bits + 0.5,
        "relative_increase": increase,
        "relative_increase_stderr": 0.002,
        "mean_kl": max(0.0, increase) / 2,
        "top1_agreement": 1 - max(0.0, increase),
        **more,
    }


QUALITY = [
    quality("storage 1.25", 1.3, 0.007),
    quality("storage 2", 2.05, 0.001),
    quality("decode 2.3", 2.31, 0.0094),
    quality("kivi:2", 3.0, 0.303),
    quality("kivi:4", 5.0, -0.0005),
    quality("exact", 16.0, 0.0),
]


def needle(contestant, bits, slip):
    cells = [
        {
            "length": length,
            "depth": depth,
            "accuracy": max(0.0, 1 - slip * length / 1024 * (1 - depth)),
            "answer_nll": 0.1 + slip * depth,
            "exact_answer_nll": 0.1,
        }
        for length in (1024, 2048, 4096, 8192)
        for depth in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    return {
        "contestant": contestant,
        "model": "demo",
        "task": "needle",
        "bits_per_value": bits,
        "cells": cells,
    }


NEEDLE = [needle("storage 1.25", 1.3, 0.02), needle("kivi:2", 3.0, 0.13), needle("exact", 16.0, 0.0)]

SCORES = [
    {
        "contestant": name,
        "model": "demo",
        "task": "ruler",
        "subset": subset,
        "bits_per_value": bits,
        "score": score - 0.3 / bits,
        "baseline_score": score,
    }
    for subset, score in (("niah_single_1", 0.98), ("vt", 0.61), ("qa_1", 0.32))
    for name, bits in METHODS.items()
    if name != "exact"
]

DRIFT = [
    {
        "contestant": name,
        "model": "demo",
        "task": "drift",
        "data": "wikitext2:test",
        "bits_per_value": bits,
        "bins": [
            {
                "start": 1024 * i,
                "end": 1024 * (i + 1),
                "mean_kl": (1 + 0.1 * i) / bits**3,
                "top1_agreement": 0.95,
            }
            for i in range(8)
        ],
    }
    for name, bits in METHODS.items()
    if name != "exact"
]


def memory(contestant, context, part, *, fits=True):
    exact = 23040 * context
    held = int(exact * part) if fits else None
    return {
        "contestant": contestant,
        "phase": "memory",
        "rows": 1,
        "context": context,
        "dtype": "bfloat16",
        "steps": 130,
        "prefill_chunk": 2048,
        "held_bytes": held,
        "code_bytes": held,
        "outlier_bytes": 0,
        "bits_per_value": 16 * part if fits else None,
        "prefill_peak_bytes": held and held + 90_000_000,
        "steady_bytes": held,
        "peak_bytes": held and held + 5_000_000,
        "held_ratio_to_exact": part if fits else None,
        "prefill_peak_ratio_to_exact": part if fits else None,
        "peak_ratio_to_exact": part if fits else None,
    }


MEMORY = [
    memory(name, context, part, fits=name != "exact" or context < 131072)
    for context in (1024, 4096, 16384, 65536, 131072)
    for name, part in (("exact", 1.0), ("decode, general path", 0.16), ("decode, fused path", 0.15))
]

SPEED = [
    {
        "contestant": name,
        "phase": "decode step",
        "context": 2000,
        "median_ms": 40 * ratio,
        "p20_ms": 39 * ratio,
        "p80_ms": 44 * ratio,
        "ratio_to_bf16": ratio,
        "bits_per_value": bits,
    }
    for name, ratio, bits in (("exact", 1.0, 16.0), ("decode 2 bit", 2.3, 2.04), ("paper 2 bit", 2.5, 2.15))
]

CALIBRATION = [
    {"contestant": "llama from disk", "layers": 4, "total_layers": 80, "phase": phase, "seconds": seconds}
    for phase, seconds in (("plan: fit", 2.0), ("observe", 30.0), ("fit", 6.0), ("layer 0: fit", 1.5))
] + [
    {
        "contestant": "llama from disk",
        "layers": 4,
        "total_layers": 80,
        "phase": "total",
        "seconds": 38.0,
        "projected_total_seconds": 830.0,
        "peak_device_bytes": 60 << 30,
    }
]

GRID = [
    {
        "model": "demo",
        "method": "decode 2.3",
        "task": {"name": "perplexity", "data": "pydoc:test", "samples": 2, "seq_len": 512},
        "status": "ok",
        "error": None,
        "bits_per_value": 2.31,
        "relative_increase": 0.004,
        "mean_kl": 0.002,
        "top1_agreement": 0.98,
        **ENVIRONMENT,
    },
    {
        "model": "demo",
        "method": "kvtc:2",
        "task": {"name": "perplexity", "data": "pydoc:test"},
        "status": "failed",
        "error": "kvtc needs <text> to be fitted to",
        **ENVIRONMENT,
    },
]

ALL = {
    "quality": QUALITY,
    "needle": NEEDLE,
    "scores": SCORES,
    "drift": DRIFT,
    "memory": MEMORY,
    "speed": SPEED,
    "calibration": CALIBRATION,
}


def write(folder, rows=None):
    """Write benchmark files of every kind and a grid's lines; return their paths."""
    paths = []
    for name, members in (ALL if rows is None else rows).items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps({"schema_version": 1, "model": "demo", **ENVIRONMENT, "rows": members}))
        paths.append(path)
    if rows is None:
        path = folder / "grid.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in GRID))
        paths.append(path)
    return paths
