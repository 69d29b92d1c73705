"""The sections of a page that are about images: classes, confusion, the worst images, calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from classification.errors import one_line
from classification.reports import network_charts
from classification.reports.network_charts import MOST_CLASSES
from classification.reports.networks import Network, Tried
from classification.reports.pictures import photograph
from classification.reports.vega import Chart, rounded

MOST_ROWS = 300  # of the table of classes
MOST_GROUPS = 5  # columns of it
NUM_WORST = 24
NUM_PAIRS = 20  # of confused classes
NUM_VOICES = 6  # networks whose answers are shown beside an image
SIDE = 96  # pixels of a photograph


@dataclass(frozen=True)
class Classes:
    """Accuracy by class.

    Args:
        groups: the columns.
        rows: class, images, then percent per group, None where a group has no such class.
        hidden: classes that are left out.
        order: of the rows, in words.
        chart: of the rows, or of those that differ most.
    """

    groups: list[str]
    rows: list[tuple[str, int, list[float | None]]]
    hidden: int
    order: str
    chart: Chart


def by_class(networks: Sequence[Network]) -> Classes | None:
    """Return the accuracy of every class, the mean over the networks of each group; None where none is known."""
    known = [network for network in networks if network.per_class]
    if not known:
        return None
    first = known[0].per_class
    same = [network for network in known if set(network.per_class) == set(first)]
    groups = list(dict.fromkeys(network.group for network in same))[:MOST_GROUPS]
    members = {group: [network for network in same if network.group == group] for group in groups}
    rows = [(name, first[name][0], [_accuracy(members[group], name) for group in groups]) for name in first]
    ours = 0  # the column of the distilled runs, and that of those alone
    theirs = next((n for n, group in enumerate(groups) if members[group][0].role == "alone"), ours)
    rows.sort(key=lambda row: _gap(row[2], ours, theirs))
    colours = {group: members[group][0].colour for group in groups}
    drawn = rows
    if len(rows) > MOST_CLASSES:
        drawn = [*rows[: MOST_CLASSES // 2], *rows[-MOST_CLASSES // 2 :]]
    points = [
        {"name": one_line(name), "role": group, "v": rounded(value)}
        for name, _, values in drawn
        for group, value in zip(groups, values, strict=True)
        if value is not None
    ]
    chart = network_charts.per_class(points, colours)
    order = f"From the classes that {groups[ours]} does worst"
    if theirs != ours:
        order = f"From the largest loss of {groups[ours]} against {groups[theirs]} to its largest gain"
    return Classes(groups, rows[:MOST_ROWS], max(0, len(rows) - MOST_ROWS), f"{order}.", chart)


def _accuracy(networks: Sequence[Network], name: str) -> float | None:
    images = sum(network.per_class[name][0] for network in networks)
    correct = sum(network.per_class[name][1] for network in networks)
    return 100 * correct / images if images else None


def _gap(values: Sequence[float | None], ours: int, theirs: int) -> float:
    """Return what rows are sorted by: the gain over the control, or the accuracy where there is no control."""
    own, other = values[ours], values[theirs]
    if own is None or other is None:
        return 1000.0
    return own - other if ours != theirs else own


@dataclass(frozen=True)
class Answer:
    """What a network says of an image."""

    network: Network
    said: str
    probability: float
    right: bool


@dataclass(frozen=True)
class Worst:
    """An image of the worst."""

    path: str
    picture: str | None
    truth: str
    loss: float
    answers: list[Answer]


def voices(networks: Sequence[Network]) -> list[Network]:
    """Return the networks whose answers are shown: the first of every group, the first of all among them."""
    firsts: dict[str, Network] = {}
    for network in networks:
        firsts.setdefault(network.group, network)
    return list(firsts.values())[:NUM_VOICES]


def worst_images(tried: Tried) -> list[Worst]:
    """Return the images of the largest loss of the first network, and what each network says of them."""
    first = tried.networks[0].predictions
    assert first is not None
    found = []
    for index in np.argsort(-np.nan_to_num(first.loss, nan=np.inf), kind="stable")[:NUM_WORST]:
        answers = []
        for network in voices(tried.networks):
            own = network.predictions
            assert own is not None
            said = _class(tried.classes, int(own.predicted[index]))
            answers.append(Answer(network, said, float(own.probability[index]), bool(own.right[index])))
        truth, path = _class(tried.classes, int(first.target[index])), tried.paths[index]
        found.append(
            Worst(one_line(tried.short(path)), photograph(path, SIDE), truth, float(first.loss[index]), answers)
        )
    return found


def _class(classes: Sequence[str], index: int) -> str:
    """Name a class; a network may have more outputs than there are classes."""
    return one_line(classes[index]) if index < len(classes) else f"output {index}"


def confused_pairs(tried: Tried) -> tuple[list[Network], list[tuple[str, str, list[int]]]]:
    """Return the networks of `voices`, and the pairs of classes that the first confuses most: counts per network."""
    networks = voices(tried.networks)
    counts: list[Mapping[tuple[int, int], int]] = [_mistakes(network) for network in networks]
    pairs = sorted(counts[0], key=lambda pair: (-counts[0][pair], pair))[:NUM_PAIRS]
    names = [(_class(tried.classes, true), _class(tried.classes, said)) for true, said in pairs]
    return networks, [
        (*name, [count.get(pair, 0) for count in counts]) for name, pair in zip(names, pairs, strict=True)
    ]


def _mistakes(network: Network) -> dict[tuple[int, int], int]:
    found = network.predictions
    assert found is not None
    wrong = ~found.right
    pairs, counts = np.unique(np.stack([found.target[wrong], found.predicted[wrong]]), axis=1, return_counts=True)
    return {(int(true), int(said)): int(count) for (true, said), count in zip(pairs.T, counts, strict=True)}


def image_sections(tried: Tried) -> dict[str, Any]:
    """Return what the template shows of predictions."""
    first = tried.networks[0]
    assert first.predictions is not None
    networks, pairs = confused_pairs(tried)
    return {
        "first": first,
        "confusion": network_charts.confusion(
            first.predictions, [one_line(name) for name in tried.classes], first.name
        ),
        "confused_by": networks,
        "pairs": pairs,
        "worst": worst_images(tried),
        "calibration": network_charts.calibration(voices(tried.networks)),
    }
