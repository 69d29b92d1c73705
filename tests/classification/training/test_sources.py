"""Where the networks of a run come from, and what their files decide."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from classification.data.folders import DataFolder
from classification.data.preprocessing import Preprocessing
from classification.errors import UserError
from classification.models import build
from classification.models.weights import WeightFile
from classification.options.options import make_options
from classification.training.sources import Sources, find_sources, numbered_as


def test_a_folder_takes_the_numbers_of_a_file_that_has_its_classes_and_more() -> None:
    data = DataFolder(["b", "d"], [("x", 1), ("y", -1), ("z", 0)], [("v", 1)])
    found = numbered_as(data, ["a", "b", "c", "d"])
    assert found.classes == ["a", "b", "c", "d"]
    assert found.train == [("x", 3), ("y", -1), ("z", 1)] and found.valid == [("v", 3)]  # -1: no label
    for names in (None, ["b", "d"], ["a", "b", "c"]):
        assert numbered_as(data, names) is data


@pytest.mark.parametrize("with_teacher", [True, False])
def test_files_of_teachers_are_read_where_teachers_are_wanted(with_teacher: bool, tmp_path: Path) -> None:
    torch.save(build("cifar_resnet8", 3).state_dict(), tmp_path / "t.pth")
    specs = ({"arch": "cifar_resnet8", "resume": str(tmp_path / "t.pth")}, {"arch": "cifar_resnet8"})
    found = find_sources(make_options({}, teachers=specs), with_student=True, with_teacher=with_teacher)
    assert [file is not None for file in found.teachers] == [with_teacher, False]
    assert found.student is None and found.arch == "resnet18" and found.resume == ""


def test_auto_resumes_the_folder_of_output_once_it_has_a_checkpoint(tmp_path: Path) -> None:
    options = make_options({"resume": "auto", "output": str(tmp_path)})
    assert find_sources(options, with_student=False, with_teacher=False).resume == ""
    (tmp_path / "last.pth").touch()
    assert find_sources(options, with_student=False, with_teacher=False).resume == str(tmp_path / "last.pth")


def test_a_file_names_its_network_if_that_is_one_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    options = make_options({"student_resume": str(path)})
    state = build("cifar_resnet8", 3).state_dict()
    torch.save({"state_dict": state, "arch": "cifar_resnet8"}, path)
    assert find_sources(options, with_student=True, with_teacher=False).arch == "cifar_resnet8"
    torch.save({"state_dict": state, "arch": "made_up"}, path)
    with pytest.raises(
        UserError, match="has the network made_up, which this project does not know: name a network with -a"
    ):
        find_sources(options, with_student=True, with_teacher=False)


def test_a_teacher_sees_what_its_file_says_except_for_a_size_that_was_typed() -> None:
    spec = {"arch": "cifar_resnet8"}
    student = Preprocessing.of(64)
    file = WeightFile(Path("t.pth"), {}, preprocessing_values=Preprocessing.of(48).describe())
    sources = Sources()
    assert sources.teacher_preprocessing(student, spec, file, None).img_size == 48
    assert sources.teacher_preprocessing(student, spec, None, None).img_size == 64
    typed = replace(sources, img_size=32)
    assert typed.teacher_preprocessing(student, spec, file, None).img_size == 32
    assert typed.teacher_preprocessing(student, {**spec, "img_size": 40}, file, None).img_size == 40
