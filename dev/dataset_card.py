"""Write the figures of a corpus into its card, or what else raw answers tell of it: each an option below.

Reads:   a corpus folder with its report.json, the raw answers that it was cleaned from, vocabulary.json, a tokenizer.
Writes:  README.md of the corpus folder, only between its lines "<!-- figures -->" and "<!-- end of figures -->"; with
         --spot-check nothing, but bulletins as the teacher wrote them to standard output; with --by-teacher DIR the
         held-out bulletins of each teacher, as evaluate.py loss --data reads them; with --proper-nouns FILE those of
         all raw stories, as evaluate.py quality counts them.
Run:     python dev/dataset_card.py
"""
import argparse
import random
import re
import sys
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cli
import quality
from answers import read_answers, read_vocabulary
from bulletins import Bulletin, bulletin_of, line_of, parse, words_of
from cleaning import TWIN_SIMILARITY
from corpus import corpus_files, lines_of
from data import encode_lines
from files import read_json, write_beside, write_json

BEGIN, END = "<!-- figures -->\n", "<!-- end of figures -->\n"
N_SAMPLED = 10_000            # bulletins that the reading grade is measured on
N_WORDS, N_BYTES = 100_000, 500_000     # of text that diversity and compression are measured on, whatever the corpus
N_COMMON, N_SHOWN = 20, 20
CONTEXT_LENGTH = 128          # of the published models
CALENDAR = frozenset("""january february march april may june july august september october november december
    monday tuesday wednesday thursday friday saturday sunday""".split())


class Written(NamedTuple):
    """A bulletin of the corpus as its teacher wrote it, in upper and lower case."""
    bulletin: Bulletin
    line: str                 # in the corpus
    seed_words: list[str]     # asked for
    teacher: str
    day: str                  # 2026-11-24


# ---------------------------------------------------------------- what the teacher wrote


def read_written(raw: Path, lines: Iterable[str]) -> Iterator[Written]:
    """Yield the bulletins of a corpus's lines as they are in the raw answers; raise ValueError if there are none."""
    wanted = set(lines)
    n = len(wanted)
    for answer in read_answers(raw):
        for bulletin in parse(answer["text"]):
            if (line := line_of(bulletin)) in wanted:
                wanted.remove(line)
                day = datetime.fromtimestamp(answer["created"], timezone.utc).date().isoformat()
                yield Written(bulletin, line, answer["seed_words"], answer.get("model", "unknown"), day)
    if len(wanted) == n:
        raise ValueError(f"{raw}: holds no bulletin of the corpus; --raw must be the folder that it was cleaned from")


def write_by_teacher(folder: Path, raw: Path, out: Path) -> None:
    """Write the held-out bulletins of each teacher into a file of its own, one a line, and print how many."""
    lines = defaultdict(list)
    for written in read_written(raw, lines_of(corpus_files(folder, "validation"))):
        lines[written.teacher].append(written.line)
    out.mkdir(parents=True, exist_ok=True)
    for teacher, held_out in lines.items():
        path = out / f"{re.sub(r'[^a-z0-9]+', '-', teacher.lower())}.txt"
        path.write_text("\n".join([*held_out, ""]), encoding="utf-8")
        print(f"{path}: {len(held_out):,} held-out bulletins by {teacher}")


def proper_nouns(texts: list[str]) -> list[list[str]]:
    """Return the proper nouns of each text, except days, months and words all in capitals.

    A capitalised word is taken for a proper noun if, inside sentences, all texts together write it with a capital
    letter more often than without.
    """
    n_lower, n_capital = Counter(), Counter()
    for text in texts:
        n_lower.update(re.findall(r"\b[a-z]+\b", text))
        n_capital.update(word.lower() for word in re.findall(r"(?<=[a-z0-9,;:] )[A-Z][a-z]+\b", text))
    names = {word for word, n in n_capital.items() if n > n_lower[word] and word not in CALENDAR}
    return [[word for word in re.findall(r"\b[A-Z][a-z]+\b", text) if word.lower() in names] for text in texts]


def write_proper_nouns(raw: Path, out: Path) -> None:
    """Write the proper nouns of all raw stories in lower case, those that stand in one story only left out."""
    stories = [bulletin.story for answer in read_answers(raw) for bulletin in parse(answer["text"])]
    n_stories = Counter(noun for nouns in proper_nouns(stories) for noun in {noun.lower() for noun in nouns})
    write_json(out, sorted(noun for noun, n in n_stories.items() if n > 1))


# ---------------------------------------------------------------- figures


