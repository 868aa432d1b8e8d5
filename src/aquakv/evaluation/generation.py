"""Replies to questions about a context that a cache holds compressed.

In one pass over a whole prompt attention would be exact among its tokens, and only what follows would see
codes. So the context is fed first, and the question once that is compressed; for all methods alike.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, PreTrainedModel

from aquakv.errors import ConfigError
from aquakv.evaluation.methods import Method, coded_tokens, fresh_cache, held_by
from aquakv.evaluation.prompts import Prompt
from aquakv.evaluation.quality import Quality, Ticker
from aquakv.models.adapter import adapt
from aquakv.models.loading import LoadedModel


@dataclass(frozen=True)
class Reply:
    """What a model made of a prompt.

    Attributes
    ----------
    text
        What it generated, greedily, up to an end of sequence.
    answer_nll
        Mean negative log-likelihood of the right answer, in nats per token; None where none was given.
    """

    text: str
    answer_nll: float | None = None


@dataclass
class Replies:
    """Replies of a method to all prompts, in order, and what its caches held when the questions came."""

    replies: list[Reply]
    held: Quality = field(default_factory=Quality)

    def size_fields(self) -> dict[str, Any]:
        """Return what results say of a cache's size."""
        return {
            "bits_per_value": self.held.bits_per_value,
            "bits_per_value_total": self.held.bits_per_value_total,
        }


def reply_to(
    loaded: LoadedModel,
    methods: Mapping[str, Method],
    prompts: Sequence[Prompt],
    max_new_tokens: Sequence[int],
    *,
    batch_size: int = 1,
    progress: Any = None,
) -> tuple[Replies, dict[str, Replies]]:
    """Have prompts replied to with the exact cache and by methods.

    Parameters
    ----------
    loaded
        The model and its tokenizer.
    methods
        By name; None is the exact cache.
    prompts
        The same for all methods.
    max_new_tokens
        For each prompt, tokens of a reply at most.
    batch_size
        Prompts at once, where they are equally long.
    progress
        Called as prompts get done.

    Returns
    -------
    tuple
        Replies with the exact cache, and those by each method's name.

    Raises
    ------
    ConfigError
        A prompt is longer than the model takes, or so short that a method would compress nothing.
    """
    for prompt, new in zip(prompts, max_new_tokens, strict=True):
        require_room(loaded, prompt.tokens, new)
    shortest = min((len(prompt.context) for prompt in prompts), default=0)
    for name, method in methods.items():
        require_coded(name, method, shortest)
    others = {name: method for name, method in methods.items() if method is not None}
    tick = Ticker(len(prompts) * (1 + len(others)), progress)

    def all_replies(method: Method) -> Replies:
        found: list[Reply | None] = [None] * len(prompts)
        held = Quality()
        for batch in _batches(prompts, max_new_tokens, batch_size):
            chosen = [prompts[i] for i in batch]
            for i, reply in zip(
                batch, _reply(loaded, method, chosen, max_new_tokens[batch[0]], held), strict=True
            ):
                found[i] = reply
            tick(len(batch))
        return Replies([reply for reply in found if reply is not None], held)

    exact = all_replies(None)
    return exact, {name: exact if m is None else all_replies(m) for name, m in methods.items()}


def require_room(loaded: LoadedModel, tokens: int, new_tokens: int) -> None:
    """Raise `ConfigError` if a prompt and what is generated behind it are more than a model takes."""
    most = adapt(loaded.model).max_length
    if most is not None and tokens + new_tokens > most:
        raise ConfigError(
            f"{tokens} tokens and {new_tokens} new ones are more than {loaded.name}'s maximum of {most}; "
            f"give a length of {most - new_tokens} or less"
        )


def require_coded(name: str, method: Method, length: int) -> None:
    """Raise `ConfigError` if a cache of so many tokens would hold no codes."""
    if coded_tokens(method, length) == 0:
        raise ConfigError(
            f"a context of {length} tokens is too short: nothing of it would be compressed ({name} keeps "
            "sinks and the newest tokens exact); give greater lengths"
        )


