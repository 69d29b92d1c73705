"""Taps of a run: named, of a family, or found and paired."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from classification import main_mgd
from classification.data.folders import DataFolder
from classification.data.preprocessing import Preprocessing
from classification.errors import UserError
from classification.models import build
from classification.options.config import parse
from classification.runs.world import Seed
from classification.training.job import Job
from classification.training.previewing import pair_table
from classification.training.tapping import show, tap
from mgd import Tap, describe_taps
from mgd.losses.preview import Preview
from tests.classification.test_main import options, records, without


def job_of(student: str, teacher: str, *words: str, size: int = 64) -> Job:
    parsed = parse(["DIR", "-a", student, "--teacher-arch", teacher, *words], "main_mgd.py", distillation=True)
    networks: list[nn.Module] = [build(arch, 3) for arch in (student, teacher)]
    seen = Preprocessing.of(size)
    job = Job(parsed, Seed(0, True), DataFolder([], [], []), networks[0], networks[1:], student, [{"arch": teacher}])
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


def test_published_taps_of_other_sizes_are_paired_by_size_not_by_position() -> None:
    # At 64 px the maps of the one have 64, 32 and 16 px, those of the other 16, 8, 4 and 2.
    job = job_of("cifar_resnet20", "resnet18")
    student, teacher = tap(job)
    assert list(student.paths) == ["layer3.2.relu@in#-1"] and list(teacher.paths) == ["layer1.1.relu@in#-1"]
    assert job.before_relu
    (note,) = job.notes
    assert note.startswith("taps were paired by the sizes of their maps:\nstudent:")


def test_sizes_of_published_taps_are_relative_to_the_images_of_each_network() -> None:
    job = job_of("resnet18", "resnet18")
    job.teacher_preprocessing = [Preprocessing.of(128)]  # a map of 16 px of 64 and one of 32 px of 128 are one size
    paths = [f"layer{n}.1.relu@in#-1" for n in (1, 2, 3, 4)]
    assert [list(taps.paths) for taps in tap(job)] == [paths, paths] and job.notes == []


def test_terms_that_compare_all_with_all_keep_the_published_taps() -> None:
    job = job_of("cifar_resnet20", "resnet18", "--distiller", "afd")
    student, teacher = tap(job)
    assert len(student.paths) == len(teacher.paths) == 3


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


def test_pairs_are_those_of_equal_parts_of_an_image_where_sizes_differ() -> None:
    job = job_of("cifar_resnet20", "cifar_resnet56", "--student-taps", "auto")
    job.teacher_preprocessing = [Preprocessing.of(128)]
    student, teacher = tap(job)
    assert list(teacher.paths) == [f"layer{n}.8.relu@in#-1" for n in (1, 2, 3)] and len(student.paths) == 3


def test_networks_without_a_common_resolution_are_refused_with_both_tables() -> None:
    job = job_of("cifar_resnet20", "torchvision:regnet_y_400mf", "--student-taps", "conv1")  # 64 px against 2
    job.options = replace(job.options, networks=replace(job.options.networks, teacher_taps="auto"))
    head = [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]
    job.teachers[0] = nn.Sequential(nn.Conv2d(3, 4, 3, 32), *head)
    with pytest.raises(UserError, match=r"no tap of the student fits one of the teacher.*--student-taps") as refused:
        tap(job)
    lines = str(refused.value).splitlines()
    assert [lines.index(name) for name in ("student:", "teacher:")] == [1, 4] and lines[3].split()[0] == "conv1"


def test_show_taps_prints_the_table_and_trains_nothing(
    distil: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main_mgd.main([*without(distil, "--loss-factor"), "--show-taps"]) == 0
    said = capsys.readouterr().out
    for number in (1, 2, 3):
        assert said.count(f"layer{number}.0.relu@in#-1") >= 2
    assert "channels" in said and not (Path(distil[-1]) / "last.pth").exists()
    table = said[said.index("pairs, and the mean cost") :].splitlines()[2:5]
    for number, line in enumerate(table, start=1):
        student, teacher, widths, sizes, *costs = [cell for cell in line.split("  ") if cell]
        assert student == teacher.strip() == f"layer{number}.0.relu@in#-1"
        assert widths.strip() == f"{4 * 2**number} <- {8 * 2**number}"
        assert sizes.strip() == f"{32 // 2**number}x{32 // 2**number} <- {32 // 2**number}x{32 // 2**number}"
        assert 0 < float(costs[0]) < float(costs[1]) < 4


@pytest.mark.parametrize("taps", ["linear", "layer1.0.conv1,bn1#3"])
def test_show_taps_refuses_what_is_no_map_in_a_sentence(
    taps: str, distil: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main_mgd.main([*without(distil, "--loss-factor"), "--show-taps", "--taps", taps]) == 2
    said = capsys.readouterr().err
    assert said.startswith("main_mgd.py: ") and said.count("\n") == 1 and "tap" in said


def test_a_pair_whose_cheapest_flow_is_no_better_than_chance_is_marked() -> None:
    here = Tap("s", 4, (8, 8), "map", None, None, "none", 0.5)
    lines = pair_table([(here, here)] * 2, [Preview(1.2, 1.9, 0.05), Preview(1.85, 1.9, 0.05)])
    assert ["!!" in line for line in lines] == [False, False, True, True]
    assert "--student-taps" in lines[-1]
    assert "!!" not in "".join(pair_table([(here, here)], [Preview(1.2, 1.9, 0.05)]))


def test_any_pair_trains_with_matching(distil: list[str], tmp_path: Path) -> None:
    torch.save(build("timm:mobilenetv3_small_050", 3).state_dict(), tmp_path / "teacher.pth")
    words = options(
        without(distil, "--loss-factor"), epochs="1", img_size="32", teacher_arch="timm:mobilenetv3_small_050"
    )
    words = options(words, teacher_resume=str(tmp_path / "teacher.pth"), distiller="mgd+kd")
    assert main_mgd.main(words) == 0
    assert records(Path(distil[-1]))[0]["train_mgd"] > 0
