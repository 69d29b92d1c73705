"""--int8-epochs: what trains is what the int8 file computes, and a run that is cut resumes bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from classification import export, main_mgd
from classification.data.trial import read_trial
from classification.errors import RunError
from classification.models.exporting import open_onnx
from classification.models.fake_quantised import FakeQuantisation
from classification.models.rounding import find_sites
from classification.models.trained import open_trained
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


def test_the_file_has_the_scales_that_were_learned(run: Path, photos: Path, tmp_path: Path, capsys: Any) -> None:
    import onnx

    kept = torch.load(run / "last.pth", weights_only=True)["resume"]["int8"]
    assert float(kept["log_scales"].abs().min()) > 0, "every scale has moved"
    best = torch.load(run / "best.pth", weights_only=True)
    epoch = torch.load(run / "last.pth", weights_only=True)["resume"]["best"]["epoch"]
    assert epoch >= 2, "an epoch that did not round is not the best"
    file = tmp_path / "int8.onnx"
    told = ["--to", "int8", "--output", str(file), "--data", str(photos), "--tolerance", "100"]
    assert export.main([str(run / "best.pth"), *told]) == 0
    assert "int8: the scales that were learned" in capsys.readouterr().out
    model = onnx.load(file)
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    used = {
        (f"{constants[node.input[1]]:.6g}", int(constants[node.input[2]]))
        for node in model.graph.node
        if node.op_type == "QuantizeLinear"
    }
    assert used == {(f"{scale:.6g}", zero) for scale, zero in best["int8"].values()}


def test_what_is_trained_is_what_the_file_computes(run: Path, photos: Path, tmp_path: Path) -> None:
    """The accuracy of the best epoch is that of the file, and their logits are a step apart at most."""
    trained = open_trained(run / "best.pth")
    file = tmp_path / "int8.onnx"
    told = ["--to", "int8", "--output", str(file), "--data", str(photos), "--tolerance", "100"]
    assert export.main([str(run / "best.pth"), *told]) == 0
    found = FakeQuantisation(find_sites(trained))
    assert trained.int8 is not None
    for key, number in found.numbers.items():
        found.first_scales[number], found.zero_points[number] = trained.int8[key]
    found.attach(trained.network)
    trial = read_trial(photos, trained.preprocessing, trained.classes, trained.num_classes, calibrate=False)
    images, target = next(trial.batches(15))
    normal = trained.preprocessing.normalise(images).contiguous()
    with torch.no_grad():
        ours = trained.network(normal)
    theirs = open_onnx(file)[0](normal)
    step = trained.int8["linear:0"][0]
    assert (ours - theirs).abs().max() <= 1.01 * step
    best = torch.load(run / "last.pth", weights_only=True)["resume"]["best"]["valid_top1"]
    assert 100 * (theirs.argmax(1) == target).float().mean().item() == pytest.approx(best)


@pytest.mark.parametrize("forward", [6, 9, 15], ids=["before", "at its beginning", "within"])
def test_a_cut_run_resumes_bit_for_bit(run: Path, words: list[str], tmp_path: Path, forward: int) -> None:
    """It is cut in a step of 16, the last 8 of which round."""

    def stop(number: int, images: Any) -> None:
        if number == forward:
            raise RunError("cut")

    told = [*words, "--output", str(tmp_path / "run")]
    assert run_changed([*told, "--checkpoint-every-steps", "1"], lambda job: before_forward(job, stop)) == 1
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
        (["--int8-epochs", "5"], "--int8-epochs 5 are the last of 4 epochs: raise --epochs"),
        (["--amp", "bf16"], "--int8-epochs does not go with --amp bf16: leave one of them out"),
        (["--ema", "0.9"], "--int8-epochs does not go with --ema 0.9: leave one of them out"),
        (["-a", "timm:mobilenetv3_small_100", "--img-size", "32"], "its file rounds"),
    ],
)
def test_what_it_does_not_go_with(more: list[str], said: str, words: list[str], tmp_path: Path, capsys: Any) -> None:
    assert main_mgd.main([*words, *more, "--output", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1


def test_fewer_epochs_than_the_run_had_are_another_run(run: Path, capsys: Any) -> None:
    """The last epochs would be others."""
    assert main_mgd.main(["--resume", str(run), "--epochs", "6"]) == 2
    assert "other options: --epochs 6, was 4" in capsys.readouterr().err
