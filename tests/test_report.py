"""The page: what is on it, that it stays small and safe, and that it works in a real browser."""

from __future__ import annotations

import io
import itertools
import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from example_records import record
from PIL import Image

from tasks.reporting.artefacts import data_uris, read_curves
from tasks.reporting.comparison import compare
from tasks.reporting.ledger import EQUAL, ROUNDING, VERDICTS
from tasks.reporting.ledger_page import ledger_section
from tasks.reporting.ledger_runs import HOLDS, ORDERS, REDUCED, STATUSES
from tasks.reporting.ledger_text import FORMAT
from tasks.reporting.plots import write_plots
from tasks.reporting.report import write_report

HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=1'>"
TEXTS = ["backbone", "head", "data", "device", "budget", "command", "note", "run", "weights", "commit", "time"]
LATENCY = {"median_ms": 6.5, "engine": "torch", "device": "some CPU", "threads": 1, "batch_size": 1}


def run_folder(folder: Path, picture: bytes) -> Path:
    """As a training leaves it: a metrics.csv of Lightning's and a picture."""
    folder.mkdir(parents=True)
    lines = ["epoch,step,train/loss,val/map,val/lr"]
    lines += [f"0,{step},{3 / (step + 1)},," for step in range(300)]
    lines += [f"0,{step},,{0.5 - 0.4 / (step / 30 + 1)},1" for step in range(0, 300, 30)]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    (folder / "predictions.png").write_bytes(picture)
    return folder


def noise() -> bytes:
    """A PNG of the usual size that compresses as badly as any."""
    pixels = np.random.default_rng(0).integers(0, 255, (200, 400, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).resize((1600, 800)).save(out, "PNG", compress_level=1)
    return out.getvalue()


NOISE = noise()


def runs(root: Path, names: list[str], seeds: int) -> list[dict[str, Any]]:
    draw = np.random.default_rng(0)
    records = []
    for i, seed in itertools.product(range(len(names)), range(seeds)):
        metrics = {"map": float(0.5 - 0.05 * i + draw.normal(0, 0.003)), "map_50": 0.7}
        per_class = {"detect": {HOSTILE: 0.1 * i, "cell": 0.5, "none": None}}
        latency = LATENCY | {"median_ms": 20.0 - 3 * i}
        folder = run_folder(root / f"{i} {seed}", NOISE)
        records.append(
            record(
                backbone=names[i], seed=seed, run=str(folder), command=f"python -m tasks.detect seed={seed}",
                metrics=metrics, params=(i + 1) * 1_000_000, latency=latency, per_class=per_class,
            )
        )  # fmt: skip
    return records


def ledger(folder: Path, tables: int = 2, rows: int = 3) -> Path:
    """As ``python -m tasks.ledger format=json`` writes it."""

    def row(number: int) -> dict[str, Any]:
        count = {
            "printed": f"{number + 1}.5", "unit": 10**6, "ours": 10**6 * (number + 1) + 512_345,
            "difference": 0.01 * number, "verdict": ROUNDING, "why": f"why {HOSTILE}",
            "size": [224, 224], "batch_norm": True,
            "tried": {f"other {HOSTILE}": {"ours": 123_456, "verdict": EQUAL}},
        }  # fmt: skip
        measured = {"status": REDUCED, "seeds": [0, 1], "values": [0.5, 0.6], "mean": 0.55, "conditions": HOSTILE}
        return {
            "row": f"net {number} {HOSTILE}", "source": "X",
            "command": f"python -m tasks.classify row={number} {HOSTILE}",
            "less": None, "not_built": None, "claim": HOSTILE, "counts": {"params": count},
            "accuracy": {"printed_percent": 75.2 - number, "status": REDUCED, "measured": [measured]},
            "printed_ms": [51.0],
        }  # fmt: skip

    difference = {"mean": 0.1, "low": 0.05, "high": 0.15, "n": 2}
    order = {
        "better": "net 0",
        "worse": "net 1",
        "printed_points": 1.0,
        "conditions": HOSTILE,
        "difference": difference,
    }
    timed = {"row": f"net 0 {HOSTILE}", "ms": 1.0, "ratio": 1.0, "low": 0.9, "high": 1.1}
    latency = {
        "title": f"torch {HOSTILE}", "engine": "torch", "threads": 1, "noise": [HOSTILE], "rows": [timed],
        "orderings": [{"verdict": HOSTILE}],
    }  # fmt: skip
    table = {
        "table": "3", "title": f"Table 3 {HOSTILE}", "convention": HOSTILE, "metric": "top1", "devices": ["Pixel 1"],
        "sources": {"X": HOSTILE}, "quoted": None, "rows": [row(number) for number in range(rows)],
        "orderings": [order | {"verdict": HOLDS}], "latencies": [latency],
    }  # fmt: skip
    whole = {
        "format": FORMAT,
        "made": "2026-01-01",
        "latency_notes": [HOSTILE],
        "tables": [table] * tables,
        "summary": {ROUNDING: 3, REDUCED: 3, HOLDS: 1},
    }
    path = folder / "ledger.json"
    path.write_text(json.dumps(whole | {"verdicts": VERDICTS, "statuses": STATUSES, "orders": ORDERS}))
    return path


def test_the_ledger_stands_on_the_page(tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", compare([record()]), ledger=ledger(tmp_path))
    text = (tmp_path / "report.html").read_text()
    for words in (
        "python -m tasks.classify row=2", "params: 1,512,345 at 224x224", ROUNDING, REDUCED, "55.0 ± 7.1 n=2",
        "1.00 [0.90, 1.10]", "net 0 above net 1: +1 printed, here +10.0 [+5.0, +15.0] n=2: holds", "fewer than 5 pairs",
    ):  # fmt: skip
        assert words in text, words
    page = Tags()
    page.feed(text)
    assert page.tags.count("script") == 2
    assert "img" not in page.tags
    assert not any(name.startswith("on") for name, _ in page.attributes)


def test_without_a_ledger_the_page_says_how_to_get_one(tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", compare([record()]))
    assert "python -m tasks.ledger format=json out=ledger.json" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is no ledger"),
        ('{"format": 0}', "is no ledger"),
        (f'{{"format": {FORMAT}}}', "lacks"),
    ],
)
def test_what_is_no_ledger_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "ledger.json").write_text(text)
    with pytest.raises(ValueError, match=rf"ledger=.*{message}.*python -m tasks\.ledger"):
        ledger_section(tmp_path / "ledger.json")
    with pytest.raises(FileNotFoundError, match=r"none\.json is not a file"):
        ledger_section(tmp_path / "none.json")


