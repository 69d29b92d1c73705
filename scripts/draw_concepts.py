"""The pictures of docs/concepts/, from small examples and from records; scripts/make_tables.py calls it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt
import numpy as np
import torch
from cells import read_quality
from matplotlib.figure import Figure

from mgd import channel_cost, reduce_channels, solve_flow

BLUE, ORANGE, GREEN, GRAY = "tab:blue", "tab:orange", "tab:green", "tab:gray"


def draw_concepts(folder: Path) -> None:
    """Draw all of them into a folder."""
    for name, draw in PICTURES.items():
        figure = draw()
        figure.savefig(folder / f"{name}.png", dpi=110, metadata={"Software": None})
        plt.close(figure)


def taps() -> Figure:
    """A stage of a network as boxes, and where its tap lies."""
    figure, axis = plt.subplots(figsize=(9, 2.1), layout="constrained")
    boxes = ["image", "stage 1", "conv", "norm", "ReLU", "stage 3", "logits"]
    for place, name in enumerate(boxes):
        inside = name in ("conv", "norm", "ReLU")
        style = {"boxstyle": "round,pad=0.4", "fc": "white" if not inside else "aliceblue", "ec": BLUE}
        axis.text(place, 0, name, ha="center", va="center", fontsize=9, bbox=style)
        if place:
            axis.annotate("", (place - 0.4, 0), (place - 0.6, 0), arrowprops={"arrowstyle": "->", "color": GRAY})
    axis.annotate(
        "tap: the map before the ReLU,\nread by a hook",
        (3.5, 0.06),
        (3.5, 0.85),
        ha="center",
        color=ORANGE,
        fontsize=10,
        arrowprops={"arrowstyle": "<-", "color": ORANGE, "lw": 2},
    )
    axis.text(3, -0.62, "the end of stage 2", ha="center", color=BLUE, fontsize=10)
    axis.set(xlim=(-0.6, 6.6), ylim=(-0.8, 1.3))
    axis.axis("off")
    return figure


def _maps() -> tuple[torch.Tensor, torch.Tensor]:
    """Return maps of 8 student channels, and of 16 teacher channels that are noisy copies of two each."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(32, 8, 6, 6, generator=generator)
    copies = student[:, torch.randperm(16, generator=generator) % 8]
    return student, copies + 1.2 * torch.randn(copies.shape, generator=generator)


def cost() -> Figure:
    """Costs, with the teacher's channels in the order of the student channels that they guide."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 2.9), layout="constrained", sharey=True)
    costs = channel_cost(*_maps())
    flow = solve_flow(costs)
    order = np.concatenate([column[column >= 0] for column in flow.index.T])
    for axis, columns, title in zip(
        axes, (np.arange(16), order), ("as the teacher has them", "in the order of the flow"), strict=True
    ):
        shown = axis.imshow(costs[:, columns], cmap="Blues_r", vmin=0, vmax=2.4, aspect="auto")
        for place, channel in enumerate(columns):
            axis.plot(place, flow.assignment[channel], "s", mfc="none", mec=ORANGE, ms=13, mew=1.8)
        axis.set_xticks(range(16), map(str, columns), fontsize=8)
        axis.set_title(f"teacher's channels, {title}", fontsize=10)
        axis.set_xlabel("teacher channel")
    axes[0].set_yticks(range(8))
    axes[0].set_ylabel("student channel")
    figure.colorbar(shown, ax=axes, label="cost, 2 - 2 cos")
    return figure


def matching() -> Figure:
    """Two rows of channels, and lines between those that are matched."""
    figure, axis = plt.subplots(figsize=(8, 2.6), layout="constrained")
    costs = np.random.default_rng(3).uniform(0.2, 2, (4, 8)).round(1)
    flow = solve_flow(costs)
    for t, s in enumerate(flow.assignment):
        axis.plot([t, 2 * s + 0.5], [1, 0], "-", color=f"C{s}", lw=2.5)
        axis.text(t + 0.25 * (2 * s + 0.5 - t), 0.75, f"{costs[s, t]:.1f}", fontsize=9, ha="center",
                  bbox={"fc": "white", "ec": "none", "pad": 1})  # fmt: skip
    for y, places, name in ((1, range(8), "T"), (0, [2 * s + 0.5 for s in range(4)], "S")):
        for number, x in enumerate(places):
            color = f"C{flow.assignment[number] if name == 'T' else number}"
            axis.text(x, y, str(number), ha="center", va="center", color="white", fontsize=11,
                      bbox={"boxstyle": "circle,pad=0.35", "fc": color, "ec": "none"})  # fmt: skip
    axis.text(-0.6, 1, "teacher", ha="right", va="center")
    axis.text(-0.6, 0, "student", ha="right", va="center")
    axis.set(xlim=(-1.7, 7.6), ylim=(-0.25, 1.25))
    axis.set_title(f"each student channel gets two teacher channels; total cost {flow.total_cost:.1f}", fontsize=10)
    axis.axis("off")
    return figure


def reducers() -> Figure:
    """Two channels along a row of pixels, and their targets."""
    figure, axes = plt.subplots(1, 3, figsize=(9, 2.5), layout="constrained", sharey=True)
    x = np.linspace(0, 1, 200)
    members = np.stack([2 * np.sin(2 * np.pi * x), 1.4 * np.cos(5 * np.pi * x) - 0.6])
    teacher = torch.tensor(members, dtype=torch.float32).view(1, 2, 1, -1)
    titles = {"amp": "AMP: largest magnitude", "sp": "SP: largest value", "sm": "SM: one channel"}
    for axis, (reducer, title) in zip(axes, titles.items(), strict=True):
        index = torch.tensor([[0], [1]]) if reducer != "sm" else torch.tensor([[0]])
        target, _ = reduce_channels(teacher, torch.zeros(2), index, reducer)
        axis.plot(x, members.T, "--", color=GRAY, lw=1)
        axis.plot(x, target.flatten(), color=BLUE, lw=2.5, alpha=0.8)
        axis.axhline(0, color="k", lw=0.5)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("pixels of one row")
        axis.set_xticks([])
    axes[0].set_ylabel("value")
    figure.legend(
        handles=[plt.Line2D([], [], color=GRAY, ls="--"), plt.Line2D([], [], color=BLUE, lw=2.5)],
        labels=["two teacher channels", "target"],
        loc="outside lower center",
        ncols=2,
        fontsize=9,
    )
    return figure


def margin() -> Figure:
    """The error of one value against the student's, for a positive and a negative target."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 2.6), layout="constrained", sharey=True)
    x, low = np.linspace(-4, 4, 400), -1.0
    for axis, target in zip(axes, (1.5, -3.0), strict=True):
        clipped = max(target, low)
        error = (x - clipped) ** 2 * ((x > clipped) | (clipped > 0))
        axis.plot(x, error, color=BLUE, lw=2.5)
        axis.axvline(target, color=ORANGE, ls="--", lw=1.2)
        axis.text(target, 11.2, " target", color=ORANGE, fontsize=9)
        if target < 0:
            axis.axvline(low, color=GREEN, ls="--", lw=1.2)
            axis.text(low, 11.2, " margin", color=GREEN, fontsize=9)
        axis.set_title("target positive" if target > 0 else "target below the margin", fontsize=10)
        axis.set(xlabel="student's value before the ReLU", ylim=(-0.4, 12.5))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("error")
    return figure


