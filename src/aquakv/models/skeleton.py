"""Build a model without weights: its modules, its configuration, and the buffers that follow from that."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel


def build_skeleton(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """Return a causal language model whose parameters have shapes and no values.

    Buffers that are no part of checkpoints, such as rotary frequencies, have their values, on ``device``.
    """
    arguments: dict[str, Any] = {"dtype": dtype}
    if attn_implementation is not None:
        arguments["attn_implementation"] = attn_implementation
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, **arguments)
    _fill_buffers(model, model, device)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def _fill_buffers(module: nn.Module, owner: PreTrainedModel, device: torch.device) -> None:
    """Give buffers their values the way transformers does after it has built a model without memory."""
    owner = module if isinstance(module, PreTrainedModel) else owner
    names = [name for name in module._non_persistent_buffers_set if module._buffers.get(name) is not None]
    for name in names:
        buffer: Any = module._buffers[name]
        module._buffers[name] = torch.empty_like(buffer, device=device)
    if names:
        owner._init_weights(module)
    for child in module.children():
        _fill_buffers(child, owner, device)
