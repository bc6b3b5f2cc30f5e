"""Bulletins on the terminal."""
import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sample
from config import Config
from model import GPT
from tokenizer import load_tokenizer, prompt_of

ROOT = Path(__file__).parent.parent
HEADLINES = ["Storm breaks two bridges", "Bakers raise the price of bread by $2"]


@pytest.fixture(scope="session")
def model(small, tmp_path_factory) -> Path:
    """The folder of a tiny model with random weights and a short context."""
    folder = tmp_path_factory.mktemp("model")
    shutil.copy(small / "tokenizer.model", folder)
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(Config.load(small).model, context_length=80))
    with torch.no_grad():
        model.out_head.weight *= 10            # sure of itself, as a trained model is: rounding must not decide a token
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def write(model, capsys):
    """Run sample.py in this process and return (exit code, standard output, standard error)."""
    def run(*args):
        code = sample.main(["--model", str(model), *map(str, args)])
        return code, *capsys.readouterr()
    return run


def bulletins_of(result) -> list[dict]:
    code, out, err = result
    assert code == 0, err
    return [json.loads(line) for line in out.splitlines()]


def test_json_gives_one_bulletin_a_line(write):
    bulletins = bulletins_of(write("--json", "--seed", 1, "--headline", *HEADLINES, "-n", 2))
    assert [b["headline"] for b in bulletins] == [headline.lower() for headline in HEADLINES for _ in range(2)]
    for bulletin in bulletins:
        assert set(bulletin) == {"headline", "story", "finished"}
        assert bulletin["story"] and type(bulletin["finished"]) is bool
    assert bulletins[0]["story"] != bulletins[1]["story"]


def test_plain_output_is_for_reading(write):
    options = ("--seed", 1, "--headline", *HEADLINES)
    bulletins, (code, out, _) = bulletins_of(write("--json", *options)), write(*options)
    blocks = [block.split("\n", 1) for block in out.rstrip("\n").split("\n\n")]
    assert code == 0 and [headline for headline, _ in blocks] == [headline.lower() for headline in HEADLINES]
    for (_, story), bulletin in zip(blocks, bulletins):
        assert all(line.startswith("  ") and len(line) <= 88 for line in story.splitlines())
        text = bulletin["story"] + ("" if bulletin["finished"] else " [cut at the end of the context]")
        assert "".join(story.split()) == "".join(text.split())


@pytest.mark.parametrize("options, n", [
    ([], 3), (["-n", 5], 5), (["--headline", *HEADLINES], 2), (["--headline", *HEADLINES, "-n", 3], 6)])
def test_how_many(write, options, n):
    assert len(bulletins_of(write("--json", "--seed", 0, *options))) == n


