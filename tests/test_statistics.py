"""Intervals against hand formulas, their coverage by simulation, and what they refuse."""

import math
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from src.statistics import Estimate, exactly, greatest, jackknife, least, paired, paired_difference, slope, t_interval, widening

T4 = 2.7764451051977987  # 97.5% point of Student's t at 4 degrees of freedom, from tables
SAMPLE = [1.0, 2.0, 4.0, 7.0, 11.0]
samples = arrays(np.float64, 6, elements=st.floats(-10, 10, width=32))
few = settings(max_examples=25, deadline=None)


def naive_t(values: list[float], t: float) -> tuple[float, float, float]:
    n = len(values)
    mean = sum(values) / n
    variance = sum((v - mean) ** 2 for v in values) / (n - 1)
    half = t * math.sqrt(variance / n)
    return mean, mean - half, mean + half


def numbers(estimate: Estimate) -> tuple[float, float, float]:
    return estimate.value, estimate.lo, estimate.hi


def test_t_interval_is_the_hand_formula() -> None:
    estimate = t_interval(SAMPLE)
    assert numbers(estimate) == pytest.approx(naive_t(SAMPLE, T4), rel=1e-12)
    assert (estimate.n, estimate.method) == (5, "t 95%")
    assert numbers(estimate) != pytest.approx(naive_t(SAMPLE, 1.96), rel=1e-2)  # the normal quantile is too short


def test_t_interval_takes_series_lists_and_tensors() -> None:
    assert t_interval(pd.Series(SAMPLE)) == t_interval(SAMPLE) == t_interval(torch.tensor(SAMPLE, dtype=torch.float64))


def test_one_draw_bounds_nothing() -> None:
    assert numbers(t_interval([3.0])) == (3.0, -math.inf, math.inf)


def test_t_interval_covers_what_it_says_at_five_draws_and_the_normal_one_does_not() -> None:
    draws = np.random.default_rng(0).normal(1.0, 2.0, size=(1500, 5))
    intervals = [t_interval(row) for row in draws]
    covered = np.mean([e.lo <= 1.0 <= e.hi for e in intervals])
    assert covered == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 1500))
    shorter = np.mean([abs(e.value - 1.0) <= (e.hi - e.value) * 1.96 / T4 for e in intervals])
    assert shorter < 0.9


@few
@given(samples, st.floats(0.125, 8, width=32), st.floats(-5, 5, width=32))
def test_t_interval_moves_and_scales_with_the_sample(x: np.ndarray, scale: float, shift: float) -> None:
    moved = [scale * v + shift for v in numbers(t_interval(x))]
    assert numbers(t_interval(scale * x + shift)) == pytest.approx(moved, abs=1e-9)


@few
@given(samples)
def test_more_confidence_is_a_wider_interval(x: np.ndarray) -> None:
    narrow, wide = t_interval(x, 0.5), t_interval(x, 0.99)
    assert wide.lo <= narrow.lo <= narrow.value <= narrow.hi <= wide.hi


def test_slope_is_that_of_scipy() -> None:
    x, y = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 0.0, 4.0, 3.0, 7.0, 6.0]
    fit = stats.linregress(x, y)
    half = T4 * fit.stderr
    assert numbers(slope(x, y)) == pytest.approx((fit.slope, fit.slope - half, fit.slope + half), rel=1e-12)


def test_slope_of_points_on_a_line_is_certain() -> None:
    assert numbers(slope([0.0, 1.0, 2.0], [1.0, 3.0, 5.0])) == (2.0, 2.0, 2.0)
    assert numbers(slope([0.0, 1.0, 2.0], [1.0, 1.0, 1.0])) == (0.0, 0.0, 0.0)


@few
@given(samples, st.floats(0.125, 8, width=32), st.floats(-5, 5, width=32))
def test_slope_scales_with_y_and_ignores_its_shift(y: np.ndarray, scale: float, shift: float) -> None:
    x = np.arange(6.0)
    assert numbers(slope(x, scale * y + shift)) == pytest.approx([scale * v for v in numbers(slope(x, y))], abs=1e-9)


