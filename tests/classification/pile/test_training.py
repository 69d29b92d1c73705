"""Training on lists of images that a teacher labelled."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from classification import main_base
from classification.data.lists import join_pile, read_list
from classification.pile.selection import format_score
from tests.classification.conftest import CLASSES, SMALL, STUDENT, write_photos

LABELLED, PILE = [(f"l{index}", index) for index in range(4)], [(f"p{index}", index) for index in range(10)]


@pytest.mark.parametrize(
    ("share", "labelled", "pile"),
    [(None, 4, 10), (1.0, 0, 10), (0.5, 10, 10), (0.2, 40, 10), (0.9, 4, 36), (10 / 14, 4, 10)],
)
def test_parts_are_mixed_at_a_ratio(share: float | None, labelled: int, pile: int) -> None:
    mixed = [path for path, _ in join_pile(LABELLED, PILE, share)]
    assert [sum(path.startswith(kind) for path in mixed) for kind in "lp"] == [labelled, pile]
    counts = [mixed.count(path) for path, _ in (LABELLED if labelled else []) + PILE]
    assert min(counts) >= 1 and max(counts[:4]) - min(counts[:4]) <= 1 and max(counts[-10:]) - min(counts[-10:]) <= 1


@pytest.mark.parametrize("score", [-0.0, 0.0, -1.0, -12.0, -1e-30, -3.4e38, float("-inf"), -0.1])
def test_a_score_may_follow_the_label(score: float, tmp_path: Path) -> None:
    for name in ("a b 7", "c"):
        (tmp_path / name).touch()
    (tmp_path / "list").write_text(
        f"a b 7 2 {format_score(score)}\nc 1 {format_score(score)}\n{tmp_path / 'c'} 0 -0.5\n"
    )
    found = read_list(tmp_path / "list", tmp_path, 3)
    assert found == [(str(tmp_path / "a b 7"), 2), (str(tmp_path / "c"), 1), (str(tmp_path / "c"), 0)]
    assert [label for _, label in read_list(tmp_path / "list", tmp_path, labels=False)] == [-1, -1, -1]


@pytest.fixture(scope="module")
def pile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_photos(tmp_path_factory.mktemp("pile"), train=6, valid=1)
    lines = [f"{name}/{index}.png {label} -0.5\n" for label, name in enumerate(CLASSES) for index in range(6)]
    (folder / "list").write_text("".join(lines))
    (folder / "list.json").write_text(json.dumps({"format": 1, "classes": list(CLASSES)}))
    return folder


def words(photos: Path, pile: Path, output: Path, *more: str) -> list[str]:
    lists = ["--pile-list", str(pile / "list"), "--pile-root", str(pile / "train")]
    return [str(photos), "-a", STUDENT, *SMALL, *lists, "--output", str(output), *more]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Photographs of which none is in the pile."""
    import numpy as np
    from PIL import Image

    root = write_photos(tmp_path / "data", train=2, valid=2)
    for path in root.rglob("*.png"):
        Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    return root


def test_a_run_trains_on_both_and_resumes_to_the_same_weights(
    data: Path, pile: Path, tmp_path: Path, capsys: Any
) -> None:
    more = ["--pile-share", "0.6", "--epochs", "2"]
    assert main_base.main(words(data, pile, tmp_path / "whole", *more)) == 0
    assert "18 images of" in (out := capsys.readouterr().out) and "30 images per epoch" in out
    assert main_base.main(words(data, pile, tmp_path / "run", *more[:2], "--epochs", "1")) == 0
    assert main_base.main(["--resume", str(tmp_path / "run"), "--epochs", "2"]) == 0
    whole, resumed = (torch.load(tmp_path / name / "last.pth", weights_only=True) for name in ("whole", "run"))
    assert all(torch.equal(value, resumed["state_dict"][name]) for name, value in whole["state_dict"].items())
    kept = json.loads((tmp_path / "run" / "config.json").read_text())["options"]
    assert kept["pile_list"] == [str(pile / "list")] and kept["pile_share"] == 0.6


def test_the_pile_alone(data: Path, pile: Path, tmp_path: Path, capsys: Any) -> None:
    assert main_base.main(words(data, pile, tmp_path / "run", "--pile-share", "1", "--epochs", "1")) == 0
    assert "18 images per epoch" in capsys.readouterr().out


def test_pseudo_labels_need_no_labelled_images(data: Path, pile: Path, tmp_path: Path) -> None:
    found = []
    for name, more in (("share", ["--pile-share", "1"]), ("pseudo", ["--labels", "pseudo"])):
        if name == "pseudo":
            shutil.rmtree(data / "train")  # valid/ names the classes
        assert main_base.main(words(data, pile, tmp_path / name, *more, "--epochs", "1")) == 0
        found.append(torch.load(tmp_path / name / "best.pth", weights_only=True)["state_dict"])
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    assert json.loads((tmp_path / "pseudo" / "config.json").read_text())["options"]["labels"] == "pseudo"
    assert main_base.main(["--resume", str(tmp_path / "pseudo"), "--epochs", "2"]) == 0


