"""Which columns of a table foretell another: rank correlations, and the prediction of groups that were left out."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from jaxtyping import Float64
from numpy.typing import ArrayLike
from scipy.stats import rankdata

from src.statistics import Estimate, jackknife


def rank_correlation(x: ArrayLike, y: ArrayLike, strata: ArrayLike | None = None) -> float:
    """Spearman's ρ; 0 where all x or all y are equal, and so order nothing. Ties share their mean rank, infinities are the extremes.

    Given strata, what is ranked is compared within each alone: ranks run from −½ to ½ in every stratum.
    """
    a, b = (_centred_ranks(np.asarray(values), np.zeros(np.size(values)) if strata is None else np.asarray(strata)) for values in (x, y))
    scale = np.sqrt((a @ a) * (b @ b))
    return float(np.clip(a @ b / scale, -1, 1)) if scale else 0.0


def _centred_ranks(values: np.ndarray, strata: np.ndarray) -> Float64[np.ndarray, " n"]:
    ranks = np.empty(values.size)
    for stratum in np.unique(strata):
        here = strata == stratum
        ranks[here] = (rankdata(values[here]) - (here.sum() + 1) / 2) / here.sum()
    return ranks


def association(x: ArrayLike, y: ArrayLike, strata: ArrayLike | None = None) -> Estimate:
    """Spearman's ρ in the jackknife's interval, cut to [−1, 1]; given strata, ρ within them.

    Intervals from normal theory (Bonett & Wright 2000) cover too little where y depends on x but does not rise with it, as on a product
    whose best value lies between its extremes: about 88% in place of 95%.

    Args:
        x: n independent draws.
        y: as many, of the same draws.
        strata: what is held fixed, of the same draws.
    """
    draws = np.column_stack([x, y] if strata is None else [x, y, strata])
    found = jackknife(lambda draws: rank_correlation(*draws.T), draws)
    return replace(found, lo=max(found.lo, -1.0), hi=min(found.hi, 1.0))


def association_gain(better: ArrayLike, worse: ArrayLike, target: ArrayLike) -> Estimate:
    """ρ(better, target) − ρ(worse, target) over the same draws, by the jackknife."""

    def gain(draws: np.ndarray) -> float:
        first, second, reached = draws.T
        return rank_correlation(first, reached) - rank_correlation(second, reached)

    return jackknife(gain, np.column_stack([better, worse, target]))


def predict_left_out(table: pd.DataFrame, columns: Sequence[str], target: str, group: str) -> pd.DataFrame:
    """Predict the target of each group from the other groups alone.

    Least squares on percentiles. Columns are chosen forwards on the other groups, by the mean ρ when each of those is left out in its turn:
    neither the choice nor the fit sees what is predicted (nested cross-validation, Varma & Simon 2006).

    Args:
        table: a row a draw; infinities may stand in the columns.
        columns: that may be chosen.
        target: what is predicted.
        group: the column whose values are left out one by one, at least three of them.

    Returns: the table, in the order of the groups, with the columns predicted and chosen.
    Raises: ValueError, if there are fewer than three groups.
    """
    if table[group].nunique() < 3:
        raise ValueError(f"a nested choice needs three groups, got {table[group].nunique()}")
    parts = []
    for others, left_out in _folds(table, group):
        chosen = _choose(_folds(others, group), columns, target)
        parts.append(left_out.assign(predicted=_predict(others, left_out, chosen, target), chosen=" + ".join(chosen)))
    return pd.concat(parts)


def _folds(table: pd.DataFrame, group: str) -> list[tuple[pd.DataFrame, pd.DataFrame]]:
    """The other groups, and the one that is left out."""
    return [(table.drop(left_out.index), left_out) for _, left_out in table.groupby(group)]


def _choose(folds: Sequence[tuple[pd.DataFrame, pd.DataFrame]], columns: Sequence[str], target: str) -> list[str]:
    """Forward selection: add the column that predicts the groups left out best, while it predicts them better."""

    def score(chosen: Sequence[str]) -> float:
        return float(np.mean([rank_correlation(_predict(known, wanted, chosen, target), wanted[target]) for known, wanted in folds]))

    chosen, best = list[str](), -np.inf
    while rest := [column for column in columns if column not in chosen]:
        scores = {column: score([*chosen, column]) for column in rest}
        first = max(rest, key=scores.__getitem__)
        if scores[first] <= best:
            break
        chosen, best = [*chosen, first], scores[first]
    return chosen


def _predict(known: pd.DataFrame, wanted: pd.DataFrame, chosen: Sequence[str], target: str) -> Float64[np.ndarray, " n"]:
    def design(table: pd.DataFrame) -> np.ndarray:
        return np.column_stack([np.ones(len(table)), *(_percentiles(known[column], table[column]) for column in chosen)])

    weights, *_ = np.linalg.lstsq(design(known), known[target].to_numpy(), rcond=None)
    # equal draws are to tie whatever the rounding
    return (design(wanted) @ weights).round(9)


def _percentiles(known: pd.Series, values: pd.Series) -> Float64[np.ndarray, " n"]:
    """The share of known values below each, ties counted half; whatever lies beyond them all is as one."""
    order, wanted = np.sort(known.to_numpy()), values.to_numpy()
    return (np.searchsorted(order, wanted, "left") + np.searchsorted(order, wanted, "right")) / (2 * len(order))
