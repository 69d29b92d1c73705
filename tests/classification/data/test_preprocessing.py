from __future__ import annotations

import json
import re
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision import transforms as T

from classification import main_base, main_mgd
from classification.data.images import to_bytes
from classification.data.preprocessing import MEAN, STD, Preprocessing, of_timm, of_torchvision, read_preprocessing
from classification.errors import UserError
from classification.models import build
from classification.models.pretrained import published_preprocessing
from classification.models.weights import read_weights
from tests.classification.conftest import CLASSES, SMALL, STUDENT, TEACHER, write_photos
from tests.classification.test_main import options
from tests.classification.training.test_engine import engine_of

HALF = (0.5, 0.5, 0.5)


def smooth(height: int, width: int) -> Image.Image:
    noise = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    large = torch.nn.functional.interpolate(noise, (height, width), mode="bicubic").clamp(0, 1)
    return Image.fromarray((255 * large[0].permute(1, 2, 0)).byte().numpy())


def test_what_is_described_is_read_again_from_plain_values() -> None:
    seen = Preprocessing(96, 110, "squash", "bicubic", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    plain = seen.describe()
    assert json.loads(json.dumps(plain)) == plain
    assert set(plain) == {"img_size", "resize", "crop", "interpolation", "mean", "std"}
    assert read_preprocessing(plain, Preprocessing(), "x") == seen
    assert read_preprocessing({}, seen, "x") == seen and read_preprocessing(
        {"mean": [0.5, 0.5, 0.5]}, seen, "x"
    ) == replace(seen, mean=HALF)


def test_a_run_resizes_by_the_rule_of_its_crop() -> None:
    assert Preprocessing.of(224) == Preprocessing(224, 256, "center", "bilinear", MEAN, STD)
    assert Preprocessing.of(32, "pad").resize == 32
    assert Preprocessing(224, 232).at(112).resize == 116  # in the same proportion
    assert Preprocessing(224, 232).at(112, "resized").resize == 128  # 112 * 256 / 224


@pytest.mark.parametrize("size", [128, (128, 128), [3, 128, 128], [128]])
def test_sizes_of_others_are_squares(size: Any) -> None:
    assert read_preprocessing({"img_size": size}, Preprocessing(), "x").img_size == 128


def test_numbers_of_arrays_are_numbers() -> None:
    same = {"img_size": np.int64(24), "mean": torch.full((3, 1, 1), 0.5), "std": [0.25]}
    expected = Preprocessing.of(24).with_values({"mean": HALF, "std": [0.25] * 3})
    assert Preprocessing().with_values(same) == expected
    assert Preprocessing().with_values({**same, "img_size": torch.tensor(24)}) == expected
    assert Preprocessing().with_values({**same, "img_size": 24.0}) == expected
    assert Preprocessing().with_values({"mean": [0, 0, 0], "std": [255] * 3}).std == (1.0, 1.0, 1.0)  # of bytes


def test_mean_and_std_of_bytes_are_those_of_values_up_to_one() -> None:
    seen = read_preprocessing({"mean": torch.tensor([51.0, 102, 127.5]), "std": [51, 51, 51]}, Preprocessing(), "x")
    assert seen.mean == pytest.approx((0.2, 0.4, 0.5)) and seen.std == pytest.approx((0.2, 0.2, 0.2))


def test_what_other_code_calls_crop_or_interpolation_is_not_ours(tmp_path: Path) -> None:
    content = {"state_dict": build(STUDENT, 3).state_dict(), "crop": 0.875, "interpolation": 3, "resize": True}
    torch.save({**content, "img_size": (3, 32, 32)}, tmp_path / "w.pth")
    assert read_weights(tmp_path / "w.pth").preprocessing(Preprocessing.of(16)) == Preprocessing.of(32)
    torch.save({**content, "format": 4}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="is damaged: its resize"):
        read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize(
    "damage",
    [
        {"img_size": (3, 32, 48)}, {"img_size": "large"}, {"img_size": True}, {"img_size": 0}, {"img_size": 10**9},
        {"resize": 3}, {"resize": 256.0}, {"crop": "corner"}, {"crop": ["center"]}, {"interpolation": 2},
        {"mean": [0.5, 0.5]}, {"mean": [float("nan")] * 3}, {"mean": [123.7, 116.3, 103.5]}, {"std": [0, 1, 1]},
        {"std": "wide"}, {"mean": torch.empty(3, device="meta")}, {"mean": torch.ones(3, dtype=torch.cfloat)},
    ],
)  # fmt: skip
def test_a_damaged_description_is_refused(damage: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="x is damaged"):
        read_preprocessing(damage, Preprocessing(), "x")


@pytest.mark.parametrize(
    ("seen", "theirs"),
    [
        (Preprocessing(64, 80, interpolation="bicubic"),
         [T.Resize(80, T.InterpolationMode.BICUBIC), T.CenterCrop(64)]),
        (Preprocessing(64, 64), [T.Resize(64), T.CenterCrop(64)]),
        (Preprocessing(64, 72, "squash"), [T.Resize((72, 72)), T.CenterCrop(64)]),
    ],
)  # fmt: skip
def test_images_are_seen_as_torchvision_makes_them(seen: Preprocessing, theirs: list[Any]) -> None:
    seen, image = replace(seen, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)), smooth(150, 100)
    expected = T.Compose([*theirs, T.ToTensor(), T.Normalize((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))])(image)
    pixels = seen.transform()(to_bytes(image).permute(2, 0, 1))
    got = seen.normalise(pixels.permute(1, 2, 0)[None])[0]
    assert got.shape == (3, 64, 64)
    assert (got - expected).abs().max() < 3.5 / 255 / 0.4  # rounding, which bicubic overshoots
    assert (got - expected).abs().mean() < 0.3 / 255 / 0.4


