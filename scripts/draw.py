"""The figures of the documentation, from records alone; scripts/make_tables.py calls them."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib.pyplot as plt
from cells import RESULTS, read_quality
from matplotlib.axes import Axes
from results_table import Record


def rows_of(group: str, cells: dict[str, dict[str, Any]]) -> list[str]:
    """The cells of a group, behind those outside it that they are compared with."""
    own = [name for name, cell in cells.items() if cell["group"] == group]
    others = dict.fromkeys(cells[name]["against"] for name in own if "against" in cells[name])
    return [*(name for name in others if name not in own), *own]


def draw_quality(panels: dict[str, tuple[str, ...]], path: Path) -> None:
    """Draw one panel a title with these cells and groups: one dot a seed, and the spread of two or more."""
    cells, results = read_quality()
    groups = {cell["group"] for cell in cells.values()}
    shown = []
    for names in panels.values():
        own = dict.fromkeys(n for name in names for n in (rows_of(name, cells) if name in groups else [name]))
        shown.append([name for name in own if results[name]])
    heights = [len(names) + 1.5 for names in shown]
    size = (8, 0.27 * sum(heights) + 0.5)
    figure, axes = plt.subplots(len(shown), figsize=size, height_ratios=heights, layout="constrained")
    for axis, title, drawn in zip(axes, panels, shown, strict=True):
        for place, name in enumerate(drawn):
            _draw_cell(axis, place, _kind(cells[name]["row"]), list(results[name].values()))
        axis.set_yticks(range(len(drawn)), [cells[name]["row"] for name in drawn])
        axis.set_ylim(len(drawn) - 0.5, -0.5)
        axis.locator_params(axis="x", nbins=6)
        axis.grid(axis="x", alpha=0.3)
        axis.set_title(title, fontsize=10, loc="left")
    axes[-1].set_xlabel("top-1 %, last epoch, one dot a seed")
    kinds = {_kind(cells[name]["row"]) for names in shown for name in names}
    marks = [plt.Line2D([], [], linestyle="", marker="o", color=COLORS[k], label=k) for k in COLORS if k in kinds]
    marks.append(plt.Line2D([], [], linestyle="", marker="v", color="tab:blue", label="processor without bfloat16"))
    marks.append(plt.Line2D([], [], color="k", marker="|", label="mean ± standard deviation"))
    figure.legend(handles=marks, loc="outside lower center", ncols=len(marks), fontsize=8, handletextpad=0.3)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _kind(row: str) -> str:
    return next((kind for kind, words in KINDS.items() if any(word in row for word in words)), "distilled")


def _draw_cell(axis: Axes, place: int, kind: str, results: list[Record]) -> None:
    for result in results:
        marker = "o" if result.had_bfloat16 else "v"
        axis.plot(result.last_top1, place, marker, color=COLORS[kind], alpha=0.6, markersize=5)
    values = [result.last_top1 for result in results]
    if len(values) > 1:
        axis.errorbar(mean(values), place, xerr=stdev(values), fmt="|", color="k", capsize=3)


def draw_speed(kind: str, path: Path) -> None:
    """Draw the median seconds or MiB of each way: one panel a question, one bar a way."""
    files = [json.loads(p.read_text()) for name in SPEED for p in RESULTS.glob(f"{kind}/{name}.json")]
    panels: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for row in (row for file in files for row in file["rows"] if ":" in row["what"]):
        question = row["what"].split(":")[0]
        panels[question, "seconds"].update(row.get("seconds", {}))
        panels[question, "MiB"].update({way: value / 2**20 for way, value in row.get("bytes", {}).items()})
    panels = {question: bars for question, bars in panels.items() if bars}
    if not panels:
        return
    figure, axes = plt.subplots(-(-len(panels) // 2), 2, figsize=(11, 0.95 * len(panels)), layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, ((question, unit), values) in zip(axes.flat, panels.items(), strict=False):
        ways = sorted(values, key=lambda way: -values[way])
        colors = ["tab:blue" if way in OURS else "tab:gray" for way in ways]
        bars = axis.barh([WAYS.get(way, way) for way in ways], [values[way] for way in ways], color=colors)
        axis.bar_label(bars, fmt="{:,.3g}" if unit == "seconds" else "{:,.0f}", padding=3)
        axis.invert_yaxis()
        axis.set_xlim(0, 1.2 * max(values.values()))
        axis.set_title(f"{question}, {unit}", fontsize=10)
    figure.savefig(path, dpi=110, metadata={"Software": None})


KINDS = {
    "control": ("alone", "on labels", "random flow", "by index", "costliest"),
    "teacher": ("the teacher", "ResNet-50"),
}
COLORS = {"distilled": "tab:blue", "control": "tab:gray", "teacher": "tab:orange"}
SPEED = ("step", "memory", "flow", "reader")
OURS = ("ours", "compiled", "ahead", "fast teacher", "compiled teacher", "pass", "with", "auto", "files", "memory")
WAYS = {
    "plain": "as one would first write it",
    "bare": "no matching, eager float32",
    "ours": "this project",
    "compiled": "this project, --compile 1",
    "ahead": "this project, --teacher-threads 1",
    "floor": "floor: fast teacher + student",
    "files": "this project",
    "memory": "this project, --cache ram",
    "auto": "--mgd-solver auto",
}


def draw_growth(path: Path) -> None:
    """Draw time and memory against size, one panel a size, with the fitted exponents."""
    found = RESULTS / "speed" / "growth.json"
    if not found.exists():
        return
    curves = json.loads(found.read_text())["curves"]
    solvers = found.with_name("solvers.json")
    if solvers.exists():
        curves = [curve for curve in curves if not curve["what"].startswith("flow")]
        curves += [curve for curve in json.loads(solvers.read_text())["curves"] if curve["unit"] == "s"]
    panels = list(dict.fromkeys((curve["along"], curve["what"].startswith("flow")) for curve in curves))
    figure, axes = plt.subplots(2, -(-len(panels) // 2), figsize=(11, 6), layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (along, flows) in zip(axes.flat, panels, strict=False):
        own = [curve for curve in curves if (curve["along"], curve["what"].startswith("flow")) == (along, flows)]
        for curve in own:
            label = f"{curve['what'].removeprefix('flow, ')}: {curve['exponent']:.1f}"
            axis.loglog(curve["sizes"], curve["values"], "o-", label=label, markersize=4)
        sizes = sorted({size for curve in own for size in curve["sizes"]})
        axis.set_xticks(sizes[:: -(-len(sizes) // 6)], minor=False)
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.minorticks_off()
        axis.set_ylim(axis.get_ylim()[0] / 3, axis.get_ylim()[1] * (300 if flows else 3))
        axis.set_xlabel("student channels of a flow" if flows else along)
        axis.set_ylabel("seconds")
        axis.legend(fontsize=8, title="exponent", title_fontsize=8, loc="upper left", ncols=1 + flows)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110, metadata={"Software": None})
