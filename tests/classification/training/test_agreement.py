"""What is said and refused before GPUs work together in one process; ranks are in tests/classification/runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from classification.errors import UserError
from classification.options.devices import Devices
from classification.runs.world import World
from classification.training.agreement import check_parallel
from mgd.losses import CRD, DIST, KD, Term

WORLD = World(device=torch.device("cuda", 0))


def job_of(**terms: Term) -> Any:
    distiller = SimpleNamespace(terms=nn.ModuleDict(terms))
    options = SimpleNamespace(devices=Devices())
    return SimpleNamespace(distiller=distiller, options=options, notes=[], quantisation=None, stored=None)


@pytest.fixture(autouse=True)
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_a_memory_that_replicas_would_lose_is_refused() -> None:
    with pytest.raises(
        UserError, match="crd keeps data between steps, which DataParallel loses: start one rank per GPU"
    ):
        check_parallel(job_of(crd=CRD(4, [4], 9), kd=KD()), WORLD)


def test_a_stored_teacher_is_refused() -> None:
    job = job_of(kd=KD())
    job.stored = object()
    with pytest.raises(UserError, match="--teacher-cache does not work with DataParallel: start one rank per GPU"):
        check_parallel(job, WORLD)


def test_terms_that_compare_images_say_that_they_see_a_part() -> None:
    job = job_of(dist=DIST(), kd=KD())
    check_parallel(job, WORLD)
    assert job.notes == ["DataParallel: dist compares an image only with those on the same GPU"]


def test_ranks_and_single_gpus_are_left_alone() -> None:
    for world in (World(size=2, device=WORLD.device), World()):
        job = job_of(crd=CRD(4, [4], 9))
        check_parallel(job, world)
        assert job.notes == []
