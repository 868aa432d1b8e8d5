"""The codec file: safetensors with a JSON header, checked to the last bit.

The safetensors metadata holds two strings. ``aquakv`` is a JSON object with ``format``, ``format_version``,
``config``, ``fingerprint`` and ``calibration``. ``aquakv_sha256`` is the SHA-256, in hex, of that JSON string
(UTF-8) followed, for every tensor in order of its name, by ``name``, ``dtype`` and ``shape`` as one line of
text and the tensor's bytes. See ``docs/format.md``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from aquakv.errors import CodecFileError
from aquakv.files import atomic_write

FORMAT = "aquakv-codec"
FORMAT_VERSION = 4
_HEADER_KEYS = {"format", "format_version", "config", "fingerprint", "calibration"}


def write_codec_file(path: Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a codec file atomically: to a temporary neighbour first, then renamed over ``path``.

    Raises
    ------
    OutputError
        The disk is full, the directory is missing or may not be written.
    """
    text = json.dumps(
        {"format": FORMAT, "format_version": FORMAT_VERSION, **header}, sort_keys=True, allow_nan=False
    )
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"aquakv": text, "aquakv_sha256": _digest(text, plain)}
    with atomic_write(path, "codec") as temporary:
        try:
            save_file(plain, temporary, metadata=metadata)
        except SafetensorError as error:  # how the writer reports a full disk
            raise OSError(str(error)) from error


def read_codec_file(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read and verify a codec file; return its header and tensors (CPU).

    Raises
    ------
    CodecFileError
        The file is missing, is no safetensors file or codec, is of a newer format, or its content does not
        have the checksum that it was written with.
    """
    if not os.path.isfile(path):  # unlike Path.is_file, False for impossible names too
        what = "is a directory" if os.path.isdir(path) else "does not exist"
        raise CodecFileError(f"codec file {path} {what}; make one with 'aquakv calibrate MODEL --out {path}'")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError, OverflowError, MemoryError) as error:
        reason = " ".join(str(error).split())
        raise CodecFileError(
            f"{path}: expected a codec file (safetensors), but it is damaged or something else ({reason})"
        ) from error
    text, digest = metadata.get("aquakv"), metadata.get("aquakv_sha256")
    if text is None or digest is None:
        raise CodecFileError(f"{path}: a safetensors file, but not an aquakv codec (no aquakv header)")
    header = _parse_header(path, text)
    if _digest(text, tensors) != digest:
        raise CodecFileError(f"{path}: content does not match its checksum; the file was altered or damaged")
    return header, tensors


def _parse_header(path: Path, text: str) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CodecFileError(f"{path}: the aquakv header is not valid JSON; the file is damaged") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise CodecFileError(f"{path}: expected format {FORMAT!r} in the aquakv header")
    version = header.get("format_version")
    if version != FORMAT_VERSION:
        raise CodecFileError(
            f"{path}: format version {version!r}; this aquakv reads version {FORMAT_VERSION}: "
            "update aquakv or calibrate again"
        )
    if set(header) != _HEADER_KEYS:
        difference = ", ".join(sorted(map(ascii, set(header) ^ _HEADER_KEYS)))
        raise CodecFileError(f"{path}: missing or unknown entries in the aquakv header: {difference}")
    return header


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
