"""Training from stored outputs: the same step as with the teacher itself, exact resumption, what is refused."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from classification import main_mgd, reinforce
from classification.options.config import parse
from classification.runs.world import Seed, World
from classification.training import distilling
from classification.training.engine import Engine
from classification.training.trainer import Trainer
from tests.classification.conftest import STUDENT, TEACHER
from tests.classification.runs.test_resume import differences  # noqa: F401
from tests.classification.test_main import options, records
from tests.classification.training.test_step import cut_at_save

VIEWS = ["--train-crop", "pad", "--samples", "3", "-j", "0", "--shard-size", "10"]
Store = Callable[..., Path]


@pytest.fixture(scope="module")
def store(photos: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Return a function that stores the teacher with these options, once for each."""
    made: dict[tuple[str, ...], Path] = {}

    def folder(*more: str) -> Path:
        if more not in made:
            made[more] = tmp_path_factory.mktemp("stored") / "cache"
            words = [str(teacher), str(photos), "--output", str(made[more]), *VIEWS, *more]
            assert reinforce.main(words) == 0
        return made[more]

    return folder


def from_cache(distil: list[str], cache: Path, *more: str) -> list[str]:
    """The words of a run without its teacher."""
    pair = distil.index("--teacher-arch")
    factor = distil.index("--loss-factor")
    rest = [*distil[:pair], *distil[pair + 4 : factor], *distil[factor + 2 :]]
    return [rest[0], "--teacher-cache", str(cache), "--distiller", "kd", *rest[1:-2], *more, *rest[-2:]]


def trainer_of(words: list[str]) -> Trainer:
    job = distilling.prepare(parse(words, "main_mgd.py", distillation=True), Seed(0, typed=True))
    return Trainer(Engine(job, World()))


def gradients(trainer: Trainer, values: dict[str, Tensor]) -> Tensor:
    values["loss"].backward()
    return torch.cat([p.grad.flatten() for p in trainer.student.parameters() if p.grad is not None])


PLAIN, MIXED = (), ("--mixup", "0.4", "--cutmix", "1")
STEPS = [
    *((term, PLAIN) for term in ("kd", "dkd", "meal", "ssld", "wttm", "dist", "wkd_logits")),
    *((term, MIXED) for term in ("kd", "meal")),  # dkd needs one class per image
]


@pytest.mark.parametrize(("term", "mix"), STEPS, ids=[f"{term} {'mixed' if mix else ''}" for term, mix in STEPS])
def test_a_step_is_that_of_the_teacher_on_the_same_views(
    term: str, mix: tuple[str, ...], distil: list[str], store: Store
) -> None:
    """All three classes are stored, so only float16 is lost."""
    # MEAL's discriminator reads logits as they are, of which log-probabilities differ by a number per image.
    more = ["--term", "meal.discriminator=0"] if term == "meal" else []
    cached = trainer_of(options(from_cache(distil, store(*mix), *more), distiller=term))
    drop = distil.index("--loss-factor")
    words = options([*distil[:drop], *distil[drop + 2 :]], distiller=term, teacher_dtype="float32")
    online = trainer_of([*words, *more])
    for own, other in zip(cached.student.parameters(), online.student.parameters(), strict=True):
        assert torch.equal(own, other)
    assert not cached.job.teachers and len(online.job.teachers) == 1
    cached.batches.begin(0)
    images, target, index, *stored = next(iter(cached.loader))
    found = cached.stepper.forward(images, target, index, 0, stored=stored)
    labels: Tensor | None = target
    if mix:
        other, share = stored[:2]
        labels = torch.zeros(len(target), 3)
        for row, (first, second, part) in enumerate(zip(target, other, share, strict=True)):
            labels[row, first] += part
            labels[row, second] += 1 - part
        assert len(set(share.tolist())) > 1
    labels = labels if online.options.labels else None
    want = online.distiller(online.engine.images(images), labels, index, 0)
    for name in online.distiller.terms:
        assert float(found[name].detach()) == pytest.approx(float(want[name].detach()), rel=5e-3, abs=1e-4), name
    torch.testing.assert_close(gradients(cached, found), gradients(online, want), rtol=2e-2, atol=2e-3)


