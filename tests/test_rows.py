from pathlib import Path

import pandas as pd
import pytest
import torch

from src import rows as row_table
from src.errors import UserError
from src.experiment import Context
from tests import tiny as module
from tests.conftest import CommandLine
from tests.tiny import Tiny

QUANTITIES = {"norm": "‖J_l‖, no unit", "rank": "rank J_l"}
STAMP = {"experiment": "tiny", "data": "digits", "scale": "smoke", "run": "0123456789", "commit": "abc", "dirty": False}


def some_rows() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "quantity": ["norm", "norm", "rank"],
            "value": [0.1 + 0.2, float("inf"), 3.0],
            "layer": [1, 2, 1],
            "activation": ["tanh", None, "relu"],
            "net_seed": [0, 1, 0],
        }
    )


def written(folder: Path) -> Path:
    path = folder / "rows.parquet"
    path.write_bytes(row_table.to_parquet(some_rows(), QUANTITIES, STAMP))
    return path


def test_rows_come_back_bit_for_bit_with_their_stamp_and_their_descriptions(tmp_path: Path) -> None:
    rows = row_table.read(written(tmp_path))
    pd.testing.assert_frame_equal(rows[some_rows().columns], some_rows(), check_exact=True)
    for column, value in STAMP.items():
        assert (rows[column] == value).all()
    assert rows.attrs["quantities"] == QUANTITIES


def test_a_row_for_each_quantity_measured_at_one_place() -> None:
    rows = list(row_table.measured({"layer": 2, "kind": "plain"}, norm=1.5, rank=3.0))
    assert rows == [
        {"quantity": "norm", "value": 1.5, "layer": 2, "kind": "plain"},
        {"quantity": "rank", "value": 3.0, "layer": 2, "kind": "plain"},
    ]
    assert list(row_table.measured({"layer": 2})) == []


def test_the_same_rows_give_the_same_bytes() -> None:
    assert row_table.to_parquet(some_rows(), QUANTITIES, STAMP) == row_table.to_parquet(some_rows(), QUANTITIES, STAMP)


@pytest.mark.parametrize("quantities", [{}, {"norm": "‖J_l‖"}, {**QUANTITIES, "cond": "cond J_l"}])
def test_every_quantity_is_described_and_measured(quantities: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"quantities measured and described differ: (norm, rank|rank|cond)"):
        row_table.to_parquet(some_rows(), quantities, STAMP)


def test_damage_is_named(tmp_path: Path) -> None:
    path = written(tmp_path)
    content = path.read_bytes()
    for damaged in (b"", b"rows", content[:-20], content[: len(content) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"rows\.parquet: damaged .*force=true"):
            row_table.read(path)
    with pytest.raises(UserError, match="not there"):
        row_table.read(tmp_path / "none.parquet")
    some_rows().to_parquet(path)
    with pytest.raises(UserError, match="lacks the columns data, experiment, run, scale"):
        row_table.read(path)


def test_pick_selects_by_quantity_and_coordinates() -> None:
    assert row_table.pick(some_rows(), "norm")["layer"].tolist() == [1, 2]
    assert row_table.pick(some_rows(), "norm", layer=2)["value"].tolist() == [float("inf")]
    assert row_table.pick(some_rows(), "norm", layer=2, activation="relu").empty


def finished(results: Path) -> list[str]:
    return [folder.name.partition("-")[0] for folder in row_table.finished_runs(results, "tiny")]


def test_finished_runs_are_found_oldest_first(start: CommandLine, tiny: Tiny) -> None:
    assert finished(Path("results")) == []
    start("seed=2")
    start("seed=0")

    def crash(context: Context) -> pd.DataFrame:
        raise ZeroDivisionError

    tiny.measures(crash)
    start("seed=1")
    start("seed=0", "force=true")
    assert finished(Path("results")) == ["seed2", "seed0"]


def rows_of_the_run() -> pd.DataFrame:
    (path,) = Path("results").glob("tiny/*/*/*/rows.parquet")
    return row_table.read(path)


def experiment(context: Context) -> pd.DataFrame:
    """A certificate, a training and a draw, as the real experiments have them."""
    from src.certificate import certify
    from src.training.loop import train

    model = context.config.model
    network = context.network(model, 0)
    inputs, targets = context.samples(context.data.test, 4)
    certificate = certify(network, inputs, targets)
    history = train(network, context.data, context.config.training, context.generator("order", 0)).history
    drawn = torch.randn(4, generator=context.generator("numbers"))
    return module.table([*certificate.layers["norm"], *history["train_loss"], *drawn.tolist()])


def config_of(*overrides: str) -> list[str]:
    return ["model.depth=4", "model.width=6", "training.max_steps=3", "training.batch_size=32", *overrides]


def test_the_same_seed_gives_the_same_rows_bit_for_bit(start: CommandLine, tiny: Tiny) -> None:
    tiny.measures(experiment)
    assert start(*config_of()).code == 0
    first = rows_of_the_run()
    torch.manual_seed(7)  # the state of the process doesn't matter
    assert start(*config_of("force=true")).code == 0
    second = rows_of_the_run()
    pd.testing.assert_frame_equal(first, second, check_exact=True)
    assert first["value"].to_numpy().tobytes() == second["value"].to_numpy().tobytes()


def test_another_seed_gives_other_rows(start: CommandLine, tiny: Tiny) -> None:
    start("seed=0")
    start("seed=1")
    one, other = (row_table.read(path) for path in Path("results").glob("tiny/*/*/*/rows.parquet"))
    assert (one["value"] != other["value"]).all()


def test_a_measurement_added_elsewhere_moves_no_other_number(start: CommandLine, tiny: Tiny) -> None:
    tiny.measures(experiment)
    assert start(*config_of()).code == 0
    before = rows_of_the_run()

    def extended(context: Context) -> pd.DataFrame:
        torch.rand(3)
        torch.randn(5, generator=context.generator("another purpose"))
        context.network(context.config.model, 1)
        return experiment(context)

    tiny.measures(extended)
    assert start(*config_of("force=true")).code == 0
    pd.testing.assert_frame_equal(before, rows_of_the_run(), check_exact=True)


def test_a_shared_generator_would_be_noticed(start: CommandLine, tiny: Tiny) -> None:
    def shared(extra: int) -> None:
        def measure(context: Context) -> pd.DataFrame:
            everything = context.generator("everything")
            torch.rand(extra, generator=everything)
            return module.table(torch.randn(4, generator=everything).tolist())

        tiny.measures(measure)

    shared(0)
    start()
    before = rows_of_the_run()
    shared(1)
    start("force=true")
    assert not before["value"].equals(rows_of_the_run()["value"])


def test_the_rows_know_where_they_come_from(start: CommandLine, tiny: Tiny) -> None:
    start("seed=5")
    rows = rows_of_the_run()
    (path,) = Path("results").glob("tiny/*/*/seed*")
    assert set(rows["run"]) == {path.name.partition("-")[2]}
    assert set(rows["root_seed"]) == {5}
    assert set(rows["experiment"]) == {"tiny"}
    assert set(rows["data"]) == set(rows["data_requested"]) == {"digits"}
    assert not rows["fallback"].any()
    assert set(rows["train_images"]) == {1437}
    assert set(rows["scale"]) == {"smoke"}
    assert {"commit", "dirty", "test_images"} <= set(rows)