def test_slope_covers_what_it_says() -> None:
    rng, x = np.random.default_rng(2), np.arange(5.0)
    intervals = [slope(x, 3 * x + rng.normal(size=5)) for _ in range(1000)]
    assert np.mean([e.lo <= 3 <= e.hi for e in intervals]) == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 1000))


def test_two_points_have_a_slope_without_bounds() -> None:
    assert numbers(slope([0.0, 2.0], [1.0, 5.0])) == (2.0, -math.inf, math.inf)


@pytest.mark.parametrize("x", [[1.0, 1.0, 1.0], [1.0]])
def test_slope_refuses_equal_x(x: list[float]) -> None:
    with pytest.raises(ValueError, match="two different x"):
        slope(x, [1.0, 2.0, 3.0][: len(x)])


def test_paired_difference_sees_what_unpaired_noise_hides() -> None:
    seeds = np.random.default_rng(3).normal(0, 10, size=8)
    noise = np.random.default_rng(4).normal(0, 0.1, size=8)
    difference = paired_difference(seeds + 1 + noise, seeds)
    expected = naive_t(list(1 + noise), float(stats.t.ppf(0.975, 7)))
    assert numbers(difference) == pytest.approx(expected, rel=1e-9)
    assert difference.lo > 0
    assert difference.method == "paired t 95%"
    assert paired_difference(seeds + 1 + noise, np.roll(seeds, 1)).lo < 0  # the wrong order loses it


@few
@given(samples, samples)
def test_paired_difference_changes_sign_with_its_arguments(a: np.ndarray, b: np.ndarray) -> None:
    forth, back = paired_difference(a, b), paired_difference(b, a)
    assert numbers(forth) == (-back.value, -back.hi, -back.lo)


@pytest.mark.parametrize("compare", [paired_difference, slope])
def test_pairs_have_one_length(compare) -> None:
    with pytest.raises(ValueError, match="got 3 and 2 values"):
        compare([1.0, 2.0, 3.0], [1.0, 2.0])


def test_least_and_greatest_are_draws_known_exactly() -> None:
    assert least(SAMPLE) == Estimate(1.0, 1.0, 1.0, 5, "least draw")
    assert greatest(SAMPLE) == Estimate(11.0, 11.0, 11.0, 5, "greatest draw")
    assert numbers(least([-math.inf, 1.0, 2.0])) == (-math.inf,) * 3
    assert numbers(greatest([1.0, math.inf, 2.0])) == (math.inf,) * 3


@few
@given(samples)
def test_the_greatest_is_minus_the_least_of_the_negatives(x: np.ndarray) -> None:
    assert greatest(x).value == -least(-x).value
    assert least(x).value <= t_interval(x).value + 1e-9
    assert t_interval(x).value <= greatest(x).value + 1e-9


def test_a_number_that_no_draw_decides_is_exact() -> None:
    assert exactly(0.5) == Estimate(0.5, 0.5, 0.5, 1, "exact")
    with pytest.raises(ValueError, match="1 of 1 values are NaN"):
        exactly(math.nan)


@pytest.mark.parametrize(
    "of",
    [
        t_interval,
        least,
        greatest,
        lambda x: slope(x, x),
        lambda x: slope(range(12), x),
        lambda x: paired_difference(range(12), x),
    ],
)
def test_nan_is_refused_and_counted(of) -> None:
    with pytest.raises(ValueError, match="2 of 12 values are NaN"):
        of([math.nan, math.nan, *range(10)])


def test_infinite_values_have_no_mean() -> None:
    with pytest.raises(ValueError, match="1 of 2 values are infinite"):
        t_interval([1.0, math.inf])


