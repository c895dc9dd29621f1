"""The page in a real Chromium, from disk: it works, by mouse and keyboard, on a desk and on a phone, and on paper."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made_runs import result, write_run
from rich_runs import EVIL

from ekd_lightning.reporting import page as page_of
from ekd_lightning.reporting.report import make_report
from ekd_lightning.runs.collection import collect

CHROMIUM = os.environ.get("EKD_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage")
DESK = {"width": 1280, "height": 900}
PAGE = 50
PHONE = {"width": 390, "height": 844}
CHARTS = ["fraction", "counts", "cost", "differences", "branches", "learning", "corruptions", "reliability"]
CHARTS += ["similarity"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        try:
            one = playwright.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        except api.Error as error:
            pytest.skip(f"no Chromium: {str(error).splitlines()[0]}")
        yield one
        one.close()


@pytest.fixture(scope="module")
def file(rich_report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("plotly")
    path = tmp_path_factory.mktemp("page") / "index.html"
    path.write_text(page_of.page(rich_report), encoding="utf-8")
    return path


@pytest.fixture
def show(browser, file):
    """Opens the page; in the end nothing was complained of in the console, and nothing was asked from elsewhere."""
    complaints, contexts = [], []

    def open_page(fragment: str = "", path: Path = file, **options: Any) -> Any:
        contexts.append(browser.new_context(**{"viewport": DESK, "offline": True, **options}))
        page = contexts[-1].new_page()
        page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "request", lambda r: None if r.url.startswith(("file:", "data:", "blob:")) else complaints.append(r.url)
        )
        page.goto(path.as_uri() + fragment)
        page.wait_for_selector("html[data-ready=yes]")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def rows(page, place="row-table"):
    return page.locator(f"#{place} tbody tr[data-row]")


def cells(page, place, column):
    """Texts of a column, by its place in the head."""
    return page.eval_on_selector_all(
        f"#{place} tbody tr[data-row]", "(rows, at) => rows.map((row) => row.children[at].innerText)", column
    )


def heads(page, place):
    return [text.strip() for text in page.locator(f"#{place} thead th").all_inner_texts()]


def test_it_leads_with_the_answer_and_draws_every_chart(show, rich_report):
    page = show()
    assert rich_report.lead in page.inner_text("#answer")
    assert rows(page).count() == sum(len(block.groups) for block in rich_report.blocks)
    assert rows(page, "run-table").count() == len(rich_report.collection.runs)
    for chart in CHARTS:
        page.locator(f"#chart-{chart}").scroll_into_view_if_needed()
        page.wait_for_selector(f"#plot-{chart} .main-svg")
    assert page.inner_text("#chart-away") == ""


def test_only_settings_evaluated_on_the_same_images_share_a_chart(show, tmp_path):
    for method, source in (("ekd", "official"), ("ce", "official"), ("kd_mean", "regenerated")):
        more = {"corruption_source": source, "corruption_clean_accuracy": 0.65}
        more["corruption_accuracy_by_severity"] = [0.6, 0.5, 0.4, 0.3, 0.2]
        write_run(tmp_path / "runs" / method, result(method, **more))
    (tmp_path / "index.html").write_text(page_of.page(make_report(collect([tmp_path / "runs"]))), encoding="utf-8")
    page = show(path=tmp_path / "index.html")
    page.locator("#chart-corruptions").scroll_into_view_if_needed()
    page.wait_for_selector("#plot-corruptions .main-svg")
    caption = page.inner_text("#caption-corruptions")
    assert "official corruptions" in caption
    assert "Not drawn: 1 evaluated on other images." in caption


def test_what_is_evil_is_text(show):
    page = show()
    page.get_by_role("link", name="see why").click()
    assert EVIL in page.locator("#run-table tbody tr").all_inner_texts()[0]  # failed runs come first
    page.get_by_role("button", name="failed-evil").click()
    assert page.locator("#run-body pre").first.inner_text() == EVIL
    assert page.evaluate("window.hurt") is None


def test_names_that_would_be_markup_are_text_in_tables_and_charts(show, hostile_report, tmp_path):
    (tmp_path / "index.html").write_text(page_of.page(hostile_report), encoding="utf-8")
    page = show(path=tmp_path / "index.html")
    charts = page.locator("#chart-grid figure:not([hidden])").all()
    assert len(charts) >= 5
    for chart in charts:
        chart.scroll_into_view_if_needed()
        chart.locator(".main-svg").first.wait_for()
    for name in page.locator("#run-table tbody button").all()[:1]:
        name.click()
    assert "<script>window.hurt=1</script>" in page.inner_text("#row-table")
    assert page.evaluate("window.hurt") is None
    assert page.locator("img, a[href^='javascript'], svg a").count() == 0


def test_filters_change_what_is_seen(show, rich_report):
    page = show()
    page.get_by_label("kd_mean", exact=True).check()
    assert set(cells(page, "row-table", 0)) == {"kd_mean"}
    assert set(cells(page, "run-table", heads(page, "run-table").index("Method"))) == {"kd_mean"}
    page.get_by_label("5 %", exact=True).check()
    assert rows(page).count() == 1
    assert page.inner_text("#shown").startswith("1 of ")
    page.reload()  # the view is in the address
    page.wait_for_selector("html[data-ready=yes]")
    assert rows(page).count() == 1
    page.get_by_role("button", name="Clear all").click()
    assert rows(page).count() == sum(len(block.groups) for block in rich_report.blocks)
    page.get_by_label("Find").fill("memory")
    assert cells(page, "run-table", 0) == ["failed-memory"]
    page.get_by_label("Find").fill("no such thing")
    assert "Nothing matches" in page.inner_text("#row-table")


def test_tables_sort(show, rich_report):
    page = show()
    head = page.locator("#row-table th[data-key=accuracy]")
    expected = [group.accuracy.mean for block in rich_report.blocks for group in block.groups if group.n]
    for state, down in (("descending", True), ("ascending", False)):
        head.get_by_role("button").click()
        assert head.get_attribute("aria-sort") == state
        found = [float(text.split()[0]) for text in cells(page, "row-table", 1) if text != "–"]
        assert found == pytest.approx([100 * value for value in sorted(expected, reverse=down)], abs=0.006)
        assert cells(page, "row-table", 1)[-1] == "–"  # what is unknown comes last either way


def test_numbers_are_those_of_the_report(show, rich_report):
    page = show("#fraction=0.1")
    (block,) = [block for block in rich_report.blocks if block.fraction == 0.1]
    shown = dict(zip(cells(page, "row-table", 0), cells(page, "row-table", 1), strict=True))
    for group in block.groups:
        if group.accuracy and group.accuracy.half is not None:
            low, high = group.accuracy.low, group.accuracy.high
            assert shown[group.label] == f"{100 * group.accuracy.mean:.2f} [{100 * low:.2f}, {100 * high:.2f}]"
    assert shown["crd"] == "71.00"  # one run: no interval
    difference = dict(zip(cells(page, "row-table", 0), cells(page, "row-table", 3), strict=True))
    assert "too few runs" in difference["crd"]
    assert difference["ce"] == "reference"


def test_a_run_is_opened_and_closed_by_keyboard(show):
    page = show()
    name = page.get_by_role("button", name="ekd-f0.1-s0")
    name.focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#run-body pre")
    assert page.inner_text("#run-title") == "ekd-f0.1-s0"
    assert "name: ekd" in page.inner_text("#run-body")
    assert "/home" not in page.inner_text("#run-body")
    page.keyboard.press("Escape")
    assert not page.locator("#run").is_visible()
    assert page.evaluate("document.activeElement.textContent") == "ekd-f0.1-s0"


def test_the_keyboard_goes_from_the_top_to_everything(show):
    page = show()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the answer"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "answer"
    page.locator("#filter-groups input").first.focus()
    page.keyboard.press("Space")
    assert rows(page).count() == 5
    page.locator("#row-table th[data-key=accuracy] button").focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.closest('th').dataset.key") == "accuracy"
    unfold = page.locator("#row-table [aria-expanded]").first
    unfold.focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.getAttribute('aria-expanded')") == "true"
    assert page.locator("#row-table tr.below").inner_text().count("seed") == 3


def test_everything_that_can_be_used_has_a_name(show):
    page = show()
    nameless = """[...document.querySelectorAll("button, select, input, a, [role=region]")].filter((one) =>
      !(one.textContent.trim() || one.getAttribute("aria-label") || one.labels?.length)).map((one) => one.outerHTML)"""
    assert page.evaluate(nameless) == []
    assert page.locator("h1").count() == 1


def test_values_of_a_chart_can_be_read_as_a_table(show):
    page = show("#fraction=0.1")
    page.locator("#chart-cost summary").click()
    assert "ekd_mean" in page.inner_text("#chart-cost table")
    assert page.locator("#chart-cost tbody tr").count() == rows(page).count() - 1  # one has no run that is done


def test_hovering_shows_a_value_with_its_interval(show):
    page = show("#fraction=0.1&method=ce&method=ekd_mean")
    page.locator("#chart-cost").scroll_into_view_if_needed()
    point = page.locator("#plot-cost .scatterlayer .point").first
    point.scroll_into_view_if_needed()
    box = point.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=4)
    assert "95 %, n = 3" in page.locator("#plot-cost .hovertext").first.text_content()


def test_dark_follows_the_system_and_the_button(show):
    page = show(color_scheme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(ground) == "rgb(20, 23, 27)"
    button = page.get_by_role("button", name="Dark mode")
    assert button.get_attribute("aria-pressed") == "true"
    page.emulate_media(color_scheme="light")
    page.wait_for_selector("html[data-theme=light]")
    assert page.evaluate(ground) == "rgb(255, 255, 255)"
    button.click()
    assert page.evaluate(ground) == "rgb(20, 23, 27)"
    page.locator("#chart-cost").scroll_into_view_if_needed()
    page.wait_for_selector("#plot-cost .main-svg")
    assert page.eval_on_selector("#plot-cost .xtick text", "(text) => text.style.fill") == "rgb(233, 235, 238)"


def test_a_phone_scrolls_one_way_only(show):
    page = show(viewport=PHONE, is_mobile=True, has_touch=True, device_scale_factor=2)
    for chart in CHARTS:
        page.locator(f"#chart-{chart}").scroll_into_view_if_needed()
        page.wait_for_selector(f"#plot-{chart} .main-svg")
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    widths = page.eval_on_selector_all(
        "section, figure, .plot", "(all) => all.map((one) => one.getBoundingClientRect().right)"
    )
    assert max(widths) <= PHONE["width"]


def test_tables_show_that_they_scroll_and_cards_of_a_row_are_equally_tall(show):
    page = show(viewport=PHONE)
    frame = page.locator("#row-table .scroll")
    frame.scroll_into_view_if_needed()
    page.wait_for_selector("#row-table .scroll.more")
    assert page.locator("#row-table .hint").is_visible()
    frame.evaluate("(one) => { one.scrollLeft = one.scrollWidth; }")
    page.wait_for_selector("#row-table .scroll:not(.more)")
    page.set_viewport_size(DESK)
    boxes = [figure.bounding_box() for figure in page.locator("#chart-grid figure:not([hidden])").all()]
    heights = {
        top: {round(box["height"], 1) for box in boxes if box["y"] == top} for top in {box["y"] for box in boxes}
    }
    assert all(len(same) == 1 for same in heights.values())
    assert len(boxes) > len(heights)  # some stand beside each other


def test_captions_claim_no_interval_where_there_is_none(show, tmp_path):
    for name in ("ekd", "ce"):
        write_run(tmp_path / "runs" / name, result(name, 0, 0.7))
    (tmp_path / "index.html").write_text(page_of.page(make_report(collect([tmp_path / "runs"]))), encoding="utf-8")
    page = show(path=tmp_path / "index.html")
    assert page.inner_text("#caption-cost").startswith("Too few runs for intervals: means, n = 1.")


def test_paper_is_white_and_holds_everything(show, tmp_path):
    page = show(color_scheme="dark")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    assert page.locator(".plot .main-svg:first-child").count() == len(CHARTS)
    assert page.locator("#answer details:not([open]):not(figure *)").count() == 0
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.pdf(path=tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")


def test_long_tables_come_in_pages(show, tmp_path):
    for number in range(PAGE + 12):
        write_run(tmp_path / "runs" / f"run{number:02d}", result(seed=number), "failed", error=f"error {number}")
    (tmp_path / "index.html").write_text(page_of.page(make_report(collect([tmp_path / "runs"]))), encoding="utf-8")
    page = show(path=tmp_path / "index.html")
    assert rows(page, "run-table").count() == PAGE
    page.get_by_role("button", name="Next").click()
    assert cells(page, "run-table", 0) == [f"run{number:02d}" for number in range(PAGE, PAGE + 12)]
    assert page.locator("#run-table .pager").inner_text().endswith(f"{PAGE + 1} to {PAGE + 12} of {PAGE + 12}")
    page.get_by_role("button", name="Show all").click()
    assert rows(page, "run-table").count() == PAGE + 12
    assert "Not drawn" in page.inner_text("#chart-away")


def test_costs_that_hardly_differ_do_not_look_different(show, tmp_path):
    for name, macs in {"ekd": 12_520_000, "ce": 12_507_000, "kd": 12_507_000}.items():
        write_run(tmp_path / "runs" / name, result(name, 0, 0.7, macs=macs))
    (tmp_path / "index.html").write_text(page_of.page(make_report(collect([tmp_path / "runs"]))), encoding="utf-8")
    page = show(path=tmp_path / "index.html")
    page.locator("#chart-cost").scroll_into_view_if_needed()
    page.wait_for_selector("#plot-cost .main-svg")
    places, (left, right) = page.evaluate(
        "() => { const plot = document.getElementById('plot-cost');"
        " return [plot.data.filter((t) => t.mode === 'markers').map((t) => t.x[0]), plot.layout.xaxis.range]; }"
    )
    assert right - left > 12.5
    assert len(places) == 3
    for one, other in zip(sorted(places), sorted(places)[1:], strict=False):
        assert 0.005 * (right - left) < other - one < 0.01 * (right - left)
