"""Who is waited for, on a clock and a store that the test moves."""

from __future__ import annotations

from collections.abc import Collection

import pytest

from classification.runs.heartbeat import SILENT, Heartbeat, Mate, shared_devices

MATES = [Mate("one", 11, "cuda:0"), Mate("one", 12, "cuda:1"), Mate("two", 11, "cuda:0")]


class Shared:
    """Three ranks on one store and one clock."""

    def __init__(self) -> None:
        self.now = 0.0
        self.values: dict[str, bytes] = {}
        self.said: list[list[str]] = [[], [], []]
        self.ranks = [Heartbeat(self, rank, MATES, 1800, self.said[rank].append, lambda: self.now) for rank in range(3)]

    def set(self, key: str, value: str) -> None:
        self.values[key] = value.encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)

    def get(self, key: str) -> bytes:
        return self.values[key]

    def run(self, seconds: int, beating: Collection[int], moving: Collection[int]) -> None:
        for _ in range(seconds):
            self.now += 1
            for rank in beating:
                if rank in moving:
                    self.ranks[rank].passed()
                self.ranks[rank].exchange()
            for rank in beating:
                self.ranks[rank].watch()


def test_nothing_is_said_while_all_move_or_all_wait_for_the_same_step() -> None:
    shared = Shared()
    shared.run(200, beating={0, 1, 2}, moving={0, 1, 2})
    shared.run(200, beating={0, 1, 2}, moving=set())
    assert shared.said == [[], [], []]


@pytest.mark.parametrize("beats", [False, True])
def test_a_rank_that_hangs_is_named_once_by_the_first_of_the_others(beats: bool) -> None:
    shared = Shared()
    shared.run(20, beating={0, 1, 2}, moving={0, 1, 2})
    shared.run(1, beating={0, 1, 2}, moving={0, 2})  # they finish the step, and wait for rank 1 in its last line
    rest = {0, 1, 2} if beats else {0, 2}
    shared.run(int(SILENT) - 5, beating=rest, moving=set())
    assert shared.said == [[], [], []]
    shared.run(100, beating=rest, moving=set())
    assert [len(said) for said in shared.said] == [1, 0, 0]
    assert (
        "waiting for rank 1 (process 12 on one)" in shared.said[0][0] and "--dist-timeout 1800 s" in shared.said[0][0]
    )


def test_rank_0_is_named_by_rank_1_where_it_hangs() -> None:
    shared = Shared()
    shared.run(20, beating={0, 1, 2}, moving={0, 1, 2})
    for _ in range(100):  # rank 0 keeps the store: no exchange returns
        shared.now += 1
        for rank in (1, 2):
            shared.ranks[rank].watch()
    assert [len(said) for said in shared.said] == [0, 1, 0] and "rank 0 (process 11 on one)" in shared.said[1][0]


def test_two_ranks_on_one_gpu_are_found() -> None:
    assert shared_devices(MATES) == {}
    assert shared_devices([*MATES, Mate("two", 13, "cuda:0")]) == {"cuda:0 of two": [2, 3]}
    assert shared_devices([Mate("one", 1, "cpu"), Mate("one", 2, "cpu")]) == {}
