"""``aquakv demo``: the whole system on a small model, in about seven minutes on two CPU cores."""

from __future__ import annotations

import time
from typing import Annotated, Any

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from aquakv.cache import AquaCache
from aquakv.calibration import calibrate_many
from aquakv.cli import options
from aquakv.cli.commands.calibrate import DEFAULT_DATA
from aquakv.codec import ModelCodec
from aquakv.config import preset
from aquakv.data import load_texts, token_sequences
from aquakv.evaluation.quality import Quality, evaluate_quality
from aquakv.evaluation.results import SCHEMA_VERSION, environment, quality_fields, write_json
from aquakv.files import require_writable
from aquakv.models.demo import DEMO

CONTESTANTS = {
    "higgs 2 bit": preset("higgs", 2),
    "paper 2 bit": preset("paper", 2),
    "decode 2 bit": preset("decode", 2),
    "storage 1 bit": preset("storage", 1),
}
SHOWN = "decode 2 bit"
_ARTICLE_CHARACTERS = 2400


def demo(
    data: Annotated[
        list[str] | None,
        typer.Option("--data", help=f"Text to calibrate on: {options.DATA_HELP} [default: {DEFAULT_DATA}]"),
    ] = None,
    eval_data: Annotated[
        list[str] | None,
        typer.Option("--eval-data", help="Text to evaluate on. [default: pydoc:test and stdlib:test]"),
    ] = None,
    data_dir: options.DataDir = None,
    samples: Annotated[int, typer.Option("--samples", min=2, help="Calibration sequences.")] = 12,
    eval_samples: Annotated[int, typer.Option("--eval-samples", min=1, help="Evaluation sequences.")] = 4,
    seq_len: options.SeqLen = 2048,
    json_out: options.Json = None,
) -> None:
    """Calibrate, evaluate and generate on SmolLM2-135M-Instruct; prints a table."""
    started = time.perf_counter()
    if json_out is not None:
        require_writable(json_out, "result")
    loaded = options.load(DEMO, options.Dtype.auto, "auto")
    model, tokenizer = loaded.model, loaded.tokenizer
    options.require_length(seq_len, loaded)
    sources, eval_sources = data or DEFAULT_DATA, eval_data or ["pydoc:test", "stdlib:test"]
    tokens = token_sequences(sources, tokenizer, samples, seq_len, data_dir)
    eval_tokens = token_sequences(eval_sources, tokenizer, eval_samples, seq_len, data_dir)
    with options.progress_bar(f"Calibrating {len(CONTESTANTS)} codecs", "batches") as report:
        codecs = calibrate_many(model, tokens, CONTESTANTS, record={"data": sources}, progress=report)
    with options.progress_bar("Evaluating through the real cache", "sequences") as report:
        qualities = evaluate_quality(model, eval_tokens, codecs, progress=report)
    elapsed = time.perf_counter() - started
    console = Console()
    console.print(_table(qualities, model.dtype, eval_samples, seq_len))
    console.print(
        f"Calibrated on {tokens.numel()} tokens of {' and '.join(sources)}, evaluated on "
        f"{eval_tokens.numel()} tokens of {' and '.join(eval_sources)}.\n",
        highlight=False,
    )
    text, cache = _generate(model, tokenizer, codecs[SHOWN])
    console.print(f"[bold]Generated through the {SHOWN} cache:[/bold]\n{text}\n", highlight=False)
    console.print(f"The cache then: {cache.footprint()}", highlight=False)
    if json_out is not None:
        rows: list[dict[str, Any]] = [
            {
                "contestant": name,
                "bits_per_value_codes": codecs[name].bits_per_value,
                **quality_fields(quality),
            }
            for name, quality in qualities.items()
        ]
        setting = {"command": "demo", "model": DEMO, "data": eval_sources, "calibration_data": sources}
        shape = {
            "samples": samples,
            "eval_samples": eval_samples,
            "seq_len": seq_len,
            "protocol": "streaming",
        }
        result = {"schema_version": SCHEMA_VERSION, **setting, **shape, **environment(), "rows": rows}
        write_json(json_out, {**result, "elapsed_s": round(elapsed, 3)})


def _table(qualities: dict[str, Quality], dtype: torch.dtype, sequences: int, seq_len: int) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("cache", no_wrap=True)
    for name in ("bits", "perplexity", "increase", "KL", "top-1", "size"):
        table.add_column(name, justify="right", no_wrap=True)
    first = next(iter(qualities.values()))
    exact_bytes = first.held_values * dtype.itemsize // sequences
    bits = f"{8 * dtype.itemsize:.2f}"
    table.add_row(
        "exact", bits, f"{first.baseline_perplexity:.3f}", "", "", "", options.mebibytes(exact_bytes)
    )
    for name, quality in qualities.items():
        if quality.bits_per_value is None:
            continue
        table.add_row(
            name,
            f"{quality.bits_per_value:.2f}",
            f"{quality.perplexity:.3f}",
            options.increase(quality.relative_increase, quality.relative_increase_stderr),
            f"{quality.mean_kl:.4f}",
            f"{100 * quality.top1_agreement:.1f} %",
            options.mebibytes(quality.held_bytes // sequences),
        )
    table.caption = (
        "bits: measured, per value of the compressed region; increase: of perplexity; KL: nats per token; "
        f"size: all bytes held for {seq_len} tokens, exact ones included"
    )
    table.caption_justify = "left"
    return table


def _generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, codec: ModelCodec
) -> tuple[str, AquaCache]:
    """Let the model sum up an article that is long enough for most of the cache to be codes."""
    article = next(text for text in load_texts("pydoc:test") if len(text) > _ARTICLE_CHARACTERS)
    question = f"{article[:_ARTICLE_CHARACTERS]}\n\nExplain in one paragraph what the text above is about."
    chat = [{"role": "user", "content": question}]
    prompt = str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(model.device)
    cache = AquaCache(model, codec)
    with torch.no_grad():
        output: Tensor = model.generate(**inputs, past_key_values=cache, max_new_tokens=120, do_sample=False)  # type: ignore[assignment]
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)), cache
