"""Verdicts: one form of a claim held against its criterion.

A claim is tried in *cells*, one per condition: an estimate with its interval. A cell is inside the criterion's range
[at_least, at_most] when its whole interval is, outside when its whole interval is, and open when the interval straddles a limit.
"""

import ast
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from rich.markup import escape
from rich.table import Table

from src.config import Criterion
from src.statistics import Estimate, widening

Word = Literal["holds", "holds_if", "refuted", "inconclusive"]
INTERVAL = ["estimate", "lo", "hi", "n", "freedom"]
COLOURS = {"holds": "green", "holds_if": "cyan", "refuted": "red", "inconclusive": "yellow"}


@dataclass(frozen=True)
class Verdict:
    """What became of one form of a claim; one entry of verdicts.json."""

    claim: str
    form: str
    statement: str
    criterion: str
    verdict: Word
    condition: str | None
    estimate: float | None
    interval: tuple[float | None, float | None]
    n: int
    evidence: str
    amended: tuple[str, ...] = ()

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> "Verdict":
        """Read an entry of verdicts.json.

        Raises: TypeError or KeyError, if it is none.
        """
        return cls(**{**entry, "interval": tuple(entry["interval"]), "amended": tuple(entry.get("amended", ()))})


def cell(estimate: Estimate, **condition: object) -> dict[str, object]:
    """One cell: the condition's columns, then estimate, lo, hi, n and freedom."""
    interval = (estimate.value, estimate.lo, estimate.hi, estimate.n, estimate.freedom)
    return {**condition, **dict(zip(INTERVAL, interval, strict=True))}


def cells_by(rows: pd.DataFrame, keys: Sequence[str], estimate: Callable[[pd.Series], Estimate]) -> pd.DataFrame:
    """A cell for each group of rows that agree in the columns `keys`.

    Args:
        rows: with the columns `keys` and `value`; those that lack a key are in no group.
        keys: what the cells differ in.
        estimate: of the values of a group.

    Returns: columns `keys`, then estimate, lo, hi, n, freedom; no row where there is no group.
    """
    groups = rows.groupby(list(keys))["value"]
    return pd.DataFrame(
        [cell(estimate(values), **dict(zip(keys, at, strict=True))) for at, values in groups],
        columns=[*keys, *INTERVAL],
    )


def judge_forms(claim: str, criteria: Mapping[str, Criterion], cells: Mapping[str, pd.DataFrame]) -> list[Verdict]:
    """Judge every criterion of a claim on the cells of its name.

    Raises: ValueError when criteria and cells don't bear the same names.
    """
    if set(criteria) != set(cells):
        raise ValueError(f"{claim}: criteria {sorted(set(criteria) ^ set(cells))} stand on one side only, in the YAML or in the module")
    return [decide(f"{claim}/{name}", criterion, cells[name]) for name, criterion in criteria.items()]


