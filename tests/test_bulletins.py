"""Bulletins as text: what parse makes of broken answers, and what falls to which rule."""
import random
import re

import pytest

import bulletins
from bulletins import Bulletin, broken_rule, parse

STORY = ("A storm broke two bridges in a small river town before dawn. Crews will need three weeks to build new ones. "
         "Until then, a free ferry takes people to work and children to school.")
GOOD = Bulletin("Storm breaks two bridges in a river town", STORY)


def html_of(bulletin: Bulletin) -> str:
    return f"<h1>{bulletin.headline}</h1><p>{bulletin.story}</p>"


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
    ("<h1>A<h2><p>a.<h1>B<h1/>\n<p>b.", [("A", "a."), ("B", "b.")]),
    ("<h1>A</h1></h1><p>a.</p><h1><h1>B</h1></h1></p><p>b.</p>", [("A", "a."), ("B", "b.")]),
    ("<h1>A</h1<p>a.</p><h1>B</hi><p>b.</p>", [("A", "a."), ("B", "b.")]),
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
    ("<h1>A</h1><p>a.\n\nb.\n\nc.</p>", [("A", "a. b. c.")]),
    ("<h1>A</h1>a.<p>b.</p><h1>B</h1>\nb.<p>\n", [("A", "a. b."), ("B", "b.")]),
    ("<h1>A</h1><p>a.<br/>b.<br>c.</p>", [("A", "a. b. c.")]),
    # notes, and tags about type
    ("Sure! Here they are:\n\n<h1>A</h1><p>a.</p>", [("A", "a.")]),
    ("<h1>A</h1><p>a.</p>\n\nNote: every story has five sentences.", [("A", "a.")]),
    ("<h1>A</h1><p>a.\n\nNote: every story has five sentences.", [("A", "a.")]),
    ("<h1>A</h1>a.</p> Note: no names.", [("A", "a.")]),
    ("```html\n<html><body><h1>A</h1><p>a.</p></body></html>\n```", [("A", "a.")]),
    ("<h1><b>A</b></h1><p>The <b>big</b> a. <em>b</em>.</p>", [("A", "The big a. b.")]),
    ("<h1>A <u>b</u></h1><p>The <span class='x'>big</span> <mark>a</mark>.</p>", [("A b", "The big a.")]),
    ("<h1>A</h1><p>a.\n\nNote: every story has five sentences. Seed words: x, y.</p>", [("A", "a.")]),
    ("<h1>A</h1><p>a.</p><p>Seed word: goat.</p>", [("A", "a.")]),
    ("<h1>A</h1><p>He left a note: a.</p>", [("A", "He left a note: a.")]),
    # what a model puts around its HTML
    ("1. <h1>A</h1><p>a.\n2. <h1>B</h1><p>b.\n3. ", [("A", "a."), ("B", "b.")]),
    ("```html\n<h1>A</h1>\n<p>a.\n```\n```\n<h1>B</h1>\n<p>b.\n```", [("A", "a."), ("B", "b.")]),
    ("<h1>A</h1><p>a.<|eot_id|>", [("A", "a.")]),
    ("- <h1>A</h1>\n- <p>a.\n---\n<li><h1>B</h1><p>b.<!-- end --><hr>", [("A", "a."), ("B", "b.")]),
    ("<h1>1. A</h1><p>a.</p><h1>2) **\"B\"**</h1><p>b.</p>", [("A", "a."), ("B", "b.")]),
    ("<h1>A:</h1><p>A: b.</p><h1>\"B\" or \"C\"</h1><p>b.</p>", [("A", "b."), ('"B" or "C"', "b.")]),
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
    ("<h1>Tom&#39;s &amp; Ann&rsquo;s</h1><p>It&nbsp;rose &quot;fast&quot;.</p>",
     [("Tom's & Ann's", 'It rose "fast".')]),
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
    pieces = ["<h1>", "</h1>", "<p>", "</p>", "</1>", "<H1", "<", ">", "/", "h1", "p", "\n", "\n\n", " " * 40, "a.",
              "Storm hits", "&lt;", "&#x110000;", "&#0;", "\x00", "\ud800", "é", "“", "<b>", "</b>", "<br/>", "...",
              "</h>", "\r\n", "\u2028"]
    for _ in range(2000):
        text = "".join(rng.choices(pieces, k=rng.randrange(40)))
        for bulletin in parse(text):
            assert bulletin.headline or bulletin.story
            if broken_rule(bulletin) is None:
                assert bulletins.bulletin_of(bulletins.line_of(bulletin)) == tuple(part.lower() for part in bulletin)
    for text in ("<h1>" + " " * 20_000 + "x", "<h1>A</h1><p>" + "\n" * 20_000, "<h1>" * 5000,
                 "<h1>A</h1>" + "< " * 2000):
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
def test_each_rule(rule, headline, story):
    assert broken_rule(Bulletin(headline, story)) == rule


def test_every_rule_has_a_case():
    cases = {case[0] for case in test_each_rule.pytestmark[0].args[1]}
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


@pytest.mark.parametrize("score, rule", [
    (bulletins.MIN_SCORE - 0.01, "low_score"), (bulletins.MIN_SCORE, None), (-1, None), (None, None)])
def test_low_score(score, rule):
    answer = {"key": "0/0", "text": html_of(GOOD), "score": score}
    assert [v.rule for v in bulletins.judge_answer(answer)] == [rule]
    del answer["score"]
    assert [v.rule for v in bulletins.judge_answer(answer)] == [None]


def test_the_last_bulletin_of_a_cut_answer_is_unfinished_even_after_a_full_stop():
    other = Bulletin("Storm shuts a school in a river town", STORY)
    answer = {"key": "0/0", "text": html_of(GOOD) + f"<h1>{other.headline}</h1><p>{STORY}", "finish_reason": "length"}
    assert [v.rule for v in bulletins.judge_answer(answer)] == [None, "unfinished"]
    answer["finish_reason"] = "stop"
    assert [v.rule for v in bulletins.judge_answer(answer)] == [None, None]


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


@pytest.mark.parametrize("line", ["no separator", "two </h> of </h> them", "a </h> b</h>c", "a</h>b",
                                  "</h> only a story"])
def test_lines_that_are_no_bulletins(line):
    with pytest.raises(ValueError, match="</h>"):
        bulletins.bulletin_of(line)
