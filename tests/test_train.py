"""The step against the published recipe; the run: resumed equals uninterrupted, bad input is one line."""
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import evaluate
import forked
import recipe
import run
import train
from config import Config, TrainConfig
from data import IGNORED, Batch, bulletin_losses, load_split
from devices import Ranks
from model import GPT

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("case", ["tiny", "tiny_bias"])
def test_the_published_recipe_step_by_step(case):
    config, expected = Config.load(GOLDEN / case).train, load_file(GOLDEN / case / "expected.safetensors")
    documents = torch.split(expected["recipe.tokens"].long(), expected["recipe.lengths"].tolist())
    starts = range(0, len(documents), config.batch_size)
    batches = [documents[i:i + config.batch_size] for i in starts] * config.n_epochs
    model = GPT.from_pretrained(GOLDEN / case).train()
    loss, optimizers = recipe.NextTokenLoss(model, torch.float32), recipe.make_optimizers(model, config)
    for step, batch in enumerate(batches, 1):
        rows = torch.nn.utils.rnn.pad_sequence(list(batch), batch_first=True, padding_value=0)
        targets = torch.nn.utils.rnn.pad_sequence(list(batch), batch_first=True, padding_value=IGNORED)[:, 1:]
        lr = recipe.learning_rate(step, len(batches), config)
        n_tokens = np.array([len(document) - 1 for document in batch])
        nats, grad_norm = recipe.train_step(loss, optimizers, Batch(rows[:, :-1], targets, n_tokens), lr)
        assert lr == pytest.approx(expected["recipe.lrs"][step - 1].item(), rel=1e-5)
        loss_per_token = nats.item() / (targets != IGNORED).sum().item()
        assert loss_per_token == pytest.approx(expected["recipe.losses"][step - 1].item(), abs=1e-4)
        assert grad_norm.item() == pytest.approx(expected["recipe.grad_norms"][step - 1].item(), rel=1e-3)
    assert len(batches) == 40 == len(expected["recipe.losses"])
    model.eval()
    assert (model(expected["input_ids"][:1]) - expected["recipe.final_logits"]).abs().max() < 1e-3


def test_learning_rate_at_its_corners():
    config = TrainConfig(peak_lr=1e-3, warmup_ratio=0.1, n_epochs=1, batch_size=1, weight_decay=0.0)
    rates = [recipe.learning_rate(step, 100, config) for step in range(1, 101)]
    assert rates[0] == pytest.approx(1e-4) and rates[9] == pytest.approx(1e-3) and rates[-1] == pytest.approx(1e-4)
    assert max(rates) == rates[9] and rates[54] == pytest.approx(5.5e-4)
    assert recipe.learning_rate(1, 1, config) == pytest.approx(1e-3)       # a run of one step must not divide by zero


# ---------------------------------------------------------------- runs, as a user starts them


