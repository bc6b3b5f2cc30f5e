"""Turn raw answers into a clean corpus: parse, check, deduplicate, split.

Reads:   a folder of raw answers (*.jsonl, see answers.py).
Writes:  train.txt and validation.txt (one bulletin a line: lower case, "headline </h> story"), report.json (how many
         bulletins fell to which rule) and rejected.jsonl (each of them: rule, key, headline) in --out.
         With --shards: train-000.txt.xz, train-001.txt.xz ... and validation.txt.xz; shards that exist are never rewritten.
Run:     python bulletins.py --raw training_data/raw --out training_data        # 14,000 answers: 9 s on 2 CPU cores
"""
import argparse
import hashlib
import html
import json
import lzma
import multiprocessing
import os
import re
import signal
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import answers
import cli

SEPARATOR = "</h>"
MIN_SCORE = -6.2              # lowest mean log-probability a token, in nats, where the answer carries a score
TWIN_SIMILARITY = 0.5         # Jaccard similarity of word 3-grams from which two bulletins are near-duplicates
VALIDATION_SHARE = 20         # one bulletin in so many goes to validation ...
MAX_VALIDATION = 1000         # ... until there are this many: enough to measure a loss to 0.01
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
    """What became of one bulletin: `rule` is the rule it broke, None if it stands."""
    bulletin: Bulletin
    rule: str | None
    key: str


# ---------------------------------------------------------------- parsing: lenient

OPENING = re.compile(r"<\s*h\s*[1-6]\b[^<>]*>", re.IGNORECASE)
UNOPENED = re.compile(r"(\A|<\s*/\s*p\s*>)\s*([^<>\n]+<\s*/\s*h?\s*[1-6]\s*>)", re.IGNORECASE)
UNSLASHED = re.compile(r"(<\s*h\s*1\s*>[^<>]+)<\s*h\s*1\s*>(?=\s*<\s*p\b)", re.IGNORECASE)
HEADLINE = re.compile(r"\s*(?P<headline>.*?)\s*(?:<\s*/?\s*h?\s*[1-6]?\s*>|(?=<\s*p\b)|\n)(?P<rest>.*)", re.IGNORECASE | re.DOTALL)
STORY = re.compile(r"""
    (?: (?: (?! <\s*/ ) . )*? <\s*p\b[^<>]*> )?         # what stands before the first <p>, where there is one
    (?P<story> .*? )
    (?: <\s*/\s*p\b[^<>]*(?:>|\Z) (?! \s*<\s*p\b )      # ends at a </p> that no <p> follows,
      | <\s*/ (?! \s*(?:p|b|i|em|strong)\b )            # at any other closing tag that is not about type,
      | \n\n (?! \s*<\s*p\b | [^<>\n]+<\s*/\s*p\b )     # at an empty line with no more of the story after it
      | \Z )""", re.IGNORECASE | re.DOTALL | re.VERBOSE)
STRAY_TAG = re.compile(r"</?\s*(?:h\s*[1-6]|1|p|b|i|em|strong|br|html|body|div)\b\s*/?>", re.IGNORECASE)
ASCII_PUNCTUATION = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2032": "'",
                                   "\u2010": "-", "\u2011": "-", "\u2012": "-", "\u2013": "-", "\u2014": " - "})


def parse(text: str) -> list[Bulletin]:
    """Return the bulletins of an answer, as they stand in it, however badly its tags are closed.

    An answer is a row of `<h1>headline</h1><p>story</p>`; what is seen of it in the wild: unclosed tags, `</1>`,
    several paragraphs, tags in capitals, no `<p>`, notes before the first and after the last bulletin, a start inside
    a headline. A story ends where something else begins, so that no note and no other story is taken into it.
    A headline without a story is kept, so that the rules can count it.

    >>> parse("Sure! <h1>Cat found</1> <p>It sat. It purred.</p> Note: two sentences.")
    [Bulletin(headline='Cat found', story='It sat. It purred.')]
    """
    text = re.sub(r"\n{2,}", "\n\n", re.sub(r" ?\n ?", "\n", re.sub(r"[^\S\n]+", " ", text)))   # no long runs: linear time
    text = UNSLASHED.sub(r"\1</h1>", UNOPENED.sub(r"\1<h1>\2", text))
    bulletins = []
    for part in OPENING.split(text)[1:]:
        match = HEADLINE.match(part)
        headline, rest = (match["headline"], match["rest"]) if match else (part, "")
        bulletins.append(Bulletin(tidy(headline), tidy(STORY.match(rest.strip())["story"])))
    return [bulletin for bulletin in bulletins if any(bulletin)]


def tidy(text: str) -> str:
    """Return text without stray tags, entities, typographic punctuation and runs of space."""
    text = html.unescape(STRAY_TAG.sub(" ", text)).translate(ASCII_PUNCTUATION)
    return " ".join(unicodedata.normalize("NFKC", text).split())


# ---------------------------------------------------------------- rules: strict

