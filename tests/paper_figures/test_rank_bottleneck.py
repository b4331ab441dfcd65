"""The figure and table of rank_bottleneck."""

from pathlib import Path

import pytest

from paper_figures import rank_bottleneck as figure_module
from paper_figures.style import origin
from src.rows import pick
from tests.paper_figures.drawn import check_panels, draw, read

NAME = "rank_bottleneck"


def test_the_table_has_the_ranks_of_the_example_of_every_bottleneck_and_after_training(tmp_path: Path) -> None:
    rows = read(NAME, tmp_path)
    table = figure_module.table(rows)
    assert len(table) == 3 + 2 * 3 * 3 + 3 * 3
    (example,) = table.query("part == 'example' and activation == 'linear'").to_dict("records")
    assert [example[f"∇W_{layer}"] for layer in range(1, 6)] == ["4", "4", "63", "4", "4"]
    assert (example["place"], example["rank"], example["batch"], example["nets"]) == (3, 4, 512, 2)
    (line,) = table.query("source == 'images' and activation == 'relu' and rank == 16").to_dict("records")
    where = {"part": "ranks", "source": "images", "activation": "relu", "rank": 16, "batch": 256}
    assert line["∇W_2"] == f"{pick(rows, 'gradient_rank', layer=2, **where)['value'].item():g}"
    assert line["tolerance"] == pytest.approx(pick(rows, "gradient_tolerance", **where)["value"].max())
    (trained,) = table.query("trained == 'all' and activation == 'linear'").to_dict("records")
    assert (trained["steps"], trained["source"], trained["∇W_1"]) == (3, "images", "4")


def test_draws_that_differ_are_told_by_their_range(tmp_path: Path) -> None:
    rows = read(NAME, tmp_path)
    chosen = pick(rows, "gradient_rank", part="example", activation="relu", layer=5)
    rows.loc[chosen.index, "value"] = [61.0, 63.0]
    (example,) = figure_module.table(rows).query("part == 'example' and activation == 'relu'").to_dict("records")
    assert example["∇W_5"] == "61–63"


def test_the_lines_are_the_rows(tmp_path: Path) -> None:
    rows = read(NAME, tmp_path)
    by_layer, training, against_rank, against_batch, outside, precision = draw(NAME, rows).axes
    linear = dict(zip(*by_layer.get_lines()[0].get_data(), strict=True))
    assert [linear[layer - 0.2] for layer in range(1, 6)] == [4, 4, 63, 4, 4]
    assert len(training.get_lines()[0].get_xdata()) == len(pick(rows, "gradient_rank", activation="linear").query("steps > 0"))
    for axis, column, values in ((against_rank, "rank", [1, 4, 16]), (against_batch, "batch", [1, 16, 256])):
        (bound,) = (line for line in axis.get_lines() if line.get_label().startswith("as stated"))
        assert bound.get_xdata().tolist() == values, column
    assert against_rank.get_lines()[1].get_ydata().tolist() == [1, 4, 16]
    frozen = pick(rows, "outside", layer=1, activation="linear", trained="only layer 1").sort_values("steps")["value"]
    assert outside.get_lines()[5].get_ydata() == pytest.approx(frozen.to_numpy())
    assert [container.get_label() for container in precision.containers] == ["exact", "float32", "float64"]


def test_a_training_that_diverged_leaves_a_gap(tmp_path: Path) -> None:
    rows = read(NAME, tmp_path)
    lost = (rows["trained"] == "all") & (rows["activation"] == "relu") & (rows["steps"] > 0)
    table = figure_module.table(rows[~lost])
    assert table.query("trained == 'all'")["activation"].tolist() == ["linear", "tanh"]
    check_panels(draw(NAME, rows[~lost]))


def test_a_share_of_exactly_nothing_is_drawn(tmp_path: Path) -> None:
    rows = read(NAME, tmp_path)
    rows.loc[rows["quantity"] == "outside", "value"] = 0.0
    figure = draw(NAME, rows)
    check_panels(figure)
    assert figure._supxlabel.get_text().startswith(origin(rows))
    assert figure.axes[4].get_lines()[0].get_ydata() == pytest.approx(figure_module.ROUNDING)
