import json
import math
from dataclasses import asdict, replace
from io import StringIO

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from src.config import Criterion
from src.statistics import exactly, greatest, t_interval
from src.verdict import INTERVAL, Verdict, cell, cells_by, decide, judge_forms, to_frame, to_table

few = settings(max_examples=30, deadline=None)
numbers = st.floats(-5, 5)
limits = st.none() | numbers


def criterion(at_least=0.0, at_most=None, condition=None, form="precise", **more):
    return Criterion(form, "x ≥ 0", "0 ≤ x", at_least, at_most, condition, **more)


def cells(*intervals, n=5, freedom=0, **columns):
    """One cell an interval (lo, hi), estimated by its middle; none of Student's unless it has degrees of freedom."""
    middle = [lo if lo == hi else 0.0 if math.isinf(lo) else (lo + hi) / 2 for lo, hi in intervals]
    frame = pd.DataFrame([[*interval] for interval in intervals], columns=["lo", "hi"], dtype=float)
    return frame.assign(**columns).assign(estimate=np.array(middle, float), n=n, freedom=freedom)[[*columns, *INTERVAL]]


def word(intervals, chi=None, **limits):
    return decide("claim/form", criterion(**limits), cells(*intervals, **({} if chi is None else {"chi": chi}))).verdict


def test_a_cell_is_its_condition_and_its_estimate():
    assert cell(exactly(2.0), depth=3, kind="plain") == {
        "depth": 3,
        "kind": "plain",
        **dict(zip(INTERVAL, (2.0, 2.0, 2.0, 1, 0), strict=True)),
    }
    assert cell(t_interval([1.0, 3.0]))["freedom"] == 1


def test_cells_by_makes_one_cell_a_group_and_none_of_nothing():
    rows = pd.DataFrame({"depth": [2, 2, 4, np.nan], "kind": ["a", "a", "b", "b"], "value": [1.0, 3.0, 5.0, 7.0]})
    expected = [cell(greatest([1.0, 3.0]), depth=2, kind="a"), cell(greatest([5.0]), depth=4, kind="b")]
    assert cells_by(rows, ["depth", "kind"], greatest).to_dict("records") == expected
    assert cells_by(rows, ["kind"], lambda values: exactly(values.sum())).to_dict("list")["estimate"] == [4.0, 12.0]
    nothing = cells_by(rows.iloc[:0], ["depth", "kind"], greatest)
    assert nothing.empty
    assert list(nothing) == ["depth", "kind", *INTERVAL]
    assert decide("claim/form", criterion(condition="depth > 2"), nothing).verdict == "inconclusive"


@pytest.mark.parametrize(
    ("intervals", "limits", "expected"),
    [
        ([(1, 2), (0, 3)], {}, "holds"),
        ([(1, 2), (-1, 3)], {}, "inconclusive"),
        ([(1, 2), (-1, 3), (-2, -1)], {}, "refuted"),
        ([(1, 2), (-2, -1)], {}, "refuted"),
        ([(-3, -2), (-1, 0)], {"at_least": None, "at_most": 0}, "holds"),
        ([(-3, -2), (0.1, 1)], {"at_least": None, "at_most": 0}, "refuted"),
        ([(-3, -2), (-1, 1)], {"at_least": None, "at_most": 0}, "inconclusive"),
        ([(0, 1)], {"at_most": 1}, "holds"),
        ([(0, 1.1)], {"at_most": 1}, "inconclusive"),
        ([(1.1, 1.2)], {"at_most": 1}, "refuted"),
        ([(-0.2, -0.1)], {"at_most": 1}, "refuted"),
        ([(-1, 2)], {"at_most": 1}, "inconclusive"),
        ([(math.inf, math.inf)], {}, "holds"),
        ([(-math.inf, -math.inf)], {}, "refuted"),
        ([(math.inf, math.inf)], {"at_least": None, "at_most": 0}, "refuted"),
        ([(-math.inf, math.inf)], {}, "inconclusive"),
        ([(-math.inf, math.inf)], {"at_most": 1}, "inconclusive"),
        ([(0, 0)], {}, "holds"),
    ],
)
def test_a_form_without_a_condition_speaks_of_every_cell(intervals, limits, expected):
    assert word(intervals, **limits) == expected


@pytest.mark.parametrize(
    ("intervals", "expected"),
    [
        ([(1, 2), (-2, -1)], "holds_if"),
        ([(1, 2), (1, 3)], "holds"),
        ([(1, 2), (-1, 1)], "inconclusive"),  # nothing shows that the condition matters
        ([(-2, -1), (1, 2)], "refuted"),
        ([(-2, -1), (-2, -1)], "refuted"),
        ([(-1, 1), (-2, -1)], "inconclusive"),
        ([(-1, 1), (1, 2)], "inconclusive"),
    ],
)
def test_a_form_with_a_condition_speaks_of_the_cells_that_meet_it(intervals, expected):
    assert word(intervals, chi=[0.9, 1.1], condition="chi < 1") == expected


