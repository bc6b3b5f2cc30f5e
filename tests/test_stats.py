"""Statistics: cases worked by hand."""
import math
import time

import numpy as np
import pytest
from scipy.stats import norm

import stats


def test_mean_interval_of_many_values_is_that_of_the_normal_distribution():
    values = np.random.default_rng(0).normal(3, 1, 400)
    error = values.std() / 20
    low, high = stats.mean_interval(values)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.015)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.015)


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(100):
        low, high = stats.mean_interval(rng.normal(0, 1, 40))
        hits += low <= 0 <= high
    assert 88 <= hits <= 99            # 95 expected


@pytest.mark.parametrize("interval", [
    lambda: stats.mean_interval([4.0]), lambda: stats.mean_interval([]), lambda: stats.difference_interval([1, 2], [3]),
    lambda: stats.ratio_interval([5], [2])])
def test_interval_of_too_few_values_is_not_made_up(interval):
    assert all(map(math.isnan, interval()))


def test_interval_without_spread_is_the_value():
    assert stats.mean_interval([5, 5, 5]) == (5, 5)
    assert stats.difference_interval([5, 5], [3, 3, 3]) == (2, 2)


def test_same_scores_give_same_interval():
    assert stats.mean_interval([1, 2, 3, 5, 5]) == stats.mean_interval([1, 2, 3, 5, 5])


def test_ratio_interval_weighs_items_by_their_counts():
    # Nine bulletins of 1 nat a token, one that is nine times as long with 2: 18 tokens, 27 nats, 1.5 a token.
    totals, counts = [1.0] * 9 + [18.0], [1] * 9 + [9]
    low, high = stats.ratio_interval(totals, counts)
    assert 1.0 <= low < 1.5 < high <= 2.0
    assert stats.ratio_interval([2, 4, 6], [1, 2, 3]) == (2, 2)


def test_ratio_interval_leaves_out_items_that_count_nothing():
    assert stats.ratio_interval([1, 0, 3, 2], [1, 0, 2, 2]) == stats.ratio_interval([1, 3, 2], [1, 2, 2])


def test_sign_flip_by_hand():
    # All 8 sign patterns of 1, 2, 3: sums 6 4 2 0 0 -2 -4 -6; one of 8 is as high as 6, twice for two sides.
    assert stats.sign_flip_test([1, 2, 3]) == pytest.approx(2 / 8)
    # 1, 1, -1 sums to 1; of 8 patterns four sum to 1 or more: everything is as extreme.
    assert stats.sign_flip_test([1, 1, -1]) == 1.0
    assert stats.sign_flip_test([-1] * 6) == pytest.approx(2 / 64)
    assert stats.sign_flip_test([0, 0, 0]) == 1.0
    assert math.isnan(stats.sign_flip_test([1]))


def test_two_sample_by_hand():
    # Of the C(6, 3) = 20 splits of 1..6 one puts 1, 2, 3 together, twice for two sides.
    assert stats.two_sample_test([1, 2, 3], [4, 5, 6]) == pytest.approx(2 / 20)
    assert stats.two_sample_test([1, 2], [1, 2]) == 1.0
    assert math.isnan(stats.two_sample_test([1, 2, 3], [4]))


def test_nan_among_the_values_gives_nan():
    assert math.isnan(stats.sign_flip_test([1, math.nan, 2]))
    assert math.isnan(stats.two_sample_test([1, 2], [3, math.nan]))
    assert all(map(math.isnan, stats.mean_interval([1, math.nan, 2])))
    assert math.isnan(stats.smallest_detectable_difference([1, math.nan, 2]))


def test_pairing_finds_what_a_two_sample_test_misses():
    headlines = np.random.default_rng(0).normal(0, 3, 40)
    a, b = headlines + 0.5, headlines + np.random.default_rng(1).normal(0, 0.5, 40)
    assert stats.sign_flip_test(a - b) < 0.001
    assert stats.two_sample_test(a, b) > 0.2


