"""The table of --show-taps: what a flow could gain at each pair of taps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from classification.data.loading import FixedBatches, Photos, draw_subset, make_loader
from classification.training.distillation import view_of
from classification.training.job import Job
from mgd import Outputs, Tap, Taps, dry_forward
from mgd.losses.preview import Preview, preview_flows

NUM_IMAGES = 32
BATCH = 8


def preview(job: Job, networks: Sequence[Taps], described: Sequence[Sequence[Tap]]) -> list[str]:
    """Return the lines of a table of tap pairs for each teacher: the costs of the cheapest flow and of random flows.

    Costs are measured on training images with the networks before training.

    Args:
        job: of the networks.
        networks: the student and its teachers.
        described: the taps of each.
    """
    try:
        previews = preview_flows(_outputs(job, networks), job.seed.value)
    except ValueError as error:
        return [f"no costs of flows: {error}"]
    lines = []
    for number, (theirs, costs) in enumerate(zip(described[1:], previews, strict=True), start=1):
        of = "" if len(previews) == 1 else f" with teacher {number}"
        lines += [f"pairs{of}, and the mean cost of the channels that a flow matches (0 alike, 2 unrelated):"]
        lines += pair_table(list(zip(described[0], theirs, strict=True)), costs)
    return lines


def _outputs(job: Job, networks: Sequence[Taps]) -> Iterator[tuple[Outputs, list[Outputs]]]:
    """Yield the outputs of the student and its teachers for batches of training images, each in its own view."""
    views = [None, *(view_of(job.preprocessing, teacher) for teacher in job.teacher_preprocessing)]
    photos = Photos(job.data.train, job.preprocessing.transform())
    chosen = FixedBatches(draw_subset(len(photos), NUM_IMAGES, job.seed.value, 0), BATCH)
    for pixels, _, _ in make_loader(photos, chosen, 0, torch.device("cpu")):
        images = job.preprocessing.normalise(pixels)
        pairs = zip(networks, views, strict=True)
        outputs = [dry_forward(network, images if view is None else view(images)) for network, view in pairs]
        yield outputs[0], outputs[1:]


def pair_table(pairs: Sequence[tuple[Tap, Tap]], costs: Sequence[Preview]) -> list[str]:
    """Return the lines of a table of pairs, and a warning if the cheapest flow of any pair is no better than random."""
    rows = [("student", "teacher", "channels", "sizes", "cheapest flow", "random flow", "")]
    for (ours, theirs), cost in zip(pairs, costs, strict=True):
        channels = f"{ours.channels} <- {theirs.channels}"
        sizes = f"{ours.size[0]}x{ours.size[1]} <- {theirs.size[0]}x{theirs.size[1]}"
        flag = "" if cost.helps else "!! no better than random"
        rows.append((ours.path, theirs.path, channels, sizes, f"{cost.cheapest:.3f}", f"{cost.random:.3f}", flag))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    if not all(cost.helps for cost in costs):
        lines.append(
            "!! a flow cannot tell the channels of a marked pair apart: leave the pair out with --student-taps and "
            "--teacher-taps, or give the student trained weights (--student-resume)"
        )
    return lines
