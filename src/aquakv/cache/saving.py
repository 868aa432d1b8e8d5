"""A cache's file: all that a cache holds, as it holds it, checked to the last bit (`docs/format.md`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aquakv.cache.aqua_layer import AquaLayer
from aquakv.cache.layout import TokenLayout
from aquakv.cache.restoring import Restoring
from aquakv.codec import ModelCodec
from aquakv.codec.file import FileKind, read_file, write_file
from aquakv.codec.model import KINDS
from aquakv.config import WindowConfig, from_dict, to_dict
from aquakv.errors import CacheFileError, CodecFileError, ConfigError, InputError
from aquakv.models.adapter import ModelAdapter

CACHE_FILE = FileKind(
    what="cache",
    format="aquakv-cache",
    version=2,
    entries=frozenset({"codec", "codec_sha256", "window", "columns", "seen", "starts", "recording"}),
    error=CacheFileError,
    if_missing="write one with AquaCache.save",
    if_other_version="update aquakv, or feed the tokens to a new cache",
)

_CODEC_PREFIX = "codec."


def write_cache(
    path: Path, codec: ModelCodec, layout: TokenLayout, layers: list[Any], include_codec: bool
) -> None:
    """Write a cache file, all or nothing.

    Parameters
    ----------
    path
        The file.
    codec
        The cache's; only its checksum is written, unless ``include_codec``.
    layout, layers
        What the cache holds, between two passes.
    include_codec
        Whether the file is to hold the codec too.

    Raises
    ------
    OutputError
        The file cannot be written; nothing is left behind, an older file stays as it was.
    """
    tensors: dict[str, Tensor] = {}
    if layout.positions is not None:
        tensors["layout.positions"] = layout.positions
        tensors["layout.pages"] = torch.tensor(layout.pages, dtype=torch.int32).reshape(-1, 2)
        if layout.holes is not None:
            tensors["layout.origins"] = layout.holes.origins
    recording = []
    for index, layer in enumerate(layers):
        if layer.is_initialized:
            held = _held(layer) if isinstance(layer, AquaLayer) else _held_by_window(layer)
            tensors.update({f"layers.{index}.{name}": tensor for name, tensor in held.items()})
        if getattr(layer, "record_past", False):
            recording.append(index)
    embedded = None
    if include_codec:
        embedded, codec_tensors = codec.content()
        tensors.update({_CODEC_PREFIX + name: tensor for name, tensor in codec_tensors.items()})
    header = {
        "codec": embedded,
        "codec_sha256": codec.digest,
        "window": to_dict(layout.window),
        "columns": layout.columns,
        "seen": layout.seen,
        "starts": layout.starts,
        "recording": recording,
    }
    write_file(path, CACHE_FILE, header, tensors)


def _held_by_window(layer: Any) -> dict[str, Tensor]:
    """Return what a layer with a sliding window holds."""
    return {"window.keys": layer.keys, "window.values": layer.values}


def _held(layer: AquaLayer) -> dict[str, Tensor]:
    """Return what a compressed layer holds, without room for more."""
    exact = layer.exact
    assert exact is not None  # or the layer were not initialised
    found = {
        "sinks.keys": exact.sink_keys,
        "sinks.values": exact.sink_values,
        "tail.keys": exact.tail_keys,
        "tail.values": exact.tail_values,
    }
    if not layer.pages.chunks:
        return found
    chunk = layer.pages.all()
    for kind, encoded in zip(KINDS, chunk.encoded, strict=True):
        found.update({f"{kind}.{name}": tensor for name, tensor in encoded._asdict().items()})
    if chunk.outliers is not None:
        names = ("outliers.index", "outliers.keys", "outliers.values")
        found.update(zip(names, chunk.outliers.tensors, strict=True))
    return found


@dataclass
class SavedCache:
    """What was read from a cache file, to be put into an empty cache.

    Attributes
    ----------
    path
        Where it was read from, for messages.
    codec
        The codec that the cache was saved with.
    window
        Which tokens stay exact.
    """

    path: Path
    codec: ModelCodec
    window: WindowConfig
    _header: dict[str, Any]
    _tensors: dict[str, Tensor]

    @classmethod
    def read(cls, path: Path, codec: ModelCodec | str | Path | None) -> SavedCache:
        """Read a file onto the CPU, and find its codec.

        Parameters
        ----------
        path
            The file.
        codec
            The codec, or its file; None takes the one in the cache file.

        Raises
        ------
        CacheFileError
            The file is missing, damaged, of another format, was saved with another codec, or has none in it
            and none is given.
        CodecFileError
            ``codec`` is no codec file.
        """
        header, tensors = read_file(path, CACHE_FILE)
        own = {
            name.removeprefix(_CODEC_PREFIX): tensors.pop(name)
            for name in list(tensors)
            if name.startswith(_CODEC_PREFIX)
        }
        if own and header["codec"] is None:
            raise CacheFileError(f"{path}: unexpected tensor {_CODEC_PREFIX + min(own)!r} without a codec")
        digest = header["codec_sha256"]
        if codec is not None:
            codec = codec if isinstance(codec, ModelCodec) else ModelCodec.load(codec)
        elif header["codec"] is None:
            raise CacheFileError(
                f"{path}: holds no codec, only the checksum of one ({_short(digest)}); pass the codec that "
                "it was saved with, or save with include_codec=True"
            )
        else:
            codec = _embedded(path, header["codec"], own)
        if codec.digest != digest:
            raise CacheFileError(
                f"{path}: expected the codec with checksum {_short(digest)}, which it was saved with, got "
                f"{_short(codec.digest)}; pass the former"
            )
        try:
            window = from_dict(WindowConfig, header["window"], "window")
        except ConfigError as error:
            raise CacheFileError(f"{path}: not a cache that this version can use: {error}") from error
        return cls(path, codec, window, header, tensors)

    def restore(self, adapter: ModelAdapter, layout: TokenLayout, layers: list[Any]) -> None:
        """Put everything into an empty cache's layout and layers, each on the device of its model's layer.

        Raises
        ------
        CacheFileError
            The parts do not fit each other or the codec. The cache is of no use then.
        """
        try:
            Restoring(self.codec, self._header, adapter, layout, layers).run(dict(self._tensors))
        except InputError as error:
            raise CacheFileError(f"{self.path}: not a cache that this version can use: {error}") from error


def _short(digest: Any) -> str:
    return f"{digest[:16]}…" if isinstance(digest, str) else ascii(digest)


def _embedded(path: Path, content: Any, tensors: dict[str, Tensor]) -> ModelCodec:
    entries = {"config", "fingerprint", "calibration"}
    if not isinstance(content, dict) or set(content) != entries:
        raise CacheFileError(f"{path}: expected {', '.join(sorted(entries))} under 'codec', or null")
    try:
        return ModelCodec.from_content(content, tensors, f"{path}, its codec")
    except CodecFileError as error:
        raise CacheFileError(str(error)) from error
