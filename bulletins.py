"""Turn raw answers into a clean corpus: parse, check, deduplicate, split.

Reads:   a folder of raw answers (*.jsonl, *.jsonl.xz, see answers.py).
Writes:  train.txt and validation.txt (one bulletin a line: lower case, "headline </h> story"), report.json (how many
         bulletins fell to which rule) and rejected.jsonl (each of them: rule, key, headline) in --out.
         With --shards: validation.txt.xz and train-000.txt.xz, train-001.txt.xz ..., never rewritten (see corpus.py).
Run:     python bulletins.py --raw training_data/raw-offline --out training_data/clean       # 23 s on 2 CPU cores
"""
import argparse
import hashlib
import html
import json
import os
import re
import sys
import unicodedata
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import cli

SEPARATOR = "</h>"
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789 .,;:'\"!?%$&-"       # all that a line of the corpus may be spelt with
MIN_SCORE = -6.2              # lowest mean log-probability per token, in nats, where the answer carries a score
STOP_WORDS = frozenset("""
    all and any are but can did few for had has her him his how its may new not now off one our out own saw say says she
    six ten the too two was way who why yet you
    about after again against also among been before being between both could down during each even every from have
    into just last less like made make many more most much near next once only other over said same since some such
    than that their them then there these they this those three through time under until very were what when where
    which while will with without would year years your""".split())


class Bulletin(NamedTuple):
    headline: str
    story: str


class Verdict(NamedTuple):
    """What became of one bulletin: `rule` is the rule that it broke, None if it stands."""
    bulletin: Bulletin
    rule: str | None
    key: str


# ---------------------------------------------------------------- parsing: lenient

# What a model puts around its HTML: comments, tokens of its own such as <|eot_id|>, a code fence, the mark of a list.
NOISE = re.compile(r"<!--[^<>]*-->|<\|[^<>|]*\|>|```\w* ?(?=\n|\Z)|\n ?(?:\d{1,2}[.)]|[-*>]+) ?(?=[<\n]|\Z)")
OPENING = re.compile(r"<\s*h\s*[1-6]\b[^<>]*>", re.IGNORECASE)
UNOPENED = re.compile(r"(\A|<\s*/\s*p\s*>)\s*([^<>\n]+<\s*/\s*h?\s*[1-6]\s*>)", re.IGNORECASE)
UNSLASHED = re.compile(r"(<\s*h\s*[1-6]\s*>[^<>]+)<\s*h\s*[1-6]\s*/?\s*>(?=\s*<\s*p\b)", re.IGNORECASE)
HEADLINE = re.compile(r"""
    \s* (?P<headline> .*? ) \s*
    (?: <\s*/\s*h\s*[1-6] (?= \s*< )                    # ends at a closing tag that lacks its >,
      | <\s*/?\s* (?: h\s*[1-6il]? | [1-6] )? \s*/?\s*>
      | (?= <\s*p\b )
      | \n )
    (?P<rest> .* )""", re.IGNORECASE | re.DOTALL | re.VERBOSE)
TYPE_TAGS = "b|i|em|strong|u|a|s|span|mark|small|font"                 # these set type within a line
STORY = re.compile(rf"""
    (?: <\s*/ [^<>]*> \s* )*                            # closing tags too many
    (?: (?: (?! <\s*/ ) [^.!?] )*? <\s*p\b[^<>]*> )?    # what comes before the first <p>, if that is no sentence
    (?P<story> .*? )
    (?: <\s*/\s*p\b[^<>]*(?:>|\Z) (?! \s*<\s*p\b )      # ends at a </p> that no <p> follows,
      | <\s*/ (?! \s*(?:p|{TYPE_TAGS})\b )              # at any other closing tag that does not set type,
      | \n\n (?! \s*<\s*p\b | [^<>]+<\s*/\s*p\b )       # at an empty line with no more of the story after it
      | \Z )""", re.IGNORECASE | re.DOTALL | re.VERBOSE)
NOTE = re.compile(r"(?:Note|Seed word)s?:.*")
TYPE_TAG = re.compile(rf"</?\s*(?:{TYPE_TAGS})\b[^<>]*>", re.IGNORECASE)
STRAY_TAG = re.compile(r"</?\s*(?:h\s*[1-6]|1|p|br|hr|li|html|body|div)\b[^<>]*>", re.IGNORECASE)
ASCII_PUNCTUATION = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2032": "'",
                                   "\u2010": "-", "\u2011": "-", "\u2012": "-", "\u2013": "-", "\u2014": " - "})