@torch.no_grad()
def feed(model: PreTrainedModel, cache: Cache, tokens: Tensor, last: int = 1) -> Tensor:
    """Feed ``tokens [rows, tokens]``; return logits ``[rows, last, vocabulary]`` of the last ones."""
    parameters = inspect.signature(type(model).forward).parameters
    kept: dict[str, Any] = {"logits_to_keep": last} if "logits_to_keep" in parameters else {}
    logits: Tensor = model(input_ids=tokens, past_key_values=cache, use_cache=True, **kept).logits
    return logits[:, -last:]


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    cache: Cache,
    tokens: Tensor,
    ends: Sequence[int],
    max_new_tokens: int,
    **more: Any,
) -> Tensor:
    """Return what is generated behind ``tokens [rows, tokens]``, of which a cache may hold the first ones.

    Parameters
    ----------
    model, cache, tokens
        The model, its cache and all tokens so far.
    ends
        Tokens that end a reply.
    max_new_tokens
        Tokens of a reply at most.
    **more
        More of transformers' `GenerationConfig`; greedy by default.

    Returns
    -------
    Tensor
        ``[rows, <= max_new_tokens]`` int64; behind a reply's end anything.
    """
    settings: dict[str, Any] = {"do_sample": False, "num_beams": 1, **more}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=list(ends) or None,
        pad_token_id=ends[0] if ends else 0,
        **settings,
    )
    generating: Any = model
    everything = generating.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        past_key_values=cache,
        generation_config=config,
    )
    return everything[:, tokens.shape[1] :]


def ends_of(loaded: LoadedModel) -> list[int]:
    """Return the tokens that end a reply, by the model's and the tokenizer's word."""
    said: Any = getattr(loaded.model.generation_config, "eos_token_id", None)
    found = [] if said is None else [said] if isinstance(said, int) else list(said)
    own = loaded.tokenizer.eos_token_id
    return [*found, own] if isinstance(own, int) and own not in found else found


def _batches(prompts: Sequence[Prompt], new_tokens: Sequence[int], batch_size: int) -> list[list[int]]:
    """Return indices of prompts that are equally long in all parts, at most so many together."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for i, prompt in enumerate(prompts):
        answer = -1 if prompt.answer is None else len(prompt.answer)
        alike.setdefault((len(prompt.context), len(prompt.question), answer, new_tokens[i]), []).append(i)
    return [group[i : i + batch_size] for group in alike.values() for i in range(0, len(group), batch_size)]


def _reply(
    loaded: LoadedModel, method: Method, prompts: Sequence[Prompt], max_new_tokens: int, held: Quality
) -> list[Reply]:
    """Reply to prompts of one shape; add what the cache holds when the questions come to ``held``."""
    model, device = loaded.model, adapt(loaded.model).device
    contexts, questions = (
        torch.stack(list(part)).to(device)
        for part in zip(*((prompt.context, prompt.question) for prompt in prompts), strict=True)
    )
    cache = fresh_cache(model, method)
    feed(model, cache, contexts)
    footprint = held_by(method, cache)
    if footprint is not None:
        assert footprint.coded_values  # `require_coded` has seen to it
        held.count(footprint)
    answers = [prompt.answer for prompt in prompts if prompt.answer is not None]
    losses = (
        _answer_nll(model, _like(model, method, cache, contexts), questions, torch.stack(answers).to(device))
        if answers
        else [None] * len(prompts)
    )
    ends = ends_of(loaded)
    rows = generate(model, cache, torch.cat([contexts, questions], 1), ends, max_new_tokens).tolist()
    return [Reply(_text(loaded, row, ends), loss) for row, loss in zip(rows, losses, strict=True)]


def _like(model: PreTrainedModel, method: Method, cache: Cache, contexts: Tensor) -> Cache:
    """Return another cache of the same contexts."""
    try:
        return copy.deepcopy(cache)
    except RuntimeError:  # quanto's tensors cannot be copied
        other = fresh_cache(model, method)
        feed(model, other, contexts)
        return other


def _answer_nll(model: PreTrainedModel, cache: Cache, questions: Tensor, answers: Tensor) -> list[float]:
    """Return each row's mean negative log-likelihood of its answer behind its question."""
    tokens = answers.shape[1]
    logits = feed(model, cache, torch.cat([questions, answers[:, :-1]], 1), tokens)
    logs = logits.float().log_softmax(-1).gather(-1, answers[..., None].to(logits.device))
    return (-logs.double().mean((1, 2))).tolist()


def _text(loaded: LoadedModel, tokens: list[int], ends: Sequence[int]) -> str:
    end = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return str(loaded.tokenizer.decode(tokens[:end], skip_special_tokens=True))