FORBIDDEN = re.compile(r"[()\[\]{}<>/@#^]|\.\.\.")
OUTSIDE_ALPHABET = re.compile(r"[^A-Za-z0-9 .,;:'\"!?%$&-]")
ENDING = re.compile(r"[.!?][\"']?$")
DOUBLED = re.compile(r"\b(?!had\b|that\b)(\w+) \1\b|\b(?!more\b|again\b)(\w{4,}) and \2\b")


def stems(text: str) -> set[str]:
    """Return the content words of a text, cut to five letters so that inflections of a word meet."""
    return {word[:5] for word in re.findall(r"[a-z]{3,}", text.lower()) if word not in STOP_WORDS}


def repeats_itself(story: str) -> bool:
    """Tell whether a story doubles a word ("beautiful and beautiful") or says six words in a row twice."""
    words = re.findall(r"[\w']+", story.lower())
    runs = [tuple(words[i:i + 6]) for i in range(len(words) - 5)]
    return len(set(runs)) < len(runs) or DOUBLED.search(story.lower()) is not None


# A rule's name, and whether a bulletin breaks it. The first rule broken is the one that is counted.
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
    """Return the name of the first rule that a bulletin breaks by itself, or None."""
    return next((name for name, breaks in RULES.items() if breaks(bulletin)), None)


def judge_answer(answer: dict) -> list[Verdict]:
    """Parse one raw answer and return the verdict on each of its bulletins, repeats aside."""
    verdicts = []
    for bulletin in parse(answer["text"]):
        rule = broken_rule(bulletin)
        if rule is None and (answer.get("score") or 0.0) < MIN_SCORE:
            rule = "low_score"
        verdicts.append(Verdict(bulletin, rule, answer["key"]))
    return verdicts


class Acceptance:
    """Counts the bulletins of answers as they come: how many stand, and how many fell to which rule.

    `accepted` is what the programs that generate mean by a number of bulletins; exact repeats (same headline or same
    story) count as fallen. Near-duplicates are looked for once, when the corpus is cleaned.
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
        """Return the verdict, turned to "repeated" if its headline or story stood before; remember both if not."""
        if verdict.rule is not None:
            return verdict
        digests = [hashlib.blake2b(text.lower().encode(), digest_size=12).digest() for text in verdict.bulletin]
        if any(digest in self._seen for digest in digests):
            return verdict._replace(rule="repeated")
        self._seen.update(digests)
        return verdict


# ---------------------------------------------------------------- near-duplicates


class TwinFinder:
    """Finds near-duplicates of earlier bulletins by MinHash and locality-sensitive hashing (Broder 1997; rensa)."""

    N_PERMUTATIONS, N_BANDS = 64, 16      # a pair at similarity 0.5 shares one of 16 bands of 4 with probability 0.64

    def __init__(self):
        from rensa import RMinHashLSH
        self._index = RMinHashLSH(TWIN_SIMILARITY, self.N_PERMUTATIONS, self.N_BANDS)
        self._sketches = []

    @classmethod
    def sketch(cls, bulletin: Bulletin):
        """Return the MinHash of the word 3-grams of a bulletin."""
        from rensa import RMinHash
        words = re.findall(r"[\w']+", f"{bulletin.headline} {bulletin.story}".lower())
        sketch = RMinHash(cls.N_PERMUTATIONS, seed=0)
        sketch.update([" ".join(words[i:i + 3]) for i in range(len(words) - 2)])
        return sketch

    def is_twin(self, sketch) -> bool:
        """Tell whether a near-duplicate came before; remember the bulletin if none did."""
        if any(sketch.jaccard(self._sketches[i]) >= TWIN_SIMILARITY for i in self._index.query(sketch)):
            return True
        self._index.insert(len(self._sketches), sketch)
        self._sketches.append(sketch)
        return False


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


def belongs_to_validation(line: str) -> bool:
    """Decide by its headline's hash alone, so that a bulletin stays on its side however the corpus grows."""
    headline = line.split(f" {SEPARATOR} ", 1)[0]
    return int.from_bytes(hashlib.blake2b(headline.encode(), digest_size=8).digest()) % VALIDATION_SHARE == 0


def judge_and_sketch(answer: dict) -> list[tuple[Verdict, object]]:
    return [(verdict, TwinFinder.sketch(verdict.bulletin) if verdict.rule is None else None)
            for verdict in judge_answer(answer)]


def clean(raw: Iterable[dict], n_jobs: int = 1) -> Iterator[Verdict]:
    """Yield the verdict on every bulletin of the raw answers, in order: rules, exact repeats, near-duplicates.

    The first of two twins stands. Judging is spread over processes; what depends on order is done here.
    """
    acceptance, twins = Acceptance(), TwinFinder()
    with start_workers(n_jobs) if n_jobs > 1 else nullcontext() as pool:
        judged = pool.imap(judge_and_sketch, raw, chunksize=256) if pool else map(judge_and_sketch, raw)
        for pairs in judged:
            for verdict, sketch in pairs:
                verdict = acceptance.unless_repeated(verdict)
                if verdict.rule is None and twins.is_twin(sketch):
                    verdict = verdict._replace(rule="near_duplicate")
                yield verdict


