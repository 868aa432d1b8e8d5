"""Keep functions out of what `torch.compile` compiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def uncompiled(function: Function) -> Function:
    """Leave a function as it is in a compiled model, which breaks its graph there.

    What caches do depends on numbers that change from step to step: compiled, it would be compiled ever anew.
    """
    return cast(Function, torch.compiler.disable(function))
