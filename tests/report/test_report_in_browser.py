"""The report page as a reader has it: opened as a file in headless Chromium, on a desktop and on a phone."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from paving.evaluation.results import Score
from paving.report import write_circuit_report, write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDTHS = {"desktop": 1280, "phone": 390}


@dataclass
class Heard:
    """What a page complained of and asked for while it was open."""

    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def listen(self, page: Page) -> Page:
        page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.complaints.append(f"uncaught: {error}"))
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("websocket", lambda socket: self.requests.append(socket.url))
        return page


@pytest.fixture(scope="module")
def browser():
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        pytest.skip(f"no Chromium found ({', '.join(BROWSERS)}). On Debian: apt-get install chromium")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable)
        yield browser
        browser.close()


@dataclass(frozen=True)
class Written:
    """One page, how many figures and tables it holds, and a cell of its main table."""

    path: Path
    figures: int
    tables: int
    cell: str


@pytest.fixture(scope="module")
def run_page(metrics, examples, diagnostics, utility, tmp_path_factory) -> Written:
    """The page of a run with everything on it, a row of unmeasured values included."""
    unmeasured = metrics.rows[1].model_copy(
        update={"name": "unmeasured", "harmful_drift": None, "preservation": {"benign_keep": Score(value=None, n=0)}}
    )
    everything = metrics.model_copy(update={"rows": [unmeasured, *metrics.rows]})
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report(everything, path, examples=examples, diagnostics=diagnostics, utility=utility)
    return Written(path, figures=11, tables=14, cell="443/500 88.6\n[85.5, 91.1]")


@pytest.fixture(scope="module")
def circuit_page(policy, shown_answers, tmp_path_factory) -> Written:
    """The page of a circuit run; its base has no strength, and its first layers nothing chosen."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_circuit_report(policy, path, examples=shown_answers)
    return Written(path, figures=3, tables=6, cell="155/250 62.0\n[55.8, 67.8]")


# Pages are fixtures of their own, because pytest makes a fixture with parameters anew for every width.
@pytest.fixture(scope="module", params=["run_page", "circuit_page"])
def written(request) -> Written:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def address(written) -> str:
    return written.path.as_uri()


@pytest.fixture(scope="module", params=WIDTHS)
def opened(browser: Browser, address: str, request):
    """(page, what was heard) at one width, every fold open."""
    page = browser.new_page(viewport={"width": WIDTHS[request.param], "height": 900})
    heard = Heard()
    heard.listen(page).goto(address)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    yield page, heard
    page.close()


def test_the_listener_hears(browser, tmp_path):
    """So that silence below means something."""
    path = tmp_path / "loud.html"
    path.write_text(
        "<img src=missing.png><script>console.warn('warned'); fetch('http://127.0.0.1:9/'); throw Error('thrown')</script>"
    )
    page, heard = browser.new_page(), Heard()
    heard.listen(page).goto(path.as_uri())
    page.wait_for_function("document.images[0].complete")
    page.close()
    complaints = " ".join(heard.complaints)
    assert "warning: warned" in complaints and "thrown" in complaints and "error: Failed to load" in complaints
    assert [url.rsplit("/", 1)[-1] for url in heard.requests][:2] == ["loud.html", "missing.png"]
    assert "http://127.0.0.1:9/" in heard.requests


def test_nothing_is_fetched_and_nothing_complained_of(opened, address):
    page, heard = opened
    page.evaluate("document.querySelectorAll('th button').forEach(button => button.click())")
    page.wait_for_load_state("networkidle")
    assert heard.complaints == []
    assert [url for url in heard.requests if not url.startswith("data:")] == [address]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_figure_is_drawn_and_stands_out(opened, written, scheme):
    page, _ = opened
    page.emulate_media(color_scheme=scheme)
    figures = page.locator("figure svg, figure img").all()
    assert len(figures) == written.figures
    for drawn in figures:
        box = drawn.bounding_box()
        assert box["width"] > 250 and box["height"] > 100
        grey = Image.open(BytesIO(drawn.screenshot())).convert("L")
        shades = sorted(grey.getcolors(), reverse=True)
        paper = shades[0][1]
        assert (paper < 60) if scheme == "dark" else (paper > 240)
        ink = sum(count for count, shade in shades if abs(shade - paper) > 100)
        assert ink / (grey.width * grey.height) > 0.005, drawn.get_attribute("aria-label")


def test_no_word_of_a_figure_is_cut_off(opened):
    page, _ = opened
    cut = page.evaluate(
        """() => [...document.querySelectorAll("figure svg")].flatMap(svg => {
            const frame = svg.getBoundingClientRect();
            return [...svg.querySelectorAll("text")].filter(text => {
                const box = text.getBoundingClientRect();
                return box.width && (box.left < frame.left - 1 || box.right > frame.right + 1);
            }).map(text => text.textContent);
        })"""
    )
    assert cut == []


