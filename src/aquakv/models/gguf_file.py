"""What conversions from GGUF have in common: opening, metadata, and weights under transformers' names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aquakv.errors import ModelError

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader
    from transformers import PreTrainedConfig

#: Kinds of tokens.
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4

_TOP_TENSORS = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}


def open_gguf(gguf_file: Path) -> GGUFReader:
    """Return a reader of a GGUF file; raises `ModelError` where the package gguf is missing."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ModelError(
            "reading the demo models needs the package gguf, which is not installed; "
            "run: pip install 'aquakv[demo]'"
        ) from error
    return GGUFReader(gguf_file)


def field(reader: GGUFReader, key: str) -> Any:
    """Return one metadata value; the sha256 has vouched for its presence."""
    return reader.fields[key].contents()


def special_ids(reader: GGUFReader) -> dict[str, Any]:
    """Return the ids of the first, last and padding tokens under transformers' names."""
    names = (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding"))
    return {name: field(reader, f"tokenizer.ggml.{key}_token_id") for name, key in names}


def special_tokens(reader: GGUFReader) -> dict[str, Any]:
    """Return the first, last, padding and unknown tokens under transformers' names."""
    tokens = field(reader, "tokenizer.ggml.tokens")
    names = {name.removesuffix("_id"): number for name, number in special_ids(reader).items()}
    names["unk_token"] = field(reader, "tokenizer.ggml.unknown_token_id")
    return {name: tokens[number] for name, number in names.items()}


def write_config(reader: GGUFReader, directory: Path, config: PreTrainedConfig) -> None:
    """Write a model's configuration, and one of generation that ends where the model's text does."""
    from transformers import GenerationConfig

    config.save_pretrained(directory)
    GenerationConfig(**special_ids(reader)).save_pretrained(directory)


def write_weights(
    reader: GGUFReader,
    directory: Path,
    block_tensors: dict[str, str],
    change: Callable[[str, np.ndarray], np.ndarray],
) -> None:
    """Dequantise every tensor to float32 and store it in bfloat16 under transformers' name.

    Parameters
    ----------
    reader
        The GGUF file.
    directory
        Where ``model.safetensors`` is written.
    block_tensors
        GGUF's names of a block's tensors, and transformers'.
    change
        Called with the kind of a tensor (``attn_q``, ``output_norm``) and its values; returns those that
        transformers expects.
    """
    import torch
    from gguf import dequantize
    from safetensors.torch import save_file

    state = {}
    for tensor in reader.tensors:
        values = change(tensor.name.split(".")[-2], dequantize(tensor.data, tensor.tensor_type))
        name = _transformers_name(tensor.name, block_tensors)
        state[name] = torch.from_numpy(values.copy()).to(torch.bfloat16)
    weights = directory / "model.safetensors"
    save_file(state, weights, metadata={"format": "pt"})
    # Newer safetensors leaves the file readable by its owner only; a shared cache needs the usual mode.
    weights.chmod(0o644)


def _transformers_name(name: str, block_tensors: dict[str, str]) -> str:
    if not name.startswith("blk."):
        return _TOP_TENSORS[name]
    _, layer_idx, kind, suffix = name.split(".")
    return f"model.layers.{layer_idx}.{block_tensors[kind]}.{suffix}"
