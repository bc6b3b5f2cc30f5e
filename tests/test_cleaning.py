"""Raw answers to a clean corpus: the report, twins, the split, what is published and stays, and the command."""
import json
import lzma
import random
import re

import pytest

import bulletins
import cleaning
import corpus
from bulletins import Bulletin, parse
from test_bulletins import html_of


def write_raw(folder, texts: list[str], start: int = 0, name: str = "a.jsonl") -> None:
    folder.mkdir(exist_ok=True)
    with (folder / name).open("a") as file:
        for i, text in enumerate(texts, start):
            file.write(json.dumps({"key": f"0/{i}", "seed_words": ["x"], "text": text}) + "\n")


@pytest.fixture(scope="session")
def texts(lines) -> list[str]:
    """400 answers: two good bulletins each for a while, some broken, some twins with one word changed."""
    good = [html_of(Bulletin(*line.split(" </h> "))) for line in lines]
    answers = [good[i] + good[i + 1] for i in range(0, 600, 2)]
    answers += [good[i].replace("<h1>", "<h1>new ", 1).replace("<p>", "<p>today, ", 1) for i in range(0, 40)]
    answers += [good[1], "<h1>A short one", f"Sure!{good[700]}\n\nNote: done.", "No."]
    return answers + [f"<h1>{line}" for line in good[601:657]]