def parse(text: str) -> list[Bulletin]:
    """Return the bulletins of an answer, in their order, however badly its tags are closed.

    An answer should be a row of `<h1>headline</h1><p>story</p>`. In the wild it has unclosed tags, `</1>`, several
    paragraphs, tags in capitals, no `<p>`, notes before the first and after the last bulletin, or begins inside a
    headline. A story ends where something else begins, so that it takes in no note and no other story.
    A headline without a story is kept, so that the rules can count it.

    >>> parse("Sure! <h1>Cat found</1> <p>It sat. It purred.</p> Note: two sentences.")
    [Bulletin(headline='Cat found', story='It sat. It purred.')]
    """
    text = re.sub(r" ?\n ?", "\n", re.sub(r"[^\S\n]+", " ", text))
    text = re.sub(r"\n{2,}", "\n\n", NOISE.sub("\n", text))     # no long runs of space: the patterns take linear time
    text = UNSLASHED.sub(r"\1</h1>", UNOPENED.sub(r"\1<h1>\2", text))
    bulletins = []
    for part in OPENING.split(text)[1:]:
        match = HEADLINE.match(part)
        headline, rest = (match["headline"], match["rest"]) if match else (part, "")
        headline, story = undressed(tidy(headline)), tidy(STORY.match(rest.strip())["story"])
        bulletins.append(Bulletin(headline, NOTE.sub("", story).removeprefix(f"{headline}: ").rstrip()))
    return [bulletin for bulletin in bulletins if any(bulletin)]


def tidy(text: str) -> str:
    """Return text without stray tags and runs of space, its entities and typographic punctuation made plain."""
    text = html.unescape(STRAY_TAG.sub(" ", TYPE_TAG.sub("", text))).translate(ASCII_PUNCTUATION)
    return " ".join(unicodedata.normalize("NFKC", text).split())


def undressed(headline: str) -> str:
    """Return a headline without what may stand around it: a number, asterisks, a colon, quotation marks.

    >>> undressed('1. **"Cat found":**')
    'Cat found'
    """
    headline = re.sub(r"^\d{1,2}[.)] |\*\*|:$", "", headline)
    return re.sub(r'^"([^"]*)":?$', r"\1", headline)


# ---------------------------------------------------------------- rules: strict

FORBIDDEN = re.compile(r"[()\[\]{}<>/@#^]|\.\.\.")
OUTSIDE_ALPHABET = re.compile(f"[^A-Z{re.escape(ALPHABET)}]")
ENDING = re.compile(r"[.!?][\"']?$")
DOUBLED = re.compile(r"\b(?!had\b|that\b)(\w+) \1\b|\b(?!more\b|again\b)(\w{4,}) and \2\b")


def stems(text: str) -> set[str]:
    """Return the content words of a text, cut to five letters so that inflections of a word meet."""
    return {word[:5] for word in re.findall(r"[a-z]{3,}", text.lower()) if word not in STOP_WORDS}


def words_of(text: str) -> list[str]:
    """Return the words of a text, in lower case: what similarity, novelty and repetition are counted in."""
    return re.findall(r"[\w']+", text.lower())


def repeats_itself(story: str) -> bool:
    """Tell whether a story doubles a word ("beautiful and beautiful") or says six words in a row twice."""
    words = words_of(story)
    runs = [tuple(words[i:i + 6]) for i in range(len(words) - 5)]
    return len(set(runs)) < len(runs) or DOUBLED.search(story.lower()) is not None


# Each rule's name, and whether a bulletin breaks it. The first rule broken is the one that is counted.
RULES = {
    "no_story": lambda b: not b.story,
    "headline_length": lambda b: not 16 <= len(b.headline) <= 80,
    "story_length": lambda b: len(b.story) < 150,
    "few_sentences": lambda b: b.story.count(".") < 2,
    "forbidden_symbols": lambda b: FORBIDDEN.search(b.headline + b.story) is not None,
    "outside_alphabet": lambda b: OUTSIDE_ALPHABET.search(b.headline + b.story) is not None,
    "says_headline": lambda b: "headline" in b.headline.lower(),
    "unfinished": lambda b: ENDING.search(b.story) is None,
    "off_topic": lambda b: stems(b.headline).isdisjoint(stems(b.story)),
    "repeats_itself": lambda b: repeats_itself(b.story),
}


