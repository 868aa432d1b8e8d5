"""The models of the compatibility table: those that are supported, and some of every kind that is not."""

import functools

from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    JambaConfig,
    JambaForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from tiny_models import VOCAB

#: What the table calls the kinds of `tiny_models`.
SUPPORTED = {
    "llama": "Llama 2",
    "llama-odd": "Llama, odd sizes",
    "llama-llama3": "Llama 3 (`llama3`)",
    "llama-linear": "Llama, `linear`",
    "llama-dynamic": "Llama, `dynamic`",
    "llama-yarn": "Llama, `yarn`",
    "mistral": "Mistral",
    "qwen2": "Qwen 2, 2.5",
    "qwen3": "Qwen 3",
    "qwen3-moe": "Qwen 3 MoE",
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3",
    "phi": "Phi 1, 2",
    "phi3": "Phi 3, 4",
    "phi3-longrope": "Phi 3, 4 mini (`longrope`)",
    "glm": "GLM 4 (`glm`)",
    "glm4": "GLM 4-0414 (`glm4`)",
    "cohere": "Command R",
    "smollm3": "SmolLM 3",
    "gpt-oss": "gpt-oss",
}

_SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}


def _t5():
    return T5ForConditionalGeneration(
        T5Config(vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )


def _deepseek():
    config = DeepseekV3Config(
        **{**_SMALL, "num_key_value_heads": 2},
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=2,
    )
    return DeepseekV3ForCausalLM(config)


def _gemma3n():
    config = Gemma3nTextConfig(
        **{**_SMALL, "num_hidden_layers": 4, "intermediate_size": [48] * 4},
        head_dim=16,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
        activation_sparsity_pattern=[0.0] * 4,
    )
    return Gemma3nForCausalLM(config)


def _jamba():
    return JambaForCausalLM(
        JambaConfig(**_SMALL, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=4, num_experts=2)
    )


def _qwen3_next():
    return Qwen3NextForCausalLM(
        Qwen3NextConfig(
            **{**_SMALL, "num_hidden_layers": 4},
            head_dim=16,
            num_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
            linear_num_value_heads=2,
            linear_num_key_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
        )
    )


def _falcon_h1():
    return FalconH1ForCausalLM(
        FalconH1Config(**_SMALL, mamba_d_ssm=32, mamba_n_heads=2, mamba_d_head=16, mamba_d_state=8)
    )


def _llama4():
    return Llama4ForCausalLM(
        Llama4TextConfig(
            **{**_SMALL, "num_hidden_layers": 4}, head_dim=16, intermediate_size_mlp=48, num_local_experts=2
        )
    )


#: Model type: the table's name, how to build one, and what the reason says.
REFUSED = {
    "t5": ("T5", _t5, "encoder-decoder"),
    "deepseek_v3": ("DeepSeek V3, R1", _deepseek, "multi-head latent attention"),
    "mamba": (
        "Mamba",
        lambda: MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2)),
        "linear attention or state spaces",
    ),
    "jamba": ("Jamba", _jamba, "linear attention or state spaces"),
    "falcon_h1": ("Falcon H1", _falcon_h1, "linear attention or state spaces"),
    "qwen3_next": ("Qwen 3 Next", _qwen3_next, "linear attention or state spaces"),
    "gemma3n_text": ("Gemma 3n", _gemma3n, "share keys and values"),
    "mistral": (
        "Mistral 7B v0.1 (sliding windows only)",
        lambda: MistralForCausalLM(MistralConfig(**_SMALL, sliding_window=8)),
        "sliding windows",
    ),
    "llama4_text": ("Llama 4", _llama4, "another form than cosines and sines"),
    "gpt2": (
        "GPT-2",
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=16, n_layer=2, n_head=2)),
        "decoder layers",
    ),
    "bloom": (
        "BLOOM",
        lambda: BloomForCausalLM(BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=2, n_head=2)),
        "decoder layers",
    ),
}


@functools.cache
def refused_model(name):
    """Build one of `REFUSED`."""
    return REFUSED[name][1]().eval()
