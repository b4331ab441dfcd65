"""Table of the forms whose statement or criterion takes a number from a publication, beside what was measured here.

Trained accuracies of the literature stand in the table of paper_figures/reproduction.py.
"""

import re
from collections.abc import Iterator
from functools import cache

import pandas as pd

from paper_figures.sidecar import Product, tabular
from paper_figures.sources import EXPERIMENTS, Shelf, Stamp, gather
from paper_figures.style import criteria
from src.verdict import Verdict, phrase

CITED = re.compile(r"[A-Z]\w+(?: & [A-Z]\w+| et al\.)? (?:19|20)\d\d")
NOT_RUN = "not run"
COLUMNS = ["experiment", "form", "source", "what", "published", "measured", "lo", "hi", "n", "verdict", "data", "scale"]
# in LaTeX, with the widths of what is long in cm
PRINTED: dict[str, float | None] = {
    "source": 3,
    "what": 6,
    "published": 5,
    "measured": None,
    "lo": None,
    "hi": None,
    "n": None,
    "verdict": 2.5,
    "data": None,
    "scale": None,
}


def product(shelf: Shelf, mixed: bool) -> Product:
    """The table; each line says at which scale it was measured, whatever others are."""
    names = sorted({form.partition("/")[0] for form in cited()})
    found = gather(names, shelf.each, lambda source: (source.stamps[0], source.judged()))
    lines = [line for run, entries in found.taken for line in _forms(run, entries)]
    return Product(tabular(pd.DataFrame(lines, columns=COLUMNS), PRINTED), found.sources, found.complaints)


@cache
def cited() -> dict[str, str]:
    """The forms whose statement or criterion cites a publication, and which."""
    return {form: source for experiment in EXPERIMENTS for form, source in _citing(experiment)}


def _forms(run: Stamp, entries: list[Verdict]) -> Iterator[dict[str, object]]:
    """The forms that hold something published to a criterion: the number is the criterion's own, at the cell that decided."""
    sources = cited()
    for entry in entries:
        if entry.claim not in sources:
            continue
        experiment, _, name = entry.claim.partition("/")
        ran = "no cell" not in entry.evidence
        yield {
            "experiment": experiment,
            "form": name,
            "source": sources[entry.claim],
            "what": entry.criterion,
            "published": entry.statement,
            **({"measured": entry.estimate, "lo": entry.interval[0], "hi": entry.interval[1], "n": entry.n} if ran else {}),
            "verdict": phrase(entry.verdict, entry.condition) if ran else NOT_RUN,
            "data": run["data"],
            "scale": run["scale"],
        }


def _citing(experiment: str) -> Iterator[tuple[str, str]]:
    for name, form in criteria(experiment).items():
        if found := CITED.findall(f"{form.statement} {form.criterion}"):
            yield f"{experiment}/{name}", "; ".join(dict.fromkeys(found))
