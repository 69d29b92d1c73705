"""Taps of a run: named, of a family, or found and paired."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from classification import main_mgd
from classification.data.folders import Folder
from classification.data.preprocessing import Preprocessing
from classification.errors import UserError
from classification.models import build
from classification.options.config import parse
from classification.runs.world import Seed
from classification.training.job import Job
from classification.training.tapping import show, tap
from mgd import describe_taps
from tests.classification.test_main import options, records, without


def job_of(student: str, teacher: str, *words: str, size: int = 64) -> Job:
    parsed = parse(["DIR", "-a", student, "--teacher-arch", teacher, *words], "main_mgd.py", distillation=True)
    networks: list[nn.Module] = [build(arch, 3) for arch in (student, teacher)]
    seen = Preprocessing.of(size)
    job = Job(parsed, Seed(0, True), Folder([], [], []), networks[0], networks[1:], student, [{"arch": teacher}])
    job.preprocessing, job.teacher_preprocessing = seen, [seen]
    return job


def test_a_family_keeps_its_published_taps() -> None:
    job = job_of("cifar_resnet20", "cifar_resnet56")
    found = tap(job)
    assert [list(taps.paths) for taps in found] == [[f"layer{n}.{b}.relu@in#-1" for n in (1, 2, 3)] for b in (2, 8)]
    assert job.before_relu and job.notes == []


def test_tables_number_teachers_where_there_are_several() -> None:
    row = describe_taps(build("cifar_resnet8", 3), ["layer1"], 16)
    for number, roles in ((2, ["student:", "teacher:"]), (3, ["student:", "teacher 1:", "teacher 2:"])):
        assert [line for line in show([row] * number).splitlines() if line.endswith(":")] == roles


def test_a_network_without_published_taps_is_tapped_by_what_it_computes() -> None:
    job = job_of("timm:mobilenetv3_small_050", "torchvision:regnet_y_400mf")
    student, teacher = tap(job)
    images = torch.zeros(1, 3, 64, 64)
    sizes = [[tuple(m.shape[2:]) for m in taps.eval()(images).features] for taps in (student, teacher)]
    assert sizes[0] == sizes[1] and len(sizes[0]) >= 3  # equal resolutions are paired
    (note,) = job.notes
    assert note.startswith("taps were found:") and all(path in note for path in (*student.paths, *teacher.paths))
    assert not job.before_relu  # hard swish


def test_auto_finds_them_for_a_family_too_and_one_network_may_be_named() -> None:
    job = job_of("cifar_resnet20", "cifar_resnet56", "--student-taps", "auto")
    student, teacher = tap(job)
    assert list(teacher.paths) == [f"layer{n}.8.relu@in#-1" for n in (1, 2, 3)]
    assert len(student.paths) == 3 and job.before_relu


def test_networks_without_a_common_resolution_are_refused_with_both_tables() -> None:
    job = job_of("cifar_resnet20", "torchvision:regnet_y_400mf", "--student-taps", "conv1")  # 64 px against 2
    job.options = replace(job.options, networks=replace(job.options.networks, teacher_taps="auto"))
    head = [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]
    job.teachers[0] = nn.Sequential(nn.Conv2d(3, 4, 3, 32), *head)
    with pytest.raises(UserError, match=r"no tap of the student goes with one of the teacher.*student:.*teacher:"):
        tap(job)


def test_show_taps_prints_the_table_and_trains_nothing(
    distil: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main_mgd.main([*without(distil, "--loss-factor"), "--show-taps"]) == 0
    said = capsys.readouterr().out
    for number in (1, 2, 3):
        assert said.count(f"layer{number}.0.relu@in#-1") >= 2
    assert "channels" in said and not (Path(distil[-1]) / "last.pth").exists()


def test_any_pair_trains_with_matching(distil: list[str], tmp_path: Path) -> None:
    torch.save(build("timm:mobilenetv3_small_050", 3).state_dict(), tmp_path / "teacher.pth")
    words = options(
        without(distil, "--loss-factor"), epochs="1", img_size="32", teacher_arch="timm:mobilenetv3_small_050"
    )
    words = options(words, teacher_resume=str(tmp_path / "teacher.pth"), distiller="mgd+kd")
    assert main_mgd.main(words) == 0
    assert records(Path(distil[-1]))[0]["train_mgd"] > 0
