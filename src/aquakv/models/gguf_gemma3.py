"""Gemma 3 (text) from GGUF: sliding windows between layers of full attention, a SentencePiece tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from aquakv.models.gguf_file import (
    CONTROL,
    NORMAL,
    USER_DEFINED,
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
    from transformers import Gemma3TextConfig

_BLOCK_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}

# The file does not say these; all models of the family have them (arXiv:2503.19786 §2).
_FULL_EVERY = 6
_LOCAL_ROPE_THETA = 10_000.0


def convert(gguf_file: Path, directory: Path) -> None:
    """Write weights, configuration and tokenizer of ``gguf_file`` to ``directory``."""
    reader = open_gguf(gguf_file)
    write_config(reader, directory, _config(reader))
    _write_tokenizer(reader, directory)

    def change(kind: str, values: np.ndarray) -> np.ndarray:
        # llama.cpp multiplies by what is stored, transformers by one plus that.
        return values - 1 if kind.endswith("norm") else values

    write_weights(reader, directory, _BLOCK_TENSORS, change)


def _config(reader: GGUFReader) -> Gemma3TextConfig:
    from transformers import Gemma3TextConfig

    layers = field(reader, "gemma3.block_count")
    head_dim = field(reader, "gemma3.attention.key_length")
    thetas = {
        "sliding_attention": _LOCAL_ROPE_THETA,
        "full_attention": field(reader, "gemma3.rope.freq_base"),
    }
    return Gemma3TextConfig(
        vocab_size=len(field(reader, "tokenizer.ggml.tokens")),
        hidden_size=field(reader, "gemma3.embedding_length"),
        intermediate_size=field(reader, "gemma3.feed_forward_length"),
        num_hidden_layers=layers,
        num_attention_heads=field(reader, "gemma3.attention.head_count"),
        num_key_value_heads=field(reader, "gemma3.attention.head_count_kv"),
        head_dim=head_dim,
        query_pre_attn_scalar=head_dim,
        max_position_embeddings=field(reader, "gemma3.context_length"),
        # Stored in single precision.
        rms_norm_eps=float(f"{field(reader, 'gemma3.attention.layer_norm_rms_epsilon'):.6g}"),
        sliding_window=field(reader, "gemma3.attention.sliding_window"),
        layer_types=[
            "sliding_attention" if (index + 1) % _FULL_EVERY else "full_attention" for index in range(layers)
        ],
        rope_parameters={
            kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in thetas.items()
        },
        tie_word_embeddings=True,
        architectures=["Gemma3ForCausalLM"],
        dtype="bfloat16",
        **special_ids(reader),
    )


def _write_tokenizer(reader: GGUFReader, directory: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = field(reader, "tokenizer.ggml.tokens")
    kinds: list[int] = field(reader, "tokenizer.ggml.token_type")
    special = special_tokens(reader)
    backend = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=_merges(reader),
            unk_token=special["unk_token"],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    # Runs of spaces, tabs and newlines among others: taken whole, but part of the text.
    for kind, is_special in ((CONTROL, True), (USER_DEFINED, False)):
        found = [token for token, other in zip(tokens, kinds, strict=True) if other == kind]
        backend.add_tokens([AddedToken(token, special=is_special, normalized=False) for token in found])
    bos = special["bos_token"]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokens.index(bos))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=field(reader, "gemma3.context_length"),
        clean_up_tokenization_spaces=False,
        padding_side="left",
        **special,
    )
    tokenizer.save_pretrained(directory)


def _merges(reader: GGUFReader) -> list[tuple[str, str]]:
    """Return the merges that scores stand for, in order: two pieces that make a piece, by its score.

    SentencePiece merges the neighbours whose union scores highest, whatever way it was split.
    """
    pieces: list[str] = field(reader, "tokenizer.ggml.tokens")
    kinds: list[int] = field(reader, "tokenizer.ggml.token_type")
    scores: list[float] = field(reader, "tokenizer.ggml.scores")
    normal = {
        piece: score for piece, score, kind in zip(pieces, scores, kinds, strict=True) if kind == NORMAL
    }
    found = [
        (score, piece[:end], piece[end:])
        for piece, score in normal.items()
        for end in range(1, len(piece))
        if piece[:end] in normal and piece[end:] in normal
    ]
    found.sort(key=lambda merge: (-merge[0], -len(merge[1])))
    return [(left, right) for _, left, right in found]
