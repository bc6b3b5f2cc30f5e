"""The statistics behind every comparison: bootstrap intervals, permutation tests, Holm's correction, power.

A mean of n scores says little without its interval, and two intervals that overlap do not say that two means are
equal: a difference has its own interval and its own test. scipy does the resampling, with a fixed seed, so that the
same scores give the same numbers. What cannot be computed (too few scores, no spread) is nan, never a made-up number.
"""
import math
import warnings
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

N_RESAMPLES = 9999            # of a bootstrap
N_PERMUTATIONS = 49_999       # standard error 0.0008 at p = 0.03; no p-value is below 2 / (N_PERMUTATIONS + 1)
BATCH_ELEMENTS = 4_000_000    # numbers resampled at a time: what bounds memory

Interval = tuple[float, float]


def mean_interval(values: Sequence[float], confidence: float = 0.95, seed: int = 0) -> Interval:
    """Return the bootstrap interval of a mean; (nan, nan) for fewer than two values."""
    return _bootstrap([values], lambda x, axis: x.mean(axis), confidence, seed)


def ratio_interval(totals: Sequence[float], counts: Sequence[float], confidence: float = 0.95,
                   seed: int = 0) -> Interval:
    """Return the bootstrap interval of sum(totals) / sum(counts), resampling whole items.

    For a loss in nats per token: totals are the nats of each bulletin, counts its tokens. Tokens of one bulletin are
    not independent, so that resampling tokens would give too narrow an interval.
    """
    kept = [(total, count) for total, count in zip(totals, counts, strict=True) if count > 0]
    return _bootstrap([[total for total, _ in kept], [count for _, count in kept]],
                      lambda x, y, axis: x.sum(axis) / y.sum(axis), confidence, seed, is_paired=True)


def difference_interval(a: Sequence[float], b: Sequence[float], confidence: float = 0.95, seed: int = 0) -> Interval:
    """Return the bootstrap interval of mean(a) - mean(b) of two independent samples.

    For paired scores, use mean_interval on their differences.
    """
    return _bootstrap([a, b], _mean_difference, confidence, seed)


def _mean_difference(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
    return x.mean(axis) - y.mean(axis)


def _bootstrap(samples: Sequence[Sequence[float]], statistic: Callable, confidence: float, seed: int,
               is_paired: bool = False) -> Interval:
    if min(map(len, samples)) < 2:
        return math.nan, math.nan
    samples = [np.asarray(sample, float) for sample in samples]
    # BCa allows for the skew of scores that crowd at the end of their scale, but is undefined where nothing varies.
    for method in ("BCa", "percentile"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = stats.bootstrap(samples, statistic, paired=is_paired, confidence_level=confidence, method=method,
                                     n_resamples=N_RESAMPLES, batch=_batch(samples), rng=np.random.default_rng(seed))
        low, high = map(float, result.confidence_interval)
        if math.isfinite(low) and math.isfinite(high):
            break
    return low, high


def _batch(samples: Sequence[Sequence[float]]) -> int:
    return max(1, BATCH_ELEMENTS // sum(map(len, samples)))


def sign_flip_test(differences: Sequence[float], seed: int = 0) -> float:
    """Return the two-sided p-value of paired differences having mean zero; nan for fewer than two.

    If the two of a pair are alike, each difference could as well have had the other sign. Exact up to 15 pairs
    (2^15 sign patterns), by random patterns beyond.
    """
    return _permutation([differences], lambda x, axis: x.mean(axis), "samples", seed)


def two_sample_test(a: Sequence[float], b: Sequence[float], seed: int = 0) -> float:
    """Return the two-sided p-value of two independent samples having the same mean; nan for fewer than two in one.

    If they are alike, any split of all values into two groups of these sizes is as likely as the one seen.
    """
    return _permutation([a, b], _mean_difference, "independent", seed)


def _permutation(samples: Sequence[Sequence[float]], statistic: Callable, kind: str, seed: int) -> float:
    if min(map(len, samples)) < 2:
        return math.nan
    samples = [np.asarray(sample, float) for sample in samples]
    if any(np.isnan(sample).any() for sample in samples):
        return math.nan                        # scipy would say 0
    result = stats.permutation_test(samples, statistic, permutation_type=kind, n_resamples=N_PERMUTATIONS,
                                    batch=_batch(samples), rng=np.random.default_rng(seed))
    return float(result.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p-values, in the order given: the chance of even one false find is kept at their level.

    A nan (a test that could not be made) stays nan and does not count as a test.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    made = sorted((p, place) for place, p in enumerate(p_values) if not math.isnan(p))
    adjusted, highest = [math.nan] * len(p_values), 0.0
    for rank, (p, place) in enumerate(made):
        highest = max(highest, min(1.0, p * (len(made) - rank)))      # never below that of a smaller p-value
        adjusted[place] = highest
    return adjusted


def smallest_detectable_difference(a: Sequence[float], b: Sequence[float] | None = None, alpha: float = 0.05,
                                   power: float = 0.8) -> float:
    """Return the true difference of means that a two-sided test at alpha would find with this power.

    `a` alone holds paired differences; with `b`, the two are independent samples. It takes the spread and the sizes
    seen, not the difference seen. nan for fewer than two values in one, or without spread, and where so few values
    cannot give a p-value below alpha, however much they differ.
    """
    samples = [a] if b is None else [a, b]
    n_patterns = 2 ** len(a) if b is None else math.comb(len(a) + len(b), len(a))       # of signs, or splits
    if min(map(len, samples)) < 2 or 2 / n_patterns >= alpha:
        return math.nan
    variances, freedom = [np.var(sample, ddof=1) for sample in samples], sum(map(len, samples)) - len(samples)
    # Where two samples are permuted, the test sees the spread of both together; the difference has its own.
    pooled = sum(variance * (len(sample) - 1) for variance, sample in zip(variances, samples)) / freedom
    tested = math.sqrt(sum(pooled / len(sample) for sample in samples))
    standard_error = math.sqrt(sum(variance / len(sample) for variance, sample in zip(variances, samples)))
    detectable = tested * stats.t.ppf(1 - alpha / 2, freedom) + standard_error * stats.t.ppf(power, freedom)
    return float(detectable) if detectable > 0 else math.nan
