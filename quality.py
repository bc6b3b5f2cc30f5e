"""What can be measured of bulletins without a judge: repetition, novelty, fit to the headline, ending, reading grade.

An absolute number says little here, so each stands beside the same measure on held-out bulletins. Words are runs of
letters, digits and apostrophes, in lower case. Headlines count only in the measure that names them: often they are
given to the model, not written by it.
"""
import json
import lzma
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import answers
import bulletins
import cleaning
import corpus
import stats
from bulletins import words_of
from files import LONE_SURROGATE, read_json

DIVERSITY_ORDERS = (1, 2, 3, 4)
NOVELTY_ORDERS = range(4, 11)
VOCABULARY = Path(__file__).with_name("vocabulary.json")      # the seed words
# In lower case, which the teachers of the bundled corpus wrote with a capital letter.
PROPER_NOUNS = Path(__file__).with_name("proper_nouns.json")


class Sample(NamedTuple):
    """A bulletin, and whether its writer ended it by itself (rather than at a limit)."""
    bulletin: bulletins.Bulletin
    is_finished: bool = True


# ---------------------------------------------------------------- reading


def read_samples(path: Path) -> Iterator[Sample]:
    """Yield bulletins from lines of JSON ({"headline", "story", "finished"}) or of the corpus ("headline </h> story").

    Raises FileNotFoundError, or ValueError that names the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; python sample.py --json writes one")
    try:
        with corpus.open_text(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield sample_of(line, f"{path}:{number}")
    except (UnicodeDecodeError, lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{path}: not a text file ({error})") from None


def sample_of(line: str, where: str) -> Sample:
    if not line.lstrip().startswith("{"):
        try:
            return Sample(bulletins.bulletin_of(line))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError(f"{where}: not JSON") from None
    headline, story, finished = fields.get("headline"), fields.get("story"), fields.get("finished", True)
    if not (isinstance(headline, str) and isinstance(story, str) and isinstance(finished, bool)):
        raise ValueError(f"{where}: expected headline and story, both strings, and finished, true or false")
    if LONE_SURROGATE.search(headline + story):
        raise ValueError(f"{where}: headline or story holds half a character (a lone surrogate)")
    return Sample(bulletins.Bulletin(headline, story), finished)


def read_corpus(folder: Path, split: str) -> Iterator[Sample]:
    """Yield the bulletins of a split of the corpus, "train" or "validation"."""
    for path in corpus.corpus_files(folder, split):
        yield from read_samples(path)


# ---------------------------------------------------------------- measures


def n_grams(words: list[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[start:] for start in range(n))))


def n_syllables(word: str) -> int:
    """Return about how many syllables a word has: its groups of vowels, less a silent e at its end.

    >>> [n_syllables(word) for word in "table smile walked boxes area".split()]
    [2, 1, 1, 2, 2]
    """
    groups = len(re.findall(r"[aeiouy]+", word))
    is_silent = re.search(r"(?:[^laeiouy]e|[aeiouy]le|[^tdaeiouy]ed|[^sxzcghaeiouy]es)$", word) is not None
    return max(1, groups - is_silent)


def n_sentences(story: str) -> int:
    return max(1, len(re.findall(r"[.!?]+(?=[\s\"']|$)", story)))


def reading_grade(story: str) -> float:
    """Return the Flesch-Kincaid grade: about the US school year in which a text can be read.

    Syllables are estimated from spelling, so that the grade is good for comparing texts, and within about a year.
    """
    words = words_of(story)
    return 0.39 * len(words) / n_sentences(story) + 11.8 * sum(map(n_syllables, words)) / len(words) - 15.59


def seed_words(vocabulary: list[list[str]]) -> re.Pattern:
    """Return what finds a seed word, in one of its forms, as a whole word of a headline."""
    forms = sorted({form.lower() for forms in vocabulary for form in forms}, key=len, reverse=True)
    return re.compile(r"(?<![\w'-])(?:" + "|".join(map(re.escape, forms)) + r")(?![\w-])")


def copied_runs(stories: list[list[str]], training: Iterable[list[str]]) -> tuple[list[list[int]], list[float]]:
    """Compare stories with training stories, given as words, in one pass over the latter.

    Returns, for each word of each story, the length of the longest run of words that starts there and stands in one
    training story (0 if under three); and for each story, its exact Jaccard similarity, on word 3-grams, to the nearest
    training story.
    """
    places, owners = defaultdict(list), defaultdict(set)
    grams = [set(n_grams(words, 3)) for words in stories]
    for story, words in enumerate(stories):
        for start, gram in enumerate(n_grams(words, 3)):
            places[gram].append((story, start))
            owners[gram].add(story)
    runs, nearest = [[0] * len(words) for words in stories], [0.0] * len(stories)
    for other in training:
        other_grams = n_grams(other, 3)
        for other_start, gram in enumerate(other_grams):
            for story, start in places.get(gram, ()):
                if start and other_start and stories[story][start - 1] == other[other_start - 1]:
                    continue                     # inside a run already followed from its first word
                runs[story][start] = max(runs[story][start], common_run(stories[story], start, other, other_start))
        n_shared = defaultdict(int)
        distinct = set(other_grams)
        for gram in distinct & places.keys():
            for story in owners[gram]:
                n_shared[story] += 1
        for story, n in n_shared.items():
            nearest[story] = max(nearest[story], n / (len(grams[story]) + len(distinct) - n))
    for story_runs in runs:
        for start in range(1, len(story_runs)):
            if story_runs[start - 1] > 3:        # what starts one word later is one word shorter
                story_runs[start] = max(story_runs[start], story_runs[start - 1] - 1)
    return runs, nearest


def common_run(a: list[str], a_start: int, b: list[str], b_start: int) -> int:
    """Return how many words two lists share from the given places on."""
    n = 0
    while a_start + n < len(a) and b_start + n < len(b) and a[a_start + n] == b[b_start + n]:
        n += 1
    return n


def per_bulletin(samples: list[Sample], runs: list[list[int]], nearest: list[float], known: set[str],
                 seeds: re.Pattern, proper_nouns: set[str]) -> dict[str, tuple[list[float], list[float]]]:
    """Return {measure: (totals, counts)}, an entry for each bulletin; a measure's value is total over total.

    `runs` and `nearest` are what copied_runs says of the samples' stories; `known` are the words of the training
    stories; `seeds` is what seed_words gives; `proper_nouns` are in lower case.
    """
    measures = {name: ([], []) for name in (
        "words_per_story", "reading_grade", "ends_properly", "repeats_itself", "headline_words_in_story",
        "headlines_with_seed_word", "stories_with_proper_noun", "unseen_words",
        *(f"unseen_{n}_grams" for n in NOVELTY_ORDERS), "longest_copied_run", "nearest_training_story",
        "near_duplicates_of_training")}

    def add(name: str, total: float, count: float = 1) -> None:
        measures[name][0].append(total)
        measures[name][1].append(count)

    for (bulletin, is_finished), story_runs, similarity in zip(samples, runs, nearest, strict=True):
        n_words = len(story_runs)
        add("words_per_story", n_words)
        add("reading_grade", reading_grade(bulletin.story) if n_words else 0.0, min(1, n_words))
        add("ends_properly", is_finished and bulletins.ENDING.search(bulletin.story.rstrip()) is not None)
        add("repeats_itself", bulletins.repeats_itself(bulletin.story))
        headline = bulletins.stems(bulletin.headline)
        add("headline_words_in_story", len(headline & bulletins.stems(bulletin.story)), len(headline))
        add("headlines_with_seed_word", seeds.search(bulletin.headline.lower()) is not None)
        add("stories_with_proper_noun", not proper_nouns.isdisjoint(words_of(bulletin.story)))
        add("unseen_words", sum(word not in known for word in words_of(bulletin.story)), n_words)
        for n in NOVELTY_ORDERS:
            n_places = max(0, n_words - n + 1)
            add(f"unseen_{n}_grams", sum(run < n for run in story_runs[:n_places]), n_places)
        add("longest_copied_run", max(story_runs, default=0))
        add("nearest_training_story", similarity)
        add("near_duplicates_of_training", similarity >= cleaning.TWIN_SIMILARITY)
    return measures


def pooled(samples: list[Sample], n_words: int, n_bytes: int) -> dict[str, float]:
    """Return the measures of a whole set of stories: how much of it says again what it said before.

    Both depend on the amount of text, so they are taken over its first n_words and n_bytes only; compare sets at equal
    sizes. distinct_{n}_grams: distinct over all word n-grams of the stories. compression_ratio: bytes over bytes after
    xz; the higher, the more repetitive.
    """
    grams = {n: [] for n in DIVERSITY_ORDERS}
    for sample in samples:
        words = words_of(sample.bulletin.story)[:n_words]
        n_words -= len(words)
        for n in DIVERSITY_ORDERS:
            grams[n] += n_grams(words, n)
    text = text_of(samples)[:n_bytes]
    return {**{f"distinct_{n}_grams": len(set(grams[n])) / len(grams[n]) if grams[n] else math.nan
               for n in DIVERSITY_ORDERS},
            "compression_ratio": len(text) / len(lzma.compress(text)) if text else math.nan}


def smollm2_nats(sets: dict[str, list[Sample]], limit: int) -> dict[str, dict[str, float]]:
    """Return {set: {"value", "low", "high"}}: nats per token of stories after their headlines, under SmolLM2 untuned.

    Of each set, the first `limit` bulletins are read. Raises FileNotFoundError or ImportError if SmolLM2 is missing.
    """
    import smollm2
    tokenizer, model = smollm2.load_smollm2()
    measure = {}
    for name, samples in sets.items():
        totals, counts = smollm2.continuation_nats(
            tokenizer, model, [(f"{bulletin.headline}\n", bulletin.story) for bulletin, _ in samples[:limit]])
        low, high = stats.ratio_interval(totals, counts)
        measure[name] = {"value": sum(totals) / sum(counts) if sum(counts) else math.nan, "low": low, "high": high}
    return measure


def text_of(samples: list[Sample]) -> bytes:
    return "\n".join(sample.bulletin.story for sample in samples).lower().encode()


def compare(sets: dict[str, list[Sample]], training: Iterable[Sample]) -> dict[str, dict[str, dict[str, float]]]:
    """Return {measure: {set: {"value", "low", "high"}}} for sets of bulletins, with 95% intervals.

    Repetition has no interval (nan): resampling would itself repeat bulletins. `training` is read once, for all sets.
    """
    known: set[str] = set()               # filled while copied_runs reads every training story

    def training_stories() -> Iterator[list[str]]:
        for sample in training:
            words = words_of(sample.bulletin.story)
            known.update(words)
            yield words

    stories = {name: [words_of(sample.bulletin.story) for sample in samples] for name, samples in sets.items()}
    runs, nearest = copied_runs([words for members in stories.values() for words in members], training_stories())
    seeds, proper_nouns = seed_words(answers.read_vocabulary(VOCABULARY)), set(read_json(PROPER_NOUNS))
    n_words = min(sum(map(len, members)) for members in stories.values())
    n_bytes = min(len(text_of(samples)) for samples in sets.values())
    measures: dict[str, dict[str, dict[str, float]]] = {}
    start = 0
    for name, samples in sets.items():
        end = start + len(samples)
        by_measure = per_bulletin(samples, runs[start:end], nearest[start:end], known, seeds, proper_nouns)
        for measure, (totals, counts) in by_measure.items():
            low, high = stats.ratio_interval(totals, counts)
            value = sum(totals) / sum(counts) if sum(counts) else math.nan
            measures.setdefault(measure, {})[name] = {"value": value, "low": low, "high": high}
        for measure, value in pooled(samples, n_words, n_bytes).items():
            measures.setdefault(measure, {})[name] = {"value": value, "low": math.nan, "high": math.nan}
        start = end
    return measures
