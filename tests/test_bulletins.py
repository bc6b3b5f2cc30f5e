"""Bulletins as text: what parse makes of broken answers, what falls to which rule, and the corpus that is written."""
import json
import random
import re

import pytest

import bulletins
from bulletins import Bulletin, broken_rule, parse

STORY = ("A storm broke two bridges in a small river town before dawn. Crews will need three weeks to build new ones. "
         "Until then, a free ferry takes people to work and children to school.")
GOOD = Bulletin("Storm breaks two bridges in a river town", STORY)


# ---------------------------------------------------------------- parsing


@pytest.mark.parametrize("text, expected", [
    ("<h1>Cat found</h1><p>It sat. It purred.</p>", [("Cat found", "It sat. It purred.")]),
    ("<h1>A</h1><p>a.</p><h1>B</h1><p>b.</p>", [("A", "a."), ("B", "b.")]),
    # tags that are not closed, or not as they were opened
    ("<h1>A</h1><p>a.\n<h1>B</h1><p>b.", [("A", "a."), ("B", "b.")]),
    ("<h1>A <p>a.</p>", [("A", "a.")]),
    ("<h1>A\n<p>a.</p>", [("A", "a.")]),
    ("<h1>A</1><p>a.</p>", [("A", "a.")]),
    ("<h1>A</h><p>a.</1>", [("A", "a.")]),
    ("<h1>A</><p>a.</>", [("A", "a.")]),
    ("<h1>A</ h1 ><p>a.</ p >", [("A", "a.")]),
    ("<h1>A<h1><p>a.<p>", [("A", "a.")]),
    ("<h1>A</h1><p>a.</h1>", [("A", "a.")]),
    ("<h2>A</h2><p>a.</p>", [("A", "a.")]),
    ("<H1>A</H1><P>a.</P>", [("A", "a.")]),
    ('<h1 class="x">A</h1><p id="1">a.</p>', [("A", "a.")]),
    ("<h1>\nA\n</h1>\n\n<p>\na.\nb.\n</p>\n", [("A", "a. b.")]),
    # stories without a <p>, or with several
    ("<h1>A</h1>a. b.</p>", [("A", "a. b.")]),
    ("<h1>A\na. b.\n\n<h1>B\nb.", [("A", "a. b."), ("B", "b.")]),
    ("<h1>A</h1>\n\na.\nb.\n\nI hope this helps!", [("A", "a. b.")]),
    ("<h1>A</h1><p>a.</p><p>b.</p>", [("A", "a. b.")]),
    ("<h1>A</h1>\n<p>a.</p>\n\n<p>b.\n\n<p>c.", [("A", "a. b. c.")]),
    ("<h1>A</h1><p>a.\n\nb.</p>", [("A", "a. b.")]),
    ("<h1>A</h1><p>a.<br/>b.<br>c.</p>", [("A", "a. b. c.")]),
    # notes, and tags about type
    ("Sure! Here they are:\n\n<h1>A</h1><p>a.</p>", [("A", "a.")]),
    ("<h1>A</h1><p>a.</p>\n\nNote: every story has five sentences.", [("A", "a.")]),
    ("<h1>A</h1><p>a.\n\nNote: every story has five sentences.", [("A", "a.")]),
    ("<h1>A</h1>a.</p> Note: no names.", [("A", "a.")]),
    ("```html\n<html><body><h1>A</h1><p>a.</p></body></html>\n```", [("A", "a.")]),
    ("<h1><b>A</b></h1><p>The <b>big</b> a. <em>b</em>.</p>", [("A", "The big a. b .")]),
    # an opening tag is missing: no story is taken into the one before
    ("<h1>A</h1><p>a.</p>\nB</h1><p>b.</p>", [("A", "a."), ("B", "b.")]),
    ("<h1>A</h1><p>a.</p>\n**B**\n<p>b.</p><h1>C</h1><p>c.</p>", [("A", "a."), ("C", "c.")]),
    # the request was prefilled with an open tag
    ("Cat found</h1><p>a.</p>\n<h1>B</h1><p>b.</p>", [("Cat found", "a."), ("B", "b.")]),
    ("\n Cat found</1>\n<p>a.</p>", [("Cat found", "a.")]),
    ("<h1><H1>A</H1><p>a.</p>", [("A", "a.")]),
    # cut in the middle; a headline without a story is kept, to be counted
    ("<h1>A</h1><p>a. b", [("A", "a. b")]),
    ("<h1>A</h1><p>a. b.</p", [("A", "a. b.")]),
    ("<h1>A</h1><p>a. b.</", [("A", "a. b.")]),
    ("<h1>A</h1><p>a.</p><h1>Big sto", [("A", "a."), ("Big sto", "")]),
    ("<h1>A</h1><h1>B</h1><p>b.</p>", [("A", ""), ("B", "b.")]),
    ("<h1>A</h1><p>a.</p><h1>", [("A", "a.")]),
    ("<h1>A</h1><p>a.</p><h", [("A", "a.")]),
    # entities, typographic punctuation, spaces
    ("<h1>Tom&#39;s &amp; Ann&rsquo;s</h1><p>It&nbsp;rose &quot;fast&quot;.</p>", [("Tom's & Ann's", 'It rose "fast".')]),
    ("<h1>“A” ‘b’ it’s</h1><p>5–6 a—b\u2011c\u2026 \ufb01n</p>", [("\"A\" 'b' it's", "5-6 a - b-c... fin")]),
    ("<h1> A \t b </h1><p> a.\u3000\xa0 b. </p>", [("A b", "a. b.")]),
    # nothing to find
    ("", []), ("I cannot help with that.", []), ("<p>a.</p>", []), ("<h1>", []), ("<h1", []), ("**A**\na.", []),
])
def test_parse(text, expected):
    assert parse(text) == expected


