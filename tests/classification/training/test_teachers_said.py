"""What a run says of its teacher, and networks that return more than logits, by the command line."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor, nn

from classification import main_base, main_mgd
from classification.models import NETWORKS, Network, build
from tests.classification.test_main import options, records, without


def test_a_run_says_where_every_margin_comes_from_and_how_many_norms_were_folded(
    distil: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = options(distil, distiller="mgd+ofd", epochs="1")
    taps = ["--student-taps", "layer1,layer2.0.relu@in#-1,bn1", "--teacher-taps", "layer1,layer2.0.relu@in#-1,bn1"]
    assert main_mgd.main([*words, *taps]) == 0
    said = capsys.readouterr().out
    sources = "layer1 measured, layer2.0.relu@in#-1 norm layer2.0.bn2, bn1 norm bn1"
    assert f"=> mgd: margins: {sources}\n" in said and f"=> ofd: margins: {sources}\n" in said
    assert "=> teacher: frozen, 6 of 7 batch norms folded into convolutions" in said  # a tapped one stays
    assert main_mgd.main([*options(words, output=str(tmp_path / "other")), *taps, "--mgd-margin", "none"]) == 0
    assert "=> mgd: margins: layer1 none, layer2.0.relu@in#-1 none, bn1 none\n" in capsys.readouterr().out


class Wrapped(nn.Module):
    """A CIFAR network that returns its logits among other things."""

    def __init__(self, num_classes: int, key: str) -> None:
        super().__init__()
        self.net, self.key = build("cifar_resnet8_w0.5", num_classes), key

    def forward(self, x: Tensor) -> Any:
        return SimpleNamespace(logits=self.net(x)) if self.key == "object" else {self.key: self.net(x)}


def test_networks_that_return_more_than_logits_train_teach_and_are_evaluated(
    distil: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for key in ("object", "logits", "prediction"):
        monkeypatch.setitem(NETWORKS, f"wrapped_{key}", Network(__name__, "Wrapped", None, {"key": key}))
    words = without(distil, "--teacher-arch", "--teacher-resume", "--loss-factor", "--distiller", "--mgd-update-freq")
    words = options(without(words, "--mgd-max-images"), arch="wrapped_object", epochs="1", output=str(tmp_path / "own"))
    assert main_base.main(words) == 0
    (record,) = records(tmp_path / "own")
    capsys.readouterr()
    best = str(tmp_path / "own" / "best.pth")
    assert main_base.main([*without(words, "--output"), "--evaluate", "--student-resume", best]) == 0
    assert f"top-1 {record['valid_top1']:.2f}" in capsys.readouterr().out
    taught = options(words, arch="wrapped_logits", output=str(tmp_path / "taught"))
    taught += ["--teacher-arch", "wrapped_object", "--teacher-resume", best, "--distiller", "kd"]
    assert main_mgd.main(taught) == 0
    assert records(tmp_path / "taught")[0]["train_kd"] > 0
    assert main_base.main(options(words, arch="wrapped_prediction", output=str(tmp_path / "no"))) == 2
    assert "wrapped_prediction: the network returns a dict in which no logits are found" in capsys.readouterr().err
