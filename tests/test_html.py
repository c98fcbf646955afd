"""The page in a real browser: what it shows, what it asks for, and who can use it."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bonn_plugin.report.html import RunFiles, write_page
from bonn_plugin.report.tables import tables
from tests.pages import LAYERS, make_run, tiny_report

ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WIDTHS = (1280, 360)
SCHEMES = ("light", "dark")
HEIGHT = 800
INSTALL = "no browser: apt-get install chromium, and pip install -e '.[test]'"


def without_browser(why: str) -> None:
    """Skip, or fail where the environment promises a browser."""
    if os.environ.get("CI_BROWSER") == "1":
        pytest.fail(f"CI_BROWSER=1, but {why}")
    pytest.skip(why)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        without_browser(INSTALL)
    path = shutil.which("chromium")
    if path is None:
        without_browser(INSTALL)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@dataclass
class Opened:
    """A page with what happened since it was opened."""

    page: Any
    troubles: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


class Opener:
    """Opens pages in contexts of their own."""

    def __init__(self, browser: Any) -> None:
        self.browser = browser
        self.contexts: list[Any] = []

    def __call__(self, path: Path, width: int = 1280, scheme: str = "light", **options: Any) -> Opened:
        viewport = {"width": width, "height": HEIGHT}
        context = self.browser.new_context(viewport=viewport, color_scheme=scheme, **options)
        context.set_default_timeout(60_000)  # a busy machine is slow, not wrong
        self.contexts.append(context)
        opened = Opened(context.new_page())
        opened.page.on("console", lambda message: opened.troubles.append(message.text))
        opened.page.on("pageerror", lambda error: opened.troubles.append(str(error)))
        opened.page.on("requestfailed", lambda request: opened.troubles.append(f"failed: {request.url}"))
        opened.page.on("request", lambda request: opened.requests.append(request.url))
        opened.page.goto(path.as_uri())
        return opened


@pytest.fixture
def show(chromium: Any) -> Iterator[Opener]:
    opener = Opener(chromium)
    yield opener
    for context in opener.contexts:
        context.close()


def files(folder: Path) -> RunFiles:
    return RunFiles(folder, folder / "training" / "metrics.jsonl")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("pages")
    runs = {
        "whole": make_run(place / "whole"),
        "bare": make_run(place / "bare", metrics=False, distributions=False),
        "detector": make_run(place / "detector", detection=True),
        "evil": make_run(place / "evil", name='<img src="x" onerror="console.error(1)"><b>&amp;</b>'),
    }
    found = {name: write_page(files(run)) for name, run in runs.items()}
    found["compared"] = write_page(files(make_run(place / "bonn")), files(make_run(place / "xnor", spread=1.2)))
    return found


def open_all(page: Any) -> None:
    """Open everything that is folded, as a reader does."""
    closed = page.locator("details:not([open]) > summary:visible")
    while closed.count():
        closed.first.click()


# --- what the browser sees ----------------------------------------------------------------------------------


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["whole", "bare", "detector", "compared"])
def test_the_page_opens_without_trouble_and_fits_the_screen(
    name: str, scheme: str, width: int, pages: dict[str, Path], show: Opener, tmp_path: Path
) -> None:
    opened = show(pages[name], width, scheme)
    picture = Image.open(io.BytesIO(opened.page.screenshot(path=tmp_path / "page.png", full_page=True)))
    assert picture.width == width
    dark = sum(picture.convert("RGB").getpixel((2, 2))) < 3 * 128
    assert dark == (scheme == "dark")
    open_all(opened.page)
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    assert opened.troubles == []
    assert opened.requests == [pages[name].as_uri()]


def test_wide_tables_scroll_in_regions_of_their_own(pages: dict[str, Path], show: Opener) -> None:
    page = show(pages["whole"], 360).page
    open_all(page)
    regions = page.evaluate(
        """[...document.querySelectorAll("table")].map(t => { const r = t.parentElement; return [
            r.getAttribute("role"), r.tabIndex, r.getAttribute("aria-label"), r.scrollWidth > r.clientWidth]; })"""
    )
    assert all((role, index) == ("region", 0) for role, index, _, _ in regions)
    labels = [label for _, _, label, _ in regions]
    assert len(set(labels)) == len(labels)
    assert any(scrolls for *_, scrolls in regions)


def test_charts_and_bars_are_drawn_inside_their_places(pages: dict[str, Path], show: Opener) -> None:
    for width in WIDTHS:
        page = show(pages["compared"], width).page
        open_all(page)
        boxes = page.evaluate(
            """[...document.querySelectorAll(".plot")].map(plot => {
                const svg = plot.querySelector(":scope > svg").getBoundingClientRect();
                const all = plot.getBoundingClientRect();
                return {svg: [svg.width, svg.height], left: svg.left - all.left, right: all.right - svg.right,
                    labels: [...plot.querySelectorAll(".x span:not(.label)")].map(s => {
                        const r = s.getBoundingClientRect(); return [r.left, r.right, r.top]; }),
                    up: [...plot.querySelectorAll(".y span")].map(s => {
                        const r = s.getBoundingClientRect(); return [r.top, r.right - svg.left]; })}; })"""
        )
        assert len(boxes) >= 10
        for box in boxes:
            assert min(box["svg"]) > 60
            assert box["left"] > 0
            assert box["right"] >= 0
            for (_, right, _), (left, _, _) in zip(box["labels"], box["labels"][1:], strict=False):
                assert right <= left, "tick labels overlap"
            tops = [top for top, _ in box["up"]]
            assert tops == sorted(tops, reverse=True)
            assert all(ends <= 0 for _, ends in box["up"])


def test_a_recipes_name_stays_text(pages: dict[str, Path], show: Opener) -> None:
    opened = show(pages["evil"])
    assert opened.page.locator("h1").inner_text() == '<img src="x" onerror="console.error(1)"><b>&amp;</b>'
    assert opened.page.locator("h1 *, img, b").count() == 0
    assert opened.troubles == []
    assert len(opened.requests) == 1


def test_the_numbers_on_the_screen_are_the_reports(pages: dict[str, Path], show: Opener) -> None:
    page = show(pages["whole"]).page
    open_all(page)
    for table in tables(tiny_report()):
        rows = page.get_by_role("table", name=table.title, exact=True).locator("tbody tr").all()
        shown = [tuple(cell.inner_text() for cell in row.locator("th, td").all()) for row in rows]
        assert shown == list(table.rows)


def test_columns_of_numbers_are_flush_right(pages: dict[str, Path], show: Opener) -> None:
    page = show(pages["whole"]).page
    aligned = page.get_by_role("table", name="Stored bits by role").evaluate(
        "t => [...t.rows].map(r => [...r.cells].map(c => getComputedStyle(c).textAlign))"
    )
    assert all(row == ["left"] + 5 * ["right"] for row in aligned)


# --- without JavaScript -------------------------------------------------------------------------------------


def test_without_javascript_everything_is_there(pages: dict[str, Path], show: Opener) -> None:
    page = show(pages["whole"], java_script_enabled=False).page
    open_all(page)
    report = tables(tiny_report())
    assert page.locator("table").count() >= len(report) + 2
    for found in (page.locator("table"), page.get_by_role("figure"), page.locator(".plot > svg"), page.locator(".bar")):
        assert found.count() >= 5
        for one in found.all():
            box = one.bounding_box()
            assert box is not None
            assert min(box["width"], box["height"]) > 10
    for name in LAYERS:
        assert page.get_by_role("figure", name=name, exact=True).locator(".plot").count() == 5


# --- dark and light -----------------------------------------------------------------------------------------

CONTRAST = """() => {
    const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
    const parse = text => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = text; canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data]; };
    const back = element => { for (let e = element; e; e = e.parentElement) {
        const colour = parse(getComputedStyle(e).backgroundColor); if (colour[3] === 255) return colour; }
        return [255, 255, 255, 255]; };
    const found = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    for (let node = walker.nextNode(); node; node = walker.nextNode()) {
        const element = node.parentElement;
        if (!node.data.trim() || !element.checkVisibility()) continue;
        found.push([node.data.trim(), parse(getComputedStyle(element).color), back(element)]); }
    for (const shape of document.querySelectorAll(".line, .bar rect, .swatch rect")) {
        const style = getComputedStyle(shape);
        const colour = style.stroke === "none" ? style.fill : style.stroke;
        found.push([null, parse(colour), back(shape)]); }
    return found; }"""


def luminance(colour: list[int]) -> float:
    """WCAG 2.2, relative luminance."""
    linear = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: list[int], other: list[int]) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_the_contrast_of_black_and_white_is_21() -> None:
    assert contrast([0, 0, 0], [255, 255, 255]) == pytest.approx(21)
    assert contrast([118, 118, 118], [255, 255, 255]) == pytest.approx(4.54, abs=0.01)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_text_and_lines_stand_out(scheme: str, pages: dict[str, Path], show: Opener) -> None:
    page = show(pages["compared"], scheme=scheme).page
    open_all(page)
    found = page.evaluate(CONTRAST)
    assert sum(text is not None for text, _, _ in found) > 200
    assert sum(text is None for text, _, _ in found) > 50
    for text, front, behind in found:
        assert front[3] == 255
        assert contrast(front, behind) >= (3 if text is None else 4.5), (text, front, behind)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("javascript", [True, False])
def test_the_switch_changes_the_colours_and_auto_brings_them_back(
    scheme: str, javascript: bool, pages: dict[str, Path], show: Opener
) -> None:
    page = show(pages["whole"], scheme=scheme, java_script_enabled=javascript).page

    def is_dark() -> bool:
        return sum(Image.open(io.BytesIO(page.screenshot())).convert("RGB").getpixel((2, 2))) < 3 * 128

    assert is_dark() == (scheme == "dark")
    page.get_by_label("Dark").check()
    assert is_dark()
    page.get_by_label("Light").check()
    assert not is_dark()
    page.get_by_label("Auto").check()
    assert is_dark() == (scheme == "dark")


# --- the keyboard -------------------------------------------------------------------------------------------

FOCUSED = """() => { const e = document.activeElement, s = getComputedStyle(e), r = e.getBoundingClientRect();
    return {tag: e.tagName, role: e.getAttribute("role"), id: e.id, skip: e.className === "skip",
        outline: s.outlineStyle !== "none" && parseFloat(s.outlineWidth) >= 2,
        seen: r.width > 0 && r.bottom > 0 && r.top < innerHeight && r.right > 0 && r.left < innerWidth}; }"""


@pytest.mark.parametrize("width", WIDTHS)
def test_tab_reaches_everything_and_shows_where_it_is(width: int, pages: dict[str, Path], show: Opener) -> None:
    page = show(pages["whole"], width).page
    stops = []
    for _ in range(200):
        page.keyboard.press("Tab")
        stop = page.evaluate(FOCUSED)
        if stop["tag"] == "BODY":
            break
        assert stop["outline"], stop
        assert stop["seen"], stop
        stops.append(stop)
    assert stops[0]["skip"]
    assert stops[1]["id"] == "scheme-auto"
    regions, summaries = page.locator("[role=region]:visible").count(), page.locator("summary:visible").count()
    assert sum(stop["role"] == "region" for stop in stops) == regions > 5
    assert sum(stop["tag"] == "SUMMARY" for stop in stops) == summaries > 5


def test_the_keyboard_skips_switches_opens_and_scrolls(pages: dict[str, Path], show: Opener) -> None:
    page = show(pages["whole"], 360).page
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    page.locator("#scheme-auto").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.locator("#scheme-dark").is_checked()
    assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == "dark"
    layer = page.locator("summary", has_text=f"{LAYERS[1]} valley")
    figure = page.get_by_role("figure", name=LAYERS[1], exact=True)
    assert not figure.is_visible()
    layer.focus()
    page.keyboard.press("Enter")
    assert figure.is_visible()
    region = page.get_by_role("region", name="Table: Stored bits by role")
    region.focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    page.wait_for_function("r => r.scrollLeft > 0", arg=region.element_handle())


# --- who can't see it ---------------------------------------------------------------------------------------


def test_figures_have_names_and_numbers(pages: dict[str, Path], show: Opener) -> None:
    page = show(pages["compared"]).page
    open_all(page)
    session = page.context.new_cdp_session(page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    named = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in nodes
        if not node["ignored"] and node["role"]["value"] in ("figure", "Figure", "image", "img", "table", "region")
    ]
    assert sum(role in ("image", "img") for role, _ in named) > 30
    assert sum(role.lower() == "figure" for role, _ in named) > 8
    assert all(name for _, name in named), [one for one in named if not one[1]]
    for figure in page.get_by_role("figure").all():
        assert figure.locator("details table tbody tr").count() >= 1
    described = [name for role, name in named if role in ("image", "img")]
    assert "top-1, in % over epochs: bonn, test from 20 at 1 to 80 at 4, lowest 20, highest 80; xnor" in " ".join(
        described
    )


@pytest.mark.parametrize(
    ("name", "scheme", "width"),
    [("compared", "light", 1280), ("compared", "dark", 360), ("bare", "light", 360), ("bare", "dark", 1280)],
)
def test_axe_finds_nothing(name: str, scheme: str, width: int, pages: dict[str, Path], show: Opener) -> None:
    try:
        from axe_playwright_python.sync_playwright import Axe
    except ImportError:
        without_browser("no axe-playwright-python: pip install -e '.[test]'")
    page = show(pages[name], width, scheme).page
    open_all(page)
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
