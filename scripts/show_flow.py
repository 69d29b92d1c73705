"""Draw what a run matched: python scripts/show_flow.py RUN [--stage -1] [--images 3] [--channels 6] [--output FILE]

Call it in the folder where the run was started: its paths may be relative. The left half shows, for the student
channels matched best, middling and worst, the student's map and its teacher channels' maps (before the ReLU, white is
zero) on validation images; the right half the cost matrix of the stage, teacher channels sorted by the student channel
that they guide, with the matched pairs marked.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch

mpl.use("Agg")
from matplotlib import pyplot as plt

from classification.data.loading import Photos
from classification.options.config import parse
from classification.runs.world import Seed
from classification.training.job import Job
from classification.training.starting import start_job
from classification.training.tapping import tap
from mgd import channel_cost, dry_forward
from mgd.losses.align import at_size_of


def load_job(run: Path) -> Job:
    """Rebuild the networks of a run, with the student's last weights."""
    words = json.loads((run / "config.json").read_text())["command"][1:]
    if "--output" in words:
        del words[words.index("--output") : words.index("--output") + 2]
    options = parse(words, "show_flow.py", distillation=True)
    job = start_job(options, Seed(0, True), with_teacher=True)
    assert job.student is not None
    job.student.load_state_dict(torch.load(run / "last.pth", weights_only=True)["state_dict"])
    return job


def draw(run: Path, stage: int, num_images: int, num_channels: int, output: Path) -> None:
    """Draw the last flow of `run` at `stage`."""
    job = load_job(run)
    saved = np.load(sorted((run / "flow").glob("*.npz"))[-1])
    indices = [saved[name] for name in sorted(n for n in saved if n.startswith("index"))]
    index = indices[stage]
    photos = Photos(job.data.valid, job.preprocessing.transform())
    step = max(1, len(photos) // 64)
    pictures = torch.stack([photos[0, i][0] for i in range(0, len(photos), step)][:64])  # (B, H, W, 3), bytes
    images = job.preprocessing.normalise(pictures)
    assert job.student is not None
    taps = tap(job)
    student_maps, teacher_maps = (dry_forward(network, images).features for network in taps[:2])
    student = student_maps[stage]
    other = int(saved["partner"][0][stage]) if "partner" in saved else stage  # --mgd-across 1 pairs the stages too
    teacher = at_size_of(student, teacher_maps[other])
    cost = channel_cost(student, teacher).numpy()
    own = np.array([cost[s, column[column >= 0]].mean() for s, column in enumerate(index.T)])
    order = np.argsort(own)
    picks = order[np.linspace(0, len(order) - 1, num_channels).astype(int)]
    shown = np.linspace(0, len(images) - 1, num_images + 2).astype(int)[1:-1]

    depth = min(index.shape[0], 3)
    figure = plt.figure(figsize=(1.0 * num_images * (depth + 1) + 6, num_channels + 1.4), layout="constrained")
    ratios = [num_images * (depth + 1), 6]
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=ratios)[0]
    axes = left.subplots(num_channels + 1, num_images * (depth + 1), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for k, number in enumerate(shown):
        base = k * (depth + 1)
        axes[0, base].imshow(pictures[number])
        for row, s in enumerate(picks, start=1):
            maps = [student[number, s], *(teacher[number, t] for t in index[:depth, s] if t >= 0)]
            for column, values in enumerate(maps):
                axis, top = axes[row, base + column], float(values.abs().max()) or 1.0
                axis.imshow(values, cmap="RdBu_r", vmin=-top, vmax=top)
                if row == 1:
                    axis.set_title("student" if column == 0 else "teacher", fontsize=7)
                if column == 0 and k == 0:
                    label = f"channel {s}\ncos {1 - own[s] / 2:.2f}"
                    axis.text(-0.05, 0.5, label, transform=axis.transAxes, fontsize=7, ha="right", va="center")
    show_cost(right.subplots(), cost, index)
    left.suptitle(f"matched maps, best to worst, stage {stage} of {run.name}", fontsize=9)
    figure.savefig(output, dpi=130)
    print(f"mean cosine of matched pairs {1 - own.mean() / 2:.3f}, of all pairs {1 - cost.mean() / 2:.3f}")
    print(f"wrote {output}")


def show_cost(axis: Any, cost: np.ndarray, index: np.ndarray) -> None:
    """Show the costs with teacher channels in the order of the student channels that they guide."""
    order = np.concatenate([column[column >= 0] for column in index.T])
    guided = np.concatenate([np.full((column >= 0).sum(), s) for s, column in enumerate(index.T)])
    shown = axis.imshow(cost[:, order], aspect="auto", cmap="viridis", interpolation="nearest")
    size = max(1.0, 120 / len(order))
    axis.plot(np.arange(len(order)), guided, ".", color="red", markersize=size)
    axis.set(xlabel="teacher channels, sorted by flow", ylabel="student channels", title="cost, matched pairs in red")
    axis.figure.colorbar(shown, ax=axis, shrink=0.8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--stage", type=int, default=-1)
    parser.add_argument("--images", type=int, default=3)
    parser.add_argument("--channels", type=int, default=6)
    parser.add_argument("--output", type=Path, default=Path("flow.png"))
    args = parser.parse_args()
    if not (args.run / "config.json").exists() or not list((args.run / "flow").glob("*.npz")):
        parser.error(f"{args.run} is no folder of a run that matched: it needs config.json and flow/")
    draw(args.run, args.stage, args.images, args.channels, args.output)


if __name__ == "__main__":
    main()
