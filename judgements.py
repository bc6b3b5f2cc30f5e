"""A judge's scores, compared between models: what `evaluate.py report` prints is made by `report_of`.

A judgement is the text in which a large model judges one bulletin, ending in a score; verdicts.py reads it.
"""
import json
import math
from collections import Counter
from collections.abc import Hashable
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

import stats
from files import read_json
from verdicts import HIGHEST, LOWEST, Reading, read_answer

ALPHA, POWER = 0.05, 0.8
# Names of the texts that every run of `evaluate.py judge` adds, to see whether the judge can judge.
REAL = "real text"
DAMAGED = ("shuffled sentences", "swapped headline", "repeated phrase")
CONTROLS = (REAL, *DAMAGED)


class Judgement(NamedTuple):
    unit: Hashable            # what was judged: a headline, or a place in the list
    reading: Reading
    sample: Hashable = None   # which bulletin on this headline, if the file tells: answers on the same one are repeats


def read_judgements(path: Path, is_paired: bool) -> tuple[dict[str, list[Judgement]], bool]:
    """Read {name: [answer, ...]}; return the judgements of each name, and whether units are shared between names.

    An answer is the judge's text, null if none came, or {"headline": ..., "text": ...}: then answers on one headline
    belong together, within a name and between names, and an optional "sample" tells which are on the same bulletin.
    `is_paired` says that the answers of all names are on the same headlines, in the same order. Raises ValueError.
    """
    by_name = read_json(path)
    if not isinstance(by_name, dict) or not by_name or not all(
            isinstance(value, list) and value for value in by_name.values()):
        raise ValueError(f"{path}: expected an object of name: [answer, ...], with at least one answer for each name")
    if is_paired and len({len(value) for value in by_name.values()}) > 1:
        raise ValueError(f"{path}: --paired needs as many answers for each name, but there are "
                         + ", ".join(f"{len(value)} for {name}" for name, value in by_name.items()))
    judgements = {name: [judgement_of(answer, place, f"{path}: {name}, answer {place}")
                         for place, answer in enumerate(value, 1)] for name, value in by_name.items()}
    n_headlines = sum(isinstance(judgement.unit, str) for value in judgements.values() for judgement in value)
    if n_headlines not in (0, sum(map(len, judgements.values()))):
        raise ValueError(f"{path}: some answers have a headline and some have none; give all or none")
    return judgements, is_paired or n_headlines > 0


def judgement_of(answer: object, place: int, where: str) -> Judgement:
    headline = sample = None
    if isinstance(answer, dict) and "text" in answer:
        headline, sample, answer = answer.get("headline"), answer.get("sample"), answer["text"]
        if not isinstance(headline, str) or not isinstance(sample, int | str | None):
            raise ValueError(f"{where}: an object with text needs a headline too, and its sample, if any, is a number")
    if answer is None or isinstance(answer, str):
        reading = read_answer(answer)
    else:
        reading = read_answer(json.dumps(answer)) if isinstance(answer, dict) else Reading(None, "not text")
    return Judgement(place if headline is None else headline, reading, sample)


def scores_by_unit(judgements: list[Judgement]) -> dict[Hashable, list[float]]:
    scores: dict[Hashable, list[float]] = {}
    for unit, reading, _ in judgements:
        if reading.score is not None:
            scores.setdefault(unit, []).append(reading.score)
    return scores


def summarise(judgements: list[Judgement]) -> dict:
    """Return n, mean, interval, count of each score, and the mean had all answers without a score been 1, or 5."""
    by_unit = scores_by_unit(judgements)
    scores = [score for values in by_unit.values() for score in values]
    unparsed = [{"answer": place, "problem": judgement.reading.problem}
                for place, judgement in enumerate(judgements, 1) if judgement.reading.score is None]
    # Several answers on one headline are not independent evidence: whole headlines are resampled.
    low, high = stats.ratio_interval(list(map(sum, by_unit.values())), list(map(len, by_unit.values())))
    counts = Counter({float(score): 0 for score in range(LOWEST, HIGHEST + 1)})
    counts.update(scores)
    return {"n_answers": len(judgements), "n_scored": len(scores), "n_headlines": len(by_unit),
            "mean": sum(scores) / len(scores) if scores else math.nan, "low": low, "high": high,
            "counts": {f"{score:g}": counts[score] for score in sorted(counts)}, "unparsed": unparsed,
            "worst_low": (sum(scores) + LOWEST * len(unparsed)) / len(judgements),
            "worst_high": (sum(scores) + HIGHEST * len(unparsed)) / len(judgements)}


