"""LongBench's multi_news with the exact cache: through lm-eval with our caches plugged in, and without both.

The other way is transformers' ``generate`` on prompts written, shortened and scored here, with the package
rouge called directly. Both have to give the same ROUGE; the script fails if they do not.

    python benchmarks/longbench_exact.py --data-dir DIR --chat --limit 4 --max-length 2048 --out OUT.json
"""

import argparse
import math
import sys
from pathlib import Path
from statistics import fmean

import torch
from rouge import Rouge

from aquakv.data import named_file, read_records
from aquakv.evaluation.results import write_benchmark
from aquakv.evaluation.tasks import LongBench, Setting
from aquakv.models.loading import load_model, quiet

PROMPT = (
    "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n{context}\n\n"
    "Now, write a one-page summary of all the news.\n\nSummary:"
)


def encoded(tokenizer, text, chat):
    """Return a prompt's tokens ``[1, tokens]``."""
    if not chat:
        return tokenizer(text, return_tensors="pt")["input_ids"]
    turn = [{"role": "user", "content": text}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    special = not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))  # never twice
    return tokenizer(text, return_tensors="pt", add_special_tokens=special)["input_ids"]


def plain_scores(loaded, path, limit, max_length, max_new_tokens, chat):
    """Return ROUGE-L of each document, with nothing of ours nor of lm-eval's between."""
    scores = []
    room = max_length - max_new_tokens
    for _, record in list(read_records(path))[:limit]:
        ids = encoded(loaded.tokenizer, PROMPT.format(context=record["context"]), chat)
        if ids.shape[1] > room:  # LongBench takes out the middle
            ids = torch.cat([ids[:, : room // 2], ids[:, -(room // 2) :]], 1)
        ids = ids.to(loaded.model.device)
        mask = torch.ones_like(ids)
        with torch.no_grad():
            out = loaded.model.generate(
                ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False
            )
        answer = loaded.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
        found = [
            Rouge().get_scores([answer], [one], avg=True)["rouge-l"]["f"] if answer else 0.0
            for one in record["answers"]
        ]
        scores.append(max(found))
    return scores


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    loaded = load_model(args.model, args.dtype, args.device)
    task = LongBench(
        limit=args.limit, max_length=args.max_length, max_new_tokens=args.max_new_tokens, chat=args.chat
    )
    found = task.evaluate(loaded, {"exact": None}, Setting(args.data_dir))["exact"]
    path = named_file("longbench/multi_news", "longbench/multi_news.jsonl", args.data_dir)
    with quiet():
        plain = plain_scores(loaded, path, args.limit, args.max_length, args.max_new_tokens, args.chat)
    setting = {
        "data": "longbench/multi_news",
        "model": args.model,
        "model_dtype": str(loaded.model.dtype).removeprefix("torch."),
        "metric": "ROUGE-L, F",
        "samples": args.limit,
        "max_length": args.max_length,
        "max_new_tokens": args.max_new_tokens,
        "chat": args.chat,
    }
    rows = [
        {"contestant": f"{found['harness']} with our cache class, exact", **setting, "score": found["score"]},
        {"contestant": "transformers' generate and rouge, called directly", **setting, "score": fmean(plain)},
    ]
    for row in rows:
        print(f"{row['contestant']}: {row['score']:.10f}")
    if not math.isclose(rows[0]["score"], rows[1]["score"], rel_tol=1e-12):
        sys.exit("the two differ")
    write_benchmark(args.out, rows)


if __name__ == "__main__":
    main()
