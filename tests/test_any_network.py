"""docs/start/any_network.md: its programs run as they stand, and their losses fall."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = Path(__file__).parents[1] / "docs" / "start" / "any_network.md"


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def run(*numbers: int) -> dict[str, Any]:
    """Run blocks of the page one after another, as a reader who copies them."""
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    for number in numbers:
        exec(compile(blocks()[number], f"{PAGE}, block {number}", "exec"), names)
    return names


@pytest.mark.parametrize(
    ("numbers", "name", "least"), [((0, 1), "losses", 2), ((0, 1, 2), "detected", 3), ((0, 1, 3), "segmented", 2)]
)
def test_a_program_of_the_page_runs_and_its_loss_falls(numbers: tuple[int, ...], name: str, least: int) -> None:
    names = run(*numbers)
    losses = [float(loss.detach()) for loss in names[name]]
    assert len(losses) >= 10 and sum(losses[-3:]) < sum(losses[:3])
    assert len(names["student"].paths) >= least
    assert not any(p.requires_grad for p in names["teacher"].parameters())


def test_the_program_for_a_module_of_ones_own_is_short() -> None:
    lines = [line for line in blocks()[1].splitlines() if line.strip()]
    assert len(lines) <= 17  # 15 beside the import and the list of losses