def terms() -> Figure:
    """The weighted terms of MGD-AMP + KD on CIFAR-10, seed 0, stacked."""
    figure, axis = plt.subplots(figsize=(8, 2.6), layout="constrained")
    _, results = read_quality()
    curve = results["amp-kd"][0].curve
    names = {"mgd": BLUE, "ce": GRAY, "kd": ORANGE}
    values = [[epoch[f"train_{name}_weighted"] for epoch in curve] for name in names]
    axis.stackplot(range(1, len(curve) + 1), values, labels=names, colors=list(names.values()), alpha=0.8)
    axis.set(xlabel="epoch", ylabel="weighted value", xlim=(1, len(curve)), xticks=range(2, 21, 2))
    axis.set_title("MGD-AMP + KD on CIFAR-10: the loss is the height of all three", fontsize=10)
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(handles[::-1], labels[::-1], fontsize=9)
    return figure


def changes() -> Figure:
    """Share of the pairs that changed at each matching, mean over seeds."""
    figure, axis = plt.subplots(figsize=(8, 2.8), layout="constrained")
    shown = {
        "amp": ("MGD-AMP", BLUE, "-"),
        "amp-kd": ("MGD-AMP + KD", ORANGE, "-"),
        "few-amp": ("MGD-AMP, 1,000 images", GREEN, "-"),
        "random-redrawn": ("random flow, redrawn", GRAY, "--"),
        "costliest": ("costliest flow", GRAY, ":"),
    }
    _, results = read_quality()
    for name, (label, color, style) in shown.items():
        runs = [[100 * e["flow_changed"] for e in r.curve if "flow_changed" in e] for r in results[name].values()]
        means = [mean(column) for column in zip(*runs, strict=True)]
        axis.plot(range(2, len(means) + 2), means, style, marker=".", color=color, label=label)
    axis.set(xlabel="matching, every second epoch", ylabel="pairs changed, %", ylim=(-3, 103), xticks=range(2, 11))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


# Cells of scripts/quality.yaml by their weight, relative to that of the source or of the base case.
WEIGHTED = {
    "MGD": {"factor-1e4": 0.1, "amp": 1.0, "factor-2e2": 5.0},
    "AT": {"at-56": 0.056, "at": 1.0},
    "RKD": {"rkd-0.03": 0.03, "rkd": 1.0},
    "WSL": {"wsl-0.6": 0.24, "wsl": 1.0},
}


def weights() -> Figure:
    """Top-1 against the weight of a term, seed 0."""
    figure, axis = plt.subplots(figsize=(8, 2.8), layout="constrained")
    _, results = read_quality()
    for number, (name, cells) in enumerate(WEIGHTED.items()):
        values = [results[cell][0].last_top1 for cell in cells]
        axis.semilogx(list(cells.values()), values, "o-", color=f"C{number}", label=name)
    axis.axhline(results["alone"][0].last_top1, color=GRAY, ls="--", label="student alone")
    axis.set_xticks([0.03, 0.1, 0.3, 1, 3], ["0.03", "0.1", "0.3", "1", "3"])
    axis.set_xticks([], minor=True)
    axis.set(xlabel="weight, over that of the base case (MGD) or of the source", ylabel="top-1 %")
    axis.set_title("CIFAR-10, seed 0, last epoch", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {
    "taps": taps,
    "cost": cost,
    "matching": matching,
    "reducers": reducers,
    "margin": margin,
    "terms": terms,
    "changes": changes,
    "weights": weights,
}
