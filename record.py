"""What a training run leaves behind besides its weights: files written whole, the log, its figure, facts of the machine."""
import json
import os
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch


def write_beside(path: Path, write: Callable[[Path], object]) -> None:
    """Have write(partial path) make a file, put it on the disk for sure, then rename it to its place."""
    partial = path.with_name(path.name + ".partial")
    write(partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_json(path: Path, values: dict) -> None:
    write_beside(path, lambda partial: partial.write_text(json.dumps(values, indent=4) + "\n", encoding="utf-8"))


def write_log(path: Path, log: list[dict]) -> None:
    """Write log.jsonl, one entry a line."""
    lines = "".join(json.dumps(entry) + "\n" for entry in log)
    write_beside(path, lambda partial: partial.write_text(lines, encoding="utf-8"))


def read_log(path: Path) -> list[dict]:
    """Return the entries of log.jsonl; none if there is no such file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def draw_losses(log: list[dict], path: Path, title: str) -> None:
    """Draw training and validation loss over steps, with a second axis in epochs, from the entries of log.jsonl."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    axes.plot([e["step"] for e in log], [e["loss"] for e in log], label="training, mean since the last point")
    axes.plot([e["step"] for e in log], [e["val_loss"] for e in log], marker=".", label="validation")
    axes.set(xlabel="step", ylabel="loss, nats per token", title=title)
    axes.legend()
    steps_an_epoch = log[-1]["step"] / log[-1]["epoch"]
    axes.secondary_xaxis("top", functions=(lambda s: s / steps_an_epoch, lambda e: e * steps_an_epoch)).set_xlabel("epoch")
    write_beside(path, lambda partial: figure.savefig(partial, dpi=120, format="png"))
    plt.close(figure)


def commit_of_checkout() -> str | None:
    """Return the commit that this code stands at, with "+" if files were changed; None outside a git checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True).stdout
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
