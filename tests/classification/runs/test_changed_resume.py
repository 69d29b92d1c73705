"""Runs that are resumed with another batch size, optimizer, terms, peers or images."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from classification import main_base, main_mgd
from classification.data.loading import TrainBatches
from classification.errors import UserError
from classification.runs.checkpoint import IMAGES, _other_images, keep_images
from classification.training.saving import images_done
from classification.training.trainer import Trainer
from tests.classification.conftest import SMALL, STUDENT
from tests.classification.seams import run_trainer
from tests.classification.test_main import options, without


def flat(parts: Iterable[list[Any]]) -> list[Any]:
    return list(chain.from_iterable(parts))


@pytest.mark.parametrize("num", [7, 27, 36, 101])
@pytest.mark.parametrize(("before", "ranks"), [(4, 1), (6, 2), (9, 3)])
@pytest.mark.parametrize(("after", "ranks_after"), [(4, 1), (6, 2), (9, 3), (100, 1)])
def test_an_epoch_continues_with_exactly_the_unseen_images(
    num: int, before: int, ranks: int, after: int, ranks_after: int
) -> None:
    first = [TrainBatches(num, before, 3, rank, ranks) for rank in range(ranks)]
    for sampler in first:
        sampler.begin(2)
    batches = [flat(parts) for parts in zip(*first, strict=True)]
    for done in range(len(batches) + 1):
        seen = sum(map(len, batches[:done]))
        second = [TrainBatches(num, after, 3, rank, ranks_after) for rank in range(ranks_after)]
        if 0 < num - seen < ranks_after:
            with pytest.raises(UserError, match=f"{num - seen} images are left of the epoch, too few"):
                second[0].begin(2, done, seen)
            continue
        for sampler in second:
            sampler.begin(2, done, seen)
        rest = [flat(parts) for parts in zip(*second, strict=True)]
        assert sorted(flat(batches[:done] + rest)) == [(2, index) for index in range(num)]
        assert len(second[0]) == done + len(rest)
        assert [second[0].batch_size(done + n) for n in range(len(rest))] == [len(batch) for batch in rest]
        assert not rest or (max(map(len, rest)) <= after and max(map(len, rest)) - min(map(len, rest)) <= 1)
        if before == after:
            assert rest == batches[done:]  # as if uncut


def test_an_older_checkpoint_says_by_its_steps_what_it_saw() -> None:
    state = {"step": 3, "config": {"options": {"batch_size": 8}}}
    assert images_done(state, 27) == 7 + 7 + 7  # 27 images make batches of 7, 7, 7, 6
    assert images_done({**state, "seen": 12}, 27) == 12
    for seen in (2, 28, "x"):
        with pytest.raises(ValueError, match=f"it saw {seen!r} of 27 images in 3 steps"):
            images_done({**state, "seen": seen}, 27)


def cut(words: list[str], steps: int, script: Any = main_mgd) -> list[int]:
    """Do so many steps, save, and leave; return the images seen."""
    seen: list[list[int]] = []

    def stop(trainer: Trainer) -> None:
        def counted(_: Any, inputs: Any) -> None:
            seen.append(inputs[2].tolist())
            if len(seen) == steps:
                assert trainer.engine.interrupt is not None
                trainer.engine.interrupt.signal = 15

        trainer.distiller.register_forward_pre_hook(counted)

    assert run_trainer(words, stop, script) == (143 if steps else 0)
    return flat(seen)


@pytest.fixture
def copied(distil: list[str], tmp_path: Path) -> list[str]:
    """The words of a short distillation on photographs that may be changed."""
    shutil.copytree(distil[0], tmp_path / "photos")
    return [str(tmp_path / "photos"), *distil[1:]]


def test_every_image_is_seen_once_by_a_run_whose_batches_change_twice(distil: list[str], capsys: Any) -> None:
    words, folder = options(distil, epochs="1"), distil[-1]
    seen = cut(words, 1)
    again = ["--resume", folder, "--resume-override", "1", "-b"]
    seen += cut([*again, "5"], 2)
    seen += cut([*again, "12"], 0)
    assert sorted(seen) == list(range(27))
    out = capsys.readouterr().out
    assert "epoch 1/1, step 1: 20 images of it are left" in out and "epoch 1/1, step 3: 10 images of it are left" in out
    assert "step 4/4" in out


def test_batches_too_small_for_what_is_left_are_refused_before_anything_is_written(
    distil: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    cut(options(distil, epochs="1"), 2)
    kept = Path(distil[-1], "config.json").read_bytes()
    words = ["--resume", distil[-1], "--resume-override", "1", "-b", "27", "--accumulate", "20"]
    assert main_mgd.main(words) == 2
    assert "13 images are left of the epoch, too few for batches of 27" in capsys.readouterr().err
    assert Path(distil[-1], "config.json").read_bytes() == kept


@pytest.mark.parametrize("kinds", [("sgd", "muon"), ("muon", "sgd")])
def test_another_optimizer_begins_with_fresh_momenta(kinds: tuple[str, str], distil: list[str], capsys: Any) -> None:
    cut(options(distil, optimizer=kinds[0]), 2)
    words = ["--resume", distil[-1], "--optimizer", kinds[1]]
    assert main_mgd.main(words) == 2
    assert f"--optimizer {kinds[1]}, was {kinds[0]}. Use those of the run" in capsys.readouterr().err
    assert main_mgd.main([*words, "--resume-override", "1"]) == 0
    assert f"is initialised again: the momenta of {kinds[1]}, after {kinds[0]}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("distiller", "before", "after", "said"),
    [
        ("mgd", {}, {"taps": "layer1,layer2"}, "the term mgd; the momenta of sgd"),
        ("mgd", {}, {"mgd_reducer": "sp"}, ""),
        ("mgd", {}, {"mgd_reducer": "sm"}, "the term mgd; the momenta of sgd"),
        ("ofd+kd", {}, {"taps": "layer1,layer2"}, "the term ofd; the momenta of sgd"),
        ("crd", {"term": "crd.dimension=8"}, {"term": "crd.dimension=4"}, "the term crd; the momenta of sgd"),
        ("crd", {}, {"image": "removed"}, "the term crd; the momenta of sgd"),
        ("dml", {}, {"teacher_arch": "cifar_resnet8"}, "peer1; the momenta of sgd"),
        ("kd", {"ema": "0"}, {"ema": "0.9"}, "the average of --ema"),
    ],
)
def test_what_does_not_fit_new_options_begins_anew_and_is_named(
    distiller: str, before: dict[str, str], after: dict[str, str], said: str, copied: list[str], capsys: Any
) -> None:
    dropped = ["--loss-factor"] + (["--teacher-arch", "--teacher-resume"] if distiller == "dml" else [])
    words = options(without(copied, *dropped), distiller=distiller, **before)
    cut(words, 2)
    if after.pop("image", ""):
        next(Path(copied[0], "train", "dot").iterdir()).unlink()
    capsys.readouterr()
    again = options(["--resume", words[words.index("--output") + 1]], **after)
    assert main_mgd.main(again) == 2
    error = capsys.readouterr().err
    assert "is from a run with other " in error and "is damaged" not in error and error.count("\n") == 1
    assert main_mgd.main([*again, "--resume-override", "1"]) == 0
    out = capsys.readouterr().out
    assert f"is initialised again: {said}\n" in out if said else "initialised again" not in out


def test_a_state_that_fits_no_option_is_damaged(distil: list[str], capsys: Any) -> None:
    cut(options(distil, distiller="mgd+ofd"), 1)
    last = Path(distil[-1]) / "last.pth"
    content = torch.load(last, weights_only=True)
    content["resume"]["terms"]["ofd"] = {}
    torch.save(content, last)
    assert main_mgd.main(["--resume", distil[-1]]) == 2
    assert (
        "is damaged, or was not written by this code (the state of the term ofd does not fit" in capsys.readouterr().err
    )


def test_a_scaler_that_the_run_did_not_have_is_initialised_again(distil: list[str], capsys: Any) -> None:
    def scale(trainer: Trainer) -> None:
        trainer.stepper.scaler = torch.amp.GradScaler("cpu")  # --amp fp16 itself needs a GPU

    cut(distil, 1)
    assert run_trainer(["--resume", distil[-1], "--lr", "0.01", "--resume-override", "1"], scale) == 0
    assert "is initialised again: the scale of --amp fp16" in capsys.readouterr().out


@pytest.mark.parametrize("steps", [2, 6])  # in the first epoch, whose images are others; and in the second
def test_the_same_line_after_a_broken_image_was_mended(steps: int, copied: list[str], capsys: Any) -> None:
    broken = Path(copied[0], "train", "sky", "3.png")
    whole = broken.read_bytes()
    broken.write_bytes(whole[:40])
    words = [copied[0], "-a", STUDENT, *SMALL, "--epochs", "2", "--output", copied[-1], "--bad-images", "skip"]
    words += ["--resume", "auto"]
    assert len(cut(words, steps, main_base)) < 27 * 2
    broken.write_bytes(whole)
    capsys.readouterr()
    assert main_base.main(words) == 2
    error = capsys.readouterr().err
    assert "is from a run with other training images: 1 more than then (train/sky/3.png). Use those" in error
    assert len(cut([*words, "--resume-override", "1"], 0, main_base)) == 27 * (2 if steps == 2 else 1)
    name = "epoch 1/2" if steps == 2 else "epoch 2/2"
    assert f"the training images have changed: {name} starts again from its first step" in capsys.readouterr().out
    assert main_base.main([*words, "--epochs", "3"]) == 0  # whose images are those of the run now


def test_lists_of_images_are_compared_by_name_and_class(tmp_path: Path) -> None:
    keep_images(tmp_path, ["a\n.png 0", "b\udcff.png 0", "c.png 1"])
    path = tmp_path / IMAGES
    assert _other_images(path, ["b\udcff.png 0", "a\n.png 0", "c.png 1"]) == "the same ones, in another order"
    assert (
        _other_images(path, ["a\n.png 0", "c.png 0"]) == "1 fewer than then (b\udcff.png), 1 of another class (c.png)"
    )
    more = [f"{n}.png 2" for n in range(5)]
    found = _other_images(path, ["a\n.png 0", "b\udcff.png 0", "c.png 1", *more])
    assert found == "5 more than then (0.png, 1.png, 2.png ...)"
    path.write_bytes(path.read_bytes()[:-9])
    assert _other_images(path, more) == f"which ones is unknown, because {path} cannot be read"
    path.unlink()
    assert "which ones is unknown" in _other_images(path, more)