def command(small: Path, out: Path, *more) -> list[str]:
    return [sys.executable, "train.py", "--config", str(small / "config.json"), "--data", str(small), "--tokenizer",
            str(small / "tokenizer.model"), "--out", str(out), "--device", "cpu", "--samples", "0", *map(str, more)]


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """A run that nobody disturbed."""
    out = tmp_path_factory.mktemp("finished") / "model"
    done = subprocess.run(command(small, out, "--samples", 1), cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return out, done


def without_times(log: Path) -> list[dict]:
    return [{k: v for k, v in json.loads(line).items() if k != "elapsed_s"} for line in log.read_text().splitlines()]


def assert_near(one: Path, other: Path) -> None:
    for a, b in zip(without_times(one / "log.jsonl"), without_times(other / "log.jsonl"), strict=True):
        assert a["step"] == b["step"] and a["n_tokens"] == b["n_tokens"]
        assert (a["loss"], a["val_loss"]) == pytest.approx((b["loss"], b["val_loss"]), abs=1e-3)


def test_a_run_writes_a_whole_model_folder(finished, small):
    out, done = finished
    assert {p.name for p in out.iterdir()} == {"model.safetensors", "config.json", "tokenizer.model", "tokenizer.vocab",
                                               "run.json", "log.jsonl", "loss.png"}
    log, facts = without_times(out / "log.jsonl"), json.loads((out / "run.json").read_text())
    assert [entry["step"] for entry in log] == sorted({entry["step"] for entry in log})
    assert log[-1]["step"] == facts["n_steps"] == 45
    assert log[-1]["val_loss"] < log[0]["val_loss"] < 7 and facts["val_loss"] == log[-1]["val_loss"]
    assert facts["n_bulletins"] == 120
    assert facts["n_parameters"] == GPT.from_pretrained(out).n_parameters
    assert done.stdout.startswith("validation loss") and done.stdout.count("\n\n") == 3
    assert "\r" not in done.stderr                      # no progress bar where nobody watches


def test_the_logged_validation_loss_is_total_by_total(finished, small):
    out, _ = finished
    validation = load_split(small, "validation", out / "tokenizer.model", 256)
    nats, n_targets = bulletin_losses(GPT.from_pretrained(out), validation, batch_size=5)
    told = json.loads((out / "run.json").read_text())["val_loss"]
    assert nats.sum() / n_targets.sum() == pytest.approx(told, abs=1e-5)
    torch.set_float32_matmul_precision("highest")                     # GPUs differ in it by default from what trained
    assert evaluate.loss_of(out, [small / "validation.txt"])["nats_per_token"] == pytest.approx(told, abs=1e-5)
    assert torch.get_float32_matmul_precision() == "high"


def start_until(small: Path, out: Path, n_checkpoints: int, *more,
                prepare: Callable[[], None] | None = None) -> ForkServerProcess:
    """Start or resume a run and return it when it has written a number of checkpoints (one after every step)."""
    checkpoint = out / "checkpoint.pt"
    before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
    resume = command(small, out, "--resume", "--checkpoint-every", 0, *more)[2:]
    process = forked.start(resume, out.with_suffix(".log"), prepare)
    while n_checkpoints and process.is_alive():
        stamp = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        if stamp != before:
            before, n_checkpoints = stamp, n_checkpoints - 1
        process.join(0.001)
    return process


def test_killed_five_times_and_resumed_is_uninterrupted(finished, small, tmp_path):
    out, steps = tmp_path / "model", []
    for _ in range(5):
        process = start_until(small, out, 3)
        process.kill()
        process.join()
        steps.append(torch.load(out / "checkpoint.pt", weights_only=True)["step"])
    assert steps == sorted(set(steps)) and steps[-1] < 45             # each life got further, none to the end
    (out / "checkpoint.pt.partial").write_bytes(b"torn")
    assert (out / ".lock").exists() and forked.exit_codes([start_until(small, out, 0)]) == [0]
    assert {p.name for p in out.iterdir()} == {p.name for p in finished[0].iterdir()}
    assert (out / "model.safetensors").read_bytes() == (finished[0] / "model.safetensors").read_bytes()
    assert without_times(out / "log.jsonl") == without_times(finished[0] / "log.jsonl")


def on_two_threads() -> None:
    torch.set_num_threads(2)


def test_the_fast_recipe_on_two_threads_goes_on_as_exactly(small, tmp_path):
    config = json.loads((small / "config.json").read_text())
    config["train"] |= {"n_epochs": 1, "batch_size": 1, "init": "bigram", "optimizer": "muon", "schedule": "linear",
                        "n_candidates": 300}
    (tmp_path / "fast.json").write_text(json.dumps(config))
    options = ["--config", tmp_path / "fast.json", "--max-steps", 40]
    start = partial(start_until, small, prepare=on_two_threads)
    assert forked.exit_codes([start(tmp_path / "whole", 0, *options)]) == [0]
    for n_checkpoints in (3, 5):
        process = start(tmp_path / "model", n_checkpoints, *options)
        process.kill()
        process.join()
    assert forked.exit_codes([start_until(small, tmp_path / "model", 0, *options)]) == [0]       # started on one thread
    whole, resumed = (tmp_path / name / "model.safetensors" for name in ("whole", "model"))
    assert resumed.read_bytes() == whole.read_bytes()
    assert json.loads((tmp_path / "model" / "run.json").read_text())["cpu_threads"] == 2


def test_a_signal_saves_and_resume_goes_on(finished, small, tmp_path, capsys):
    out = tmp_path / "model"
    for number in (signal.SIGINT, signal.SIGTERM):
        process = start_until(small, out, 2)
        os.kill(process.pid, number)
        assert forked.exit_codes([process]) == [130]
        stderr = out.with_suffix(".log").read_text()
        assert "--resume goes on" in stderr and "Traceback" not in stderr
    assert train.main(command(small, out)[2:]) == 2
    assert "unfinished run" in capsys.readouterr().err
    assert train.main(command(small, out, "--resume", "--max-steps", 40)[2:]) == 2
    assert "started otherwise: n_steps was 45, is 40" in capsys.readouterr().err
    assert forked.exit_codes([start_until(small, out, 0)]) == [0]
    assert (out / "model.safetensors").read_bytes() == (finished[0] / "model.safetensors").read_bytes()


def test_a_second_run_in_a_folder_is_refused_and_harms_nothing(finished, small, tmp_path, capsys):
    out = tmp_path / "model"
    first = forked.start(command(small, out)[2:], tmp_path / "log")
    while not (out / "log.jsonl").exists():
        first.join(0.001)
    os.kill(first.pid, signal.SIGSTOP)                    # so that it is there for as long as it is looked at
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for more in ([], ["--resume"], ["--resume", "--max-steps", 40]):
        assert train.main(command(small, out, *more)[2:]) == 2
        assert capsys.readouterr().err == (f"error: {out}: another process is training there; wait for it or choose "
                                           "another --out\n")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    os.kill(first.pid, signal.SIGCONT)
    assert forked.exit_codes([first]) == [0] and not (out / ".lock").exists()
    assert (out / "model.safetensors").read_bytes() == (finished[0] / "model.safetensors").read_bytes()


def test_what_another_run_left_meanwhile_is_not_overwritten(finished, small, tmp_path, monkeypatch, capsys):
    """It was not there yet when this run looked at the folder first."""
    out = tmp_path / "model"

    def slow(*args):
        if not out.exists():
            shutil.copytree(finished[0], out)
        return load_split(*args)

    monkeypatch.setattr("run.load_split", slow)
    assert train.main(command(small, out, "--resume")[2:]) == 2
    assert "another process is training there" in capsys.readouterr().err
    assert (out / "log.jsonl").read_bytes() == (finished[0] / "log.jsonl").read_bytes()


@pytest.mark.parametrize("place", ["evaluate", "draw"])
def test_a_signal_after_the_last_step_comes_too_late_to_stop(finished, small, tmp_path, monkeypatch, place):
    """A checkpoint of the last step would be resumed with one step too many; without one, all would be lost."""
    function, saved = getattr(train, place), []

    def signalled(run, *args):
        function(run, *args)
        if run.step == run.n_steps:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train, place, signalled)
    monkeypatch.setattr(train.Run, "save_checkpoint", lambda run: saved.append(run.step))
    assert train.main(command(small, tmp_path / "model")[2:]) == 0 and not saved
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == (finished[0] / "model.safetensors").read_bytes()


