"""SmolLM2 from GGUF: a llama with a byte-level tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from aquakv.models.gguf_file import (
    CONTROL,
    field,
    open_gguf,
    special_ids,
    special_tokens,
    write_config,
    write_weights,
)

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader
    from transformers import LlamaConfig

_BLOCK_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert(gguf_file: Path, directory: Path) -> None:
    """Write weights, configuration and tokenizer of ``gguf_file`` to ``directory``."""
    reader = open_gguf(gguf_file)
    write_config(reader, directory, _config(reader))
    _write_tokenizer(reader, directory)
    heads = {
        "attn_q": field(reader, "llama.attention.head_count"),
        "attn_k": field(reader, "llama.attention.head_count_kv"),
    }

    def change(kind: str, values: np.ndarray) -> np.ndarray:
        return _to_half_split_rope(values, heads[kind]) if kind in heads else values

    write_weights(reader, directory, _BLOCK_TENSORS, change)


def _config(reader: GGUFReader) -> LlamaConfig:
    from transformers import LlamaConfig

    num_heads = field(reader, "llama.attention.head_count")
    hidden_size = field(reader, "llama.embedding_length")
    return LlamaConfig(
        vocab_size=field(reader, "llama.vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=field(reader, "llama.feed_forward_length"),
        num_hidden_layers=field(reader, "llama.block_count"),
        num_attention_heads=num_heads,
        num_key_value_heads=field(reader, "llama.attention.head_count_kv"),
        head_dim=hidden_size // num_heads,
        max_position_embeddings=field(reader, "llama.context_length"),
        rms_norm_eps=field(reader, "llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field(reader, "llama.rope.freq_base")},
        # The file has no output matrix: the embedding serves as both.
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        **special_ids(reader),
    )


def _write_tokenizer(reader: GGUFReader, directory: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = field(reader, "tokenizer.ggml.tokens")
    kinds: list[int] = field(reader, "tokenizer.ggml.token_type")
    merges = [tuple(line.split(" ", 1)) for line in field(reader, "tokenizer.ggml.merges")]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    # What GGUF calls the pre-tokenizer "smollm": digits one by one, then GPT-2's pattern.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=field(reader, "llama.context_length"),
        clean_up_tokenization_spaces=False,
        **special_tokens(reader),
    )
    tokenizer.chat_template = field(reader, "tokenizer.chat_template")
    tokenizer.save_pretrained(directory)


def _to_half_split_rope(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorder a projection's rows from llama.cpp's rotary layout to transformers'.

    llama.cpp rotates neighbouring rows ``(2i, 2i+1)`` of a head, transformers rows ``(i, i + head_dim/2)``.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)
