"""The sections of a page about predictions: classes, confusion, the worst images, calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from classification.errors import one_line
from classification.reports import network_charts
from classification.reports.network_charts import MOST_CLASSES
from classification.reports.networks import Network, NetworkResults
from classification.reports.pictures import photograph
from classification.reports.vega import Chart, round_value

MOST_ROWS = 300  # of the table of classes
MOST_GROUPS = 5  # columns of the table of classes
NUM_WORST = 24  # images
NUM_PAIRS = 20  # of confused classes
MAX_NETWORKS = 6  # networks whose predictions are shown beside an image
SIDE = 96  # px of a photograph


@dataclass(frozen=True)
class Classes:
    """Accuracy by class.

    Args:
        groups: the columns.
        rows: (class, number of images, percent correct per group); None if a group has no such images.
        hidden: number of classes that are left out.
        order: of the rows, in words.
        chart: of the rows, or of the first and the last ones.
    """

    groups: list[str]
    rows: list[tuple[str, int, list[float | None]]]
    hidden: int
    order: str
    chart: Chart


def by_class(networks: Sequence[Network]) -> Classes | None:
    """Return the accuracy of every class, the mean over each group's networks; None if no network has it."""
    scored = [network for network in networks if network.per_class]
    if not scored:
        return None
    first_classes = scored[0].per_class
    comparable = [network for network in scored if set(network.per_class) == set(first_classes)]
    groups = list(dict.fromkeys(network.group for network in comparable))[:MOST_GROUPS]
    members = {group: [network for network in comparable if network.group == group] for group in groups}
    rows = [
        (name, first_classes[name][0], [_accuracy(members[group], name) for group in groups]) for name in first_classes
    ]
    distilled_column = 0  # distilled runs come first; the first group is theirs
    alone_column = next((n for n, group in enumerate(groups) if members[group][0].role == "alone"), distilled_column)
    rows.sort(key=lambda row: _sort_key(row[2], distilled_column, alone_column))
    colours = {group: members[group][0].colour for group in groups}
    drawn_rows = rows
    if len(rows) > MOST_CLASSES:
        drawn_rows = [*rows[: MOST_CLASSES // 2], *rows[-MOST_CLASSES // 2 :]]
    points = [
        {"name": one_line(name), "role": group, "v": round_value(value)}
        for name, _, values in drawn_rows
        for group, value in zip(groups, values, strict=True)
        if value is not None
    ]
    chart = network_charts.per_class(points, colours)
    order = f"From the classes that {groups[distilled_column]} does worst"
    if alone_column != distilled_column:
        order = (
            f"From the largest loss of {groups[distilled_column]} against {groups[alone_column]} to its largest gain"
        )
    return Classes(groups, rows[:MOST_ROWS], max(0, len(rows) - MOST_ROWS), f"{order}.", chart)


def _accuracy(networks: Sequence[Network], name: str) -> float | None:
    images = sum(network.per_class[name][0] for network in networks)
    correct = sum(network.per_class[name][1] for network in networks)
    return 100 * correct / images if images else None


def _sort_key(values: Sequence[float | None], column: int, control_column: int) -> float:
    """Return the sort key of a row: the gain over the control, or the accuracy if there is no control."""
    value, control = values[column], values[control_column]
    if value is None or control is None:
        return 1000.0
    return value - control if column != control_column else value


@dataclass(frozen=True)
class Prediction:
    """The prediction of a network for an image."""

    network: Network
    predicted: str
    probability: float
    right: bool


@dataclass(frozen=True)
class Worst:
    """One of the worst images, with the predictions of several networks."""

    path: str
    picture: str | None
    truth: str
    loss: float
    predictions: list[Prediction]


def shown_networks(networks: Sequence[Network]) -> list[Network]:
    """Return the networks whose predictions are shown: the first of each group."""
    firsts: dict[str, Network] = {}
    for network in networks:
        firsts.setdefault(network.group, network)
    return list(firsts.values())[:MAX_NETWORKS]


def worst_images(results: NetworkResults) -> list[Worst]:
    """Return the images with the largest losses of the first network, with the predictions of several networks."""
    first = results.networks[0].predictions
    assert first is not None
    worst = []
    for index in np.argsort(-np.nan_to_num(first.loss, nan=np.inf), kind="stable")[:NUM_WORST]:
        predictions = []
        for network in shown_networks(results.networks):
            own = network.predictions
            assert own is not None
            predicted = _class_name(results.classes, int(own.predicted[index]))
            predictions.append(Prediction(network, predicted, float(own.probability[index]), bool(own.right[index])))
        truth, path = _class_name(results.classes, int(first.target[index])), results.paths[index]
        worst.append(
            Worst(one_line(results.short(path)), photograph(path, SIDE), truth, float(first.loss[index]), predictions)
        )
    return worst


def _class_name(classes: Sequence[str], index: int) -> str:
    """Return the name of a class; a network may have more outputs than there are classes."""
    return one_line(classes[index]) if index < len(classes) else f"output {index}"


def confused_pairs(results: NetworkResults) -> tuple[list[Network], list[tuple[str, str, list[int]]]]:
    """Return some networks, and (true class, prediction, counts per network) of the first one's most common errors."""
    networks = shown_networks(results.networks)
    counts: list[Mapping[tuple[int, int], int]] = [_count_errors(network) for network in networks]
    pairs = sorted(counts[0], key=lambda pair: (-counts[0][pair], pair))[:NUM_PAIRS]
    names = [(_class_name(results.classes, true), _class_name(results.classes, predicted)) for true, predicted in pairs]
    return networks, [
        (*name, [count.get(pair, 0) for count in counts]) for name, pair in zip(names, pairs, strict=True)
    ]


def _count_errors(network: Network) -> dict[tuple[int, int], int]:
    predictions = network.predictions
    assert predictions is not None
    wrong = ~predictions.right
    pairs, counts = np.unique(
        np.stack([predictions.target[wrong], predictions.predicted[wrong]]), axis=1, return_counts=True
    )
    return {(int(true), int(predicted)): int(count) for (true, predicted), count in zip(pairs.T, counts, strict=True)}


def image_sections(results: NetworkResults) -> dict[str, Any]:
    """Return the values of the template's sections about predictions."""
    first = results.networks[0]
    assert first.predictions is not None
    networks, pairs = confused_pairs(results)
    return {
        "first": first,
        "confusion": network_charts.confusion(
            first.predictions, [one_line(name) for name in results.classes], first.name
        ),
        "confused_by": networks,
        "pairs": pairs,
        "worst": worst_images(results),
        "calibration": network_charts.calibration(shown_networks(results.networks)),
    }