@pytest.fixture(scope="session")
def cleaned(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_raw(folder / "raw", texts)
    cleaning.write_corpus(folder / "raw", folder / "one", n_jobs=1)
    return folder


def read(path) -> list[str]:
    return path.read_text().splitlines()


def test_the_report_adds_up_and_the_fallen_can_be_found(cleaned, texts):
    report = json.loads((cleaned / "one" / "report.json").read_text())
    assert report["answers"] == len(texts) == 400
    assert report["bulletins"] == report["train"] + report["validation"] + sum(report["rejected"].values())
    assert report["bulletins"] == sum(len(parse(text)) for text in texts)
    train, validation = read(cleaned / "one" / "train.txt"), read(cleaned / "one" / "validation.txt")
    assert (len(train), len(validation)) == (report["train"], report["validation"])
    assert report["rejected"] == {"near_duplicate": 40, "repeated": 1, "no_story": 1} and report["train"] > 600
    fallen = [json.loads(line) for line in read(cleaned / "one" / "rejected.jsonl")]
    assert len(fallen) == 42
    assert {"rule": "no_story", "key": "0/341", "headline": "A short one"} in fallen
    repeat = next(entry for entry in fallen if entry["rule"] == "repeated")
    assert repeat["key"] == "0/340" and repeat["headline"] in texts[0]


def test_lines_of_the_corpus(cleaned):
    for line in read(cleaned / "one" / "train.txt"):
        assert line == line.lower() and line.isascii() and line.count(" </h> ") == line.count("</h>") == 1
        assert bulletins.line_of(bulletins.bulletin_of(line)) == line


def trigrams(line: str) -> set:
    words = re.findall(r"[\w']+", line.replace("</h>", ""))
    return {tuple(words[i:i + 3]) for i in range(len(words) - 2)}


def test_no_near_twin_across_the_split(cleaned):
    train, validation = ([trigrams(line) for line in read(cleaned / "one" / f"{split}.txt")]
                         for split in ("train", "validation"))
    assert 15 < len(validation) < 60
    assert max(len(a & b) / len(a | b) for a in validation for b in train) < cleaning.TWIN_SIMILARITY


def test_near_duplicates_are_found_by_how_much_they_share(lines):
    rng = random.Random(1)
    words = [line.replace(" </h> ", " ").split() for line in lines[:100]]
    finder, found = cleaning.TwinFinder(), {1: 0, 30: 0}
    for row in words:
        sketch = finder.sketch(Bulletin("", " ".join(row)))
        assert not finder.is_twin(sketch)
        finder.add(sketch)
    for n_changed in found:
        for row in words:
            changed = list(row)
            for i in rng.sample(range(len(row)), n_changed):
                changed[i] = f"other{i}"
            found[n_changed] += finder.is_twin(finder.sketch(Bulletin("", " ".join(changed))))
    assert found[1] >= 99 and found[30] <= 1


def test_processes_give_the_same_bytes(cleaned):
    cleaning.write_corpus(cleaned / "raw", cleaned / "two", n_jobs=2)
    for name in ("train.txt", "validation.txt", "rejected.jsonl", "report.json"):
        assert (cleaned / "two" / name).read_bytes() == (cleaned / "one" / name).read_bytes()


def test_nothing_changed_nothing_done_and_a_grown_corpus_keeps_its_sides(tmp_path, texts):
    raw, out = tmp_path / "raw", tmp_path / "out"
    write_raw(raw, texts[:150])
    report = cleaning.write_corpus(raw, out, n_jobs=1)
    times = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    before = {split: read(out / f"{split}.txt") for split in ("train", "validation")}
    assert len(before["validation"]) > 5
    assert set(times) == {"train.txt", "validation.txt", "rejected.jsonl", "report.json"}
    assert cleaning.write_corpus(raw, out, n_jobs=1) == report
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == times
    write_raw(raw, texts[150:300], start=150)
    grown = cleaning.write_corpus(raw, out, n_jobs=1)
    assert grown["bulletins"] == 600 and grown["fingerprint"] != report["fingerprint"]
    for split, earlier in before.items():
        after = read(out / f"{split}.txt")
        assert after[:len(earlier)] == earlier and len(after) > len(earlier)
    (out / "train.txt").unlink()
    cleaning.write_corpus(raw, out, n_jobs=1)
    assert len(read(out / "train.txt")) == grown["train"]


def test_validation_stops_growing(tmp_path, texts, monkeypatch):
    monkeypatch.setattr(cleaning, "MAX_VALIDATION", 3)
    write_raw(tmp_path / "raw", texts[:150])
    report = cleaning.write_corpus(tmp_path / "raw", tmp_path / "out", n_jobs=1)
    assert report["validation"] == 3 and report["train"] == report["bulletins"] - 3


# ---------------------------------------------------------------- what is published


def publish(raw, out, shard_size: int) -> tuple[dict, list[str]]:
    """Clean and publish; return the report and the names of the new files, having seen that the older are untouched."""
    before = {path: path.read_bytes() for path in out.glob("*.xz")}
    report = cleaning.write_corpus(raw, out, n_jobs=1)
    new = [path.name for path in cleaning.publish(out, shard_size)]
    assert {path: path.read_bytes() for path in before} == before
    assert report["bulletins"] + report["only_published"] == \
        report["train"] + report["validation"] + sum(report["rejected"].values())
    return report, new


def test_what_is_published_stays_however_the_raw_answers_grow(tmp_path, texts):
    raw, out = tmp_path / "raw", tmp_path / "out"
    write_raw(raw, texts[:100], name="m.jsonl")
    report, new = publish(raw, out, 80)
    assert new == ["validation.txt.xz", "train-000.txt.xz", "train-001.txt.xz", "train-002.txt.xz"]
    held_out = read(out / "validation.txt")
    assert len(held_out) > 3 and report["train"] % 80     # the last shard is not full

    # more of the same file; a file that sorts before it; then both grow, and the first is compressed and put away
    write_raw(raw, texts[100:130], start=100, name="m.jsonl")
    assert publish(raw, out, 80)[1] == ["train-003.txt.xz"]
    write_raw(raw, texts[130:180], start=130, name="a.jsonl")
    assert publish(raw, out, 80)[1] == ["train-004.txt.xz", "train-005.txt.xz"]
    write_raw(raw, texts[180:200], start=180, name="a.jsonl")
    (raw / "z-000.jsonl.xz").write_bytes(lzma.compress((raw / "m.jsonl").read_bytes()))
    (raw / "m.jsonl").unlink()
    report, new = publish(raw, out, 80)
    assert new == ["train-006.txt.xz"]

    # nothing is lost, nothing is there twice, and what a hash would hold out now goes to train
    lines = {bulletins.line_of(bulletin) for text in texts[:200] for bulletin in parse(text)}
    train = read(out / "train.txt")
    assert report["rejected"] == {} and report["only_published"] == 0
    assert len(train) + len(held_out) == len(lines) == 400
    assert {*train, *held_out} == lines and read(out / "validation.txt") == held_out
    assert any(cleaning.belongs_to_validation(bulletins.bulletin_of(line).headline) for line in train)
    (out / "train.txt").unlink()
    assert list(corpus.lines_of(corpus.corpus_files(out, "train"))) == train


def test_later_twins_of_what_is_published_fall(tmp_path, texts, monkeypatch):
    raw, out = tmp_path / "raw", tmp_path / "out"
    write_raw(raw, texts[:60])
    publish(raw, out, 1000)
    published = [bulletins.bulletin_of(line)
                 for split in ("validation", "train") for line in read(out / f"{split}.txt")]
    (raw / "a.jsonl").unlink()                             # others' answers: the published ones are not among them
    twins = [html_of(Bulletin("new " + b.headline, "today, " + b.story)) for b in published[:20]]
    write_raw(raw, [*twins, html_of(published[0]), html_of(published[0]), texts[200]])
    report, new = publish(raw, out, 1000)
    assert report["rejected"] == {"near_duplicate": 20, "repeated": 1} and report["bulletins"] == 24
    assert report["only_published"] == len(published) - 1 and new == ["train-001.txt.xz"]
    # a stricter rule is for what comes; it takes nothing back
    monkeypatch.setitem(bulletins.RULES, "few_sentences", lambda b: True)
    (out / "report.json").unlink()
    report, new = publish(raw, out, 1000)
    assert report["rejected"] == {"few_sentences": 21} and new == []
    assert report["train"] + report["validation"] == len(published) + 2


def test_a_publication_that_was_cut_short_goes_on(tmp_path, texts):
    raw, out = tmp_path / "raw", tmp_path / "out"
    write_raw(raw, texts[:50])
    _, new = publish(raw, out, 30)
    whole = {name: (out / name).read_bytes() for name in new}
    for name in new[2:]:
        (out / name).unlink()
    report, again = publish(raw, out, 30)
    assert again == new[2:] and {name: (out / name).read_bytes() for name in new} == whole
    (out / "train.txt").write_text("another </h> text.\n")
    with pytest.raises(ValueError, match="train.txt: does not begin with what train-000.txt.xz"):
        cleaning.publish(out, 30)


def test_answers_that_come_while_a_corpus_is_published_are_not_forgotten(tmp_path, texts):
    raw, out = tmp_path / "raw", tmp_path / "out"
    write_raw(raw, texts[:50])
    cleaning.write_corpus(raw, out, n_jobs=1)
    write_raw(raw, texts[50:60], start=50)
    cleaning.publish(out, 30)
    assert cleaning.write_corpus(raw, out, n_jobs=1)["answers"] == 60


def test_a_published_line_that_is_no_bulletin_is_named(tmp_path, texts):
    raw, out = tmp_path / "raw", tmp_path / "out"
    write_raw(raw, texts[:50])
    publish(raw, out, 1000)
    (out / "train-001.txt.xz").write_bytes(lzma.compress(b"good </h> one.\nno separator\n"))
    with pytest.raises(ValueError, match=r"train-001.txt.xz: bulletin 2: expected one"):
        cleaning.write_corpus(raw, out, n_jobs=1)


def test_half_an_emoji_falls_to_a_rule_beside_a_published_corpus_too(tmp_path, texts):
    raw, out = tmp_path / "raw", tmp_path / "out"
    write_raw(raw, texts[:20])
    publish(raw, out, 1000)
    write_raw(raw, [texts[20].replace("<p>", "<p>\ud83d ", 1)], start=20)
    assert cleaning.write_corpus(raw, out, n_jobs=1)["rejected"] == {"outside_alphabet": 1}


# ---------------------------------------------------------------- the command


def test_the_command_passes_over_a_torn_last_line(tmp_path, texts, run_cli):
    write_raw(tmp_path / "raw", texts[:20])
    with (tmp_path / "raw" / "a.jsonl").open("a") as file:
        file.write('{"key": "0/20", "seed_words": ["x"], "te')
    done = run_cli("bulletins.py", "--raw", tmp_path / "raw", "--out", tmp_path / "out", "--shards", 30, "--jobs", 1)
    assert done.returncode == 0 and json.loads(done.stdout)["answers"] == 20
    assert "train-001.txt.xz" in done.stderr and (tmp_path / "out" / "train-001.txt.xz").exists()


@pytest.mark.parametrize("line, message", [
    ('{"key": "0/20", "seed_', "not JSON"), ("[" * 100_000, "not JSON"), ("[1]", "expected an object"),
    ('{"key": "0/1", "text": "a"}', "seed_words"), ("\xff", "not JSON"),
    ('{"key": "0/1", "seed_words": [], "text": null}', "text a string"),
    ('{"key": "0/1", "seed_words": [], "text": "a", "score": "high"}', "score must be a finite number"),
    ('{"key": "0/1", "seed_words": [], "text": "a", "score": NaN}', "score must be a finite number"),
    ('{"key": "0/1", "seed_words": [], "text": "a", "usage": [1]}', "usage must be an object"),
    ('{"key": "0/1", "seed_words": [], "text": "a", "usage": {"cost": "1"}}', "usage must be an object")])
@pytest.mark.parametrize("n_jobs", [1, 2])
def test_a_broken_line_is_named(tmp_path, texts, line, message, n_jobs):
    write_raw(tmp_path / "raw", texts[:3])
    with (tmp_path / "raw" / "a.jsonl").open("ab") as file:
        file.write(line.encode("latin-1") + b"\n")
    write_raw(tmp_path / "raw", texts[3:6], start=3)
    with pytest.raises(ValueError, match=rf"a\.jsonl:4: .*{message}"):
        cleaning.write_corpus(tmp_path / "raw", tmp_path / "out", n_jobs)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("options, message", [
    (["--jobs", 2], "a.jsonl:1: not JSON"), (["--raw", "nowhere"], "nowhere: no raw answers"),
    (["--jobs", 0], "--jobs"), (["--shards", -1], "--shards")])
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, run_cli, options, message):
    (tmp_path / "a.jsonl").write_text("broken\n{}\n")
    done = run_cli("bulletins.py", "--raw", tmp_path, "--out", tmp_path / "out", *options)
    assert done.returncode == 2 and done.stdout == ""
    assert message in done.stderr and len(done.stderr.splitlines()) == 1
