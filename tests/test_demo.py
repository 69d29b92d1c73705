"""The demo, on networks and epochs small enough for a test."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean

import pytest

ROOT = Path(__file__).parents[1]


def test_the_table_holds_the_mean_over_the_seeds(tmp_path: Path) -> None:
    import demo

    plan = demo.Plan(
        teacher="-a cifar_resnet8 --epochs 2",
        student="-a cifar_resnet8_w0.5 --epochs 1",
        distil="--teacher-arch cifar_resnet8 --distiller mgd --loss-factor 1e3",
    )
    runs = demo.demo(tmp_path / "demo", 5, [0, 1], plan, workers=1)
    assert {role: len(found) for role, found in runs.items()} == {"teacher": 1, "alone": 2, "distilled": 2}

    last = [json.loads((tmp_path / "demo" / f"distilled-{s}" / "metrics.jsonl").read_text()) for s in (0, 1)]
    words = demo.table(runs).splitlines()[-1].split()
    assert words[0] == "distilled" and float(words[1]) == pytest.approx(mean(r["valid_top1"] for r in last), abs=0.006)
    assert demo.write_page(tmp_path / "demo", runs).read_text().count("distilled-1") > 1
    assert float(words[2]) == pytest.approx(abs(last[0]["valid_top1"] - last[1]["valid_top1"]) / 2**0.5, abs=0.006)


def test_a_run_that_fails_is_named_with_the_end_of_its_log(tmp_path: Path) -> None:
    import demo

    (tmp_path / "logs").mkdir()
    with pytest.raises(demo.RunError, match=r"teacher ended with status 2(.|\n)*data .*does not exist"):
        demo.run("main_base.py", tmp_path / "teacher", "-a cifar_resnet8", 0)
