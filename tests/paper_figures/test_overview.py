"""The overview: its numbers are those of the rows, and it is drawn from all nine experiments."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from paper_figures import overview
from paper_figures.products import produce
from paper_figures.sources import HERE, Shelf
from src import rows as row_table
from src.errors import UserError
from src.rows import pick


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    return pd.concat([row_table.read(HERE / "reference" / f"{name}.parquet") for name in overview.EXPERIMENTS], ignore_index=True)


def test_the_table_has_the_measured_numbers_and_what_is_predicted(rows: pd.DataFrame) -> None:
    table = overview.table(rows).set_index("panel")
    chains = rows[(rows["experiment"] == "vanishing_products") & (rows["weight_var"] == overview.LOCKED)]
    rate = pick(chains, "rate", part="rate", activation="tanh")["value"]
    assert table.loc["a", "measured"] == pytest.approx(rate.mean())
    assert table.loc["a", "predicted"] == pytest.approx(np.log(0.8802), abs=1e-4)  # χ(1.3)
    assert table.loc["d", "predicted"] == pytest.approx(0.0557, abs=1e-4)
    assert table.loc["f", "predicted"] == pytest.approx(-32 * np.log(2))
    assert table.loc["h", ["measured", "predicted"]].tolist() == [9, 9]
    assert (table["lo"] <= table["measured"]).all()
    assert (table["measured"] <= table["hi"]).all()


def test_the_gain_of_panel_i_is_paired_by_seed(rows: pd.DataFrame) -> None:
    own = rows[rows["experiment"] == "deep_supervision"]
    nets = pick(own, "test_accuracy", part="training", heads="random", weight_var=0.5, depth=16, boost=1.0, adam=0.0).set_index("net_seed")
    plain, exits = nets.query("schedule == 'none'")["value"], nets.query("schedule == 'constant' and every == 1 and alpha == 1")["value"]
    assert overview.table(rows).set_index("panel").loc["i", "measured"] == pytest.approx((exits - plain).mean())


def test_without_one_of_its_experiments_it_is_not_drawn(tmp_path: Path) -> None:
    for name in overview.EXPERIMENTS[:-1]:
        for file in (HERE / "reference").glob(f"{name}.*"):
            shutil.copy(file, tmp_path)
    with pytest.raises(UserError, match="experiment=certificate"):
        produce("overview", Shelf(tmp_path / "none", tmp_path), mixed=False)
