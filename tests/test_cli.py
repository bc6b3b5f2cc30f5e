"""What commands share: exit codes, help, what they import, and work spread over processes that may be killed."""
import importlib.util
import multiprocessing
import os
import signal
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest

import cli
import evaluate
import forked

ROOT = Path(__file__).parent.parent


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


# ---------------------------------------------------------------- every script

SCRIPTS = sorted(path for path in [*ROOT.glob("*.py"), *ROOT.glob("dev/*.py")] if "__main__" in path.read_text())
MAINTAINERS_ONLY = {"build_vocabulary.py": "lemminflect"}      # what it needs is in no requirements file


def test_every_script_has_help(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert {"train.py", "sample.py", "bulletins.py", "generate_training_data.py"} <= {path.name for path in SCRIPTS}
    present = [path for path in SCRIPTS if importlib.util.find_spec(MAINTAINERS_ONLY.get(path.name, "json"))]
    processes = [forked.start_script(path, ["--help"], tmp_path / path.name) for path in present]
    assert forked.exit_codes(processes) == [0] * len(present)
    for path in present:
        shown = (tmp_path / path.name).read_text()
        assert shown.startswith(f"usage: {path.name}") and "Run: " in shown, shown


def test_offline_teacher_starts_without_transformers():
    code = ("import sys; sys.modules['transformers'] = None; "
            "import offline_teacher, generate_training_data, bulletins, train")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", ["bulletins", "generate_training_data"])
def test_what_only_generates_starts_without_torch(script):
    code = f"import sys; sys.modules['torch'] = None; import {script}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_help_and_imports_need_no_torch(capsys):
    for command in ("judge", "report", "quality"):
        with pytest.raises(SystemExit) as stop:
            evaluate.main([command, "--help"])
        assert stop.value.code == 0 and f" {command} [-h]" in capsys.readouterr().out
    code = "import sys, evaluate; assert not {'torch', 'matplotlib', 'sentencepiece'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
