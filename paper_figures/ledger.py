"""The ledger: every form of every claim, its verdict and evidence, and the command that reruns it."""

from collections.abc import Sequence

import pandas as pd
from rich.markup import escape
from rich.table import Table

from paper_figures.sidecar import Product, tabular
from paper_figures.sources import EXPERIMENTS, Shelf, Source, Stamp, gather
from paper_figures.style import criteria
from src.verdict import COLOURS, Verdict, phrase

COLUMNS = [
    "claim",
    "form",
    "statement",
    "verdict",
    "condition",
    "estimate",
    "lo",
    "hi",
    "n",
    "evidence",
    "amended",
    "data",
    "scale",
    "seed",
    "commit",
    "command",
]
# in LaTeX, with the widths of what is long in cm
PRINTED: dict[str, float | None] = {
    "claim": 4.5,
    "statement": 8,
    "verdict": None,
    "condition": 3,
    "estimate": None,
    "lo": None,
    "hi": None,
    "n": None,
}


def product(shelf: Shelf, mixed: bool) -> Product:
    """The ledger as LaTeX, Markdown and CSV, in LaTeX without what only a computer reads; each line says which run it is of."""
    lines, sources, complaints = ledger(shelf)
    return Product(tabular(lines, PRINTED), sources, complaints)


def ledger(shelf: Shelf) -> tuple[pd.DataFrame, list[Source], list[str]]:
    """A line a form, data set and scale: of the newest finished run there, else of the committed rows, else marked as not measured.

    Returns: the lines, the runs they are of, and a complaint for each file that is damaged.
    """
    lines: list[dict[str, object]] = []
    sources: list[Source] = []
    complaints: list[str] = []
    for experiment in EXPERIMENTS:
        found = gather([experiment], shelf.each, lines_of)
        lines += [line for run in found.taken for line in run] or _unmeasured(experiment)
        sources += found.sources
        complaints += found.complaints
    return pd.DataFrame(lines, columns=COLUMNS), sources, complaints


def command(run: Stamp) -> str:
    """The command that makes a run again."""
    return f"python -m src.run experiment={run['experiment']} data={run['data_requested']} scale={run['scale']} seed={run['root_seed']}"


def lines_of(source: Source) -> list[dict[str, object]]:
    """The lines of one run."""
    return measured(source.stamps[0], source.judged())


def measured(run: Stamp, verdicts: Sequence[Verdict]) -> list[dict[str, object]]:
    """The lines of one run, of its stamp and verdicts."""
    where = {key: run[key] for key in ("data", "scale")} | {"seed": run["root_seed"], "commit": run["commit"][:7], "command": command(run)}
    if run["fallback"]:
        where["data"] = f"{run['data']} in place of {run['data_requested']}"
    columns = ("claim", "form", "statement", "verdict", "condition", "estimate", "n", "evidence")
    return [
        {
            **{column: getattr(entry, column) for column in columns},
            "amended": "; ".join(entry.amended),
            "lo": entry.interval[0],
            "hi": entry.interval[1],
            **where,
        }
        for entry in verdicts
    ]


def _unmeasured(experiment: str) -> list[dict[str, object]]:
    again = f"python -m src.run experiment={experiment}"
    return [
        {"claim": f"{experiment}/{name}", "form": form.form, "statement": form.statement, "verdict": "not measured", "command": again}
        for name, form in criteria(experiment).items()
    ]


def to_table(lines: pd.DataFrame) -> Table:
    """The ledger for the terminal: under each statement the evidence and the command that reruns it."""
    table = Table(title=f"{len(lines)} verdicts on {lines['claim'].nunique()} forms of {_claims(lines)} claims", show_lines=True)
    for heading in ("claim", "form", "verdict", "data", "scale", "statement, evidence and command"):
        table.add_column(heading, overflow="fold")
    for line in lines.astype(object).where(lines.notna(), "").itertuples():
        word = f"[{COLOURS.get(line.verdict, 'default')}]{escape(phrase(line.verdict, line.condition))}[/]"
        amended = f"amended: {line.amended}" if line.amended else ""
        shown = "\n".join(f"[dim]{escape(text)}[/]" for text in (line.evidence, amended, line.command) if text)
        table.add_row(line.claim, line.form.replace("_", " "), word, line.data, line.scale, f"{escape(line.statement)}\n{shown}")
    return table


def _claims(lines: pd.DataFrame) -> int:
    return lines["claim"].str.partition("/")[0].nunique()
