import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from src import collect as collecting
from src import rows as row_table
from src.collect import code_of, collect, commits, distinct
from src.errors import UserError

STAMP = {"experiment": "tiny", "data": "digits", "scale": "smoke", "run": "0123456789", "commit": "0123456789", "dirty": False}


def written(folder: Path, columns: dict[str, list], **stamp: object) -> Path:
    """The folder of a run with rows of its own, or of what is said of them."""
    folder.mkdir()
    seed = int(folder.name.partition("-")[0].removeprefix("seed"))
    content = pd.DataFrame(columns)
    described = {quantity: f"{quantity}, no unit" for quantity in content["quantity"]}
    rows = row_table.to_parquet(content, described, {**STAMP, "root_seed": seed, **stamp})
    (folder / "rows.parquet").write_bytes(rows)
    (folder / "provenance.json").write_text(json.dumps({"sha256": {"rows.parquet": hashlib.sha256(rows).hexdigest()}}))
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Rows whose columns differ: in which there are, in the type of their numbers, and in texts of which there are none."""
    run = STAMP["run"]
    return [
        written(tmp_path / f"seed0-{run}", {"quantity": ["norm", "rank"], "value": [0.1 + 0.2, 3.0], "kind": ["plain", None]}),
        written(tmp_path / f"seed1-{run}", {"quantity": ["loss"], "value": [1.5], "step": [3], "kind": [None]}, dirty=True),
        written(tmp_path / f"seed2-{run}", {"quantity": ["loss"], "value": [float("inf")], "step": [0.5], "kind": ["another"]}),
    ]


@pytest.mark.parametrize("part", [1, 3, 2**20])
def test_the_rows_of_many_runs_are_one_table(folders: list[Path], part: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(collecting, "PART", part)
    assert collect(folders, tmp_path / "all.parquet") == []
    rows = row_table.read(tmp_path / "all.parquet")
    alone = [row_table.read(folder / "rows.parquet") for folder in folders]
    assert rows["value"].tolist() == [value for own in alone for value in own["value"]]
    assert rows["step"].fillna(-1).tolist() == [-1, -1, 3, 0.5]
    assert rows["kind"].fillna("none").tolist() == ["plain", "none", "none", "another"]
    assert rows.attrs["quantities"] == {name: f"{name}, no unit" for name in ("norm", "rank", "loss")}
    assert rows["root_seed"].tolist() == [0, 0, 1, 2]


def removed(file: Path) -> None:
    file.unlink()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 4
    file.write_bytes(content)


def another(file: Path) -> None:
    """The rows of another run, as it left them."""
    for name in ("rows.parquet", "provenance.json"):
        file.with_name(name).write_bytes((file.parent.parent / f"seed0-{STAMP['run']}" / name).read_bytes())


def unexplained(file: Path) -> None:
    file.with_name("provenance.json").unlink()


def without_pages(file: Path) -> None:
    """Damaged where nothing but its rows tell."""
    content = file.read_bytes()
    file.write_bytes(content[:4] + bytes(len(content) - 2000) + content[len(content) - 1996 :])
    file.with_name("provenance.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (removed, "rows.parquet: not there"),
        (cut, "rows.parquet: damaged"),
        (flipped, "rows.parquet: "),
        (another, "rows.parquet: rows of seed0-0123456789"),
        (unexplained, "provenance.json: missing or damaged"),
        (without_pages, "rows.parquet: damaged"),
    ],
)
def test_what_is_not_as_its_run_left_it_is_left_out_and_told(
    folders: list[Path], damage: Callable[[Path], None], told: str, tmp_path: Path
) -> None:
    damage(folders[1] / "rows.parquet")
    (complaint,) = collect(folders, tmp_path / "all.parquet")
    assert complaint.startswith(f"{folders[1]}/{told}")
    assert row_table.read(tmp_path / "all.parquet")["root_seed"].tolist() == [0, 0, 2]
    before = (tmp_path / "all.parquet").read_bytes()
    with pytest.raises(UserError, match=rf"{folders[1]}/{told}"):
        collect(folders[1:2], tmp_path / "all.parquet")
    assert (tmp_path / "all.parquet").read_bytes() == before
    assert {file.name for file in tmp_path.iterdir()} == {"all.parquet", *(folder.name for folder in folders)}


def test_rows_that_do_not_say_what_they_are_of_are_left_out(folders: list[Path], tmp_path: Path) -> None:
    pd.DataFrame({"quantity": ["loss"], "value": [1.0]}).to_parquet(folders[1] / "rows.parquet")
    (folders[1] / "provenance.json").write_text("{}")
    (complaint,) = collect(folders, tmp_path / "all.parquet")
    assert "rows.parquet: partial, it lacks the columns commit, dirty, root_seed, run" in complaint


def test_columns_of_texts_and_of_numbers_are_no_table(folders: list[Path], tmp_path: Path) -> None:
    odd = written(tmp_path / f"seed3-{STAMP['run']}", {"quantity": ["loss"], "value": ["much"]})
    with pytest.raises(UserError, match=r"all\.parquet: the runs' rows can't be one table \(Unable to merge"):
        collect([*folders, odd], tmp_path / "all.parquet")


def test_the_values_that_columns_have_together(folders: list[Path]) -> None:
    file = folders[0] / "rows.parquet"
    assert distinct(file, ("run", "none", "kind")) == [{"run": "0123456789", "kind": "plain"}, {"run": "0123456789", "kind": None}]
    assert distinct(folders[1] / "rows.parquet", ("run", "dirty")) == [{"run": "0123456789", "dirty": True}]
    file.write_bytes(b"")
    with pytest.raises(UserError, match=r"rows\.parquet: damaged"):
        distinct(file, ("run",))


def test_the_code_that_rows_were_made_by(folders: list[Path], tmp_path: Path) -> None:
    collect(folders, tmp_path / "all.parquet")
    assert commits(tmp_path / "all.parquet") == ["0123456", "0123456 with changes"]
    assert code_of("0" * 40, dirty=False) == "0000000"
