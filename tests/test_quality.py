"""The quality table's machinery on two small cells of digits."""

from __future__ import annotations

import hashlib
import tarfile
from pathlib import Path

import pytest
import torch
import yaml

from tests.records import record

ROOT = Path(__file__).parents[1]
CELLS = """
digits:
  base: -a cifar_resnet8_w0.5 --epochs 2 --img-size 16 --train-crop pad --hflip 0 -b 50 --lr 0.05
  teacher: --teacher-arch cifar_resnet8
  teacher-cell: teacher
  cells:
    teacher: {row: the teacher, group: digits, script: main_base, seeds: [0], options: -a cifar_resnet8}
    alone: {row: student alone, group: digits, script: main_base}
    amp: {row: MGD-AMP, group: digits, options: --loss-factor 1e3, start: alone, against: alone}
"""


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    cells = tmp_path / "cells.yaml"
    cells.write_text(CELLS)
    folders = ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")]
    return ["--suite", "digits", "--cells", str(cells), "--seed", "0", "--jobs", "1", *folders]


def test_missing_cells_are_run_cut_ones_gone_on_with_and_complete_ones_kept(
    bench: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from bench_quality import main
    from cells import check_command
    from results_table import read_table

    main(bench)
    table = tmp_path / "results" / "digits.csv"
    found = {record.key: record for record in read_table(table)}
    assert set(found) == {("teacher", 0), ("alone", 0), ("amp", 0)}
    amp = found["amp", 0]
    assert len(amp.curve) == 2 and amp.wall_seconds and amp.wall_seconds > 0
    assert amp.last_top1 == amp.curve[-1]["valid_top1"] > 10 and amp.threads and amp.processor
    weights = (tmp_path / "work" / "digits" / "teacher-0" / "last.pth").read_bytes()
    assert amp.teacher == hashlib.sha256(weights).hexdigest()[:16] and found["alone", 0].teacher == "none"
    assert "--student-resume" in amp.words and str(tmp_path) not in amp.command
    suite = yaml.safe_load(CELLS)["digits"]
    for kept in found.values():
        check_command("digits", suite, kept)
    capsys.readouterr()
    main(bench)
    assert "nothing is missing" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"amp-0 is the finished run whose record is there: remove it"):
        main([*bench, "--only", "amp"])

    remove(table, "amp")
    main(bench)  # the run itself is complete
    assert read_table(table) == list(found[key] for key in sorted(found))

    folder = tmp_path / "work" / "digits" / "amp-0"
    last = torch.load(folder / "last.pth", weights_only=True)
    last["resume"]["epoch"] = 1  # as if it had been cut in the second epoch
    torch.save(last, folder / "last.pth")
    remove(table, "amp")
    (folder / "wall_seconds").unlink()
    main(bench)
    again = next(record for record in read_table(table) if record.cell == "amp")
    assert [epoch["epoch"] for epoch in again.curve] == [0, 1] and again.wall_seconds is None


def remove(table: Path, cell: str) -> None:
    """Take the lines of a cell out of a table and out of its curves."""
    for path in (table, table.with_name(f"{table.stem}_curves.csv")):
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if not line.startswith(f"{cell},")))


def test_a_teacher_is_trained_for_cells_that_name_it_alone(bench: list[str], tmp_path: Path) -> None:
    from bench_quality import main

    main([*bench, "--only", "alone"])
    lines = (tmp_path / "results" / "digits.csv").read_text().splitlines()
    assert [line.split(",")[:2] for line in lines[1:]] == [["alone", "0"]]


def test_the_chosen_images_are_unpacked_beside_a_folder_that_another_process_made_meanwhile(
    tmp_path: Path,
) -> None:
    from prepare_cifar10 import ORDER, prepare

    labels = [line.split()[:3] for line in ORDER.read_text().splitlines()]
    names = [f"train/{label}/{number}.jpg" for label, *numbers in labels for number in numbers] + ["valid/cat/0.jpg"]
    archive = tmp_path / "archive.tar"
    with tarfile.open(archive, "w") as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(f"cifar10/{name}"))
    first = tmp_path / "first"
    prepare(archive, first, per_class=1)
    made = {str(path.relative_to(first)) for path in first.rglob("*.jpg")}
    assert made == {f"train/{label}/{number}.jpg" for label, number, _ in labels} | {"valid/cat/0.jpg"}

    prepare(archive, first, per_class=2)
    assert made == {str(path.relative_to(first)) for path in first.rglob("*.jpg")}  # as the first left it
    assert {path.name for path in tmp_path.iterdir()} == {"archive.tar", "first"}

    prepare(archive, tmp_path / "chosen_on", per_class=1, held_out=1)
    made = {str(path.relative_to(tmp_path / "chosen_on")) for path in (tmp_path / "chosen_on").rglob("*.jpg")}
    trained_on = {f"train/{label}/{number}.jpg" for label, number, _ in labels}
    assert made == trained_on | {f"valid/{label}/{number}.jpg" for label, _, number in labels}

    with pytest.raises(SystemExit, match="lacks 10 of the images"):
        prepare(archive, tmp_path / "second", per_class=3)
    assert not (tmp_path / "second").exists()


