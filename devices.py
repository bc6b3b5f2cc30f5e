"""What a training run runs on: the device, one process of several, and whether the step is compiled."""
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

N_TRIAL_STEPS = 3
WORTH_COMPILING_S = 300       # eager runs shorter than this are over before a compiler has paid for itself


def pick_device(name: str | None) -> torch.device:
    """Return the device asked for, or the best there is; raise ValueError if what was asked for is not there."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name is None:
        name = next(kind for kind, is_there in present.items() if is_there)
    if not present[name]:
        raise ValueError(f"--device {name}: not present on this machine")
    return torch.device(name, int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else torch.device(name)


# ---------------------------------------------------------------- several processes


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started: rank of n. One process alone is rank 0 of 1."""
    rank: int = 0
    n: int = 1

    @classmethod
    def join(cls, device: torch.device) -> "Ranks":
        """Meet the other processes that torchrun started, if it did."""
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return cls()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # gloo carries what the processes say about themselves, NCCL the gradients of GPUs.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, loss: nn.Module, device: torch.device) -> nn.Module:
        """Return the loss with its gradients averaged over all processes."""
        if self.n == 1:
            return loss
        return DistributedDataParallel(loss, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True)

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Return the sum of a number over all processes."""
        if self.n > 1:
            dist.all_reduce(value)
        return value

    def any(self, is_so: bool) -> bool:
        """Return whether it is so in at least one process."""
        return bool(self.sum(torch.tensor(int(is_so))))

    def first(self, value: float) -> float:
        """Return the first process's value."""
        return self.sum(torch.tensor(value if self.is_first else 0.0, dtype=torch.float64)).item()

    def leave(self) -> None:
        if self.n > 1:
            dist.destroy_process_group()


# ---------------------------------------------------------------- compilation


def compiled_if_faster(loss: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, n_steps: int, dtype: torch.dtype) -> tuple[Callable, bool]:
    """Return (loss, False), or (its compiled form, True) where that makes a run of n_steps end sooner, compiler included.

    Measured on one batch [B, T]; weights stay as they are. A CPU in float32 is not tried: nearly all its time goes into
    matrix products, which a compiler leaves as they are.
    """
    if inputs.device.type == "mps" or inputs.device.type == "cpu" and dtype == torch.float32:
        return loss, False
    eager_s = n_steps * step_s(loss, inputs, targets)
    if eager_s < WORTH_COMPILING_S:
        return loss, False
    print("compiling, about a minute ...", file=sys.stderr)
    compiled, started = compile_loss(loss), time.perf_counter()
    try:
        step_s(compiled, inputs, targets, n_times=1)
        compile_s = time.perf_counter() - started
        compiled_s = n_steps * step_s(compiled, inputs, targets)
    except Exception as error:        # a compiler fails in as many ways as there are machines, and eager is always right
        print(f"not compiled, the run takes longer: {type(error).__name__}, is there a C++ compiler?", file=sys.stderr)
        return loss, False
    finally:
        loss.zero_grad()
    return (compiled, True) if compile_s + compiled_s < eager_s else (loss, False)


def compile_loss(loss: nn.Module) -> Callable:
    """Return the compiled loss, for batches of any number of rows and tokens."""
    return torch.compile(loss, dynamic=True)


def step_s(loss: Callable, inputs: torch.Tensor, targets: torch.Tensor, n_times: int = N_TRIAL_STEPS) -> float:
    """Return the seconds that a forward and a backward pass take."""
    started = time.perf_counter()
    for _ in range(n_times):
        total = loss(inputs, targets)
        total.backward()
    total.item()                      # waits for a GPU
    return (time.perf_counter() - started) / n_times