@pytest.mark.parametrize("spoil, message", [
    (["--config", "nowhere.json"], "nowhere.json: no such config"),
    (["--data", "nowhere"], "nowhere: no train.txt"),
    (["--tokenizer", "nowhere.model"], "nowhere.model: no such tokenizer"),
    (["--tokenizer", "README.md"], "README.md: not a sentencepiece model"),
    (["--tokenizer", "tokenizers"], "Is a directory: 'tokenizers'"),
    (["--out", "README.md"], "File exists: 'README.md'"),
    (["--device", "mps"], "not present"),
    (["--config", "configs/3M.json"], "vocab_size is 8,192"),
])
def test_bad_input_is_one_line(small, tmp_path, spoil, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert train.main(command(small, tmp_path / "model", *spoil)[2:]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "model").exists()


def test_resuming_what_is_finished_is_no_error(finished, small, capsys):
    before = (finished[0] / "model.safetensors").read_bytes()
    assert train.main(command(small, finished[0], "--resume")[2:]) == 0
    assert "finished already" in capsys.readouterr().err and (finished[0] / "model.safetensors").read_bytes() == before


def test_a_finished_model_is_not_taken_for_another(finished, small, tmp_path, capsys):
    config = json.loads((small / "config.json").read_text())
    config["train"]["peak_lr"] = 0.02
    (tmp_path / "other.json").write_text(json.dumps(config))
    assert train.main([*command(small, finished[0], "--resume")[2:], "--config", str(tmp_path / "other.json")]) == 2
    assert capsys.readouterr().err.endswith("holds a finished model of another config; choose another --out\n")
    shutil.copytree(small, tmp_path / "corpus", ignore=shutil.ignore_patterns(".tokens"))
    with (tmp_path / "corpus" / "train.txt").open("a") as file:
        file.write("rain </h> it rained.\n")
    assert train.main([*command(small, finished[0], "--resume")[2:], "--data", str(tmp_path / "corpus")]) == 2
    assert "of another training text or tokenizer; choose" in capsys.readouterr().err


def test_a_checkpoint_that_a_finished_run_left_is_forgotten(finished, small, tmp_path):
    """A kill may come between the weights and the end."""
    shutil.copytree(finished[0], tmp_path / "model")
    (tmp_path / "model" / "checkpoint.pt").touch()
    assert train.main(command(small, tmp_path / "model", "--resume")[2:]) == 0
    assert not (tmp_path / "model" / "checkpoint.pt").exists()


def test_a_checkpoint_of_another_run_is_refused_with_what_differs(finished, small, tmp_path, capsys, monkeypatch):
    out = tmp_path / "model"
    process = start_until(small, out, 1)
    process.kill()
    process.join()
    config = json.loads((small / "config.json").read_text())
    config["train"]["peak_lr"] = 0.02
    (tmp_path / "other.json").write_text(json.dumps(config))
    assert train.main([*command(small, out, "--resume")[2:], "--config", str(tmp_path / "other.json")]) == 2
    assert capsys.readouterr().err.endswith("started otherwise: train.peak_lr was 0.01, is 0.02; delete it to begin "
                                            "anew, or choose another --out\n")
    config["train"].update(peak_lr=0.01, seed=3)
    (tmp_path / "other.json").write_text(json.dumps(config))
    assert train.main([*command(small, out, "--resume")[2:], "--config", str(tmp_path / "other.json")]) == 2
    assert "started otherwise: train.seed was 0, is 3; delete" in capsys.readouterr().err
    assert train.main([*command(small, out, "--resume")[2:], "--config", str(finished[0])]) == 2
    assert "started otherwise: the first weights was None, is " in capsys.readouterr().err
    shutil.copytree(small, tmp_path / "corpus", ignore=shutil.ignore_patterns(".tokens"))
    text = (small / "train.txt").read_text()
    (tmp_path / "corpus" / "train.txt").write_text(text[text.index("\n") + 1:])
    assert train.main([*command(small, out, "--resume")[2:], "--data", str(tmp_path / "corpus")]) == 2
    assert "started otherwise: the training text was " in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(run, "code_sha256", lambda: "0123456789abcdef")
        assert train.main(command(small, out, "--resume")[2:]) == 2
    assert f"recipe.py) was {run.code_sha256()[:12]}, is 0123456789ab; delete" in capsys.readouterr().err
    for broken, message in ((b"{", "not JSON"), (b"[" * 100_000, "not JSON"), (b"\xff", "not JSON"),
                            (b"1", "expected an object with step"), (b"{}", "expected an object with step")):
        (out / "log.jsonl").write_bytes(broken)
        assert train.main(command(small, out, "--resume")[2:]) == 2
        assert f"log.jsonl:1: {message}" in capsys.readouterr().err
    torch.save({"step": 1}, out / "checkpoint.pt")
    assert train.main(command(small, out, "--resume")[2:]) == 2
    assert "checkpoint.pt: not a checkpoint of a run" in capsys.readouterr().err


def test_a_checkpoint_that_the_disk_does_not_yield_is_not_called_broken(small, tmp_path, monkeypatch, capsys):
    (tmp_path / "checkpoint.pt").touch()

    def load(path, weights_only, map_location):
        assert map_location == "cpu"                      # a GPU may be too full
        raise OSError(errno.EIO, "Input/output error")
    monkeypatch.setattr(torch, "load", load)
    assert train.main(command(small, tmp_path, "--resume")[2:]) == 1
    assert capsys.readouterr().err == "error: [Errno 5] Input/output error\n"


def test_a_finished_model_is_not_overwritten_but_trained_further(finished, small, tmp_path, capsys):
    assert train.main(command(small, finished[0])[2:]) == 2
    assert "finished model" in capsys.readouterr().err
    further = train.main(["--config", str(finished[0]), "--data", str(small), "--out", str(tmp_path / "model"),
                          "--device", "cpu", "--max-steps", "5", "--eval-every", "1"])
    log = without_times(tmp_path / "model" / "log.jsonl")
    assert further == 0 and log[0]["val_loss"] < without_times(finished[0] / "log.jsonl")[0]["val_loss"]


@pytest.mark.parametrize("step_s, n_steps", [([5.0], 25), ([1.0, 1.0, 2.0, 30.0], 16), ([0.1], 45)])
def test_against_the_clock_the_schedule_comes_to_its_end(small, tmp_path, monkeypatch, step_s, n_steps):
    """Two minutes: steps that take 5 s, steps of which some take longer than two of the ten stages, all there are."""
    now, seen, next_in_schedule = [0.0], [], train.next_in_schedule

    def scheduled(run):
        seen.append(next_in_schedule(run))
        return seen[-1]

    def step(*args):
        now[0] += step_s[len(seen) % len(step_s)]
        return torch.tensor(1.0), torch.tensor(1.0)

    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(train, "train_step", step)
    monkeypatch.setattr(train, "bulletin_losses", lambda model, tokens: (np.ones(1), np.ones(1)))
    monkeypatch.setattr(train, "draw", lambda run: None)
    monkeypatch.setattr(train, "finish", lambda run: None)
    monkeypatch.setattr(train, "samples", lambda run, n: [])
    monkeypatch.setattr(train, "next_in_schedule", scheduled)
    assert train.main(command(small, tmp_path / "model", "--max-minutes", 2)[2:]) == 0
    log, steps = without_times(tmp_path / "model" / "log.jsonl"), [step for step, _ in seen]
    assert steps == sorted(steps) and steps[-1] == 45 and log[-1]["lr"] == pytest.approx(0.1 * 0.01)
    assert [entry["step"] for entry in log] == [i for i, (_, is_evaluation) in enumerate(seen, 1) if is_evaluation]
    stages = [step * 10 // 45 for step in steps]
    evaluated = [stage for stage, (_, is_evaluation) in zip(stages, seen) if is_evaluation]
    assert evaluated == sorted(set(stages) - {0}) and len(seen) == log[-1]["step"] == n_steps


def test_micro_batches_end_where_whole_batches_do(finished, small, tmp_path):
    assert train.main(command(small, tmp_path / "model", "--micro-batch-size", 3)[2:]) == 0
    assert_near(finished[0], tmp_path / "model")


def test_a_compiled_run_that_goes_on_shows_the_compiler_the_same_batches(small, tmp_path, monkeypatch):
    shown, next_in_schedule = [], train.next_in_schedule

    def stopped(run):
        if run.step == 2 and len(shown) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return next_in_schedule(run)

    def compile_loss(loss, batches):
        shown.append([tuple(inputs.shape) for inputs, *_ in batches])
        return loss

    monkeypatch.setattr(train, "next_in_schedule", stopped)
    monkeypatch.setattr("run.pays_to_compile", lambda *args: True)
    monkeypatch.setattr("run.compile_loss", compile_loss)
    start = command(small, tmp_path / "model", "--max-steps", 4, "--micro-batch-size", 7)[2:]
    assert train.main(start) == 130 and train.main([*start, "--resume"]) == 0
    first, *kinds = shown[0]
    assert shown[1] == shown[0] and kinds[3][1] <= first[1] <= kinds[2][1] and kinds[1][1] < kinds[0][1]
    assert [n_rows for n_rows, _ in shown[0]] == [7, 1, 1, 7, 7]                  # of a batch of 8


def test_a_compiled_run_where_the_compiler_fails_is_one_line(small, tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise RuntimeError("no\ncompiler")
    monkeypatch.setattr(run, "pays_to_compile", lambda *args: True)
    monkeypatch.setattr(run, "compile_loss", fail)
    assert train.main(command(small, tmp_path / "model")[2:]) == 2
    assert capsys.readouterr().err.endswith("error: this run is compiled, but the compiler fails here (RuntimeError no "
                                            "compiler); is there a C++ compiler?\n")


def test_a_run_that_diverges_is_no_success(small, tmp_path, capsys):
    config = json.loads((small / "config.json").read_text())
    config["train"]["peak_lr"] = 1e30
    (tmp_path / "wild.json").write_text(json.dumps(config))
    for n_steps in (4, 1):                     # in its last step too, whose own loss is still finite
        out = tmp_path / f"of {n_steps}"
        assert train.main(command(small, out, "--max-steps", n_steps, "--config", tmp_path / "wild.json")[2:]) == 2
        assert re.search(r"error: the loss is nan by step 1: training has diverged.*\n$", capsys.readouterr().err)
        assert not (out / "model.safetensors").exists() and not (out / "log.jsonl").read_text()


@pytest.mark.parametrize("options", [[], ["--micro-batch-size", "64"]])
def test_out_of_memory_is_one_line(small, tmp_path, monkeypatch, capsys, options):
    def full(*args):
        raise torch.OutOfMemoryError
    monkeypatch.setattr(train, "train_step", full)
    assert train.main(command(small, tmp_path / "model", *options)[2:]) == 1
    assert capsys.readouterr().err.endswith(
        "error: out of memory on cpu: --resume with --micro-batch-size below 8; the result stays the same\n")


def test_out_of_memory_as_a_cpu_says_it_with_nothing_left_to_split(small, tmp_path, monkeypatch, capsys):
    def full(*args):
        torch.empty(10**15)
    monkeypatch.setattr(train, "train_step", full)
    assert train.main(command(small, tmp_path / "model", "--micro-batch-size", 1)[2:]) == 1
    assert capsys.readouterr().err.endswith("error: out of memory on cpu: lower model.d_embedding or model.n_layers\n")


@pytest.mark.parametrize("place", ["run.initialise", "torch.load", "train.finish"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError(), torch.AcceleratorError("CUDA error: out of memory\n...")])
def test_out_of_memory_outside_of_a_step_is_one_line(small, tmp_path, monkeypatch, capsys, place, error):
    """Another program may hold the GPU before this one does."""
    def full(*args, **options):
        raise error
    monkeypatch.setattr(place, full)
    if place == "torch.load":
        (tmp_path / "checkpoint.pt").touch()
    assert train.main(command(small, tmp_path, "--resume", "--max-steps", 1)[2:]) == 1
    assert capsys.readouterr().err.endswith("error: out of memory: end other programs that use the device, or lower "
                                            "model.d_embedding or model.n_layers\n")


def test_a_run_that_has_diverged_leaves_the_checkpoint_from_before(small, tmp_path, capsys, monkeypatch):
    step = train.train_step

    def diverge_in_the_third(*args):
        nats, norm = step(*args)
        calls.append(norm)
        return nats * (torch.nan if len(calls) == 3 else 1), norm

    calls, out = [], tmp_path / "model"
    monkeypatch.setattr(train, "train_step", diverge_in_the_third)
    start = command(small, out, "--max-steps", 20, "--eval-every", 20, "--checkpoint-every", 0)[2:]
    assert train.main(start) == 2
    assert capsys.readouterr().err.endswith("the loss is nan by step 3: training has diverged; begin anew with a "
                                            f"lower learning rate; delete {out / 'checkpoint.pt'} first\n")
    assert torch.load(out / "checkpoint.pt", weights_only=True)["step"] == 2


def test_tensorboard_gets_each_entry_of_the_log(small, tmp_path, monkeypatch):
    class Writer:
        def __init__(self, folder, purge_step):
            told.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            told.append((name, value, step))

        def flush(self):
            told.append("flushed")

    told, out = [], tmp_path / "model"
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    assert train.main(command(small, out, "--tensorboard", "--max-steps", 2, "--eval-every", 1)[2:]) == 0
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    wanted = [(out, 1)]
    for entry in entries:
        step = entry.pop("step")
        wanted += [*((name, value, step) for name, value in entry.items()), "flushed"]
    assert len(entries) == 2 and told == wanted


def test_tensorboard_is_asked_for_by_name(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert train.main(command(small, tmp_path / "model", "--tensorboard")[2:]) == 2
    assert capsys.readouterr().err == "error: --tensorboard: not installed; pip install tensorboard\n"


@pytest.mark.parametrize("flag, value, told", [
    ("--max-steps", 0, "0"), ("--max-minutes", -1, "-1.0"), ("--max-minutes", "nan", "nan"), ("--eval-every", 0, "0"),
    ("--micro-batch-size", -1, "-1")])
def test_flags_out_of_range_are_one_line(small, tmp_path, flag, value, told, capsys):
    assert train.main(command(small, tmp_path / "model", flag, value)[2:]) == 2
    assert capsys.readouterr().err == f"error: {flag} must be above 0, not {told}\n"


def test_a_full_disk_is_one_line_and_harms_no_checkpoint(small, tmp_path, monkeypatch, capsys):
    out, at_step_2 = tmp_path / "model", []
    next_in_schedule = train.next_in_schedule

    def fill(run):
        if run.step == 2:
            at_step_2.append((out / "checkpoint.pt").read_bytes())
            (out / "checkpoint.pt.partial").symlink_to("/dev/full")
        return next_in_schedule(run)

    monkeypatch.setattr(train, "next_in_schedule", fill)
    assert train.main(command(small, out, "--checkpoint-every", 0)[2:]) == 1
    assert capsys.readouterr().err.endswith("error: [Errno 28] No space left on device\n")
    assert [(out / "checkpoint.pt").read_bytes()] == at_step_2 and not list(out.glob("*.partial"))


def test_the_tokenizer_may_already_be_where_the_model_goes(small, tmp_path):
    for name in ("tokenizer.model", "tokenizer.vocab"):
        shutil.copy(small / name, tmp_path)
    start = command(small, tmp_path, "--max-steps", 1, "--tokenizer", tmp_path / "tokenizer.model")[2:]
    assert train.main(start) == 0 and (tmp_path / "model.safetensors").exists()
    assert (tmp_path / "tokenizer.vocab").read_bytes() == (small / "tokenizer.vocab").read_bytes()


# ---------------------------------------------------------------- several processes


def test_two_processes_in_parts_end_where_one_does(small, tmp_path):
    config = json.loads((small / "config.json").read_text())
    config["train"]["n_epochs"] = 7
    (tmp_path / "long.json").write_text(json.dumps(config))
    alone, out = tmp_path / "alone", tmp_path / "model"
    assert train.main(command(small, alone, "--config", tmp_path / "long.json")[2:]) == 0
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    start = command(small, out, "--config", tmp_path / "long.json", "--micro-batch-size", 3)[1:]
    done = subprocess.run([sys.executable, *torchrun, *start], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("validation loss") == 1                  # one process alone speaks and writes
    facts = json.loads((out / "run.json").read_text())
    assert (facts["n_processes"], facts["n_steps"]) == (2, 105)
    assert_near(alone, out)


def test_processes_that_do_not_share_the_checkpoint_do_not_go_on(small, tmp_path, monkeypatch, capsys):
    """Of several nodes without a common --out, one would go on and the others begin anew."""
    of_another = (False, True, False)                                 # it sees what this process does not
    monkeypatch.setattr(Ranks, "any", lambda ranks, *are_so: [a or b for a, b in zip(are_so, of_another)])
    assert train.main(command(small, tmp_path / "model", "--resume")[2:]) == 2
    assert "not every process sees the checkpoint" in capsys.readouterr().err


def another_version_on_the_second() -> None:
    run.code_sha256 = lambda: os.environ["RANK"]


def test_processes_that_would_do_otherwise_than_the_first_are_told(small, tmp_path):
    """They would train on other rows than the first one thinks, or wait for it in vain."""
    ranks = forked.start_ranks(2, command(small, tmp_path / "model")[2:], tmp_path, another_version_on_the_second)
    assert forked.exit_codes(ranks) == [2, 2]
    assert all((tmp_path / rank).read_text().endswith("PyTorch; each node needs the same\n") for rank in "01")
    assert not (tmp_path / "model").exists()


def no_tensorboard_on_the_first() -> None:
    if os.environ["RANK"] == "0":
        sys.modules["torch.utils.tensorboard"] = None


def test_a_process_says_in_one_line_that_another_has_ended(small, tmp_path):
    start = command(small, tmp_path / "model", "--tensorboard")[2:]
    ranks = forked.start_ranks(2, start, tmp_path, no_tensorboard_on_the_first)
    assert forked.exit_codes(ranks) == [2, 1]
    assert (tmp_path / "0").read_text() == "error: --tensorboard: not installed; pip install tensorboard\n"
    told = (tmp_path / "1").read_text()
    assert told.endswith("error: another process of this run has ended; its own line says why\n")


def signal_second(step: int, number: int, n_times: int = 1) -> None:
    """Have the second process of a run send itself a signal in a step."""
    next_in_schedule = train.next_in_schedule

    def signalled(run):
        if run.step == step and run.ranks.rank == 1:
            for _ in range(n_times):
                os.kill(os.getpid(), number)
        return next_in_schedule(run)

    train.next_in_schedule = signalled


def killed_at_7() -> None:
    signal_second(7, signal.SIGKILL)


def stopped_at_19() -> None:
    signal_second(19 - 1, signal.SIGTERM, n_times=2)                  # as torchrun repeats it


def on_a_terminal() -> None:
    sys.stderr.isatty = lambda: True


def test_three_processes_stop_together_and_go_on(finished, small, tmp_path, capsys):
    """A batch of 8 rows does not divide by three, and of the sums of three numbers the order matters."""
    whole, out, logs = tmp_path / "whole", tmp_path / "model", tmp_path / "logs"
    assert forked.exit_codes(forked.start_ranks(3, command(small, whole)[2:], logs)) == [0, 0, 0]
    assert_near(finished[0], whole)
    resume = command(small, out, "--resume")[2:]
    saving = [*resume, "--checkpoint-every", "0"]
    assert forked.exit_codes(forked.start_ranks(3, saving, logs, killed_at_7)) == [1, -signal.SIGKILL, 1]
    for rank in "02":
        last_line = (logs / rank).read_text().splitlines()[-1]
        assert last_line == "error: another process of this run has ended; its own line says why"
    assert forked.exit_codes(forked.start_ranks(3, resume, logs, stopped_at_19)) == [130, 130, 130]
    assert "at step 19 of 45; --resume goes on" in (logs / "0").read_text() and not (out / "model.safetensors").exists()
    assert train.main(resume) == 2
    assert "processes was 3, is 1" in capsys.readouterr().err
    assert forked.exit_codes(forked.start_ranks(3, resume, logs, on_a_terminal)) == [0, 0, 0]
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    log = without_times(out / "log.jsonl")
    assert log == without_times(whole / "log.jsonl")
    shown = float(re.search(r"20/45 .*loss ([\d.]+),", (logs / "0").read_text())[1])    # 2 steps since the last entry
    assert log[3]["step"] == 18 and shown == pytest.approx(log[4]["loss"], abs=0.5)


def compiled_for_good() -> None:
    """Have a run compile what it computes, up to the C++, and fail if a step has to compile it again."""
    compile_loss = run.compile_loss

    def once(loss, batches):
        compiled = compile_loss(loss, batches)
        torch._dynamo.config.error_on_recompile = True
        return compiled

    torch.compile = partial(torch.compile, backend="eager")
    run.pays_to_compile, run.compile_loss = lambda *args: True, once


def test_the_steps_of_several_processes_need_no_code_beyond_what_was_compiled(small, tmp_path):
    config = json.loads((small / "config.json").read_text())
    config["model"]["n_layers"] = 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    start = command(small, tmp_path / "model", "--config", tmp_path / "config.json", "--max-steps", 2,
                    "--micro-batch-size", 3)[2:]                      # of the four rows of each, parts of 3 and of 1
    assert forked.exit_codes(forked.start_ranks(2, start, tmp_path / "logs", compiled_for_good)) == [0, 0]
    assert json.loads((tmp_path / "model" / "run.json").read_text())["is_compiled"]


def test_one_batch_overfits(small):
    config = Config.load(small / "config.json")
    model = GPT(config.model)
    ids = torch.randint(4, 512, (4, 33), generator=torch.Generator().manual_seed(0))
    recipe.initialise(model, config.train, ids.numpy().ravel())
    loss, optimizers = recipe.NextTokenLoss(model, torch.float32), recipe.make_optimizers(model, config.train)
    batch = Batch(ids[:, :-1], ids[:, 1:], np.full(4, 32))
    nats = [recipe.train_step(loss, optimizers, batch, 3e-3)[0].item() for _ in range(150)]
    assert nats[0] / 128 == pytest.approx(np.log(512), abs=0.3) and nats[-1] / 128 < 0.5