def test_published_weights_bring_their_own() -> None:
    """The values are those of timm's and torchvision's pages."""
    lite = {"input_size": (3, 224, 224), "crop_pct": 0.875, "interpolation": "bicubic", "mean": HALF, "std": HALF}
    assert of_timm(lite) == Preprocessing(224, 256, "center", "bicubic", HALF, HALF)
    assert of_timm({**lite, "crop_pct": 0.95, "crop_mode": "squash"}) == Preprocessing(
        224, 235, "squash", "bicubic", HALF, HALF
    )
    assert of_timm({**lite, "input_size": (1, 28, 20)}) is None and of_timm({}) is None
    convnext = torchvision.models.ConvNeXt_Tiny_Weights.IMAGENET1K_V1.transforms()
    assert of_torchvision(convnext) == Preprocessing(224, 236)
    model = torch.nn.Identity()
    assert published_preprocessing(model, "torchvision:googlenet") == Preprocessing(mean=HALF, std=HALF)
    assert published_preprocessing(model, "resnet18") == Preprocessing()
    assert published_preprocessing(model, "cifar_resnet8") is None


# -- in runs


def saved(path: Path, arch: str, seed: int, **more: Any) -> Path:
    torch.manual_seed(seed)
    state = build(arch, 3).state_dict()
    torch.save({"state_dict": state, "arch": arch, "num_classes": 3, "classes": list(CLASSES), **more}, path)
    return path


def expected_hits(path: Path, photos: Path) -> float:
    """Evaluate a checkpoint by torchvision's transforms, as it describes them."""
    content = torch.load(path, weights_only=True)
    model = build(content["arch"], 3).eval()
    model.load_state_dict(content["state_dict"])
    size, resize = content["img_size"], content.get("resize", content["img_size"])
    see = T.Compose([T.Resize(resize), T.CenterCrop(size), T.ToTensor(), T.Normalize(content["mean"], content["std"])])
    files = [(file, label) for label, name in enumerate(CLASSES) for file in (photos / "valid" / name).iterdir()]
    with torch.no_grad():
        logits = model(torch.stack([see(Image.open(file).convert("RGB")) for file, _ in files]))
    return 100 * float((logits.argmax(1) == torch.tensor([label for _, label in files])).float().mean())


