"""dev/sweep.py: variants, runs that are kept, runs that are refused."""
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "dev"))
import sweep  # noqa: E402


def arguments(small: Path, out: Path, *more) -> list[str]:
    return ["--config", str(small / "config.json"), "--data", str(small), "--tokenizer", str(small / "tokenizer.model"),
            "--max-steps", "4", "--eval-every", "2", "--out", str(out), *more]


def test_a_sweep_trains_what_is_missing_and_nothing_twice(small, tmp_path, capsys, monkeypatch):
    out, vary = tmp_path / "sweeps" / "lr.json", ["--vary", "train.peak_lr", "1e-5", "1e-2"]
    assert sweep.main(arguments(small, out, *vary)) == 0
    table = capsys.readouterr().out.splitlines()
    losses = {line.split()[1]: float(line.split()[2]) for line in table[1:]}
    assert losses["peak_lr=1e-2"] < losses["peak_lr=1e-5"] and out.with_suffix(".png").exists()
    before = json.loads(out.read_text())
    assert list(before) == ["config peak_lr=1e-5 seed 0", "config peak_lr=1e-2 seed 0"]
    asked = []
    kept = before[next(iter(before))]
    monkeypatch.setattr(sweep, "train_one", lambda config, args: asked.append(config["train"]) or kept)
    assert sweep.main(arguments(small, out, *vary, "--seeds", "2")) == 0
    assert [(train["peak_lr"], train["seed"]) for train in asked] == [(1e-5, 1), (1e-2, 1)]
    assert sweep.main([*arguments(small, out, *vary), "--max-steps", "5"]) == 2
    assert "holds 'config peak_lr=1e-5 seed 0' with other settings" in capsys.readouterr().err


def test_a_variant_that_diverges_does_not_stop_the_others(small, tmp_path, capsys):
    out, vary = tmp_path / "lr.json", ["--vary", "train.peak_lr", "1e30", "1e-3"]
    assert sweep.main(arguments(small, out, *vary)) == 2
    captured = capsys.readouterr()
    assert "training has diverged" in captured.err and "these runs failed" in captured.err.splitlines()[-1]
    assert captured.out.split()[-6].startswith("peak_lr=1e-3")
    assert list(json.loads(out.read_text())) == ["config peak_lr=1e-3 seed 0"]


def test_a_config_that_does_not_say_how_to_train_is_one_line(small, tmp_path, capsys):
    config = json.loads((small / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model": config["model"]}))
    assert sweep.main(arguments(small, tmp_path / "out.json", "--config", str(tmp_path / "config.json"))) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'config.json'}: missing key train\n"


def test_runs_on_another_corpus_stay_apart(small, tmp_path, capsys):
    out, vary = tmp_path / "lr.json", ["--vary", "train.peak_lr", "1e-3"]
    assert sweep.main(arguments(small, out, *vary)) == 0
    runs = json.loads(out.read_text())
    runs["config peak_lr=1e-3 seed 0"]["train_sha256"] = "of another text"
    out.write_text(json.dumps(runs))
    assert sweep.main(arguments(small, out, *vary, "--seeds", "2")) == 2
    assert "other settings, corpus or tokenizer" in capsys.readouterr().err and json.loads(out.read_text()) == runs


@pytest.mark.parametrize("name, content, message", [
    ("a.png", None, "expected a name that ends in .json"), ("a.json", "[]", "not the runs of a sweep"),
    ("a.json", '{"config seed 0": {}}', "not the runs of a sweep"), ("a.json", "{", "a.json: not JSON")])
def test_a_file_of_something_else_is_left_alone(small, tmp_path, name, content, message, capsys):
    out = tmp_path / name
    if content is not None:
        out.write_text(content)
    assert sweep.main(arguments(small, out)) == 2
    assert message in capsys.readouterr().err and (out.read_text() if out.exists() else None) == content


@pytest.mark.parametrize("vary, message", [
    (["train.peak", "1"], "unknown key train.peak"),
    (["train.schedule", "zigzag"], "train.schedule must be cosine or linear or wsd"),
    (["train.peak_lr"], "expected values after the key"),
    (["train.seed", "1"], "seeds are --seeds"),
    (["schedule", "wsd"], "unknown key schedule"),
    (["train.peak_lr", "1e-3", "1e-3"], "a value is given twice"),
])
def test_bad_variants_are_one_line(small, tmp_path, vary, message, capsys):
    assert sweep.main(arguments(small, tmp_path / "out.json", "--vary", *vary)) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out.json").exists()
