"""What every command does the same way: exit codes, leaving by Ctrl-C or SIGTERM with the work saved, and keeping a
second process out of a folder."""
import multiprocessing
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO

INTERRUPTED = 130
LOCK = ".lock"               # the file in a folder that hold() locks


def run(command: Callable[[], None]) -> int:
    """Run a command and return its exit code.

    0: all was done. 2: the user's input is wrong (ValueError, FileNotFoundError), told in one line on standard error.
    1: the world is in the way (OSError: disk full, server gone, budget used up), in one line too.
    130: Ctrl-C or SIGTERM, which reach the command as KeyboardInterrupt. Anything else is our mistake and passes
    through, so that the traceback shows and Python exits with 1.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        command()
        sys.stdout.flush()
    except KeyboardInterrupt as stop:
        print(f"stopped{f': {stop}' if str(stop) else ''}", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader of our output (head, less) has gone: not an error, but Python would complain again at exit.
        sys.stdout = None
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def hold(folder: Path) -> IO | None:
    """Make a folder and hold it until the file returned is closed; return None if another process holds it.

    The lock is the kernel's, which forgets it with the process, so a file that a kill leaves behind locks nothing.
    """
    import fcntl                      # not on Windows, where only this would fail
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / LOCK).open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock


def start_workers(n_jobs: int):
    """Return a pool of processes that end when the pool tells them to (SIGTERM), and leave Ctrl-C to this one.

    Forked while run() has both raise KeyboardInterrupt, a worker could print it, or swallow it and never end; so the
    signals wait until the worker has put that right.
    """
    held = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
    try:
        return multiprocessing.Pool(n_jobs, initializer=restore_signals)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def restore_signals() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM, signal.SIGINT])


class StopSignal:
    """Turns Ctrl-C and SIGTERM into a flag that a loop reads between two steps; a second Ctrl-C stops at once.

    A second SIGTERM does not: torchrun and job managers repeat it.
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
