"""pseudo_label.py: scores of a teacher in shards, resumed and shared by ranks; lists of the best per class."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from classification.models import build
from classification.pile.shards import SCHEMA, claim_shard
from classification.pseudo_label import main
from tests.classification.conftest import CLASSES, TEACHER
from tests.reference.ranking import best_per_class

ROOT = Path(__file__).parents[3]
SMALL = ["-j", "0", "-b", "4", "--shard-size", "6"]


def rows(folder: Path) -> list[dict[str, Any]]:
    return [row for file in sorted(folder.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


@pytest.fixture(scope="module")
def scores(photos: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pile") / "scores"
    assert main(["score", str(teacher), str(photos / "train"), "--output", str(folder), *SMALL]) == 0
    return folder


def test_the_shards_hold_what_a_plain_loop_finds(scores: Path, photos: Path, teacher: Path) -> None:
    from torchvision.transforms.functional import normalize, to_tensor

    best = torch.load(teacher, weights_only=True)
    network = build(TEACHER, 3).eval()
    network.load_state_dict(best["state_dict"])
    found = rows(scores)
    paths = sorted((photos / "train").rglob("*.png"))
    assert [row["path"] for row in found] == [str(path) for path in paths]
    for row, path in zip(found, paths, strict=True):
        image = normalize(to_tensor(Image.open(path).convert("RGB")), best["mean"], best["std"])
        with torch.no_grad():
            values, classes = network(image[None])[0].log_softmax(0).sort(descending=True)
        assert row["classes"] == classes.tolist()
        assert row["log_probabilities"] == pytest.approx(values.tolist(), rel=1e-4, abs=1e-5)
        with torch.no_grad():
            likelihood = network(image[None])[0].double().exp().sum().log()
        assert row["energy"] == pytest.approx(-float(likelihood), rel=1e-4, abs=1e-5)
        assert row["hash"] == blake2b(path.read_bytes()).hexdigest()[:32]
        name = blake2b(str(path).encode(), digest_size=8).digest()
        assert row["path_hash"] == int.from_bytes(name, "big")


def test_the_files_say_what_they_are(scores: Path) -> None:
    files = sorted(scores.glob("*.parquet"))
    assert [pq.read_table(file).num_rows for file in files] == [6, 6, 6, 6, 3]
    schema = pq.read_schema(files[0])
    assert schema.equals(SCHEMA) and schema.names[:5] == ["path", "hash", "path_hash", "classes", "log_probabilities"]
    assert schema.names[5:] == ["energy"] and schema.field("energy").type == pa.float32()
    assert schema.field("classes").type == pa.list_(pa.int32())
    assert schema.field("log_probabilities").type == pa.list_(pa.float32())
    assert json.loads(schema.metadata[b"mgd.classes"]) == list(CLASSES)
    assert schema.metadata[b"mgd.teacher"].decode() == json.loads((scores / "scores.json").read_text())["teacher"]
    assert len({pq.read_schema(file).metadata[b"mgd.teacher"] for file in files}) == 1


def test_the_same_line_resumes_and_scores_nothing_twice(
    scores: Path, photos: Path, teacher: Path, tmp_path: Path, capsys: Any
) -> None:
    folder = Path(shutil.copytree(scores, tmp_path / "scores"))
    files = sorted(folder.glob("*.parquet"))
    content = {file: file.read_bytes() for file in files}
    files[1].unlink()
    (folder / ".000001.part").write_bytes(b"what a kill left")
    times = {file: file.stat().st_mtime_ns for file in files if file.exists()}
    words = ["score", str(teacher), str(photos / "train"), "--output", str(folder), *SMALL]
    assert main(words) == 0
    said = capsys.readouterr()
    assert "resumed: 4 of 5 shards" in said.out and "6 images scored" in said.out
    assert {file: file.read_bytes() for file in files} == content
    assert {file: file.stat().st_mtime_ns for file in times} == times
    assert sorted(path.name for path in folder.iterdir()) == sorted([*(f.name for f in files), "scores.json"])
    assert main(words) == 0 and "done: 0 images" in capsys.readouterr().out
    files[3].unlink()
    with claim_shard(folder, 3) as held:  # another process is at this shard
        assert held is not None and main(words) == 0
    assert "done: 0 images" in (out := capsys.readouterr().out) and "other processes still work on 1 shards" in out


def test_ranks_share_the_shards(scores: Path, photos: Path, teacher: Path, tmp_path: Path) -> None:
    words = ["score", str(teacher), str(photos / "train"), "--output", str(tmp_path / "scores"), *SMALL]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    done = subprocess.run(
        [*command, str(ROOT / "classification" / "pseudo_label.py"), *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    scored = [int(number) for number in re.findall(r"=> done: (\d+) images", done.stdout)]  # lines may run together
    assert len(scored) == 2 and sum(scored) == 27, done.stdout
    assert rows(tmp_path / "scores") == rows(scores)


def test_a_kill_loses_one_shard_at_most(scores: Path, photos: Path, teacher: Path, tmp_path: Path) -> None:
    folder = tmp_path / "scores"
    words = ["score", str(teacher), str(photos / "train"), "--output", str(folder), *SMALL]
    dying = (
        "import os, sys, signal; from classification import pseudo_label; from classification.pile import scoring\n"
        "real, calls = scoring.finish_shard, []\n"
        "def finish(file, folder, number, content):\n"
        "    calls.append(number)\n"
        "    if len(calls) == 3:\n"
        "        file.write(content[:50]); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "    real(file, folder, number, content)\n"
        "scoring.finish_shard = finish\n"
        "pseudo_label.main(sys.argv[1:])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", dying, *words], env=environment, capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL and len(list(folder.glob("*.parquet"))) == 2
    assert main(words) == 0
    assert rows(folder) == rows(scores)


def test_several_teachers_are_averaged(photos: Path, teacher: Path, tmp_path: Path) -> None:
    best = torch.load(teacher, weights_only=True)
    state = best["state_dict"]
    last = [name for name, value in state.items() if value.shape == (3,)][-1]
    other = {**best, "state_dict": {**state, last: state[last] + torch.tensor([0.0, 2.0, -1.0])}}
    torch.save(other, tmp_path / "other.pth")
    images = str(photos / "valid" / "bar")
    found = []
    for name, words in {
        "one": [str(teacher)],
        "two": [str(tmp_path / "other.pth")],
        "both": [str(teacher), "--also", str(tmp_path / "other.pth")],
    }.items():
        checkpoint, *more = words
        assert main(["score", checkpoint, images, "--output", str(tmp_path / name), *more, *SMALL]) == 0
        tables = [dict(zip(r["classes"], np.exp(r["log_probabilities"]), strict=True)) for r in rows(tmp_path / name)]
        found.append(np.array([[table[label] for label in range(3)] for table in tables]))
    one, two, both = found
    assert both == pytest.approx((one + two) / 2, rel=1e-5) and np.abs(one - two).max() > 0.05


def test_select_writes_the_best_of_every_class(scores: Path, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "chosen.txt"
    assert main(["select", str(scores), "--top-k", "4", "--top-p", "2", "--output", str(file)]) == 0
    scored = [(r["path"], r["path_hash"], r["classes"], r["log_probabilities"]) for r in rows(scores)]
    wanted = best_per_class(scored, 2, 4)
    lines = [line.rsplit(" ", 2) for line in file.read_text().splitlines()]
    found = [(path, int(label), np.float32(float(score))) for path, label, score in lines]
    assert found == [(path, k, np.float32(score)) for k in sorted(wanted) for path, score in wanted[k]]
    about = json.loads((tmp_path / "chosen.txt.json").read_text())
    assert about["classes"] == list(CLASSES) and about["rule"] == {"top_p": 2, "top_k": 4}
    assert "12 lines" in capsys.readouterr().out


def test_balanced_lists_repeat_the_smaller_classes(scores: Path, tmp_path: Path) -> None:
    words = ["select", str(scores), "--top-k", "1000", "--top-p", "1", "--output"]
    assert main([*words, str(tmp_path / "plain.txt")]) == 0
    assert main([*words, str(tmp_path / "balanced.txt"), "--balance"]) == 0
    plain, balanced = (
        [line.split()[1] for line in (tmp_path / f"{name}.txt").read_text().splitlines()]
        for name in ("plain", "balanced")
    )
    most = max(map(plain.count, set(plain)))
    assert {label: balanced.count(label) for label in set(balanced)} == dict.fromkeys(set(plain), most)


def test_scores_may_be_probabilities_or_logarithms(scores: Path, tmp_path: Path) -> None:
    for name, value in (("a", "0.5"), ("b", str(np.log(0.5)))):
        words = ["select", str(scores), "--top-p", "1", "--min-score", value, "--output", str(tmp_path / name)]
        assert main(words) == 0
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text()
    wanted = sum(row["log_probabilities"][0] >= np.log(0.5) for row in rows(scores))
    assert len((tmp_path / "a").read_text().splitlines()) == wanted


def test_paths_as_seen_from_a_folder(scores: Path, photos: Path, tmp_path: Path, capsys: Any) -> None:
    words = ["select", str(scores), "--output", str(tmp_path / "chosen.txt"), "--root"]
    assert main([*words, str(photos)]) == 0
    assert all(line.startswith("train/") for line in (tmp_path / "chosen.txt").read_text().splitlines())
    assert main([*words, str(photos / "valid"), "--force"]) == 2
    assert "does not lie in --root" in capsys.readouterr().err


def smooth(seed: int) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((96, 96), Image.Resampling.BICUBIC)


def test_near_copies_of_valid_are_left_out_and_replaced(teacher: Path, tmp_path: Path, capsys: Any) -> None:
    pile, valid = tmp_path / "pile", tmp_path / "valid"
    pile.mkdir()
    valid.mkdir()
    for seed in range(12):
        smooth(seed).save(pile / f"{seed}.png")
    smooth(3).resize((64, 64)).save(valid / "small.jpg", quality=60)
    smooth(5).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(valid / "mirrored.webp")
    assert main(["score", str(teacher), str(pile), "--output", str(tmp_path / "scores"), *SMALL]) == 0
    words = ["select", str(tmp_path / "scores"), "--top-k", "10", "--output", str(tmp_path / "list")]
    assert main([*words, "--exclude", str(valid)]) == 0
    assert "left out 2 near copies" in capsys.readouterr().out
    lines = [line.split() for line in (tmp_path / "list").read_text().splitlines()]
    assert {path for path, _, _ in lines} == {str(pile / f"{seed}.png") for seed in range(12) if seed not in (3, 5)}
    assert len(lines) == 30
    assert set(json.loads((tmp_path / "list.json").read_text())["near_copies"].values()) == {
        str(valid / "small.jpg"),
        str(valid / "mirrored.webp"),
    }


@pytest.mark.parametrize("rule", ["margin", "min-score", "score", "energy"])
def test_foreign_images_are_told_by_known_ones(
    rule: str, scores: Path, photos: Path, teacher: Path, tmp_path: Path, capsys: Any
) -> None:
    known = tmp_path / "known"
    assert main(["score", str(teacher), str(photos / "valid"), "--output", str(known), *SMALL]) == 0
    words = [
        "select",
        str(scores),
        "--top-p",
        "1",
        "--known",
        str(known),
        "--foreign-rule" if rule == "score" else "--rule",
        rule,
        "--keep",
        "60",
    ]
    assert main([*words, "--output", str(tmp_path / "list")]) == 0

    def statistic(row: dict[str, Any]) -> float:
        first, second = row["log_probabilities"][:2]
        return float({"margin": first - second, "energy": -row["energy"]}.get(rule, first))

    low = np.quantile(list(map(statistic, rows(known))), 0.4)
    wanted = {row["path"] for row in rows(scores) if statistic(row) >= low}
    assert {line.rsplit(" ", 2)[0] for line in (tmp_path / "list").read_text().splitlines()} == wanted
    assert "60 % of" in capsys.readouterr().out


def test_scores_of_before_energies_were_kept_can_be_ranked(scores: Path, tmp_path: Path, capsys: Any) -> None:
    old, known = (Path(shutil.copytree(scores, tmp_path / name)) for name in ("old", "known"))
    for file in sorted(old.glob("*.parquet")):
        table = pq.read_table(file).drop_columns(["energy"])
        meta = {**table.schema.metadata, b"mgd.format": b"1"}
        pq.write_table(table.replace_schema_metadata(meta), file)
    plan = json.loads((old / "scores.json").read_text())
    (old / "scores.json").write_text(json.dumps({**plan, "format": 1}))
    words = ["select", str(old), "--output", str(tmp_path / "list"), "--known", str(known), "--rule"]
    assert main([*words, "energy"]) == 2
    assert f"--rule energy: {old} has no energies: score again" in capsys.readouterr().err
    assert main([*words, "margin"]) == 0


def test_a_teacher_may_see_another_size(photos: Path, teacher: Path, tmp_path: Path) -> None:
    from classification.data.inference import read_batches
    from classification.models.trained import open_trained

    words = ["score", str(teacher), str(photos / "valid"), "--output", str(tmp_path / "scores"), *SMALL]
    assert main([*words, "--img-size", "24"]) == 0
    found = rows(tmp_path / "scores")
    own = open_trained(teacher)
    seen = own.preprocessing.at(24)
    (batch,) = read_batches([row["path"] for row in found], seen, len(found))
    assert batch.pixels.shape[1:] == (24, 24, 3)
    with torch.no_grad():
        best = own.network(seen.normalise(batch.pixels)).log_softmax(1).max(1)[0]
    assert [row["log_probabilities"][0] for row in found] == pytest.approx(best.tolist(), rel=1e-4, abs=1e-5)


def test_unreadable_images_and_odd_names_are_left_out(photos: Path, teacher: Path, tmp_path: Path, capsys: Any) -> None:
    pile = tmp_path / "pile"
    shutil.copytree(photos / "valid" / "bar", pile / "deep" / "er")
    (pile / "broken.jpg").write_bytes(b"no image")
    good = pile / "deep" / "er" / "0.png"
    shutil.copy(good, pile / "two\nlines.png")
    shutil.copy(os.fsencode(good), os.fsencode(pile) + b"/\xff.png")
    assert main(["score", str(teacher), str(pile), str(good), "--output", str(tmp_path / "scores"), *SMALL]) == 0
    said = capsys.readouterr()
    assert "broken.jpg is left out (it is in no known image format)" in said.err
    assert "its name has a line end" in said.err and "its name is no UTF-8 text" in said.err
    assert "1 paths were named more than once" in said.err and "5 images scored" in said.out
    assert [row["path"] for row in rows(tmp_path / "scores")] == [
        str(p) for p in sorted((pile / "deep").rglob("*.png"))
    ]


def other_column(folder: Path) -> None:
    table = pq.read_table(folder / "000002.parquet")
    pq.write_table(
        table.set_column(3, "classes", table["classes"].cast(pa.list_(pa.int64()))), folder / "000002.parquet"
    )


def other_teacher(folder: Path) -> None:
    table = pq.read_table(folder / "000002.parquet")
    meta = {**table.schema.metadata, b"mgd.teacher": b"another"}
    pq.write_table(table.replace_schema_metadata(meta), folder / "000002.parquet")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda folder: (folder / "000002.parquet").unlink(),
            "lacks 1 of 5 shards, for example 000002.parquet: type the line",
        ),
        (
            lambda folder: (folder / "000002.parquet").write_bytes(b"no"),
            "000002.parquet is not a Parquet file, or is damaged",
        ),
        (other_column, "the column classes must be list<element: int32>; got list<element: int64>"),
        (other_teacher, "000002.parquet is from another teacher than"),
        (lambda folder: (folder / "scores.json").write_text("{"), "scores.json cannot be read"),
        (
            lambda folder: (folder / "scores.json").write_text('{"format": 9}'),
            "has format 9; this code reads formats 1 and 2",
        ),
    ],
)
def test_shards_that_are_wrong(
    change: Callable[[Path], Any], message: str, scores: Path, tmp_path: Path, capsys: Any
) -> None:
    folder = Path(shutil.copytree(scores, tmp_path / "scores"))
    change(folder)
    assert main(["select", str(folder), "--output", str(tmp_path / "list")]) == 2
    error = capsys.readouterr().err
    assert message in error.replace("item:", "element:") and error.count("\n") == 1
    assert not (tmp_path / "list").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["score", "TEACHER", "EMPTY", "--output", "new"], "no image found in EMPTY"),
        (
            ["score", "TEACHER", "PHOTOS", "--output", "new"],
            "is a data folder, and its valid/ would be part of the pile",
        ),
        (["score", "nowhere.pth", "TRAIN", "--output", "new"], "checkpoint nowhere.pth does not exist"),
        (["score", "TEACHER", "TRAIN", "--output", "PHOTOS"], "contains other files than scores: give another folder"),
        (["score", "TEACHER", "VALID", "--output", "SCORES", *SMALL], "was begun with 27 images, now 15"),
        (["score", "TEACHER", "TRAIN", "--output", "SCORES", *SMALL, "--top-p", "2"], "was begun with --top-p 3"),
        (["score", "TEACHER", "TRAIN", "--output", "SCORES"], "was begun with --shard-size 6"),
        (["score", "TEACHER", "TRAIN", "--outputs", "new"], "--output"),
        (
            ["select", "nowhere", "--output", "new"],
            "nowhere does not exist: give the --output of `mgd score`",
        ),
        (["select", "EMPTY", "--output", "new"], "EMPTY has no shards: expected *.parquet"),
        (["select", "SCORES", "--output", "PHOTOS"], "is a folder: give a file in it"),
        (["select", "SCORES", "--output", "new", "--top-p", "4"], "is more than the 3 classes per image in"),
        (["select", "SCORES", "--output", "new", "--min-score", "1.5"], "expected a number"),
        (["select", "SCORES", "--output", "new", "--min-score", "1"], "no image was chosen: lower --min-score"),
        (["select", "SCORES", "--output", "new", "--exclude", "nowhere"], "--exclude nowhere does not exist"),
        (["select", "SCORES", "--output", "new", "--rule", "energy"], "--rule needs --known FOLDER"),
        (["select", "SCORES", "--output", "new", "--keep", "90"], "--keep needs --known FOLDER"),
        (["select", "SCORES", "--output", "new", "--topk", "3"], "close ones are --top-k"),
        ([], "the following arguments are required: score|select"),
        (["rate"], "invalid choice: 'rate'"),
    ],
)
def test_mistakes_are_one_sentence(
    words: list[str], message: str, scores: Path, photos: Path, teacher: Path, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.doc").touch()
    places = {
        "TEACHER": teacher,
        "PHOTOS": photos,
        "TRAIN": photos / "train",
        "VALID": photos / "valid",
        "SCORES": scores,
        "EMPTY": tmp_path / "empty",
    }
    words = [str(places.get(word, tmp_path / word if word == "new" else word)) for word in words]
    assert main(words) == 2
    error = capsys.readouterr().err.replace(str(tmp_path / "empty"), "EMPTY")
    task = f"pseudo_label.py {words[0]}: " if words[:1] in (["score"], ["select"]) else "pseudo_label.py: "
    assert error.startswith(task) and error.count("\n") == 1 and message in error
    assert not (tmp_path / "new").exists()
