"""What every command does the same way: exit codes, and leaving by Ctrl-C or SIGTERM with the work saved."""
import signal
import sys
from collections.abc import Callable

INTERRUPTED = 130


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
