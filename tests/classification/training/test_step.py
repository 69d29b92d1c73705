"""A batch passed in parts, an average of the student, mixed images, compiled networks: in whole runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import mgd
from classification import main_base, main_mgd
from classification.training import saving, trainer
from classification.training.trainer import Trainer
from tests.classification.conftest import SMALL, STUDENT, TEACHER
from tests.classification.runs.test_resume import differences, into  # noqa: F401
from tests.classification.seams import fix_norms, run_changed, run_trainer
from tests.classification.test_main import options, records

ALL = {"accumulate": "2", "ema": "0.9", "mixup": "0.2", "cutmix": "1", "distiller": "mgd+kd", "mgd_reducer": "rd"}


def cut_at_save(number: int, words: list[str]) -> int:
    """Run, be interrupted behind the checkpoint of that number, and return the status."""
    left, save = [number], saving.save

    def cut(self: Any, **how: Any) -> None:
        save(self, **how)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "save", cut)
        return main_mgd.main(words)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(folder / "last.pth", weights_only=True)["state_dict"]
    return found


def test_a_batch_in_parts_gives_the_update_of_the_whole(distil: list[str], tmp_path: Path) -> None:
    words = options(distil, epochs="1", momentum="0")
    for parts in ("1", "3"):  # batches of 7 and 6 images: parts of 3, 2, 2 and of 2
        assert run_changed(options(into(words, tmp_path / parts), accumulate=parts), fix_norms) == 0
    for (name, whole), in_parts in zip(weights(tmp_path / "1").items(), weights(tmp_path / "3").values(), strict=True):
        torch.testing.assert_close(in_parts, whole, rtol=1e-3, atol=1e-5, msg=name)
    first, other = records(tmp_path / "1")[0], records(tmp_path / "3")[0]
    for key in ("train_loss", "train_ce", "train_mgd", "train_top1"):
        assert first[key] == pytest.approx(other[key], rel=1e-3)


def test_more_parts_than_images_are_refused(distil: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main_mgd.main(options(distil, accumulate="9")) == 2
    assert "--accumulate 9 is more than the 8 images of a batch" in capsys.readouterr().err
    assert main_mgd.main(options(distil, accumulate="8")) == 2  # balanced batches have 7 and 6
    assert "leave some of 8 parts without images: raise -b" in capsys.readouterr().err


def test_everything_together_continues_as_if_uncut(
    distil: list[str],
    tmp_path: Path,
    differences: Any,  # noqa: F811
) -> None:
    words = options(distil, epochs="3", checkpoint_every_steps="3", **ALL)
    assert main_mgd.main(into(words, tmp_path / "whole")) == 0
    words = options(into(words, tmp_path / "cut"), resume="auto")
    assert cut_at_save(5, words) == 130
    assert torch.load(tmp_path / "cut" / "last.pth", weights_only=True)["resume"]["step"] == 3
    assert main_mgd.main(words) == 0
    assert differences(tmp_path / "cut", tmp_path / "whole") == []
    last = torch.load(tmp_path / "cut" / "last.pth", weights_only=True)
    average, student = last["state_dict"], last["resume"]["ema"]["student"]
    assert last["resume"]["ema"]["updates"] == 12
    assert not torch.equal(average["linear.weight"], student["linear.weight"])
    assert "train_top1" not in records(tmp_path / "cut")[0]  # a mixed image has no class


def test_the_average_is_what_is_evaluated_and_kept(distil: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main_mgd.main(options(distil, ema="0.9")) == 0
    folder = Path(distil[-1])
    evaluate = [distil[0], "-a", STUDENT, "--img-size", "16", "--train-crop", "pad", "-j", "0", "-e"]
    capsys.readouterr()
    assert main_base.main([*evaluate, "--student-resume", str(folder / "last.pth")]) == 0
    assert f"top-1 {records(folder)[-1]['valid_top1']:.2f}" in capsys.readouterr().out


def test_an_average_may_begin_or_end_with_an_override(distil: list[str]) -> None:
    last = str(Path(distil[-1]) / "last.pth")
    assert main_mgd.main(options(distil, epochs="1", ema="0.9")) == 0
    for epochs, ema in (("2", "0"), ("3", "0.5")):
        words = options(distil, epochs=epochs, ema=ema, resume=last, resume_override="1")
        assert main_mgd.main(words) == 0
    assert torch.load(last, weights_only=True)["resume"]["ema"]["updates"] == 4


def test_images_without_labels_are_mixed_too(distil: list[str]) -> None:
    words = [
        word for word in options(distil, distiller="kd", labels="0", mixup="1") if word not in ("--loss-factor", "1e3")
    ]
    assert main_mgd.main(words) == 0


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_teachers_that_go_ahead_change_neither_the_run_nor_how_it_continues(
    distil: list[str],
    tmp_path: Path,
    differences: Any,  # noqa: F811
) -> None:
    words = options(distil, epochs="3", distiller="mgd+kd", mgd_update_freq="1", checkpoint_every_steps="3")
    assert main_mgd.main(into(words, tmp_path / "in turn")) == 0
    words = options(words, teacher_threads="1")
    assert main_mgd.main(into(words, tmp_path / "ahead")) == 0
    plain, ahead = records(tmp_path / "in turn"), records(tmp_path / "ahead")
    for key in ("train_mgd", "train_kd", "flow_cost"):
        assert [r[key] for r in ahead] == pytest.approx([r[key] for r in plain], rel=1e-2)
    words = options(into(words, tmp_path / "cut"), resume="auto")
    assert cut_at_save(5, words) == 130
    assert main_mgd.main(words) == 0
    assert differences(tmp_path / "cut", tmp_path / "ahead") == []


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_threads": "2"}, "--teacher-threads 2 leaves no thread for the student, of 2"),
        ({"teacher_threads": "1", "mixup": "0.2"}, "--teacher-threads does not work with --mixup"),
        ({"teacher_threads": "1", "accumulate": "2"}, "--cutmix or --accumulate: leave these out"),
    ],
)
def test_teachers_cannot_go_ahead(changes: dict[str, str], message: str, distil: list[str], capsys: Any) -> None:
    assert main_mgd.main(options(distil, **changes)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("distiller", ["dkd", "crd"])
def test_terms_that_need_one_class_refuse_mixed_images(distiller: str, distil: list[str], capsys: Any) -> None:
    words = [word for word in distil if word not in ("--loss-factor", "1e3")]
    assert main_mgd.main(options(words, distiller=distiller, mixup="0.2")) == 2
    assert f"mix images of two classes, but {distiller} needs one class per image" in capsys.readouterr().err


@pytest.mark.parametrize("student", ["1", "0", None])
def test_compiled_networks_give_the_run_of_plain_ones(
    student: str | None, distil: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced as for a compiler, run without one: what a compiler makes of it is its own matter."""
    words = options(distil, epochs="1", distiller="mgd+kd", mgd_update_freq="1", teacher_dtype="float32", device="cpu")
    assert main_mgd.main(into(words, tmp_path / "plain")) == 0
    compiled, compile_with = [], mgd.Distiller.compile

    def traced(self: mgd.Distiller, **how: Any) -> None:
        compiled.append(how)
        compile_with(self, backend="aot_eager", **how)

    monkeypatch.setattr(mgd.Distiller, "compile", traced)
    words = options(into(words, tmp_path / "traced"), compile="1")
    assert main_mgd.main(words if student is None else options(words, compile_student=student)) == 0
    assert compiled == [{"student": student == "1", "dynamic": False}]
    plain, other = records(tmp_path / "plain")[0], records(tmp_path / "traced")[0]
    assert other["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-4)
    assert other["flow_cost"] == pytest.approx(plain["flow_cost"], rel=1e-4)


def test_a_missing_compiler_is_said(distil: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    import torch._inductor.config
    from torch._inductor.cpp_builder import cpp_compiler_search

    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    cpp_compiler_search.cache_clear()
    assert main_mgd.main(options(distil, compile="1")) == 2
    assert "--compile 1 needs a C++ compiler" in capsys.readouterr().err
    cpp_compiler_search.cache_clear()


def test_the_training_accuracy_is_that_of_the_images_seen(distil: list[str], tmp_path: Path) -> None:
    """A trained network that learns nothing more, on images without augmentation: it scores as when evaluated."""

    def plain(trainer: Trainer) -> None:
        trainer.photos.transform = trainer.job.preprocessing.transform()
        fix_norms(trainer.job)

    teacher = distil[distil.index("--teacher-resume") + 1]
    lines = [f"{p.relative_to(distil[0])} {n}\n" for n, c in enumerate(("bar", "dot", "sky"))
             for p in sorted(Path(distil[0], "train", c).iterdir())]  # fmt: skip
    wrong = [line.replace(" 0", " 1") if n < 4 else line for n, line in enumerate(lines)]
    (tmp_path / "list").write_text("".join(wrong))
    more = ["--valid-list", str(tmp_path / "list"), "--train-list", str(tmp_path / "list"), "--epochs", "1"]
    words = [distil[0], "-a", TEACHER, *options(SMALL, lr="1e-12"), *more, "--num-classes", "3"]
    state = torch.load(teacher, weights_only=True)["state_dict"]
    torch.save(state, tmp_path / "w.pth")
    run = ["--student-resume", str(tmp_path / "w.pth"), "--output", str(tmp_path / "run")]
    assert run_trainer([*words, *run], plain, main_base) == 0
    (record,) = records(tmp_path / "run")
    assert record["train_top1"] == pytest.approx(record["valid_top1"]) and 0 < record["train_top1"] < 100
