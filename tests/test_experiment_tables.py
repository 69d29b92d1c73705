"""The statistics of the planned experiment."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import stats


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))


def test_holm_corrects_for_the_number_of_tests() -> None:
    from experiment_tables import holm

    # By hand: 4 x 0.01, 3 x 0.02, 2 x 0.03 = 0.06, then 0.04, which may not be below the one before.
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]


def test_a_detectable_difference_is_detected_in_four_of_five_experiments() -> None:
    from experiment_tables import detectable

    draws = np.random.default_rng(0).normal(detectable(0.5, 5), 0.5, (100_000, 5))
    assert np.mean(stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05) == pytest.approx(0.8, abs=0.005)


def test_the_primary_comparisons_are_those_of_the_plan() -> None:
    from cells import read_suites
    from experiment_tables import PRIMARY

    cells = read_suites()["transport"]["cells"]
    for name, other in PRIMARY:
        assert cells[name]["group"] == cells[other]["group"] == "primary"
        assert cells[name]["seeds"] == cells[other]["seeds"] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("suite", "group", "num"), [("transport", "tune", 15), ("shipped", "photographs-tune", 24)])
def test_every_tuned_term_has_three_settings_on_held_out_images(suite: str, group: str, num: int) -> None:
    from cells import data_kind, data_name, read_suites
    from experiment_tables import CIFAR10, PHOTOS

    content = read_suites()[suite]
    cells = {name: cell for name, cell in content["cells"].items() if cell["group"] == group}
    budget = {"transport": CIFAR10, "shipped": PHOTOS}[suite]
    names = [name for term in budget.terms for name in budget.settings(term)]
    assert sorted(names) == sorted(cells) and len(names) == num
    folders = {data_name(data_kind(suite, content), cell) for cell in cells.values()}
    assert folders == {{"transport": "data-800-held-out-200", "shipped": "clothing-held-out-40"}[suite]}
    assert all(cell["seeds"] == [9] for cell in cells.values())