def decide(claim: str, criterion: Criterion, cells: pd.DataFrame) -> Verdict:
    """Hold one form against its criterion.

    Without a condition the form speaks of every cell: it holds when all are inside, is refuted by one outside.
    With a condition it speaks of the cells that meet it: it is refuted by one of them outside; when all are inside it
    `holds_if` the condition provided that for each part of it, a and b and …, a cell that fails this part alone is outside, and holds
    when all others are inside too. How many of the cells that fail the condition are outside is told: unless most are, the condition is
    sufficient and not more. With `otherwise` it must not be more: all cells that fail it are to be outside, and one inside refutes.
    Whatever is open, and a form without cells, is inconclusive. Cells with a column `published`, the value found elsewhere, are all
    told beside it, not only the one that decides.

    What all cells must show each shows in its own interval of 95%: a form that is false in one of them passes in at most 5% of its trials.
    What one of many cells shows must stand in intervals that cover all of them with 95% (Bonferroni), so that chance alone refutes a true
    form in at most 5%.

    Args:
        claim: the claim's and the form's name, as printed.
        criterion: the range, and the condition as a query over the cells' columns.
        cells: a row a condition; columns of the condition, then estimate, lo, hi, n, freedom.

    Returns: the verdict, with the cell that decided it as evidence.
    """
    if criterion.within is not None:
        cells = cells.query(criterion.within)
    if cells.empty:
        return _verdict(claim, criterion, "inconclusive", None, "no cell: nothing was measured")
    cells = cells.reset_index(drop=True)
    meets = _meeting(cells, criterion.condition)
    if not meets.any():
        return _verdict(claim, criterion, "inconclusive", None, "no cell meets the condition: nothing was measured")
    joint = pd.concat([_simultaneous(cells[meets]), _simultaneous(cells[~meets])]).sort_index()
    inside, outside = _sides(cells, criterion)
    surely_inside, surely_outside = _sides(joint, criterion)
    idle = [part for part, others in _alternatives(cells, criterion.condition).items() if not (others & surely_outside).any()]

    word: Word
    if (meets & surely_outside).any():
        word, deciding = "refuted", meets & surely_outside
    elif criterion.otherwise and (~meets & surely_inside).any():
        word, deciding = "refuted", ~meets & surely_inside
    elif not inside[meets].all():
        word, deciding = "inconclusive", meets & ~inside
    elif criterion.otherwise and not (outside[~meets].all() and (~meets).any()):
        word, deciding = "inconclusive", ~meets & ~outside
    elif inside.all():
        word, deciding = "holds", meets
    elif idle:
        word, deciding = "inconclusive", ~meets & ~surely_outside
    else:
        word, deciding = "holds_if", meets
    worst = _worst(cells, criterion, deciding, meets)
    role = "counterexample" if word == "refuted" else "worst"
    told = "; ".join(_describe(row) for _, row in cells.iterrows()) if "published" in cells else f"{role}: {_describe(worst)}"
    evidence = f"{int((meets & inside).sum())} of {int(meets.sum())} cells inside; {told}"
    lost, others = int((~meets & surely_outside).sum()), int((~meets).sum())
    if word == "holds_if":
        reach = "" if 2 * lost > others else "the condition is sufficient, not necessary: "
        example = _worst(cells, criterion, ~meets & surely_outside, surely_outside)
        evidence += f"; {reach}{lost} of {others} cells that fail it are outside: {_describe(example)}"
    elif word == "holds" and others:
        evidence += f"; so are all {others} cells that fail the condition"
    elif word == "inconclusive" and inside[meets].all():
        unshown = f": nothing shows that {' and '.join(idle)} matters" if idle else ""
        evidence += f"; {lost} of {others} cells that fail the condition are outside{unshown}"
    return _verdict(claim, criterion, word, worst, evidence)


def _meeting(cells: pd.DataFrame, condition: str | None) -> pd.Series:
    """Which cells meet a condition."""
    return pd.Series(True if condition is None else cells.index.isin(cells.query(condition).index), cells.index)


def _alternatives(cells: pd.DataFrame, condition: str | None) -> dict[str, pd.Series]:
    """By each part of a condition `a and b and …` the cells that fail this part only."""
    if condition is None:
        return {}
    tree = ast.parse(condition, mode="eval").body
    parts = [ast.unparse(part) for part in tree.values] if isinstance(tree, ast.BoolOp) and isinstance(tree.op, ast.And) else [condition]
    met = pd.DataFrame({part: _meeting(cells, part) for part in parts})
    return {part: ~met[part] & met.drop(columns=part).all(axis=1) for part in parts}


def _sides(cells: pd.DataFrame, criterion: Criterion) -> tuple[pd.Series, pd.Series]:
    """Which cells are inside the criterion's range, and which are outside."""
    low, high = _limits(criterion)
    return (cells["lo"] >= low) & (cells["hi"] <= high), (cells["hi"] < low) | (cells["lo"] > high)


def _limits(criterion: Criterion) -> tuple[float, float]:
    low = -np.inf if criterion.at_least is None else criterion.at_least
    return low, np.inf if criterion.at_most is None else criterion.at_most