def test_a_headline_over_two_lines_is_never_cut_and_accepted():
    assert all(broken_rule(b) for b in parse(f"<h1>Storm breaks two bridges\nand a dam</h1><p>{STORY}</p>"))


def test_parse_never_raises_and_never_stalls():
    rng = random.Random(0)
    pieces = ["<h1>", "</h1>", "<p>", "</p>", "</1>", "<H1", "<", ">", "/", "h1", "p", "\n", "\n\n", " " * 40, "a.", "Storm hits",
              "&lt;", "&#x110000;", "&#0;", "\x00", "\ud800", "é", "“", "<b>", "</b>", "<br/>", "...", "</h>", "\r\n", "\u2028"]
    for _ in range(2000):
        text = "".join(rng.choices(pieces, k=rng.randrange(40)))
        for bulletin in parse(text):
            assert bulletin.headline or bulletin.story
            if broken_rule(bulletin) is None:
                assert bulletins.bulletin_of(bulletins.line_of(bulletin)) == tuple(part.lower() for part in bulletin)
    for text in ("<h1>" + " " * 20_000 + "x", "<h1>A</h1><p>" + "\n" * 20_000, "<h1>" * 5000, "<h1>A</h1>" + "< " * 2000):
        parse(text)


# ---------------------------------------------------------------- rules


@pytest.mark.parametrize("rule, headline, story", [
    ("no_story", GOOD.headline, ""),
    ("headline_length", "Storm in a town", STORY),                        # 15 characters
    ("headline_length", "Storm " + "x" * 75, STORY),                      # 81
    ("story_length", GOOD.headline, "A storm broke a bridge. " + "x" * 124 + "."),
    ("few_sentences", GOOD.headline, STORY[:-1].replace(".", ",") + "."),
    ("forbidden_symbols", GOOD.headline, STORY + " It was cold (very cold)."),
    ("forbidden_symbols", GOOD.headline, STORY + " Write to town@river."),
    ("forbidden_symbols", GOOD.headline + " #1", STORY),
    ("forbidden_symbols", GOOD.headline, STORY + " And then..."),
    ("outside_alphabet", GOOD.headline, STORY + " A café is shut."),
    ("outside_alphabet", GOOD.headline, STORY + " *Stay at home.*"),
    ("says_headline", "Headline: Storm breaks two bridges", STORY),
    ("unfinished", GOOD.headline, STORY + " The mayor said that the"),
    ("off_topic", "Farmers pick an early crop of apples", STORY),
    ("repeats_itself", GOOD.headline, STORY + " It was wet and and cold."),
    ("repeats_itself", GOOD.headline, STORY + " It was beautiful and beautiful."),
    ("repeats_itself", GOOD.headline, STORY + " Crews will need three weeks to rest."),
])
def test_each_rule_and_only_it(rule, headline, story):
    bulletin = Bulletin(headline, story)
    assert broken_rule(bulletin) == rule
    assert [name for name, breaks in bulletins.RULES.items() if breaks(bulletin)][0] == rule