def test_holds_if_shows_both_sides():
    table = cells((1, 2), (0.25, 0.5), (-3, -2), (-9, -8), chi=[0.8, 0.9, 1.1, 1.2])
    verdict = decide("claim/form", criterion(condition="chi < 1"), table)
    assert verdict == Verdict(
        claim="claim/form",
        form="precise",
        statement="x ≥ 0",
        criterion="0 ≤ x",
        verdict="holds_if",
        condition="chi < 1",
        estimate=0.375,
        interval=(0.25, 0.5),
        n=5,
        evidence="2 of 2 cells inside; worst: chi=0.9: 0.375 [0.25, 0.5], n=5; "
        "2 of 2 cells that fail it are outside: chi=1.2: -8.5 [-9, -8], n=5",
    )


@pytest.mark.parametrize(("outside", "sufficient"), [(1, True), (2, True), (3, False), (4, False)])
def test_a_condition_is_called_sufficient_unless_most_of_the_others_are_outside(outside, sufficient):
    others = [(-3, -2)] * outside + [(1, 2)] * (4 - outside)
    verdict = decide("claim/form", criterion(condition="chi < 1"), cells((1, 2), *others, chi=[0.5, 2.0, 2.0, 2.0, 2.0]))
    assert verdict.verdict == "holds_if"
    assert f"{outside} of 4 cells that fail it are outside: chi=2" in verdict.evidence
    assert ("sufficient, not necessary" in verdict.evidence) == sufficient


def test_the_numbers_that_a_cell_is_made_with_are_printed():
    named = replace(criterion(), given={"noticed": 0.05, "decades": 1.0})
    assert decide("claim/form", named, cells((1, 2))).criterion == "0 ≤ x [noticed = 0.05, decades = 1]"
    assert decide("claim/form", criterion(), cells((1, 2))).criterion == "0 ≤ x"


def test_a_refutation_shows_the_worst_counterexample():
    verdict = decide("claim/form", criterion(at_most=1), cells((0, 1), (1.1, 1.2), (-3, -2), depth=[2, 4, 8], kind="plain"))
    assert (verdict.verdict, verdict.estimate, verdict.interval) == ("refuted", -2.5, (-3, -2))
    assert verdict.evidence == "1 of 3 cells inside; counterexample: depth=8, kind=plain: -2.5 [-3, -2], n=5"


def test_an_open_verdict_shows_the_cell_that_keeps_it_open():
    verdict = decide("claim/form", criterion(), cells((1, 2), (-0.5, 3), (-1, 3), chi=[1.0, 2.0, 3.0]))
    assert verdict.evidence == "1 of 3 cells inside; worst: chi=3: 1 [-1, 3], n=5"
    verdict = decide("claim/form", criterion(condition="chi < 2"), cells((1, 2), (-0.5, 3), (3, 4), chi=[1.0, 2.0, 3.0]))
    idle = "0 of 2 cells that fail the condition are outside: nothing shows that chi < 2 matters"
    assert verdict.evidence == f"1 of 1 cells inside; worst: chi=3: 3.5 [3, 4], n=5; {idle}"


def test_published_values_are_all_told_beside_the_measured():
    verdict = decide("claim/form", criterion(), cells((1, 2), (-3, -2), (5, 6), published=[1.25, 7.5, 5.5]))
    told = "published=1.25: 1.5 [1, 2], n=5; published=7.5: -2.5 [-3, -2], n=5; published=5.5: 5.5 [5, 6], n=5"
    assert (verdict.verdict, verdict.evidence) == ("refuted", f"2 of 3 cells inside; {told}")


def test_no_cell_that_meets_the_condition_decides_nothing():
    verdict = decide("claim/form", criterion(condition="chi < 0"), cells((1, 2), (-2, -1), chi=[0.9, 1.1]))
    assert (verdict.verdict, verdict.estimate, verdict.interval, verdict.n) == ("inconclusive", None, (None, None), 0)
    assert verdict.evidence == "no cell meets the condition: nothing was measured"


@pytest.mark.parametrize("empty", [pd.DataFrame([]), cells((1, 2), chi=[1.0]).iloc[:0]], ids=["no columns", "no rows"])
@pytest.mark.parametrize("condition", [None, "chi < 1"])
def test_no_cell_decides_nothing(empty, condition):
    verdict = decide("claim/form", criterion(condition=condition), empty)
    assert (verdict.verdict, verdict.estimate, verdict.n) == ("inconclusive", None, 0)


