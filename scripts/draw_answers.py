"""The pictures of docs/results/index.md, one question each, and the notebook's; make_tables.py calls it."""

from __future__ import annotations

import base64
import json
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib.pyplot as plt
from cells import RESULTS, ROOT, read_quality
from matplotlib.axes import Axes
from results_table import Record

# Cells of scripts/quality.yaml: by panel and line, the number of training images and the cell.
GAIN = {
    "SGD": {
        "MGD": {1000: "few-kept", 10000: "amp"},
        "OFD": {1000: "few-ofd", 10000: "ofd"},
        "student alone": {1000: "few-alone", 10000: "alone"},
    },
    "Muon": {
        "MGD + OFD": {1000: "few-muon-mgd-ofd", 10000: "muon-mgd-ofd"},
        "MGD": {1000: "few-muon-kept", 10000: "muon-amp"},
        "OFD": {1000: "few-muon-ofd", 10000: "muon-ofd"},
        "student alone": {1000: "few-muon-alone", 10000: "muon-alone"},
    },
}
COLORS = {"MGD": "tab:blue", "OFD": "tab:orange", "MGD + OFD": "tab:green", "student alone": "tab:gray"}
# By setting, the cell of the cheapest flow, and what is compared with it.
Settings = dict[str, tuple[str, dict[str, str]]]
WORTH: Settings = {
    "from scratch, 20 epochs": (
        "amp",
        {
            "cheapest, found once": "kept",
            "by index, kept": "identity",
            "random, kept": "random-kept",
            "costliest": "costliest",
            "random, redrawn": "random-redrawn",
        },
    ),
    "from scratch, 5 epochs": ("short-amp", {"cheapest, found once": "short-kept", "random, kept": "short-random"}),
    "1,000 images, SGD": ("few-kept", {"random, kept": "few-random"}),
    "1,000 images, Muon": ("few-muon-kept", {"random, kept": "few-muon-random"}),
    "1,000 images, Muon, MGD + OFD": ("few-muon-mgd-ofd", {"random, kept": "few-muon-mgd-ofd-random"}),
    "trained before, 5 epochs": ("again-amp", {"random, kept": "again-random"}),
    "trained before, 5 gentle epochs": ("tuned-amp", {"random, kept": "tuned-random"}),
    "trained before, 20 epochs": ("warm-amp", {"random, kept": "warm-random"}),
    "photographs, MGD + KD": ("clothing-amp-kd", {"random, kept": "clothing-random"}),
}
# Cells of scripts/transport.yaml: the same, as planned.
PLANNED: Settings = {
    "T/S 2, 20 epochs": ("kept-2", {"teacher first": "first-2", "OFD": "ofd-2"}),
    "T/S 4, 20 epochs": ("kept-4", {"teacher first": "first-4", "OFD": "ofd-4"}),
    "T/S 4, 5 epochs": (
        "short-4-kept",
        {
            "teacher first": "short-4-first",
            "teacher first, linear": "short-4-linear",
            "soft": "short-4-soft",
            "across stages": "short-4-across",
            "by index": "short-4-index",
            "random": "short-4-random",
            "OFD": "short-4-ofd",
        },
    ),
    "1,000 images, T/S 2": (
        "few-2-kept",
        {
            "teacher first": "few-2-first",
            "soft": "few-2-soft",
            "by index": "few-2-index",
            "random": "few-2-random",
        },
    ),
    "trained before, 5 epochs": ("trained-kept", {"teacher first": "trained-first", "by index": "trained-index"}),
    "MobileNet-V2 blocks, 5 epochs": (
        "unequal-kept",
        {"teacher first": "unequal-first", "by index": "unequal-index"},
    ),
    "photographs, 4 epochs": (
        "photos-kept",
        {
            "teacher first": "photos-first",
            "soft": "photos-soft",
            "across stages": "photos-across",
            "by index": "photos-index",
            "random": "photos-random",
        },
    ),
}
# Cells of single terms and sums, and the cells of the same terms with a weight that --calibrate found.
TERMS = (
    *("alone", "kd-1.5", "kd-4", "dkd", "dist", "wsl", "ssld", "meal", "crd", "rkd", "similarity", "at", "afd"),
    *("masked", "fitnet", "reviewkd", "amp", "ofd", "mgd-reviewkd", "mgd-ofd", "ofd-reviewkd"),
)
TUNED = {"at": "at-56", "rkd": "rkd-0.03", "wsl": "wsl-0.6"}
ROLES = {
    "teacher": ("tab:orange", "^"),
    "alone": ("tab:gray", "s"),
    "distilled": ("tab:blue", "o"),
    "distilled, int8": ("tab:green", "D"),
}


def draw_answers(folder: Path) -> None:
    """Draw all of them into a folder."""
    cells, results = read_quality()
    draw_terms(cells, results, folder / "which_term.png")
    draw_gain(results, folder / "gain.png")
    draw_worth(results, WORTH, folder / "flow_worth.png")
    draw_worth(results, PLANNED, folder / "flow_planned.png")
    (folder / "notebook.png").write_bytes(notebook_picture("The squares are the *flow*"))
    record = RESULTS / "device.json"
    if record.exists():
        draw_device(json.loads(record.read_text())["rows"], folder / "device.png")


def notebook_picture(text: str) -> bytes:
    """Return the picture that examples/digits.ipynb holds behind the cell with this text."""
    cells = json.loads((ROOT / "examples" / "digits.ipynb").read_text())["cells"]
    place = next(number for number, cell in enumerate(cells) if text in " ".join("".join(cell["source"]).split()))
    data = next(output["data"]["image/png"] for output in cells[place + 1]["outputs"] if "data" in output)
    return base64.b64decode("".join(data))


