"""The training step against the published recipe, and the run: resumed equals uninterrupted, bad input is one line."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import recipe
import train
from data import IGNORED
from model import GPT, Config, TrainConfig

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("case", ["tiny", "tiny_bias"])
def test_the_published_recipe_step_by_step(case):
    config, expected = Config.load(GOLDEN / case).train, load_file(GOLDEN / case / "expected.safetensors")
    documents = torch.split(expected["recipe.tokens"].long(), expected["recipe.lengths"].tolist())
    batches = [documents[i:i + config.batch_size] for i in range(0, len(documents), config.batch_size)] * config.n_epochs
    model = GPT.from_pretrained(GOLDEN / case).train()
    loss, optimizers = recipe.NextTokenLoss(model, torch.float32), recipe.make_optimizers(model, config)
    for step, batch in enumerate(batches, 1):
        rows = torch.nn.utils.rnn.pad_sequence(list(batch), batch_first=True, padding_value=0)
        targets = torch.nn.utils.rnn.pad_sequence(list(batch), batch_first=True, padding_value=IGNORED)[:, 1:]
        lr = recipe.learning_rate(step, len(batches), config)
        nats, grad_norm = recipe.train_step(loss, optimizers, rows[:, :-1], targets, lr)
        assert lr == pytest.approx(expected["recipe.lrs"][step - 1].item(), rel=1e-5)
        assert nats.item() / (targets != IGNORED).sum() == pytest.approx(expected["recipe.losses"][step - 1].item(), abs=1e-4)
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
    done = subprocess.run(command(small, out, "--samples", 1), cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return out, done


def without_times(log: Path) -> list[dict]:
    return [{k: v for k, v in json.loads(line).items() if k != "elapsed_s"} for line in log.read_text().splitlines()]


def test_a_run_writes_a_whole_model_folder(finished, small):
    out, done = finished
    assert {p.name for p in out.iterdir()} == {"model.safetensors", "config.json", "tokenizer.model", "tokenizer.vocab",
                                               "run.json", "log.jsonl", "loss.png"}
    log, facts = without_times(out / "log.jsonl"), json.loads((out / "run.json").read_text())
    assert [entry["step"] for entry in log] == sorted({entry["step"] for entry in log})
    assert log[-1]["step"] == facts["n_steps"] == 45
    assert log[-1]["val_loss"] < log[0]["val_loss"] < 7 and facts["val_loss"] == log[-1]["val_loss"]
    assert facts["n_bulletins"] == 120 and facts["n_parameters"] == sum(p.numel() for p in GPT.from_pretrained(out).parameters())
    assert done.stdout.startswith("validation loss") and done.stdout.count("\n\n") == 3
    assert "\r" not in done.stderr                      # no progress bar where nobody watches


def test_the_logged_validation_loss_is_total_by_total(finished, small):
    from data import bulletin_losses, load_split
    out, _ = finished
    validation = load_split(small, "validation", out / "tokenizer.model", 256)
    nats, n_targets = bulletin_losses(GPT.from_pretrained(out), validation, batch_size=5)
    assert nats.sum() / n_targets.sum() == pytest.approx(json.loads((out / "run.json").read_text())["val_loss"], abs=1e-5)


def start_until(small: Path, out: Path, n_checkpoints: int) -> subprocess.Popen:
    """Start or resume a run and return it when it has written a number of checkpoints (one after every step)."""
    before = (out / "checkpoint.pt").stat().st_mtime_ns if (out / "checkpoint.pt").exists() else 0
    process = subprocess.Popen(command(small, out, "--resume", "--checkpoint-every", 0), cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while n_checkpoints and process.poll() is None and time.monotonic() < deadline:
        stamp = (out / "checkpoint.pt").stat().st_mtime_ns if (out / "checkpoint.pt").exists() else 0
        if stamp != before:
            before, n_checkpoints = stamp, n_checkpoints - 1
    return process


def test_killed_five_times_and_resumed_is_uninterrupted(finished, small, tmp_path):
    out, steps = tmp_path / "model", []
    for _ in range(5):
        process = start_until(small, out, 3)
        process.kill()
        process.communicate()
        steps.append(torch.load(out / "checkpoint.pt", weights_only=True)["step"])
    assert steps == sorted(set(steps)) and steps[-1] < 45             # each life got further, none to the end
    (out / "checkpoint.pt.partial").write_bytes(b"torn")
    last = start_until(small, out, 0)
    stdout, stderr = last.communicate(timeout=120)
    assert last.returncode == 0, stderr
    assert (out / "model.safetensors").read_bytes() == (finished[0] / "model.safetensors").read_bytes()
    assert without_times(out / "log.jsonl") == without_times(finished[0] / "log.jsonl")


def test_a_signal_saves_and_resume_goes_on(finished, small, tmp_path, capsys):
    out = tmp_path / "model"
    for number in (signal.SIGINT, signal.SIGTERM):
        process = start_until(small, out, 2)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == 130 and "--resume goes on" in stderr and "Traceback" not in stderr
    assert train.main(command(small, out)[2:]) == 2
    assert "unfinished run" in capsys.readouterr().err
    assert train.main(command(small, out, "--resume", "--max-steps", 40)[2:]) == 2
    assert "started otherwise: n_steps was 45, is 40" in capsys.readouterr().err
    assert start_until(small, out, 0).communicate(timeout=120) and (out / "model.safetensors").exists()
    assert (out / "model.safetensors").read_bytes() == (finished[0] / "model.safetensors").read_bytes()


def test_a_signal_in_the_last_evaluation_comes_too_late_to_stop(finished, small, tmp_path, monkeypatch):
    """A checkpoint of the last step would be resumed with one step too many."""
    evaluate, saved = train.Run.evaluate, []

    def signalled(run, *args):
        evaluate(run, *args)
        if run.step == run.n_steps:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train.Run, "evaluate", signalled)
    monkeypatch.setattr(train.Run, "save_checkpoint", lambda run: saved.append(run.step))
    assert train.main(command(small, tmp_path / "model")[2:]) == 0 and not saved
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == (finished[0] / "model.safetensors").read_bytes()


@pytest.mark.parametrize("spoil, message", [
    (["--config", "nowhere.json"], "nowhere.json: no such config"),
    (["--data", "nowhere"], "nowhere: no train.txt"),
    (["--tokenizer", "nowhere.model"], "nowhere.model: no such tokenizer"),
    (["--tokenizer", "README.md"], "README.md: not a sentencepiece model"),
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


def test_a_checkpoint_of_another_run_is_refused_with_what_differs(small, tmp_path, capsys):
    out = tmp_path / "model"
    process = start_until(small, out, 1)
    process.kill()
    process.communicate()
    config = json.loads((small / "config.json").read_text())
    config["train"]["peak_lr"] = 0.02
    (tmp_path / "other.json").write_text(json.dumps(config))
    assert train.main([*command(small, out, "--resume")[2:], "--config", str(tmp_path / "other.json")]) == 2
    assert "started otherwise: train.peak_lr was 0.01, is 0.02\n" in capsys.readouterr().err
    torch.save({"step": 1}, out / "checkpoint.pt")
    assert train.main(command(small, out, "--resume")[2:]) == 2
    assert "checkpoint.pt: not a checkpoint of a run" in capsys.readouterr().err


def test_a_finished_model_is_not_overwritten_but_trained_further(finished, small, tmp_path, capsys):
    assert train.main(command(small, finished[0])[2:]) == 2
    assert "finished model" in capsys.readouterr().err
    further = train.main(["--config", str(finished[0]), "--data", str(small), "--out", str(tmp_path / "model"), "--device",
                          "cpu", "--max-steps", "20", "--eval-every", "1"])
    log = without_times(tmp_path / "model" / "log.jsonl")
    assert further == 0 and log[0]["val_loss"] < without_times(finished[0] / "log.jsonl")[0]["val_loss"]


def test_against_the_clock_the_schedule_comes_to_its_end(small, tmp_path):
    assert train.main(command(small, tmp_path / "model", "--max-minutes", 0.002)[2:]) == 0
    log = without_times(tmp_path / "model" / "log.jsonl")
    assert log[-1]["step"] < 45 and log[-1]["lr"] == pytest.approx(0.1 * 0.01)


def test_micro_batches_end_where_whole_batches_do(finished, small, tmp_path):
    assert train.main(command(small, tmp_path / "model", "--micro-batch-size", 3)[2:]) == 0
    for a, b in zip(without_times(finished[0] / "log.jsonl"), without_times(tmp_path / "model" / "log.jsonl"), strict=True):
        assert a["val_loss"] == pytest.approx(b["val_loss"], abs=1e-3)


def test_out_of_memory_is_one_line(small, tmp_path, monkeypatch, capsys):
    def full(*args):
        raise torch.OutOfMemoryError
    monkeypatch.setattr(train, "train_step", full)
    assert train.main(command(small, tmp_path / "model")[2:]) == 1
    assert capsys.readouterr().err.endswith(
        "error: out of memory on cpu: --resume with --micro-batch-size below 8; the result stays the same\n")


def test_tensorboard_is_asked_for_by_name(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert train.main(command(small, tmp_path / "model", "--tensorboard")[2:]) == 2
    assert capsys.readouterr().err == "error: --tensorboard: not installed; pip install tensorboard\n"


@pytest.mark.parametrize("flag, value", [("--max-steps", 0), ("--max-minutes", -1), ("--eval-every", 0), ("--micro-batch-size", 0)])
def test_flags_out_of_range_are_one_line(small, tmp_path, flag, value, capsys):
    assert train.main([*command(small, tmp_path / "model", flag, value)[2:]]) == 2
    assert capsys.readouterr().err == f"error: {flag} must be above 0, not {float(value) if 'minutes' in flag else value}\n"


# ---------------------------------------------------------------- several processes


def two_processes(small: Path, out: Path, *more) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return [sys.executable, *torchrun, *command(small, out, *more)[1:]]


@pytest.fixture(scope="module")
def by_two(small, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("by_two") / "model"
    done = subprocess.run(two_processes(small, out), cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("validation loss") == 1                  # one process alone speaks and writes
    return out


def test_two_processes_end_where_one_does(finished, by_two):
    one, two = without_times(finished[0] / "log.jsonl"), without_times(by_two / "log.jsonl")
    assert json.loads((by_two / "run.json").read_text())["n_processes"] == 2
    for a, b in zip(one, two, strict=True):
        assert a["step"] == b["step"] and a["n_tokens"] == b["n_tokens"]
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-3) and a["val_loss"] == pytest.approx(b["val_loss"], abs=1e-3)


def test_two_processes_stop_together_and_go_on(small, by_two, tmp_path, capsys):
    out = tmp_path / "model"
    process = subprocess.Popen(two_processes(small, out, "--checkpoint-every", 0), cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    while not (out / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    process.terminate()
    _, stderr = process.communicate(timeout=120)
    assert process.returncode and "--resume goes on" in stderr and not (out / "model.safetensors").exists()
    assert train.main(command(small, out, "--resume")[2:]) == 2
    assert "processes was 2, is 1" in capsys.readouterr().err
    done = subprocess.run(two_processes(small, out, "--resume"), cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert (out / "model.safetensors").read_bytes() == (by_two / "model.safetensors").read_bytes()
    assert without_times(out / "log.jsonl") == without_times(by_two / "log.jsonl")


def test_one_batch_overfits(small):
    config = Config.load(small / "config.json")
    model = GPT(config.model)
    recipe.initialise(model, config.train, ids.numpy().ravel())
    ids = torch.randint(4, 512, (4, 33), generator=torch.Generator().manual_seed(0))
    loss, optimizers = recipe.NextTokenLoss(model, torch.float32), recipe.make_optimizers(model, config.train)
    nats = [recipe.train_step(loss, optimizers, ids[:, :-1], ids[:, 1:], 3e-3)[0].item() for _ in range(150)]
    assert nats[0] / 128 == pytest.approx(np.log(512), abs=0.3) and nats[-1] / 128 < 0.5
