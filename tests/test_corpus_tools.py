"""What maintainers run on a corpus: enlarging it by machine, and tokenizers across spaces."""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "dev"))

import benchmark
import enlarge
import superwords
from bulletins import bulletin_of
from cleaning import write_corpus
from config import Config


def test_an_enlarged_corpus_is_mostly_accepted_and_holds_what_the_cleaning_looks_for(lines, tmp_path):
    corpus = list(map(bulletin_of, lines))
    answers = list(enlarge.enlarge(corpus, 1505))
    assert answers == list(enlarge.enlarge(corpus, 1505)) and len(answers) == 151
    assert answers != list(enlarge.enlarge(corpus, 1505, seed=1))
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    report = write_corpus(tmp_path / "raw", tmp_path / "out", n_jobs=1)
    assert report["bulletins"] == 1505 and 1150 < report["train"] + report["validation"] < 1350
    assert 5 < report["rejected"]["repeated"] < 60 and 40 < report["rejected"]["near_duplicate"] < 110
    assert 100 < report["rejected"]["unfinished"] < 200


def test_superwords_makes_two_folders_to_train_from(small, tmp_path, capsys):
    options = ["--data", str(small), "--config", str(small / "config.json"), "--out", str(tmp_path)]
    assert superwords.main(options) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    words, crossing = (next(row for row in table if row[1:2] == [name]) for name in ("words", "superwords"))
    assert float(crossing[2]) < float(words[2]) and words[5] == "0" and int(crossing[5]) > 10
    for name in ("words", "superwords"):
        assert Config.load(tmp_path / name).model.vocab_size == 512
        assert (tmp_path / name / "tokenizer.vocab").exists()
        assert ["python", "train.py", "--config", str(tmp_path / name / "config.json")] in [row[:4] for row in table]
    assert (tmp_path / "words" / "tokenizer.model").read_bytes() == (small / "tokenizer.model").read_bytes()


def test_a_benchmark_of_more_tokens_than_the_context_is_one_line(small, capsys):
    assert benchmark.main(["sample", "--config", str(small / "config.json"), "--new-tokens", "241"]) == 2
    assert capsys.readouterr().err == ("error: --new-tokens 241: with the 16 of a prompt, more than the context of "
                                       "256\n")


def test_a_benchmark_of_more_steps_than_the_corpus_fills_is_one_line(small, capsys, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    assert benchmark.main(["train", "--config", "configs/3M.json", "--data", str(small)]) == 2
    assert capsys.readouterr().err == "error: --steps 16: take 128 bulletins, but the corpus has 120\n"
