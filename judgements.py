"""A judge's answers: read, however broken, and compared between models.

A judgement is the text in which a large model judges one bulletin, ending in a score of 1 to 5. `read_answer` gives
the score of one answer; `report_of` makes what `evaluate.py report` prints.
"""
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Hashable
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

import answers
import stats
from bulletins import ASCII_PUNCTUATION

LOWEST, HIGHEST = 1, 5        # the judge's scale
ALPHA, POWER = 0.05, 0.8
# Names of the texts that every run of `evaluate.py judge` adds, to see whether the judge can judge.
REAL = "real text"
DAMAGED = ("shuffled sentences", "swapped headline", "repeated phrase")
CONTROLS = (REAL, *DAMAGED)

# ---------------------------------------------------------------- a judge's answer

PREFILLED = '{"notes": "'
# 4, "4/5", "4 of 5 stars", "Score: 4", "4: good", "4. The story is fine"; a remark may hold no second number
NUMBER = re.compile(r"(?:(?:score|rating)\s*[:=]\s*)?([+-]?[0-9]+(?:\.[0-9]+)?)(?:\s*(?:/|(?:out )?of)\s*5(?:\.0)?)?"
                    r"(?:\s*(?:stars?|points?))?(?:\s*:[^0-9]*|\s*(?:[(,;]|[-.]\s)"
                    r"(?!.*\b(?:one|two|three|four|five|ten|or|to|of)\b)[^0-9]*)?")