def test_every_rule_has_a_case():
    cases = {case[0] for case in test_each_rule_and_only_it.pytestmark[0].args[1]}
    assert cases == set(bulletins.RULES)


@pytest.mark.parametrize("headline, story", [
    GOOD,
    ("Storm in a town.", STORY),                                          # 16 characters
    ("Storm " + "x" * 74, STORY),                                         # 80
    (GOOD.headline, STORY + ' "We had had enough," a cook said, "and that that was wrong hurt more and more."'),
    (GOOD.headline, "A storm cost a town $2.5 million; " + "x" * 116),     # 150; a full stop in a number counts as one
    (GOOD.headline, STORY + " Will it hold?"),
    ("Storms, 20% off: \"bridge\" sale & more", STORY),
])
def test_what_just_passes(headline, story):
    story = story if re.search(r"[.!?\"]$", story) else story[:-1] + "."
    assert len(story) >= 150 and broken_rule(Bulletin(headline, story)) is None


@pytest.mark.parametrize("score, rule", [(bulletins.MIN_SCORE - 0.01, "low_score"), (bulletins.MIN_SCORE, None), (-1, None),
                                         (None, None)])
def test_low_score(score, rule):
    answer = {"key": "0/0", "text": html_of(GOOD), "score": score}
    assert [v.rule for v in bulletins.judge_answer(answer)] == [rule]
    del answer["score"]
    assert [v.rule for v in bulletins.judge_answer(answer)] == [None]


def test_repeated_headlines_and_stories_count_once():
    acceptance = bulletins.Acceptance()
    same_headline = Bulletin(GOOD.headline.upper(), "It rained. " + STORY)
    same_story = Bulletin("Two bridges fall in a heavy storm", STORY)
    for bulletin in (GOOD, GOOD, same_headline, same_story, Bulletin("Short", STORY)):
        acceptance.add({"key": "0/0", "text": html_of(bulletin)})
    assert acceptance.accepted == 1
    assert acceptance.rejected == {"repeated": 3, "headline_length": 1}


def test_a_bulletin_that_fell_does_not_make_its_like_a_repeat():
    acceptance = bulletins.Acceptance()
    acceptance.add({"key": "0/0", "text": html_of(GOOD), "score": -9})
    acceptance.add({"key": "0/1", "text": html_of(GOOD)})
    assert acceptance.accepted == 1


# ---------------------------------------------------------------- corpus


