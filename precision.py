"""Which of float32 and bfloat16 a machine multiplies faster."""
import time
from collections.abc import Callable

import torch


def faster_dtype(device: torch.device) -> torch.dtype:
    """Return torch.bfloat16 if the device multiplies matrices clearly faster in it, else torch.float32.

    CPUs are measured; GPUs have it from compute capability 8.0 on.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    if device.type != "cpu":
        return torch.float32
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    is_faster = seconds_of(lambda y=x.bfloat16(): y @ y) < 0.7 * seconds_of(lambda: x @ x)
    return torch.bfloat16 if is_faster else torch.float32


def seconds_of(work: Callable[[], object], n_times: int = 3) -> float:
    """Return the least time that a piece of work takes, after doing it once to warm up."""
    work()
    times = []
    for _ in range(n_times):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)
