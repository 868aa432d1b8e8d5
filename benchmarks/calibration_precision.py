r"""What the precision of second moments does to a codec of the demo model, on a CPU.

    python benchmarks/calibration_precision.py --data-dir DIR \\
        --out benchmarks/results/calibration-precision-demo.json

Second moments of centred keys, values and reconstructions are sums of products; sums of 4096 products go
into float64 in any case. Contestants round the factors: not at all (products in float64), to float32, to
TF32's eleven significant bits as a GPU's tensor cores do, and to bfloat16's eight. Everything else is the
same. Of each codec: how far its first predictor is from float64's, relative to that (later ones read codes,
of which some turn by any rounding); the held-out error that codes leave, relative to float64's, mean and
worst over layers; and the increase of perplexity and the divergence of predictions from an exact cache's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from aquakv import ModelCodec, calibrate, preset
from aquakv.calibration.history import InputMoments
from aquakv.data import token_sequences
from aquakv.evaluation.quality import evaluate_quality
from aquakv.evaluation.results import write_benchmark
from aquakv.models.loading import load_model


def _to_tf32(rows: Tensor) -> Tensor:
    """Round float32 to eleven significant bits, halves to even."""
    bits = rows.view(torch.int32)
    odd = (bits >> 13) & 1
    return ((bits + 0xFFF + odd) & ~0x1FFF).view(torch.float32)


ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "float64": lambda rows: rows.double(),
    "float32": lambda rows: rows,
    "TF32": _to_tf32,
    "bfloat16": lambda rows: rows.bfloat16().float(),
}


def fit(model: Any, tokens: Tensor, name: str, rounding: Callable[[Tensor], Tensor]) -> ModelCodec:
    """Calibrate with rounded factors."""
    centred = InputMoments._centred
    with patch.object(InputMoments, "_centred", lambda self, *a: rounding(centred(self, *a))):
        return calibrate(model, tokens, preset(name))


def row(contestant: str, codec: ModelCodec, exact: ModelCodec) -> dict[str, Any]:
    """Compare a codec with the one from float64 products."""
    first = next(
        (index, kind)
        for index, layer in enumerate(exact.layers)
        for kind in ("keys", "values")
        if getattr(layer, kind).predictor is not None
    )
    ours, theirs = (_map(getattr(one.layers[first[0]], first[1]).predictor.factors) for one in (codec, exact))
    errors = [
        one[kind]["reconstruction_error"] / other[kind]["reconstruction_error"]
        for one, other in zip(codec.calibration["layers"], exact.calibration["layers"], strict=True)
        for kind in ("keys", "values")
    ]
    return {
        "contestant": contestant,
        "preset": codec.config.preset,
        "first_predictor_differs": float((ours - theirs).norm() / theirs.norm()),
        "held_out_error_ratio": sum(errors) / len(errors),
        "held_out_error_ratio_worst": max(errors),
    }


def _map(factors: tuple[Tensor, ...]) -> Tensor:
    first = factors[0].double()
    return first if len(factors) == 1 else first @ factors[1].double()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    loaded = load_model("demo", device="cpu")
    kinds = ["wikitext2:validation", "pydoc:train", "stdlib:train"]
    tokens = token_sequences(kinds, loaded.tokenizer, args.samples, args.seq_len, args.data_dir)
    test = token_sequences(["wikitext2:test"], loaded.tokenizer, 4, args.seq_len, args.data_dir)
    rows = []
    for name in ("paper", "decode"):
        exact = None
        for contestant, rounding in ROUNDINGS.items():
            codec = fit(loaded.model, tokens, name, rounding)
            exact = codec if exact is None else exact
            quality = evaluate_quality(loaded.model, test, {"": codec}, protocol="single-pass")[""]
            rows.append(
                {
                    **row(contestant, codec, exact),
                    "tokens": tokens.numel(),
                    "relative_increase": quality.relative_increase,
                    "mean_kl": quality.mean_kl,
                }
            )
            print(rows[-1], flush=True)
    write_benchmark(args.out, rows)


if __name__ == "__main__":
    main()
