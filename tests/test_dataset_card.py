"""The card's figures: right on a corpus counted by hand, put between the marks and nowhere else."""
import json
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent.parent / "dev"))

import dataset_card
from bulletins import Bulletin, bulletin_of
from cleaning import write_corpus
from test_bulletins import html_of


def write_everything(folder: Path, lines: list[str]) -> list[str]:
    """Write raw answers, the corpus cleaned from them, a vocabulary and a card to fill; return the options."""
    (folder / "raw").mkdir(parents=True)
    (folder / "vocabulary.json").write_text('[["storm", "storms"], ["xylophone"]]')
    with (folder / "raw" / "a.jsonl").open("w") as file:
        for i, bulletin in enumerate([*map(bulletin_of, lines), Bulletin("Too short", "")]):
            text = html_of(Bulletin("Storm " + bulletin.headline[:60] if i < 50 else bulletin.headline, bulletin.story))
            file.write(json.dumps({"key": f"0/{i}", "seed_words": ["storm"], "text": text, "created": 86400 * (i % 2),
                                   "model": "a teacher" if i < 50 else "Its/Heir 2"}) + "\n")
    write_corpus(folder / "raw", folder / "corpus", n_jobs=1)
    (folder / "corpus" / "README.md").write_text("Above.\n<!-- figures -->\nold\n<!-- end of figures -->\nBelow.\n")
    return ["--data", str(folder / "corpus"), "--raw", str(folder / "raw"),
            "--vocabulary", str(folder / "vocabulary.json")]


def test_figures_are_put_between_the_marks(tmp_path, lines, small):
    options = [*write_everything(tmp_path, lines[:200]), "--tokenizer", str(small / "tokenizer.model")]
    assert dataset_card.main(options) == 0
    card = (tmp_path / "corpus" / "README.md").read_text()
    assert card.startswith("Above.\n<!-- figures -->\n") and card.endswith("<!-- end of figures -->\nBelow.\n")
    assert "old" not in card.split("\n")
    report = json.loads((tmp_path / "corpus" / "report.json").read_text())
    n = report["train"] + report["validation"]
    assert (f"Written by Its/Heir 2 ({n - 50} bulletins), a teacher (50 bulletins); on 1970-01-01 to 1970-01-02. "
            in card)
    assert f"{n} of the {n} bulletins are in the raw answers at hand." in card
    rows = dict(map(str.strip, line.split("|")[1:3]) for line in card.splitlines() if line.count("|") == 3)
    assert rows["written"] == "201 (100.00%)" and rows["fell to `no_story`"] == "1 (0.50%)"
    assert rows["seed words that occur in the corpus, in any form"] == "50.0% of 2"
    held = sum("storm" in line.split(" </h> ")[0].replace("'", " ").split() for line in
               (tmp_path / "corpus" / "train.txt").read_text().splitlines()
               + (tmp_path / "corpus" / "validation.txt").read_text().splitlines())
    assert held >= 50 and rows["headlines that hold their seed word"] == f"{held / n:.1%} of {n}"
    assert card.count("\n> **") == 20
    assert dataset_card.main(options) == 0 and (tmp_path / "corpus" / "README.md").read_text() == card


def test_held_out_bulletins_are_sorted_by_teacher(tmp_path, lines, capsys):
    assert dataset_card.main([*write_everything(tmp_path, lines[:200]), "--by-teacher", str(tmp_path / "out")]) == 0
    files = {path.name: path.read_text().splitlines() for path in (tmp_path / "out").iterdir()}
    assert set(files) == {"a-teacher.txt", "its-heir-2.txt"}
    assert all(line.startswith("storm ") for line in files["a-teacher.txt"])
    held_out = (tmp_path / "corpus" / "validation.txt").read_text().splitlines()
    assert sorted(sum(files.values(), [])) == sorted(held_out)
    assert f"its-heir-2.txt: {len(files['its-heir-2.txt'])} held-out bulletins by Its/Heir 2" in capsys.readouterr().out


def test_proper_nouns_are_what_is_mostly_written_with_a_capital():
    texts = ["A man met Anna in Paris. Paris was cold.", "Paris is old. The king said that Anna left on Monday.",
             "An old king met the King. I saw a king in May."]
    assert dataset_card.proper_nouns(texts) == [["Anna", "Paris", "Paris"], ["Paris", "Anna"], []]


def test_what_the_command_says_of_bad_input(tmp_path, lines, small, capsys):
    options = [*write_everything(tmp_path, lines[:60]), "--tokenizer", str(small / "tokenizer.model")]
    (tmp_path / "corpus" / "README.md").write_text("No marks.")
    assert dataset_card.main(options) == 2
    assert "README.md: expected one line <!-- figures -->" in capsys.readouterr().err
    (tmp_path / "raw" / "a.jsonl").write_text("")
    assert dataset_card.main(options) == 2
    assert "--raw must be the folder that it was cleaned from" in capsys.readouterr().err
    assert dataset_card.main(["--spot-check", "3", *write_everything(tmp_path / "b", lines[:60])]) == 0


def test_proper_nouns_are_those_of_at_least_two_stories(tmp_path):
    stories = ["The boat sailed to Elba and back. Nobody saw Rome.", "On Monday the people of Elba built a boat.",
               "It was the king of Elba, they said, or of Rome.", "All rome and all Rome, and the rome of old."]
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.jsonl").write_text("".join(json.dumps(
        {"key": f"0/{i}", "seed_words": [], "text": html_of(Bulletin("Boats sail", story))}) + "\n"
        for i, story in enumerate(stories)))
    out = tmp_path / "nouns.json"
    assert dataset_card.main(["--raw", str(tmp_path / "raw"), "--proper-nouns", str(out)]) == 0
    assert json.loads(out.read_text()) == ["elba", "rome"]
    (tmp_path / "raw" / "a.jsonl").write_text((tmp_path / "raw" / "a.jsonl").read_text().replace("or of Rome", "rome"))
    assert dataset_card.main(["--raw", str(tmp_path / "raw"), "--proper-nouns", str(out)]) == 0
    assert json.loads(out.read_text()) == ["elba"]
