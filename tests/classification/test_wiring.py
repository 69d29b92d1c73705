"""Whole runs against plain PyTorch: what options say must reach the images, the loss, the update and the evaluation.

Every image has one colour, so crops and mirrors change nothing. The networks are timm's smallest and have no batch
norm, so an image's logits do not depend on its batch. Expected values are computed here, from the weights alone.
"""

from __future__ import annotations

import json
import math
import resource
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import mgd
from classification import main_base, main_mgd

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ARCH = "test_efficientnet_ln"
NO_STEP = ["--lr", "1e-30"]  # too small to move a weight
COLOURS = {"amber": (250, 160, 20), "blue": (20, 40, 220), "clay": (140, 70, 60)}


def write_colours(root: Path, colours: dict[str, Sequence[tuple[int, int, int]]]) -> Path:
    for split in ("train", "valid"):
        for name, shades in colours.items():
            (root / split / name).mkdir(parents=True)
            for number, shade in enumerate(shades):
                Image.new("RGB", (40, 40), shade).save(root / split / name / f"{number}.png")
    return root


def seen(*colours: tuple[int, int, int], size: int = 32, mean: Any = MEAN, std: Any = STD) -> Tensor:
    """The images of these colours as a network sees them."""
    shades = (torch.tensor(colours) / 255 - torch.tensor(mean)) / torch.tensor(std)
    return shades[:, :, None, None].expand(-1, -1, size, size).contiguous()


