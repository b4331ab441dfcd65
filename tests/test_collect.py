from pathlib import Path

import pandas as pd
import pytest

from src import collect as collecting
from src import rows as row_table
from src.collect import code_of, collect, commits, distinct
from src.errors import UserError

STAMP = {"experiment": "tiny", "data": "digits", "scale": "smoke", "run": "0123456789", "commit": "0123456789", "dirty": False}


def written(file: Path, columns: dict[str, list], stamp: dict[str, object] = STAMP) -> Path:
    rows = pd.DataFrame(columns)
    file.write_bytes(row_table.to_parquet(rows, {quantity: f"{quantity}, no unit" for quantity in rows["quantity"]}, stamp))
    return file


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Rows whose columns differ: in which there are, in the type of their numbers, and in texts of which there are none."""
    return [
        written(tmp_path / "0.parquet", {"quantity": ["norm", "rank"], "value": [0.1 + 0.2, 3.0], "kind": ["plain", None]}),
        written(tmp_path / "1.parquet", {"quantity": ["loss"], "value": [1.5], "step": [3], "kind": [None]}, STAMP | {"dirty": True}),
        written(tmp_path / "2.parquet", {"quantity": ["loss"], "value": [float("inf")], "step": [0.5], "kind": ["another"]}),
    ]


@pytest.mark.parametrize("part", [1, 3, 2**20])
def test_files_are_collected_into_one_table(files: list[Path], part: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(collecting, "PART", part)
    assert collect(files, tmp_path / "all.parquet") == []
    rows = row_table.read(tmp_path / "all.parquet")
    alone = [row_table.read(file) for file in files]
    assert rows["value"].tolist() == [value for own in alone for value in own["value"]]
    assert rows["step"].fillna(-1).tolist() == [-1, -1, 3, 0.5]
    assert rows["kind"].fillna("none").tolist() == ["plain", "none", "none", "another"]
    assert rows.attrs["quantities"] == {name: f"{name}, no unit" for name in ("norm", "rank", "loss")}
    assert {*rows["run"]} == {STAMP["run"]}


def test_what_cannot_be_read_is_left_out_and_told(files: list[Path], tmp_path: Path) -> None:
    content = files[1].read_bytes()
    page, footer = bytes(len(content) // 2) + content[len(content) // 2 :], content[:-20]
    for damaged in (page, footer, b"PAR1", None):
        files[1].unlink() if damaged is None else files[1].write_bytes(damaged)
        (complaint,) = collect(files, tmp_path / "all.parquet")
        assert complaint.startswith(f"{files[1]}: not there" if damaged is None else f"{files[1]}: damaged (")
        assert len(row_table.read(tmp_path / "all.parquet")) == 3
    before = (tmp_path / "all.parquet").read_bytes()
    with pytest.raises(UserError, match=r"1\.parquet: (not there|damaged)"):
        collect(files[1:2], tmp_path / "all.parquet")
    assert (tmp_path / "all.parquet").read_bytes() == before


def test_the_values_that_columns_have_together(files: list[Path]) -> None:
    assert distinct(files[0], ("run", "none", "kind")) == [{"run": "0123456789", "kind": "plain"}, {"run": "0123456789", "kind": None}]
    assert distinct(files[1], ("run", "dirty")) == [{"run": "0123456789", "dirty": True}]
    files[0].write_bytes(b"")
    with pytest.raises(UserError, match=r"0\.parquet: (not there|damaged)"):
        distinct(files[0], ("run",))


def test_the_code_that_rows_were_made_by(files: list[Path], tmp_path: Path) -> None:
    collect(files, tmp_path / "all.parquet")
    assert commits(tmp_path / "all.parquet") == ["0123456", "0123456 with changes"]
    assert code_of("0" * 40, dirty=False) == "0000000"
