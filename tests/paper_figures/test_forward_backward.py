"""The figure and table of forward_backward."""

from pathlib import Path

import numpy as np
import pytest

from experiments.forward_backward import PATIENTS
from paper_figures import forward_backward as figure_module
from src.rows import pick
from src.statistics import paired_difference, t_interval
from tests.experiments.measured import put
from tests.paper_figures.drawn import check_panels, draw, read

NAME = "forward_backward"


PATIENT = "tanh, σw²=1"
NAMES = {"skip": "skip", "batch": "BatchNorm", "layer": "LayerNorm", "exits": "auxiliary losses"}


@pytest.mark.parametrize("when", ["initial", "trained"])
def test_the_table_is_forwards_and_backwards_against_the_remedies(when: str, tmp_path: Path) -> None:
    rows = read(NAME, tmp_path)
    table = figure_module.table(rows).set_index(["chain", "when", "of"])
    assert list(table.columns[::2]) == ["plain", *NAMES.values()]
    assert len(table) == 6 * len(PATIENTS)
    for way in ("forward", "backward"):
        nets = pick(rows, f"{way}_lock", part="remedy", patient=PATIENT, when=when)
        locks = nets.pivot(index="net_seed", columns="remedy", values="value")
        line = table.loc[(PATIENT, when, f"{way}s (decades)")]
        plain = t_interval(locks["plain"])
        assert (line["plain"], line["± plain"]) == pytest.approx((plain.value, plain.hi - plain.value))
        distance = locks if way == "forward" else locks.abs()
        for remedy, name in NAMES.items():
            gain = paired_difference(distance["plain"], distance[remedy])
            assert (line[name], line[f"± {name}"]) == pytest.approx((gain.value, gain.hi - gain.value), abs=1e-12)


def test_the_table_has_accuracies_and_counts_what_diverged(tmp_path: Path) -> None:
    rows = read(NAME, tmp_path)
    lost = pick(rows, "diverged", patient=PATIENT, remedy="skip").index
    table = figure_module.table(rows.assign(value=rows["value"].where(~rows.index.isin(lost), 1.0))).set_index(["chain", "of"])
    assert table.loc[(PATIENT, "diverged (nets)"), list(NAMES.values())].tolist() == [2, 0, 0, 0]
    accuracy = pick(rows, "test_accuracy", patient=PATIENT, remedy="layer")["value"].mean()
    assert table.loc[(PATIENT, "test accuracy"), "LayerNorm"] == pytest.approx(accuracy)


def test_a_training_that_diverged_stands_beyond_all_that_is_finite(tmp_path: Path) -> None:
    rows = read(NAME, tmp_path)
    for lost, pairs, gain in (("skip", 1, -np.inf), ("plain", len(NAMES), np.inf)):
        changed = put("diverged", 1.0, remedy=lost)(rows)
        table = figure_module.table(changed).set_index(["when", "of"])
        assert (table.loc[("trained", "forwards (decades)"), "skip"] == gain).all()
        figure = draw(NAME, changed)
        check_panels(figure)
        for axis in figure.axes[4:]:
            rows_of = dict(zip((label.get_text() for label in axis.get_yticklabels()), axis.get_yticks(), strict=True))
            beyond = rows_of.pop("−∞" if gain < 0 else "∞")
            assert all((beyond < tick) == (gain < 0) for tick in rows_of.values())
            heights = np.concatenate([line.get_ydata() for line in axis.get_lines() if line.get_marker() in "os^"])
            assert (heights == beyond).sum() == len(PATIENTS) * pairs
            assert ((heights < beyond) == (gain > 0))[heights != beyond].all()
