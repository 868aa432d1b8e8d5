"""Tiny random models and codecs that several test modules share."""

import dataclasses
import functools

import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Glm4Config,
    Glm4ForCausalLM,
    GlmConfig,
    GlmForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from aquakv import WindowConfig, calibrate, preset
from aquakv.codec import ModelCodec
from aquakv.config import PRESETS

VOCAB = 40

#: Small enough that forty tokens are compressed several times over.
WINDOW = WindowConfig(sink_tokens=2, recent_window=0, block_tokens=8)

_COMMON = {
    "vocab_size": VOCAB,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "max_position_embeddings": 256,
    # Wide enough that the likeliest token usually stands clear of the second (so that 8-bit codes do not turn
    # it), narrow enough that attention is not a hard choice of one token.
    "initializer_range": 0.1,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 0,
}
_TWO_HEADS = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
#: For models that know no head_dim beside the hidden size.
_FOUR_HEADS = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
#: Neither heads nor head_dim is a power of two; d = 30.
_ODD = {"hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 10}


def _rope(**parameters):
    return {"rope_parameters": {"rope_theta": 10000.0, **parameters}}


_KINDS = {
    "llama": (LlamaForCausalLM, LlamaConfig, _TWO_HEADS),
    "llama-odd": (LlamaForCausalLM, LlamaConfig, _ODD),
    "llama-llama3": (
        LlamaForCausalLM,
        LlamaConfig,
        {
            **_TWO_HEADS,
            **_rope(
                rope_type="llama3",
                factor=4.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=64,
            ),
        },
    ),
    # Scales its cosines and sines by 1.14: undoing the rotation must divide by the square.
    "llama-yarn": (
        LlamaForCausalLM,
        LlamaConfig,
        {**_TWO_HEADS, **_rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)},
    ),
    "llama-linear": (LlamaForCausalLM, LlamaConfig, {**_TWO_HEADS, **_rope(rope_type="linear", factor=2.0)}),
    # Its frequencies change at the longest sequence that the configuration names.
    "llama-dynamic": (
        LlamaForCausalLM,
        LlamaConfig,
        {**_TWO_HEADS, **_rope(rope_type="dynamic", factor=2.0), "max_position_embeddings": 128},
    ),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {k: v for k, v in _TWO_HEADS.items() if k != "head_dim"}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, _TWO_HEADS),
    # Every expert takes part: a choice among them may turn on the error of a code.
    "qwen3-moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {**_TWO_HEADS, "moe_intermediate_size": 24, "num_experts": 3, "num_experts_per_tok": 3},
    ),
    "mistral": (MistralForCausalLM, MistralConfig, {**_ODD, "sliding_window": None}),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {
            **_ODD,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            "sliding_window": 7,
            "query_pre_attn_scalar": 10,
        },
    ),
    # Scores of a few units, so that caps as low as these bend them.
    "gemma2": (
        Gemma2ForCausalLM,
        Gemma2Config,
        {
            **_ODD,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            "sliding_window": 7,
            "query_pre_attn_scalar": 10,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 10.0,
        },
    ),
    # Rotates half of each head.
    "phi": (
        PhiForCausalLM,
        PhiConfig,
        {**_FOUR_HEADS, **_rope(rope_type="default", partial_rotary_factor=0.5)},
    ),
    # Queries, keys and values come from one projection; Phi-4 is of this type too.
    "phi3": (Phi3ForCausalLM, Phi3Config, _FOUR_HEADS),
    # As Phi-4 mini: frequencies change behind 128 tokens.
    "phi3-longrope": (
        Phi3ForCausalLM,
        Phi3Config,
        {
            **_FOUR_HEADS,
            **_rope(
                rope_type="longrope",
                short_factor=[1.0, 1.0, 1.1, 1.1],
                long_factor=[1.0, 1.5, 3.0, 4.0],
                original_max_position_embeddings=128,
                partial_rotary_factor=0.5,
            ),
            "original_max_position_embeddings": 128,
        },
    ),
    # Neighbouring coordinates are pairs, in the first half of each head.
    "glm": (GlmForCausalLM, GlmConfig, {**_TWO_HEADS, **_rope(partial_rotary_factor=0.5)}),
    "glm4": (Glm4ForCausalLM, Glm4Config, {**_TWO_HEADS, **_rope(partial_rotary_factor=0.5)}),
    # Neighbours in the whole head.
    "cohere": (CohereForCausalLM, CohereConfig, {**_FOUR_HEADS, "logit_scale": 1.0}),
    # Every other layer does not rotate.
    "smollm3": (
        SmolLM3ForCausalLM,
        SmolLM3Config,
        {**_TWO_HEADS, "num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0]},
    ),
    "gpt-oss": (
        GptOssForCausalLM,
        GptOssConfig,
        {
            **_TWO_HEADS,
            **_rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=64),
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            "sliding_window": 7,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
}

SUPPORTED = tuple(_KINDS)


def build(kind="llama", seed=0, dtype=torch.float32, **changes):
    """Build a fresh tiny model; biases and norms are random too, so that no step can be left out unseen."""
    model_class, config_class, settings = _KINDS[kind]
    config = config_class(**{**_COMMON, **settings, **changes})
    config._experts_implementation = "eager"  # the only one for float64
    torch.manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.generation_config.pad_token_id = 0
    if getattr(config, "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")  # transformers 5.17 would leave out the cap
    return model.to(dtype).requires_grad_(False)


@functools.cache
def shared(kind="llama", dtype=torch.float32):
    """Return a model for tests that leave it as it is."""
    return build(kind, dtype=dtype)


def random_tokens(*shape, seed=0):
    """Return random token ids that are never the padding token."""
    return torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


#: Bits of the decode preset here: byte planes are 16 columns wide, which is much for tiny models. So nearly
#: all of their tensors get one, and some two.
DECODE_BITS = 5


@functools.cache
def codec_for(kind="llama", name="paper", bits=None, window=WINDOW, seed=0):
    """Return a codec calibrated on random tokens for `build(kind, seed)`, whatever that model's dtype."""
    bits = DECODE_BITS if bits is None and name == "decode" else bits
    config = dataclasses.replace(preset(name, bits), window=window)
    model = shared(kind) if seed == 0 else build(kind, seed=seed)
    return calibrate(model, random_tokens(8, 48, seed=1), config)


@functools.cache
def guarded_codec(kind="llama", limit=1e-12, fraction=0.25):
    """Return the decode preset's codec with another limit and cap: by default the cap alone decides."""
    return with_outliers(codec_for(kind, "decode"), limit, fraction)


def with_outliers(codec, limit, fraction):
    """Return a codec with another limit and cap."""

    def tensor_codec(one):
        return dataclasses.replace(one, guard=dataclasses.replace(one.guard, limit=torch.tensor([limit])))

    layers = tuple(
        dataclasses.replace(layer, keys=tensor_codec(layer.keys), values=tensor_codec(layer.values))
        for layer in codec.layers
    )
    guard = dataclasses.replace(codec.config.guard, max_fraction=fraction)
    return ModelCodec(dataclasses.replace(codec.config, guard=guard), codec.fingerprint, layers)


@functools.cache
def two_stage_codec(kind="llama", first=5):
    """Return a codec like the decode preset's, whose keys are transformed in two stages."""
    config = preset("decode", DECODE_BITS)
    transform = dataclasses.replace(config.transform, key_scope="two-stage", first_stage=first)
    config = dataclasses.replace(config, window=WINDOW, transform=transform)
    return calibrate(shared(kind), random_tokens(8, 48, seed=1), config)


@functools.cache
def wide(hidden_size=64):
    """Return a model with heads that the Triton kernels take, and its codec with many outliers.

    With so few hidden numbers values follow from keys but for residuals of rounding.
    """
    model = build("llama", hidden_size=hidden_size, head_dim=64, vocab_size=300)
    config = dataclasses.replace(
        preset("decode"), window=WindowConfig(sink_tokens=2, recent_window=0, block_tokens=64)
    )
    # Of forty different tokens the first layer's keys would have a covariance of rank forty.
    tokens = torch.randint(1, 300, (16, 96), generator=torch.Generator().manual_seed(1))
    codec = calibrate(model, tokens, config)
    guard = dataclasses.replace(config.guard, max_fraction=0.05)
    layers = [
        dataclasses.replace(
            layer,
            **{
                kind: dataclasses.replace(
                    part, guard=dataclasses.replace(part.guard, limit=torch.tensor([1e-12]))
                )
                for kind, part in (("keys", layer.keys), ("values", layer.values))
            },
        )
        for layer in codec.layers
    ]
    return model, dataclasses.replace(
        codec, config=dataclasses.replace(config, guard=guard), layers=tuple(layers)
    )


#: What every codec has to do: the presets, one whose guard keeps a quarter of its tokens exact, and one whose
#: transform has more coefficients than there are values.
VARIANTS = (*PRESETS, "guarded", "two-stage")


def variant(name, kind="llama"):
    """Return a codec of `VARIANTS`."""
    others = {"guarded": guarded_codec, "two-stage": two_stage_codec}
    return others[name](kind) if name in others else codec_for(kind, name)


def feed(model, cache, tokens, sizes, mask=None):
    """Feed tokens in chunks of the given sizes; return all logits. Positions count real tokens only."""
    logits, start = [], 0
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    for size in sizes:
        end = start + size
        extra = {}
        if mask is not None:
            extra = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]}
        with torch.no_grad():
            logits.append(model(tokens[:, start:end], past_key_values=cache, use_cache=True, **extra).logits)
        start = end
    assert start == tokens.shape[1]
    return torch.cat(logits, 1)


