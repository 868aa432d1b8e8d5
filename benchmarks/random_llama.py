"""A Llama of random weights, a codec for it and a full cache, made without calibration or prefill."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from aquakv import AquaCache, ModelCodec, WindowConfig, preset
from aquakv.cache import Outliers
from aquakv.codec import (
    AffinePredictor,
    EncodedPages,
    EncodedTokens,
    LayerCodec,
    LinearTransform,
    OutlierGuard,
    ScalarQuantizer,
    TensorCodec,
)
from aquakv.config import PredictorConfig
from aquakv.kernels.pages import PageLayout, clear_attended
from aquakv.models.adapter import adapt

LLAMA3_ROPE = {
    "rope_theta": 500000.0,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072 + 1024,
        "rope_parameters": LLAMA3_ROPE,
    },
    "small": {
        "vocab_size": 320,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 4096,
    },
}

WINDOW = WindowConfig(sink_tokens=4, recent_window=0, block_tokens=128)


def build_model(name: str, device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    """Build a model with random weights where it is to run."""
    config = LlamaConfig(**MODELS[name], tie_word_embeddings=False, attn_implementation="sdpa")
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    return model.eval().requires_grad_(False)


def random_codec(
    model: LlamaForCausalLM, field_widths: tuple[int, ...], rank: int, random: torch.Generator
) -> ModelCodec:
    """Make a codec of the preset ``decode`` whose transforms are random rotations."""
    fingerprint = adapt(model).fingerprint()
    heads, dim, width = fingerprint.num_kv_heads, fingerprint.head_dim, fingerprint.features
    count = min(16 * len(field_widths), dim)
    per_head = [w for w in sorted(field_widths, reverse=True) for _ in range(16)][:count]
    widths = torch.tensor(sorted(per_head * heads, reverse=True), dtype=torch.uint8)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*size, generator=random)

    def tensor_codec(blocks: bool, predictor: AffinePredictor | None) -> TensorCodec:
        if blocks:  # of every head, the coefficients of one width stand beside each other
            rotations = [torch.linalg.qr(normal(dim, dim))[0][:, :count] for _ in range(heads)]
            order = sorted((-per_head[i], head, i) for head in range(heads) for i in range(count))
            own = torch.block_diag(*rotations)
            analysis = own[:, [head * count + i for _, head, i in order]]
        else:
            analysis = torch.linalg.qr(normal(width, width))[0][:, : count * heads]
        transform = LinearTransform(analysis.contiguous(), analysis.T.contiguous())
        quantizer = ScalarQuantizer(torch.ones(len(widths)), widths, True)
        # All tokens exceed this: as many outliers as there may be.
        guard = OutlierGuard(torch.eye(dim).expand(heads, dim, dim).contiguous(), torch.tensor([1e-6]))
        return TensorCodec(normal(width, scale=0.1), predictor, transform, quantizer, guard)

    layers = []
    for index in range(len(fingerprint.compressed_layers)):
        keys = None
        if index:
            down, up = normal(width, rank, scale=width**-0.5), normal(rank, width, scale=0.5 * rank**-0.5)
            keys = AffinePredictor((down.bfloat16(), up.bfloat16()), normal(width, scale=0.1))
        weight = normal(width, width, scale=0.5 * width**-0.5).bfloat16()
        values = AffinePredictor((weight,), normal(width, scale=0.1))
        inputs = PredictorConfig(value_inputs=("keys",), first_layer_values=True, key_rank=rank)
        layers.append(LayerCodec(tensor_codec(True, keys), tensor_codec(False, values), inputs))
    return ModelCodec(preset("decode"), fingerprint, tuple(layers))


def filled_cache(
    model: LlamaForCausalLM,
    codec: ModelCodec,
    rows: int,
    context: int,
    backend: Any,
    seed: int = 0,
    keep_latents: bool = False,
) -> AquaCache:
    """Return a cache that holds random codes, as if ``context`` tokens of every row had been fed."""
    device, dtype = model.device, model.dtype
    cache = AquaCache(model, codec, window=WINDOW, backend=backend, keep_latents=keep_latents)
    random = torch.Generator(device=device).manual_seed(seed)
    layout, block = cache.layout, WINDOW.block_tokens
    layout.append(context, torch.arange(context, device=device)[None], None, rows)
    layout.commit(layout.blocks_due())
    blocks = len(layout.pages)
    tail = context - min(layout.first_exact_columns())

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=random, device=device, dtype=dtype)

    def records(pages: PageLayout, outliers: Tensor) -> EncodedPages:
        count = blocks * block // 64
        made = torch.randint(
            256, (count, pages.record_bytes), dtype=torch.uint8, device=device, generator=random
        )
        made[:, pages.page_bytes : -16] = torch.randint(
            116, 140, (count, 64), dtype=torch.uint8, device=device, generator=random
        )
        made[:, -16:-8], made[:, -8:] = 255, 0
        clear_attended(made, outliers)
        return EncodedPages(made)

    heads, dim = codec.fingerprint.num_kv_heads, codec.fingerprint.head_dim
    for layer, own in zip(cache.layers, codec.layers, strict=True):
        empty = normal(rows, heads, 0, dim)
        layer.lazy_initialization(empty, empty)
        for sinks in (layer.exact.sink_keys, layer.exact.sink_values):
            sinks.copy_(normal(*sinks.shape))
        layer.exact.replace_tail(normal(rows, tail, heads, dim), normal(rows, tail, heads, dim))
        if not blocks:
            continue
        first = torch.arange(blocks, device=device) * block
        index = first + torch.randint(block, (blocks,), device=device, generator=random)
        assert own.keys.pages is not None
        assert own.values.pages is not None
        codes = EncodedTokens(records(own.keys.pages, index), records(own.values.pages, index))
        outliers = Outliers(index.int(), normal(blocks, heads, dim), normal(blocks, heads, dim))
        layer.pages.append(codes, blocks, outliers)
    return cache
