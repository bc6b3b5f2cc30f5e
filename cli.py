"""What every command does the same way: exit codes, stopping by Ctrl-C or SIGTERM, locking a folder, processes."""
import argparse
import fcntl
import multiprocessing
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO

INTERRUPTED = 130             # exit code after Ctrl-C
LOCK = ".lock"                # the file in a folder that hold() locks


def run(command: Callable[[], None]) -> int:
    """Run a command and return its exit code.

    0: all was done. 2: the user's input is wrong (ValueError, or a path that is not there, not a folder or not a file);
    one line on standard error says so. 1: the world is in the way (other OSErrors: disk full, server gone, budget used
    up); one line too. 130: Ctrl-C or SIGTERM, which reach the command as KeyboardInterrupt. Anything else is our
    mistake and passes through: the traceback shows, and Python exits with 1.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        command()
        print(end="", flush=True)              # standard output may be closed, and then is None
    except KeyboardInterrupt as stop:
        print(f"stopped{f': {stop}' if str(stop) else ''}", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader of our output (head, less) has gone: not an error, but Python would complain again at exit.
        sys.stdout = None
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def at_least(kind: type, least: float) -> Callable[[str], float]:
    """Return an argparse type: a finite number of this kind, not below `least`."""
    def number(text: str) -> float:
        value = kind(text)
        if not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text}: must be at least {least}")
        return value
    number.__name__ = kind.__name__
    return number


def hold(folder: Path) -> IO | None:
    """Make a folder and hold it until the file returned is closed; return None if another process holds it.

    The lock is the kernel's and goes with the process: a lock file that a kill leaves behind locks nothing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / LOCK).open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock


@contextmanager
def start_workers(n_jobs: int, chunk_size: int = 1,
                  method: str | None = None) -> Iterator[Callable[[Callable, Iterable], Iterable]]:
    """Yield a map() whose calls are spread over processes, chunk_size at a time; for one job, Python's own.

    Results come in order. Only a few chunks are read ahead, so that memory does not grow with the input where results
    are taken slowly. Processes start by `method`, else by the platform's: after a fork, PyTorch may use one thread, as
    OpenMP would wait for ever for threads that stayed behind. Raises ChildProcessError if a process is killed.
    """
    if n_jobs == 1:
        yield map
        return
    others, unfinished = set(multiprocessing.active_children()), set()
    pool = ProcessPoolExecutor(n_jobs, multiprocessing.get_context(method), restore_signals)
    # In run() both signals raise KeyboardInterrupt; a worker that starts there could print that, or swallow it and
    # never end. So both are blocked while the processes start, until they have handlers of their own.
    held = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
    try:
        started = [pool.submit(int) for _ in range(n_jobs)]                  # while none is idle, each starts one
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
    try:
        for future in started:
            future.result()
        yield partial(spread, pool, unfinished, 2 * n_jobs, chunk_size)
    except BrokenProcessPool:
        raise ChildProcessError("a worker process was killed; was memory short?") from None
    finally:
        if unfinished:
            for worker in set(multiprocessing.active_children()) - others:
                worker.terminate()             # nobody waits for what it is at
        pool.shutdown(cancel_futures=True)


def spread(pool: ProcessPoolExecutor, unfinished: set[Future], n_ahead: int, chunk_size: int, function: Callable,
           items: Iterable) -> Iterator:
    """Yield function(item) for every item, in order, with n_ahead chunks of items given to the pool at a time."""
    items, given = iter(items), deque()
    while True:
        while len(given) < n_ahead and (chunk := list(islice(items, chunk_size))):
            given.append(pool.submit(apply, function, chunk))
            unfinished.add(given[-1])
            given[-1].add_done_callback(unfinished.discard)
        if not given:
            return
        yield from given.popleft().result()


def apply(function: Callable, chunk: list) -> list:
    """Do what a worker is given: map() over a chunk."""
    return [function(item) for item in chunk]


def restore_signals() -> None:
    """Have SIGTERM end this process at once and Ctrl-C do nothing; unblock both."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM, signal.SIGINT])


class StopSignal:
    """Turns Ctrl-C and SIGTERM into a flag, `asked`, that a loop reads between two steps.

    A second Ctrl-C stops at once; a second SIGTERM does not, as torchrun and job managers repeat it.
    """

    def __enter__(self) -> "StopSignal":
        self.asked = False
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, number: int, frame) -> None:
        if self.asked and number == signal.SIGINT:
            signal.default_int_handler(number, frame)
        self.asked = True

    def __exit__(self, *exc_info) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
