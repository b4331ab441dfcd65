"""Every paper's file composes, plans what it trains, and is judged by its rows."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import product
from typing import get_args

import numpy as np
import pandas as pd
import pytest

from experiments import reproduction
from src.config import ScaleName
from src.errors import UserError
from src.plan import networks_and_steps
from src.rows import pick
from src.training.loop import planned_steps
from tests.experiments.measured import PAPERS, Change, after, config, context, put, small_context, small_rows, verdicts

SMALL = ("training.max_steps=3", "data.test_size=60", "grid.samples=4")


def ranked(paper: str, criterion: str, sign: int) -> Change:
    """Test errors in the order that a form claims, or in the reverse one, the same for every seed."""
    pairs = reproduction.orders_of(paper)[criterion]
    ranks = dict.fromkeys((name for pair in pairs for name in pair), 0)
    for _ in ranks:
        for better, worse in pairs:
            ranks[worse] = max(ranks[worse], ranks[better] + 1)

    def change(rows: pd.DataFrame) -> pd.DataFrame:
        for name, rank in ranks.items():
            if name in set(rows["net"]):
                rows = put("test_error", 40.0 + 10 * sign * rank, part="net", net=name)(rows)
        return rows

    return change


def reported(factor: float) -> Change:
    """As at scale=paper: every net has a published error of 8, and this multiple of it."""

    def change(rows: pd.DataFrame) -> pd.DataFrame:
        return put("test_error", factor * 8.0, part="net")(rows.assign(published=8.0))

    return change


def bounded(error: float) -> Change:
    return lambda rows: put("test_error", error, part="net")(rows.assign(published_above=60.0))


def over(depths: list[int], learns: Callable[[int, float], bool], weight_vars: tuple[float, ...] = (2.0,), steps: int = 2000) -> Change:
    """Rows written by hand: nets at every depth and σw², each of which has learnt everything or nothing."""

    def change(rows: pd.DataFrame) -> pd.DataFrame:
        first = pick(rows, "train_error", part="net").iloc[0]
        where = {"depth", "weight_var", "net_seed", "steps", "value"}
        written = [
            {
                **first.drop(where),
                "depth": depth,
                "weight_var": weight_var,
                "net_seed": seed,
                "steps": steps,
                "value": 0.0 if learns(depth, weight_var) else 90.0,
            }
            for depth, weight_var, seed in product(depths, weight_vars, range(3))
        ]
        return pd.DataFrame(written)

    return change


def courses(lowest: Mapping[int, float], last: Mapping[int, float], steps: int = 16000) -> Change:
    """The percentile of the last hidden layer by depth: from .5 down to the lowest, and from there to the last."""

    def change(rows: pd.DataFrame) -> pd.DataFrame:
        first = pick(rows, "top_activation", part="course").iloc[0]
        written = [
            {**first.drop({"depth", "step", "value", "net_seed"}), "depth": depth, "step": step, "net_seed": seed, "value": value}
            for depth, seed in product(lowest, range(3))
            for step, value in ((0, 0.5), (steps // 4, lowest[depth]), (steps, last[depth]))
        ]
        kept = rows[rows["quantity"] == "test_error"]
        return pd.concat([kept, pd.DataFrame(written)], ignore_index=True)

    return change


ORDERED = [(paper, criterion) for paper in PAPERS for criterion in reproduction.orders_of(paper.partition("/")[2])]
DEEP = [8, 16, 32, 64]  # 6ξ = 21.8 at σw² = 1
SCHOENHOLZ, YANG, GLOROT = "reproduction/schoenholz2017", "reproduction/yang2019", "reproduction/glorot2010"
LOW = {5: 0.05, 6: 0.05}
CASES = [
    *(
        (paper, name, ranked(paper.partition("/")[2], name, sign), word)
        for paper, name in ORDERED
        for sign, word in ((1, "holds"), (-1, "refuted"))
    ),
    *(
        (paper, "published", reported(factor), word)
        for paper in PAPERS
        for factor, word in ((1.0, "holds"), (1.3, "refuted"), (0.7, "refuted"))
    ),
    ("reproduction/he2016", "published_failure", bounded(90.0), "holds"),
    ("reproduction/he2016", "published_failure", bounded(20.0), "refuted"),
    (SCHOENHOLZ, "trainable_depth", over(DEEP, lambda depth, var: depth <= 16 or var > 1, (1.0, 1.761)), "holds"),
    (SCHOENHOLZ, "trainable_depth", over([*DEEP, 128], lambda depth, var: depth <= 64 or var > 1, (1.0, 1.761)), "refuted"),
    (SCHOENHOLZ, "trainable_depth", over([8, 16], lambda depth, var: True, (1.0, 1.761)), "inconclusive"),
    (SCHOENHOLZ, "learns_within_reach", over(DEEP, lambda depth, var: depth <= 16 or var > 1, (1.0, 1.761)), "holds_if"),
    (SCHOENHOLZ, "learns_within_reach", over(DEEP, lambda depth, var: depth <= 8 or var > 1, (1.0, 1.761)), "refuted"),
    (SCHOENHOLZ, "learns_within_reach", over(DEEP, lambda depth, var: True, (1.0, 1.761)), "refuted"),
    (YANG, "depth_limit", over([20, 40, 60], lambda depth, _: depth < 50), "holds"),
    (YANG, "depth_limit", over([20, 100, 150], lambda depth, _: depth < 120), "refuted"),
    (YANG, "depth_limit", over([20, 40, 60], lambda depth, _: True), "inconclusive"),
    (YANG, "depth_limit", over([20, 40, 60], lambda depth, _: depth < 50, steps=200), "inconclusive"),
    (YANG, "deepest_is_worse", over([8, 64], lambda depth, _: depth < 50), "holds"),
    (YANG, "deepest_is_worse", over([8, 64], lambda depth, _: depth > 50), "refuted"),
    (GLOROT, "top_layer_saturates", courses(LOW, LOW), "holds"),
    (GLOROT, "top_layer_saturates", courses({5: 0.3, 6: 0.05}, LOW), "refuted"),
    (GLOROT, "top_layer_escapes", courses(LOW, {5: 0.5, 6: 0.05}), "holds_if"),
    (GLOROT, "top_layer_escapes", courses(LOW, {5: 0.05, 6: 0.05}), "refuted"),
    (GLOROT, "five_never_escape", courses(LOW, {5: 0.5, 6: 0.05}), "holds_if"),
    (GLOROT, "five_never_escape", courses(LOW, {5: 0.5, 6: 0.5}), "refuted"),
    (GLOROT, "five_never_escape", courses(LOW, LOW, steps=100), "inconclusive"),
]
# "published" is no form of papers that report no number
CASES = [case for case in CASES if case[1] in config(case[0]).criteria]


@pytest.mark.parametrize("scale", get_args(ScaleName))
def test_every_paper_composes_and_its_check_passes(scale: str) -> None:
    for paper in PAPERS:
        asked = context(paper, f"scale={scale}")
        reproduction.check(asked.config, asked.data)
        assert asked.config.grid.seeds >= (2 if scale == "smoke" else 3)
        assert f"reproduction/{asked.config.grid.paper}" == paper


@pytest.mark.parametrize("paper", PAPERS)
def test_the_same_seed_gives_the_same_rows_and_the_plan_is_kept(paper: str) -> None:
    rows, again = small_rows(paper), small_context(paper)
    pd.testing.assert_frame_equal(reproduction.measure(again), rows, check_exact=True)
    assert (again.tally["networks"], again.tally["steps"]) == networks_and_steps(reproduction.plan(again))
    assert set(rows["quantity"]) == set(reproduction.QUANTITIES)
    told = verdicts(paper, rows)
    assert told.keys() == config(paper).criteria.keys()
    for name in {"published", "published_failure"} & told.keys():
        assert (told[name].verdict, told[name].evidence) == ("inconclusive", "no cell: nothing was measured")


@pytest.mark.parametrize(("paper", "criterion", "change", "word"), CASES)
def test_the_verdict_follows_the_rows(paper: str, criterion: str, change: Change, word: str) -> None:
    criteria = {criterion: config(paper).criteria[criterion]}
    (verdict,) = reproduction.judge(after(small_rows(paper), [change]), criteria)
    assert verdict.verdict == word, verdict.evidence


def test_every_criterion_is_seen_on_both_sides() -> None:
    for paper in PAPERS:
        words = {criterion: {word for n, case, _, word in CASES if (n, case) == (paper, criterion)} for criterion in config(paper).criteria}
        assert [criterion for criterion, found in words.items() if "refuted" not in found or not found & {"holds", "holds_if"}] == []


def test_nets_that_both_guess_are_in_no_order() -> None:
    paper = "reproduction/ioffe2015"
    (verdict,) = reproduction.judge(put("test_error", 90.0, part="net")(small_rows(paper)), config(paper).criteria)
    assert verdict.verdict == "inconclusive"


def test_errors_are_held_to_published_ones_at_scale_paper_on_all_images_of_their_data_alone() -> None:
    def held(scale: str, data: str, *overrides: str) -> list[float]:
        asked = context("reproduction/nokland2019", f"scale={scale}", *overrides)
        asked = replace(asked, data=replace(asked.data, name=data))
        nets = reproduction.settings(asked.config, data)
        return [reproduction._reported(asked, setting.net)["published"] for setting in nets]

    assert held("paper", "mnist") == [0.75, 0.68, 0.80, 0.62]
    assert held("paper", "cifar10") == [33.56, 32.33, 33.48, 30.93]
    for other in (("quick", "mnist"), ("paper", "digits"), ("paper", "mnist", "data.train_size=1000")):
        assert np.isnan(held(*other)).all()


def test_a_net_has_its_own_depth_width_and_schedule() -> None:
    nets = {setting.net.name: setting for setting in reproduction.settings(config("reproduction/he2016", "scale=paper"), "cifar10")}
    assert len(nets) == 10
    assert (nets["ResNet-110"].model.depth, nets["ResNet-110"].training.schedule) == (110, "warm_steps")
    assert (nets["plain-56"].model.skip, nets["plain-56"].training.schedule) == ("none", "steps")
    lengths = {"he2016": 64_000, "ioffe2015": 50_000, "schoenholz2017": 14_000, "glorot2010": 2_000_000, "nokland2019": 46_800}
    for paper, steps in lengths.items():
        first, *_ = reproduction.settings(config(f"reproduction/{paper}", "scale=paper"), "mnist")
        assert planned_steps(first.training, 50_000 if paper == "he2016" else 60_000) == steps
    wide = reproduction.settings(config("reproduction/nokland2019", "scale=paper"), "cifar10")
    assert {setting.model.width for setting in wide} == {3000}


@pytest.mark.parametrize(
    ("paper", "overrides", "told"),
    [
        ("ioffe2015", ["grid.trained=[nobody]"], "grid.trained: among"),
        ("ioffe2015", ["grid.orders={normalised_is_better:[[without,with BatchNorm]]}"], "grid.orders: stand in the paper's file"),
        ("ioffe2015", ["grid.samples=1000"], "grid.samples: at most"),
        ("ioffe2015", ["grid.nets=[{name: x, data: mnist, model: {deepth: 4}}]", "grid.trained=[]"], "grid.orders: of grid.nets"),
        ("yang2019", ["grid.nets=[{name: batch 32, data: mnist, published: 1.0}]"], "grid.nets: names and reported errors stand in"),
        ("yang2019", ["grid.nets=[{name: x, data: mnist, model: {wdth: 4}}]"], "grid.nets: x: model: unknown key 'wdth'"),
        ("yang2019", ["grid.nets=[{name: x, data: mnist, model: {norm: group}}]"], "grid.nets: x: model: norm: "),
        ("yang2019", ["grid.nets=[{name: x, data: mnist, training: {batch_size: 9999}}]"], "grid.nets: x: batch_size: 9999 exceeds"),
    ],
)
def test_what_cannot_be_trained_is_refused(paper: str, overrides: list[str], told: str) -> None:
    asked = context(f"reproduction/{paper}", *overrides)
    with pytest.raises(UserError, match=told.replace("(", r"\(")):
        reproduction.check(asked.config, asked.data)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["grid.nets=[{name: x, data: imagenet}]"], "grid.nets.0.data: "),
        (["grid.nets=[{name: x, data: mnist, sequential: true}]"], "auxiliary and sequential speak of local losses"),
        (["grid.nets=[{name: x, data: mnist, loss: sim, exit_weight: 0.1}]"], "exit_weight goes with backprop"),
        (["grid.paper=yang2019"], "claim: stands in the experiment's own file"),
        (["criteria.normalised_is_better.at_least=-1"], "conf/experiment/reproduction/ioffe2015.yaml"),
        (["model.norm=batch"], "it leaves open model.width"),
    ],
)
def test_what_is_wrong_is_told_before_anything_heavy_is_imported(overrides: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        config("reproduction/ioffe2015", *overrides)
