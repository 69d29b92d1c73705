from __future__ import annotations

import io
import json
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from classification.errors import UserError
from classification.runs.metrics import Journal, Means, hits, improves
from classification.runs.tracking import tag_of
from classification.runs.world import World


def events(folder: Path) -> Iterator[Event]:
    """Read TensorBoard files as they lie on disk: length (8 bytes), check (4), event, check (4)."""
    for path in sorted(folder.glob("events.*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def test_hits_are_counted_among_the_first_and_the_first_five() -> None:
    logits = torch.arange(7.0).expand(7, 7)  # class 6 first, then 5, 4, 3, 2
    assert hits(logits, torch.arange(7)).tolist() == [1, 5]
    assert hits(logits[:, :3], torch.tensor([0, 1, 2, 2, 0, 1, 2])).tolist() == [3, 7]


def test_means_weigh_by_images_and_stay_exact() -> None:
    means = Means(torch.device("cpu"))
    assert means.means(World()) == {}
    means.add({"loss": torch.tensor([1.0, 3.0]), "ce": torch.tensor(2.0**24)}, 1)
    means.add({"loss": torch.tensor(5.0)}, 3)
    means.add({"ce": torch.tensor(1.0)}, 1)
    assert means.means(World()) == {"loss": 17 / 4, "ce": (2**24 + 1) / 2}  # the latter is no float32


def test_means_go_on_from_a_saved_state() -> None:
    means, restored = Means(torch.device("cpu")), Means(torch.device("cpu"))
    means.add({"loss": torch.tensor(2.0)}, 3)
    restored.load_state_dict(means.state_dict(), World())
    restored.add({"loss": torch.tensor(6.0)}, 1)
    assert restored.means(World()) == {"loss": 3.0}
    with pytest.raises(ValueError, match="complex"):
        restored.load_state_dict({"totals": {"loss": torch.tensor(1j)}, "counts": {"loss": 1}}, World())


def test_an_epoch_is_a_line_and_an_event_and_a_second_start_drops_what_is_written_again(tmp_path: Path) -> None:
    for start, numbers in ((0, (0, 1, 2)), (1, (1,))):
        journal = Journal(tmp_path, start)
        for number in numbers:
            journal.write({"epoch": number, "valid_top1": 10.0 * number + start, "kind": "x"})
        journal.close()
        for path in tmp_path.glob("events.out.*"):  # two of one second would have one name
            path.rename(tmp_path / f"events.{start}")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line["valid_top1"]) for line in lines] == [(0, 0.0), (1, 11.0)]
    found = [(event.step, value.tag) for event in events(tmp_path) for value in event.summary.value]
    assert found == [(epoch, "accuracy/valid_top1") for epoch in (0, 1, 2, 1)]
    # TensorBoard forgets the first run's epochs 1 and 2 where a session starts again at 1.
    assert [event.step for event in events(tmp_path) if event.session_log.status] == [1]


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("train_loss", "loss/train_loss"),
        ("valid_loss_peer1", "loss/valid_loss_peer1"),
        ("valid_top5", "accuracy/valid_top5"),
        ("train_top1", "accuracy/train_top1"),
        ("train_mgd", "terms/train_mgd"),
        ("train_mgd_weighted", "terms_weighted/train_mgd_weighted"),
        ("gradient_share_kd", "gradient_share/gradient_share_kd"),
        ("ofd_flow_cost", "flow/ofd_flow_cost"),
        ("match_seconds", "flow/match_seconds"),
        ("train_seconds", "run/train_seconds"),
        ("learning_rate", "run/learning_rate"),
    ],
)
def test_tags_are_grouped(name: str, tag: str) -> None:
    assert tag_of(name) == tag


def test_a_matching_is_a_picture_at_its_epoch(tmp_path: Path) -> None:
    (tmp_path / "flow").mkdir()
    cost, index = np.array([[2.0, 1.0], [0.0, 2.0]]), np.array([[1, 0]])
    np.savez(tmp_path / "flow" / "0000.npz", epoch=1, cost0=cost, index0=index, num_teacher0=2, total_cost0=1.0)
    journal = Journal(tmp_path)
    for epoch in range(3):
        journal.write({"epoch": epoch})
    journal.close()
    found = [(event.step, value) for event in events(tmp_path) for value in event.summary.value]
    assert [(step, value.tag) for step, value in found] == [(1, "flow/stage_1")]
    picture = Image.open(io.BytesIO(found[0][1].image.encoded_image_string))
    # The pair of cost 0 is the first on the diagonal, and white; that of cost 1 is the second.
    assert np.asarray(picture.convert("L")).tolist() == [[255, 0], [0, 127]]


def test_a_cut_line_is_dropped_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"epoch": 0}\n{"epoch": 1}\n{"epo')
    Journal(tmp_path, 2).close()
    assert path.read_text() == '{"epoch": 0}\n{"epoch": 1}\n'
    path.write_text('{"epoch": 0}\n{"step": 1}\n')
    with pytest.raises(UserError, match=r"step.* is not a record of an epoch; remove the line"):
        Journal(tmp_path, 2)


@pytest.mark.parametrize(
    ("measure", "value", "best", "better"),
    [
        ("top1", 50.0, None, True),
        ("top1", 50.0, 50.0, False),
        ("macro_f1", 51.0, 50.0, True),
        ("loss", 1.0, 2.0, True),
        ("loss", 2.0, 1.0, False),
        ("loss", float("nan"), None, False),
        ("loss", float("inf"), 1.0, False),
    ],
)
def test_an_epoch_is_better(measure: str, value: float, best: float | None, better: bool) -> None:
    assert improves(measure, value, best) is better