@pytest.mark.parametrize("values", [[], [[1.0, 2.0]]])
def test_a_sample_is_one_axis_with_something_on_it(values) -> None:
    with pytest.raises(ValueError, match="at least one value"):
        t_interval(values)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0])
def test_confidence_is_a_fraction(confidence: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        t_interval(SAMPLE, confidence)


def each(statistic: Callable[[np.ndarray], float]) -> Callable[[np.ndarray], np.ndarray]:
    """A statistic of one sample, of each of many."""
    return lambda samples: np.array([statistic(one) for one in samples.reshape(-1, *samples.shape[-2:])]).reshape(samples.shape[:-2])


def test_the_jackknife_of_a_mean_is_the_t_interval() -> None:
    assert numbers(jackknife(lambda samples: samples.mean(-1), SAMPLE)) == pytest.approx(numbers(t_interval(SAMPLE)), rel=1e-12)


def test_the_jackknife_agrees_with_the_bootstrap_on_a_difference_of_correlations() -> None:
    rng = np.random.default_rng(8)
    common, a, b, noise = rng.normal(size=(4, 150))
    draws = np.column_stack([common + 0.5 * a, common + 2 * b, common + noise])

    def difference(rows: np.ndarray) -> float:
        return stats.spearmanr(rows[:, 0], rows[:, 2]).statistic - stats.spearmanr(rows[:, 1], rows[:, 2]).statistic

    found = jackknife(each(difference), draws)
    bootstrap = np.std([difference(draws[rng.integers(150, size=150)]) for _ in range(400)])
    assert found.value == pytest.approx(difference(draws))
    assert (found.hi - found.value) / stats.t.ppf(0.975, 149) == pytest.approx(bootstrap, rel=0.2)
    assert found.n == 150


def test_the_jackknife_covers_a_difference_of_correlations() -> None:
    rng, covered = np.random.default_rng(9), []

    def difference(rows: np.ndarray) -> float:
        return stats.spearmanr(rows[:, 0], rows[:, 2]).statistic - stats.spearmanr(rows[:, 1], rows[:, 2]).statistic

    for _ in range(100):
        common, a, b = rng.normal(size=(3, 25))
        found = jackknife(each(difference), np.column_stack([common + a, common + b, common]))  # the two have equal correlations
        covered.append(found.lo <= 0 <= found.hi)
    assert np.mean(covered) == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 100))


def test_one_draw_has_no_jackknife() -> None:
    with pytest.raises(ValueError, match="two draws"):
        jackknife(lambda samples: samples.mean(-1), [1.0])


def test_paired_values_are_those_of_the_same_seed():
    nets = pd.DataFrame({"seed": [0, 1, 2, 0], "kind": ["a", "a", "a", "b"], "value": [1.0, 2.0, 3.0, 4.0]})
    others = pd.DataFrame({"seed": [1, 0], "value": [0.5, 0.25]})
    pairs = paired(nets, others, ["seed"])
    assert pairs.to_dict("list") == {
        "seed": [0, 1, 0],
        "kind": ["a", "a", "b"],
        "value": [0.75, 1.5, 3.75],
        "value_other": [0.25, 0.5, 0.25],
    }
    with pytest.raises(pd.errors.MergeError):
        paired(nets, pd.concat([others, others]), ["seed"])


def test_simultaneous_intervals_are_wider_by_bonferroni():
    t = stats.t.ppf([0.975, 1 - 0.05 / 2 / 7], 3)
    assert widening([3, 0, 3], 7) == pytest.approx([t[1] / t[0], 1, t[1] / t[0]])
    assert widening([5], 1) == pytest.approx([1])


def test_the_degrees_of_freedom_go_with_the_interval():
    assert t_interval(SAMPLE).freedom == 4
    assert t_interval([1.0]).freedom == 0
    assert slope([0, 1, 2], [0, 1, 3]).freedom == 1
    assert greatest(SAMPLE).freedom == 0