def test_resampled_tests_agree_with_the_normal_approximation_and_never_say_zero():
    rng = np.random.default_rng(2)
    a, b = rng.normal(0, 1, 128), rng.normal(0.25, 1, 128)
    z = (a.mean() - b.mean()) / math.sqrt(a.var(ddof=1) / 128 + b.var(ddof=1) / 128)
    assert stats.two_sample_test(a, b) == pytest.approx(2 * norm.sf(abs(z)), abs=0.01)
    assert stats.two_sample_test(a, a + 10) == pytest.approx(2 / (stats.N_PERMUTATIONS + 1))
    assert stats.sign_flip_test([1.0] * 100) == pytest.approx(2 / (stats.N_PERMUTATIONS + 1))


def test_holm_by_hand():
    # 0.01 * 4; 0.02 * 3 = 0.06; 0.03 * 2 = 0.06; 0.04 * 1 = 0.04, but not below the one before.
    assert stats.holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert stats.holm([0.6, 0.7]) == [1.0, 1.0]
    assert stats.holm([]) == []
    adjusted = stats.holm([math.nan, 0.02])
    assert math.isnan(adjusted[0]) and adjusted[1] == 0.02


def test_smallest_detectable_difference_by_hand():
    # Variance 1 on 100 pairs: standard error 0.1; 1.96 + 0.84 of it, a little more as t has heavier tails.
    differences = [-1, 1] * 50
    scale = math.sqrt(100 / 99)
    assert stats.smallest_detectable_difference(differences) == pytest.approx(0.1 * scale * 2.8, rel=0.02)
    assert stats.smallest_detectable_difference(differences, differences) == pytest.approx(
        0.1 * scale * 2.8 * math.sqrt(2), rel=0.02)
    # Of 40 and 100 values with standard deviations 0.5 and 1.2: (1.977 * 0.1971 + 0.844 * 0.1438), by hand.
    few = [-0.5 * math.sqrt(39 / 40), 0.5 * math.sqrt(39 / 40)] * 20
    many = [-1.2 * math.sqrt(0.99), 1.2 * math.sqrt(0.99)] * 50
    assert stats.smallest_detectable_difference(few, many) == pytest.approx(0.511, abs=0.002)
    at_one_percent = stats.smallest_detectable_difference(differences, alpha=0.01)
    assert at_one_percent > stats.smallest_detectable_difference(differences)
    assert math.isnan(stats.smallest_detectable_difference([1]))
    assert math.isnan(stats.smallest_detectable_difference([2, 2, 2]))


def test_no_difference_is_detectable_where_no_p_value_could_be_small_enough():
    # The smallest p-value of n pairs is 2 / 2^n: 0.0625 of 5, 0.03125 of 6.
    assert math.isnan(stats.smallest_detectable_difference([4, 3, 4, 4, 3]))
    assert stats.smallest_detectable_difference([4, 3, 4, 4, 3, 3]) > 0
    assert math.isnan(stats.smallest_detectable_difference([4, 3, 4, 4, 3, 3], alpha=0.03))
    # Of 3 against 3, 2 / C(6, 3) = 0.1; of 4 against 4, 2 / C(8, 4) = 0.029.
    assert math.isnan(stats.smallest_detectable_difference([1, 2, 3], [4, 5, 6]))
    assert stats.smallest_detectable_difference([1, 2, 3, 3], [4, 5, 6, 6]) > 0
    assert stats.smallest_detectable_difference([1, 2] * 2000, [2, 3] * 2000) > 0


def test_smallest_detectable_difference_is_found_that_often():
    rng, found = np.random.default_rng(3), 0
    effect = stats.smallest_detectable_difference(np.resize([-1.0, 1.0], 30))
    for _ in range(50):
        found += stats.sign_flip_test(rng.normal(effect, 1, 30)) < 0.05
    assert 32 <= found <= 48           # 40 expected


def test_thousands_of_bulletins_take_seconds():
    rng = np.random.default_rng(4)
    start = time.monotonic()
    stats.ratio_interval(rng.normal(100, 10, 4000), rng.integers(50, 100, 4000))
    assert time.monotonic() - start < 20
