"""What a training run runs on: the device, one process of several, and whether the step is compiled."""
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from textwrap import shorten

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

WAIT = timedelta(hours=2)     # at most, for a process that encodes the corpus or measures the model
N_TRIAL_PASSES = 3            # forward and backward, to see whether compiling pays
# Shorter runs are not tried: a compiler takes about a minute. On GPUs, of which none has been measured, it saves more.
WORTH_COMPILING_S = {"cpu": 300, "cuda": 120}


def pick_device(name: str | None) -> torch.device:
    """Return the device asked for, or the best there is; raise ValueError if it is not there for this process."""
    is_alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available() and is_alone, "cpu": True}
    if name is None:
        name = next(kind for kind, is_there in present.items() if is_there)
    if not present[name]:
        raise ValueError(f"--device {name}: not present on this machine")
    if name != "cuda":
        return torch.device(name)
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if local_rank >= torch.cuda.device_count():
        raise ValueError(f"--device cuda: {torch.cuda.device_count()} on this machine, too few for a process on each; "
                         "start fewer, or use --device cpu")
    return torch.device(name, local_rank)


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether an error of PyTorch says that a device's memory is full: it has several."""
    return isinstance(error, torch.OutOfMemoryError) or isinstance(error, RuntimeError) and any(
        said in str(error) for said in ("out of memory", "DefaultCPUAllocator", "ALLOC_FAILED", "CUDA calloc"))


@contextmanager
def told_if_full(message: str) -> Iterator[None]:
    """Raise OSError with this message if a device's memory is full."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OSError(message) from None


# ---------------------------------------------------------------- several processes


@dataclass(frozen=True)
class Ranks:
    """This process among the n that torchrun started, by its rank. One process alone is rank 0 of 1."""
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
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=WAIT)
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, loss: nn.Module, device: torch.device) -> nn.Module:
        """Return the loss with its gradients averaged over all processes."""
        if self.n == 1:
            return loss
        # Looking for unused parameters keeps the gradients' buckets as they are first made. Otherwise they are made
        # anew after the first step, of a resumed run too, and the sum of three or more depends on their order, which
        # matters on CPUs, where a resumed run ends in the same bytes.
        keeps_buckets = self.n > 2 and device.type == "cpu"
        return DistributedDataParallel(loss, device_ids=[device] if device.type == "cuda" else None,
                                       gradient_as_bucket_view=True, find_unused_parameters=keeps_buckets)

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor over all processes; it is changed in place."""
        if self.n > 1:
            with self.told_if_left():
                dist.all_reduce(value)
        return value

    @contextmanager
    def told_if_left(self) -> Iterator[None]:
        """Raise ConnectionError if another process has ended, for which this one waits."""
        try:
            yield
        except RuntimeError as error:
            if self.n == 1 or is_out_of_memory(error) or not (isinstance(error, dist.DistError) or
                                                              "gloo" in str(error)):
                raise
            raise ConnectionError("another process of this run has ended; its own line says why") from None

    def any(self, *are_so: bool) -> list[bool]:
        """Return, of each, whether it is so in at least one process."""
        return self.sum(torch.tensor(are_so, dtype=torch.int32)).bool().tolist()

    def wait(self) -> None:
        """Return when all processes have come here."""
        self.any(False)

    def first(self, value: float) -> float:
        """Return the first process's value."""
        return self.sum(torch.tensor(value if self.is_first else 0.0, dtype=torch.float64)).item()

    def leave(self) -> None:
        """Part from the other processes."""
        if self.n > 1:
            dist.destroy_process_group()


# ---------------------------------------------------------------- compilation


def pays_to_compile(loss: nn.Module, batch: tuple[torch.Tensor, ...], n_passes: float, most_s: float,
                    dtype: torch.dtype) -> bool:
    """Tell whether n_passes over such a batch end sooner compiled; measured, not guessed, where compiling may pay.

    The run is over after most_s, however many passes are left.
    A CPU in float32 is not tried: nearly all its time goes into matrix products, which a compiler leaves as they are.
    Leaves no gradients behind.
    """
    device = batch[0].device.type
    if device == "mps" or (device == "cpu" and dtype == torch.float32):
        return False
    try:
        pass_s(loss, *batch, n_times=1)            # the first one prepares much
        eager_pass_s = pass_s(loss, *batch)
        n_passes = min(n_passes, most_s / eager_pass_s)
        if n_passes * eager_pass_s < WORTH_COMPILING_S[device]:
            return False
        print("compiling, about a minute ...", file=sys.stderr)
        try:
            return pass_s(compile_loss(loss, [batch]), *batch) < eager_pass_s        # compiling has been paid for now
        except Exception as error:    # a compiler fails in as many ways as there are machines; eager is always right
            advice = "" if is_out_of_memory(error) else "; is there a C++ compiler?"
            print(f"not compiled, the run takes longer: {type(error).__name__} {shorten(str(error), 200)}{advice}",
                  file=sys.stderr)
            return False
    finally:
        loss.zero_grad()
        torch.use_deterministic_algorithms(False)                     # which compile_loss has set


def compile_loss(loss: nn.Module, batches: Iterable[tuple[torch.Tensor, ...]] = ()) -> Callable:
    """Return the compiled loss, for batches of any number of rows and tokens; leave no gradients.

    The code for a kind of batch, such as one of a single row, depends on the first such batch that the compiler meets.
    If a resumed run met another one first, its sums could be rounded otherwise; so the compiler is shown the given
    batches here, the same ones each time that a run starts. On a GPU this does not make two runs the same, byte for
    byte: there the gradient of the embedding is summed in whatever order its threads come.
    """
    if next(loss.parameters()).device.type == "cpu":
        torch.use_deterministic_algorithms(True, warn_only=True)      # else the same would go for two threads here
    # Should a step need more code after all, that is compiled as a whole too, not cut at the buckets of Ranks.share.
    torch._dynamo.config.optimize_ddp = False
    compiled = torch.compile(loss, dynamic=True)
    for batch in batches:
        pass_s(compiled, *batch, n_times=1)
    loss.zero_grad()
    return compiled


def pass_s(loss: Callable, *batch: torch.Tensor, n_times: int = N_TRIAL_PASSES) -> float:
    """Return the seconds that a pass takes, forward and backward."""
    started = time.perf_counter()
    for _ in range(n_times):
        total = loss(*batch)
        total.backward()
    total.item()                      # waits for a GPU
    return (time.perf_counter() - started) / n_times