WORDS = {"one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
CODE_FENCE = re.compile(r"\A\s*```\w*\s*")
DECODER = json.JSONDecoder(strict=False)      # takes line breaks inside strings
# The key "evaluation" and its value, in JSON too broken to be parsed. Notes may hold the word, even in quotes, so it
# counts only if a brace, or a comma and the next key, follows the value. Where a key belongs (after a closing quote or
# bracket, after an opening brace, or on a new line) the end of the line or of the text, or a remark, will do.
EVALUATION = re.compile(r"""
    (?P<in_place> (?: ["'}\]] (?: \s* , )? | [0-9] \s* , | \{ ) \s* | \n [^\S\n]* )?
    (?<!\\) ["'] \s* (?i:evaluation) \s* (?<!\\) ["'] \s* : \s*
    (?: " (?P<quoted> [^"{}\n]{1,80} ) "
      | ["']? (?P<bare> [^\s,{}()\[\]<>"']+ (?: \s* (?: / | (?: out\ )? of ) \s* 5 )? ) ["']? [.)]? )
    (?: (?P<goes_on> \s* , \s* ["'] )
      | (?: \s* , )? \s* [{}\]<]
      | (?(in_place) (?: (?: \s* , )? (?: \s* (?: ``` | \Z ) | [^\S\n]* \n | \s+ (?: [(\[] | /[/*] | \# | [A-Z] ) )
                       | \s*+ ,?+ \s*+ ["']? \w++ ["']? \s* : | \s+ (?: because | since | as | for )\b ) | (?!) ) )
    """, re.VERBOSE)
NEXT_OBJECT = re.compile(r"\}\s*\{")
# The same where it is hardly JSON: a key that lost a quote or both, or has them all escaped, or a line such as
# "**Evaluation:** 4" or a heading. It counts only as the last thing that an answer says.
LABEL = re.compile(r"""
    (?: \A | \n | \{ | ["'] \s* , ) [\ \t\\"'*_\#-]* (?: (?i: overall | final ) [\ ] )? (?i:evaluation)
    (?: [*_\s]* \( 1 \s* (?: - | to ) \s* 5 \) )? (?: [\s\\"'*_]* : [\s\\"'*_]* | [*_]* \n [\s*_]* )
    (?P<value> [0-9]+ (?: \.[0-9]+ )? (?: \s* (?: / | (?: out\ )? of ) \s* 5 )? ) [\s\\"'*_`}\]]* \Z""", re.VERBOSE)
IS_WHOLE = re.compile(r"[.!?)*`]\Z")      # how an answer ends that was not cut off, as far as one can tell


class Reading(NamedTuple):
    """What an answer says: its score, or why it has none."""
    score: float | None
    problem: str | None = None


def read_answer(text: str | None) -> Reading:
    """Return the score that a judge's answer gives, or why it gives none; a score is never guessed.

    The answer is a JSON object or the continuation of one that begins with PREFILLED. It is often broken: line breaks
    and quotes inside the notes, text around the object, a second object, an end in the middle. The first object that
    gives an evaluation counts.

    >>> read_answer('The plot is "odd", but\\nsimple.", "evaluation": "4"} Done.')
    Reading(score=4.0, problem=None)
    >>> read_answer('I would give it an evaluation: 4, if the')
    Reading(score=None, problem='cut off before the evaluation')
    """
    text = CODE_FENCE.sub("", without_thinking(text or "")).strip()
    if not text:
        return Reading(None, "empty")
    values, rest = sound_evaluations(text)
    if values:
        readings = {score_of(value) for value in values}
        return readings.pop() if len(readings) == 1 else Reading(None, "several evaluations")
    # Typographic quotes, full-width characters and line breaks spelled \\n become plain ones, which would have spoiled
    # sound JSON.
    plain = unicodedata.normalize("NFKC", rest.translate(ASCII_PUNCTUATION)).replace("\\n", "\n").replace("\u200b", "")
    value = broken_evaluation(plain.strip())
    if value is None:
        is_whole = "}" in text or IS_WHOLE.search(text)
        return Reading(None, "no evaluation" if is_whole else "cut off before the evaluation")
    return score_of(value)


def without_thinking(text: str) -> str:
    """Return an answer without what a model thought before it; some servers leave out the tag that opens it."""
    return text.rpartition("</think>")[2].partition("<think>")[0]


def sound_evaluations(text: str) -> tuple[list, str]:
    """Return the values of "evaluation" in the first sound JSON object of a text, and what is left to search.

    An object without any is cut out of what is left: what its notes say is no evaluation.
    """
    before, brace, after = text.partition("{")
    for before, candidate in (("", PREFILLED + text), (before, brace + after)):
        if "evaluation" in before.lower():
            break                                 # it may be that of a broken object, which then goes first
        try:
            parsed, end = DECODER.raw_decode(candidate)
            return evaluations_in(parsed), before + candidate[end:]
        except (ValueError, RecursionError):
            continue
    return [], text


def evaluations_in(parsed) -> list:
    """Return the value of "evaluation" in parsed JSON: the object's own, or else those of all objects inside it."""
    if not isinstance(parsed, dict | list):
        return []
    members = list(parsed.items()) if isinstance(parsed, dict) else [("", value) for value in parsed]
    own = [value for key, value in members if key.strip().lower() == "evaluation"]
    return own[-1:] or [found for _, value in members for found in evaluations_in(value)]


def broken_evaluation(text: str) -> str | None:
    """Return the value of "evaluation" in the first object of broken JSON; the last one if it stands there twice."""
    found = None
    for match in EVALUATION.finditer(text):
        if found and NEXT_OBJECT.search(text, found.end() - 1, match.end()):
            break
        if found and found["in_place"] and not match["in_place"]:
            continue                              # in a remark that follows the score
        found = match
        if match["goes_on"] is None:
            break
    if found is None:
        label = LABEL.search(text)
        return label and label["value"]
    # A full stop may be the point of a number that was cut off there.
    return found["quoted"] or found["bare"].rstrip("" if found.end("bare") == len(text) else ".;")


def score_of(value) -> Reading:
    """Return the score that a value of "evaluation" stands for: 4, "4/5", "4: good", "four". Half points are kept."""
    text = unicodedata.normalize("NFKC", str(value)).translate(ASCII_PUNCTUATION).strip(" *\n\"'").lower()
    match = NUMBER.fullmatch(WORDS.get(text, text))
    if match is None or isinstance(value, bool):
        return Reading(None, f"not a number: {value!r:.20}")
    score = float(match[1])
    return Reading(score) if LOWEST <= score <= HIGHEST else Reading(None, f"outside {LOWEST} to {HIGHEST}: {text:.20}")


# ---------------------------------------------------------------- report


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
    by_name = answers.read_json(path)
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


def judgement_of(answer, place: int, where: str) -> Judgement:
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

    A check is the comparison with one kind; its "is_separated" says whether real text is better by more than chance.
    """
    return {"checks": checks, "are_separated": all(check["is_separated"] for check in checks)} if checks else None


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
    names = [name for name in by_name if not checks or name not in DAMAGED]
    return {"names": {name: summarise(value) for name, value in judgements.items()},
            "pairs": compared(list(combinations(names, 2))),
            "retest": retest_noise(judgements), "controls": controls_of(checks)}