def test_an_epoch_shows_the_sample_of_its_number(distil: list[str], store: Store) -> None:
    trainer = trainer_of(from_cache(distil, store()))
    shown = []
    for epoch in (0, 1, 2, 3, 4):
        trainer.batches.begin(epoch)
        items = [item for batch in trainer.batches for item in map(trainer.photos.__getitem__, batch)]
        shown.append({item[2]: item[0] for item in items})
    assert all(torch.equal(shown[0][n], shown[3][n]) and torch.equal(shown[1][n], shown[4][n]) for n in range(27))
    assert sum(not torch.equal(shown[0][n], shown[1][n]) for n in range(27)) > 20
    again = trainer.photos[(0, 5, 2)][0]  # its third showing in an epoch
    assert torch.equal(again, shown[2][5])


def test_a_few_classes_leave_the_rest_even(distil: list[str], store: Store, photos: Path) -> None:
    whole, part = (trainer_of(from_cache(distil, cache)) for cache in (store(), store("--top-k", "1")))
    for trainer in (whole, part):
        trainer.batches.begin(0)
    logits = []
    for trainer in (whole, part):
        images, target, index, *stored = next(iter(trainer.loader))
        given: list[Tensor] = []
        term = trainer.distiller.terms["kd"]
        term.register_forward_pre_hook(lambda _, inputs, given=given: given.append(inputs[1][0].logits))
        trainer.stepper.forward(images, target, index, 0, stored=stored)
        logits.append(given[0].softmax(1))
    top = logits[0].max(dim=1)
    others = (1 - top.values[:, None]) / 2
    want = others.repeat(1, 3).scatter(1, top.indices[:, None], top.values[:, None])
    torch.testing.assert_close(logits[1], want, rtol=3e-3, atol=1e-3)


def test_a_run_that_is_cut_in_an_epoch_resumes_exactly(
    distil: list[str],
    store: Store,
    tmp_path: Path,
    differences: Callable[[Path, Path], list[str]],  # noqa: F811
) -> None:
    words = from_cache(distil, store("--mixup", "0.4"), "--checkpoint-every-steps", "1", "--accumulate", "2")
    whole, cut = (options(words, output=str(tmp_path / name)) for name in ("whole", "cut"))
    assert main_mgd.main(whole) == 0
    assert cut_at_save(7, cut) == 130  # in the second epoch
    assert main_mgd.main(["--resume", str(tmp_path / "cut")]) == 0
    assert not differences(tmp_path / "whole", tmp_path / "cut")
    record = json.loads((tmp_path / "cut" / "config.json").read_text())["options"]
    assert (
        record["teachers"] == [{"arch": TEACHER, "frozen": True}]
        and record["mixup"] == 0.4
        and record["train_crop"] == "pad"
    )
    assert "train_top1" not in records(tmp_path / "whole")[0]  # images are mixed


def test_another_cache_does_not_resume_a_run(distil: list[str], store: Store, tmp_path: Path, capsys: Any) -> None:
    words = from_cache(distil, store(), "--checkpoint-every-steps", "1")
    assert cut_at_save(3, words) == 130
    resumed = ["--resume", words[-1], "--teacher-cache", str(store("--top-k", "1"))]
    capsys.readouterr()
    assert main_mgd.main(resumed) == 2
    assert "other weights of the teachers" in capsys.readouterr().err


def test_labels_are_not_needed(distil: list[str], store: Store, photos: Path, tmp_path: Path) -> None:
    words = options(from_cache(distil, store(), "--labels", "0"), distiller="ssld")
    assert main_mgd.main(words) == 0
    assert "train_ssld" in records(Path(words[-1]))[0]


