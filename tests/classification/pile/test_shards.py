"""The plan of a folder of scores: what is read is what was written, and damaged plans are refused."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from classification.errors import UserError
from classification.pile.shards import Plan, begin_folder, read_plan

PLAN = Plan("0" * 32, 3, ["a", "b", "c"], top=2, num_images=25, images="1" * 32, shard_size=10)


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    begin_folder(tmp_path / "scores", PLAN)
    assert read_plan(tmp_path / "scores") == PLAN and PLAN.num_shards == 3


@pytest.mark.parametrize("damage", [{"shard_size": 0}, {"num_images": "25"}, {"top": None}, {"colour": 1}])
def test_a_damaged_plan_is_refused(damage: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "scores.json").write_text(json.dumps({**asdict(PLAN), **damage}))
    with pytest.raises(UserError, match=r"scores\.json is damaged: remove"):
        read_plan(tmp_path)
