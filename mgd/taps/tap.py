"""Descriptions of taps, and a table of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Tap:
    """A place where a network can be tapped, and its map.

    Args:
        path: for `Taps`.
        channels: C.
        size: H and W.
        kind: "map", or "tokens" that the path turns into one.
        norm: name of the batch normalisation before the tap, see `norms_before`, or None. Group and layer
            normalisations have no statistics per channel.
        activation: the function that the network applies to the map, such as "ReLU", or None.
        margin: the source of a margin. "norm": ReLU or ReLU6 follows, and the norm gives the margin. "measured": on the
            map, because there is no norm, or because SiLU, GELU, Hardswish or Mish follows, which suppress most of the
            negative side. "none": nothing suppresses the negative side.
        depth: share of the layers with weights that run before the tap, from 0 to 1.
    """

    path: str
    channels: int
    size: tuple[int, int]
    kind: Literal["map", "tokens"]
    norm: str | None
    activation: str | None
    margin: Literal["norm", "measured", "none"]
    depth: float


def table(taps: Sequence[Tap]) -> str:
    """Return taps as a text table, one line each."""
    rows = [("path", "channels", "size", "kind", "norm", "activation", "margin", "depth")]
    for tap in taps:
        size = f"{tap.size[0]}x{tap.size[1]}"
        rows.append((tap.path, str(tap.channels), size, tap.kind, tap.norm or "-", tap.activation or "-", tap.margin,
                     f"{tap.depth:.2f}"))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
