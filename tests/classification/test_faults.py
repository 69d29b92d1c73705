"""What happens to a run besides: losses that are not finite, no memory, dead workers, dead channels."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from classification import main_base, main_mgd
from classification.data.cache import Cache
from classification.data.folders import read_folder
from classification.data.images import read_image
from classification.data.loading import explain_worker_errors
from classification.errors import RunError, UserError
from classification.runs.metrics import Journal
from classification.training.trainer import Trainer
from tests.classification.conftest import SMALL, TEACHER
from tests.classification.seams import before_forward, poison, run_changed, run_trainer
from tests.classification.test_main import options, records


def test_a_loss_that_is_not_finite_stops_the_run_and_names_term_and_images(
    distil: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_changed(distil, partial(poison, steps={6})) == 1
    error = capsys.readouterr().err
    assert "not finite in epoch 2/2, step 2 (term ce, mgd; images" in error and ".png" in error
    assert len(error.splitlines()) == 1
    last = torch.load(Path(distil[-1]) / "last.pth", weights_only=True)
    assert last["resume"]["epoch"] == 1
    assert all(v.isfinite().all() for v in last["state_dict"].values() if v.is_floating_point())


def test_some_steps_may_be_left_out(distil: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_changed([*distil, "--skip-nonfinite", "2"], partial(poison, steps={2, 5, 7})) == 1
    out = capsys.readouterr()
    assert "left out, 2 of 2" in out.out and "epoch 2/2, step 3" in out.err
    folder = Path(distil[-1] + "-more")
    words = options(distil, output=str(folder), distiller="mgd+crd+ofd", mgd_observe="online", skip_nonfinite="2")
    assert run_changed(words, partial(poison, steps={2, 5})) == 0
    last = torch.load(folder / "last.pth", weights_only=True)
    states = [last["state_dict"], *last["resume"]["terms"].values()]  # memories, margins and costs too
    assert all(v.isfinite().all() for state in states for v in state.values() if v.is_floating_point())
    assert records(folder)[-1]["skipped_steps"] == 2


def test_memory_that_runs_out_says_what_to_lower(distil: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    errors = (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    )
    for number, problem in enumerate(errors):

        def fail(*_: Any, problem: BaseException = problem) -> None:
            raise problem

        words = [*distil[:-1], f"{distil[-1]}{number}"]
        assert run_changed(words, partial(before_forward, hook=fail)) == 1
        error = capsys.readouterr().err
        assert "memory ran out in epoch 1/2, step 1, with 7 images of 16 px: lower -b" in error
        assert len(error.splitlines()) == 1


class Deadly:
    """A transform that kills the loading process."""

    def __call__(self, image: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_loading_process_that_dies_ends_the_run(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def deadly(trainer: Trainer) -> None:
        trainer.photos.transform = Deadly()

    words = [str(photos), "-a", TEACHER, *SMALL, "--epochs", "1", "--output", str(tmp_path / "run"), "-j", "1"]
    words.remove("-j")
    words.remove("0")
    assert run_trainer(words, deadly, main_base) == 1
    error = capsys.readouterr().err
    assert "a loading process died" in error and "lower --workers (now 1)" in error


def test_channels_that_are_dead_or_not_finite(
    distil: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import mgd.flow.cost

    unit = mgd.flow.cost._unit
    monkeypatch.setattr(mgd.flow.cost, "_unit", lambda maps, dtype: unit(maps * 0, dtype))
    assert main_mgd.main(options(distil, epochs="1")) == 0  # every cost is 2, and any flow is optimal
    with np.load(Path(distil[-1]) / "flow" / "0000.npz") as kept:
        for stage in range(3):
            pairs = (kept[f"index{stage}"] >= 0).sum()
            assert float(kept[f"total_cost{stage}"]) == pytest.approx(2 * pairs) and np.all(kept[f"cost{stage}"] == 2)
    monkeypatch.setattr(mgd.flow.cost, "_unit", lambda maps, dtype: unit(maps * float("nan"), dtype))
    assert main_mgd.main(options(distil, epochs="1", output=distil[-1] + "-nan")) == 1
    assert "the update of the terms before epoch 1/1 failed: cost must be finite" in capsys.readouterr().err


def test_a_student_without_batch_statistics_learns_the_same_from_two_ranks(distil: list[str], tmp_path: Path) -> None:
    from tests.classification.runs.test_launch import run_ranks

    words = options(distil, a="timm:convnext_atto", distiller="kd", epochs="1", img_size="32", b="9")
    words = [w for i, w in enumerate(words) if "--loss-factor" not in {w, words[i - 1]}]
    run_ranks("torchrun", options(words, output=str(tmp_path / "two")))
    assert main_mgd.main(options(words, output=str(tmp_path / "one"))) == 0
    one, two = (torch.load(tmp_path / name / "last.pth", weights_only=True) for name in ("one", "two"))
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], value, rtol=1e-3, atol=1e-5)
    for a, b in zip(
        one["resume"]["optimizer"]["state"].values(), two["resume"]["optimizer"]["state"].values(), strict=True
    ):
        torch.testing.assert_close(b["momentum_buffer"], a["momentum_buffer"], rtol=1e-2, atol=1e-5)
    alone, both = records(tmp_path / "one"), records(tmp_path / "two")
    assert both[0]["train_loss"] == pytest.approx(alone[0]["train_loss"], rel=1e-5)
    assert both[0]["valid_top1"] == alone[0]["valid_top1"]


@pytest.mark.parametrize(
    ("at", "said"), [(8, "weights are not finite after epoch 2/2"), (6, "because weights are not")]
)
def test_weights_that_are_not_finite_are_not_saved_and_no_step_is_left_out_for_them(
    at: int, said: str, distil: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    steps: list[None] = []

    def blow_up(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        steps.append(None)
        if len(steps) == at:
            optimizer.param_groups[0]["params"][0].data[0] = float("inf")

    handle = register_optimizer_step_post_hook(blow_up)
    assert main_mgd.main([*distil, "--skip-nonfinite", "100"]) == 1
    handle.remove()
    assert said in capsys.readouterr().err
    last = torch.load(Path(distil[-1]) / "last.pth", weights_only=True)
    assert last["resume"]["epoch"] == 1 and all(value.isfinite().all() for value in last["state_dict"].values())
    assert main_mgd.main([*distil, "--resume", "auto"]) == 0 and len(records(Path(distil[-1]))) == 2


def test_shared_memory_that_is_short_is_told(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2>: No space left on device (28)")

    class Loading:
        __iter__ = fail

    with pytest.raises(RunError, match=r"--shm-size.*--workers \(now 3\).*--workers 0"):
        list(explain_worker_errors(Loading(), 3))
    monkeypatch.setattr(torch.Tensor, "share_memory_", fail)
    with pytest.raises(UserError, match=r"shared memory.*--shm-size.*--cache off"):
        Cache(read_folder(photos).train, read_image)


def test_a_journal_on_a_full_disk_is_told(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.path = Path("/dev/full")
    with pytest.raises(UserError, match=r"/dev/full cannot be written \(No space left on device\)"):
        journal.write({"epoch": 0, "valid_top1": 1.0})