def test_both_networks_are_evaluated_as_their_own_files_say(
    photos: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing but the files is named: architectures, sizes, crops and normalisation are theirs."""
    content = torch.load(teacher, weights_only=True)
    mean, std = [0.9, 0.1, 0.5], [0.05, 0.9, 0.1]  # what makes a difference
    student = tmp_path / "student.pth"
    torch.save({**content, "img_size": 24, "resize": 40, "mean": mean, "std": std}, student)
    words = [
        str(photos),
        "-e",
        "-j",
        "0",
        "-b",
        "8",
        "--student-resume",
        str(student),
        "--teacher-resume",
        str(teacher),
    ]
    accuracies = [expected_hits(path, photos) for path in (teacher, student)]
    assert accuracies[0] != accuracies[1]
    for script in (main_base, main_mgd):
        capsys.readouterr()
        assert script.main(words) == 0
        out = capsys.readouterr().out
        for role, accuracy in zip(("teacher", "student"), accuracies, strict=True):
            assert re.search(rf"=> {role} {TEACHER}, .* parameters: top-1 {accuracy:.2f} ", out)
        assert "24 px of 40, bilinear, mean 0.9 0.1 0.5, std 0.05 0.9 0.1" in out


def test_what_was_typed_wins_and_contradictions_are_said(photos: Path, tmp_path: Path, capsys: Any) -> None:
    file = saved(tmp_path / "w.pth", STUDENT, 0, format=4, img_size=24, resize=24)
    words = [str(photos), "-e", "-j", "0", "--seed", "0", "--student-resume", str(file)]
    engine = engine_of([*words, "--img-size", "32"], main_base)
    assert engine.job.preprocessing == Preprocessing(32, 32)
    assert "trained at 24 px, it will see 32 px (--img-size)" in " ".join(engine.job.notes)
    assert main_base.main([*words, "-a", TEACHER]) == 2
    assert f"holds a {STUDENT}, not a {TEACHER}" in capsys.readouterr().err


def test_starting_weights_give_their_preprocessing_to_the_run(photos: Path, tmp_path: Path, capsys: Any) -> None:
    file = saved(tmp_path / "w.pth", STUDENT, 0, format=4, img_size=24, resize=30, mean=list(HALF), std=[0.25] * 3)
    words = [str(photos), *SMALL[2:6], "--seed", "0", "--lr", "0.01", "--output", str(tmp_path / "run")]
    assert main_base.main([*words, "--student-resume", str(file), "--epochs", "1"]) == 0
    assert f"the student {STUDENT} gets images as its file had them: 24 px of 30" in capsys.readouterr().out
    last = torch.load(tmp_path / "run" / "last.pth", weights_only=True)
    stored = {"img_size": 24, "resize": 30, "crop": "center", "mean": list(HALF), "std": [0.25] * 3}
    assert {key: last[key] for key in stored} == stored and last["arch"] == STUDENT
    words = [*words[:-2], "--epochs", "2", "--resume", str(tmp_path / "run" / "last.pth")]
    assert main_base.main(words) == 0
    last = torch.load(tmp_path / "run" / "last.pth", weights_only=True)
    assert {key: last[key] for key in stored} == stored and last["resume"]["epoch"] == 2


def test_a_teacher_in_training_sees_what_its_file_says(distil: list[str], teacher: Path, tmp_path: Path) -> None:
    content = torch.load(teacher, weights_only=True)
    mean, std = [0.9, 0.1, 0.5], [0.05, 0.9, 0.1]
    torch.save({**content, "img_size": 16, "mean": mean, "std": std}, tmp_path / "t.pth")
    words = options(distil, distiller="kd", teacher_resume=str(tmp_path / "t.pth"), teacher_dtype="float32")
    words = [word for word in words if word not in ("--loss-factor", "1e3", "--teacher-arch", TEACHER)]
    engine = engine_of(words)  # the teacher's architecture is that of its file
    images, _ = next(iter(engine.valid_images()))
    plain = build(TEACHER, 3).eval()
    plain.load_state_dict(content["state_dict"])
    values = images * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]  # in [0, 1]
    expected = plain((values - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None])
    torch.testing.assert_close(engine.job.teachers[0](images).logits, expected, rtol=1e-3, atol=1e-3)
    assert engine.job.preprocessing.mean == MEAN


def test_a_silent_file_of_a_timm_network_is_seen_as_timm_publishes_it(photos: Path, tmp_path: Path) -> None:
    arch = "timm:tf_efficientnet_lite0"
    torch.save(build(arch, 3).state_dict(), tmp_path / "w.pth")
    words = [
        str(photos),
        "-e",
        "-j",
        "0",
        "--seed",
        "0",
        "-a",
        arch,
        "--img-size",
        "32",
        "--student-resume",
        str(tmp_path / "w.pth"),
    ]
    job = engine_of(words, main_base).job
    assert job.preprocessing == Preprocessing(32, 37, "center", "bicubic", HALF, HALF)
    assert any("of which its file says nothing" in note for note in job.notes)


def test_a_folder_of_fewer_classes_is_numbered_as_the_file_does(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", train=1, valid=1)
    torch.manual_seed(0)
    names = ["ant", *CLASSES]
    state = build(STUDENT, 4).state_dict()
    torch.save({"state_dict": state, "arch": STUDENT, "classes": names, "img_size": 16}, tmp_path / "w.pth")
    job = engine_of(
        [str(photos), "-e", "-j", "0", "--seed", "0", "--student-resume", str(tmp_path / "w.pth")], main_base
    ).job
    assert job.data.classes == names and [target for _, target in job.data.valid] == [1, 2, 3]
    assert job.num_classes == 4


def test_a_teacher_of_other_classes_serves_terms_that_read_maps(
    distil: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(build(TEACHER, 5).state_dict(), tmp_path / "five.pth")
    words = options(distil, teacher_resume=str(tmp_path / "five.pth"), epochs="1")
    assert main_mgd.main(words) == 0
    out = capsys.readouterr().out
    assert "has 5 outputs of other classes: only its maps are used" in out
    assert f"=> teacher {TEACHER}: not evaluated" in out
    assert main_mgd.main([*words, "--evaluate"]) == 2
    assert f"fine-tune it first with mgd train DIR -a {TEACHER} --student-resume" in capsys.readouterr().err


def test_a_resumed_run_shows_its_teacher_what_it_saw_before(photos: Path, tmp_path: Path, capsys: Any) -> None:
    student = saved(tmp_path / "s.pth", STUDENT, 0, format=4, img_size=16, resize=16)
    teacher = saved(tmp_path / "t.pth", TEACHER, 0, format=4, img_size=24, resize=30, mean=list(HALF))
    words = [str(photos), "--student-resume", str(student), "--teacher-resume", str(teacher), "--distiller", "kd"]
    words += ["-b", "8", "-j", "0", "--seed", "0", "--lr", "0.01", "--epochs", "1", "--output", str(tmp_path / "run")]
    seen = f"the teacher {TEACHER} gets images as its file had them: 24 px of 30"
    assert main_mgd.main(words) == 0 and seen in capsys.readouterr().out
    assert main_mgd.main(["--resume", str(tmp_path / "run"), "--epochs", "2"]) == 0 and seen in capsys.readouterr().out
    words = ["--resume", str(tmp_path / "run"), "--epochs", "3", "--img-size", "16"]
    assert main_mgd.main(words) == 2 and "a teacher that sees 24 px of 30" in capsys.readouterr().err


def test_options_kept_beside_weights_say_how_images_were_seen(photos: Path, tmp_path: Path) -> None:
    """As timm's training leaves them: mean, std and size are in its options, None where they were not given."""
    for kept in (Namespace(img_size=24, mean=HALF, std=None, model="x"), {"img_size": 24, "mean": list(HALF)}):
        torch.save({"state_dict": build(STUDENT, 3).state_dict(), "args": kept}, tmp_path / "w.pth")
        found = read_weights(tmp_path / "w.pth").preprocessing(Preprocessing())
        assert found == replace(Preprocessing.of(24), mean=HALF)
    torch.save({"state_dict": build(STUDENT, 3).state_dict(), "config": {"mean": "fast"}}, tmp_path / "w.pth")
    assert read_weights(tmp_path / "w.pth").preprocessing_values == {}  # an option of another meaning


def test_what_was_said_of_images_names_its_source(photos: Path, tmp_path: Path) -> None:
    file = saved(tmp_path / "w.pth", TEACHER, 0, format=4, img_size=24, resize=24, mean=list(HALF), std=[0.25] * 3)
    words = [str(photos), "-e", "-j", "0", "--seed", "0"]
    alone = engine_of([*words, "--student-resume", str(file), "--img-size", "32"], main_base)
    assert "gets images as its file had them, except for the size: 32 px" in " ".join(alone.job.notes)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"teachers: [{{arch: {TEACHER}, resume: {file}, mean: [0.1, 0.1, 0.1]}}]\nterms: {{kd: {{}}}}\n")
    both = engine_of([*words, "--config", str(recipe)], main_mgd)
    assert f"{TEACHER} gets images as its recipe and its file say: 24 px of 24" in " ".join(both.job.notes)


