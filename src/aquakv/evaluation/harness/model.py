"""lm-eval's transformers model, with our caches in its forward passes. Importing this imports lm-eval."""

from __future__ import annotations

from typing import Any

import torch
from lm_eval.models import huggingface
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from aquakv.errors import ConfigError
from aquakv.evaluation.harness.setting import HarnessSetting, Progress, Usage
from aquakv.evaluation.methods import Method, fresh_cache, held_by
from aquakv.evaluation.quality import compressed_logits
from aquakv.models.adapter import adapt

# As it is registered it has lost its type.
_HFLM: Any = huggingface.HFLM


class CachedLM(_HFLM):
    """A model whose answers and likelihoods come through a method's cache.

    Every batch of prompts gets a fresh cache for `generate`. Likelihoods are computed with every token
    attending to codes, as `evaluate_quality` does; without that they would never meet a cache.

    Parameters
    ----------
    model, tokenizer
        The model and its tokenizer; the latter is given a padding token if it has none.
    method
        None for the exact cache: then everything is as plain lm-eval has it, but for ``setting.truncation``.
    setting
        How tasks are run.
    progress
        Told of requests that are done.

    Attributes
    ----------
    usage
        What caches held, and what was fed.

    Raises
    ------
    CodecMismatchError
        The codec belongs to another model.
    ConfigError
        The competitor was not fitted, or cannot be evaluated as asked.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        method: Method = None,
        setting: HarnessSetting | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.method = method
        self.setting = setting or HarnessSetting()
        self.usage = Usage()
        self._progress = progress or Progress()
        self._adapter = adapt(model)
        fresh_cache(model, method)
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=self.setting.batch_size,
            max_length=self.setting.max_length or self._adapter.max_length,
        )

    # --- answers ---------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Answer prompts.

        Raises
        ------
        ConfigError
            The longest answer leaves no room for a prompt.
        """
        for request in requests:
            new = normalize_gen_kwargs(request.args[1], self.max_gen_toks).get("max_gen_toks", 0)
            if new >= self.max_length:
                raise ConfigError(
                    f"answers of up to {new} tokens leave no room for a prompt within {self.max_length}; "
                    "give a greater --max-length or a smaller --max-new-tokens"
                )
        with self._progress.requests(len(requests)):
            return super().generate_until(requests, disable_tqdm=True)

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Return token ids and mask ``[rows, tokens]`` of prompts, shortened to fit, and padded."""
        rows = [
            self._shortened(super(CachedLM, self).tok_batch_encode([text])[0][0], left_truncate_len)
            for text in strings
        ]
        longest = max(len(row) for row in rows)
        ids = torch.full((len(rows), longest), int(self.tokenizer.pad_token_id))
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            part = slice(longest - len(row), None) if padding_side == "left" else slice(len(row))
            ids[i, part], mask[i, part] = row, 1
        self.usage.prompt_tokens += int(mask.sum())
        return ids, mask

    def _shortened(self, row: Tensor, most: int | None) -> Tensor:
        if most is None or len(row) <= most:
            return row
        self.usage.truncated_prompts += 1
        if self.setting.truncation == "left":
            return row[-most:]
        half = most // 2
        return torch.cat([row[:half], row[len(row) - half :]])

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> Tensor:
        cache = fresh_cache(self.model, self.method, padded=len(context) > 1)
        if self.setting.prefill_chunk is not None:
            generation_kwargs["prefill_chunk_size"] = self.setting.prefill_chunk
        tokens = super()._model_generate(
            context, max_length, stop, past_key_values=cache, **generation_kwargs
        )
        held = held_by(self.method, cache)
        if held is not None:
            self.usage.count(held)
        self._progress.advance(len(context))
        return tokens

    # --- likelihoods -----------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        self.usage.prompt_tokens += sum(
            min(len(context) + len(continuation) - 1, self.max_length)
            for _, context, continuation in requests
        )
        batch_size = self.batch_size_per_gpu
        # lm-eval pads rows on the right, and says not by how much: codes of padding would be counted.
        self.batch_size_per_gpu = batch_size if self.method is None else 1
        try:
            with self._progress.requests(len(requests)):
                return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)
        finally:
            self.batch_size_per_gpu = batch_size

    def _model_call(
        self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        if self.method is None:
            logits = super()._model_call(inps, attn_mask, labels)
        else:
            with torch.no_grad():
                pieces = compressed_logits(
                    self._adapter, self.method, self.setting.protocol, None, inps, self.usage
                )
                logits = torch.cat([piece for _, piece in pieces], 1)
        self._progress.advance(len(inps))
        return logits