def go_on(model, cache, tokens, sizes, mask):
    """Feed what follows on what a cache holds; tokens and mask are those of all columns."""
    outputs, positions = [], (mask.cumsum(1) - 1).clamp(min=0)
    for size in sizes:
        part = slice(cache.get_seq_length(), cache.get_seq_length() + size)
        extra = {"attention_mask": mask[:, : part.stop], "position_ids": positions[:, part]}
        with torch.no_grad():
            outputs.append(model(tokens[:, part], past_key_values=cache, **extra).logits)
    return torch.cat(outputs, 1)


def row_codes(cache, row):
    """Return all that is kept of one sequence's compressed tokens, layer by layer, oldest token first.

    Outliers as float32: the models' float64 differs by 1e-15 between batch shapes.
    """
    step = cache.window.block_tokens
    own = [i for i, (r, _) in enumerate(cache.layout.pages) if r == row]
    columns = [cache.layout.pages[i][1] for i in own]
    assert columns == sorted(columns)
    pages, found = torch.tensor(own), []
    for layer in cache.layers if own else ():
        if not hasattr(layer, "pages"):
            continue
        chunk = layer.pages.all()
        for kind in chunk.encoded:
            kept = kind.select(pages, step)
            found += [*kept.code_tensors, *kept.scale_tensors]
        outliers = chunk.outliers and chunk.outliers.select(pages, step)
        if outliers is None:
            exact = layer.exact.sink_keys.new_empty(0, *layer.exact.sink_keys.shape[2:]).float()
            found += [torch.empty(0, dtype=torch.int32), exact, exact]
        else:
            found += [outliers.index, outliers.keys.float(), outliers.values.float()]
    return found


