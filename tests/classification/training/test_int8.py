"""--int8-epochs: what trains is what the int8 file computes, and a run that is cut resumes bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from classification import export, main_mgd
from classification.data.trial import read_trial
from classification.errors import RunError
from classification.models.exporting import open_onnx
from classification.models.fake_quantised import FakeQuantisation
from classification.models.rounding import find_sites
from classification.models.trained import Trained, open_trained
from classification.runs.checkpoint import changed_options
from classification.training.job import Job
from tests.classification.conftest import SMALL, STUDENT, TEACHER
from tests.classification.seams import before_forward, run_changed

pytestmark = pytest.mark.skipif(bool(export.missing_packages("int8")), reason="needs the extra [export]")


@pytest.fixture(scope="session")
def words(photos: Path, teacher: Path) -> list[str]:
    pair = ["-a", STUDENT, "--teacher-arch", TEACHER, "--teacher-resume", str(teacher)]
    return [str(photos), *pair, *SMALL, "--distiller", "kd", "--epochs", "4", "--int8-epochs", "2", "--lr", "0.02"]


@pytest.fixture(scope="session")
def run(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int8") / "run"
    assert main_mgd.main([*words, "--output", str(folder)]) == 0
    return folder


def test_the_file_computes_what_was_trained_with_the_scales_that_were_learned(
    run: Path, photos: Path, tmp_path: Path, capsys: Any
) -> None:
    import onnx

    state = torch.load(run / "last.pth", weights_only=True)["resume"]
    assert float(state["int8"]["log_scales"].abs().min()) > 0, "every scale has moved"
    assert state["best"]["epoch"] >= 2, "an epoch that did not round is not the best"
    file = tmp_path / "int8.onnx"
    told = ["--to", "int8", "--output", str(file), "--data", str(photos), "--tolerance", "100"]
    assert export.main([str(run / "best.pth"), *told]) == 0
    assert "int8: the scales that were learned" in capsys.readouterr().out
    trained, model = open_trained(run / "best.pth"), onnx.load(file)
    assert trained.int8 is not None
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    used = {
        (f"{constants[node.input[1]]:.6g}", int(constants[node.input[2]]))
        for node in model.graph.node
        if node.op_type == "QuantizeLinear"
    }
    assert used == {(f"{scale:.6g}", zero) for scale, zero in trained.int8.values()}
    trial = read_trial(photos, trained.preprocessing, trained.classes, trained.num_classes, calibrate=False)
    images, target = next(trial.batches(15))
    normal = trained.preprocessing.normalise(images).contiguous()
    theirs = open_onnx(file)[0](normal)
    assert 100 * (theirs.argmax(1) == target).float().mean().item() == pytest.approx(state["best"]["valid_top1"])
    ours = _rounding(trained)
    with torch.no_grad():
        assert (ours(normal) - theirs).abs().max() <= 1.01 * trained.int8["linear:0"][0], "one step of the logits"


def _rounding(trained: Trained) -> nn.Module:
    """Return the network of a checkpoint with its scales."""
    found = FakeQuantisation(find_sites(trained))
    assert trained.int8 is not None
    for key, number in found.numbers.items():
        found.first_scales[number], found.zero_points[number] = trained.int8[key]
    found.attach(trained.network)
    return trained.network


def test_a_run_that_is_cut_twice_resumes_bit_for_bit(run: Path, words: list[str], tmp_path: Path) -> None:
    """It is cut before the first step that rounds, the ninth of 16, and in the fourteenth."""

    def stop_at(last: int) -> Callable[[Job], None]:
        def stop(number: int, images: Any) -> None:
            if number == last:
                raise RunError("cut")

        return lambda job: before_forward(job, stop)

    told = [*words, "--output", str(tmp_path / "run"), "--checkpoint-every-steps", "1"]
    assert run_changed(told, stop_at(9)) == 1
    assert run_changed(["--resume", str(tmp_path / "run")], stop_at(6)) == 1
    assert main_mgd.main(["--resume", str(tmp_path / "run")]) == 0
    whole, other = (torch.load(folder / "last.pth", weights_only=True) for folder in (run, tmp_path / "run"))
    for one, two in ((whole, other), (whole["resume"], other["resume"])):
        part = "state_dict" if one is whole else "int8"
        assert all(torch.equal(value, two[part][name]) for name, value in one[part].items())
    assert whole["resume"]["best"] == other["resume"]["best"]
    assert other["int8"] == whole["int8"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--int8-epochs", "5"], "--int8-epochs 5 is more than the 4 epochs of the run: raise --epochs"),
        (["--amp", "bf16"], "--int8-epochs does not work with --amp bf16: leave one of them out"),
        (["--ema", "0.9"], "--int8-epochs does not work with --ema 0.9: leave one of them out"),
    ],
)
def test_what_it_does_not_go_with(more: list[str], said: str, words: list[str], tmp_path: Path, capsys: Any) -> None:
    assert main_mgd.main([*words, *more, "--output", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1


def test_more_epochs_are_another_run() -> None:
    """The last ones would be others."""
    before = {"lr_schedule": "step", "int8_epochs": 2, "epochs": 4}
    assert changed_options(before, {**before, "epochs": 6}) == ["--epochs 6, was 4"]
    assert changed_options({**before, "int8_epochs": 0}, {**before, "int8_epochs": 0, "epochs": 6}) == []
