"""``aquakv generate``: text through a compressed cache."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import TextStreamer, set_seed

from aquakv.cache import AquaCache
from aquakv.cli import options
from aquakv.codec import ModelCodec
from aquakv.errors import DataError


def generate(
    model: options.Model,
    codec: Annotated[Path, typer.Option("--codec", help="Codec file.")],
    prompt: Annotated[str, typer.Option("--prompt", help="Text to continue; '-' reads standard input.")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens at most.")] = 128,
    chat: Annotated[
        bool, typer.Option("--chat", help="Wrap the prompt in the model's chat template.")
    ] = False,
    sample: Annotated[bool, typer.Option("--sample", help="Sample instead of taking the likeliest.")] = False,
    seed: Annotated[int, typer.Option("--seed", help="Seed for --sample.")] = 0,
    keep_decoded: Annotated[
        bool,
        typer.Option(
            "--keep-decoded",
            help="Decode every code once and keep the result: fast, for the memory of an exact cache.",
        ),
    ] = False,
    keep_latents: Annotated[
        bool,
        typer.Option(
            "--keep-latents",
            help="Keep latents beside the codes: faster steps on a GPU, for more memory.",
        ),
    ] = False,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.Device = "auto",
) -> None:
    """Generate text while the cache stays compressed."""
    loaded_codec = ModelCodec.load(codec)
    if prompt == "-":
        prompt = typer.get_text_stream("stdin").read()
    if not prompt.strip():
        raise DataError("--prompt is empty; give some text to continue")
    loaded = options.load(model, dtype, device)
    tokenizer: Any = loaded.tokenizer
    if chat:
        if getattr(tokenizer, "chat_template", None) is None:
            raise DataError(f"{loaded.name} has no chat template; leave out --chat")
        turn = [{"role": "user", "content": prompt}]
        prompt = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat).to(loaded.model.device)
    options.require_length(int(inputs["input_ids"].shape[1]) + max_new_tokens, loaded)
    cache = AquaCache(loaded.model, loaded_codec, keep_decoded=keep_decoded, keep_latents=keep_latents)
    if keep_latents and (reason := cache.why_no_kernels()) is not None:
        # The text is the same either way.
        options.messages.print(
            f"[dim]--keep-latents keeps none, as kernels do not attend: {reason}[/dim]", highlight=False
        )
    set_seed(seed)
    with torch.no_grad():
        model_: Any = loaded.model
        model_.generate(
            **inputs,
            past_key_values=cache,
            max_new_tokens=max_new_tokens,
            do_sample=sample,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
    options.messages.print(f"[dim]cache: {cache.footprint()}[/dim]", highlight=False, soft_wrap=True)
