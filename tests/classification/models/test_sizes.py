"""Networks of one size at another: position embeddings are resampled, by the libraries that built them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from timm.layers import resample_abs_pos_embed
from torch import nn

from classification import main_base, main_mgd, predict
from classification.models import build
from classification.models.sizes import fit_size
from tests.classification.test_main import records

SMALL: dict[str, Any] = {"embed_dim": 12, "depth": 1, "num_heads": 2, "num_classes": 3}


def test_a_vit_of_timm_has_the_embeddings_that_timm_resamples() -> None:
    net = timm.models.VisionTransformer(img_size=32, patch_size=8, **SMALL)
    before = net.get_parameter("pos_embed").detach().clone()
    assert fit_size(net, 64)
    torch.testing.assert_close(
        net.get_parameter("pos_embed"), resample_abs_pos_embed(before, [8, 8], [4, 4], num_prefix_tokens=1)
    )
    assert net(torch.zeros(2, 3, 64, 64)).shape == (2, 3)


def test_a_vit_of_torchvision_has_its_corners_kept() -> None:
    net = torchvision.models.VisionTransformer(32, 8, 1, 2, 12, 24, num_classes=3)
    before = net.encoder.pos_embedding.detach().clone()
    assert fit_size(net, 64)
    after = net.encoder.pos_embedding
    assert after.shape == (1, 65, 12) and net(torch.zeros(2, 3, 64, 64)).shape == (2, 3)
    # The class token stays, and so does every corner of a grid whose corners are aligned.
    for own, new in ((0, 0), (1, 1), (4, 8), (13, 57), (16, 64)):
        torch.testing.assert_close(after[0, new], before[0, own])


@pytest.mark.parametrize(
    ("net", "size"),
    [
        (lambda: timm.models.VisionTransformer(img_size=32, patch_size=8, **SMALL), 32),
        (lambda: build("cifar_resnet8", 3), 40),
        (lambda: timm.models.VisionTransformer(img_size=32, patch_size=8, **SMALL), 36),  # no multiple of the patch
    ],
)
def test_others_are_left_as_they_are(net: Any, size: int) -> None:
    model: nn.Module = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    changed = fit_size(model, size)
    assert changed == (size == 36)  # it is refused where it is tried
    assert {n: v.shape for n, v in model.state_dict().items()} == {n: v.shape for n, v in before.items()}


def test_a_transformer_trains_at_another_size_resumes_and_teaches(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """timm builds this one for 224 px, patches of 16 px: 196 tokens and one in front."""
    folder, fast = tmp_path / "run", ["-b", "14", "-j", "0", "--seed", "0"]
    words = [str(photos), "-a", "timm:vit_tiny_patch16_224", "--img-size", "32", *fast]
    assert main_base.main([*words, "--epochs", "1", "--output", str(folder)]) == 0
    assert (
        "timm:vit_tiny_patch16_224: its position embeddings were resampled for images of 32 px"
        in capsys.readouterr().out
    )
    assert main_base.main(["--resume", str(folder), "--epochs", "2"]) == 0
    assert [record["epoch"] for record in records(folder)] == [0, 1]
    kept = torch.load(folder / "best.pth", weights_only=True)
    assert kept["img_size"] == 32 and kept["state_dict"]["pos_embed"].shape[1] == 1 + 2 * 2
    assert predict.main([str(folder / "best.pth"), str(photos / "valid")]) == 0
    teach = [str(photos), "-a", "cifar_resnet8_w0.5", "--teacher-resume", str(folder / "best.pth"), *fast]
    more = ["--img-size", "48", "--distiller", "kd", "--epochs", "1", "--output", str(tmp_path / "kd")]
    assert main_mgd.main([*teach, *more]) == 0
    assert "trained at 32 px, it will see 48 px" in capsys.readouterr().out
