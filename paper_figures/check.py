"""`--check`: the verdicts of the runs under a results folder against those of the committed reference, form by form.

Both are judged anew from their rows, by the criteria of today's code: a verdict that was written down is not believed.

A run is compared with a reference of the same data set and scale alone. Let a form have the estimate e in [lo, hi] in the run and e' in
[lo', hi'] in the reference, both at the cell that decided the verdict: where many cells are tried it may be another one, and the worst
cases are what is compared. Their numbers *agree* when |e − e'| ≤ √(h² + h'²), h and h' the half-widths on the sides that face each other
and both bounded: the interval of 95% of the difference of two independent estimates. Numbers that no interval of a sample surrounds
(the least or greatest draw, h = h' = 0) agree when they are equal to rounding, 1e-6 of the larger or 1e-9. A form is then

- **reproduced within interval**: the same verdict, and the numbers agree;
- **reproduced in order only**: not that, but the verdicts do not contradict each other. Either they are the same though the numbers do not
  agree; or one says "holds" and the other "holds if", which differ in what was seen outside the condition; or one of the two is
  inconclusive and the numbers do not tell against each other: |e − e'| ≤ √(H² + H'²), H as h but in intervals that cover all forms compared
  with 95% at once (Bonferroni, Student's t with n − 1 degrees of freedom), so that chance alone breaks one of them in at most 5%;
- **not reproduced**: everything else: opposite verdicts, or one lost or won with numbers that tell against each other.

Forms that the reference did not measure leave nothing to reproduce and are told as that. Rows of the papers that are reproduced are not
compared: what they are held to is what was published.
"""

import importlib
import math
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from paper_figures.sidecar import Product, tabular, write
from paper_figures.sources import EXPERIMENTS, Shelf, Source, lacking, require_one, todays_config
from src import code
from src.errors import UserError
from src.statistics import widening
from src.verdict import Verdict, phrase

WITHIN, ORDER, NOT, NOTHING = "reproduced within interval", "reproduced in order only", "not reproduced", "nothing to reproduce"
COLOURS = {WITHIN: "green", ORDER: "cyan", NOT: "red", NOTHING: "dim"}
HOLDS = {"holds", "holds_if"}


def show_check(shelf: Shelf, names: Sequence[str], out: Path) -> int:
    """Print and write the comparison; return the exit code, 1 when something is not reproduced or can't be read.

    Args:
        shelf: the results folder and the reference.
        names: the experiments to compare; all when there are none.
        out: the folder to write the table to.

    Raises: UserError when there is no such experiment, or no run that can be compared.
    """
    if unknown := [name for name in names if name not in EXPERIMENTS]:
        raise UserError(f"no experiment {', '.join(unknown)} to check; there are {', '.join(EXPERIMENTS)}")
    lines: list[tuple[str, Verdict, Verdict]] = []
    sources: list[Source] = []
    failed = False
    asked = names or EXPERIMENTS
    for name in asked:
        try:
            found = comparable(shelf, name)
            if isinstance(found, str):
                print(f"{name}: {found}")
                continue
            for pair in found:
                tables = [source.read() for source in pair]
                data = pair[0].stamps[0]["data"]
                lines += [(data, *verdicts) for verdicts in zip(*map(judged, pair, tables), strict=True)]
                sources += pair
                print(f"{name}: {pair[1].rows.parent}; {rows_compared(*tables)}")
        except UserError as error:
            failed = True
            print(f"error: {name}: {error}", file=sys.stderr)
    if not lines:
        if failed:
            return 1
        raise UserError(f"nothing to check under {shelf.results}: no finished run at the data set and scale of the reference")
    table = told(lines)
    Console(width=None if sys.stdout.isatty() else 200).print(to_table(table))
    print(f"{len({source.experiment for source in sources})} of {len(asked)} experiments compared")
    for file in write("check", Product(tabular(table), sources), out, "python -m paper_figures --check", code.commit()):
        print(file)
    return 1 if failed or (table["told"] == NOT).any() else 0


def comparable(shelf: Shelf, experiment: str) -> list[tuple[Source, Source]] | str:
    """The reference on each data set and the newest finished run there at its scale; in words why there are none."""
    references = {_where(source): source for source in shelf.references(experiment)}
    if not references:
        return "no reference rows, not compared"
    runs = {_where(run): run for run in shelf.each(experiment) if run.folder}
    if pairs := [(reference, runs[where]) for where, reference in references.items() if where in runs]:
        return pairs
    if not runs:
        return f"no finished run, not compared; python -m src.run experiment={experiment}"
    kinds = zip(("data set", "scale"), zip(*runs, strict=True), zip(*references, strict=True), strict=True)
    differ = [kind for kind, one, own in kinds if not {*one} & {*own}]
    ran, kept = (", ".join(f"{data} at {scale}" for data, scale in sorted(of)) for of in (runs, references))
    return f"other {' and '.join(differ or ['data set or scale'])}: runs on {ran}, reference on {kept}; not compared"


def _where(source: Source) -> tuple[str, str]:
    """The data set that a run used, and its scale."""
    return source.stamps[0]["data"], source.stamps[0]["scale"]


