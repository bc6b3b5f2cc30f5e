"""Raw answers to a clean corpus: judged on all cores, near-duplicates dropped, split, reported, published.

What a bulletin is and which rules it must keep is in bulletins.py, whose command calls this module.
"""
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

import answers
import bulletins
import cli
import corpus
from bulletins import Acceptance, Bulletin, Verdict, bulletin_of, digests_of, judge_answer, line_of, words_of
from files import read_json, settle, sha256_of, write_beside

TWIN_SIMILARITY = 0.5         # Jaccard similarity of word 3-grams at which two bulletins are near-duplicates
VALIDATION_SHARE = 20         # one bulletin in this many goes to validation ...
MAX_VALIDATION = 1000         # ... until there are this many: enough to measure a loss to 0.01
PUBLISHED = "published"       # the verdict on a bulletin that stands in a published file


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
        words = words_of(f"{bulletin.headline} {bulletin.story}")
        sketch = RMinHash(cls.N_PERMUTATIONS, seed=0)
        sketch.update([" ".join(words[i:i + 3]) for i in range(len(words) - 2)])
        return sketch

    def is_twin(self, sketch) -> bool:
        """Tell whether a near-duplicate has been added."""
        return any(sketch.jaccard(self._sketches[i]) >= TWIN_SIMILARITY for i in self._index.query(sketch))

    def add(self, sketch) -> None:
        self._index.insert(len(self._sketches), sketch)
        self._sketches.append(sketch)


# ---------------------------------------------------------------- verdicts


def belongs_to_validation(headline: str) -> bool:
    """Decide by a headline's hash alone, so that a bulletin stays on its side however the corpus grows."""
    return int.from_bytes(hashlib.blake2b(headline.lower().encode(), digest_size=8).digest()) % VALIDATION_SHARE == 0


def judge_and_sketch(answer: dict) -> list[tuple[Verdict, object]]:
    return [(verdict, TwinFinder.sketch(verdict.bulletin) if verdict.rule is None else None)
            for verdict in judge_answer(answer)]


def sketch_line(line: str) -> tuple[Bulletin, object]:
    bulletin = bulletin_of(line)
    return bulletin, TwinFinder.sketch(bulletin)


def clean(raw: Iterable[dict], n_jobs: int = 1, published: Iterable[str] = ()) -> Iterator[Verdict]:
    """Yield the verdict on every bulletin of the raw answers, in order: rules, exact repeats, near-duplicates.

    The first of two twins stands. `published` lines of a corpus stand before all of them, whatever the rules say now:
    a bulletin found there gets the verdict "published", once, and later repeats and twins of it fall.
    Judging is spread over processes; what depends on order is done in this one.
    """
    acceptance, finder, standing = Acceptance(), TwinFinder(), set()
    with cli.start_workers(n_jobs, chunk_size=256) as spread:
        for bulletin, sketch in spread(sketch_line, published):
            standing.add(digests_of(bulletin))
            acceptance.remember(bulletin)
            finder.add(sketch)
        for pairs in spread(judge_and_sketch, raw):
            for verdict, sketch in pairs:
                if standing and (digests := digests_of(verdict.bulletin)) in standing:
                    standing.remove(digests)
                    yield verdict._replace(rule=PUBLISHED)
                    continue
                verdict = acceptance.unless_repeated(verdict)
                if verdict.rule is None:
                    if finder.is_twin(sketch):
                        verdict = verdict._replace(rule="near_duplicate")
                    else:
                        finder.add(sketch)
                yield verdict


# ---------------------------------------------------------------- files