def test_fifty_runs_stay_within_two_megabytes(tmp_path: Path) -> None:
    records = runs(tmp_path / "runs", [f"net {i}" for i in range(25)], 2)
    for one in records:
        one["per_class"]["detect"] = {f"class {k}": 0.123456 for k in range(80)}
    write_report(tmp_path / "report.html", compare(records), ledger=ledger(tmp_path, tables=16, rows=10))
    text = (tmp_path / "report.html").read_text()
    assert text.count("data:image/jpeg") == 50
    assert len(text.encode()) <= 2_000_000


class Tags(HTMLParser):
    """Every tag and every attribute of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs


@pytest.mark.parametrize("field", TEXTS)
def test_whatever_a_record_says_is_only_text(tmp_path: Path, field: str) -> None:
    write_report(tmp_path / "report.html", compare([record(**{field: HOSTILE}), record(seed=1)]))
    page = Tags()
    page.feed((tmp_path / "report.html").read_text())
    assert page.tags.count("script") == 2
    assert "img" not in page.tags
    assert not any(name.startswith("on") for name, _ in page.attributes)


def test_nothing_is_loaded_from_anywhere(tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", compare(runs(tmp_path / "runs", ["a", "b"], 2)))
    page = Tags()
    page.feed((tmp_path / "report.html").read_text())
    loads = [value or "" for name, value in page.attributes if name in ("src", "srcset", "data", "poster", "action")]
    assert loads
    assert all(value.startswith("data:") for value in loads)
    assert "link" in page.tags  # the empty icon; a browser would ask for one
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", (tmp_path / "report.html").read_text())


def test_every_number_has_its_command_and_conditions(tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", compare(runs(tmp_path / "runs", ["a"], 2)))
    text = (tmp_path / "report.html").read_text()
    for words in (
        "python -m tasks.detect seed=1",
        "some CPU, 2 threads",
        "20.00 ms",
        "budget 10 min",
    ):
        assert words in text
    assert re.findall(r'href="#run-(\d)">seed (\d)', text) == [("0", "0"), ("1", "1")]


def test_many_records_do_not_swell_the_page(tmp_path: Path) -> None:
    records = [record(backbone=f"net {i}", per_class={"detect": {"a": 0.1}}) for i in range(3000)]
    write_report(tmp_path / "report.html", compare(records))
    text = (tmp_path / "report.html").read_text()
    assert len(text) < 500_000
    assert "2,800 rows after the first 200" in text


def test_curves_are_read_thinned_and_forgiving(tmp_path: Path) -> None:
    curves = read_curves(run_folder(tmp_path / "run", b""), points=50)
    assert set(curves) == {"train/loss", "val/map"}
    assert len(curves["train/loss"]) == 50
    assert curves["train/loss"][0] == (0, 3.0)
    assert curves["train/loss"][-1] == (299, 0.01)
    assert len(curves["val/map"]) == 10
    (tmp_path / "run" / "metrics.csv").write_bytes(b"\x00\xff,step\nnan,inf\n,,,,\n")
    assert read_curves(tmp_path / "run") == {}
    assert read_curves(tmp_path / "nowhere") == {}


def test_pictures_keep_to_their_budget(tmp_path: Path) -> None:
    paths = [run_folder(tmp_path / str(i), NOISE) / "predictions.png" for i in range(3)]
    (tmp_path / "broken.png").write_bytes(b"no picture")
    uris = data_uris([*paths, tmp_path / "broken.png"], 200_000)
    assert list(uris) == paths
    assert all(len(uri) <= 50_000 for uri in uris.values())


def test_plots_for_papers(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra plots is not installed")
    names = ["a", "b_$x", "c"]
    written = write_plots(tmp_path / "figures", compare(runs(tmp_path / "runs", names, 2)))
    assert sorted(path.suffix for path in written) == [".png"] * 3 + [".svg"] * 3
    assert Image.open(next(p for p in written if p.suffix == ".png")).width == 1040
    assert "<svg" in next(p for p in written if p.suffix == ".svg").read_text()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium (the extra dev) is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no Chromium with its chromedriver on the PATH")
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = selenium.Chrome(options, selenium.ChromeService(driver))
    yield opened
    opened.quit()


def show(browser: Any, page: Path, width: int = 1200, height: int = 900, dark: bool = False, anchor: str = "") -> None:
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    browser.get("about:blank")
    browser.get(page.as_uri() + anchor)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    names = ["slow but good", "middle", "fast", HOSTILE]
    records = runs(folder / "runs", names, 2)
    records += [one | {"task": "segment", "metrics": {"miou": 0.5, "pixel_accuracy": 0.8}} for one in records]
    write_report(folder / "report.html", compare(records), ledger=ledger(folder))
    return folder / "report.html"


@pytest.mark.slow
def test_sorting_and_filtering_in_a_browser(browser: Any, page: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    show(browser, page)

    def column(title: str, table: str = "t0") -> list[str]:
        return browser.execute_script(
            "const t = document.getElementById(arguments[0]);"
            "const i = [...t.tHead.rows[0].cells].findIndex((c) => c.textContent === arguments[1]);"
            "return [...t.tBodies[0].rows].filter((r) => r.offsetParent).map((r) => r.cells[i].textContent)",
            table, title,
        )  # fmt: skip

    buttons = {b.text.split(" ↕")[0].strip(): b for b in browser.find_elements("css selector", "#t0 th button")}
    assert column("params M") == ["1.00", "2.00", "3.00", "4.00"]
    buttons["params M"].click()
    assert column("params M") == ["4.00", "3.00", "2.00", "1.00"]
    buttons["params M"].send_keys(Keys.ENTER)  # by keyboard
    assert column("params M") == ["1.00", "2.00", "3.00", "4.00"]
    assert column("params M", "t1") == ["1.00", "2.00", "3.00", "4.00"]
    head = browser.find_element("css selector", "#t0 th[aria-sort=ascending]")
    assert "params" in head.text
    box = browser.find_element("id", "filter-t0")
    box.send_keys("slow GOOD")
    assert column("backbone") == ["slow but good"]
    assert browser.find_element("id", "count-t0").text == "1 of 4 rows"
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys(Keys.DELETE)
    assert len(column("backbone")) == 4


@pytest.mark.slow
def test_the_ledger_sorts_filters_and_unfolds(browser: Any, page: Path) -> None:
    show(browser, page, anchor="#ledger")
    names = (
        "return [...document.querySelectorAll('#l1 tbody tr')].filter((r) => r.offsetParent)"
        ".map((r) => r.cells[0].textContent.split(' ')[1])"
    )
    head = next(b for b in browser.find_elements("css selector", "#l1 th button") if b.text.startswith("params"))
    assert browser.execute_script(names) == ["0", "1", "2"]
    middle = "arguments[0].scrollIntoView({block: 'center', inline: 'center', behavior: 'instant'})"
    browser.execute_script(middle, head)
    head.click()
    assert browser.execute_script(names) == ["2", "1", "0"]
    browser.find_element("id", "filter-l1").send_keys("row=1")
    assert browser.execute_script(names) == ["1"]
    assert browser.find_element("id", "count-l1").text == "1 of 3 rows"
    assert browser.find_element("id", "count-l0").text == "3 of 3 rows"
    how = browser.find_elements("css selector", "#l1 tbody tr:not([hidden]) details.how")
    assert [part.text for part in how] == [f"{REDUCED}: 55.0 ± 7.1 n=2", "how"]
    browser.execute_script(middle, how[1])
    how[1].find_element("css selector", "summary").click()
    assert "python -m tasks.classify row=1" in how[1].text
    assert how[1].size["width"] < 1200


@pytest.mark.slow
def test_plots_answer_to_pointer_and_keyboard(browser: Any, page: Path) -> None:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    show(browser, page)
    points = browser.find_elements("css selector", "#front-0 .point")
    tip = browser.find_element("id", "tip")
    assert len(points) == 4
    assert not tip.is_displayed()
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", points[0])
    ActionChains(browser).move_to_element(points[0].find_element("css selector", ".mark")).perform()
    assert "slow but good" in tip.text
    assert "on the Pareto front" in tip.text
    assert "some CPU" in tip.text
    ActionChains(browser).send_keys(Keys.ESCAPE).perform()
    assert not tip.is_displayed()
    browser.execute_script("arguments[0].focus()", points[1])
    assert "middle" in tip.text
    ActionChains(browser).send_keys(Keys.TAB).perform()
    assert "fast" in tip.text
    front = browser.find_element("css selector", "#front-0 .front").get_attribute("d")
    assert front.count("V") == 3  # all four: each is faster and worse than the one before
    costs = browser.find_elements("css selector", "#front-0 select")[1]
    costs.send_keys("parameters")
    browser.execute_script("arguments[0].value = 'params'; arguments[0].dispatchEvent(new Event('change'))", costs)
    assert browser.find_element("css selector", "#front-0 .front").get_attribute("d").count("V") == 0  # one dominates
    assert len(browser.find_elements("css selector", "#curves-0 .run")) == 8
    assert len(browser.find_elements("css selector", "#bars-0 .bar")) == 3


@pytest.mark.slow
def test_no_script_of_a_record_runs_and_the_console_is_silent(browser: Any, page: Path) -> None:
    browser.get_log("browser")
    show(browser, page)
    assert browser.execute_script("return window.hacked") is None
    assert browser.get_log("browser") == []
    assert HOSTILE in browser.find_element("css selector", "#t0").text
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map((e) => e.name)")
    assert [name for name in loaded if not name.startswith("data:")] == []


@pytest.mark.slow
def test_a_link_to_a_run_opens_it(browser: Any, page: Path) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    show(browser, page, anchor="#run-3")
    details = browser.find_element("id", "run-3")
    assert details.get_attribute("open") is not None
    assert "python -m tasks.detect seed=1" in details.text
    width = "return arguments[0].querySelector('img').naturalWidth"
    WebDriverWait(browser, 10).until(lambda b: b.execute_script(width, details) > 200)  # it is decoded when it is seen
    browser.execute_script("document.querySelector('a[href=\"#run-5\"]').click()")
    assert browser.find_element("id", "run-5").get_attribute("open") is not None


@pytest.mark.slow
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (375, True)])
def test_fits_a_desk_and_a_phone(browser: Any, page: Path, tmp_path: Path, width: int, dark: bool) -> None:
    show(browser, page, width, 800, dark)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    small = browser.execute_script(
        "return [...document.querySelectorAll('svg text')].filter((t) => t.getBoundingClientRect().height < 9).length"
    )
    assert small == 0
    browser.save_screenshot(str(tmp_path / "page.png"))
    pixels = np.asarray(Image.open(tmp_path / "page.png").convert("L"))
    assert pixels.shape[1] == width
    assert (pixels.mean() < 100) == dark
    background = np.median(pixels)
    assert (np.abs(pixels.astype(int) - background) > 100).mean() > 0.005  # there is writing on it


def test_the_page_s_data_are_json_of_finite_numbers(tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", compare([record(metrics={"map": None}), record(seed=1, backbone="b")]))
    text = (tmp_path / "report.html").read_text()
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert found
    data = json.loads(found[1], parse_constant=lambda name: pytest.fail(name))
    assert [row["stats"]["map"] and row["stats"]["map"][2] for row in data["tables"][0]["rows"]] == [1, None]
