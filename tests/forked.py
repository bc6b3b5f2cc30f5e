"""Scripts in processes of their own, forked from one that has imported what takes seconds to import."""
import multiprocessing
import os
import runpy
import socket
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import train

ROOT = Path(__file__).parent.parent
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train", "torch._dynamo", "matplotlib.pyplot"])


def start(arguments: list[str], log: Path, prepare: Callable[[], None] | None = None,
          **environment: str) -> ForkServerProcess:
    """Start `train.py ARGUMENTS`, whose output goes to a file; prepare(), of a module's top level, is called before."""
    process = FORKS.Process(target=_run, args=(arguments, log, prepare, environment))
    process.start()
    return process


def start_ranks(n: int, arguments: list[str], logs: Path,
                prepare: Callable[[], None] | None = None) -> list[ForkServerProcess]:
    """Start n processes of one run, as torchrun does; the output of process i goes to the file "i" of a folder."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    logs.mkdir(exist_ok=True)
    return [start(arguments, logs / str(rank), prepare, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n),
                  MASTER_ADDR="localhost", MASTER_PORT=str(port)) for rank in range(n)]


def start_script(script: Path, arguments: list[str], log: Path) -> ForkServerProcess:
    """Start `python SCRIPT ARGUMENTS`, whose output goes to a file."""
    process = FORKS.Process(target=_run_script, args=(script, arguments, log))
    process.start()
    return process


def exit_codes(processes: list[ForkServerProcess]) -> list[int]:
    """Wait for processes and return how they ended."""
    for process in processes:
        process.join(timeout=600)
    return [process.exitcode for process in processes]


def _run(arguments: list[str], log: Path, prepare: Callable[[], None] | None, environment: dict[str, str]) -> None:
    os.chdir(ROOT)
    os.environ.update(environment)
    sys.stdout = sys.stderr = log.open("w", buffering=1, encoding="utf-8")
    if prepare is not None:
        prepare()
    sys.exit(train.main(arguments))


def _run_script(script: Path, arguments: list[str], log: Path) -> None:
    os.chdir(ROOT)
    sys.stdout = sys.stderr = log.open("w", buffering=1, encoding="utf-8")
    sys.argv, sys.path[0] = [str(script), *arguments], str(script.parent)
    runpy.run_path(str(script), run_name="__main__")