def test_the_numbering_of_the_cells_does_not_matter():
    table = pd.concat([cells((1, 2), chi=[0.5]), cells((-2, -1), chi=[1.5])])
    assert table.index.tolist() == [0, 0]
    verdict = decide("claim/form", criterion(condition="chi < 1"), table)
    assert verdict == decide("claim/form", criterion(condition="chi < 1"), table.reset_index(drop=True))
    assert verdict.verdict == "holds_if"


@pytest.mark.parametrize(
    ("depth", "steps", "expected"),
    [
        ([8, 64, 8], [9, 9, 1], "holds_if"),  # each part alone decides
        ([8, 64, 64], [9, 9, 1], "inconclusive"),  # nothing fails the second part alone
        ([8, 64, 8], [9, 9, 9], "refuted"),
    ],
)
def test_each_part_of_a_condition_must_matter(depth, steps, expected):
    table = cells((1, 2), (-2, -1), (-2, -1), depth=depth, steps=steps)
    verdict = decide("claim/form", criterion(condition="depth < 50 and (steps > 5 or steps < 0)"), table)
    assert verdict.verdict == expected
    idle = "2 of 2 cells that fail the condition are outside: nothing shows that steps > 5 or steps < 0 matters"
    assert (idle in verdict.evidence) == (expected == "inconclusive")


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ([(-2, -1), (-4, -3)], "holds_if"),
        ([(-2, -1), (1, 2)], "refuted"),
        ([(-2, -1), (-1, 2)], "inconclusive"),
        ([], "inconclusive"),  # one side alone shows no equivalence
    ],
)
def test_an_equivalence_fails_wherever_its_condition_does(others, expected):
    table = cells((1, 3), *others, chi=[0.5, 1.5, 2.5][: 1 + len(others)])
    verdict = decide("claim/form", criterion(condition="chi < 1", otherwise="outside"), table)
    assert verdict.verdict == expected
    if expected == "refuted":
        assert "counterexample: chi=2.5: 1.5 [1, 2]" in verdict.evidence
    if expected == "inconclusive" and others:
        assert verdict.evidence.endswith("1 of 2 cells that fail the condition are outside")
    assert decide("claim/form", criterion(condition="chi < 1"), table).verdict == ("holds_if" if others else "holds")


def test_a_form_speaks_of_the_cells_within_its_range_alone():
    table = cells((1, 2), (-2, -1), steps=[100, 5])
    assert decide("claim/form", criterion(), table).verdict == "refuted"
    verdict = decide("claim/form", criterion(within="steps >= 100"), table)
    assert (verdict.verdict, verdict.evidence) == ("holds", "1 of 1 cells inside; worst: steps=100: 1.5 [1, 2], n=5")
    assert decide("claim/form", criterion(within="steps >= 1000"), table).evidence == "no cell: nothing was measured"


def test_one_of_many_cells_refutes_only_in_intervals_that_cover_them_all():
    """At four degrees of freedom 2.776 standard errors cover one cell, 10.306 a hundred (t at 1 − .05/200)."""
    error = np.array([1.0] * 100)
    for distance, expected in ((2.7, "inconclusive"), (10.3, "inconclusive"), (10.4, "refuted")):
        middle = np.where(np.arange(100) == 41, -distance, 50.0)
        table = cells(*zip(middle - 2.776445 * error, middle + 2.776445 * error, strict=True), freedom=4)
        assert decide("claim/form", criterion(), table).verdict == expected
    alone = cells((-2.8 - 2.776, -2.8 + 2.776), freedom=4)
    assert decide("claim/form", criterion(), alone).verdict == "refuted"


def test_chance_refutes_a_true_form_in_few_trials():
    """Forty cells of five draws each about 0, held to ≥ 0, the limit of what is true: 5% and not 64% of the trials refute it."""
    draws = np.random.default_rng(0).normal(size=(400, 40, 5))
    words = [decide("claim/form", criterion(), pd.DataFrame([cell(t_interval(x)) for x in trial])).verdict for trial in draws[:100]]
    assert words.count("refuted") <= 8
    alone = [any(t_interval(x).hi < 0 for x in trial) for trial in draws[:100]]
    assert sum(alone) > 40


def test_what_was_amended_is_told():
    verdict = decide("claim/form", criterion(amended=["2026-01-02: was x ≥ 1, refuted; [why]"]), cells((1, 2)))
    assert verdict.amended == ("2026-01-02: was x ≥ 1, refuted; [why]",)
    assert "amended: 2026-01-02: was x ≥ 1, refuted; [why]" in as_printed([verdict])
    assert Verdict.of(json.loads(json.dumps(asdict(verdict)))) == verdict