def network(seed: int, num_classes: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    model: nn.Module = timm.create_model(ARCH, num_classes=num_classes)
    return model


@torch.no_grad()
def logits(seed: int, images: Tensor) -> Tensor:
    found: Tensor = network(seed)(images)
    return found


def kd(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> float:
    p = (teacher / temperature).softmax(1)
    return float(temperature**2 * (p * (p.log() - (student / temperature).log_softmax(1))).sum(1).mean())


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One image of each of three classes."""
    return write_colours(tmp_path_factory.mktemp("colours"), {name: [colour] for name, colour in COLOURS.items()})


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The weights of a student and of a teacher."""
    folder = tmp_path_factory.mktemp("weights")
    for seed in (0, 1):
        torch.save(network(seed).state_dict(), folder / f"{seed}.pth")
    return str(folder / "0.pth"), str(folder / "1.pth")


def words(data: Path, folder: Path, *more: str, batch: int = 3) -> list[str]:
    small = ["--img-size", "32", "-b", str(batch), "-j", "0", "--seed", "0", "--output", str(folder)]
    return [str(data), "-a", f"timm:{ARCH}", *small, *more]


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(folder / "last.pth", weights_only=True)["state_dict"]
    return state


def test_a_teacher_sees_images_of_its_own_size_and_normalisation(
    colours: Path, files: tuple[str, str], tmp_path: Path
) -> None:
    student, teacher = files
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    first = {"arch": f"timm:{ARCH}", "resume": teacher, "weight": 2}
    second = {**first, "weight": 1, "img_size": 48, "mean": mean, "std": std}
    recipe = {"teachers": [first, second], "terms": {"ce": {}, "kd": {"temperature": 4}}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    more = ["--config", str(tmp_path / "recipe.yaml"), "--student-resume", student, "--teacher-dtype", "float32"]
    assert main_mgd.main(words(colours, tmp_path / "run", *NO_STEP, *more, "--epochs", "1")) == 0
    of_student = logits(0, seen(*COLOURS.values()))
    plain = kd(of_student, logits(1, seen(*COLOURS.values())))
    own = kd(of_student, logits(1, seen(*COLOURS.values(), size=48, mean=mean, std=std)))
    assert abs(plain - own) > 0.1 * plain
    assert records(tmp_path / "run")[0]["train_kd"] == pytest.approx((2 * plain + own) / 3, rel=1e-4)


def test_mixed_images_come_with_mixed_labels(colours: Path, files: tuple[str, str], tmp_path: Path) -> None:
    # Of alpha 1e8 comes lambda 0.5. Each of the three images is mixed with another one: all three pairs, in any order.
    student, teacher = files
    more = ["--mixup", "1e8", "--distiller", "kd", "--student-resume", student, "--teacher-dtype", "float32"]
    more += ["--teacher-arch", f"timm:{ARCH}", "--teacher-resume", teacher, "--epochs", "1"]
    assert main_mgd.main(words(colours, tmp_path / "run", *NO_STEP, *more)) == 0
    images, pairs = seen(*COLOURS.values()), [(0, 1), (1, 2), (2, 0)]
    mixed = torch.stack([(images[a] + images[b]) / 2 for a, b in pairs])
    of_student = logits(0, mixed)
    log_p = of_student.log_softmax(1)
    soft = sum(-float(row[a] + row[b]) / 2 for row, (a, b) in zip(log_p, pairs, strict=True)) / 3
    hard = [sum(-float(row[pair[n]]) for row, pair in zip(log_p, pairs, strict=True)) / 3 for n in (0, 1)]
    assert min(abs(soft - one) for one in hard) > 0.02
    (record,) = records(tmp_path / "run")
    assert record["train_ce"] == pytest.approx(soft, rel=1e-3)
    assert record["train_kd"] == pytest.approx(kd(of_student, logits(1, mixed)), rel=1e-3)


def test_the_average_has_the_decay_that_is_asked_for(colours: Path, files: tuple[str, str], tmp_path: Path) -> None:
    # A step an epoch. The average is the student behind the first, then d average + (1 - d) student.
    start = ["--student-resume", files[0], "--lr", "0.1"]
    for epochs in ("1", "2"):
        assert main_base.main(words(colours, tmp_path / epochs, *start, "--epochs", epochs)) == 0
    first, second = weights(tmp_path / "1"), weights(tmp_path / "2")
    for decay, d in (("0.05", 0.05), ("0.9", 2 / 11)):  # min(decay, (1 + n) / (10 + n)) at update n = 1
        run = tmp_path / decay
        assert main_base.main(words(colours, run, *start, "--epochs", "2", "--ema", decay)) == 0
        for name, value in weights(run).items():
            expected = d * first[name] + (1 - d) * second[name]
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6, msg=f"{name}, --ema {decay}")


def test_steps_follow_the_warmup_and_the_cosine(files: tuple[str, str], tmp_path: Path) -> None:
    # Four equal images: two equal steps per epoch, whatever their order.
    data = write_colours(tmp_path / "data", {"amber": [COLOURS["amber"]] * 4})
    more = ["--num-classes", "3", "--lr", "0.02", "--wd", "1e-3", "--lr-schedule", "cosine", "--epochs", "2"]
    more += ["--warmup", "1", "--warmup-epochs", "2", "--student-resume", files[0]]
    assert main_base.main(words(data, tmp_path / "run", *more, batch=2)) == 0
    warm = [0.1 * 0.02, 0.1 * 0.02, 0.55 * 0.02, 0.55 * 0.02]
    rates = [*warm, *(0.01 * (1 + math.cos(math.pi * quarter / 4)) for quarter in range(4))]
    assert [line["learning_rate"] for line in records(tmp_path / "run")] == pytest.approx(rates[::2])
    assert_moved_as(sgd(rates, [(seen(COLOURS["amber"]), torch.tensor([0]))], 1e-3), weights(tmp_path / "run"))


def sgd(rates: Iterable[float], batches: list[tuple[Tensor, Tensor]], decay: float) -> nn.Module:
    """Train the student's network by plain PyTorch, a batch a step, in turn."""
    model = network(0)
    optimizer = torch.optim.SGD(model.parameters(), 1.0, momentum=0.9, nesterov=True, weight_decay=decay)
    for step, rate in enumerate(rates):
        images, target = batches[step % len(batches)]
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        F.cross_entropy(model(images), target).backward()
        optimizer.step()
    return model


def assert_moved_as(model: nn.Module, found: dict[str, Tensor]) -> None:
    """Check the way that all weights went from the student's first ones, to a thousandth of its length."""
    start = network(0).state_dict()
    ways = [torch.cat([(s[n] - start[n]).flatten() for n in start]) for s in (model.state_dict(), found)]
    assert float(ways[0].norm()) > 1e-3
    assert float((ways[0] - ways[1]).norm()) < 1e-3 * float(ways[0].norm())


@pytest.mark.parametrize("parts", ["2", "3"])
def test_a_batch_in_parts_gives_the_update_of_the_whole(parts: str, files: tuple[str, str], tmp_path: Path) -> None:
    # Five images of unequal losses: parts of 3 and 2, or of 2, 2 and 1.
    shades: dict[str, Sequence[tuple[int, int, int]]] = {
        "amber": [(250, 160, 20), (90, 200, 90)],
        "blue": [(20, 40, 220), (0, 0, 0)],
        "clay": [(255, 255, 255)],
    }
    data = write_colours(tmp_path / "data", shades)
    more = ["--accumulate", parts, "--lr", "0.02", "--student-resume", files[0], "--epochs", "1"]
    assert main_base.main(words(data, tmp_path / "run", *more, batch=5)) == 0
    images = seen(*(shade for row in shades.values() for shade in row))
    target = torch.tensor([0, 0, 1, 1, 2])
    assert_moved_as(sgd([0.02], [(images, target)], 1e-4), weights(tmp_path / "run"))
    loss = float(F.cross_entropy(logits(0, images), target))
    assert records(tmp_path / "run")[0]["train_loss"] == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_evaluation_computes_in_the_type_of_amp(amp: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The last convolution gives 1.0038 for every image, which is 1 in bfloat16: another class wins.
    model: Any = timm.create_model("test_nfnet", num_classes=3).requires_grad_(False)
    for weight in (model.final_conv.gain, model.final_conv.bias, model.head.fc.weight, model.head.fc.bias):
        weight.zero_()
    model.final_conv.bias[0] = 1.0038
    model.head.fc.weight[0, 0] = 1.0
    wide = float(model.final_act(torch.tensor(1.0038)))
    narrow = float(model.final_act(torch.tensor(1.0, dtype=torch.bfloat16)))
    assert wide - narrow > 1e-3
    shift = -round(narrow * 256) / 256  # exact in bfloat16
    model.head.fc.bias.copy_(torch.tensor([shift, (wide + narrow) / 2 + shift, -9.0]))
    torch.save(model.state_dict(), tmp_path / "model.pth")
    data = write_colours(tmp_path / "data", {name: [COLOURS[name]] * n for n, name in enumerate(COLOURS, start=1)})
    more = ["-a", "timm:test_nfnet", "--amp", amp, "--student-resume", str(tmp_path / "model.pth"), "-e"]
    assert main_base.main([str(data), *more, "--img-size", "32", "-j", "0"]) == 0
    # One image in six is of the first class, two are of the second. Without bfloat16, --amp bf16 computes in float32.
    narrows = amp == "bf16" and mgd.has_bfloat16(torch.device("cpu"))
    assert f"top-1 {33.33 if narrows else 16.67} " in capsys.readouterr().out


def test_a_disk_that_is_full_leaves_the_checkpoint_before_whole(
    colours: Path, files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, last = tmp_path / "run", tmp_path / "run" / "last.pth"
    line = words(colours, run, "--student-resume", files[0], "--lr", "0.01", "--resume", "auto", "--epochs")
    assert main_base.main([*line, "1"]) == 0
    before = last.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (1000, len(before) // 2, len(before) - 1000):
        capsys.readouterr()
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))  # a write beyond it fails, as on a full disk
        try:
            status = main_base.main([*line, "2"])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        error = capsys.readouterr().err
        assert status == 2 and error.count("\n") == 1, error
        assert "cannot be written (File too large): make room" in error
        assert last.read_bytes() == before
    assert main_base.main([*line, "2"]) == 0
    whole = words(colours, tmp_path / "whole", "--student-resume", files[0], "--lr", "0.01", "--epochs", "2")
    assert main_base.main(whole) == 0
    assert [entry["epoch"] for entry in records(run)] == [0, 1]
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(weights(run)[name], value), name
