"""A gate on the cost of a training step that reads no clock: operators and bytes of three recipes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from count_step import RECIPES, STORED, Counter, compare, count, version

PINNED = re.findall(r"^torch==([\d.]+)", (Path(__file__).parents[1] / "requirements.txt").read_text(), re.MULTILINE)
KEPT = json.loads(STORED.read_text())


def test_the_stored_counts_are_those_of_the_pinned_torch() -> None:
    assert [KEPT["torch"]] == PINNED, "run python scripts/count_step.py --renew with the torch of requirements.txt"


@pytest.mark.skipif([version()] != PINNED, reason=f"counts are stored for torch {PINNED[0]}; this is {version()}")
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_costs_what_it_did(recipe: str) -> None:
    parts = count(recipe)
    found = [compare(f"{recipe}, {part}", KEPT[recipe][part], costs) for part, costs in parts.items()]
    text = "\n".join(filter(None, found))
    assert not text, f"{text}\nIf this is meant, store new counts: python scripts/count_step.py --renew"


def test_bytes_are_those_read_and_written() -> None:
    tensor = torch.zeros(6, 4)
    with Counter() as counter:
        tensor.view(4, 6).t()
        torch.empty_like(tensor)
        tensor + 1
        tensor.add_(tensor)
        tensor.sum()
    assert counter.costs == {
        "aten.view.default": (1, 0),
        "aten.t.default": (1, 0),
        "aten.empty_like.default": (1, 0),
        "aten.add.Tensor": (1, 2 * 96),
        "aten.add_.Tensor": (1, 3 * 96),
        "aten.sum.default": (1, 96 + 4),
    }


def test_a_change_beyond_two_per_cent_is_named() -> None:
    before = {"aten.add.Tensor": (60, 6000), "aten.mul.Tensor": (40, 4000)}
    assert compare("toy", before, before | {"aten.clone.default": (2, 200)}) == ""
    assert compare("toy", before, before | {"aten.mul.Tensor": (38, 3800)}) == ""
    for more in ({"aten.clone.default": (3, 0)}, {"aten.clone.default": (1, 201)}, {"aten.mul.Tensor": (37, 3900)}):
        found = compare("toy", before, before | more)
        assert found.startswith("toy: 100 ->")
        assert re.findall(r"^  (\S+):", found, re.MULTILINE) == list(more)
