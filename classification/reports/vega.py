"""Vega-Lite specifications: the parts that all charts of a page share.

Colours are CSS variables of the page, so that charts follow its light or dark theme.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"  # only a name; nothing is loaded from there
MOST_POINTS = 150  # per curve
COLOURS = [f"var(--c{n})" for n in range(8)]

Spec = dict[str, Any]
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Chart:
    """A chart of the page.

    Args:
        title: above the chart.
        note: below the chart; may be empty.
        spec: its Vega-Lite specification with data.
    """

    title: str
    note: str
    spec: Spec


def make_spec(rows: Rows, height: int, **parts: Any) -> Spec:
    """Return a specification with the width of its container; `parts` are mark, encoding or layers."""
    frame = {"width": "container", "height": height, "autosize": {"type": "fit", "contains": "padding"}}
    return {"$schema": SCHEMA, **frame, "data": {"values": rows}, **parts}


def quantity_axis(field: str, title: str, **more: Any) -> dict[str, Any]:
    """Return the encoding of a quantity, whose axis need not start at zero."""
    scale = {"zero": False, **more.pop("scale", {})}
    return {"field": field, "type": "quantitative", "title": title, "scale": scale, **more}


COLOUR = {"field": "colour", "type": "nominal", "scale": None}
FEW = 10  # up to this range, the axis names every epoch


def epoch_axis(rows: Rows) -> dict[str, Any]:
    """Return the encoding of epochs, the field `e` of the rows, with whole numbers at the axis."""
    epochs = [row["e"] for row in rows]
    few = max(epochs) - min(epochs) <= FEW
    named = {"values": list(range(min(epochs), max(epochs) + 1))} if few else {}
    return quantity_axis("e", "epoch", axis={"format": "d", **named})


def round_value(value: float) -> float:
    """Round to five digits: more are invisible, and make the file larger."""
    return float(f"{value:.5g}")


def thin_out(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return at most `MOST_POINTS` points of a curve, including the first and the last."""
    if len(points) <= MOST_POINTS:
        return list(points)
    return [points[n] for n in np.linspace(0, len(points) - 1, MOST_POINTS).round().astype(int)]