def compare(a: dict[Hashable, list[float]], b: dict[Hashable, list[float]], units_are_shared: bool) -> dict:
    """Return the difference of two means with its interval and test: paired if most headlines are shared.

    A headline counts once, with the mean of its scores; in a paired test, only one that has a score from both.
    """
    means_a, means_b = ({unit: sum(values) / len(values) for unit, values in scores.items()} for scores in (a, b))
    shared = [unit for unit in means_a if unit in means_b]
    if units_are_shared and 2 * len(shared) > min(len(a), len(b)):
        differences = [means_a[unit] - means_b[unit] for unit in shared]
        return {"difference": sum(differences) / len(differences), "interval": stats.mean_interval(differences),
                "test": "paired", "n": [len(shared)], "p": stats.sign_flip_test(differences), "data": [differences]}
    x, y = list(means_a.values()), list(means_b.values())
    difference = sum(x) / len(x) - sum(y) / len(y) if x and y else math.nan
    return {"difference": difference, "interval": stats.difference_interval(x, y), "test": "two-sample",
            "n": [len(x), len(y)], "p": stats.two_sample_test(x, y), "data": [x, y]}


def retest_noise(judgements: dict[str, list[Judgement]]) -> dict | None:
    """Return how much the scores of one text differ when it is judged again; None if none was.

    sd: the standard deviation of a score around its text's own mean, in points; share: of the variance of all scores.
    """
    repeats: dict[Hashable, list[float]] = {}
    for name, members in judgements.items():
        for unit, reading, sample in members:
            if sample is not None and reading.score is not None:
                repeats.setdefault((name, unit, sample), []).append(reading.score)
    repeats = {text: scores for text, scores in repeats.items() if len(scores) > 1}
    if not repeats:
        return None
    squares = sum(np.var(scores) * len(scores) for scores in repeats.values())
    variance = float(squares) / sum(len(scores) - 1 for scores in repeats.values())
    total = float(np.var([score for scores in repeats.values() for score in scores]))
    return {"n_texts": len(repeats), "sd": math.sqrt(variance),
            "share": min(1.0, variance / total) if total else math.nan}


def n_tested(pairs: list[dict]) -> int:
    """Return how many of the pairs could be tested, which is how many Holm's correction is for."""
    return sum(not math.isnan(pair["p"]) for pair in pairs)


def with_holm(pairs: list[dict]) -> list[dict]:
    """Add to each pair its p-value corrected for all of them."""
    return [{**pair, "p_holm": p_holm} for pair, p_holm in zip(pairs, stats.holm([pair["p"] for pair in pairs]))]


def controls_of(checks: list[dict]) -> dict | None:
    """Return whether the judge tells real text from damaged text of every kind; None if it was given none.

    A check is the comparison with one kind; its "is_separated" says whether real text is better by more than chance,
    "is_too_few" whether so few texts could not have shown that. "missing" names the kinds that were not compared.
    """
    missing = sorted(set(DAMAGED) - {check["b"] for check in checks})
    are_separated = all(check["is_separated"] for check in checks)
    return {"checks": checks, "are_separated": are_separated, "missing": missing} if checks else None


def report_of(judgements: dict[str, list[Judgement]], units_are_shared: bool) -> dict:
    """Return {"names": {name: summary}, "pairs": [comparison, ...], "retest": noise, "controls": checks}.

    Damaged text is compared with real text only; Holm's correction is made for these tests by themselves.
    """
    by_name = {name: scores_by_unit(value) for name, value in judgements.items()}

    def compared(names: list[tuple[str, str]]) -> list[dict]:
        bar = tqdm(names, desc="comparing", unit="pair", leave=False, disable=None)
        pairs = with_holm([{"a": a, "b": b, **compare(by_name[a], by_name[b], units_are_shared)} for a, b in bar])
        for pair in pairs:
            pair["low"], pair["high"] = pair.pop("interval")
            # At the level of Holm's strictest step: such a difference is found whatever the other tests say.
            pair["smallest_detectable"] = stats.smallest_detectable_difference(
                *pair.pop("data"), alpha=ALPHA / max(1, n_tested(pairs)), power=POWER)
        return pairs

    checks = compared([(REAL, damaged) for damaged in DAMAGED if {REAL, damaged} <= by_name.keys()])
    for check in checks:
        check["is_separated"] = check["difference"] > 0 and check["p_holm"] < ALPHA
        check["is_too_few"] = math.isnan(check["smallest_detectable"])
    names = [name for name in by_name if not checks or name not in DAMAGED]
    return {"names": {name: summarise(value) for name, value in judgements.items()},
            "pairs": compared(list(combinations(names, 2))),
            "retest": retest_noise(judgements), "controls": controls_of(checks)}