def test_cells_that_measure_time_come_last_on_two_threads(
    bench: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bench_quality

    cells = tmp_path / "cells.yaml"
    cells.write_text(CELLS.replace("group: digits, script: main_base}", "group: time, script: main_base}"))
    done: list[tuple[str, int]] = []
    monkeypatch.setattr(bench_quality, "measure", lambda suite, name, *rest: done.append((name, rest[-1])))
    bench_quality.main([*bench, "--threads", "3"])
    assert done == [("teacher", 3), ("amp", 3), ("alone", 2)]


def test_unknown_cells_are_refused(bench: list[str]) -> None:
    from bench_quality import main

    with pytest.raises(SystemExit, match="unknown cells nothing; there are teacher, alone, amp"):
        main([*bench, "--only", "nothing"])


def test_an_unknown_suite_is_refused(bench: list[str]) -> None:
    from bench_quality import main

    with pytest.raises(SystemExit, match="there is no suite digit; there are digits"):
        main([*bench, "--suite", "digit"])


def test_every_cell_is_a_command_that_the_scripts_take(tmp_path: Path) -> None:
    from cells import cell_words, read_suites

    from classification import semi_supervised
    from classification.options.config import parse

    weights = tmp_path / "weights.pth"
    weights.touch()
    number = 0
    for suite in read_suites().values():
        for cell in suite["cells"].values():
            words = cell_words(suite, cell, str(weights), str(weights), given=f"{tmp_path}/", made=str(tmp_path))
            for folder in (Path(word) for word in words if word.startswith(str(tmp_path))):
                folder.mkdir(parents=True, exist_ok=True) if not folder.suffix else None
            if "--teacher-cache" in words:  # a folder that a cell has made
                place = words.index("--teacher-cache")
                words[place : place + 2] = ["--teacher-resume", str(weights)]
            if cell.get("script") == "semi_supervised":
                semi_supervised.parse([str(tmp_path), "--output", str(tmp_path / "semi"), *words])
            else:
                parse([str(tmp_path), *words], "", distillation=cell.get("script") != "main_base")
            number += 1
    assert number > 150


def test_differences_are_paired() -> None:
    from cells import differences

    assert differences([1.0, 2.0, 3.0]) == "+2.00 ± 0.58"
    assert differences([-0.5, 2.0]) == "-0.50, +2.00"  # two make no deviation worth the name


def test_students_of_different_teachers_are_not_compared() -> None:
    from make_tables import check_teacher

    old, alone = record("amp", 0, teacher=None), record("alone", 0, teacher="none")
    first, second = (record("amp", seed, teacher=f"digest {seed}") for seed in (1, 2))
    check_teacher("amp", [old, alone, first, first])
    with pytest.raises(SystemExit, match="amp: amp, seed 1 and amp, seed 2 had different teachers"):
        check_teacher("amp", [alone, first, second])


def test_tables_of_changed_pairs_and_of_time() -> None:
    import make_tables

    results = {
        "amp": {
            0: record("amp", 0, wall_seconds=90.0, curve=[{}, {"flow_changed": 0.1}]),
            1: record("amp", 1, wall_seconds=None, curve=[{"flow_changed": 0.3}]),
        },
        "kept": {0: record("kept", 0, threads=1, wall_seconds=90.0, curve=[{}])},
    }
    cells = {name: {"row": name.upper(), "group": "main"} for name in results}
    changes = make_tables.changes_table(cells, results)
    assert changes.splitlines()[2:] == ["| AMP | 2 | 20.0 |  |  | 20.0 |"]  # it alone matched again
    assert "AMP" not in make_tables.time_table(cells, results)  # cells of other groups had company
    timed = {name: {**cell, "group": "time"} for name, cell in cells.items()}
    times = make_tables.time_table(timed, results)
    assert times.splitlines()[2:3] == ["| AMP | 1.0 | 1.5 | 50.00 |"]  # in one go, on two threads
    assert "KEPT" not in times


def test_a_record_names_its_teacher_by_a_digest(tmp_path: Path) -> None:
    from collect_run import teacher_digest

    weights = tmp_path / "teacher.pth"
    weights.write_bytes(b"abc")  # the SHA-256 of "abc" is in FIPS 180-2
    frozen, trains = {"arch": "a", "resume": "teacher.pth", "frozen": True}, {"arch": "b", "frozen": False}
    stored = tmp_path / "cache" / "teacher_cache.json"
    stored.parent.mkdir()
    stored.write_text('{"teacher": "0123456789abcdef0123"}')
    without_file = {"arch": "a", "resume": None, "frozen": True}
    assert teacher_digest({"teachers": [frozen, without_file]}, tmp_path) == "ba7816bf8f01cfea+pretrained"
    assert teacher_digest({"teachers": [trains]}, tmp_path) == "none"
    cached = {"teachers": [{"arch": "a", "frozen": True}], "teacher_cache": "cache"}
    assert teacher_digest(cached, tmp_path) == "stored 0123456789abcdef"
