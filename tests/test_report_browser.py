"""The report in a browser: charts draw, nothing is requested, hostile names stay text, no scrolling to the side."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from folders import HOSTILE, folder
from measured import everything
from residuum import report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --disable-dev-shm-usage --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not (BROWSER and DRIVER), reason="no chromium with chromedriver")]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from selenium.webdriver import Chrome
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = BROWSER
    for flag in FLAGS.split():
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("pages")
    small = folder(base / "small")
    decoder = folder(
        base / "decoder",
        lengths=(48,),
        names=["transformer.h"],
        block="transformer.h.{index}",
        labels=False,
        initial=False,
    )
    hostile = folder(base / "hostile", lengths=(2, 3), title=HOSTILE, names=[HOSTILE, "b"], block=HOSTILE)
    deep = folder(base / "deep", lengths=(8, 8, 8), title="twice as deep")
    every = everything(base / "every", lengths=(8, 8, 8))
    made = {
        "one": [small],
        "every": [every],
        "every decoder": [everything(base / "every decoder", lengths=(24,), names=["transformer.h"], initial=False)],
        "decoder": [decoder],
        "hostile": [hostile],
        "two": [small, deep],
        "all": [small, decoder, hostile],
    }
    for name, folders in made.items():
        report.write(folders, base / f"{name}.html")
    return {name: base / f"{name}.html" for name in made}


def show(browser: Any, page: Path, width: int) -> None:
    browser.get_log("performance"), browser.get_log("browser")
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(page.as_uri())


def draw_all(browser: Any) -> None:
    """Opens what is folded and scrolls past every chart, which is drawn when it comes near."""
    browser.execute_script("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    browser.execute_async_script(
        "const done = arguments[0], figures = [...document.querySelectorAll('figure')];"
        "const next = i => {"
        "  if (i === figures.length) return done();"
        "  if (figures[i].querySelector('.main-svg')) return next(i + 1);"
        "  figures[i].scrollIntoView(); setTimeout(() => next(i), 20);"
        "}; next(0);"
    )


def requested(browser: Any) -> list[str]:
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    return [
        url for url in urls if not url.startswith("data:image/png")
    ]  # colours of a table, painted by the page itself


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", ["one", "every", "every decoder", "decoder", "hostile", "two", "all"])
def test_draws_and_asks_for_nothing(browser: Any, pages: dict[str, Path], name: str, width: int) -> None:
    show(browser, pages[name], width)
    draw_all(browser)
    charts = browser.execute_script(
        "return [...document.querySelectorAll('figure')].map(f => ["
        "f.id, f.querySelectorAll('.main-svg').length, f.querySelectorAll('.points path, .heatmaplayer image').length,"
        "f.getBoundingClientRect().right])"
    )
    assert len(charts) >= 8
    for chart, drawings, points, right in charts:
        assert drawings, chart
        assert points, chart
        assert right <= width, chart
    assert browser.execute_script("return Math.max(document.documentElement.scrollWidth, innerWidth)") <= width
    assert requested(browser) == [pages[name].as_uri()]
    assert browser.get_log("browser") == []  # a script error, or something the page's policy forbids


def test_a_hostile_name_is_seen_and_does_nothing(browser: Any, pages: dict[str, Path]) -> None:
    from selenium.common.exceptions import NoAlertPresentException

    for name in ("hostile", "all"):
        show(browser, pages[name], 1280)
        with pytest.raises(NoAlertPresentException):
            _ = browser.switch_to.alert.text
        assert browser.execute_script("return document.querySelectorAll('img, main script').length") == 0
        assert HOSTILE in browser.execute_script("return document.querySelector('main').textContent")
    show(browser, pages["hostile"], 1280)
    draw_all(browser)
    assert browser.execute_script("return document.querySelector('h1').textContent") == HOSTILE
    shown = browser.execute_script("return document.querySelector('#chart-step .annotation-text').textContent")
    assert shown.startswith("<script>alert(1)") or shown == "1"


def test_draws_what_is_near_only(browser: Any, pages: dict[str, Path]) -> None:
    show(browser, pages["every"], 1280)
    drawn = "return document.querySelectorAll('figure .plot > .plot-container').length"
    before = browser.execute_script(drawn)
    assert before < 5
    assert browser.execute_script("return document.querySelectorAll('figure').length") > 30
    heights = "return [...document.querySelectorAll('figure .plot')].map(p => parseFloat(p.style.minHeight))"
    assert min(browser.execute_script(heights)) >= 200  # their places are kept, so that nothing jumps
    draw_all(browser)
    assert browser.execute_script(drawn) == browser.execute_script("return document.querySelectorAll('figure').length")


def test_pointing_shows_the_value(browser: Any, pages: dict[str, Path]) -> None:
    show(browser, pages["one"], 1280)
    draw_all(browser)
    browser.execute_script(
        "Plotly.Fx.hover(document.querySelector('#chart-step .plot'), [{curveNumber: 1, pointNumber: 0}])"
    )
    text = browser.execute_script("return document.querySelector('#chart-step .hoverlayer').textContent")
    assert "block 1.1 (sections.0.0)" in text
    assert "standard error" in text
    assert "500 examples" in text


def test_pressing_a_name_hides_its_curve(browser: Any, pages: dict[str, Path]) -> None:
    show(browser, pages["one"], 390)
    draw_all(browser)
    count = "return document.querySelectorAll('#chart-step .points path').length"
    before = browser.execute_script(count)
    browser.execute_script("document.querySelectorAll('#chart-step .legend button')[1].click()")
    assert browser.execute_script(count) == before // 2


def test_paper(browser: Any, pages: dict[str, Path]) -> None:
    show(browser, pages["two"], 1280)
    browser.execute_script("window.dispatchEvent(new Event('beforeprint'))")
    widths = browser.execute_script("return [...document.querySelectorAll('.main-svg')].map(s => s.clientWidth)")
    assert set(widths) == {640}
    assert browser.execute_script("return document.querySelectorAll('details:not([open])').length") == 0
    browser.execute_script("window.dispatchEvent(new Event('afterprint'))")
    assert browser.execute_script("return document.querySelectorAll('details[open]').length") == 0
    assert browser.execute_script("return document.querySelector('.main-svg').clientWidth") > 640
