"""The ledger in short, as Markdown: every form as stated with its verdict, and the precise forms counted. The README holds it."""

import pandas as pd

from paper_figures.ledger import ledger
from paper_figures.sidecar import Product, piped
from paper_figures.sources import HERE, Shelf

START = "<!-- made by python -m paper_figures summary -->"
END = "<!-- end of what is made -->"
WORDS = {"holds": "hold", "holds_if": "hold under a condition", "refuted": "refuted", "inconclusive": "inconclusive"}


def product(shelf: Shelf, mixed: bool) -> Product:
    """The summary of the ledger, under a heading for each data set and scale."""
    lines, sources, complaints = ledger(shelf)
    return Product({"md": summary(lines)}, sources, complaints)


def committed() -> str:
    """The summary of the committed rows, between the marks that stand around it in the README."""
    lines, _, _ = ledger(Shelf(HERE / "nowhere", HERE / "reference"))
    return f"{START}\n{summary(lines)}{END}\n"


def summary(lines: pd.DataFrame) -> str:
    """Two tables for each data set and scale that the ledger has."""
    lines = lines.dropna(subset=["data"])
    parts = []
    for (data, scale), own in lines.groupby(["data", "scale"]):
        commits = ", ".join(f"{commit}, root seed {seed:.0f}" for commit, seed in own[["commit", "seed"]].drop_duplicates().to_numpy())
        parts += [
            f"*{data} at scale={scale}, commit {commits}.* Every form *as stated*:\n",
            stated(own),
            "And the precise forms, counted:\n",
        ]
        parts.append(counted(own))
    return "\n".join(parts)


def stated(lines: pd.DataFrame) -> str:
    """The forms as stated, in the ledger's order."""
    own = lines[lines["form"] == "as_stated"]
    return _markdown(
        ["experiment", "as stated", "verdict"],
        [(f"`{_experiment(line.claim)}`", piped(line.statement), _word(line.verdict, line.condition)) for line in own.itertuples()],
    )


def counted(lines: pd.DataFrame) -> str:
    """How many precise forms of each experiment have each verdict."""
    own = lines[lines["form"] == "precise"]
    counts = pd.crosstab(own["claim"].map(_experiment), own["verdict"]).reindex(columns=list(WORDS), fill_value=0)
    rows = [(f"`{experiment}`", *map(str, line)) for experiment, line in zip(counts.index, counts.to_numpy(), strict=True)]
    return _markdown(["experiment", *WORDS.values()], [*rows, ("all", *map(str, counts.sum()))])


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
