"""What commands share: exit codes, and work spread over processes that may fail or be killed."""
import multiprocessing
import os
import signal
from itertools import count

import pytest

import cli


def double(n: int) -> int:
    return 2 * n


def fail_at_seven(n: int) -> int:
    return n // (n - 7)


def die_at_seven(n: int) -> int:
    if n == 7:
        os.kill(os.getpid(), signal.SIGKILL)       # as the kernel does when memory is short
    return n


def test_standard_output_may_be_closed(monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    assert cli.run(lambda: print("to nobody")) == 0


@pytest.mark.parametrize("n_jobs, chunk_size", [(1, 1), (2, 1), (3, 7)])
def test_results_come_in_order_and_more_than_once(n_jobs, chunk_size):
    with cli.start_workers(n_jobs, chunk_size) as spread:
        for n in (0, 1, 50):
            assert list(spread(double, range(n))) == list(range(0, 2 * n, 2))


def test_little_is_read_before_it_is_needed():
    numbers = count()
    with cli.start_workers(2, chunk_size=3) as spread:
        assert next(iter(spread(double, numbers))) == 0
        assert next(numbers) == 12                 # two chunks for each process
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("function, error", [(fail_at_seven, ZeroDivisionError), (die_at_seven, ChildProcessError)])
def test_an_error_or_a_kill_in_a_process_ends_the_work(function, error, method):
    with pytest.raises(error), cli.start_workers(2, chunk_size=2, method=method) as spread:
        list(spread(function, range(1000)))
    assert multiprocessing.active_children() == []


def never_end_above_zero(n: int) -> int:
    while n:
        signal.pause()
    return n


def test_who_is_stopped_waits_for_no_process():
    with pytest.raises(KeyboardInterrupt), cli.start_workers(2) as spread:
        assert next(iter(spread(never_end_above_zero, range(9)))) == 0
        raise KeyboardInterrupt
    assert multiprocessing.active_children() == []


def test_a_process_killed_while_it_has_nothing_to_do(capsys):
    def command() -> None:
        with cli.start_workers(2) as spread:
            assert list(spread(double, range(4))) == [0, 2, 4, 6]
            child = multiprocessing.active_children()[0]
            child.kill()
            child.join()
            list(spread(double, range(4)))

    assert cli.run(command) == 1
    assert capsys.readouterr().err.startswith("error: a worker process was killed")
