"""Which ranks a process is or starts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from classification.errors import UserError
from classification.options.config import parse
from classification.options.devices import Devices
from classification.runs.place import find_place

MEET = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


def devices(words: str) -> Devices:
    return parse(["DIR", *words.split()], "main_base.py", distillation=False).devices


@pytest.mark.parametrize(
    ("words", "env", "gpus", "expected"),
    [
        ("", {}, 4, (0, 1, 1, False, False, 0)),
        ("--world-size 3 --rank 2", {}, 0, (2, 3, 1, False, False, 0)),
        ("--multiprocessing-distributed", {}, 0, (0, 1, 1, False, False, 0)),
        ("--multiprocessing-distributed", {}, 4, (0, 4, 4, True, False, 0)),
        ("--multiprocessing-distributed --world-size 3 --rank 2", {}, 4, (8, 12, 4, True, False, 0)),
        ("--dist-url env:// --world-size 3 --rank 1", {"WORLD_SIZE": "9", "RANK": "2"}, 4, (1, 3, 1, False, False, 1)),
        (
            "--multiprocessing-distributed --dist-url env://",
            {"WORLD_SIZE": "2", "RANK": "1"},
            2,
            (2, 4, 2, True, False, 0),
        ),
        # as torchrun sets them, as a Slurm script does, and as Kubernetes does
        ("", {"WORLD_SIZE": "8", "RANK": "5", "LOCAL_RANK": "1", **MEET}, 4, (5, 8, 1, False, True, 1)),
        ("", {"WORLD_SIZE": "8", "RANK": "5", "SLURM_LOCALID": "1", **MEET}, 4, (5, 8, 1, False, True, 1)),
        ("", {"WORLD_SIZE": "8", "RANK": "5", **MEET}, 4, (5, 8, 1, False, True, 1)),
        ("--dist-url env://", {"WORLD_SIZE": "3", "RANK": "2", **MEET}, 0, (2, 3, 1, False, True, 0)),
        ("", {"WORLD_SIZE": "", "RANK": ""}, 4, (0, 1, 1, False, False, 0)),  # unset in a script
        ("", {"WORLD_SIZE": "1", "RANK": "0"}, 4, (0, 1, 1, False, False, 0)),
        ("", {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, 4, (0, 1, 1, False, False, 0)),
    ],
)
def test_ranks_are_numbered_and_each_has_its_gpu(
    words: str, env: dict[str, str], gpus: int, expected: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    place = find_place(devices(words), env)
    assert (place.first, place.size, place.local_size, place.spawn, place.env, place.local) == expected


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"WORLD_SIZE": "4"}, "RANK and MASTER_ADDR not set"),
        ({"WORLD_SIZE": "4", "RANK": "1"}, "MASTER_ADDR not set"),
        ({"WORLD_SIZE": "4", "RANK": "4", **MEET}, "RANK must be 0 to WORLD_SIZE - 1 = 3; got 4"),
        ({"WORLD_SIZE": "four"}, "WORLD_SIZE must be a whole number, as a launcher sets it; got 'four': unset it"),
        ({"WORLD_SIZE": "4", "RANK": "1.0", **MEET}, "RANK must be a whole number"),
        ({"WORLD_SIZE": "4", "RANK": "1", "LOCAL_RANK": "x", **MEET}, "LOCAL_RANK must be a whole number"),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4"}, "export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS"),
    ],
)
def test_ranks_that_do_not_know_of_each_other_are_refused(env: dict[str, str], says: str) -> None:
    with pytest.raises(UserError) as error:
        find_place(devices(""), env)
    assert says in str(error.value)
