"""Table of what was published beside what was measured here: accuracies of the literature, and what criteria take from it."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache

import pandas as pd

from experiments.deep_supervision import DSN_ERROR
from experiments.greedy_published import BELILOVSKY, NOKLAND
from experiments.residual_unlock import TABLE_6
from paper_figures.sidecar import Product, tabular
from paper_figures.sources import EXPERIMENTS, Shelf, gather
from paper_figures.style import criteria
from src.rows import pick
from src.statistics import t_interval
from src.verdict import Verdict, phrase

CITED = re.compile(r"[A-Z]\w+(?: & [A-Z]\w+| et al\.)? (?:19|20)\d\d")
NOT_RUN = "not run"
ERROR = "test error, %"
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


@dataclass(frozen=True)
class Reported:
    """A test error that was published, in percent, and where rows hold what was measured of it."""

    form: str
    source: str
    net: str
    data: str
    published: float | str
    at: Mapping[str, object] = field(default_factory=dict)


REPORTED = (
    *(
        Reported(
            "residual_unlock/published_resnets", "He et al. 2016", f"ResNet-{depth}", "cifar10", error, {"depth": depth, "skip": "original"}
        )
        for depth, error in TABLE_6.items()
    ),
    Reported("residual_unlock/published_plain_110", "He et al. 2016", "plain-110", "cifar10", "> 60", {"depth": 110, "skip": "none"}),
    *(
        Reported("greedy_layerwise/published_mlp", "Nøkland & Eidnes 2019", f"MLP, {loss}", data, error, {"family": "mlp", "loss": loss})
        for data, errors in NOKLAND.items()
        for loss, error in errors.items()
    ),
    *(
        Reported(
            "greedy_layerwise/published_greedy_cnn",
            "Belilovsky et al. 2019",
            f"greedy CNN, k = {k}",
            data,
            error,
            {"family": "vgg", "hidden": k - 1},
        )
        for data, errors in BELILOVSKY.items()
        for k, error in errors.items()
    ),
    *(
        Reported("deep_supervision/published_error", "Lee et al. 2015", "deeply supervised net", data, error, {"schedule": "fading"})
        for data, error in DSN_ERROR.items()
    ),
)


def product(shelf: Shelf, mixed: bool) -> Product:
    """The table; each line says at which scale it was measured, whatever others are."""
    names = sorted({reported.form.partition("/")[0] for reported in REPORTED} | {form.partition("/")[0] for form in cited()})
    found = gather(names, shelf.each, lambda source, rows: (rows, source.judged()))
    verdicts = found.taken
    lines = [
        *(_accuracy(reported, verdicts) for reported in REPORTED),
        *(line for rows, entries in verdicts for line in _forms(rows, entries)),
    ]
    return Product(tabular(pd.DataFrame(lines, columns=COLUMNS), PRINTED), found.sources, found.complaints)


@cache
def cited() -> dict[str, str]:
    """The forms whose statement or criterion cites a publication, and which."""
    return {form: source for experiment in EXPERIMENTS for form, source in _citing(experiment)}


def _accuracy(reported: Reported, verdicts: list[tuple[pd.DataFrame, list[Verdict]]]) -> dict[str, object]:
    """A published accuracy, and what nets of the same kind reached on the same data."""
    experiment, _, name = reported.form.partition("/")
    line: dict[str, object] = {
        "experiment": experiment,
        "form": name,
        "source": reported.source,
        "what": f"{reported.net}, {ERROR}",
        "published": reported.published,
    }
    line |= {"data": reported.data, "verdict": NOT_RUN, "scale": "paper"}
    for rows, entries in verdicts:
        if not ({experiment} == set(rows["experiment"]) and {reported.data} == set(rows["data"])) or not set(reported.at) <= set(rows):
            continue
        nets = pick(rows, "test_accuracy", part="published", **reported.at)["value"]
        if len(nets):
            error = t_interval(100 * (1 - nets))
            told = next(phrase(entry.verdict, entry.condition) for entry in entries if entry.claim == reported.form)
            line |= {"measured": error.value, "lo": error.lo, "hi": error.hi, "n": error.n, "verdict": told, "scale": rows["scale"].iloc[0]}
    return line


def _forms(rows: pd.DataFrame, entries: list[Verdict]) -> Iterator[dict[str, object]]:
    """The forms that hold something published to a criterion: the number is the criterion's own, at the cell that decided."""
    accuracies, sources = {reported.form for reported in REPORTED}, cited()
    for entry in entries:
        if entry.claim not in sources or entry.claim in accuracies:
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
            "data": rows["data"].iloc[0],
            "scale": rows["scale"].iloc[0],
        }


def _citing(experiment: str) -> Iterator[tuple[str, str]]:
    for name, form in criteria(experiment).items():
        if found := CITED.findall(f"{form.statement} {form.criterion}"):
            yield f"{experiment}/{name}", "; ".join(dict.fromkeys(found))