def html_of(bulletin: Bulletin) -> str:
    return f"<h1>{bulletin.headline}</h1><p>{bulletin.story}</p>"


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
def corpus(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_raw(folder / "raw", texts)
    bulletins.write_corpus(folder / "raw", folder / "one", n_jobs=1)
    return folder


def read(path) -> list[str]:
    return path.read_text().splitlines()


def test_the_report_adds_up_and_the_fallen_can_be_found(corpus, texts):
    report = json.loads((corpus / "one" / "report.json").read_text())
    assert report["answers"] == len(texts) == 400
    assert report["bulletins"] == report["train"] + report["validation"] + sum(report["rejected"].values())
    assert report["bulletins"] == sum(len(parse(text)) for text in texts)
    train, validation = read(corpus / "one" / "train.txt"), read(corpus / "one" / "validation.txt")
    assert (len(train), len(validation)) == (report["train"], report["validation"])
    assert report["rejected"] == {"near_duplicate": 40, "repeated": 1, "no_story": 1} and report["train"] > 600
    fallen = [json.loads(line) for line in read(corpus / "one" / "rejected.jsonl")]
    assert len(fallen) == 42
    assert {"rule": "no_story", "key": "0/341", "headline": "A short one"} in fallen
    repeat = next(entry for entry in fallen if entry["rule"] == "repeated")
    assert repeat["key"] == "0/340" and repeat["headline"] in texts[0]


def test_lines_of_the_corpus(corpus):
    for line in read(corpus / "one" / "train.txt"):
        assert line == line.lower() and line.isascii() and line.count(" </h> ") == line.count("</h>") == 1
        assert bulletins.line_of(bulletins.bulletin_of(line)) == line


@pytest.mark.parametrize("line", ["no separator", "two </h> of </h> them", "a </h> b</h>c", "a</h>b", "</h> only a story"])
def test_lines_that_are_no_bulletins(line):
    with pytest.raises(ValueError, match="</h>"):
        bulletins.bulletin_of(line)


def trigrams(line: str) -> set:
    words = re.findall(r"[\w']+", line.replace("</h>", ""))
    return {tuple(words[i:i + 3]) for i in range(len(words) - 2)}


def test_no_near_twin_across_the_split(corpus):
    train, validation = ([trigrams(line) for line in read(corpus / "one" / f"{split}.txt")] for split in ("train", "validation"))
    assert 15 < len(validation) < 60
    assert max(len(a & b) / len(a | b) for a in validation for b in train) < bulletins.TWIN_SIMILARITY


def test_near_duplicates_are_found_by_how_much_they_share(lines):
    rng = random.Random(1)
    words = [line.replace(" </h> ", " ").split() for line in lines[:100]]
    finder, found = bulletins.TwinFinder(), {1: 0, 30: 0}
    for row in words:
        assert not finder.is_twin(finder.sketch(Bulletin("", " ".join(row))))
    for n_changed in found:
        for row in words:
            changed = list(row)
            for i in rng.sample(range(len(row)), n_changed):
                changed[i] = f"other{i}"
            found[n_changed] += finder.is_twin(finder.sketch(Bulletin("", " ".join(changed))))
    assert found[1] >= 99 and found[30] <= 1


def test_processes_give_the_same_bytes(corpus):
    bulletins.write_corpus(corpus / "raw", corpus / "two", n_jobs=2)
    for name in ("train.txt", "validation.txt", "rejected.jsonl", "report.json"):
        assert (corpus / "two" / name).read_bytes() == (corpus / "one" / name).read_bytes()


def test_nothing_changed_nothing_done_and_a_grown_corpus_keeps_its_sides(tmp_path, texts):
    raw, out = tmp_path / "raw", tmp_path / "out"
    write_raw(raw, texts[:150])
    report = bulletins.write_corpus(raw, out, n_jobs=1)
    times = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    before = {split: read(out / f"{split}.txt") for split in ("train", "validation")}
    assert len(before["validation"]) > 5
    assert set(times) == {"train.txt", "validation.txt", "rejected.jsonl", "report.json"}
    assert bulletins.write_corpus(raw, out, n_jobs=1) == report
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == times
    write_raw(raw, texts[150:300], start=150)
    grown = bulletins.write_corpus(raw, out, n_jobs=1)
    assert grown["bulletins"] == 600 and grown["fingerprint"] != report["fingerprint"]
    for split, earlier in before.items():
        after = read(out / f"{split}.txt")
        assert after[:len(earlier)] == earlier and len(after) > len(earlier)
    (out / "train.txt").unlink()
    bulletins.write_corpus(raw, out, n_jobs=1)
    assert len(read(out / "train.txt")) == grown["train"]


def test_validation_stops_growing(tmp_path, texts, monkeypatch):
    monkeypatch.setattr(bulletins, "MAX_VALIDATION", 3)
    write_raw(tmp_path / "raw", texts[:150])
    report = bulletins.write_corpus(tmp_path / "raw", tmp_path / "out", n_jobs=1)
    assert report["validation"] == 3 and report["train"] == report["bulletins"] - 3


def test_shards_are_never_rewritten(tmp_path, texts, monkeypatch):
    raw, out = tmp_path / "raw", tmp_path / "out"
    write_raw(raw, texts[:100])
    bulletins.write_corpus(raw, out, n_jobs=1)
    first = bulletins.write_shards(out, 80)
    assert [path.name for path in first] == ["train-000.txt.xz", "train-001.txt.xz", "train-002.txt.xz", "validation.txt.xz"]
    published = {path: path.read_bytes() for path in first}
    assert bulletins.write_shards(out, 80) == []
    write_raw(raw, texts[100:150], start=100)
    bulletins.write_corpus(raw, out, n_jobs=1)
    assert [path.name for path in bulletins.write_shards(out, 80)] == ["train-003.txt.xz", "train-004.txt.xz"]
    assert {path: path.read_bytes() for path in first} == published
    train = read(out / "train.txt")
    (out / "train.txt").unlink()
    assert [line.rstrip("\n") for path in bulletins.corpus_files(out, "train") for line in bulletins.open_text(path)] == train
    monkeypatch.setitem(bulletins.RULES, "headline_length", lambda b: len(b.headline) > 40)
    bulletins.write_corpus(raw, out, n_jobs=1)
    with pytest.raises(ValueError, match="train-000.txt.xz.*never rewritten"):
        bulletins.write_shards(out, 80)
    assert {path: path.read_bytes() for path in first} == published


# ---------------------------------------------------------------- the command


def test_the_command_passes_over_a_torn_last_line(tmp_path, texts, run_cli):
    write_raw(tmp_path / "raw", texts[:20])
    with (tmp_path / "raw" / "a.jsonl").open("a") as file:
        file.write('{"key": "0/20", "seed_words": ["x"], "te')
    done = run_cli("bulletins.py", "--raw", tmp_path / "raw", "--out", tmp_path / "out", "--shards", 30, "--jobs", 1)
    assert done.returncode == 0 and json.loads(done.stdout)["answers"] == 20
    assert "train-001.txt.xz" in done.stderr and (tmp_path / "out" / "train-001.txt.xz").exists()


@pytest.mark.parametrize("line, message", [
    ('{"key": "0/20", "seed_', "not JSON"), ("[1]", "expected an object"), ('{"key": "0/1", "text": "a"}', "seed_words"),
    ('{"key": "0/1", "seed_words": [], "text": null}', "text a string"), ("\xff", "not JSON")])
@pytest.mark.parametrize("n_jobs", [1, 2])
def test_a_broken_line_is_named(tmp_path, texts, line, message, n_jobs):
    write_raw(tmp_path / "raw", texts[:3])
    with (tmp_path / "raw" / "a.jsonl").open("ab") as file:
        file.write(line.encode("latin-1") + b"\n")
    write_raw(tmp_path / "raw", texts[3:6], start=3)
    with pytest.raises(ValueError, match=rf"a\.jsonl:4: .*{message}"):
        bulletins.write_corpus(tmp_path / "raw", tmp_path / "out", n_jobs)
    assert not (tmp_path / "out" / "train.txt").exists()


@pytest.mark.parametrize("options, message", [
    (["--jobs", 2], "a.jsonl:1: not JSON"), (["--raw", "nowhere"], "nowhere: no raw answers"), (["--jobs", 0], "--jobs"),
    (["--shards", -1], "--shards")])
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, run_cli, options, message):
    (tmp_path / "a.jsonl").write_text("broken\n{}\n")
    done = run_cli("bulletins.py", "--raw", tmp_path, "--out", tmp_path / "out", *options)
    assert done.returncode == 2 and done.stdout == ""
    assert message in done.stderr and len(done.stderr.splitlines()) == 1
