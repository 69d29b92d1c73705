from __future__ import annotations

import time
from typing import Any

import pytest


@pytest.fixture
def side_by_side() -> Any:
    import side_by_side

    return side_by_side


def test_what_a_way_returns_is_no_time_unless_it_says_so(side_by_side: Any) -> None:
    ways = {
        "result": lambda: 6000.0,
        "own": lambda: side_by_side.Seconds(6000.0),
        "slow": lambda: time.sleep(0.02),
    }
    seconds = side_by_side.alternate(ways, rounds=3)
    assert seconds["own"] == [6000.0] * 3
    assert 0 < max(seconds["result"]) < 100 and min(seconds["slow"]) > 0.019
    assert side_by_side.ratio(seconds, "own", "own") == (1, 1, 1)


def test_every_way_is_once_the_first(side_by_side: Any) -> None:
    called: list[str] = []
    ways = {name: (lambda n=name: called.append(n)) for name in "abc"}
    side_by_side.alternate(ways, rounds=3, warmup=0)
    assert {called[0], called[3], called[6]} == {"a", "b", "c"} and sorted(called) == sorted("abc" * 3)