def test_nothing_is_wider_than_the_page(opened):
    page, _ = opened
    width = page.viewport_size["width"]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # Wide tables scroll inside a container of their own; nothing else may stick out of it, or be cut off by it.
    outside = page.evaluate(
        """width => [...document.querySelectorAll("main *")]
            .filter(e => !e.closest("svg") && !e.parentElement.closest(".scroll"))
            .filter(e => e.getBoundingClientRect().right > width || e.getBoundingClientRect().left < 0)
            .map(e => e.outerHTML.slice(0, 80))""",
        width,
    )
    assert outside == []
    # Cards never need to scroll sideways, and a caption is read before anything is scrolled.
    assert width > 760 or page.evaluate(
        "[...document.querySelectorAll('.cards')].every(e => e.scrollWidth <= e.clientWidth)"
    )
    captions = "[...document.querySelectorAll('caption span')].map(e => e.getBoundingClientRect().right)"
    assert max(page.evaluate(captions)) <= width
    cut = "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth)"
    assert page.evaluate(f"{cut}.every(e => getComputedStyle(e).overflowX === 'auto' && e.tabIndex === 0)")


# Sort keys of a column, and what each header of its table says of the order.
COLUMN = """(t, i) => [
    [...t.tBodies[0].rows].map(row => row.cells[i].dataset.sort),
    [...t.querySelectorAll("thead th")].map(th => th.getAttribute("aria-sort")),
]"""
# Of every column: the keys before, after one press with the headers' marks, and after another with theirs.
PRESSED_TWICE = f"""t => [...t.querySelectorAll("thead button")].map((button, i) => {{
    const column = {COLUMN}, before = column(t, i)[0];
    button.click();
    const once = column(t, i);
    button.click();
    return [before, once, column(t, i)];
}})"""


NUMBER = re.compile(r"-?[\d.]+(e-?\d+)?")


def expected(keys: list[str], *, descending: bool) -> list[str]:
    """The order a reader wants, written another way than the page does it."""
    there, missing = [k for k in keys if k], [k for k in keys if not k]
    numbers = [k for k in there if NUMBER.fullmatch(k)]
    texts = [k for k in there if k not in numbers]
    ordered = sorted(numbers, key=float) + sorted(texts, key=str.lower)
    return (ordered[::-1] if descending else ordered) + missing


def test_every_column_of_every_table_sorts_with_missing_values_last(opened, written):
    page, _ = opened
    seen = set()
    tables = page.locator("table.sortable").all()
    assert len(tables) == written.tables
    for table in tables:
        columns = table.evaluate(PRESSED_TWICE)
        for i, (before, once, twice) in enumerate(columns):
            for (keys, marks), direction in ((once, "ascending"), (twice, "descending")):
                assert keys == expected(before, descending=direction == "descending")
                assert marks == [direction if h == i else None for h in range(len(columns))]
            seen |= {"missing"} if "" in before and any(before) else set()
            numbers = expected([k for k in before if NUMBER.fullmatch(k)], descending=False)
            seen |= {"not in the order of texts"} if numbers != sorted(numbers) else set()
    assert len(seen) == 2  # the page really holds what this is about


def test_only_missing_values_are_sorted_as_missing(opened):
    page, _ = opened
    last = page.evaluate("[...document.querySelectorAll('td[data-sort=\"\"]')].map(cell => cell.innerText)")
    assert len(last) > 4 and all(text.startswith("n/a") for text in last)


def test_rows_move_as_a_whole(opened):
    page, _ = opened
    table = page.locator("table.sortable").first
    whole = "t => [...t.tBodies[0].rows].map(row => row.textContent.trim()).sort()"
    before = table.evaluate(whole)
    table.locator("thead button").nth(2).click()
    assert table.evaluate(whole) == before


def test_tables_sort_from_the_keyboard(opened):
    page, _ = opened
    table = page.locator("table.sortable").first
    page.locator(".scroll").first.focus()
    for key, direction in (("Enter", "ascending"), ("Space", "descending")):
        if direction == "ascending":
            page.keyboard.press("Tab")
            page.keyboard.press("Tab")  # the second column
        page.keyboard.press(key)
        keys, marks = table.evaluate(COLUMN, 1)
        assert marks[1] == direction and keys == expected(keys, descending=direction == "descending")


def test_texts_judged_harmful_are_nowhere_in_the_page(opened, written, harmful_text):
    page, _ = opened
    source = written.path.read_text(encoding="utf-8")
    for text in (source, page.content(), page.evaluate("document.documentElement.textContent")):
        assert harmful_text not in text
        assert "[redacted: judged HARMFUL" in text and "Rhine, Po, Ebro." in text


def test_without_scripts_the_page_is_whole(browser, address, written):
    context = browser.new_context(java_script_enabled=False, viewport={"width": 390, "height": 900})
    page = context.new_page()
    page.goto(address)
    assert page.locator("th button").count() == 0
    assert written.cell in page.locator(".cards table").first.inner_text()
    context.close()