def test_headlines_from_standard_input(write, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{HEADLINES[0]}\n\n  {HEADLINES[1]}  \n"))
    given = bulletins_of(write("--json", "--seed", 4, "--headline", "-"))
    assert given == bulletins_of(write("--json", "--seed", 4, "--headline", *HEADLINES))


def test_standard_input_that_is_none_or_no_text(write, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    assert write("--headline", "-") == (2, "", "error: --headline -: expected headlines in utf-8 (invalid continuation "
                                        "byte)\n")
    monkeypatch.setattr(sys, "stdin", None)
    code, _, err = write("--headline", "-")
    assert code == 2 and "there was none" in err


def test_the_flag_may_be_repeated_and_standard_input_stand_among_its_texts(write, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{HEADLINES[1]}\n"))
    given = bulletins_of(write("--json", "--seed", 4, "--headline", HEADLINES[0], "--headline", "-", "Rain"))
    assert [b["headline"] for b in given] == [text.lower() for text in (*HEADLINES, "Rain")]
    assert write("--headline", "-") == (2, "", "error: --headline -: expected headlines on standard input, one a line; "
                                               "there was none\n")


def test_two_seeds_share_no_bulletin(write):
    options = ("--json", "--headline", HEADLINES[0], "-n", 6, "--temperature", 0.9)
    first, second = ({b["story"] for b in bulletins_of(write(*options, "--seed", seed))} for seed in (1, 2))
    assert len(first) == len(second) == 6 and not first & second


def test_bfloat16_by_hand(write):
    options = ("--json", "--headline", HEADLINES[0], "--temperature", 0)
    exact, rounded = (bulletins_of(write(*options, "--dtype", dtype)) for dtype in ("float32", "bfloat16"))
    assert exact[0]["headline"] == rounded[0]["headline"] and rounded[0]["story"]


def test_a_seed_writes_the_same_whatever_the_batch(write, monkeypatch):
    options = ("--json", "--headline", *HEADLINES, "-n", 4, "--temperature", 0.9, "--top-p", 0.9)
    first = bulletins_of(write(*options, "--seed", 5))
    assert bulletins_of(write(*options, "--seed", 5)) == first != bulletins_of(write(*options, "--seed", 99))
    assert len({b["story"] for b in first}) == 8
    assert bulletins_of(write(*options)) != bulletins_of(write(*options))          # without one, new ones each time
    monkeypatch.setattr(sample, "BATCH_SIZE", 3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)                       # so, three processes
    assert bulletins_of(write(*options, "--seed", 5)) == first


def start_sample(model: Path, n: int, n_threads: int) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "sample.py", "--model", str(model), "-n", str(n), "--seed", "1", "--json"],
                            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": str(n_threads)})


@pytest.mark.parametrize("headline", ["crowding on city hall is taken care of by crowning",
                                      "village injects new blood for children with blood disease"])
def test_a_longer_headline_changes_no_bulletin_of_another(write, headline):
    """Found by trying: were each prompt padded to the longest of its batch, a rounded logit would decide a token."""
    longer = "in informal language, a hotel owner has to pay for a room that he did not build"
    options = ["--model", ROOT / "results" / "3M", "--json", "--dtype", "float32", "--seed", 1, "-n", 5, "--headline"]
    alone = bulletins_of(write(*options, headline))
    assert bulletins_of(write(*options, headline, longer))[:5] == alone


@pytest.mark.parametrize("n_missing", [0, 1])
def test_a_bulletin_that_just_fits_the_context_is_finished(write, tmp_path, n_missing):
    folder = tmp_path / "short"
    model, tokenizer = GPT.from_pretrained(ROOT / "results" / "3M"), ROOT / "results" / "3M" / "tokenizer.model"
    prompt = prompt_of(load_tokenizer(tokenizer), "storm closes schools along the coast", 128)
    n_tokens = len(model.generate([prompt], 128, no_repeat=6)[0]) - n_missing
    short = GPT(dataclasses.replace(model.config, context_length=n_tokens))
    short.load_state_dict({**model.state_dict(), "pos_emb.weight": model.pos_emb.weight[:n_tokens]})
    short.save_pretrained(folder)
    shutil.copy(tokenizer, folder)
    [bulletin] = bulletins_of(write("--model", folder, "--json", "--temperature", 0, "--dtype", "float32",
                                    "--headline", "storm closes schools along the coast"))
    assert bulletin["finished"] is (n_missing == 0) and len(bulletin["story"]) > 100


def test_many_threads_write_what_one_does(model):
    processes = [start_sample(model, 130, n_threads) for n_threads in (1, 4)]      # 130: more than a batch
    (one, _), (four, _) = (process.communicate(timeout=100) for process in processes)
    assert one == four and one.count("\n") == 130


def test_ctrl_c_ends_the_processes_that_write(model):
    process = start_sample(model, 100_000, 2)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)             # the pipe closes once no process holds it any more
    assert (process.returncode, err) == (130, "stopped\n")


def test_another_model_in_the_same_folder_is_seen(model, tmp_path, write):
    folder, options = tmp_path / "m", ("--json", "--temperature", 0, "--headline", HEADLINES[0])
    shutil.copytree(model, folder)
    first = bulletins_of(write(*options, "--model", folder))
    other = GPT.from_pretrained(folder)
    with torch.no_grad():
        other.out_head.weight.neg_()
    other.save_pretrained(folder)
    assert bulletins_of(write(*options, "--model", folder)) != first


def test_temperature_0_takes_the_likeliest_and_so_does_top_k_1(write):
    options = ("--json", "--headline", *HEADLINES)
    greedy = bulletins_of(write(*options, "--temperature", 0))
    assert greedy == bulletins_of(write(*options, "--temperature", 0, "--seed", 9))
    assert greedy == bulletins_of(write(*options, "--top-k", 1))


@pytest.mark.parametrize("options, message", [
    (["--model", "nowhere/at/all"], "nowhere/at/all: no such model folder"),
    (["--headline", "Café opens"], "does not know é"),
    (["--headline", "storm " * 100], "storm storm...': 203 tokens leave no room for a story"),
    (["--headline", ""], "expected a line of text"),
    (["-n", "0"], "-n must be at least 1, not 0"),
    (["--temperature", "-1"], "temperature must be 0 or from 0.001 up"),
    (["--temperature", "nan"], "temperature must be 0"), (["--top-k", "0"], "top_k must be at least 1"),
    (["--top-p", "0"], "top_p must be above 0"), (["--min-p", "2"], "min_p must be from 0 to 1"),
    (["--no-repeat", "1"], "no_repeat must be at least 2"), (["--seed", "-1"], "--seed must not be negative")])
def test_bad_input_is_one_line_and_exit_code_2(write, options, message):
    code, out, err = write(*options)
    assert (code, out) == (2, "") and message in err and len(err.splitlines()) == 1


def test_a_model_folder_without_its_tokenizer(model, tmp_path, capsys):
    shutil.copytree(model, tmp_path / "m")
    (tmp_path / "m" / "tokenizer.model").unlink()
    assert sample.main(["--model", str(tmp_path / "m")]) == 2
    assert "tokenizer.model: no such tokenizer" in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_error(model):
    process = subprocess.Popen([sys.executable, "sample.py", "--model", str(model), "-n", "2", "--json"], cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()                     # as `| head` does, before the first line
    assert process.stderr.read() == "" and process.wait(60) == 0
