"""Choose between the plain-torch definitions and the Triton kernels."""

from __future__ import annotations

import logging
import os
from functools import lru_cache
from importlib.util import find_spec
from typing import Literal, get_args

from torch import Tensor

from aquakv.errors import ConfigError

Backend = Literal["auto", "torch", "triton", "hopper"]

_log = logging.getLogger(__name__)


def interpreted() -> bool:
    """Return whether Triton runs its kernels in its interpreter, on a CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def resolve_backend(
    backend: Backend, like: Tensor, *, whole_step: bool = False
) -> Literal["torch", "triton", "hopper"]:
    """Return the backend to use for tensors on the device of ``like``.

    ``auto`` is Triton on CUDA devices if it can be imported, torch otherwise; the choice is logged once.
    Whether ``hopper`` supports a layer too is for `aquakv.kernels.hopper` to say; it runs whole steps only.

    Raises
    ------
    ConfigError
        The backend is unknown, or was asked for and cannot run here.
    """
    if backend not in get_args(Backend):
        raise ConfigError(f"backend: expected one of {', '.join(get_args(Backend))}, got {backend!r}")
    if backend == "torch":
        return "torch"
    if backend == "hopper":
        from aquakv.kernels import hopper

        reason = hopper.why_not_on(like.device) if whole_step else "it takes whole steps only (attend_codes)"
        if reason is not None:
            raise ConfigError(f"backend hopper: {reason}; choose triton or auto")
        return "hopper"
    installed, on_gpu = find_spec("triton") is not None, like.device.type == "cuda"
    if backend == "auto":
        return _auto(installed and on_gpu, like.device.type)
    if not installed:
        raise ConfigError("backend triton: triton is not installed; install it or choose torch")
    if not on_gpu and not interpreted():
        raise ConfigError(
            f"backend triton: expected tensors on a CUDA device, got {like.device}; choose torch or auto"
        )
    return "triton"


@lru_cache(maxsize=8)
def _auto(triton: bool, device: str) -> Literal["torch", "triton"]:
    chosen = "triton" if triton else "torch"
    _log.info("decode kernels on %s: %s", device, chosen)
    return chosen