def broken_rule(bulletin: Bulletin) -> str | None:
    """Return the name of the first rule that a bulletin breaks, taken by itself, or None."""
    return next((name for name, breaks in RULES.items() if breaks(bulletin)), None)


def judge_answer(answer: dict) -> list[Verdict]:
    """Parse one raw answer and return the verdict on each of its bulletins, repeats not considered."""
    verdicts, found = [], parse(answer["text"])
    for i, bulletin in enumerate(found):
        rule = broken_rule(bulletin)
        if rule is None and answer.get("finish_reason") == "length" and i == len(found) - 1:
            rule = "unfinished"                # though it was cut after a full stop
        if rule is None and (answer.get("score") or 0.0) < MIN_SCORE:
            rule = "low_score"
        verdicts.append(Verdict(bulletin, rule, answer["key"]))
    return verdicts


class Acceptance:
    """Counts the bulletins of answers as they come: how many stand, and how many fell to which rule.

    `accepted` is what --bulletins of the generating programs counts. Exact repeats (same headline or same story) fall;
    near-duplicates are only looked for when the corpus is cleaned.
    """

    def __init__(self):
        self.accepted = 0
        self.rejected: Counter[str] = Counter()
        self._seen: set[bytes] = set()

    def add(self, answer: dict) -> list[Verdict]:
        """Judge one answer, count its bulletins and return their verdicts."""
        verdicts = [self.unless_repeated(verdict) for verdict in judge_answer(answer)]
        for verdict in verdicts:
            if verdict.rule is None:
                self.accepted += 1
            else:
                self.rejected[verdict.rule] += 1
        return verdicts

    def unless_repeated(self, verdict: Verdict) -> Verdict:
        """Return the verdict, turned into "repeated" if its headline or story is known; remember both if not."""
        if verdict.rule is not None:
            return verdict
        if not self._seen.isdisjoint(digests_of(verdict.bulletin)):
            return verdict._replace(rule="repeated")
        self.remember(verdict.bulletin)
        return verdict

    def remember(self, bulletin: Bulletin) -> None:
        self._seen.update(digests_of(bulletin))


def digests_of(bulletin: Bulletin) -> tuple[bytes, ...]:
    """Return 12 bytes for the headline and 12 for the story, the same for upper and lower case."""
    return tuple(hashlib.blake2b(text.lower().encode(errors="surrogatepass"), digest_size=12).digest()
                 for text in bulletin)


# ---------------------------------------------------------------- corpus


def line_of(bulletin: Bulletin) -> str:
    """Return the line of the corpus for a bulletin: "headline </h> story", lower case."""
    return f"{bulletin.headline} {SEPARATOR} {bulletin.story}".lower()


def bulletin_of(line: str) -> Bulletin:
    """Return the bulletin of a corpus line; raise ValueError if it holds no separator or more than one."""
    parts = line.strip().split(f" {SEPARATOR} ")
    if len(parts) != 2 or line.count(SEPARATOR) != 1:
        raise ValueError(f"expected one \" {SEPARATOR} \" between headline and story")
    return Bulletin(*parts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path, default=Path("training_data/raw"), help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("training_data/clean"), help="default: %(default)s")
    parser.add_argument("--shards", type=int, metavar="N", help="also compress the corpus into shards of N bulletins")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: all cores, %(default)s)")
    args = parser.parse_args(argv)

    def command() -> None:
        if args.jobs < 1:
            raise ValueError(f"--jobs must be at least 1, not {args.jobs}")
        if args.shards is not None and args.shards < 1:
            raise ValueError(f"--shards must be at least 1, not {args.shards}")
        from cleaning import publish, write_corpus        # here, as cleaning builds on this module
        report = write_corpus(args.raw, args.out, args.jobs)
        print(json.dumps({name: n for name, n in report.items() if name not in ("fingerprint", "published")}, indent=1))
        for path in publish(args.out, args.shards) if args.shards else []:
            print(f"{path}: {path.stat().st_size:,} bytes", file=sys.stderr)

    return cli.run(command)


if __name__ == "__main__":
    sys.exit(main())