@few
@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=4), limits, limits)
def test_a_claim_holds_when_no_point_of_any_interval_is_beyond_a_limit(ends, low, high):
    if low is None and high is None:
        low = 0.0
    if low is not None and high is not None:
        low, high = sorted((low, high))
    intervals = [tuple(sorted(pair)) for pair in ends]
    found = word(intervals, at_least=low, at_most=high)
    bottom, top = -math.inf if low is None else low, math.inf if high is None else high
    all_in = all(bottom <= lo and hi <= top for lo, hi in intervals)
    one_out = any(hi < bottom or lo > top for lo, hi in intervals)
    assert found == ("holds" if all_in else "refuted" if one_out else "inconclusive")


@few
@given(st.lists(st.floats(0.5, 2), min_size=4, max_size=8), st.integers(0, 3))
def test_flipping_one_datum_flips_the_verdict(values, k):
    """The sign of a single draw, judged draw by draw."""
    flipped = [-value if index == k else value for index, value in enumerate(values)]
    for draws, expected in ((values, "holds"), (flipped, "refuted")):
        table = pd.DataFrame([cell(exactly(value), draw=index) for index, value in enumerate(draws)])
        verdict = decide("claim/form", criterion(), table)
        assert verdict.verdict == expected
    assert f"counterexample: draw={k}:" in verdict.evidence


def test_more_noise_opens_a_verdict():
    for spread, expected in ((0.1, "holds"), (10.0, "inconclusive")):
        draws = 1 + spread * np.array([-1, -0.5, 0, 0.5, 1])
        assert decide("claim/form", criterion(), pd.DataFrame([cell(t_interval(draws))])).verdict == expected


def test_every_form_is_judged_by_the_criterion_of_its_name():
    criteria = {"bound": criterion(), "rate": criterion(at_most=1, form="as_stated")}
    verdicts = judge_forms("claim", criteria, {"rate": cells((2, 3)), "bound": cells((1, 2))})
    assert [(v.claim, v.form, v.verdict) for v in verdicts] == [("claim/bound", "precise", "holds"), ("claim/rate", "as_stated", "refuted")]


@pytest.mark.parametrize(("criteria", "table"), [(["a", "b"], ["a"]), (["a"], ["a", "b"])])
def test_a_form_on_one_side_only_is_named(criteria, table):
    with pytest.raises(ValueError, match=r"^claim: criteria \['b'\] stand on one side only, in the YAML or in the module$"):
        judge_forms("claim", dict.fromkeys(criteria, criterion()), dict.fromkeys(table, cells((1, 2))))


@pytest.mark.parametrize(
    "table",
    [cells((1, 2)), cells((-math.inf, math.inf)), cells((math.inf, math.inf)), cells((-math.inf, -math.inf)), pd.DataFrame([])],
    ids=["finite", "unbounded", "inf", "-inf", "none"],
)
def test_verdicts_are_plain_json(table):
    entry = asdict(decide("claim/form", criterion(), table))
    text = json.dumps(entry, allow_nan=False)
    keys = ["claim", "form", "statement", "criterion", "verdict", "condition", "estimate", "interval", "n", "evidence", "amended"]
    assert list(json.loads(text)) == keys
    with pytest.raises(ValueError, match="not JSON compliant"):
        json.dumps(entry | {"estimate": math.nan}, allow_nan=False)


def as_printed(verdicts):
    out = StringIO()
    Console(file=out, width=160).print(to_table(verdicts, "title"))
    return out.getvalue()


def test_verdicts_as_tables():
    table = cells((1, 2), (-2, -1), chi=[0.5, 1.5])
    forms = {"always": criterion(), "if": criterion(condition="chi < 1"), "never": criterion(at_least=9, condition="chi > 9")}
    verdicts = judge_forms("claim", forms, dict.fromkeys(forms, table))
    frame = to_frame(verdicts)
    assert frame["verdict"].tolist() == ["refuted", "holds_if", "inconclusive"]
    assert len(frame.columns) == 11
    printed = as_printed(verdicts)
    for expected in ("always (precise): x ≥ 0", "refuted", "holds if chi < 1", "inconclusive", "1 … 2", "– … –", "counterexample: chi=1.5"):
        assert expected in printed


def test_brackets_in_evidence_are_no_markup():
    assert "kind=[red]" in as_printed([decide("claim/form", criterion(), cells((1, 2), kind="[red]"))])
