"""Where the modules of a model compute, and how to see weights that lie elsewhere in the meantime.

`accelerate` spreads a model over devices (transformers' ``device_map``) by hooks on its modules. They move
inputs to the module's device; and weights that are offloaded to the CPU or to a disk are on the ``meta``
device but while the module's own forward pass runs. What is asked of the hooks here is what accelerate itself
asks, so it need not be installed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from aquakv.errors import UnsupportedModelError


def execution_device(root: nn.Module, module: nn.Module) -> torch.device | None:
    """Return the device that a module in ``root`` computes on; None if nothing tells.

    A hook tells, of the module or else of the first one in it, or the first weight or buffer that is
    somewhere. If there is none, the module is part of a block that a hook above it loads.
    """
    for part in module.modules():
        device = _hooked_device(part)
        if device is not None:
            return device
        for tensor in (*part._parameters.values(), *part._buffers.values()):
            if tensor is not None and tensor.device.type != "meta":
                return tensor.device
    above = (_hooked_device(one) for one in reversed(_path(root, name_of(root, module))))
    return next((device for device in above if device is not None), None)


def name_of(model: nn.Module, wanted: nn.Module) -> str:
    """Return what a module is called in a model; raises `UnsupportedModelError` if it is no part of it."""
    name = next((name for name, module in model.named_modules() if module is wanted), None)
    if name is None:
        raise UnsupportedModelError(f"{type(model).__name__}: {type(wanted).__name__} is no part of it")
    return name


def owner_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that has a parameter or buffer of that name in a model, and what it calls it."""
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _hooked_device(module: nn.Module) -> torch.device | None:
    """Return the device that a module's own hooks move its inputs to."""
    # The last of several hooks has the last word.
    for hook in reversed(_hooks(module)):
        device = getattr(hook, "execution_device", None)
        if device is not None:
            return _numbered(torch.device(device))
    return None


def _path(root: nn.Module, name: str) -> list[nn.Module]:
    """Return the modules from ``root`` down to the one of that name in it."""
    path = [root]
    for part in name.split(".") if name else ():
        path.append(path[-1].get_submodule(part))
    return path


@contextmanager
def callable_alone(root: nn.Module, name: str) -> Iterator[nn.Module]:
    """Have the module ``name`` in ``root`` so that it can be called by itself; yields it.

    Where a hook above it loads a whole block at once, the block is loaded. The module and those in it load by
    hooks of their own what they need when they are called.
    """
    path = _path(root, name)
    with ExitStack() as stack:
        for above in path[:-1]:
            _load(stack, above, whole_blocks_only=True)
        yield path[-1]


@contextmanager
def weight_of(root: nn.Module, name: str) -> Iterator[Tensor | None]:
    """Have a weight by its name in ``root``; it is there within the context only.

    Yields None if it is nowhere, or is no tensor of its module.
    """
    owner, _, own_name = name.rpartition(".")
    with callable_alone(root, owner) as module, ExitStack() as stack:
        _load(stack, module)
        found = module._parameters.get(own_name)
        yield None if found is None or found.device.type == "meta" else found.detach()


def _load(stack: ExitStack, module: nn.Module, whole_blocks_only: bool = False) -> None:
    """Load what a module's own hooks load, until the stack unwinds."""
    for hook in _hooks(module):
        if getattr(hook, "offload", False) and (hook.place_submodules or not whole_blocks_only):
            hook.pre_forward(module)
            stack.callback(hook.post_forward, module, None)


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    """Return accelerate's hooks on a module, in the order in which they act."""
    hook = getattr(module, "_hf_hook", None)
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))


def _numbered(device: torch.device) -> torch.device:
    """Return a device as tensors on it name it."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
