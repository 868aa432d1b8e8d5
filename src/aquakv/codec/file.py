"""aquakv's files: safetensors with a JSON header, checked to the last bit.

The safetensors metadata holds two strings. ``aquakv`` is a JSON object with ``format``, ``format_version``
and what the kind of file has beside them: ``config``, ``fingerprint`` and ``calibration`` for a codec.
``aquakv_sha256`` is the SHA-256, in hex, of that JSON string (UTF-8) followed, for every tensor in order of
its name, by ``name``, ``dtype`` and ``shape`` as one line of text and the tensor's bytes. See
``docs/format.md``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from aquakv.errors import CodecFileError, InputError
from aquakv.files import atomic_write

FORMAT = "aquakv-codec"
#: Codecs that were read from files without samples of weights are written as such files again.
FORMAT_VERSION, VERSION_WITHOUT_SAMPLES = 5, 4


@dataclass(frozen=True)
class FileKind:
    """A kind of file.

    Attributes
    ----------
    what
        What it holds, for messages.
    format, version
        As in the header, of files that are written.
    entries
        The header's entries beside these two.
    error
        What is raised if a file cannot be used.
    if_missing, if_other_version
        What to do then.
    older
        Further versions that are read.
    """

    what: str
    format: str
    version: int
    entries: frozenset[str]
    error: type[InputError]
    if_missing: str
    if_other_version: str
    older: tuple[int, ...] = ()


CODEC_FILE = FileKind(
    what="codec",
    format=FORMAT,
    version=FORMAT_VERSION,
    entries=frozenset({"config", "fingerprint", "calibration"}),
    error=CodecFileError,
    if_missing="make one with 'aquakv calibrate MODEL --out {path}'",
    if_other_version="update aquakv or calibrate again",
    older=(VERSION_WITHOUT_SAMPLES,),
)


def header_text(kind: FileKind, header: Mapping[str, Any]) -> str:
    """Return a header as it is written."""
    return json.dumps(
        {"format": kind.format, "format_version": kind.version, **header}, sort_keys=True, allow_nan=False
    )


def write_file(path: Path, kind: FileKind, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a file atomically: to a temporary neighbour first, then renamed over ``path``.

    Raises
    ------
    OutputError
        The disk is full, the directory is missing or may not be written.
    """
    text = header_text(kind, header)
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"aquakv": text, "aquakv_sha256": content_digest(text, plain)}
    with atomic_write(path, kind.what) as temporary:
        try:
            save_file(plain, temporary, metadata=metadata)
        except SafetensorError as error:  # how the writer reports a full disk
            raise OSError(str(error)) from error


def read_file(path: Path, kind: FileKind) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read and verify a file; return its header and tensors (CPU).

    Raises
    ------
    InputError
        Of the kind's own class: the file is missing, is no safetensors file or of another kind, is of another
        format version, or its content does not have the checksum that it was written with.
    """
    if not os.path.isfile(path):  # unlike Path.is_file, False for impossible names too
        what = "is a directory" if os.path.isdir(path) else "does not exist"
        raise kind.error(f"{kind.what} file {path} {what}; {kind.if_missing.format(path=path)}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError, OverflowError, MemoryError) as error:
        reason = " ".join(str(error).split())
        raise kind.error(
            f"{path}: expected a {kind.what} file (safetensors), but it is damaged or something else "
            f"({reason})"
        ) from error
    text, digest = metadata.get("aquakv"), metadata.get("aquakv_sha256")
    if text is None or digest is None:
        raise kind.error(f"{path}: a safetensors file, but not an aquakv {kind.what} (no aquakv header)")
    header = _parse_header(path, kind, text)
    if content_digest(text, tensors) != digest:
        raise kind.error(f"{path}: content does not match its checksum; the file was altered or damaged")
    return header, tensors


def _parse_header(path: Path, kind: FileKind, text: str) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise kind.error(f"{path}: the aquakv header is not valid JSON; the file is damaged") from error
    if not isinstance(header, dict) or header.get("format") != kind.format:
        raise kind.error(f"{path}: expected format {kind.format!r} in the aquakv header")
    version = header.get("format_version")
    readable = (*kind.older, kind.version)
    if version not in readable:
        raise kind.error(
            f"{path}: format version {version!r}; this aquakv reads version "
            f"{' or '.join(map(str, readable))}: {kind.if_other_version}"
        )
    expected = kind.entries | {"format", "format_version"}
    if set(header) != expected:
        difference = ", ".join(sorted(map(ascii, set(header) ^ expected)))
        raise kind.error(f"{path}: missing or unknown entries in the aquakv header: {difference}")
    return header


def content_digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the checksum of a header as written and of contiguous tensors on the CPU."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
