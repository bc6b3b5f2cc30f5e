"""A judge's choices between two stories on one headline, each pair shown in both orders.

`evaluate.py judge --pairwise` asks for them; `evaluate.py report` prints the report that is made here.
"""
import math
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import stats
from files import read_json
from judgements import ALPHA, DAMAGED, REAL, controls_of, n_tested, with_holm
from verdicts import read_better


class Preference(NamedTuple):
    headline: str
    first: str                # whose story stood first
    second: str
    value: float | None       # 1 where the first was found better, 0.5 for a tie; None where the answer does not say


def read_preferences(path: Path) -> list[Preference]:
    """Read [{"headline", "first", "second", "text"}, ...]; raise ValueError that names the entry."""
    preferences = []
    for place, entry in enumerate(read_json(path), 1):
        fields = [entry.get(name) for name in ("headline", "first", "second")] if isinstance(entry, dict) else [None]
        if not all(isinstance(field, str) for field in fields) or not isinstance(entry.get("text", 0), str | None):
            raise ValueError(f"{path}: entry {place}: expected headline, first, second and text, all strings "
                             "(text null if no answer came)")
        preferences.append(Preference(*fields, read_better(entry["text"])))
    if not preferences:
        raise ValueError(f"{path}: no answers")
    return preferences


def compare(preferences: list[Preference], a: str, b: str) -> dict:
    """Return how often a is preferred to b, a tie counting half, with interval and test against one half.

    A headline counts once, and only with a choice from both orders, so that a judge who likes the first place favors
    nobody.
    """
    orders: dict[str, tuple[list[float], list[float]]] = {}
    for headline, first, second, value in preferences:
        if {first, second} == {a, b} and value is not None:
            orders.setdefault(headline, ([], []))[first == b].append(value if first == a else 1 - value)
    shares = [[sum(values) / len(values) for values in both] for both in orders.values() if all(both)]
    means = [sum(both) / 2 for both in shares]
    low, high = stats.mean_interval(means)
    n_agreeing = sum((x - 0.5) * (y - 0.5) > 0 or x == y == 0.5 for x, y in shares)
    return {"a": a, "b": b, "n": len(means), "share": sum(means) / len(means) if means else math.nan, "low": low,
            "high": high, "p": stats.sign_flip_test([mean - 0.5 for mean in means]),
            "agree": n_agreeing / len(shares) if shares else math.nan}


def report_of(preferences: list[Preference]) -> dict:
    """Return {"pairs": [comparison, ...], "position": how often the first place won, "controls": checks}."""
    seen = {frozenset((p.first, p.second)) for p in preferences}
    names = list(dict.fromkeys(name for p in preferences for name in (p.first, p.second)))
    checks = with_holm([compare(preferences, REAL, damaged) for damaged in DAMAGED if {REAL, damaged} in seen])
    for check in checks:
        check["is_separated"] = check["share"] > 0.5 and check["p_holm"] < ALPHA
        check["is_too_few"] = 2 * 0.5 ** check["n"] * n_tested(checks) >= ALPHA       # even where all prefer the real
    pairs = with_holm([compare(preferences, a, b) for a, b in combinations(names, 2)
                       if {a, b} in seen and not {a, b} & set(DAMAGED)])
    values = [p.value for p in preferences]
    decided = [value for value in values if value in (0, 1)]
    return {"n_answers": len(values), "n_unclear": values.count(None), "pairs": pairs, "controls": controls_of(checks),
            "position": {"n_decided": len(decided), "first": sum(decided) / len(decided) if decided else math.nan}}
