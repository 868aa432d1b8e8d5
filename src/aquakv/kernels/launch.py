"""Where programs start, and how many."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
from torch import Tensor


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Make a tensor's GPU the current one, which is the one that Triton launches on."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


def splits_for(device: torch.device, programs: int, pages: int, per_multiprocessor: int) -> int:
    """Return into how many splits to cut the pages of every row so that programs fill the GPU.

    Parameters
    ----------
    device
        Where the kernel runs; a CPU (Triton's interpreter) gets two splits, so that merging is exercised.
    programs
        Programs of each split.
    pages
        Pages of every row; no more splits than these.
    per_multiprocessor
        Programs that a multiprocessor runs at once.
    """
    if device.type != "cuda":
        return max(1, min(pages, 2))
    slots = multiprocessors(device) * per_multiprocessor
    # As few rounds as fill the GPU to nine tenths: a split that starts alone in a last round costs a round.
    splits = 1
    for rounds in range(1, 5):
        splits = rounds * slots // max(1, programs)
        if splits * programs >= 0.9 * rounds * slots:
            break
    return max(1, min(pages, splits))


@lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors a GPU has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache(maxsize=16)
def pipeline_stages(device: torch.device, head_dim: int) -> int:
    """Return how many pages' loads the score kernel has in shared memory: 2, or 1 where they do not fit.

    Shared memory is small on sm_86 and sm_89, and full of operands when heads are wide.
    """
    if device.type != "cuda" or head_dim > 128:
        return 1
    return 2 if torch.cuda.get_device_capability(device) not in ((8, 6), (8, 9), (12, 0)) else 1