def _simultaneous(cells: pd.DataFrame) -> pd.DataFrame:
    """The cells with intervals that cover all at once with 95%."""
    factor = widening(cells["freedom"], max(1, int((cells["freedom"] > 0).sum())))
    lo, hi = (cells["estimate"] + factor * (cells[limit] - cells["estimate"]) for limit in ("lo", "hi"))
    # an infinite interval, or a value known exactly, be it infinite, stays what it is
    fixed = (cells["freedom"] == 0) | ~np.isfinite(cells["hi"] - cells["lo"])
    return cells.assign(lo=lo.where(~fixed, cells["lo"]), hi=hi.where(~fixed, cells["hi"]))


def _worst(cells: pd.DataFrame, criterion: Criterion, among: pd.Series, claimed: pd.Series) -> pd.Series | None:
    """The cell that speaks most against the form: least inside where it is claimed, else most inside."""
    if not among.any():
        return None
    low, high = _limits(criterion)
    # how far the interval stays within the limits there are; an infinite limit leaves infinite room
    below = cells["lo"] - low if np.isfinite(low) else pd.Series(np.inf, cells.index)
    above = high - cells["hi"] if np.isfinite(high) else pd.Series(np.inf, cells.index)
    margin = np.minimum(below, above)
    return cells.loc[margin.where(claimed, -margin)[among].idxmin()]


def _verdict(claim: str, criterion: Criterion, word: Word, worst: pd.Series | None, evidence: str) -> Verdict:
    estimate, lo, hi, n, _ = (np.nan, -np.inf, np.inf, 0, 0) if worst is None else (worst[column] for column in INTERVAL)
    return Verdict(
        claim=claim,
        form=criterion.form,
        statement=criterion.statement,
        criterion=_told(criterion),
        verdict=word,
        condition=criterion.condition,
        estimate=_finite(estimate),
        interval=(_finite(lo), _finite(hi)),
        n=int(n),
        evidence=evidence,
        amended=tuple(criterion.amended),
    )


def _told(criterion: Criterion) -> str:
    """The criterion in words, with the further numbers that decide."""
    given = ", ".join(f"{name} = {_short(value)}" for name, value in criterion.given.items())
    return f"{criterion.criterion} [{given}]" if given else criterion.criterion


def _describe(cell: pd.Series | None) -> str:
    if cell is None:
        return "no cell"
    condition = ", ".join(f"{name}={_short(value)}" for name, value in cell.drop(INTERVAL).items())
    return f"{condition}: {_short(cell['estimate'])} [{_short(cell['lo'])}, {_short(cell['hi'])}], n={int(cell['n'])}"


def _finite(value: float) -> float | None:
    """JSON knows neither NaN nor infinity."""
    return float(value) if np.isfinite(value) else None


def _short(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def phrase(verdict: str, condition: str | None) -> str:
    """A verdict as it is told, with its condition."""
    return f"holds if {condition}" if verdict == "holds_if" else verdict


def to_frame(verdicts: list[Verdict]) -> pd.DataFrame:
    """Verdicts as a table, a row each."""
    return pd.DataFrame([asdict(verdict) for verdict in verdicts])


def to_table(verdicts: list[Verdict], title: str) -> Table:
    """Verdicts as a rich table for the terminal."""
    table = Table(title=title, show_lines=True)
    table.add_column("form of the claim, and evidence", overflow="fold")
    for heading in ("verdict", "estimate", "interval", "n"):
        table.add_column(heading, overflow="fold", justify="left" if heading == "verdict" else "right")
    for v in verdicts:
        told = "\n".join([v.evidence, *(f"amended: {change}" for change in v.amended)])
        name = f"[bold]{v.claim.rpartition('/')[2]}[/] ({v.form.replace('_', ' ')}): {escape(v.statement)}\n[dim]{escape(told)}[/]"
        interval = f"{_short(v.interval[0])} … {_short(v.interval[1])}"
        table.add_row(name, f"[{COLOURS[v.verdict]}]{escape(phrase(v.verdict, v.condition))}[/]", _short(v.estimate), interval, str(v.n))
    return table
