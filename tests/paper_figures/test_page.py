"""index.html: complete in itself, and what its buttons do in a real browser."""

import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from paper_figures.ledger import COLUMNS
from paper_figures.page import caption, inline, render
from paper_figures.products import FIGURES

SVG = """<?xml version="1.0"?><!DOCTYPE svg><svg xmlns:xlink="x" width="1pt" height="1pt" viewBox="0 0 9 9" version="1.1">
<metadata>made when</metadata><defs><path id="a"/></defs><use xlink:href="#a"/><g id="g" clip-path="url(#a)"/></svg>"""


def line(claim: str, verdict: str, estimate: float | None, data: str, **others: object) -> dict[str, object]:
    known = {"form": "precise", "statement": "‖J‖ < 1 & so on", "lo": estimate, "hi": estimate, "n": 3, "evidence": "<b>seen</b>"}
    run = {"data": data, "scale": "smoke", "seed": 0, "commit": "0000000", "command": "python -m src.run", "amended": ""}
    return {"claim": claim, "verdict": verdict, "estimate": estimate, **known, **run, **others}


LINES = pd.DataFrame(
    [
        line("residual_unlock/one", "holds", 2.0, "mnist"),
        line("residual_unlock/two", "refuted", 10.0, "digits"),
        line("wide_layers/three", "holds_if", -1.0, "mnist", condition="width > 2"),
        line("wide_layers/four", "inconclusive", None, "mnist", n=0),
    ],
    columns=COLUMNS,
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "index.html"
    file.write_text(render(LINES, {"residual_unlock": SVG, "wide_layers": SVG}), encoding="utf-8")
    return file


def test_nothing_is_loaded_from_elsewhere_and_every_id_is_its_own(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.findall(r"(?:src|href)=[\"'](?!#)", text)
    assert "http" not in text.replace("http-equiv", "")
    assert [name for name, count in Counter(re.findall(r'\bid="([^"]+)"', text)).items() if count > 1] == []
    assert "&lt;b&gt;seen&lt;/b&gt;" in text


def test_a_drawing_in_a_page_keeps_its_references_and_drops_its_metadata() -> None:
    svg = inline(SVG, "fig")
    assert svg.startswith('<svg viewBox="0 0 9 9" role="img" aria-label="fig">')
    assert all(part in svg for part in ('id="fig-a"', 'href="#fig-a"', 'id="fig-g"', "url(#fig-a)"))
    assert "made when" not in svg


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_has_a_caption(name: str) -> None:
    assert len(caption(name)) > 40


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright: the page is not tried in a browser")
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("no chromium: the page is not tried in a browser (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def view(browser: Any, page: Path) -> Iterator[Any]:
    """The page from file://, offline, in the light; nothing may be asked for, and nothing go wrong."""
    context = browser.new_context(color_scheme="light", offline=True)
    opened = context.new_page()
    asked, faults = [], []
    opened.on("request", lambda request: asked.append(request.url))
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.on("console", lambda message: faults.append(message.text))
    opened.goto(page.as_uri())
    yield opened
    assert (asked, faults) == ([page.as_uri()], [])
    context.close()


def shown(view: Any) -> list[str]:
    cells = view.locator("#ledger tbody tr:visible td:first-child").all_inner_texts()
    return [cell.replace("\u200b", "").partition("/")[2] for cell in cells]


@pytest.mark.parametrize(
    ("name", "value", "left", "figures"),
    [
        ("claim", "wide_layers", ["three", "four"], ["wide_layers"]),
        ("verdict", "refuted", ["two"], ["residual_unlock"]),
        ("data", "mnist", ["one", "three", "four"], ["residual_unlock", "wide_layers"]),
    ],
)
def test_filters_leave_what_meets_them(view: Any, name: str, value: str, left: list[str], figures: list[str]) -> None:
    assert shown(view) == ["one", "two", "three", "four"]
    view.select_option(f"select[name={name}]", value)
    assert shown(view) == left
    assert [figure.get_attribute("data-claim") for figure in view.locator("figure:visible").all()] == figures
    assert view.locator("#count").inner_text() == f"{len(left)} of 4 forms"


def test_words_filter_too(view: Any) -> None:
    view.fill("input[name=words]", "WIDTH > 2")
    assert shown(view) == ["three"]


def test_a_heading_sorts_by_number_and_back_and_keeps_the_unknown_last(view: Any) -> None:
    heading = view.get_by_role("button", name="estimate")
    heading.click()
    assert shown(view) == ["three", "one", "two", "four"]
    heading.click()
    assert shown(view) == ["two", "one", "three", "four"]
    assert view.locator("th[aria-sort]").get_attribute("aria-sort") == "descending"
    view.get_by_role("button", name="interval").click()
    assert shown(view) == ["three", "one", "two", "four"]
    view.get_by_role("button", name="verdict").click()
    assert shown(view) == ["one", "three", "four", "two"]


def test_dark_and_light(view: Any) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    assert view.evaluate(ground) == "rgb(255, 255, 255)"
    view.get_by_role("button", name="dark").click()
    assert view.evaluate(ground) == "rgb(21, 23, 26)"
    view.get_by_role("button", name="light").click()
    assert view.evaluate(ground) == "rgb(255, 255, 255)"
