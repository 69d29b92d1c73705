"""The page itself: what it says, that names in it stay text, and that a browser draws it without a complaint."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from classification.errors import UserError
from classification.reports.page import make_page
from tests.classification.conftest import TEACHER
from tests.classification.reports.made import (
    CLASSES,
    CLOSING,
    write_evaluation,
    write_flow,
    write_images,
    write_run,
    write_weights,
)

pytest.importorskip("vl_convert")
pytest.importorskip("jinja2")

WAIT = """
const done = arguments[0];
const look = () => document.documentElement.dataset.ready ? done() : setTimeout(look, 20);
look();
"""
MODES = [(width, theme) for width in (1280, 390) for theme in ("light", "dark")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two distilled runs, one of them broken, a control, their teacher and images, all of hostile names."""
    root = tmp_path_factory.mktemp("report")
    write_images(root / "data")
    teacher = write_weights(root / "guide" / "best.pth", TEACHER)
    for seed in range(2):
        run = write_run(root / f"distilled <i>{seed}", [50.0, 60.0 + seed], teacher=teacher, seed=seed)
        for epoch in range(2):
            write_flow(run, epoch)
    write_run(root / "alone", [50.0, 55.0], planned=3, note=CLOSING)
    with (root / "alone" / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 2, "valid_top1": "</script><script>"')
    (root / "alone" / "last.pth").unlink()
    write_evaluation(root / "alone", 54.0, 2.0)
    write_evaluation(root / "distilled <i>0", 58.0, 3.0)
    return root


def runs(folder: Path) -> list[Path]:
    return [*sorted(folder.glob("distilled*")), folder / "alone"]


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return make_page(runs(folder), data=folder / "data")


@pytest.fixture(scope="module")
def plain(folder: Path) -> str:
    """The page without images, under a verdict that was given."""
    return make_page(runs(folder), verdict="BETTER <b> by far\nWORSE")


def charts(page: str) -> list[tuple[str, dict[str, Any]]]:
    """Return titles and specifications of the charts."""
    found = re.findall(
        r'<strong>(.*?)</strong>.*?<script type="application/json">(.*?)</script>', page, flags=re.DOTALL
    )
    return [(title, json.loads(text)) for title, text in found]


def test_the_page_shows_what_was_measured(page: str) -> None:
    found = dict(charts(page))
    curve = found["Top-1 on the validation images"]
    assert [row["v"] for row in curve["data"]["values"] if row["r"] == 0] == [50.0, 55.0]  # the control lies below
    assert [row["v"] for row in curve["data"]["values"] if row["r"] == 2] == [50.0, 61.0]
    colours = {entry["name"]: entry["colour"] for entry in curve["transform"][0]["from"]["data"]["values"]}
    assert colours == {"alone": "var(--control)", "distilled <i>0": "var(--c0)", "distilled <i>1": "var(--c0)"}
    # Shares of 0.8 and 0.2 at weights of 1 and 0.01: four times the weight would give as large a gradient.
    assert "--term mgd.weight=0.04" in page
    moved = found["Share of the pairs that changed at a matching"]["data"]["values"]
    assert [(row["stage"], row["v"]) for row in moved] == [("stage 1", 0), ("stage 2", 0), ("stage 3", 0)]
    assert "Mean cost of matched pairs 0.500" in page
    rows = found["Confusion of distilled &lt;i&gt;0"]["data"]["values"]
    assert sum(row["n"] for row in rows) == 8


def test_failures_are_shown(page: str) -> None:
    section = page[page.index('<section id="faults">') : page.index('<section id="cost">')]
    for what in ("last.pth is missing", "line 3 of metrics.jsonl is broken", "cut short: 2 of 3 epochs"):
        assert f"<b>alone</b>: {what}" in section
    assert "--resume" in page


def test_names_are_text_and_never_markup(page: str) -> None:
    assert "document.title = &#39;hit&#39;" in page
    for name in (*CLASSES[:1], CLOSING, "distilled <i>0", "0 <b>.png"):
        assert name not in page
    assert page.count("<script") == page.count("</script>") == len(charts(page)) + 2


def test_a_verdict_that_is_given_comes_first(plain: str) -> None:
    lines = r"<p class=\"verdict\">BETTER &lt;b&gt; by far</p>\s*<p class=\"verdict\">WORSE</p>"
    assert re.search(rf"<body>\s*<header>\s*{lines}", plain)
    assert "Give --data DIR" in plain


def test_an_evaluation_is_shown_where_there_are_no_images(plain: str) -> None:
    found = dict(charts(plain))
    points = {row["name"]: (row["x"], row["y"], row["of"]) for row in found["Top-1 and size"]["data"]["values"]}
    assert points["alone"] == (8.0, 54.0, "evaluation.json")
    assert points[f"teacher {TEACHER}"] == (8.0, 58.0, "evaluation.json")
    assert points["distilled <i>1"][1:] == (61.0, "last epoch")
    latency = found["Top-1 and latency, batch 32"]["data"]["values"]
    assert {row["name"]: row["x"] for row in latency} == {
        "alone": 20.0, "distilled <i>0": 30.0, f"teacher {TEACHER}": 30.0
    }  # fmt: skip
    rows = found["Correct images by class"]["data"]["values"]
    assert {(row["name"], row["v"]) for row in rows} == {(CLOSING, 75.0)}
    assert CLOSING not in plain
    assert plain.count("<script") == plain.count("</script>") == len(charts(plain)) + 2


def test_a_teacher_of_other_classes_is_no_failure(tmp_path: Path) -> None:
    """Only its maps guided the student, as do those of published ImageNet weights."""
    teacher = write_weights(tmp_path / "guide.pth", TEACHER, ["other", "classes", "here"])
    run = write_run(tmp_path / "run", [50.0], teacher=teacher)
    page = make_page([run], data=write_images(tmp_path / "data"))
    assert "None found" in page and "was not tried" not in page


def test_images_of_other_classes_are_refused(folder: Path, photos: Path) -> None:
    with pytest.raises(
        UserError, match=r"^--data .* has 3 classes, but the checkpoint has 2: give images of the same classes$"
    ):
        make_page(runs(folder), data=photos)


def test_a_page_of_20_long_runs_is_below_5_mb(tmp_path: Path) -> None:
    teacher = write_weights(tmp_path / "guide" / "best.pth", TEACHER)
    tops = [float(n) for n in np.linspace(1, 90, 400)]
    for number in range(20):
        lone = number % 2
        run = write_run(tmp_path / f"run-{number}", tops, teacher=None if lone else teacher, seed=number, weights=False)
        if not lone:
            write_flow(run, sizes=((64, 256), (128, 512), (96, 384), (64, 512)))
    page = make_page(sorted(tmp_path.glob("run-*")))
    assert len(page) < 5e6


@pytest.mark.parametrize(("width", "theme"), MODES)
def test_a_browser_draws_it_without_a_complaint(
    page: str, browser: Any, tmp_path: Path, width: int, theme: str
) -> None:
    (tmp_path / "page.html").write_text(page)
    media = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get((tmp_path / "page.html").as_uri())
    browser.set_script_timeout(60)
    browser.execute_async_script(WAIT)
    assert browser.get_log("browser") == []
    drawn = browser.execute_script(
        "return [...document.querySelectorAll('.chart')].map("
        "chart => [chart.dataset.drawn, chart.querySelectorAll('svg path').length])"
    )
    assert len(drawn) == len(charts(page)) > 12
    assert all(state == "yes" and paths > 2 for state, paths in drawn)
    pictures = browser.execute_script("return [...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert pictures
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.title.startswith("Report")
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [name for name in loaded if not name.startswith("data:")] == []
    ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (theme == "light")


def test_long_names_and_equal_networks_fit_a_desk(teacher: Path, browser: Any, tmp_path: Path) -> None:
    for seed in range(2):
        alone = write_run(tmp_path / f"photographs_mobilenet_v1_from_scratch_alone_seed{seed}", [50.0], seed=seed)
        run = write_run(
            tmp_path / f"photographs_mobilenet_v1_relative_and_kd_seed{seed}", [50.0], seed=seed, teacher=teacher
        )
        for one in (alone, run):
            write_evaluation(one, 60.0, 2.0)  # all at one place of every chart
    (tmp_path / "page.html").write_text(make_page(sorted(tmp_path.glob("photographs*"))))
    size = {"width": 1200, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get((tmp_path / "page.html").as_uri())
    browser.execute_async_script(WAIT)
    assert browser.get_log("browser") == []
    cut = "return [...document.querySelectorAll('.wide')].filter(table => table.scrollWidth > table.clientWidth).length"
    assert browser.execute_script(cut) == 0


def test_tables_are_sorted_by_a_click(page: str, browser: Any, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(page)
    browser.get((tmp_path / "page.html").as_uri())
    column = "return [...document.querySelectorAll('#runs tbody tr')].map(row => row.cells[2].textContent)"
    click = "document.querySelectorAll('#runs th button')[2].click(); " + column
    assert browser.execute_script(click) == ["55.00", "60.00", "61.00"]
    assert browser.execute_script(click) == ["61.00", "60.00", "55.00"]
    assert browser.execute_script("return document.querySelectorAll('#runs th')[2].ariaSort") == "descending"