def test_a_pile_is_found_below_its_root(
    distil: list[str], photos: Path, teacher: Path, tmp_path: Path, capsys: Any
) -> None:
    pile = Path(shutil.copytree(photos / "train", tmp_path / "pile"))
    words = [str(teacher), str(pile), "--output", str(tmp_path / "cache"), *VIEWS, "--mixup", "0.4"]
    assert reinforce.main(words) == 0
    lines = [f"{path.relative_to(pile)} 0 -0.1\n" for path in sorted(pile.rglob("*.png"))]
    (tmp_path / "list.txt").write_text("".join([*lines, lines[0]]))  # an image may have two lines
    listed = ["--pile-list", str(tmp_path / "list.txt"), "--pile-root", str(pile), "--labels", "0"]
    line = options(from_cache(distil, tmp_path / "cache", *listed, "--pile-share", "1"), distiller="ssld", epochs="1")
    assert main_mgd.main(line) == 0
    assert "train_ssld" in records(Path(line[-1]))[0]
    assert main_mgd.main(from_cache(distil, tmp_path / "cache", *listed)) == 2
    assert "lacks 27 of 55 training images, for example train/" in capsys.readouterr().err


def test_a_pile_may_lie_inside_the_data_folder(distil: list[str], photos: Path, teacher: Path, tmp_path: Path) -> None:
    photos = Path(shutil.copytree(photos, tmp_path / "photos"))
    pile = Path(shutil.copytree(photos / "train", photos / "more"))
    assert reinforce.main([str(teacher), str(pile), "--output", str(tmp_path / "cache"), *VIEWS]) == 0
    lines = [f"{path.relative_to(pile)} 0 -0.1\n" for path in sorted(pile.rglob("*.png"))]
    (tmp_path / "list.txt").write_text("".join(lines))
    listed = ["--pile-list", str(tmp_path / "list.txt"), "--pile-root", str(pile), "--pile-share", "1"]
    _, *words = from_cache(distil, tmp_path / "cache", *listed)
    assert main_mgd.main(options([str(photos), *words], epochs="1")) == 0


def test_images_may_lie_in_tar_shards(
    distil: list[str], photos: Path, teacher: Path, tmp_path: Path, store: Store
) -> None:
    """An epoch sees the same images and outputs as from files."""
    shutil.copytree(photos / "valid", tmp_path / "tarred" / "valid")
    (tmp_path / "tarred" / "train").mkdir()
    with tarfile.open(tmp_path / "tarred" / "train" / "0.tar", "w") as shard:
        for number, path in enumerate(sorted((photos / "train").rglob("*.png"))):
            label = str(sorted(["bar", "dot", "sky"]).index(path.parent.name)).encode()
            shard.add(path, f"{number:04d}.png")
            about = tarfile.TarInfo(f"{number:04d}.cls")
            about.size = len(label)
            shard.addfile(about, io.BytesIO(label))
    assert reinforce.main([str(teacher), str(tmp_path / "tarred"), "--output", str(tmp_path / "cache"), *VIEWS]) == 0
    words = from_cache(distil, tmp_path / "cache")
    items = [
        [trainer.photos[(1, index)] for index in range(27)]
        for trainer in (trainer_of(from_cache(distil, store())), trainer_of([str(tmp_path / "tarred"), *words[1:]]))
    ]
    for own, other in zip(*items, strict=True):
        assert torch.equal(own[0], other[0]) and own[1] == other[1] and torch.equal(own[5], other[5])


