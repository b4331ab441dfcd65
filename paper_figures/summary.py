"""The ledger in short, as Markdown: forms as stated with their verdicts, precise ones counted, data sets compared; for the README."""

from collections.abc import Callable

import pandas as pd

from paper_figures.ledger import ledger
from paper_figures.sidecar import Product, piped
from paper_figures.sources import HERE, Shelf

START = "<!-- made by python -m paper_figures summary -->"
END = "<!-- end of what is made -->"
WORDS = {"holds": "hold", "holds_if": "hold under a condition", "refuted": "refuted", "inconclusive": "inconclusive"}


def product(shelf: Shelf, mixed: bool) -> Product:
    """The summary of the ledger."""
    lines, sources, complaints = ledger(shelf)
    return Product({"md": summary(lines)}, sources, complaints)


def committed() -> str:
    """The summary of the committed rows, between the marks that stand around it in the README."""
    lines, _, _ = ledger(Shelf(HERE / "nowhere", HERE / "reference"))
    return f"{START}\n{summary(lines)}{END}\n"


def summary(lines: pd.DataFrame) -> str:
    """Tables of all that the ledger has, by data set and scale."""
    lines = lines.dropna(subset=["data"])
    if lines.empty:
        return ""
    lines = lines.assign(where=lines["data"] + " at scale=" + lines["scale"])
    parts = [
        f"*{'; '.join(_origin(where, own) for where, own in lines.groupby('where', sort=False))}.* Every form *as stated*:\n",
        stated(lines),
        "And the precise forms, counted:\n",
        *(counted(own, where) for where, own in lines.groupby("where", sort=False)),
    ]
    if len(lines["where"].unique()) > 1:
        parts.append(compared(lines))
    return "\n".join(parts)


def _origin(where: str, lines: pd.DataFrame) -> str:
    commits = ", ".join(f"{commit}, root seed {seed:.0f}" for commit, seed in lines[["commit", "seed"]].drop_duplicates().to_numpy())
    return f"{where}, commit {commits}"


def stated(lines: pd.DataFrame) -> str:
    """The verdicts on the forms as stated, in the ledger's order."""
    own = lines[lines["form"] == "as_stated"]
    return _verdicts(own, ["experiment", "as stated"], lambda claim, statement: (f"`{_experiment(claim)}`", piped(statement)))


def counted(lines: pd.DataFrame, where: str) -> str:
    """How many precise forms of each experiment have each verdict."""
    own = lines[lines["form"] == "precise"]
    counts = pd.crosstab(own["claim"].map(_experiment), own["verdict"]).reindex(columns=list(WORDS), fill_value=0)
    rows = [(f"`{experiment}`", *map(str, line)) for experiment, line in zip(counts.index, counts.to_numpy(), strict=True)]
    return _markdown([where, *WORDS.values()], [*rows, ("all", *map(str, counts.sum()))])


def compared(lines: pd.DataFrame) -> str:
    """On how many of the forms that were measured everywhere the verdicts agree; and which hold in one place and are refuted in another."""
    words = _words(lines)
    everywhere, opposed = words.dropna(), words.index[(words == "holds").any(axis=1) & (words == "refuted").any(axis=1)]
    same = everywhere.eq(everywhere.iloc[:, 0], axis=0).all(axis=1).sum()
    told = f"Of the {len(everywhere)} forms measured on each, {same} have the same verdict, with or without a condition, and"
    if opposed.empty:
        return f"{told} none holds on one and is refuted on another.\n"
    table = _verdicts(lines[lines["claim"].isin(opposed)], ["form", "statement"], lambda claim, what: (f"`{claim}`", piped(what)))
    return f"{told} {len(opposed)} hold on one and are refuted on another:\n\n{table}"


def _words(lines: pd.DataFrame) -> pd.DataFrame:
    """A verdict a form and place; holding under a condition is holding."""
    return lines.pivot(index="claim", columns="where", values="verdict").replace("holds_if", "holds")


def _verdicts(lines: pd.DataFrame, headings: list[str], told: Callable[[str, str], tuple[str, ...]]) -> str:
    """A line a form, with its verdict everywhere."""
    places = list(lines["where"].unique())
    rows = []
    for claim, own in lines.groupby("claim", sort=False):
        words = {line.where: _word(line.verdict, line.condition) for line in own.itertuples()}
        rows.append((*told(str(claim), own["statement"].iloc[0]), *(words.get(place, "–") for place in places)))
    return _markdown([*headings, *(places if len(places) > 1 else ["verdict"])], rows)


def _experiment(claim: str) -> str:
    return claim.partition("/")[0]


def _word(verdict: str, condition: object) -> str:
    if verdict == "refuted":
        return "**refuted**"
    return f"holds if `{condition}`" if verdict == "holds_if" else verdict


def _markdown(headings: list[str], rows: list[tuple[str, ...]]) -> str:
    """A table without padding, whose lines change with their own cells alone."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
