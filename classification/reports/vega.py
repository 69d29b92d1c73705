"""What all charts of a page share: a Vega-Lite specification, plain data that the page hands to that library.

Colours are CSS variables of the page, so that a chart follows its light and its dark theme.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"  # a name that the library knows; nothing is loaded from it
MOST_POINTS = 150  # of a curve
COLOURS = [f"var(--c{n})" for n in range(8)]

Spec = dict[str, Any]
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Chart:
    """A chart of the page.

    Args:
        title: above it.
        note: below it; may be empty.
        spec: of Vega-Lite, with its data.
    """

    title: str
    note: str
    spec: Spec


def spec_of(rows: Rows, height: int, **parts: Any) -> Spec:
    """Return a specification as wide as its place; `parts` are its mark, encoding or layers."""
    frame = {"width": "container", "height": height, "autosize": {"type": "fit", "contains": "padding"}}
    return {"$schema": SCHEMA, **frame, "data": {"values": rows}, **parts}


def axis_of(field: str, title: str, **more: Any) -> dict[str, Any]:
    """Return the encoding of a quantity; its axis need not begin at zero."""
    scale = {"zero": False, **more.pop("scale", {})}
    return {"field": field, "type": "quantitative", "title": title, "scale": scale, **more}


COLOUR = {"field": "colour", "type": "nominal", "scale": None}
FEW = 10  # epochs that are all named at an axis


def epoch_axis(rows: Rows) -> dict[str, Any]:
    """Return the encoding of epochs, the `e` of rows; its axis names whole numbers only."""
    epochs = [row["e"] for row in rows]
    few = max(epochs) - min(epochs) <= FEW
    named = {"values": list(range(min(epochs), max(epochs) + 1))} if few else {}
    return axis_of("e", "epoch", axis={"format": "d", **named})


def rounded(value: float) -> float:
    """Round to five digits: more are not seen, and cost bytes."""
    return float(f"{value:.5g}")


def thinned(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return at most `MOST_POINTS` of the points of a curve, the first and the last among them."""
    if len(points) <= MOST_POINTS:
        return list(points)
    return [points[n] for n in np.linspace(0, len(points) - 1, MOST_POINTS).round().astype(int)]
