"""Attention to codes against reconstructing them: predictions on real text and greedy tokens.

    python benchmarks/attention_paths.py --data-dir DIR --out benchmarks/results/attention-paths-demo.json

Rows: mean divergence of the two paths' predictions, and of each from the exact cache's, over single-token
steps that read wikitext2:test behind a prompt; greedy tokens of ten prompts through either path.

No block is compressed in the steps whose predictions are compared. A rounding difference in the last bits of
a new token's keys can move one of its codes, which then changes what all later layers code: both paths are as
far from the exact cache as before, but no longer near each other.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aquakv import AquaCache, ModelCodec, calibrate, preset
from aquakv.data import token_sequences
from aquakv.evaluation.results import write_benchmark
from aquakv.models.loading import LoadedModel, load_model
from fidelity import NEW_TOKENS, make_prompts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--bits", type=float, default=2.3)
    parser.add_argument("--calibration-samples", type=int, default=32)
    parser.add_argument("--context", type=int, default=1432)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--greedy", nargs="*", default=["float32"], help="dtypes of the greedy tokens")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    loaded = load_model("demo", "float32", options.device)
    tokens = token_sequences(
        ["wikitext2:validation"], loaded.tokenizer, options.calibration_samples, 2048, options.data_dir
    )
    codec = calibrate(loaded.model, tokens, preset("decode", options.bits))
    read = token_sequences(
        ["wikitext2:test"],
        loaded.tokenizer,
        options.samples,
        options.context + NEW_TOKENS + 1,
        options.data_dir,
    )
    prompts = make_prompts(loaded, options.data_dir)["recite"]
    rows = []
    for dtype in options.dtype:
        loaded.model.to(getattr(torch, dtype))
        rows.append(compare_predictions(loaded, codec, read, options.context, dtype))
        print(rows[-1], flush=True)
        if dtype in options.greedy:
            rows.append(compare_greedy(loaded, codec, prompts, dtype))
            print(rows[-1], flush=True)
        write_benchmark(options.out, rows)


def steps(loaded: LoadedModel, cache: AquaCache | None, tokens: Tensor, context: int) -> tuple[Tensor, Any]:
    """Return log-probabilities of every single-token step behind a prompt, ``[steps, rows, vocabulary]``."""
    model = loaded.model
    with torch.inference_mode():
        prompt = tokens[:, :context]
        state = model(input_ids=prompt, past_key_values=cache, use_cache=True).past_key_values
        logits = [
            model(input_ids=tokens[:, [place]], past_key_values=state, use_cache=True).logits[:, -1]
            for place in range(context, tokens.shape[1] - 1)
        ]
    return torch.stack(logits).double().log_softmax(-1), state


def compare_predictions(
    loaded: LoadedModel, codec: ModelCodec, tokens: Tensor, context: int, dtype: str
) -> dict[str, Any]:
    tokens = tokens.to(loaded.model.device)

    def divergence(base: Tensor, other: Tensor) -> float:
        return float((base.exp() * (base - other)).sum(-1).mean())

    exact = steps(loaded, None, tokens, context)[0]
    general, state = steps(loaded, AquaCache(loaded.model, codec, attention="general"), tokens, context)
    fused = steps(loaded, AquaCache(loaded.model, codec, attention="fused"), tokens, context)[0]
    return {
        "contestant": "predictions, fused against general",
        "dtype": dtype,
        "data": "wikitext2:test",
        "samples": len(tokens),
        "context": context,
        "steps": len(exact),
        "mean_kl": divergence(general, fused),
        "mean_kl_general_to_exact": divergence(exact, general),
        "mean_kl_fused_to_exact": divergence(exact, fused),
        "top1_agreement": float((general.argmax(-1) == fused.argmax(-1)).double().mean()),
        "bits_per_value": state.footprint().bits_per_value,
    }


def compare_greedy(loaded: LoadedModel, codec: ModelCodec, prompts: list[str], dtype: str) -> dict[str, Any]:
    identical = before_difference = 0
    gaps = []
    settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    for prompt in prompts:
        inputs = loaded.tokenizer(prompt, return_tensors="pt").to(loaded.model.device)
        general = loaded.model.generate(
            **inputs,
            **settings,
            past_key_values=AquaCache(loaded.model, codec, attention="general"),
            output_logits=True,
            return_dict_in_generate=True,
        )
        cache = AquaCache(loaded.model, codec, attention="fused")
        fused = loaded.model.generate(**inputs, **settings, past_key_values=cache)
        equal = (general.sequences == fused)[0, -NEW_TOKENS:]
        common = int(equal.int().cumprod(0).sum())
        before_difference += common
        identical += common == NEW_TOKENS
        if common < NEW_TOKENS:  # how sure the general path was where the two part
            best = general.logits[common][0].float().topk(2).values
            gaps.append(round(float(best[0] - best[1]), 5))
    return {
        "contestant": "greedy tokens, fused against general",
        "dtype": dtype,
        "prompts": len(prompts),
        "new_tokens": NEW_TOKENS,
        "identical_prompts": identical,
        "tokens_before_first_difference": before_difference,
        "tokens": len(prompts) * NEW_TOKENS,
        "logit_gaps_at_first_difference": gaps,
    }


if __name__ == "__main__":
    main()
