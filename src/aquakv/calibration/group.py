"""Several processes that calibrate together, each with a part of the text."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """The processes at work on a calibration; all of them end up with the same codec.

    Attributes
    ----------
    rank, size
        This process's number, and how many there are.
    device
        Where tensors have to be for the processes to exchange them.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def current(cls, device: torch.device) -> Group:
        """Return the group that `torch.distributed` was started with; this process alone if it was not."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls(device=device)
        place = device if dist.get_backend() == "nccl" else torch.device("cpu")
        return cls(dist.get_rank(), dist.get_world_size(), place)

    def add(self, tensor: Tensor) -> Tensor:
        """Return the sum of all processes' tensors, the same to the last bit in each."""
        if self.size == 1:
            return tensor
        total = tensor.to(self.device, copy=True).contiguous()
        dist.all_reduce(total)
        return total.to(tensor.device)

    def add_numbers(self, *numbers: float) -> list[float]:
        """Return the sums of all processes' numbers."""
        if self.size == 1:
            return list(numbers)
        return self.add(torch.tensor(numbers, dtype=torch.float64)).tolist()

    def first(self, number: float) -> float:
        """Return the first process's number."""
        return self.add_numbers(number if self.rank == 0 else 0.0)[0]

    def wait(self) -> None:
        """Return once all processes have come here."""
        if self.size > 1:
            dist.barrier()


def join(device: torch.device) -> torch.device:
    """Start `torch.distributed` if torchrun started this process; return the device that is this process's.

    With GPUs every process takes the one of its local rank, and they talk through NCCL; otherwise gloo.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    return device


def leave() -> None:
    """End what `join` started."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