def _error(axis: Axes, x: float, values: list[float], color: str) -> None:
    spread = stdev(values) if len(values) > 1 else 0.0
    axis.errorbar(x, mean(values), yerr=spread, fmt="o", color=color, capsize=3, ms=5)


def draw_terms(cells: dict[str, dict[str, Any]], results: dict[str, dict[int, Record]], path: Path) -> None:
    """Draw the top-1 of every term, the best last, and where it was measured that with a calibrated weight."""
    top1 = {name: [record.last_top1 for record in results[name].values()] for name in (*TERMS, *TUNED.values())}
    names = sorted(TERMS, key=lambda name: mean(top1[name]))
    figure, axis = plt.subplots(figsize=(8, 0.24 * len(names) + 1.1), layout="constrained")
    for place, name in enumerate(names):
        values = top1[name]
        error = stdev(values) if len(values) > 1 else 0.0
        axis.errorbar(mean(values), place, xerr=error, fmt="o", color="tab:blue", capsize=3, ms=5)
        if name in TUNED:
            axis.plot(mean(top1[TUNED[name]]), place, "o", color="tab:blue", mfc="white", ms=5)
    axis.axvline(mean(top1["alone"]), color="tab:gray", ls="--", lw=1)
    axis.plot([], [], "o", color="tab:blue", ms=5, label="weight of the source, or of the base case")
    axis.plot([], [], "o", color="tab:blue", mfc="white", ms=5, label="weight that --calibrate found")
    axis.set_yticks(range(len(names)), [f"{cells[name]['row']} (n = {len(top1[name])})" for name in names], fontsize=8)
    axis.set_xlabel("top-1 %, last epoch; bars: standard deviation; dashed: student alone")
    axis.grid(axis="x", alpha=0.3)
    axis.legend(fontsize=8, loc="upper left")
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def draw_gain(results: dict[str, dict[int, Record]], path: Path) -> None:
    """Draw top-1 against the number of training images, with the standard deviation over seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained", sharey=True)
    for axis, (title, lines) in zip(axes, GAIN.items(), strict=True):
        for name, points in lines.items():
            values = {images: [r.last_top1 for r in results[cell].values()] for images, cell in points.items()}
            means = [mean(found) for found in values.values()]
            axis.plot(list(values), means, color=COLORS[name], label=name)
            for images, found in values.items():
                _error(axis, images, found, COLORS[name])
        axis.set_xscale("log")
        axis.set_xticks([1000, 10000], ["1,000", "10,000"])
        axis.set_xticks([], minor=True)
        axis.set_xlim(800, 12500)
        axis.set_xlabel("training images (the teacher saw 50,000)")
        axis.set_title(f"CIFAR-10, 20 epochs, {title}", fontsize=10)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=9, loc="lower right")
    axes[0].set_ylabel("top-1 %, last epoch")
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def worth_rows(
    results: dict[str, dict[int, Record]], settings: Settings
) -> list[tuple[str, str, str, str, dict[int, float]]]:
    """Return setting, cell of the cheapest flow, name and cell of what was run instead, and differences by seed."""
    rows = []
    for setting, (base, own) in settings.items():
        for name, cell in own.items():
            shared = sorted(set(results[base]) & set(results[cell]))
            gaps = {seed: results[cell][seed].last_top1 - results[base][seed].last_top1 for seed in shared}
            rows += [(setting, base, name, cell, gaps)] if gaps else []
    return rows


def draw_worth(results: dict[str, dict[int, Record]], settings: Settings, path: Path) -> None:
    """Draw by how much each control is behind the cheapest flow, seed by seed, all settings along one axis."""
    if not (rows := worth_rows(results, settings)):
        return
    figure, axis = plt.subplots(figsize=(8.5, 0.3 * len(rows) + 1.2), layout="constrained")
    labels, before = [], ""
    for place, (setting, _, name, _, by_seed) in enumerate(rows):
        gaps = list(by_seed.values())
        color = "tab:blue" if name.startswith("cheapest") else "tab:gray"
        axis.plot(gaps, [place] * len(gaps), "o", color=color, alpha=0.5, ms=5)
        error = stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else 0.0
        axis.errorbar(mean(gaps), place, xerr=error, fmt="|", color="k", capsize=3, ms=9)
        labels.append(f"{setting}: {name}" if setting != before else name)
        if setting != before and place:
            axis.axhline(place - 0.5, color="lightgray", lw=0.8)
        before = setting
    axis.axvline(0, color="tab:blue", lw=1.2)
    axis.text(0.05, -0.75, "the cheapest flow", color="tab:blue", fontsize=9)
    axis.set_yticks(range(len(rows)), labels, fontsize=9)
    axis.set_ylim(len(rows) - 0.5, -1.2)
    axis.set_xlabel("points of top-1 behind or ahead; dots: seeds, bars: standard error")
    axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def draw_device(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw top-1 against bytes and against latency, with the standard deviation over seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained", sharey=True)
    by_role: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_role[row["role"]].append(row)
    for axis, key, scale, label in zip(
        axes,
        ("bytes", "latency_ms"),
        (1e-3, 1.0),
        ("kilobytes of the ONNX file", "ms per image, one thread"),
        strict=True,
    ):
        for role, (color, marker) in ROLES.items():
            own = by_role[role]
            top1, x = [row["top1"] for row in own], mean(row[key] for row in own) * scale
            spread = stdev(top1) if len(top1) > 1 else 0.0
            axis.errorbar(x, mean(top1), yerr=spread, fmt=marker, color=color, capsize=3, label=role, ms=7)
        axis.set_xlim(0, None)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("top-1 %, digits")
    axes[0].legend(fontsize=9, loc="lower right")
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
