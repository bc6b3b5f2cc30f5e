"""Shared by the tests: a small corpus with its tokenizer, and the commands run as a user runs them."""
import json
import os
import subprocess
import sys
from pathlib import Path

# The models of the tests are tiny: a second thread would only wait. Inherited by every process that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

import chat
from bulletins import line_of, parse
from chat_server import KEY
from tokenizer import train_tokenizer

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def lines() -> list[str]:
    """The few-shot examples as lines of a corpus."""
    examples = json.loads((ROOT / "few_shot_examples.json").read_text(encoding="utf-8"))
    return [line_of(parse(text)[0]) for text in examples.values()]


@pytest.fixture(scope="session")
def small(tmp_path_factory, lines) -> Path:
    """A folder with train.txt, validation.txt, tokenizer.model (512 pieces) and config.json of a tiny model."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "train.txt").write_text("\n".join(lines[:120]) + "\n", encoding="utf-8")
    (folder / "validation.txt").write_text("\n".join(lines[-24:]) + "\n", encoding="utf-8")
    train_tokenizer(folder / "train.txt", 512, folder / "tokenizer")
    config = {"model": {"vocab_size": 512, "context_length": 256, "d_embedding": 32, "d_intermediate": 64, "n_heads": 2,
                        "n_layers": 2, "qkv_bias": False},
              "train": {"peak_lr": 0.01, "warmup_ratio": 0.1, "n_epochs": 3, "batch_size": 8, "weight_decay": 0.1}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def run_cli():
    """Run a command of the repository in a process of its own: run_cli("train.py", "--config", ...)."""
    def run(*args, **options) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, *map(str, args)], cwd=ROOT, capture_output=True, text=True, timeout=120,
                              **options)
    return run


@pytest.fixture
def quick(monkeypatch):
    """Work in the repository's root with a key of our own, and hardly wait before asking a server again."""
    monkeypatch.setattr(chat, "FIRST_BACKOFF_S", 0.005)
    monkeypatch.setattr(chat, "MAX_BACKOFF_S", 0.05)
    monkeypatch.delenv("CHAT_API_KEY", raising=False)
    monkeypatch.setenv("OPENROUTER_API_KEY", KEY)
    monkeypatch.chdir(ROOT)
