"""reinforce.py: what a teacher says of many views, in shards; resumed, shared, checked, refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from classification.errors import UserError
from classification.models import build
from classification.options.stored_teacher import read_stored_plan
from classification.pile.reinforcing import StoreWork, begin_folder, bytes_per_image
from classification.pile.shards import claim_shard
from classification.reinforce import main
from tests.classification.conftest import TEACHER
from tests.classification.refusals import room

ROOT = Path(__file__).parents[3]
SMALL = ["-j", "0", "-b", "8", "--shard-size", "10", "--samples", "3"]
READER = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "start" / "stored_teachers.md").read_text(), re.DOTALL)


def words(teacher: Path, photos: Path, folder: Path, *more: str) -> list[str]:
    return [str(teacher), str(photos), "--output", str(folder), *SMALL, *more]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rows(folder: Path) -> list[dict[str, Any]]:
    return [row for file in sorted(folder.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


@pytest.fixture(scope="module")
def cache(photos: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stored") / "cache"
    assert main(words(teacher, photos, folder)) == 0
    return folder


def test_a_reader_of_thirty_lines_finds_what_the_network_says(cache: Path, photos: Path, teacher: Path) -> None:
    """The page's own code reads files and pixels; the network is called plainly."""
    from torchvision.transforms.functional import normalize, to_tensor

    assert READER is not None and len(READER[1].splitlines()) <= 40 and "classification" not in READER[1]
    page: dict[str, Any] = {}
    exec(compile(READER[1], "docs/start/stored_teachers.md", "exec"), page)
    best = torch.load(teacher, weights_only=True)
    network = build(TEACHER, 3).eval()
    network.load_state_dict(best["state_dict"])
    found = list(page["samples"](cache))
    paths = sorted(path.relative_to(photos) for path in (photos / "train").rglob("*.png"))
    assert [(row["path"], row["sample"]) for row, _ in found] == [(str(p), n) for p in paths for n in range(3)]
    images = [normalize(to_tensor(page["view"](photos, row, 16, "pad")), best["mean"], best["std"]) for row, _ in found]
    with torch.no_grad():
        want = network(torch.stack(images)).log_softmax(1)
    assert np.stack([logs for _, logs in found]) == pytest.approx(want.numpy(), rel=2e-3, abs=2e-3)
    assert len({row["flip"] for row, _ in found}) == 2 and len({row["top"] for row, _ in found}) == 5


def test_a_box_of_the_reader_is_what_the_teacher_saw(photos: Path, teacher: Path, tmp_path: Path) -> None:
    root = tmp_path / "large"
    for number in range(3):
        (root / "train" / "a").mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (6, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((63, 42), Image.Resampling.BICUBIC).save(root / "train" / "a" / f"{number}.png")
    more = ["--samples", "2", "-j", "0", "--train-crop", "resized"]
    assert main([str(teacher), str(root), "--output", str(tmp_path / "cache"), *more]) == 0
    from classification.data.images import to_bytes
    from classification.data.stored import open_stored
    from classification.data.stored_views import Renderer

    page: dict[str, Any] = {}
    assert READER is not None
    exec(compile(READER[1], "docs/start/stored_teachers.md", "exec"), page)
    stored = open_stored(tmp_path / "cache")
    for (row, _), view in zip(page["samples"](tmp_path / "cache"), stored.block.views, strict=True):
        image = to_bytes(Image.open(root / row["path"])).permute(2, 0, 1)
        ours = Renderer(stored.plan.views)(image, view, "").permute(1, 2, 0).numpy().astype(int)
        theirs = np.asarray(page["view"](root, row, 16, "resized")).astype(int)
        assert np.abs(ours - theirs).max() <= 2  # Pillow rounds between its two passes


def test_the_same_line_resumes_and_scores_nothing_twice(
    cache: Path, photos: Path, teacher: Path, tmp_path: Path, capsys: Any
) -> None:
    folder = Path(shutil.copytree(cache, tmp_path / "cache"))
    (folder / "000001.parquet").unlink()
    (folder / ".000001.part").write_bytes(b"what a kill left")
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}
    assert main(words(teacher, photos, folder)) == 0
    said = capsys.readouterr().out
    assert "resumed: 2 of 3 shards" in said and "done: 30 views stored" in said
    assert re.search(r"27 images x 3 samples.*at most about [0-9.]+ MB in", said.splitlines()[0])
    assert content(folder) == content(cache)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    (folder / "000002.parquet").unlink()
    with claim_shard(folder, 2) as held:  # another process is at this shard
        assert held is not None and main(words(teacher, photos, folder)) == 0
    assert "done: 0 views" in (said := capsys.readouterr().out) and "still work on 1 shards" in said


