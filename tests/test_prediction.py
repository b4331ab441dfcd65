"""Rank correlations of columns, and groups predicted from the others: nothing of what is predicted is seen."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from src.prediction import _percentiles, association, association_gain, predict_left_out, rank_correlation

GROUPS = ("p", "q", "r")


def table(seed: int = 0, n: int = 12) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    parts = [pd.DataFrame(rng.normal(size=(n, 3)), columns=["a", "b", "noise"]).assign(group=group) for group in GROUPS]
    return pd.concat(parts, ignore_index=True)


def within(predicted: pd.DataFrame) -> list[float]:
    return [association(part["predicted"], part["target"]).value for _, part in predicted.groupby("group")]


def test_what_is_constant_orders_nothing() -> None:
    assert (association([1, 1, 1], [1, 2, 3]).value, association([1, 2, 3], [np.inf] * 3).value) == (0, 0)
    same = association([1, 1, 1], [1, 2, 3])
    assert (same.lo, same.hi) == (0, 0)


def test_rank_correlations_are_scipys_with_ties_and_infinities() -> None:
    x, y = table(n=20)["a"].round(), table(n=20)["b"].round(1).where(lambda b: b < 1, np.inf)
    assert rank_correlation(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, rel=1e-12)
    assert rank_correlation(x, -(x**3)) == pytest.approx(-1)


def test_intervals_stay_between_minus_one_and_one() -> None:
    x = np.arange(5.0)
    assert (association(x, x).lo, association(x, x).hi) == (1, 1)
    nearly = association(x, [0, 2, 1, 3, 4])
    assert nearly.lo < nearly.value < nearly.hi == 1


def test_intervals_cover_where_the_relation_does_not_rise() -> None:
    """y is largest in the middle of x, ρ = 0: normal theory's intervals hold it in 88% of the draws."""
    rng, hits = np.random.default_rng(0), {"jackknife": 0, "normal theory": 0}
    for _ in range(200):
        x = rng.normal(size=40)
        y = 0.3 * rng.normal(size=40) - np.abs(x)
        found = association(x, y)
        hits["jackknife"] += found.lo <= 0 <= found.hi
        hits["normal theory"] += abs(np.arctanh(found.value)) <= stats.norm.ppf(0.975) * np.sqrt((1 + found.value**2 / 2) / 37)
    assert hits["jackknife"] >= 0.92 * 200
    assert hits["normal theory"] < 0.92 * 200


def test_a_gain_is_a_difference_of_correlations_and_changes_sign() -> None:
    x = table(n=20)
    target = x["a"] + 0.1 * x["noise"]
    forth, back = association_gain(x["a"], x["b"], target), association_gain(x["b"], x["a"], target)
    assert forth.value == pytest.approx(stats.spearmanr(x["a"], target).statistic - stats.spearmanr(x["b"], target).statistic)
    assert forth.lo > 0 > back.hi
    assert (forth.value, forth.lo) == pytest.approx((-back.value, -back.hi))
    same = association_gain(x["a"], x["a"] ** 3, target)
    assert (same.value, same.lo, same.hi) == (0, 0, 0)


def test_what_foretells_everywhere_is_chosen_and_orders_the_group_left_out() -> None:
    found = table().assign(target=lambda x: x["a"] ** 3, a=lambda x: x["a"].where(x["a"] < 1.5, np.inf))
    predicted = predict_left_out(found, ["noise", "a"], "target", "group")
    assert predicted["chosen"].str.startswith("a").all()
    assert min(within(predicted)) > 0.9
    assert predicted.index.tolist() == found.index.tolist()


def test_two_columns_are_chosen_where_both_count() -> None:
    predicted = predict_left_out(table().assign(target=lambda x: x["a"] - x["b"]), ["noise", "a", "b"], "target", "group")
    assert predicted["chosen"].map(lambda chosen: {"a", "b"} <= set(chosen.split(" + "))).all()
    assert min(within(predicted)) > 0.8


def test_a_group_that_goes_the_other_way_is_foretold_wrongly() -> None:
    sign = {"p": 1, "q": 1, "r": -1}
    predicted = predict_left_out(table().assign(target=lambda x: x["a"] * x["group"].map(sign)), ["a"], "target", "group")
    assert within(predicted)[2] < -0.9


def test_neither_choice_nor_fit_sees_what_is_predicted() -> None:
    before = table().assign(target=lambda x: x["a"] + 0.3 * x["noise"])
    after = before.assign(target=before["target"].where(before["group"] != "q", np.arange(len(before))))
    first, second = (predict_left_out(x, ["a", "b", "noise"], "target", "group") for x in (before, after))
    left_out = before["group"] == "q"
    pd.testing.assert_frame_equal(first.loc[left_out, ["predicted", "chosen"]], second.loc[left_out, ["predicted", "chosen"]])
    assert not first.loc[~left_out, "predicted"].equals(second.loc[~left_out, "predicted"])


def test_equal_draws_tie() -> None:
    equal = table().assign(a=1.0, target=lambda x: x["b"])
    assert set(predict_left_out(equal, ["a"], "target", "group").groupby("group")["predicted"].agg(np.ptp)) == {0}


def test_percentiles_count_what_is_below() -> None:
    known, values = [3.0, 1.0, 1.0, np.inf], [0.0, 1.0, 2.0, 3.0, np.inf, -np.inf]
    naive = [(sum(k < v for k in known) + sum(k == v for k in known) / 2) / 4 for v in values]
    assert _percentiles(pd.Series(known), pd.Series(values)).tolist() == naive == [0, 0.25, 0.5, 0.625, 0.875, 0]


def test_two_groups_leave_nothing_to_choose_on() -> None:
    with pytest.raises(ValueError, match="three groups, got 2"):
        predict_left_out(table().assign(target=0.0).query("group != 'q'"), ["a"], "target", "group")


def test_within_strata_what_lies_between_them_counts_for_nothing() -> None:
    """x is the stratum and y rises with it; within one they are opposed."""
    strata = np.repeat([1.0, 2.0, 3.0], 10)
    x, y = strata + np.tile(np.arange(10), 3) / 100, strata - np.tile(np.arange(10), 3) / 100
    assert rank_correlation(x, y) > 0.7
    assert rank_correlation(x, y, strata) == pytest.approx(-1)
    assert rank_correlation(strata, y, strata) == 0
    assert rank_correlation(x, y, np.zeros(30)) == rank_correlation(x, y)
    found = association(x, y, strata)
    assert (found.value, found.lo, found.n) == (pytest.approx(-1), -1.0, 30)
