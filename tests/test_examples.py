"""The few-shot examples and the vocabulary: the corpus is only as good as they are."""
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from bulletins import broken_rule, parse

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "few_shot_examples.json").read_text(encoding="utf-8")
EXAMPLES = json.loads(TEXT)
BULLETINS = {word: parse(example)[0] for word, example in EXAMPLES.items()}
VOCABULARY = json.loads((ROOT / "vocabulary.json").read_text(encoding="utf-8"))
SENTENCE_END = re.compile(r"(?<=[.!?])(?<![ap]\.m\.)\s+|(?<=[.!?][\"'])\s+(?=[^a-z])")


def sentences(story: str) -> list[str]:
    return SENTENCE_END.split(story)


def stray_capitals(bulletin) -> list[str]:
    """Return the words with a capital where no sentence, headline or quotation starts."""
    openings = [match.start(1) for match in re.finditer(r"(?:^|[.!?][\"']? |(?:^|[ ,:])\")([A-Z])", bulletin.story)]
    capitals = [match for match in re.finditer(r"[A-Z]", bulletin.story) if match.start() not in openings]
    words = [bulletin.story[match.start():].split()[0] for match in capitals]
    quoted = {match.start(1) for match in re.finditer(r"\"([A-Z])", bulletin.headline)}
    return words + [bulletin.headline[i:].split()[0] for i, letter in enumerate(bulletin.headline)
                    if i > 0 and letter.isupper() and i not in quoted]


def failing(breaks) -> dict:
    """Return {seed word: what is wrong with it} for the examples where breaks(seed word, bulletin) is true."""
    results = {word: breaks(word, bulletin) for word, bulletin in BULLETINS.items()}
    return {word: result for word, result in results.items() if result}


def test_there_are_enough_one_a_line_in_plain_ascii():
    assert len(EXAMPLES) >= 700
    assert TEXT.isascii() and TEXT.rstrip("\n") == json.dumps(EXAMPLES, indent=1)


def test_each_is_one_headline_and_one_story_in_tags():
    assert failing(lambda word, b: EXAMPLES[word] != f"<h1>{b.headline}</h1><p>{b.story}</p>") == {}


@pytest.mark.parametrize("claim, breaks", [
    ("headline of 16 to 80 characters", lambda word, b: not 16 <= len(b.headline) <= 80),
    ("headline does not end like a sentence", lambda word, b: b.headline[-1] in ".!"),
    ("headline begins with a capital, a figure or a quotation",
     lambda word, b: not re.match(r"[A-Z0-9\"$]", b.headline)),
    ("story of 50 to 110 words", lambda word, b: not 50 <= len(b.story.split()) <= 110),
    ("story of three to six sentences", lambda word, b: not 3 <= len(sentences(b.story)) <= 6),
    ("every sentence begins with a capital, a figure or a quotation",
     lambda word, b: [s for s in sentences(b.story) if not re.match(r"[A-Z0-9\"'$]", s)]),
    ("seed word whole in the headline",
     lambda word, b: not re.search(rf"(?<![\w'-]){re.escape(word)}(?![\w-])", b.headline.lower())),
    ("capitals only where a sentence, quotation or headline starts", lambda word, b: stray_capitals(b)),
    ("characters of the corpus", lambda word, b: re.findall(r"[^A-Za-z0-9 .,'\-%:\"!$?]", b.headline + b.story)),
    ("quotation marks in pairs", lambda word, b: (b.headline.count('"') % 2, b.story.count('"') % 2) != (0, 0)),
    ("no rule of the corpus broken", lambda word, b: broken_rule(b)),
], ids=lambda value: value.replace(" ", "_") if isinstance(value, str) else "")
def test_each_example(claim, breaks):
    assert failing(breaks) == {}


def test_the_checks_see_what_they_look_for():
    good = parse('<h1>A dog</h1><p>It ran. "Stop!" a man said. He said: "No." It cost $5. Then it sat.</p>')[0]
    assert stray_capitals(good) == [] and len(sentences(good.story)) == 5
    bad = parse("<h1>A Dog</h1><p>It ran to Paris, he said. The end.</p>")[0]
    assert stray_capitals(bad) == ["Paris,", "Dog"]


def test_seed_words_stand_in_the_vocabulary():
    forms = {form for forms in VOCABULARY for form in forms}
    assert sorted(set(EXAMPLES) - forms) == []


def test_no_two_share_eight_words_in_a_row():
    owner, shared = {}, {}
    for word, bulletin in BULLETINS.items():
        words = re.findall(r"[a-z0-9']+", f"{bulletin.headline} . {bulletin.story}".lower())
        for run in zip(*(words[i:] for i in range(8))):
            if owner.setdefault(run, word) != word:
                shared[owner[run], word] = " ".join(run)
    assert shared == {}


def test_no_stock_phrases_and_many_openings():
    stories = [bulletin.story.lower() for bulletin in BULLETINS.values()]
    for phrase in ("experts say", "the community", "officials say", "is excited", "in a statement", "it is important"):
        assert sum(phrase in story for story in stories) <= len(stories) // 100, phrase
    openings = Counter(" ".join(story.split()[:3]) for story in stories)
    assert openings.most_common(1)[0][1] <= len(stories) // 50, openings.most_common(5)


# ---------------------------------------------------------------- vocabulary


def test_the_vocabulary_is_large_and_cut_into_short_lists():
    assert 9_000 <= len(VOCABULARY) <= 11_000
    assert {len(forms) for forms in VOCABULARY} == {1, 2, 3}
    forms = [form for forms in VOCABULARY for form in forms]
    assert len(set(forms)) >= 18_000
    assert [form for form, n in Counter(forms).items() if n > 1] == []
    assert [form for form in forms if not re.fullmatch(r"[a-z]{3,}", form)] == []


def test_the_forms_of_a_list_belong_together():
    apart = [forms for forms in VOCABULARY if len({form[0] for form in forms}) > 1]
    assert len(apart) < 20, apart              # "go, went" and the like; a list cut wrongly would give thousands
