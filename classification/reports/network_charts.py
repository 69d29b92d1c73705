"""Charts of networks: accuracy against cost, classes, confusion, calibration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from classification.reports.networks import Network
from classification.reports.vega import COLOUR, Chart, Rows, make_spec, quantity_axis, round_value
from classification.runs.scores import BINS, Predictions

MOST_CLASSES = 40  # in a chart
MOST_LABELS = 9  # with more networks, names are not drawn beside the points
SHAPES = {"orient": "top", "title": None, "symbolFillColor": "var(--soft)", "symbolStrokeColor": "var(--soft)"}


def scatter(networks: Sequence[Network], x: Mapping[str, float], title: str, axis: str) -> Chart | None:
    """Draw top-1 against a cost of the networks; None if fewer than two networks have both.

    Args:
        networks: of the report.
        x: {name of a network: cost}.
        title: of the chart.
        axis: title of the cost axis.
    """
    rows: Rows = [
        {
            "x": round_value(x[n.name]),
            "y": round_value(n.top1),
            "name": n.name,
            "role": n.role,
            "colour": n.colour,
            "of": n.source,
        }
        for n in networks
        if n.name in x and n.top1 is not None
    ]
    if len(rows) < 2:
        return None
    xs = [float(row["x"]) for row in rows]
    middle = (min(xs) + max(xs)) / 2
    rows = _with_sides(rows, middle)
    is_log = min(xs) > 0 and max(xs) > 5 * min(xs)
    pad = (max(xs) / min(xs)) ** 0.15 if is_log else max((max(xs) - min(xs)) * 0.1, 0.05 * max(xs))
    domain = [min(xs) / pad, max(xs) * pad] if is_log else [min(xs) - pad, max(xs) + pad]
    shapes = {"domain": ["distilled", "alone", "teacher"], "range": ["circle", "square", "triangle-up"]}
    position = {
        "x": quantity_axis("x", axis, scale={"type": "log" if is_log else "linear", "domain": domain, "nice": False}),
        "y": quantity_axis("y", "top-1, %", scale={"padding": 14}),
        "color": COLOUR,
    }
    tooltip = [{"field": "name"}, {"field": "role"}, {"field": "y", "title": "top-1"}, {"field": "x", "title": axis}]
    points = {
        "mark": {"type": "point", "filled": True, "size": 110, "opacity": 0.9},
        "encoding": {
            **position,
            "shape": {"field": "role", "scale": shapes, "legend": SHAPES},
            "tooltip": [*tooltip, {"field": "of", "title": "from"}],
        },
    }
    sides = {row["side"] for row in rows} - {"hidden"}  # Vega logs an error for a layer without data
    layers = (
        [points, *(_name_layer(position, side) for side in sorted(sides))] if len(rows) <= MOST_LABELS else [points]
    )
    return Chart(title, "", make_spec(rows, 300, layer=layers))


def _with_sides(rows: Rows, middle: float) -> Rows:
    """Add to each row the `side` of its point on which the name is drawn, or "hidden" if it would overlap another."""
    ys = [row["y"] for row in rows]
    distance = 0.05 * (max(ys) - min(ys))
    placed: Rows = []
    for row in rows:
        side = "left" if row["x"] <= middle else "right"
        overlaps = any(other["side"] == side and abs(other["y"] - row["y"]) <= distance for other in placed)
        placed.append({**row, "side": "hidden" if overlaps else side})
    return placed


def _name_layer(position: Mapping[str, Any], side: str) -> dict[str, Any]:
    """Return the layer of the names beside the points of one side."""
    mark = {"type": "text", "align": side, "dx": 10 if side == "left" else -10, "fontSize": 11, "limit": 150}
    return {
        "transform": [{"filter": {"field": "side", "equal": side}}],
        "mark": mark,
        "encoding": {**position, "text": {"field": "name"}},
    }


def per_class(rows: Rows, colours: Mapping[str, str]) -> Chart:
    """Draw the accuracy of every class by group.

    Args:
        rows: with `name` of the class, `role` (the group) and `v`, in percent.
        colours: of the groups.
    """
    roles = {"domain": list(colours), "range": list(colours.values())}
    names = list(dict.fromkeys(row["name"] for row in rows))
    spec = make_spec(
        rows,
        18 * len(names) + 60,
        layer=[
            {
                "mark": {"type": "rule", "opacity": 0.35},
                "encoding": {
                    "x": {"field": "v", "aggregate": "min", "type": "quantitative", "title": "correct, %"},
                    "x2": {"field": "v", "aggregate": "max"},
                    "y": {"field": "name", "type": "nominal", "sort": None, "title": None},
                },
            },
            {
                "mark": {"type": "point", "filled": True, "size": 80},
                "encoding": {
                    "x": {"field": "v", "type": "quantitative", "title": "correct, %", "scale": {"zero": False}},
                    "y": {"field": "name", "type": "nominal", "sort": None, "title": None},
                    "color": {
                        "field": "role",
                        "type": "nominal",
                        "scale": roles,
                        "legend": {"orient": "top", "title": None},
                    },
                    "tooltip": [
                        {"field": "name", "title": "class"},
                        {"field": "role"},
                        {"field": "v", "title": "correct, %"},
                    ],
                },
            },
        ],
    )
    return Chart("Correct images by class", "", spec)


def confusion(predictions: Predictions, classes: Sequence[str], name: str) -> Chart | None:
    """Draw the confusion matrix of a network; None if there are too many classes."""
    size = max(len(classes), int(predictions.predicted.max()) + 1)
    if size > MOST_CLASSES:
        return None
    names = [*classes, *(str(n) for n in range(len(classes), size))]
    counts = np.zeros((size, size), dtype=np.int64)
    np.add.at(counts, (predictions.target, predictions.predicted), 1)
    rows = [
        {"t": names[t], "p": names[p], "n": int(counts[t, p]), "v": round_value(counts[t, p] / counts[t].sum())}
        for t, p in zip(*np.nonzero(counts), strict=True)
    ]
    spec = make_spec(
        rows,
        max(200, 22 * size + 90),
        mark={"type": "rect", "color": "var(--c0)"},
        encoding={
            "x": {"field": "p", "type": "nominal", "sort": names, "title": "predicted", "scale": {"domain": names}},
            "y": {"field": "t", "type": "nominal", "sort": names, "title": "true class", "scale": {"domain": names}},
            "opacity": {
                "field": "v",
                "type": "quantitative",
                "scale": {"domain": [0, 1], "range": [0.04, 1]},
                "legend": None,
            },
            "tooltip": [
                {"field": "t", "title": "true"},
                {"field": "p", "title": "predicted"},
                {"field": "n", "title": "images"},
            ],
        },
    )
    return Chart(f"Confusion of {name}", "The stronger the colour, the larger the share of the true class.", spec)


def calibration(networks: Sequence[Network]) -> Chart:
    """Draw accuracy against the probability of the predicted class, in bins of equal width."""
    rows: Rows = []
    for number, network in enumerate(networks):
        predictions = network.predictions
        assert predictions is not None
        bins = np.clip(np.ceil(np.nan_to_num(predictions.probability) * BINS).astype(int) - 1, 0, BINS - 1)
        for bin_number in np.unique(bins):
            inside = bins == bin_number
            confidence, accuracy = (
                float(predictions.probability[inside].mean()),
                float(predictions.right[inside].mean()),
            )
            if math.isfinite(confidence):
                about = {"r": number, "name": network.name, "colour": network.colour, "n": int(inside.sum())}
                rows.append({"x": round_value(confidence), "y": round_value(accuracy), **about})
    ends = [{"x": 0, "y": 0}, {"x": 1, "y": 1}]
    unit = {"scale": {"domain": [0, 1]}, "axis": {"format": "%", "tickCount": 5}}
    x = {"field": "x", "type": "quantitative", "title": "probability of the predicted class", **unit}
    y = {"field": "y", "type": "quantitative", "title": "correct", **unit}
    lines = {
        "mark": {"type": "line", "point": {"size": 36}, "strokeWidth": 1.6},
        "encoding": {
            "x": x,
            "y": y,
            "detail": {"field": "r", "type": "nominal"},
            "color": COLOUR,
            "tooltip": [{"field": "name"}, {"field": "n", "title": "images"}, {"field": "x"}, {"field": "y"}],
        },
    }
    diagonal = {
        "data": {"values": ends},
        "mark": {"type": "line", "strokeDash": [4, 4], "color": "var(--soft)"},
        "encoding": {"x": x, "y": y},
    }
    note = "On the dashed line, a network is as sure as it is right; below it, it is too sure."
    return Chart("Calibration", note, make_spec(rows, 320, layer=[diagonal, lines]))
