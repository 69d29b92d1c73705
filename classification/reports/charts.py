"""Charts of training: curves, gradient shares, flows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from classification.reports.groups import Member
from classification.reports.vega import (
    COLOUR,
    COLOURS,
    Chart,
    Rows,
    Spec,
    epoch_axis,
    make_spec,
    quantity_axis,
    round_value,
    thin_out,
)
from classification.runs.matchings import Matching, changed


def curve(members: Sequence[Member], key: str, title: str, axis: str, note: str = "") -> Chart | None:
    """Draw the curves of all runs in one chart; None if no run has such values."""
    rows: Rows = []
    lines = []
    # Runs alone, the control, are drawn first, so that the others lie on top.
    for number, member in enumerate(sorted(members, key=lambda member: member.role != "alone")):
        points = thin_out(member.run.series(key))
        rows += [{"r": number, "e": epoch + 1, "v": round_value(value)} for epoch, value in points]
        if points:
            last = f"{round_value(points[-1][1]):g}"
            description = {"name": member.run.name, "group": member.group, "last": last}
            lines.append({"r": number, "colour": member.colour, **description})
    if not rows:
        return None
    one_epoch = max(row["e"] for row in rows) == min(row["e"] for row in rows)
    spec = make_spec(
        rows,
        220,
        transform=[
            {
                "lookup": "r",
                "from": {"data": {"values": lines}, "key": "r", "fields": ["colour", "name", "group", "last"]},
            }
        ],
        mark={"type": "point", "filled": True}
        if one_epoch
        else {"type": "line", "strokeWidth": 1.6, "interpolate": "linear"},
        encoding={
            "x": epoch_axis(rows),
            "y": quantity_axis("v", axis),
            "detail": {"field": "r", "type": "nominal"},
            "color": COLOUR,
            "tooltip": [
                {"field": "name", "title": "run"},
                {"field": "group"},
                {"field": "last", "title": "last value"},
            ],
        },
    )
    return Chart(title, note, spec)


def curves(members: Sequence[Member]) -> list[Chart]:
    """Draw loss, accuracy, terms and learning rate."""
    terms = list(dict.fromkeys(term for member in members for term in member.run.terms))
    charts = [
        curve(members, "valid_top1", "Top-1 on the validation images", "%"),
        curve(members, "valid_loss", "Loss on the validation images", "cross-entropy"),
        curve(members, "train_loss", "Training loss", "sum of weighted terms", "Sums of other terms do not compare."),
        curve(members, "train_top1", "Top-1 on the training images", "%"),
        *[curve(members, f"train_{term}_weighted", f"Term {term}", "weighted value") for term in terms],
        curve(members, "learning_rate", "Learning rate", "at the start of the epoch"),
    ]
    return [chart for chart in charts if chart is not None]


def gradient_shares(member: Member) -> Chart | None:
    """Draw each term's share of the gradient over the epochs of a run; None if they were not recorded."""
    terms = [term for term in member.run.terms if member.run.series(f"gradient_share_{term}")]
    rows = [
        {"e": epoch + 1, "v": round_value(value), "term": term}
        for term in terms
        for epoch, value in thin_out(member.run.series(f"gradient_share_{term}"))
    ]
    if not rows:
        return None
    bars = len({row["e"] for row in rows}) == 1
    colour = {"field": "term", "type": "nominal", "scale": {"domain": terms, "range": COLOURS[: len(terms)]}}
    spec = make_spec(
        rows,
        180,
        mark={"type": "bar" if bars else "area", "opacity": 0.85},
        encoding={
            "x": epoch_axis(rows),
            "y": {"field": "v", "type": "quantitative", "stack": "zero", "title": "share", "scale": {"domain": [0, 1]}},
            "color": {**colour, "legend": {"orient": "top", "title": None}},
            "tooltip": [{"field": "term"}],
        },
    )
    return Chart(f"{member.run.name}: {member.group}", "", spec)


def flow_charts(matchings: Sequence[Matching], random: Sequence[float | None]) -> list[Chart]:
    """Draw the costs of a run's matchings, and the share of pairs that changed at each matching.

    Args:
        matchings: of the run, in order.
        random: mean cost of random pairs at the last matching, per stage; None if unknown.
    """
    names = [stage.name for stage in matchings[-1].stages]
    costs = [
        {"e": matching.epoch + 1, "v": round_value(stage.mean_cost), "stage": stage.name}
        for matching in matchings
        for stage in matching.stages
        if math.isfinite(stage.mean_cost)
    ]
    random_costs = [
        {"stage": n, "v": round_value(value)} for n, value in zip(names, random, strict=True) if value is not None
    ]
    changes = [
        {"e": after.epoch + 1, "v": round_value(100 * changed(old, new)), "stage": new.name}
        for before, after in pairwise(matchings)
        for old, new in zip(before.stages, after.stages, strict=False)
        if old.matrix().shape == new.matrix().shape
    ]
    charts = []
    if costs:
        note = "Dashed: the mean cost of random pairs at the last matching." if random_costs else ""
        spec = _by_stage(costs, names, quantity_axis("v", "mean cost, 2 - 2 cos"), random_costs)
        charts.append(Chart("Cost of the matched pairs", note, spec))
    if changes:
        spec = _by_stage(changes, names, quantity_axis("v", "%", scale={"domainMin": 0, "zero": True}))
        charts.append(Chart("Share of the pairs that changed at a matching", "", spec))
    return charts


def _by_stage(rows: Rows, names: Sequence[str], y: dict[str, Any], level: Rows | None = None) -> Spec:
    """Draw a line per stage over the epochs, and a dashed line at the `level` of each stage."""
    colours = [COLOURS[n % len(COLOURS)] for n in range(len(names))]
    scale = {"domain": list(names), "range": colours}
    colour = {"field": "stage", "type": "nominal", "scale": scale, "legend": {"orient": "top", "title": None}}
    stage, value = {"field": "stage"}, {"field": "v", "title": "value"}
    line = {
        "mark": {"type": "line", "point": {"size": 30}},
        "encoding": {
            "x": epoch_axis(rows),
            "y": y,
            "color": colour,
            "tooltip": [stage, {"field": "e", "title": "epoch"}, value],
        },
    }
    rule = {
        "data": {"values": level},
        "mark": {"type": "rule", "strokeDash": [4, 4]},
        "encoding": {"y": y, "color": colour, "tooltip": [stage, value]},
    }
    return make_spec(rows, 200, layer=[line, rule] if level else [line])