def write_corpus(raw: Path, out: Path, n_jobs: int) -> dict:
    """Clean a folder of raw answers into train.txt and validation.txt and return the report.

    What `out` has published (see corpus.py) comes first in both files, and a published validation set is the whole
    validation set: later bulletins go to train, unless they are twins of a published one.
    Every file is written beside its place and renamed. If nothing has changed since the report was written, neither
    the raw answers nor the rules nor what is published, the report is returned as it is.
    Raises FileNotFoundError if the folder holds no answers, ValueError for a broken line.
    """
    if not answers.answer_files(raw):
        raise FileNotFoundError(f"{raw}: no raw answers (*.jsonl); generate_training_data.py or offline_teacher.py "
                                "writes them")
    report_path, sources = out / "report.json", sources_of(raw, out)
    names = ["train.txt", "validation.txt", "rejected.jsonl"]
    if report_path.exists() and all((out / name).exists() for name in names):
        report = read_json(report_path)
        if isinstance(report, dict) and report.items() >= sources.items():
            return report
    out.mkdir(parents=True, exist_ok=True)
    partials = {name: out / f"{name}.partial" for name in names}
    try:
        with (open(partials["train.txt"], "w", encoding="utf-8") as train,
              open(partials["validation.txt"], "w", encoding="utf-8") as validation,
              open(partials["rejected.jsonl"], "w", encoding="utf-8") as fallen):
            counts = write_splits(raw, out, n_jobs, train, validation, fallen)
        for name in names:
            settle(partials[name], out / name)
    finally:
        for partial in partials.values():
            partial.unlink(missing_ok=True)
    return write_report(out, {**counts, **sources})


def write_splits(raw: Path, out: Path, n_jobs: int, train: TextIO, validation: TextIO, fallen: TextIO) -> dict:
    """Write a corpus, and the bulletins that fell, to open files; return the counts of the report.

    bulletins + only_published = train + validation + all that are rejected.
    """
    counts, rejected = Counter(), Counter()
    published = {split: corpus.published_files(out, split) for split in ("train", "validation")}
    for split, file in (("train", train), ("validation", validation)):
        file.writelines(line + "\n" for line in count_items(published_lines(published[split]), counts, split))
    counts["only_published"] = counts["train"] + counts["validation"]
    standing = corpus.lines_of([*published["train"], *published["validation"]])
    for verdict in clean(count_items(answers.read_answers(raw), counts, "answers"), n_jobs, standing):
        counts["bulletins"] += 1
        if verdict.rule == PUBLISHED:
            counts["only_published"] -= 1
        elif verdict.rule is not None:
            rejected[verdict.rule] += 1
            entry = {"rule": verdict.rule, "key": verdict.key, "headline": verdict.bulletin.headline}
            fallen.write(json.dumps(entry) + "\n")
        else:
            is_validation = (not published["validation"] and counts["validation"] < MAX_VALIDATION
                             and belongs_to_validation(verdict.bulletin.headline))
            counts["validation" if is_validation else "train"] += 1
            (validation if is_validation else train).write(line_of(verdict.bulletin) + "\n")
    return {**{name: counts[name] for name in ("answers", "bulletins", "train", "validation", "only_published")},
            "rejected": dict(rejected.most_common())}


def published_lines(paths: list[Path]) -> Iterator[str]:
    """Yield the lines of published files; raise ValueError naming the one that holds no bulletin."""
    for path in paths:
        for number, line in enumerate(corpus.lines_of([path]), 1):
            try:
                bulletin_of(line)
            except ValueError as error:
                raise ValueError(f"{path}: bulletin {number}: {error}") from None
            yield line


def count_items(items: Iterable, counts: Counter, name: str) -> Iterator:
    for item in items:
        counts[name] += 1
        yield item


def sources_of(raw: Path, out: Path) -> dict[str, str]:
    """Return hashes of all that a corpus depends on, to tell whether anything has changed since the last cleaning."""
    code = [Path(module.__file__) for module in (answers, bulletins)] + [Path(__file__)]
    return {"fingerprint": sha256_of_files([*answers.answer_files(raw), *code]), "published": sha256_of_published(out)}


def sha256_of_published(out: Path) -> str:
    return sha256_of_files([path for split in ("train", "validation") for path in corpus.published_files(out, split)])


def sha256_of_files(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + bytes.fromhex(sha256_of(path)))
    return digest.hexdigest()


def write_report(out: Path, report: dict) -> dict:
    text = json.dumps(report, indent=1) + "\n"
    write_beside(out / "report.json", lambda partial: partial.write_text(text, encoding="utf-8"))
    return report


def publish(out: Path, shard_size: int) -> list[Path]:
    """Compress a corpus just cleaned into new published files and return them; the report stays up to date."""
    new = corpus.publish(out, shard_size)
    # Not the fingerprint too: answers that have come since the cleaning are in no file yet.
    write_report(out, {**read_json(out / "report.json"), "published": sha256_of_published(out)})
    return new