def start_workers(n_jobs: int):
    """Return a pool of processes that end when the pool tells them to (SIGTERM), and leave Ctrl-C to this one.

    Forked while cli.run has both raise KeyboardInterrupt, a worker could print it, or swallow it and never end; so the
    signals wait until the worker has put that right.
    """
    held = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
    try:
        return multiprocessing.Pool(n_jobs, initializer=restore_signals)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def restore_signals() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM, signal.SIGINT])


def fingerprint(raw: Path) -> str:
    """Return a hash of the raw files and of the rules, to know when nothing has changed since the last cleaning."""
    digest = hashlib.sha256()
    for path in [*answers.answer_files(raw), Path(__file__), Path(answers.__file__)]:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def write_corpus(raw: Path, out: Path, n_jobs: int) -> dict:
    """Clean a folder of raw answers into train.txt and validation.txt and return the report.

    Every file is written beside its place and renamed. When neither the raw answers nor the rules have changed since
    the report was written, it is returned as it is.
    Raises FileNotFoundError if the folder holds no answers, ValueError for a broken line.
    """
    if not answers.answer_files(raw):
        raise FileNotFoundError(f"{raw}: no raw answers (*.jsonl); python generate_training_data.py or offline_teacher.py")
    report_path, source = out / "report.json", fingerprint(raw)
    names = ["train.txt", "validation.txt", "rejected.jsonl"]
    if report_path.exists() and all((out / name).exists() for name in names):
        report = answers.read_json(report_path)
        if report.get("fingerprint") == source:
            return report
    out.mkdir(parents=True, exist_ok=True)
    counts, rejected = Counter(), Counter()
    partial = {name: out / f"{name}.partial" for name in names}
    with (open(partial["train.txt"], "w", encoding="utf-8") as train,
          open(partial["validation.txt"], "w", encoding="utf-8") as validation,
          open(partial["rejected.jsonl"], "w", encoding="utf-8") as fallen):
        for verdict in clean(count_items(answers.read_answers(raw), counts, "answers"), n_jobs):
            counts["bulletins"] += 1
            if verdict.rule is not None:
                rejected[verdict.rule] += 1
                fallen.write(json.dumps({"rule": verdict.rule, "key": verdict.key,
                                         "headline": verdict.bulletin.headline}) + "\n")
                continue
            line = line_of(verdict.bulletin)
            is_validation = counts["validation"] < MAX_VALIDATION and belongs_to_validation(line)
            counts["validation" if is_validation else "train"] += 1
            (validation if is_validation else train).write(line + "\n")
    report = {**{name: counts[name] for name in ("answers", "bulletins", "train", "validation")},
              "rejected": dict(rejected.most_common()), "fingerprint": source}
    for name in names:
        os.replace(partial[name], out / name)
    partial_report = out / "report.json.partial"
    partial_report.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(partial_report, report_path)
    return report


def count_items(items: Iterable, counts: Counter, name: str) -> Iterator:
    for item in items:
        counts[name] += 1
        yield item


def open_text(path: Path):
    """Open a plain or .xz text file for reading."""
    return lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else open(path, encoding="utf-8")


def corpus_files(folder: Path, split: str) -> list[Path]:
    """Return the files of a split, "train" or "validation": the plain one, or else its .xz file or shards, in order.

    Raises FileNotFoundError if there is none.
    """
    plain = folder / f"{split}.txt"
    paths = [plain] if plain.exists() else sorted(folder.glob(f"{split}.txt.xz")) + sorted(folder.glob(f"{split}-*.txt.xz"))
    if not paths:
        raise FileNotFoundError(f"{folder}: no {split}.txt, {split}.txt.xz or {split}-000.txt.xz; see README, Data")
    return paths


def write_shards(out: Path, shard_size: int) -> list[Path]:
    """Compress what train.txt holds beyond the shards that exist into new ones, and validation.txt once.

    A corpus only grows at its end, so a shard that was published stays as it is, to the byte.
    Raises ValueError if the existing shards are not the beginning of train.txt.
    """
    with open(out / "train.txt", encoding="utf-8") as train:
        shards = sorted(out.glob("train-*.txt.xz"))
        for shard in shards:
            with open_text(shard) as published:
                if any(line != train.readline() for line in published):
                    raise ValueError(f"{shard}: not what the raw answers give now; the shards are never rewritten, "
                                     "so clean with the rules that made them")
        new = []
        while lines := list(islice(train, shard_size)):
            new.append(out / f"train-{len(shards) + len(new):03}.txt.xz")
            write_xz(new[-1], "".join(lines))
    if not (out / "validation.txt.xz").exists():
        new.append(out / "validation.txt.xz")
        write_xz(new[-1], (out / "validation.txt").read_text(encoding="utf-8"))
    return new


def write_xz(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
    os.replace(partial, path)


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
        report = write_corpus(args.raw, args.out, args.jobs)
        print(json.dumps({name: value for name, value in report.items() if name != "fingerprint"}, indent=1))
        for path in write_shards(args.out, args.shards) if args.shards else []:
            print(f"{path}: {path.stat().st_size:,} bytes", file=sys.stderr)

    return cli.run(command)


if __name__ == "__main__":
    sys.exit(main())
