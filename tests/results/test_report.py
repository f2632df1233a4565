"""The HTML report: the numbers of the table, everything escaped; in a browser no request, no error, and it answers."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lrsa.results import Record, build_table, load_records
from lrsa.results.formats import to_markdown
from lrsa.results.report import build_report
from lrsa.results.report.charts import linear_axis, power_axis

from .conftest import MakeRun, share

FAST = {"n_resamples": 200}
EVIL = "<img src=x onerror=alert(1)>\"'&</script>{{ 7 * 7 }}"
DENSE = {("needles", None): share(5), ("needles", 1): share(100), ("needles", 4): share(40)}
LRSA = {("needles", None): share(4), ("needles", 1): share(96), ("needles", 4): share(80), ("squad", 4): share(30)}


@pytest.fixture
def sweep(make_run: MakeRun, tmp_path: Path) -> list[Record]:
    """Two arms of two seeds, a knob that differs, one failed run, one unfinished; names that no page should believe."""
    for seed in (0, 1):
        make_run("dense", DENSE, seed=seed, loss=True)
        make_run(f"lrsa {EVIL}", LRSA, seed=seed, loss=True, knob=3, folder=f"lrsa-{seed}")
    config = {"recipe": {"name": "lrsa", "knob": 9}, "note": EVIL, "run": {"seed": 2}}
    arguments: dict[str, Any] = {"command": "lrsa-train", "study": EVIL, "seed": 2, "config": config}
    with pytest.raises(RuntimeError), Record.start(tmp_path / "runs/failed", arm="lrsa", **arguments):
        raise RuntimeError(f"out of memory {EVIL}")
    Record.start(tmp_path / "runs/killed", arm="lrsa killed", overrides=[EVIL], **arguments)
    return load_records(tmp_path / "runs", unfinished=True)


def test_the_numbers_are_those_of_the_table(sweep: list[Record]) -> None:
    finished = [record for record in sweep if record.status == "finished"]
    page = build_report(sweep, **FAST)
    shown = re.findall(r'<span class="mean">([^<]*)</span><span class="low-high">(\[[^<]*\])</span>', page)
    printed = re.findall(r"\| \**([-+\d.]+)\** (\[[^]]*\])", to_markdown(build_table(finished, **FAST)))
    assert len(printed) == 10 and shown[: len(printed)] == printed
    assert "5 of 12 cells are missing: no finished record holds them." in page


def test_everything_is_escaped(sweep: list[Record]) -> None:
    page = build_report(sweep, names={"needles": EVIL}, title=EVIL, **FAST)
    assert page.count("<script>") == page.count("</script>") == 1
    assert not re.search(r"<img|onerror=alert\(1\)>[^&]", page) and "&lt;img src=x" in page
    assert "{{ 7 * 7 }}" in page and ">49<" not in page, "names are text, not templates"
    assert not re.search(r"https?://", page), "nothing is fetched, not even a namespace"


def test_what_went_wrong_and_what_differs_is_there(sweep: list[Record]) -> None:
    page = build_report(sweep, **FAST)
    assert "Failed, unfinished (2)" in page and "4 finished, 1 failed, 1 unfinished" in page
    assert "RuntimeError: out of memory" in page and "Traceback (most recent call last)" in page
    assert "still running, or killed" in page
    assert f"<dt>device</dt><dd>{sweep[0].hardware['device']}</dd>" in page
    row = re.search(r'<td class="key"><code>recipe\.knob</code></td>(.*?)</tr>', page, re.S)
    assert row and re.findall(r"<code>(.*?)</code>", row.group(1)) == ["0", "9", "9", "3"]
    assert sweep[0].versions["torch"] in page and str(sweep[0].git["commit"]) in page


def test_a_swept_arm_is_told_apart_and_mapped(make_run: MakeRun, tmp_path: Path) -> None:
    for knob, right in ((16, 20), (8, 50), (128, 90)):
        scores = {("needles", 1): share(100), ("needles", 4): share(right)}
        make_run("lrsa", scores, knob=knob, folder=f"lrsa-{knob}")
    page = build_report(load_records(tmp_path / "runs"), **FAST)
    arms = re.findall(r'<td class="name">(lrsa knob=\d+)</td>', page)
    assert arms[:3] == ["lrsa knob=8", "lrsa knob=16", "lrsa knob=128"], "by number"
    assert "lrsa: knob by nominal KV compression" in page
    named = build_report(load_records(tmp_path / "runs"), names={"lrsa": "LRSA"}, arms=["lrsa"], **FAST)
    assert re.findall(r'<td class="name">(LRSA knob=\d+)</td>', named)[:2] == ["LRSA knob=8", "LRSA knob=16"]
    assert re.findall(r'<text class="field[^>]*>([\d.]+)<', page) == ["100.0", "50.0", "100.0", "20.0", "100.0", "90.0"]


def test_tables_that_cannot_be_built_say_why(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("dense", {("needles", 4): share(40, 100)})
    make_run("lrsa", {("needles", 4): share(40, 90)})
    page = build_report(load_records(tmp_path / "runs"), **FAST)
    assert "There is no table of exact match, %: needles at 4x: " in page, re.findall("There is no .*", page)
    with pytest.raises(ValueError, match="unknown metric accuracy; choose from exact"):
        build_report(load_records(tmp_path / "runs"), metrics=["accuracy"])
    with pytest.raises(ValueError, match="no records: run lrsa-train or lrsa-eval first"):
        build_report([])


def test_prose_is_shown_by_position(tmp_path: Path) -> None:
    record = Record.start(tmp_path / "p", command="lrsa-eval", study="s", arm="dense", seed=0, config={})
    cells, rows = [], []
    for compression in (1, 4):
        for start in (0, 128, 256):
            place = {"task": f"prose {start}", "compression": compression, "positions": [start, start + 128]}
            values = [2 + compression / 10 + k / 100 - start / 1000 for k in range(20)]
            nll = sum(values) / 20
            cells.append({**place, "n": 20, "nll": nll, "nll_low": nll, "nll_high": nll, "measured_ratio": 1.0})
            rows += [{**place, "id": f"w{k}", "nll": value, "tokens": 128} for k, value in enumerate(values)]
    record.finish({}, cells, rows)
    page = build_report([record], **FAST)
    assert "NLL above full cache by position" in page and "dense, 4x, token 64: 0.300 [0.300, 0.300], n = 20" in page


def test_what_lm_eval_measured_is_there(tmp_path: Path) -> None:
    given: dict[str, Any] = {"command": "lrsa-eval", "study": "s", "seed": 0}
    for arm, metrics in {"dense": {"ruler/acc,none/4x": 0.25, "x": EVIL}, "lrsa": {"ruler/acc,none/full": 1.0}}.items():
        Record.start(tmp_path / arm, arm=arm, config={"arm": arm}, **given).finish(metrics, [], [])
    page = build_report(load_records(tmp_path), **FAST)
    cells = r'<td>ruler/acc,none/4x</td><td class="number">0.25</td><td class="number">missing</td>'
    assert cells in page and "No finished run measured" not in page


@pytest.mark.parametrize(("low", "high"), [(0, 100), (0, 0.3), (-60, 112.4), (3, 3), (0, 4096)])
def test_axes_hold_their_values_with_round_ticks(low: float, high: float) -> None:
    axis = linear_axis(low, high)
    assert axis.low <= low and high <= axis.high and 2 <= len(axis.ticks) <= 8
    steps = {round(b[0] - a[0], 9) for a, b in zip(axis.ticks, axis.ticks[1:], strict=False)}
    assert len(steps) == 1 and axis.share(axis.low) == 0 and axis.share(axis.high) == 1


def test_powers_are_ticked() -> None:
    assert [text for _, text in power_axis([1, 8.4], 2, "{:g}×".format).ticks] == ["1×", "2×", "4×", "8×"]
    assert [value for value, _ in power_axis([0.06, 2.4], 10, str).ticks] == pytest.approx([0.1, 0.2, 0.5, 1, 2])


# ------------------------------------------------------------------ in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Chromium without a window and without a network; logs of console and requests."""
    found = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    if None in found.values():
        pytest.skip(f"no browser: {' and '.join(name for name, path in found.items() if path is None)} not installed")
    webdriver = pytest.importorskip("selenium.webdriver", reason="no browser: selenium is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = found["chromium"]
    for flag in (
        *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"),
        *("disable-component-update", "disable-sync", "disable-dev-shm-usage", "window-size=1200,900"),
        f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
        "host-resolver-rules=MAP * ~NOTFOUND",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(executable_path=found["chromedriver"])
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser: Any, sweep: list[Record], tmp_path: Path) -> Any:
    """The sweep's report, open, the logs of earlier pages read."""
    path = tmp_path / "report.html"
    path.write_text(build_report(sweep, **FAST), encoding="utf-8")
    browser.get("about:blank")
    for log in ("browser", "performance"):
        browser.get_log(log)
    browser.get(path.as_uri())
    return browser


def move_to_point(driver: Any, chart: str, series: int, point: int) -> str:
    """Put the pointer on a point of a chart; what the page should say of it."""
    from selenium.webdriver.common.actions.action_builder import ActionBuilder

    x, y, tip = driver.execute_script(
        """const panel = document.querySelector(`#chart-${arguments[0]} svg.panel`);
        panel.scrollIntoView({block: "center", behavior: "instant"});
        const shown = [...panel.querySelectorAll("[data-points]")];
        const [x, y, tip] = JSON.parse(shown[arguments[1]].dataset.points)[arguments[2]];
        const at = new DOMPoint(x, y).matrixTransform(panel.getScreenCTM());
        return [at.x, at.y, tip];""",
        chart,
        series,
        point,
    )
    actions = ActionBuilder(driver)
    actions.pointer_action.move_to_location(0, 0).move_to_location(round(x), round(y))
    actions.perform()
    return tip


def test_the_page_asks_for_nothing_and_complains_of_nothing(opened: Any) -> None:
    sent = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    urls = [one["params"]["request"]["url"] for one in sent if one["method"] == "Network.requestWillBeSent"]
    assert [url for url in urls if not url.startswith("data:")] == [opened.current_url]
    assert opened.get_log("browser") == []
    assert opened.execute_script("return document.images.length") == 0
    links = "[...document.querySelectorAll('a')].map(a => document.getElementById(a.hash.slice(1)))"
    assert opened.execute_script(f"return {links}.every(Boolean)"), "links lead somewhere on the page"


def test_hover_says_the_value(opened: Any) -> None:
    tip = opened.find_element("id", "tip")
    assert not tip.is_displayed()
    wanted = move_to_point(opened, "exact-accuracy", 0, 1)
    assert tip.is_displayed() and tip.text == wanted
    assert wanted.startswith("dense, 4x (3.37×): 40.0 [") and wanted.endswith("], n = 100 × 2 seeds")
    move_to_point(opened, "exact-accuracy", 1, 1)
    assert EVIL in tip.text and ": 80.0 [" in tip.text, "text, whatever it looks like"
    assert opened.get_log("browser") == []


def test_the_legend_hides_shows_and_singles_out(opened: Any) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    figure = opened.find_element("id", "chart-exact-accuracy")
    dense, lrsa = figure.find_elements("css selector", "button.key")
    curves = figure.find_elements("css selector", "g[data-arm='dense']")
    assert len(curves) == 1 and curves[0].is_displayed()
    opened.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", dense)
    dense.click()
    assert not curves[0].is_displayed() and dense.get_attribute("aria-pressed") == "false"
    move_to_point(opened, "exact-accuracy", 0, 1)
    assert not opened.find_element("id", "tip").text.startswith("dense"), "what is hidden has nothing to say"
    dense.click()
    assert curves[0].is_displayed()
    ActionChains(opened).double_click(lrsa).perform()
    assert not curves[0].is_displayed() and lrsa.get_attribute("aria-pressed") == "true"
    ActionChains(opened).double_click(lrsa).perform()
    assert curves[0].is_displayed(), "again: all of them"


def test_headers_sort(opened: Any) -> None:
    table = opened.find_element("css selector", "table.sortable")

    def means() -> list[str]:
        return [cell.text for cell in table.find_elements("css selector", "tbody td:last-child .mean")]

    header = table.find_elements("css selector", "thead th")[-1]
    assert means() == ["40.0", "80.0", "missing", "30.0"]
    button = header.find_element("tag name", "button")
    opened.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", button)
    button.click()
    assert means() == ["80.0", "40.0", "30.0", "missing"] and header.get_attribute("aria-sort") == "descending"
    button.click()
    assert means() == ["30.0", "40.0", "80.0", "missing"] and header.get_attribute("aria-sort") == "ascending"


def luminance(colour: str) -> float:
    channels = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_are_readable_and_fit_a_phone(opened: Any, scheme: str) -> None:
    opened.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    page, texts = opened.execute_script(
        """const colour = (element, name) => getComputedStyle(element)[name];
        return [colour(document.body, "backgroundColor"),
                [".soft", "h1", "a", "td"].map(name => colour(document.querySelector(name), "color"))];"""
    )
    assert (luminance(page) < 0.1) == (scheme == "dark")
    for text in texts:
        dark, light = sorted((luminance(page), luminance(text)))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, "WCAG AA"
    for width in (390, 1200):
        metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
        opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        assert opened.execute_script("return document.documentElement.scrollWidth") <= width
    opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_link_to_a_run_unfolds_its_config(opened: Any) -> None:
    from selenium.webdriver.support.wait import WebDriverWait

    run = opened.find_element("css selector", "details.run")
    assert run.get_attribute("open") is None
    opened.find_element("css selector", f"a[href='#{run.get_attribute('id')}']").send_keys("\n")
    # The page hears of a new fragment in an event, which may come after the key has been answered.
    WebDriverWait(opened, 10).until(lambda _: run.get_attribute("open") is not None)
