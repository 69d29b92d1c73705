"""What is kept of a comparison, and its table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def test_a_comparison_is_kept_without_folders_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))
    import collect_comparison

    runs = []
    for recipe, values in {"alone": (50.0, 52.0), "kd": (53.0, 56.0)}.items():
        for seed, top1 in enumerate(values):
            folder = f"runs/net-{recipe}-{seed}"
            runs.append({"student": "net", "recipe": recipe, "seed": seed, "top1": top1, "folder": folder})
            (tmp_path / folder).mkdir(parents=True)
            config = {"versions": {"torch": "2.15"}, "machine": {"cores": 2}, "commit": f"{seed}" * 40}
            (tmp_path / folder / "config.json").write_text(json.dumps(config))
    verdict = {"student": "net", "recipe": "kd", "difference": 3.5, "interval": [-2.25, 9.25], "verdict": "UNDECIDED"}
    content = {"plan": {"data": "/somewhere/photos"}, "runs": runs, "comparisons": [verdict]}
    (tmp_path / "comparison.json").write_text(json.dumps(content))
    kept = collect_comparison.collect(tmp_path)
    assert kept["plan"]["data"] == "photos" and kept["commits"] == ["0" * 40, "1" * 40]

    monkeypatch.setattr(collect_comparison, "RESULTS", tmp_path)
    (tmp_path / "name.json").write_text(json.dumps(kept))
    alone, kd = collect_comparison.table("name").splitlines()[2:4]
    assert alone == "| net | alone | 51.00 ± 1.41 | 2 |  |  |  |"
    assert kd == "| net | kd | 54.50 ± 2.12 | 2 | +3.50 | -2.25 to +9.25 | UNDECIDED |"
