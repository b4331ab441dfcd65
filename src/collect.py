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
from src.results import atomically
from src.rows import DESCRIPTIONS, unreadable

PART = 2**20  # rows that are held at a time
TEXT = pa.dictionary(pa.int32(), pa.string())  # as codes of their values texts are read and written in a third less time


def collect(files: Sequence[Path], into: Path) -> list[str]:
    """Write the rows of many files into one table; a column that some haven't is empty there.

    Returns: a line for each file that is missing or damaged: its rows are left out.

    Raises: UserError when no file is left; OSError when the table can't be written.
    """
    with ThreadPoolExecutor(cpus()) as pool:
        heads = dict(zip(files, pool.map(_head, files), strict=True))
        complaints = [str(head) for head in heads.values() if isinstance(head, UserError)]
        whole = {file: head for file, head in heads.items() if not isinstance(head, UserError)}
        if not whole:
            raise UserError(complaints[0])
        schema = _common([head.schema.to_arrow_schema() for head in whole.values()])

        def write(path: Path) -> None:
            # who reads it gets texts, however they were held here
            with pq.ParquetWriter(path, schema, compression="zstd", write_statistics=False, store_schema=False) as writer:
                writer.add_key_value_metadata(schema.metadata)
                for part in _parts(whole):
                    read = list(pool.map(_table, part, map(whole.__getitem__, part)))
                    complaints.extend(str(table) for table in read if isinstance(table, UserError))
                    tables = [table for table in read if isinstance(table, pa.Table)]
                    writer.write_table(pa.concat_tables([schema.empty_table(), *tables], promote_options="permissive").unify_dictionaries())

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
    except (pa.ArrowInvalid, OSError) as error:
        return unreadable(file, error)


def _table(file: Path, head: pq.FileMetaData, columns: Sequence[str] | None = None) -> pa.Table | UserError:
    """Columns of a file, those of the named that it has, its texts as codes of their values."""
    schema = head.schema.to_arrow_schema()
    texts = [field.name for field in schema if _is_text(field)]
    asked = None if columns is None else [column for column in columns if column in schema.names]
    try:
        parquet = pq.ParquetFile(file, metadata=head, read_dictionary=texts, pre_buffer=False)
        return parquet.read(asked, use_threads=False).replace_schema_metadata()
    except (pa.ArrowInvalid, OSError) as error:
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
