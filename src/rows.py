"""Rows: one measurement a line, long format, units in the quantity's description; stored as Parquet."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from src.errors import UserError
from src.results import AGAIN, read_status

Row = dict[str, Any]
DESCRIPTIONS = b"quantities"


def measured(where: Row, **values: float) -> Iterator[Row]:
    """A row for each quantity that was measured at one place."""
    return ({"quantity": quantity, "value": value, **where} for quantity, value in values.items())


def to_parquet(rows: pd.DataFrame, quantities: Mapping[str, str], stamp: Mapping[str, object]) -> bytes:
    """Rows as Parquet, each with the stamp of its run; the quantities' descriptions go into the schema.

    Args:
        rows: columns `quantity` and `value` and the coordinates of each measurement.
        quantities: what each quantity is, with its unit.
        stamp: what is the same for every row: experiment, data set, scale, seed, hash, commit.

    Raises: ValueError when a quantity has no description or none of its rows.
    """
    found = set(rows["quantity"].unique())
    if found != set(quantities):
        raise ValueError(f"quantities measured and described differ: {', '.join(sorted(found ^ set(quantities)))}")
    table = pa.Table.from_pandas(rows.assign(**stamp), preserve_index=False)
    sink = pa.BufferOutputStream()
    pq.write_table(
        table.replace_schema_metadata({**table.schema.metadata, DESCRIPTIONS: json.dumps(dict(quantities))}), sink, compression="zstd"
    )
    return sink.getvalue().to_pybytes()


def read(path: Path) -> pd.DataFrame:
    """Read a table of rows; the quantities' descriptions are in `.attrs["quantities"]`.

    Raises: UserError naming a file that is missing, damaged or no table of rows.
    """
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise unreadable(path, error) from error
    missing = {"quantity", "value", "experiment", "data", "scale", "run"} - set(table.column_names)
    if missing:
        raise UserError(f"{path}: no table of rows, it lacks the columns {', '.join(sorted(missing))}")
    rows = table.to_pandas()
    try:
        rows.attrs["quantities"] = json.loads((table.schema.metadata or {}).get(DESCRIPTIONS, b"{}"))
    except ValueError as error:
        raise UserError(f"{path}: damaged, its quantities are not described; {AGAIN}") from error
    return rows


def unreadable(path: Path, error: Exception) -> UserError:
    """What is told of a file that can't be read."""
    if isinstance(error, FileNotFoundError):
        return UserError(f"{path}: not there")
    return UserError(f"{path}: damaged ({(str(error).splitlines() or [type(error).__name__])[0]}); {AGAIN}")


def finished_runs(results_dir: Path, experiment: str) -> list[Path]:
    """The folders of an experiment's finished runs, and of those of which none can tell whether they are, oldest first."""
    files = sorted(results_dir.glob(f"{experiment}/*/*/seed*/status.json"), key=lambda status: status.stat().st_mtime_ns)
    return [file.parent for file in files if read_status(file.parent) in ("done", None)]


def pick(rows: pd.DataFrame, quantity: str, **coordinates: object) -> pd.DataFrame:
    """The rows of one quantity at the given coordinates."""
    mask = rows["quantity"] == quantity
    for column, value in coordinates.items():
        mask &= rows[column] == value
    return rows[mask]
