"""Charts of networks: accuracy against cost, classes, confusion, calibration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from classification.reports.networks import Network
from classification.reports.vega import COLOUR, Chart, Rows, axis_of, rounded, spec_of
from classification.runs.scores import BINS, Predictions

MOST_CLASSES = 40  # of a chart
MOST_LABELS = 9  # networks that are named beside their points
SHAPES = {"orient": "top", "title": None, "symbolFillColor": "var(--soft)", "symbolStrokeColor": "var(--soft)"}


def scatter(networks: Sequence[Network], x: Mapping[str, float], title: str, axis: str) -> Chart | None:
    """Draw top-1 against what a network costs; None where fewer than two are known.

    Args:
        networks: of the report.
        x: the cost of each, by name.
        title: of the chart.
        axis: title of the axis.
    """
    rows: Rows = [
        {
            "x": rounded(x[n.name]),
            "y": rounded(n.top1),
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
    rows = _sided(rows, middle)
    wide = min(xs) > 0 and max(xs) > 5 * min(xs)
    pad = (max(xs) / min(xs)) ** 0.15 if wide else max((max(xs) - min(xs)) * 0.1, 0.05 * max(xs))
    domain = [min(xs) / pad, max(xs) * pad] if wide else [min(xs) - pad, max(xs) + pad]
    shapes = {"domain": ["distilled", "alone", "teacher"], "range": ["circle", "square", "triangle-up"]}
    place = {
        "x": axis_of("x", axis, scale={"type": "log" if wide else "linear", "domain": domain, "nice": False}),
        "y": axis_of("y", "top-1, %", scale={"padding": 14}),
        "color": COLOUR,
    }
    tips = [{"field": "name"}, {"field": "role"}, {"field": "y", "title": "top-1"}, {"field": "x", "title": axis}]
    points = {
        "mark": {"type": "point", "filled": True, "size": 110, "opacity": 0.9},
        "encoding": {
            **place,
            "shape": {"field": "role", "scale": shapes, "legend": SHAPES},
            "tooltip": [*tips, {"field": "of", "title": "from"}],
        },
    }
    sides = {row["side"] for row in rows} - {"hidden"}  # a layer without names would be an error on the console
    layers = [points, *(_names(place, side) for side in sorted(sides))] if len(rows) <= MOST_LABELS else [points]
    return Chart(title, "", spec_of(rows, 300, layer=layers))


def _sided(rows: Rows, middle: float) -> Rows:
    """Add the `side` of its point that a name begins at; of names that would lie over each other, the first is kept."""
    ys = [row["y"] for row in rows]
    apart = 0.05 * (max(ys) - min(ys))
    found: Rows = []
    for row in rows:
        side = "left" if row["x"] <= middle else "right"
        hidden = any(other["side"] == side and abs(other["y"] - row["y"]) <= apart for other in found)
        found.append({**row, "side": "hidden" if hidden else side})
    return found


def _names(place: Mapping[str, Any], side: str) -> dict[str, Any]:
    """Return the layer of the names beside the points of one side."""
    mark = {"type": "text", "align": side, "dx": 10 if side == "left" else -10, "fontSize": 11, "limit": 150}
    return {
        "transform": [{"filter": {"field": "side", "equal": side}}],
        "mark": mark,
        "encoding": {**place, "text": {"field": "name"}},
    }


def per_class(rows: Rows, colours: Mapping[str, str]) -> Chart:
    """Draw the accuracy of every class by role.

    Args:
        rows: `name`, `role` and `v`, in percent.
        colours: by role.
    """
    roles = {"domain": list(colours), "range": list(colours.values())}
    names = list(dict.fromkeys(row["name"] for row in rows))
    spec = spec_of(
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


def confusion(found: Predictions, classes: Sequence[str], name: str) -> Chart | None:
    """Draw which classes a network takes for which; None where there are too many to draw."""
    size = max(len(classes), int(found.predicted.max()) + 1)
    if size > MOST_CLASSES:
        return None
    names = [*classes, *(str(n) for n in range(len(classes), size))]
    counts = np.zeros((size, size), dtype=np.int64)
    np.add.at(counts, (found.target, found.predicted), 1)
    rows = [
        {"t": names[t], "p": names[p], "n": int(counts[t, p]), "v": rounded(counts[t, p] / counts[t].sum())}
        for t, p in zip(*np.nonzero(counts), strict=True)
    ]
    spec = spec_of(
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
    """Draw accuracy against the probability of the predicted class, in equal bins."""
    rows: Rows = []
    for number, network in enumerate(networks):
        found = network.predictions
        assert found is not None
        place = np.clip(np.ceil(np.nan_to_num(found.probability) * BINS).astype(int) - 1, 0, BINS - 1)
        for one in np.unique(place):
            inside = place == one
            said, right = float(found.probability[inside].mean()), float(found.right[inside].mean())
            if math.isfinite(said):
                about = {"r": number, "name": network.name, "colour": network.colour, "n": int(inside.sum())}
                rows.append({"x": rounded(said), "y": rounded(right), **about})
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
    return Chart("Calibration", note, spec_of(rows, 320, layer=[diagonal, lines]))
