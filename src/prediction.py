"""Which columns of a table foretell another: rank correlations, and the prediction of groups that were left out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from jaxtyping import Float64
from numpy.typing import ArrayLike
from scipy.stats import rankdata

from src.statistics import Estimate, jackknife


def rank_correlation(x: ArrayLike, y: ArrayLike, strata: ArrayLike | None = None) -> Float64[np.ndarray, "*samples"] | np.float64:
    """Spearman's ρ; 0 where all x or all y are equal, and so order nothing. Ties share their mean rank, infinities are the extremes.

    Args:
        x: n draws, along the last axis of one or more samples.
        y: as many, of the same draws.
        strata: what is held fixed: what is ranked is compared within each stratum alone, where ranks run from −½ to ½.
    """
    a, b = (_centred_ranks(values, strata) for values in (x, y))
    scale = np.sqrt(np.vecdot(a, a) * np.vecdot(b, b))
    return np.clip(np.divide(np.vecdot(a, b), scale, out=np.zeros_like(scale), where=scale != 0), -1, 1)


def _centred_ranks(values: ArrayLike, strata: ArrayLike | None) -> np.ndarray:
    ranks = rankdata(values, axis=-1)
    n = ranks.shape[-1]
    if strata is None:
        return (ranks - (n + 1) / 2) / n
    # first by stratum, then by value
    first, last = (rankdata(strata, method, axis=-1) for method in ("min", "max"))
    return (rankdata(first * (n + 1) + ranks, axis=-1) - (first + last) / 2) / (last - first + 1)


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
    found = jackknife(lambda samples: rank_correlation(*np.moveaxis(samples, -1, 0)), draws)
    return replace(found, lo=max(found.lo, -1.0), hi=min(found.hi, 1.0))


def association_gain(better: ArrayLike, worse: ArrayLike, target: ArrayLike) -> Estimate:
    """ρ(better, target) − ρ(worse, target) over the same draws, by the jackknife."""

    def gain(samples: np.ndarray) -> np.ndarray | np.float64:
        first, second, reached = np.moveaxis(samples, -1, 0)
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
        chosen = _choose([Fold.of(*inner, columns, target) for inner in _folds(others, group)], columns)
        fold = Fold.of(others, left_out, columns, target)
        parts.append(left_out.assign(predicted=fold.predicted(chosen), chosen=" + ".join(chosen)))
    return pd.concat(parts)


def _folds(table: pd.DataFrame, group: str) -> list[tuple[pd.DataFrame, pd.DataFrame]]:
    """The other groups, and the one that is left out."""
    return [(table.drop(left_out.index), left_out) for _, left_out in table.groupby(group)]


@dataclass(frozen=True)
class Fold:
    """What is known of some draws, and of those whose target is foretold from it: by name, the percentiles of their columns.

    Attributes:
        known, wanted: the columns, as shares of what is known.
        target: that of the known.
        reached: that of the wanted, to score with.
    """

    known: Mapping[str, np.ndarray]
    wanted: Mapping[str, np.ndarray]
    target: np.ndarray
    reached: np.ndarray

    @classmethod
    def of(cls, known: pd.DataFrame, wanted: pd.DataFrame, columns: Sequence[str], target: str) -> "Fold":
        """Take the columns and the target from two tables."""
        known_parts, wanted_parts = ({name: _percentiles(known[name], part[name]) for name in columns} for part in (known, wanted))
        return cls(known_parts, wanted_parts, known[target].to_numpy(), wanted[target].to_numpy())

    def predicted(self, chosen: Sequence[str]) -> Float64[np.ndarray, " n"]:
        """The target of the wanted, by least squares on the known."""
        design, wanted = (
            np.column_stack([np.ones(len(of)), *(parts[name] for name in chosen)])
            for of, parts in ((self.target, self.known), (self.reached, self.wanted))
        )
        weights, *_ = np.linalg.lstsq(design, self.target, rcond=None)
        # equal draws are to tie whatever the rounding
        return (wanted @ weights).round(9)


def _choose(folds: Sequence[Fold], columns: Sequence[str]) -> list[str]:
    """Forward selection: add the column that predicts the groups left out best, while it predicts them better."""

    def score(chosen: Sequence[str]) -> float:
        return float(np.mean([rank_correlation(fold.predicted(chosen), fold.reached) for fold in folds]))

    chosen, best = list[str](), -np.inf
    while rest := [column for column in columns if column not in chosen]:
        scores = {column: score([*chosen, column]) for column in rest}
        first = max(rest, key=scores.__getitem__)
        if scores[first] <= best:
            break
        chosen, best = [*chosen, first], scores[first]
    return chosen


def _percentiles(known: pd.Series, values: pd.Series) -> Float64[np.ndarray, " n"]:
    """The share of known values below each, ties counted half; whatever lies beyond them all is as one."""
    order, wanted = np.sort(known.to_numpy()), values.to_numpy()
    return (np.searchsorted(order, wanted, "left") + np.searchsorted(order, wanted, "right")) / (2 * len(order))