def figures_of(folder: Path, raw: Path, vocabulary: Path, tokenizer: Path) -> str:
    """Return all figures as Markdown."""
    report = read_json(folder / "report.json")
    lines = {split: list(lines_of(corpus_files(folder, split))) for split in ("train", "validation")}
    every_line = [*lines["train"], *lines["validation"]]
    corpus = list(map(bulletin_of, every_line))
    written = list(read_written(raw, every_line))
    teachers, days = Counter(b.teacher for b in written), {b.day for b in written}
    sampled = [quality.Sample(bulletin) for bulletin in random.Random(0).sample(corpus, min(N_SAMPLED, len(corpus)))]
    held_out = [words_of(bulletin_of(line).story) for line in lines["validation"]]
    nearest = quality.copied_runs(held_out, (words_of(bulletin_of(line).story) for line in lines["train"]))[1]
    words = Counter(word for b in corpus for part in b for word in words_of(part))
    seeds = read_vocabulary(vocabulary)
    openings = Counter(" ".join(b.story.split()[:3]) for b in corpus)
    first_words = Counter(b.headline.split()[0] for b in corpus)
    return "\n".join([
        f"Written by {', '.join(f'{teacher} ({n:,} bulletins)' for teacher, n in teachers.most_common())}; on "
        f"{' to '.join(sorted({min(days), max(days)}))}. {len(written):,} of the {len(corpus):,} bulletins are in the "
        "raw answers at hand.\n",
        *table("of the raw bulletins", counts_by_rule(report)),
        *table("length", lengths_of(corpus, every_line, tokenizer)),
        *table("what the words are", vocabulary_of(words, seeds, written)),
        *table("how much is said twice", repetition_of(report, sampled, nearest)),
        *table("how it reads", reading_of(sampled, written)),
        *two_columns(f"the {N_COMMON} most common openings of stories", openings.most_common(N_COMMON),
                     "first words of headlines", first_words.most_common(N_COMMON), len(corpus)),
        f"{N_SHOWN} bulletins drawn at random:\n",
        *(f"> **{b.headline}** {b.story}\n" for b in random.Random(1).sample(corpus, min(N_SHOWN, len(corpus))))])


def counts_by_rule(report: dict) -> dict[str, str]:
    shown = {"written": report["bulletins"], "accepted, to train on": report["train"],
             "accepted, held out": report["validation"]}
    shown.update({f"fell to `{rule}`": n for rule, n in report["rejected"].items()})
    return {name: f"{n:,} ({n / report['bulletins']:.2%})" for name, n in shown.items()}


def lengths_of(corpus: list[Bulletin], lines: list[str], tokenizer: Path) -> dict[str, str]:
    n_tokens = np.array([len(ids) for ids, _ in encode_lines((tokenizer.read_bytes(), lines))])
    lengths = {"words a headline": [len(words_of(b.headline)) for b in corpus],
               "words a story": [len(words_of(b.story)) for b in corpus],
               "sentences a story": [quality.n_sentences(b.story) for b in corpus],
               f"tokens a bulletin ({tokenizer.name})": n_tokens}
    rows = {}
    for name, n in lengths.items():
        low, high = np.quantile(n, [0.05, 0.95])
        rows[name] = f"{np.mean(n):.1f} (5%: {low:.0f}, 95%: {high:.0f}, most: {np.max(n)})"
    return {**rows, f"bulletins of at most {CONTEXT_LENGTH} tokens": f"{(n_tokens <= CONTEXT_LENGTH).mean():.1%}",
            "tokens in all": f"{n_tokens.sum():,}"}


def vocabulary_of(words: Counter, seeds: list[list[str]], written: list[Written]) -> dict[str, str]:
    n_words, in_text = sum(words.values()), sum(any(form in words for form in forms) for forms in seeds)
    asked = {word for b in written for word in b.seed_words}
    of_asked = sum(not asked.isdisjoint(forms) for forms in seeds)
    forms_of = {form: forms for forms in seeds for form in forms}
    headlines = [set(words_of(b.bulletin.headline)) for b in written]
    holding = sum(not headline.isdisjoint(b.seed_words) for headline, b in zip(headlines, written))
    holding_form = sum(not headline.isdisjoint(form for word in b.seed_words for form in forms_of.get(word, [word]))
                       for headline, b in zip(headlines, written))
    return {"words": f"{n_words:,}", "different words": f"{len(words):,}",
            "of these standing once": f"{sum(n == 1 for n in words.values()) / len(words):.1%}",
            "text made of the 1,000 most common words": f"{sum(n for _, n in words.most_common(1000)) / n_words:.1%}",
            "seed words that occur in the corpus, in any form": f"{in_text / len(seeds):.1%} of {len(seeds):,}",
            "seed words with an accepted bulletin of their own": f"{of_asked / len(seeds):.1%}",
            "headlines that hold their seed word": f"{holding / len(written):.1%} of {len(written):,}",
            "headlines that hold it in any form of its list": f"{holding_form / len(written):.1%}"}