def test_pseudo_labels_go_with_a_list(data: Path, pile: Path, tmp_path: Path, capsys: Any) -> None:
    base = [str(data), "-a", STUDENT, *SMALL, "--labels", "pseudo", "--output", str(tmp_path / "run")]
    assert "--labels pseudo needs --pile-list: name a list" in refused(base, capsys)
    base = words(data, pile, tmp_path / "run", "--labels", "pseudo", "--epochs", "1")
    assert "--pile-share has no effect here: it works only with --labels true" in refused(
        [*base, "--pile-share", "1"], capsys
    )


def test_soft_labels_are_the_scores_of_an_image() -> None:
    import math

    from classification.data.soft_labels import SoftLabels

    samples = [("a", 2), ("b", 1), ("c", 0)]
    soft = {"a": ((2, 0.75), (0, 0.25)), "c": ((0, 1.0),)}
    targets = SoftLabels(samples, soft, 3, torch.device("cpu"))(torch.tensor([0, 1, 2, 0]))
    assert targets.tolist() == [[0.25, 0, 0.75], [0, 1, 0], [1, 0, 0], [0.25, 0, 0.75]]
    assert math.isclose(float(targets.sum()), 4)


def test_lines_of_an_image_become_one_example(tmp_path: Path) -> None:
    from classification.data.soft_labels import merge_soft_labels
    from classification.errors import UserError

    # exp(-0.5) / (exp(-0.5) + exp(-1.5)) = 1 / (1 + 1/e)
    lines = "a 0 -1.5\nb 1 -0.25\na 2 -0.5\n\nc 1 -inf\n"
    (tmp_path / "list").write_text(lines)
    for name in "abc":
        (tmp_path / name).touch()
    samples = read_list(tmp_path / "list", tmp_path, 3)
    found, soft = merge_soft_labels([str(tmp_path / "list")], samples)
    paths = [str(tmp_path / name) for name in "abc"]
    assert found == [(paths[0], 2), (paths[1], 1), (paths[2], 1)]
    assert dict(soft[paths[0]]) == pytest.approx({2: 0.7310586, 0: 0.2689414})
    assert soft[paths[1]] == ((1, 1.0),) and soft[paths[2]] == ((1, 1.0),)
    (tmp_path / "list").write_text("a 0 -1.5\nb 1\n")
    with pytest.raises(UserError, match="line 2 has no score: --pile-targets soft needs one per line"):
        merge_soft_labels([str(tmp_path / "list")], samples[:2])
    (tmp_path / "list").write_text("")  # as a pipe, which is empty when it is read again
    with pytest.raises(UserError, match="had 4 lines when it was first read, and now 0: --pile-targets soft needs"):
        merge_soft_labels([str(tmp_path / "list")], samples)


def test_a_run_on_soft_labels_has_the_loss_of_the_formula(data: Path, pile: Path, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "soft"
    pairs = [(f"{name}/0.png", label) for k, name in enumerate(CLASSES) for label in (k, (k + 1) % 3)]
    file.write_text("".join(f"{path} {label} -1.0\n" for path, label in pairs))
    more = ["--pile-list", str(file), "--pile-root", str(pile / "train"), "--pile-share", "1", "--pile-targets", "soft"]
    base = [str(data), "-a", STUDENT, *SMALL, "--epochs", "8", "--output", str(tmp_path / "run")]
    assert main_base.main([*base, *more]) == 0
    assert "3 images per epoch" in capsys.readouterr().out
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    # No logits are right for two classes at once: the entropy of a coin, log 2, is the least loss.
    assert min(record["train_loss"] for record in records) >= 0.6931
    base[-1] = str(tmp_path / "other")
    assert "--pile-targets soft does not work with --mixup" in refused([*base, *more, "--mixup", "0.2"], capsys)


def refused(words: list[str], capsys: Any) -> str:
    capsys.readouterr()
    assert main_base.main(words) == 2
    error: str = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_what_is_wrong_with_a_pile(data: Path, pile: Path, tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    (tmp_path / "other").write_text((pile / "list").read_text())
    (tmp_path / "other.json").write_text(json.dumps({"classes": ["bar", "cat", "sky"]}))
    lists = ["--pile-list", str(tmp_path / "other"), "--pile-root", str(pile / "train")]
    base = [str(data), "-a", STUDENT, *SMALL, "--epochs", "1", "--output", str(run)]
    assert "its class 1 is 'cat', but 'dot' in the data" in refused([*base, *lists], capsys)
    (tmp_path / "gone").write_text("bar/0.png 0 -0.5\nbar/77.png 0 -0.5\n")
    lists[1] = str(tmp_path / "gone")
    assert "line 2: 'bar/77.png' is not a file in" in refused([*base, *lists], capsys)
    held = tmp_path / "held"
    held.write_text("valid/bar/0.png 0 -0.5\n")
    lists = ["--pile-list", str(held), "--pile-root", str(data)]
    assert "--pile-list holds 1 image of valid, for example" in refused([*base, *lists], capsys)
    assert "--pile-share has no effect here: it works only with --pile-list" in refused(
        [*base, "--pile-share", "1"], capsys
    )
    assert "--pile-list needs the name of a file or folder" in refused([*base, "--pile-list", ""], capsys)
    assert not run.exists()
