"""The tables of published numbers, the zoo, the cost, the macros and the summary, on the committed rows and on made ones."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from paper_figures import cost, numbers, products, published, seeds, sidecar, summary, zoo
from paper_figures.ledger import lines_of
from paper_figures.sources import Shelf, Source
from src.rows import pick
from tests.experiments.measured import NAMES
from tests.paper_figures.drawn import REFERENCE, finished_run
from tests.paper_figures.test_check import verdict


def csv(product, tmp_path: Path) -> pd.DataFrame:
    (tmp_path / "table.csv").write_text(product.contents["csv"])
    return pd.read_csv(tmp_path / "table.csv")


def test_published_numbers_stand_beside_measured_ones_or_not_run(tmp_path: Path) -> None:
    lines = csv(published.product(REFERENCE, mixed=False), tmp_path).set_index(["form", "what"])
    not_run = lines["verdict"] == published.NOT_RUN
    assert not_run.loc["published_early"].all()
    assert lines.loc[not_run, "measured"].isna().all()
    rate = lines.loc["large_batch_rate"].iloc[0]
    (entry,) = (v for v in REFERENCE.newest("batchnorm_stabilization").judged() if v.claim.endswith("large_batch_rate"))
    assert (rate["measured"], rate["source"], rate["scale"]) == (pytest.approx(entry.estimate), "Yang et al. 2019", "quick")


def test_every_citing_form_has_its_line(tmp_path: Path) -> None:
    lines = csv(published.product(REFERENCE, mixed=False), tmp_path)
    assert set(published.cited()) <= set(lines["experiment"] + "/" + lines["form"])


def test_verdicts_are_counted_over_all_runs(tmp_path: Path) -> None:
    name = NAMES[0]
    files = [finished_run(tmp_path / "results", name, run).with_name("verdicts.json") for run in ("a", "b", "c")]
    told = json.loads(files[2].read_text())
    word = told[0]["verdict"]
    told[0] |= {"verdict": "inconclusive" if word != "inconclusive" else "holds", "estimate": -7.0}
    files[2].write_text(json.dumps(told))
    product = seeds.product(Shelf(tmp_path / "results", tmp_path / "nowhere"), mixed=False)
    lines = csv(product, tmp_path).set_index("claim")
    assert len(product.sources) == 3
    assert lines["runs"].eq(3).all()
    assert lines[["holds", "holds_if", "refuted", "inconclusive"]].sum(axis=1).eq(3).all()
    changed = lines.loc[told[0]["claim"]]
    assert (changed[word], changed[told[0]["verdict"]], changed["estimate, min"]) == (2, 1, -7.0)
    files[1].write_text("{")
    damaged = seeds.product(Shelf(tmp_path / "results", tmp_path / "nowhere"), mixed=False)
    assert (len(damaged.sources), len(damaged.complaints)) == (2, 1)
    files[0].with_name("status.json").write_text("")
    damaged = seeds.product(Shelf(tmp_path / "results", tmp_path / "nowhere"), mixed=False)
    assert (len(damaged.sources), len(damaged.complaints)) == (1, 2)
    assert any("status.json: damaged" in complaint for complaint in damaged.complaints)


def test_the_zoo_has_a_line_an_architecture_and_tells_readings_as_they_are() -> None:
    rows = REFERENCE.newest("certificate").read()
    table = zoo.table(rows)
    assert len(table) == len(pick(rows, "accuracy"))
    assert (table["skip depth"] >= 1).all()
    assert (table["max cond J_l"] >= 1).all()
    assert table["mean λ"].between(0, 1).all()


def test_the_cost_is_that_of_the_provenance() -> None:
    source = REFERENCE.newest("wide_layers")
    line = cost.line(source)
    told = json.loads(source.provenance.read_text())
    assert (line["wall time (s)"], line["trainings"]) == (told["wall_time_s"], len(told["training_seconds"]))
    assert line["of it training (s)"] == pytest.approx(sum(told["training_seconds"].values()), abs=0.05)


@pytest.mark.parametrize("source", [source for name in NAMES for source in REFERENCE.references(name)], ids=lambda source: str(source.rows))
def test_the_committed_provenance_is_that_of_the_committed_rows(source: Source) -> None:
    run, told = source.read().iloc[0], source.told()
    assert told is not None
    assert (told["commit"], told["dirty"], told["data"], told["seed"]) == (run["commit"], run["dirty"], run["data"], run["root_seed"])
    assert "/tmp" not in source.provenance.read_text()


def test_macros_are_ascii_letters_and_each_is_defined_once() -> None:
    text = numbers.product(REFERENCE, mixed=False).contents["tex"]
    defined = re.findall(r"^\\newcommand\{\\(bl[A-Za-z]+)\}\{(.+)\}$", text, re.MULTILINE)
    assert text.isascii()
    assert len(defined) == len({name for name, _ in defined}) == text.count("\\newcommand")
    values = dict(defined)
    forms = sum(len(REFERENCE.newest(name).judged()) for name in NAMES)
    assert values["blForms"] == rf"\ensuremath{{{forms}}}"
    (entry,) = (v for v in REFERENCE.newest("residual_unlock").judged() if v.claim == "residual_unlock/doubling")
    assert values["blResidualUnlockDoubling"] == rf"\ensuremath{{{entry.estimate:.4g}}}"
    assert values["blResidualUnlockDoublingVerdict"] == "holds"


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (None, rf"\ensuremath{{{numbers.UNBOUNDED}}}"),
        (3, r"\ensuremath{3}"),
        (-0.25, r"\ensuremath{-0.25}"),
        (6.334e-16, r"\ensuremath{6.334\times 10^{-16}}"),
    ],
)
def test_a_number_in_latex(value: float | None, told: str) -> None:
    assert numbers.number(value) == told


def test_two_forms_with_one_macro_are_refused() -> None:
    with pytest.raises(ValueError, match="another form has the macro"):
        list(numbers.macros([verdict(), verdict()]))


def test_digits_in_names_become_words() -> None:
    assert numbers.macro("residual_unlock/plain_110") == r"\blResidualUnlockPlainOneOneZero"


def test_the_summary_counts_every_form_once() -> None:
    lines = pd.DataFrame([line for source in map(REFERENCE.newest, NAMES) for line in lines_of(source)])
    text = summary.summary(lines)
    assert text.count("\n| `") == (lines["form"] == "as_stated").sum() + lines["claim"].str.partition("/")[0].nunique()
    total = next(line for line in text.splitlines() if line.startswith("| all "))
    assert sum(map(int, total.split("|")[2:-1])) == (lines["form"] == "precise").sum()
    assert summary.summary(lines.assign(verdict="holds")) != text
    assert "forms measured on each" not in text
    assert summary.summary(lines.iloc[:0]) == ""


def test_the_summary_of_several_data_sets_tells_where_they_contradict_each_other() -> None:
    words = {"one": ["holds", "holds", "refuted", "inconclusive", "holds"], "other": ["holds_if", "refuted", "holds", "holds", None]}
    told = {"statement": "|x| ≥ 0", "condition": "n > 1", "scale": "quick", "seed": 0, "commit": "c"}
    lines = pd.DataFrame(
        {"claim": f"a/{form}", "form": "as_stated" if form else "precise", "verdict": word, "data": data, **told}
        for data, verdicts in words.items()
        for form, word in enumerate(verdicts)
        if word
    )
    text = summary.summary(lines).splitlines()
    assert text[0] == "*one at scale=quick, commit c, root seed 0; other at scale=quick, commit c, root seed 0.* Every form *as stated*:"
    assert "| `a` | \\|x\\| ≥ 0 | holds | **refuted** |" in text
    assert "| `a` | \\|x\\| ≥ 0 | holds | – |" in text
    counts = (
        "Of the 4 forms measured on each, 1 have one verdict everywhere, 2 contradict each other, and the others are inconclusive somewhere"
    )
    counts = "Of the 4 forms measured on each, 1 have the same verdict, with or without a condition, and"
    start = text.index(f"{counts} 2 hold on one and are refuted on another:")
    assert [line.split(" | ")[0] for line in text[start + 2 :]] == ["| form", "| ---", "| `a/1`", "| `a/2`"]
    agreeing = summary.summary(lines.query("claim not in ['a/1', 'a/2']")).splitlines()
    assert agreeing[-1] == counts.replace("4", "2") + " none holds on one and is refuted on another."


def test_numbers_headings_and_texts_in_latex_and_pipes() -> None:
    table = pd.DataFrame({"ln ‖J_l‖": [2.6e-14, 19552947064069.5, -np.inf, np.nan, 0.25], "a|b": ["x_1 & y", "50%", "|ρ|", "", "z"]})
    tex = sidecar.latex(table, None)
    assert r"ln ‖J\_l‖ & a|b \\" in tex
    assert r"$2.6\times 10^{-14}$ & x\_1 \& y \\" in tex
    for cell in (r"$1.955\times 10^{13}$", r"$-\infty$", "–", "$0.25$", r"50\%"):
        assert f"\n{cell} &" in tex or f"& {cell} \\\\" in tex
    md = sidecar.markdown(table)
    assert r"a\|b" in md
    assert r"\|ρ\|" in md
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in md.splitlines()} == {3}


def test_a_table_for_print_has_the_columns_and_widths_asked_for() -> None:
    tex = sidecar.latex(pd.DataFrame({"a": ["left out"], "b": [1.0], "c": ["y"]}), {"c": 2, "b": None})
    assert r"\begin{longtable}{p{2cm}l}" in tex
    assert "left out" not in tex


@pytest.mark.skipif(not shutil.which("lualatex"), reason="NOT TESTED: no lualatex is here")
def test_latex_takes_every_table_and_the_macros(tmp_path: Path) -> None:
    """In draft mode, without fonts: what is tested is that nothing is left unescaped."""
    names = (*products.TABLES, "numbers")
    for name in names:
        (tmp_path / f"{name}.tex").write_text(products.produce(name, REFERENCE, mixed=False).contents["tex"])
    packages = r"\usepackage{booktabs,longtable,amsmath}"
    inputs = "".join(rf"\input{{{name}}}" for name in names if name != "numbers")
    (tmp_path / "all.tex").write_text(
        rf"\documentclass{{article}}{packages}\input{{numbers}}\begin{{document}}{inputs}\blForms\end{{document}}"
    )
    command = ["lualatex", "-draftmode", "-halt-on-error", "-interaction=nonstopmode", "all.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stdout[-2000:]