def repetition_of(report: dict, sampled: list[quality.Sample], nearest: list[float]) -> dict[str, str]:
    fallen = {rule: report["rejected"].get(rule, 0) for rule in ("repeated", "near_duplicate")}
    pooled = quality.pooled(sampled, N_WORDS, N_BYTES)
    return {**{f"raw bulletins that were dropped as `{rule}`": f"{n:,} ({n / report['bulletins']:.2%})"
               for rule, n in fallen.items()},
            "held-out stories with a near-duplicate to train on (exact, word 3-grams)":
                f"{np.mean([similarity >= TWIN_SIMILARITY for similarity in nearest]):.2%} of {len(nearest):,}",
            "similarity of a held-out story to the nearest to train on":
                f"{np.mean(nearest):.3f} (most: {max(nearest):.3f})",
            **{f"distinct {n}-grams, over {N_WORDS:,} words": f"{pooled[f'distinct_{n}_grams']:.3f}"
               for n in quality.DIVERSITY_ORDERS},
            f"compression ratio (xz), over {N_BYTES:,} bytes": f"{pooled['compression_ratio']:.2f}"}


def reading_of(sampled: list[quality.Sample], written: list[Written]) -> dict[str, str]:
    grades = [quality.reading_grade(sample.bulletin.story) for sample in sampled]
    names = proper_nouns([b.bulletin.story for b in written])
    common = Counter(name for found in names for name in found).most_common(12)
    return {"reading grade (Flesch-Kincaid, a school year)":
                f"{np.mean(grades):.1f} (5%: {np.quantile(grades, 0.05):.1f}, 95%: {np.quantile(grades, 0.95):.1f})",
            "stories with a proper noun, days and months aside": f"{np.mean(list(map(bool, names))):.1%}",
            "the most common of these": ", ".join(name for name, _ in common)}


# ---------------------------------------------------------------- Markdown


def table(head: str, rows: dict[str, str]) -> list[str]:
    return [f"| {head} | |\n|---|---|", *(f"| {name} | {value} |" for name, value in rows.items()), ""]


def two_columns(left_head: str, left: list[tuple[str, int]], right_head: str, right: list[tuple[str, int]],
                total: int) -> list[str]:
    return [f"| {left_head} | | {right_head} | |\n|---|---|---|---|",
            *(f"| {a} | {n / total:.2%} | {b} | {m / total:.2%} |" for (a, n), (b, m) in zip(left, right)), ""]


def write_card(path: Path, figures: str) -> None:
    """Put figures between the two marks of a card; raise ValueError unless each is there once, and in order."""
    parts = path.read_text(encoding="utf-8").split(BEGIN)
    if len(parts) != 2 or parts[1].count(END) != 1:
        raise ValueError(f"{path}: expected one line {BEGIN.strip()} and after it one line {END.strip()}")
    card = f"{parts[0]}{BEGIN}\n{figures}\n{END}{parts[1].split(END)[1]}"
    write_beside(path, lambda partial: partial.write_text(card, encoding="utf-8"))


# ---------------------------------------------------------------- by hand


def print_spot_check(folder: Path, raw: Path, n: int) -> None:
    """Print n random bulletins as the teacher wrote them, each with the proper nouns that are found in its story."""
    lines = [line for split in ("train", "validation") for line in lines_of(corpus_files(folder, split))]
    written = list(read_written(raw, lines))
    found = proper_nouns([b.bulletin.story for b in written])
    for i in sorted(random.Random(2).sample(range(len(written)), min(n, len(written)))):
        story = textwrap.fill(written[i].bulletin.story, 120, initial_indent="    ", subsequent_indent="    ")
        print(f"{i}: {', '.join(found[i]) or '-'}\n{story}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("training_data"), help="corpus folder (default: %(default)s)")
    parser.add_argument("--raw", type=Path, default=Path("training_data/raw-offline"),
                        help="what it was cleaned from (default: %(default)s)")
    parser.add_argument("--vocabulary", type=Path, default=Path("vocabulary.json"), help="default: %(default)s")
    parser.add_argument("--tokenizer", type=Path, default=Path("tokenizers/tinynewstokenizer8192.model"),
                        help="default: %(default)s")
    parser.add_argument("--spot-check", type=cli.at_least(int, 1), metavar="N",
                        help="print N bulletins with the proper nouns found, and stop")
    parser.add_argument("--by-teacher", type=Path, metavar="DIR",
                        help="write the held-out bulletins of each teacher to a file in DIR, and stop")
    parser.add_argument("--proper-nouns", type=Path, metavar="FILE",
                        help="write the proper nouns of the raw stories to FILE, and stop")
    args = parser.parse_args(argv)

    def command() -> None:
        if args.proper_nouns:
            write_proper_nouns(args.raw, args.proper_nouns)
        elif args.spot_check:
            print_spot_check(args.data, args.raw, args.spot_check)
        elif args.by_teacher:
            write_by_teacher(args.data, args.raw, args.by_teacher)
        else:
            write_card(args.data / "README.md", figures_of(args.data, args.raw, args.vocabulary, args.tokenizer))

    return cli.run(command)


if __name__ == "__main__":
    sys.exit(main())
