"""What evicting a part of the context costs, by itself and together with compression.

The first tokens of a sequence are the context: they are fed in one pass, and once its policy has evicted what
it does not keep, nothing more is evicted. What follows is fed block by block and predicted from what is left
of the context and from all that came since. It is compared with the exact cache from which nothing is
evicted, on the tokens behind the context only. Bits are measured when the context has been pruned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from aquakv.cache import AquaCache
from aquakv.codec import ModelCodec
from aquakv.config import WindowConfig, preset, to_dict
from aquakv.errors import DataError
from aquakv.evaluation.quality import EvaluationProgress, Quality
from aquakv.eviction import EvictionPolicy
from aquakv.models.adapter import adapt

#: More exact tokens than any sequence has.
_ALL_RECENT = 2**30


@dataclass(frozen=True)
class Contestant:
    """A cache to be measured.

    Attributes
    ----------
    codec
        What compresses its tokens; None keeps them exact.
    policy
        What prunes its context; None leaves it as it is.
    window
        Which tokens stay exact; the codec's own choice if None.
    """

    codec: ModelCodec | None = None
    policy: EvictionPolicy | None = None
    window: WindowConfig | None = None


def exact_codec(model: PreTrainedModel) -> ModelCodec:
    """Return a codec for caches that compress nothing, made without calibration.

    Its window is longer than any sequence: all tokens stay exact, so that a cache evicts and nothing else.
    """
    adapter = adapt(model)
    window = WindowConfig(recent_window=_ALL_RECENT)
    config = dataclasses.replace(preset("higgs", 8), window=window)
    means = {
        f"layers.{index}.{kind}.mean": torch.zeros(adapter.features)
        for index in range(len(adapter.compressed_layers))
        for kind in ("keys", "values")
    }
    header: dict[str, Any] = {"config": to_dict(config), "fingerprint": to_dict(adapter.fingerprint())}
    return ModelCodec.from_content({**header, "calibration": {}}, means, "exact cache")


def default_context(seq_len: int, window: WindowConfig) -> int:
    """Return the length of a context that is about half of a sequence and ends where a block does."""
    half = seq_len // 2
    first = window.sink_tokens + (window.recent_window if window.recent_window < half else 0)
    blocks = (half - first) // window.block_tokens
    return first + blocks * window.block_tokens if blocks > 0 else half


def pruning_fields(policy: EvictionPolicy | None, context: int) -> dict[str, Any]:
    """Return what a result file says of how a context was pruned."""
    settings: dict[str, Any] = {"policy": None}
    if policy is not None:
        assert dataclasses.is_dataclass(policy)  # as all of aquakv's own are
        settings = {"policy": type(policy).__name__.lower(), **dataclasses.asdict(policy)}
    return {**settings, "context": context}


@torch.no_grad()
def evaluate_pruning(
    model: PreTrainedModel,
    tokens: Tensor,
    contestants: Mapping[str, Contestant],
    context: int,
    *,
    batch_size: int = 1,
    progress: Callable[[EvaluationProgress], None] | None = None,
) -> dict[str, Quality]:
    """Compare pruned and compressed caches with the exact cache, on the tokens behind a context.

    Parameters
    ----------
    model
        The model.
    tokens
        ``[sequences, seq_len]`` int64 without padding.
    contestants
        By name.
    context
        How many tokens of each sequence are pruned, in one go.
    batch_size
        Sequences at once.
    progress
        Called after every batch.

    Returns
    -------
    dict
        Figures by name. Bytes and values are those of the pruned context, with ``original_values`` of all its
        tokens.

    Raises
    ------
    DataError
        The sequences are longer than the model takes, or leave nothing to predict behind the context.
    CodecMismatchError
        A codec belongs to another model.
    """
    adapter = adapt(model)
    sequences, seq_len = tokens.shape
    if sequences < 1 or not 1 <= context <= seq_len - 2:
        raise DataError(
            f"expected at least one sequence, and a context of 1 to {seq_len - 2} of its {seq_len} tokens, "
            f"got {sequences} with a context of {context}"
        )
    adapter.require_length(seq_len)
    exact_one = exact_codec(model)
    results = {name: Quality() for name in contestants}
    done, total = 0, sequences * (1 + len(contestants))
    for batch in tokens.split(batch_size):
        batch = batch.to(model.device)
        exact = model(input_ids=batch, use_cache=False).logits
        for name, contestant in (("", None), *contestants.items()):
            if contestant is not None:
                for start, logits in _behind(model, contestant, exact_one, batch, context, results[name]):
                    targets = batch[:, start + 1 : start + 1 + logits.shape[1]]
                    predicted = targets.shape[1]
                    if predicted:
                        part = exact[:, start : start + predicted]
                        results[name].compare(part, logits[:, :predicted], targets)
            done += len(batch)
            if progress is not None:
                progress(EvaluationProgress(done, total))
    return results


def _behind(
    model: PreTrainedModel,
    contestant: Contestant,
    exact_one: ModelCodec,
    batch: Tensor,
    context: int,
    quality: Quality,
) -> Iterator[tuple[int, Tensor]]:
    """Prune a batch's context, then yield ``(first position, logits)`` of every block behind it.

    The blocks end where the cache compresses, so that every query sees what it would see token by token.
    """
    codec = contestant.codec or exact_one
    cache = AquaCache(model, codec, window=contestant.window, eviction=contestant.policy)
    model(input_ids=batch[:, :context], past_key_values=cache, use_cache=True, logits_to_keep=1)
    cache.eviction = None
    _measure(cache, quality)
    start, seq_len = context, batch.shape[1]
    while start < seq_len:
        end = min(start + cache.columns_until_due(), seq_len)
        yield (
            start,
            model(input_ids=batch[:, start:end], past_key_values=cache, use_cache=True).logits,
        )
        start = end


def _measure(cache: AquaCache, quality: Quality) -> None:
    footprint = cache.footprint()
    quality.count(footprint)
    quality.original_values += footprint.original_values
