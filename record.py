"""What a training run leaves behind besides its weights: its log, the log's figure, facts of the machine."""
import json
import os
import platform
import subprocess
from pathlib import Path

import torch

from files import write_beside


def write_log(path: Path, log: list[dict]) -> None:
    """Write log.jsonl, one entry a line."""
    lines = "".join(json.dumps(entry) + "\n" for entry in log)
    write_beside(path, lambda partial: partial.write_text(lines, encoding="utf-8"))


def read_log(path: Path) -> list[dict]:
    """Return the entries of log.jsonl; none if there is no such file. Raises ValueError naming a broken line."""
    entries = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else [], 1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            raise ValueError(f"{path}:{number}: not JSON, but a log holds one object a line") from None
        if not isinstance(entry, dict) or type(entry.get("step")) is not int:
            raise ValueError(f"{path}:{number}: expected an object with step, a whole number")
        entries.append(entry)
    return entries


def draw_log(log: list[dict], path: Path, title: str) -> None:
    """Draw the entries of log.jsonl, at least one: losses over steps, epochs and tokens; below, rate and norm."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    steps, last = [entry["step"] for entry in log], log[-1]
    figure, (losses, rates) = plt.subplots(2, sharex=True, figsize=(6.4, 5.6), height_ratios=[3, 1],
                                           layout="constrained")
    losses.plot(steps, [entry["loss"] for entry in log], label="training, mean since the last point")
    losses.plot(steps, [entry["val_loss"] for entry in log], marker=".", label="validation")
    losses.set(ylabel="loss, nats per token", title=title)
    losses.legend()
    for where, name, per_step in (("top", "epoch", last["epoch"] / last["step"]),
                                  (1.18, "million tokens", last["n_tokens"] / last["step"] / 1e6)):
        scale = (lambda x, per_step=per_step: x * per_step, lambda x, per_step=per_step: x / per_step)
        losses.secondary_xaxis(where, functions=scale).set_xlabel(name)
    rates.plot(steps, [entry["lr"] for entry in log], color="tab:green")
    rates.set_xlabel("step")
    rates.set_ylabel("learning rate", color="tab:green")
    norms = rates.twinx()
    norms.plot(steps, [entry["grad_norm"] for entry in log], color="tab:red")
    norms.set_ylabel("gradient norm", color="tab:red")
    write_beside(path, lambda partial: figure.savefig(partial, dpi=120, format="png"))
    plt.close(figure)


class Board:
    """The log for TensorBoard, in a folder; without a folder it takes entries and does nothing."""

    def __init__(self, folder: Path | None, step: int):
        """Go on after a step, forgetting what was logged after it; raise ValueError without TensorBoard."""
        self._writer = None
        if folder is not None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ValueError("--tensorboard: not installed; pip install tensorboard") from None
            self._writer = SummaryWriter(folder, purge_step=step + 1)

    def add(self, entry: dict) -> None:
        """Add the entry of one evaluation, as in log.jsonl."""
        if self._writer is not None:
            for name, value in entry.items():
                if name != "step":
                    self._writer.add_scalar(name, value, entry["step"])
            self._writer.flush()


def commit_of_checkout() -> str | None:
    """Return the commit that this code is at, with "+" if files were changed; None outside a git checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True,
                                 check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed else "")


def hardware(device: torch.device) -> str:
    """Return the name of the GPU, or of the CPU with its instruction set and number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":")[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores"