def test_a_peer_that_saw_other_images_is_named(photos: Path, tmp_path: Path) -> None:
    file = saved(tmp_path / "w.pth", STUDENT, 0, format=4, img_size=24, resize=24, mean=list(HALF), std=[0.25] * 3)
    words = [str(photos), *SMALL, "-a", STUDENT, "--distiller", "dml", "--teacher-arch", STUDENT]
    engine = engine_of([*words, "--teacher-resume", str(file), "--output", str(tmp_path / "run")], main_mgd)
    assert f"the peer {STUDENT} was trained on 24 px of 24, bilinear, mean 0.5" in " ".join(engine.job.notes)


def test_a_file_that_does_not_fit_and_names_no_network_says_so(photos: Path, tmp_path: Path, capsys: Any) -> None:
    torch.save(build(STUDENT, 3).state_dict(), tmp_path / "w.pth")
    assert main_base.main([str(photos), "-e", "-j", "0", "--student-resume", str(tmp_path / "w.pth")]) == 2
    assert "does not fit resnet18" in (said := capsys.readouterr().err) and "does not name its network, so" in said


def test_peers_are_evaluated_as_their_files_say(photos: Path, tmp_path: Path) -> None:
    """Whether the terms teach by frozen teachers or by peers; a recipe's teacher need not repeat its file's network."""
    file = saved(tmp_path / "w.pth", STUDENT, 0, format=4, img_size=24, resize=30, mean=list(HALF), std=[0.25] * 3)
    for term, frozen in (("dml", "false"), ("kd", "true")):
        (tmp_path / "r.yaml").write_text(f"teachers: [{{resume: {file}, frozen: {frozen}}}]\nterms: {{{term}: {{}}}}\n")
        engine = engine_of(
            [str(photos), "-e", "-j", "0", "--seed", "0", "--config", str(tmp_path / "r.yaml")], main_mgd
        )
        assert engine.job.specs[0]["arch"] == STUDENT
        assert engine.job.teacher_preprocessing == [Preprocessing(24, 30, mean=HALF, std=(0.25, 0.25, 0.25))]