def test_what_the_cache_does_not_serve_is_refused(
    distil: list[str], store: Store, photos: Path, teacher: Path, tmp_path: Path, capsys: Any
) -> None:
    words = from_cache(distil, store())
    best = torch.load(teacher, weights_only=True)
    best["state_dict"]["conv1.weight"] *= 1.01
    torch.save(best, tmp_path / "other.pth")
    shutil.copytree(photos, tmp_path / "more")
    shutil.copy(photos / "train" / "bar" / "0.png", tmp_path / "more" / "train" / "bar" / "new.png")
    shutil.copytree(photos, tmp_path / "changed")
    shutil.copy(photos / "train" / "sky" / "0.png", tmp_path / "changed" / "train" / "bar" / "0.png")
    shutil.copytree(photos, tmp_path / "named")
    for part in ("train", "valid"):
        (tmp_path / "named" / part / "bar").rename(tmp_path / "named" / part / "ape")
    lines = "".join(f"train/{name}/{n}.png {k}\n" for k, name in enumerate(("bar", "dot", "sky")) for n in range(5))
    (tmp_path / "part.txt").write_text(lines)
    cut = Path(shutil.copytree(store(), tmp_path / "cut"))
    (cut / "000002.parquet").unlink()
    broken = Path(shutil.copytree(store(), tmp_path / "broken"))
    (broken / "000001.parquet").write_bytes((store() / "000001.parquet").read_bytes()[:900])
    foreign = Path(shutil.copytree(store(), tmp_path / "foreign"))
    shutil.copy(store("--top-k", "1") / "000000.parquet", foreign / "000000.parquet")
    future = Path(shutil.copytree(store(), tmp_path / "future"))
    plan = json.loads((future / "teacher_cache.json").read_text())
    (future / "teacher_cache.json").write_text(json.dumps({**plan, "format": 2}))
    capsys.readouterr()
    for line, said in (
        (options(words, distiller="mgd"), "mgd compares feature maps, but --teacher-cache has only logits"),
        (options(words, distiller="mlkd"), "mlkd compares two views"),
        (options(words, distiller="dml"), "dml trains its teachers"),
        ([*words, "--mixup", "0.2"], "--mixup 0.2 does not fit the views in --teacher-cache"),
        (options(words, img_size="32"), "--img-size 32 does not fit the views in --teacher-cache"),
        ([*words, "--teacher-dtype", "float32"], "--teacher-dtype has no effect here"),
        ([*words, "--teacher-resume", str(tmp_path / "other.pth")], f"holds another teacher ({TEACHER})"),
        ([str(tmp_path / "more"), *words[1:]], "lacks 1 of 28 training images, for example train/bar/new.png"),
        ([str(tmp_path / "changed"), *words[1:]], "bar/0.png has changed since it was stored in --teacher-cache"),
        ([str(tmp_path / "named"), *words[1:]], "its class 0 is 'bar', but 'ape' in the data"),
        ([*words, "--num-classes", "4"], "from a teacher with 3 classes, but this run has 4"),
        ([*options(words, teacher_cache=str(store("--mixup", "0.4"))), "--train-list", str(tmp_path / "part.txt")],
         "mixes images with train/bar/5.png, which this run lacks"),
        (options(words, teacher_cache=str(cut)), "lacks 1 of 3 shards, the first 000002.parquet"),
        (options(words, teacher_cache=str(broken)), "000001.parquet is not a Parquet file, or is damaged"),
        (options(words, teacher_cache=str(foreign)), "000000.parquet belongs to another cache"),
        (options(words, teacher_cache=str(future)), "has format 2; this code reads format 1"),
        (options(words, teacher_cache=str(photos)), "holds no teacher_cache.json"),
        (options(words, teacher_cache=str(tmp_path / "none")), "none does not exist"),
    ):  # fmt: skip
        assert main_mgd.main(line) == 2, said
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1, error
    assert not (Path(words[-1]) / "metrics.jsonl").exists()
    assert main_mgd.main([*words[:-2], "--train-list", str(tmp_path / "part.txt"), "--epochs", "1", *words[-2:]]) == 0


def test_views_of_other_versions_are_refused_where_they_draw_colours(
    distil: list[str], store: Store, tmp_path: Path, capsys: Any
) -> None:
    folder = Path(shutil.copytree(store("--randaugment", "5"), tmp_path / "cache"))
    assert main_mgd.main(options(from_cache(distil, folder), epochs="1")) == 0
    plan = json.loads((folder / "teacher_cache.json").read_text())
    plan["versions"]["torchvision"] = "0.1"
    text = json.dumps(plan, indent=1) + "\n"
    (folder / "teacher_cache.json").write_text(text)
    import pyarrow.parquet as pq

    for file in folder.glob("*.parquet"):
        table = pq.read_table(file)
        pq.write_table(table.replace_schema_metadata({**table.schema.metadata, b"mgd.plan": text.encode()}), file)
    words = options(from_cache(distil, folder), output=str(tmp_path / "again"))
    assert main_mgd.main(words) == 2
    assert "was stored with torchvision 0.1, but this is" in capsys.readouterr().err


def test_the_teacher_of_the_cache_may_be_named(distil: list[str], store: Store, teacher: Path) -> None:
    words = from_cache(distil, store(), "--teacher-resume", str(teacher), "--teacher-arch", TEACHER)
    trainer = trainer_of(words)
    assert not trainer.job.teachers and trainer.job.stored is not None and trainer.job.arch == STUDENT
