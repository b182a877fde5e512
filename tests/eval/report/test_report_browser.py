"""The report in a real browser: it renders, is silent, asks nobody for anything, and fits every medium."""

import base64
from collections.abc import Iterator
from types import ModuleType

import pytest

from robx.eval.report.collect import collect
from robx.eval.report.render import make_pages

WIDTHS = (1280, 768, 360)


@pytest.fixture(scope="module")
def browser(devtools: ModuleType, records: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    if devtools.CHROMIUM is None:
        pytest.skip("chromium is not installed (Debian: chromium)")
    root = tmp_path_factory.mktemp("browser")
    records.write_everything(root / "runs")
    (root / "report.html").write_text(make_pages(collect([root / "runs"])).html)
    browser = devtools.Browser(root / "profile")
    try:
        browser.url = (root / "report.html").as_uri()
        browser.open(browser.url)
        yield browser
    finally:
        browser.close()


def _named(browser, method: str) -> list[dict]:
    return [event["params"] for event in browser.events if event.get("method") == method]


def test_it_loads_without_an_error_and_asks_for_its_own_file_only(browser):
    browser.open(browser.url)
    assert browser.value("document.readyState") == "complete"
    assert browser.value("document.querySelector('h1').textContent").startswith("What to deploy")
    asked = [request["request"]["url"] for request in _named(browser, "Network.requestWillBeSent")]
    assert [url for url in asked if not url.startswith("data:")] == [browser.url]
    assert _named(browser, "Log.entryAdded") == []
    assert _named(browser, "Runtime.consoleAPICalled") == [] and _named(browser, "Runtime.exceptionThrown") == []


def test_the_browser_would_tell_of_a_request_and_an_error(browser, tmp_path):
    """The check above would fail if there were one: this page has both."""
    page = tmp_path / "bad.html"
    page.write_text("<img src='missing.png'><script>console.error('x'); nowhere()</script>")
    browser.open(page.as_uri())
    assert len(_named(browser, "Network.requestWillBeSent")) == 2
    assert _named(browser, "Runtime.consoleAPICalled") and _named(browser, "Runtime.exceptionThrown")
    browser.open(browser.url)


@pytest.mark.parametrize("width", WIDTHS)
def test_no_width_makes_the_page_itself_scroll_sideways(browser, width):
    browser.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
    assert browser.value("document.documentElement.scrollWidth") <= width
    assert browser.value("[...document.querySelectorAll('svg')].every(s => s.getBoundingClientRect().height > 60)")
    browser.call("Emulation.clearDeviceMetricsOverride")


def test_latencies_and_rungs_need_no_scroll_bar_and_no_tall_rows_at_1280(browser):
    browser.call("Emulation.setDeviceMetricsOverride", width=1280, height=900, deviceScaleFactor=1, mobile=False)
    tables = "[...document.querySelectorAll('table.dense')]"
    assert browser.value(f"{tables}.length") == 4
    assert browser.value(f"{tables}.every(t => t.parentElement.scrollWidth <= t.parentElement.clientWidth)")
    assert browser.value(f"Math.max(...{tables}.flatMap(t => [...t.rows]).map(r => r.offsetHeight))") <= 90
    browser.call("Emulation.clearDeviceMetricsOverride")


def test_the_recommendation_is_on_the_first_screen(browser):
    browser.call("Emulation.setDeviceMetricsOverride", width=1280, height=800, deviceScaleFactor=1, mobile=False)
    for what in (".pick", ".facts", ".steps", "svg"):
        assert browser.value(f"document.querySelector('{what}').getBoundingClientRect().bottom") <= 800, what
    browser.call("Emulation.clearDeviceMetricsOverride")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_the_paper_in_both_schemes(browser, scheme):
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    colours = browser.value(
        """(() => { const s = getComputedStyle(document.documentElement);
        return Object.fromEntries(['paper','sheet','tint','ink','muted','fp32','fp16','int8','good','warn','bad','link']
        .map(n => [n, s.getPropertyValue('--' + n).trim()])) })()"""
    )
    for name in ("ink", "muted", "good", "warn", "bad", "link"):
        for ground in ("paper", "tint"):
            assert _contrast(colours[name], colours[ground]) >= 4.5, (scheme, name, ground)  # WCAG 2.2 AA, text
    for name in ("fp32", "fp16", "int8"):
        assert _contrast(colours[name], colours["paper"]) >= 3, (scheme, name)  # WCAG 2.2 AA, graphics
    drawn = browser.value("getComputedStyle(document.querySelector('svg text')).fill")
    muted = tuple(int(colours["muted"][i : i + 2], 16) for i in (1, 3, 5))
    assert drawn == f"rgb{muted}"
    browser.call("Emulation.setEmulatedMedia", features=[])


def test_a_screen_reader_is_told_every_figure_table_and_heading(browser):
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]

    def names(*roles: str) -> list[str]:
        found = [n for n in nodes if n.get("role", {}).get("value") in roles and not n.get("ignored")]
        return [n.get("name", {}).get("value", "") for n in found]

    pictures = names("image", "img", "graphics-document")
    assert len(pictures) == 7 and all(pictures)
    shown = "[...document.querySelectorAll('table')].filter(t => t.checkVisibility()).length"
    assert len(names("table")) == browser.value(shown) and all(names("table"))
    assert all(names("heading")) and all(names("region"))
    assert names("main") and names("navigation") == ["Contents"]


def test_every_figure_is_folded_away_and_opens(browser):
    folded = "document.querySelector('details')"
    assert not browser.value(f"{folded}.open") and not browser.value(
        f"{folded}.querySelector('table').checkVisibility()"
    )
    browser.value(f"{folded}.querySelector('summary').click()")
    assert browser.value(f"{folded}.querySelector('table').checkVisibility()")
    assert browser.value("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    browser.value(f"{folded}.querySelector('summary').click()")


def test_the_keyboard_reaches_the_decision_first(browser):
    browser.value("document.activeElement.blur()")
    for kind in ("keyDown", "keyUp"):
        browser.call("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)
    assert browser.value("document.activeElement.getAttribute('href')") == "#decision"
    assert browser.value("getComputedStyle(document.activeElement).outlineStyle") != "none"


def test_it_prints_on_paper_with_nothing_cut_off(browser):
    browser.call("Emulation.setEmulatedMedia", media="print")
    # A4 less its margins at 96 dots an inch.
    browser.call("Emulation.setDeviceMetricsOverride", width=688, height=1000, deviceScaleFactor=1, mobile=False)
    assert browser.value("document.documentElement.scrollWidth") <= 688
    assert browser.value("getComputedStyle(document.documentElement).getPropertyValue('--paper').trim()") == "#fff"
    browser.call("Emulation.clearDeviceMetricsOverride")
    browser.call("Emulation.setEmulatedMedia", media="")
    pdf = base64.b64decode(browser.call("Page.printToPDF", printBackground=True, preferCSSPageSize=True)["data"])
    assert pdf.startswith(b"%PDF") and len(pdf) > 20_000


def _contrast(one: str, other: str) -> float:
    """WCAG 2.2's contrast ratio of two #rrggbb colours."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)
