"""The rows of many runs: as one table, or no more of them than which runs they are of."""

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from src.errors import UserError
from src.processes import cpus
from src.results import AGAIN, atomically, refuse_changed
from src.rows import DESCRIPTIONS, unreadable

ROWS = "rows.parquet"  # of a run folder
PART = 2**20  # rows that are held at a time
TEXT = pa.dictionary(pa.int32(), pa.string())  # as codes of their values texts are read and written in a third less time


def collect(folders: Sequence[Path], into: Path) -> list[str]:
    """Write the rows of many run folders into one table; a column that some haven't is empty there.

    Returns: a line for each folder whose rows are missing, damaged, not as the run left them or another run's: they are left out.

    Raises: UserError when no rows are left, or can't be put together; OSError when the table can't be written.
    """
    with ThreadPoolExecutor(cpus()) as pool:
        heads = dict(zip(folders, pool.map(_head_as_left, folders), strict=True))
        complaints = [str(head) for head in heads.values() if isinstance(head, UserError)]
        whole = {folder: head for folder, head in heads.items() if not isinstance(head, UserError)}
        if not whole:
            raise UserError(complaints[0])
        try:
            schema = _common([head.schema.to_arrow_schema() for head in whole.values()])
        except pa.ArrowException as error:
            raise UserError(f"{into}: the runs' rows can't be one table ({str(error).splitlines()[0]})") from error

        def write(path: Path) -> None:
            # who reads it gets texts, however they were held here
            with pq.ParquetWriter(path, schema, compression="zstd", write_statistics=False, store_schema=False) as writer:
                writer.add_key_value_metadata(schema.metadata)
                for part in _parts(whole):
                    read = list(pool.map(_own, part, map(whole.__getitem__, part)))
                    complaints.extend(str(table) for table in read if isinstance(table, UserError))
                    tables = [table for table in read if isinstance(table, pa.Table)]
                    writer.write_table(pa.concat_tables([schema.empty_table(), *tables], promote_options="permissive").unify_dictionaries())
            if len(complaints) == len(folders):
                raise UserError(complaints[0])

        atomically(into, write)
    return complaints


def distinct(file: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """The values that some columns of a file have together, each once; of the columns those that it has.

    Raises: UserError when the file is missing or damaged.
    """
    head = _head(file)
    table = head if isinstance(head, UserError) else _table(file, head, columns)
    if isinstance(table, UserError):
        raise table
    return table.group_by(table.column_names, use_threads=False).aggregate([]).to_pylist()


def commits(file: Path) -> list[str]:
    """The code that the rows of a table were made by."""
    return sorted(code_of(**made) for made in distinct(file, ("commit", "dirty")))


def code_of(commit: str, dirty: bool) -> str:
    """The code that a run was made by, in words."""
    return f"{commit[:7]}{' with changes' if dirty else ''}"


def _head(file: Path) -> pq.FileMetaData | UserError:
    """What a file says of itself."""
    try:
        return pq.read_metadata(file)
    except (pa.ArrowException, OSError, ValueError) as error:
        return unreadable(file, error)


def _head_as_left(folder: Path) -> pq.FileMetaData | UserError:
    """What the rows of a run folder say of themselves, where they are as the run left them."""
    file = folder / ROWS
    head = _head(file)
    if not isinstance(head, UserError):
        try:
            refuse_changed(file, ROWS, folder / "provenance.json")
        except UserError as error:
            return error
    return head


def _own(folder: Path, head: pq.FileMetaData) -> pa.Table | UserError:
    """The rows of a run folder, where they are the run's own."""
    table = _table(folder / ROWS, head)
    if isinstance(table, UserError):
        return table
    if missing := {"root_seed", "run", "commit", "dirty"} - set(table.column_names):
        return UserError(f"{folder / ROWS}: partial, it lacks the columns {', '.join(sorted(missing))}; {AGAIN}")
    seeds, runs = (table[column].unique().to_pylist() for column in ("root_seed", "run"))
    found = {f"seed{seed}-{run}" for seed in seeds for run in runs}
    return table if found == {folder.name} else UserError(f"{folder / ROWS}: rows of {', '.join(sorted(found)) or 'no run'}; {AGAIN}")


def _table(file: Path, head: pq.FileMetaData, columns: Sequence[str] | None = None) -> pa.Table | UserError:
    """Columns of a file, those of the named that it has, its texts as codes of their values."""
    schema = head.schema.to_arrow_schema()
    texts = [field.name for field in schema if _is_text(field)]
    asked = None if columns is None else [column for column in columns if column in schema.names]
    try:
        parquet = pq.ParquetFile(file, metadata=head, read_dictionary=texts, pre_buffer=False)
        return parquet.read(asked, use_threads=False).replace_schema_metadata()
    except (pa.ArrowException, OSError, ValueError) as error:
        return unreadable(file, error)


def _is_text(field: pa.Field) -> bool:
    return pa.types.is_string(field.type) or pa.types.is_large_string(field.type)


def _common(schemas: Sequence[pa.Schema]) -> pa.Schema:
    """The columns of tables that are to be one, with what all of them say of their quantities."""
    fields = pa.unify_schemas([schema.remove_metadata() for schema in schemas], promote_options="permissive")
    quantities: dict[str, str] = {}
    for schema in schemas:
        quantities |= json.loads((schema.metadata or {}).get(DESCRIPTIONS, b"{}"))
    return pa.schema([field.with_type(TEXT) if _is_text(field) else field for field in fields], {DESCRIPTIONS: json.dumps(quantities)})


def _parts(heads: Mapping[Path, pq.FileMetaData]) -> Iterator[list[Path]]:
    """Files in turn, as many at a time as have about PART rows."""
    before = accumulate((head.num_rows for head in heads.values()), initial=0)
    for _, part in groupby(zip(heads, before, strict=False), key=lambda pair: pair[1] // PART):
        yield [file for file, _ in part]
