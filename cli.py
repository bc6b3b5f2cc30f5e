"""What every command does the same way: exit codes, stopping by Ctrl-C or SIGTERM, locking a folder, processes."""
import argparse
import multiprocessing
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from multiprocessing.connection import Connection
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
        sys.stdout.flush()
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


def at_least(kind: type, least: float):
    """Return an argparse type: a finite number of this kind, not below `least`."""
    def number(text: str):
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
    import fcntl                      # here, as Windows has none, and all else works there
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / LOCK).open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock


@contextmanager
def start_workers(n_jobs: int, chunk_size: int = 1) -> Iterator[Callable[[Callable, Iterable], Iterable]]:
    """Yield a map() whose calls are spread over processes, chunk_size at a time; for one job, Python's own.

    Results come in order. A process gets its next chunk when its last one is taken, so that memory does not grow with
    the input where results are taken slowly. Raises ChildProcessError if a process is killed.
    """
    if n_jobs == 1:
        yield map
        return
    workers = []
    # In run() both signals raise KeyboardInterrupt; a worker forked there could print that, or swallow it and never
    # end. So both are blocked until it has handlers of its own.
    held = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
    try:
        for _ in range(n_jobs):
            ours, theirs = multiprocessing.Pipe()
            workers.append((multiprocessing.Process(target=work, args=(ours, theirs), daemon=True), ours))
            workers[-1][0].start()
            theirs.close()                     # else the end of the worker would not be seen here
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
    try:
        yield partial(spread, [ours for _, ours in workers], chunk_size)
    finally:
        for process, ours in workers:
            process.terminate()
            process.join()
            ours.close()


def spread(workers: list[Connection], chunk_size: int, function: Callable, items: Iterable) -> Iterator:
    """Yield function(item) for every item, in order: the workers get their chunks, and give results, in turn."""
    items, busy = iter(items), deque()
    chunks = iter(lambda: list(islice(items, chunk_size)), [])

    def give(worker: Connection) -> None:
        if chunk := next(chunks, None):
            busy.append(worker)
            with suppress(ConnectionError):    # it has been killed, as recv() will tell
                worker.send((function, chunk))

    for worker in workers:
        give(worker)
    while busy:
        worker = busy.popleft()
        try:
            results = worker.recv()
        except (EOFError, OSError):
            raise ChildProcessError("a worker process was killed; if memory is short, use fewer processes") from None
        if isinstance(results, Exception):
            raise results
        give(worker)
        yield from results


def work(parents_end: Connection, connection: Connection) -> None:
    """Answer chunk after chunk, in a process of its own, until the parent ends this process or is gone."""
    parents_end.close()                        # else this process would keep it open itself
    restore_signals()
    with suppress(EOFError, ConnectionError):
        while True:
            function, chunk = connection.recv()
            try:
                results = [function(item) for item in chunk]
            except Exception as error:
                error.add_note(traceback.format_exc())         # pickling drops where it arose
                results = error
            connection.send(results)


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