def judged(source: Source, rows: pd.DataFrame) -> list[Verdict]:
    """The verdicts on a run's rows, judged anew.

    Raises: UserError when the rows mix runs that differ, or lack what the criteria speak of.
    """
    require_one(source.stamps, str(source.rows))
    with lacking(source.rows):
        return importlib.import_module(f"experiments.{source.experiment}").judge(rows, todays_config(source.stamps[0]).criteria)


def told(compared: Sequence[tuple[str, Verdict, Verdict]]) -> pd.DataFrame:
    """The comparison as a table, a line a form and data set."""
    lines = []
    for data, reference, run in compared:
        word, why = compare(reference, run, len(compared))
        line: dict[str, object] = {"claim": reference.claim, "form": reference.form, "data": data, "told": word, "why": why}
        for of, verdict in (("reference", reference), ("run", run)):
            line |= {of: phrase(verdict.verdict, verdict.condition), f"{of} estimate": verdict.estimate}
            line |= dict(zip((f"{of} lo", f"{of} hi"), verdict.interval, strict=True))
        lines.append(line)
    return pd.DataFrame(lines)


def compare(reference: Verdict, run: Verdict, together: int) -> tuple[str, str]:
    """What became of one form, and why.

    Args:
        reference: its verdict in the reference.
        run: its verdict in the run.
        together: forms that are compared in all.
    """
    if reference.evidence.startswith("no cell"):
        return NOTHING, "not measured in the reference"
    words = {reference.verdict, run.verdict}
    moved = "" if deciding(reference) == deciding(run) else "; decided by another cell"
    if len(words) == 1:
        return (WITHIN, "") if agree(reference, run) else (ORDER, f"the same verdict, another number{moved}")
    if words == HOLDS:
        return ORDER, "the form holds; what is outside its condition differs"
    if "inconclusive" in words and agree(reference, run, together):
        return ORDER, f"one of the two is inconclusive, the numbers don't tell against each other{moved}"
    if "inconclusive" in words:
        return NOT, f"a verdict lost or won, the numbers tell against each other{moved}"
    return NOT, f"opposite verdicts{moved}"


def agree(one: Verdict, other: Verdict, together: int = 1) -> bool:
    """Whether two numbers differ by no more than their intervals allow, or those that cover `together` forms at once."""
    if one.estimate is None or other.estimate is None:  # JSON holds no finite number: agreement is that of the same cell
        return one.estimate is other.estimate and one.evidence == other.evidence
    (least, low), (greatest, high) = sorted(((one.estimate, one), (other.estimate, other)), key=lambda pair: pair[0])
    if math.isclose(least, greatest, rel_tol=1e-6, abs_tol=1e-9):
        return True
    if low.interval[1] is None or high.interval[0] is None:
        return False
    halves = np.array([low.interval[1] - least, greatest - high.interval[0]])
    return bool(greatest - least <= np.linalg.norm(halves * widening([low.n - 1, high.n - 1], together)))


def deciding(verdict: Verdict) -> str:
    """The cell that decided a verdict, as its evidence names it."""
    found = re.search(r"(?:worst|counterexample): (.*?): \S+ \[", verdict.evidence)
    return found[1] if found else ""


def rows_compared(reference: pd.DataFrame, run: pd.DataFrame) -> str:
    """How the rows of one config and seed compare, in words; those of others have no counterpart."""
    if reference["run"].iloc[0] != run["run"].iloc[0]:
        seeds = [rows["root_seed"].iloc[0] for rows in (run, reference)]
        differ = "another config" if seeds[0] == seeds[1] else f"seed {seeds[0]} against {seeds[1]}"
        return f"{differ}: verdicts alone are compared"
    if len(reference) != len(run):
        return f"the same config and seed, but {len(run):,} rows against {len(reference):,}"
    values = reference["value"].to_numpy(), run["value"].to_numpy()
    differing = int((~np.isclose(*values, rtol=1e-6, atol=1e-12, equal_nan=True)).sum())
    return f"the same config and seed: {differing:,} of {len(run):,} rows differ by more than 1e-6"


def to_table(lines: pd.DataFrame) -> Table:
    """The comparison for the terminal."""
    counts = Counter(lines["told"])
    table = Table(title=", ".join(f"{counts[word]} {word}" for word in COLOURS if counts[word]))
    for heading in ("form", "data", "reference", "run", "told"):
        table.add_column(heading, overflow="fold")
    for line in lines.to_dict("records"):
        word = f"[{COLOURS[line['told']]}]{line['told']}[/]" + (f": {line['why']}" if line["why"] else "")
        table.add_row(line["claim"], line["data"], *(escape(_cell(line, of)) for of in ("reference", "run")), word)
    return table


def _cell(line: dict, of: str) -> str:
    numbers = (line[f"{of} estimate"], line[f"{of} lo"], line[f"{of} hi"])
    estimate, lo, hi = ("–" if number is None or math.isnan(number) else f"{number:.4g}" for number in numbers)
    return f"{line[of]}: {estimate} [{lo}, {hi}]"
