"""The ledger: every form of every claim, its verdict and evidence, and the command that reruns it."""

import json
from pathlib import Path

import pandas as pd
from rich.markup import escape
from rich.table import Table

from paper_figures.style import criteria
from src import rows as row_table
from src.errors import UserError
from src.run import CONF
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
    "command",
]


def ledger(results: Path, reference: Path) -> pd.DataFrame:
    """A line a form and data set: of the newest finished run on each data set, else of the committed rows, else marked as not measured.

    Args:
        results: the results folder.
        reference: the folder of the committed rows and verdicts.

    Raises: UserError naming a file that is damaged.
    """
    lines: list[dict[str, object]] = []
    for experiment in sorted(file.stem for file in (CONF / "experiment").glob("*.yaml")):
        runs = {folder.parts[-3]: folder for folder in row_table.finished_runs(results, experiment)}  # the newest last
        sources = [(folder / "rows.parquet", folder / "verdicts.json") for _, folder in sorted(runs.items())]
        committed = reference / f"{experiment}.parquet", reference / f"{experiment}.json"
        if not sources and committed[1].exists():
            sources = [committed]
        for rows, verdicts in sources:
            lines += _measured(rows, verdicts)
        if not sources:
            lines += _unmeasured(experiment)
    return pd.DataFrame(lines, columns=COLUMNS)


def _measured(rows: Path, verdicts: Path) -> list[dict[str, object]]:
    run = row_table.read(rows).iloc[0]
    where = {"data": run["data"], "scale": run["scale"], "seed": int(run["root_seed"])}
    if run["fallback"]:
        where["data"] = f"{run['data']} in place of {run['data_requested']}"
    command = f"python -m src.run experiment={run['experiment']} data={run['data_requested']} scale={run['scale']} seed={run['root_seed']}"
    try:
        entries = [Verdict.of(entry) for entry in json.loads(verdicts.read_bytes())]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{verdicts}: missing or damaged; run the experiment again with force=true") from error
    return [
        {
            **{
                column: getattr(entry, column)
                for column in ("claim", "form", "statement", "verdict", "condition", "estimate", "n", "evidence")
            },
            "amended": "; ".join(entry.amended),
            "lo": entry.interval[0],
            "hi": entry.interval[1],
            "command": command,
            **where,
        }
        for entry in entries
    ]


def _unmeasured(experiment: str) -> list[dict[str, object]]:
    command = f"python -m src.run experiment={experiment}"
    return [
        {"claim": f"{experiment}/{name}", "form": form.form, "statement": form.statement, "verdict": "not measured", "command": command}
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