def same_bits(a, b):
    """Tell whether two lists of tensors are equal bit for bit, NaN included."""
    return len(a) == len(b) and all(
        x.dtype == y.dtype
        and x.shape == y.shape
        and torch.equal(x.reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8))
        for x, y in zip(a, b, strict=True)
    )


def begins_with(codes, first):
    """Tell whether a sequence's codes begin with those of its first tokens, see `row_codes`."""
    return bool(first) and same_bits([t[: len(part)] for t, part in zip(codes, first, strict=True)], first)


@functools.cache
def decisive_prompts(kind, count, length=24, new_tokens=32):
    """Return prompts whose exact greedy continuation is nowhere a close call, the most varied ones.

    An 8-bit codec moves a tiny model's logits by some 0.01; where the exact cache itself sets the likeliest
    token at least 0.04 apart from the second, the compressed one has to take the same.
    """
    model = shared(kind, torch.float64)
    out = model.generate(
        random_tokens(96, length),
        max_new_tokens=new_tokens,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
    )
    best = torch.stack(out.scores, 1).topk(2).values
    decisive = (best[..., 0] - best[..., 1]).amin(1) > 0.04
    variety = torch.tensor([len(set(row[length:].tolist())) for row in out.sequences]) * decisive
    chosen = variety.argsort(descending=True, stable=True)[:count]
    assert bool(decisive[chosen].all()), "no decisive prompts: choose another seed"
    return out.sequences[chosen, :length], out.sequences[chosen]