def test_the_disk_is_known_before(cache: Path, photos: Path, tmp_path: Path) -> None:
    plan, paths = read_stored_plan(cache), [row["path"] for row in rows(cache)[::3]]
    said = bytes_per_image(plan, paths) * 27
    assert 0.5 * said < sum(path.stat().st_size for path in cache.glob("*.parquet")) < said
    work = StoreWork(tmp_path / "new", plan, photos, paths, 0, 1, 8, 0)
    with pytest.raises(
        UserError, match=r"needs 0\.0 MB, but only 0\.0 MB are free: make room, or lower --samples or --top-k"
    ):
        begin_folder(work, None, free=int(said) - 1)
    begin_folder(work, None, free=int(said) + 1)
    begin_folder(replace(work, folder=cache), None, free=0)  # nothing is missing


def test_ranks_share_the_shards(cache: Path, photos: Path, teacher: Path, tmp_path: Path) -> None:
    line = [sys.executable, str(ROOT / "classification" / "reinforce.py"), *words(teacher, photos, tmp_path / "cache")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(line, env={**environment, "RANK": rank}, stdout=subprocess.PIPE, text=True)
        for rank in ("0", "1")
    ]
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    stored = [int(number) for text in said for number in re.findall(r"=> done: (\d+) views", text)]
    assert len(stored) == 2 and sum(stored) == 81, said
    assert content(tmp_path / "cache") == content(cache)


def test_a_kill_or_a_full_disk_loses_one_shard_at_most(
    cache: Path, photos: Path, teacher: Path, tmp_path: Path, capsys: Any
) -> None:
    folder = tmp_path / "cache"
    dying = (
        "import os, sys, signal; from classification import reinforce; from classification.pile import reinforcing\n"
        "real, calls = reinforcing.finish_shard, []\n"
        "def finish(file, folder, number, content):\n"
        "    calls.append(number)\n"
        "    if len(calls) == 2:\n"
        "        file.write(content[:50]); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "    real(file, folder, number, content)\n"
        "reinforcing.finish_shard = finish\n"
        "reinforce.main(sys.argv[1:])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-c", dying, *words(teacher, photos, folder)]
    done = subprocess.run(line, env=environment, capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL and len(list(folder.glob("*.parquet"))) == 1
    with room(2000):
        assert main(words(teacher, photos, folder)) == 2
    assert "(File too large): make room, and type the same line to resume" in capsys.readouterr().err
    assert len(list(folder.glob("*.parquet"))) == 1
    assert main(words(teacher, photos, folder)) == 0
    assert content(folder) == content(cache)


def test_several_teachers_are_averaged(photos: Path, teacher: Path, cache: Path, tmp_path: Path) -> None:
    best = torch.load(teacher, weights_only=True)
    state = best["state_dict"]
    last = [name for name, value in state.items() if value.shape == (3,)][-1]
    other = {**best, "state_dict": {**state, last: state[last] + torch.tensor([0.0, 2.0, -1.0])}}
    torch.save(other, tmp_path / "other.pth")
    assert main(words(tmp_path / "other.pth", photos, tmp_path / "two")) == 0
    assert main([str(teacher), *words(tmp_path / "other.pth", photos, tmp_path / "both")]) == 0
    found = []
    for folder in (cache, tmp_path / "two", tmp_path / "both"):
        said = [(r["classes"], np.exp(np.float32(r["log_probabilities"]))) for r in rows(folder)]
        tables = [dict(zip(*pair, strict=True)) for pair in said]
        found.append(np.array([[table[label] for label in range(3)] for table in tables]))
    one, two, both = found
    assert both == pytest.approx((one + two) / 2, rel=2e-3, abs=1e-3) and np.abs(one - two).max() > 0.05
    classifiers = [np.load(folder / "classifier.npy") for folder in (cache, tmp_path / "both")]
    assert classifiers[1] == pytest.approx(np.concatenate([classifiers[0]] * 2, axis=1) / np.sqrt(2), abs=1e-3)


def test_check_compares_one_image_of_a_hundred(
    cache: Path, photos: Path, teacher: Path, tmp_path: Path, capsys: Any
) -> None:
    assert main(words(teacher, photos, cache, "--check")) == 0
    assert "=> checked: 3 samples of 1 images scored again" in capsys.readouterr().out
    folder = Path(shutil.copytree(cache, tmp_path / "cache"))
    table = pq.read_table(folder / "000000.parquet")
    values = [[-9.0, -9.0, 0.0], *table.column("log_probabilities").to_pylist()[1:]]
    column = table.schema.get_field_index("log_probabilities")
    import pyarrow as pa

    flat = pa.array(np.array(values, np.float16).reshape(-1), pa.float16())
    other = table.set_column(column, table.schema.field(column), pa.FixedSizeListArray.from_arrays(flat, 3))
    pq.write_table(other, folder / "000000.parquet")
    assert main(words(teacher, photos, folder, "--check")) == 1
    assert "differ from the teacher's by" in capsys.readouterr().err
    (folder / "000001.parquet").unlink()
    assert main(words(teacher, photos, folder, "--check")) == 2
    assert "lacks 1 of 3 shards, the first 000001.parquet" in capsys.readouterr().err


def test_what_was_begun_otherwise_is_refused(
    cache: Path, photos: Path, teacher: Path, tmp_path: Path, capsys: Any
) -> None:
    for more, said in (
        (["--samples", "4"], "was begun with --samples 3"),
        (["--top-k", "2"], "was begun with --top-k 3"),
        (["--img-size", "24"], "was begun with --img-size 16"),
        (["--teacher-dtype", "bfloat16"], "was begun with --teacher-dtype float32"),
        (["--mixup", "0.2"], "was begun with --mixup 0.0"),
    ):
        assert main(words(teacher, photos, cache, *more)) == 2
        assert said in capsys.readouterr().err
    plan = json.loads((cache / "teacher_cache.json").read_text())
    folder = tmp_path / "versions"
    folder.mkdir()
    plan["versions"]["torch"] = "1.0"
    (folder / "teacher_cache.json").write_text(json.dumps(plan))
    assert main(words(teacher, photos, folder)) == 2
    assert "was begun with torch 1.0" in capsys.readouterr().err
    other = Path(shutil.copytree(photos, tmp_path / "other"))
    (other / "train" / "bar" / "0.png").unlink()
    assert main(words(teacher, other, cache)) == 2
    assert "was begun with 27 images, now 26, other images" in capsys.readouterr().err
    (other / "valid" / "moon").mkdir()
    assert main(words(teacher, other, tmp_path / "new")) == 2
    assert "the teacher has no class moon" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_size_that_is_typed_is_that_of_the_teacher_too(photos: Path, teacher: Path, tmp_path: Path) -> None:
    """Without one, views have the first teacher's size, and another teacher sees them resized."""
    large = {**torch.load(teacher, weights_only=True), "img_size": 24, "resize": 32}
    torch.save(large, tmp_path / "large.pth")
    few = ["-j", "0", "--samples", "1", "--shard-size", "30", str(photos)]
    for name, more, size, sizes, crop in (
        ("own", [str(teacher)], 16, [16], "pad"),  # it was trained with --train-crop pad
        ("both", [str(teacher), str(tmp_path / "large.pth")], 16, [16, 24], "pad"),
        ("large", [str(tmp_path / "large.pth")], 24, [24], "resized"),
        ("typed", ["--img-size", "20", str(teacher), str(tmp_path / "large.pth")], 20, [20, 20], "pad"),
    ):
        assert main([*more, *few, "--output", str(tmp_path / name)]) == 0
        plan = json.loads((tmp_path / name / "teacher_cache.json").read_text())
        assert (plan["views"]["img_size"], plan["sizes"], plan["views"]["train_crop"]) == (size, sizes, crop)


def test_a_broken_image_is_named_or_left_out(photos: Path, teacher: Path, tmp_path: Path, capsys: Any) -> None:
    other = Path(shutil.copytree(photos, tmp_path / "other"))
    (other / "train" / "bar" / "0.png").write_bytes(b"nothing")
    assert main(words(teacher, other, tmp_path / "cache")) == 2
    assert "bar/0.png cannot be read" in capsys.readouterr().err
    assert main(words(teacher, other, tmp_path / "skip", "--bad-images", "skip", "--mixup", "0.2")) == 0
    assert "left out 1 images that cannot be read" in capsys.readouterr().err
    kept = rows(tmp_path / "skip")
    assert len(kept) == 78 and max(row["partner"] for row in kept) <= 25
