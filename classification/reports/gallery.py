"""Matched channels on images: the maps of a student and of the teacher channels that guide it, at every tap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from classification.data.loading import Photos
from classification.data.preprocessing import Preprocessing
from classification.models import default_taps
from classification.models.trained import Trained
from classification.reports.pictures import channel_map, photograph
from classification.reports.records import Run
from classification.runs.matchings import Stage
from mgd import Taps, View, channel_cost, describe_taps, dry_forward, find_taps, pair_taps
from mgd.losses.align import at_size_of

OBSERVED = 64  # images whose maps say how alike two channels are
SHOWN = 3  # of them
CHANNELS = 4  # per stage, from the best matched to the worst
GUIDES = 2  # teacher channels per student channel
SIDE = 72  # pixels of a photograph
AUTO = "auto"


@dataclass(frozen=True)
class Row:
    """A student channel and its guides.

    Args:
        title: which channel.
        cosine: mean over the guides, on the observed images.
        maps: per image, the student's map and then those of its guides, as data URIs.
    """

    title: str
    cosine: float
    maps: list[list[str]]


@dataclass(frozen=True)
class StagePictures:
    """The rows of a stage.

    Args:
        title: the stage and its taps.
        photographs: the images, as data URIs.
        rows: from the best matched channel to the worst.
    """

    title: str
    photographs: list[str]
    rows: list[Row]


def draw_gallery(run: Run, student: Trained, teacher: Trained, paths: Sequence[str]) -> list[StagePictures]:
    """Draw the channels that the last flow of a run matched.

    Args:
        run: with a matching.
        student: its network.
        teacher: its first teacher.
        paths: of images.

    Raises:
        ValueError: the networks have no such taps, or other channels than the flow.
    """
    step = max(1, len(paths) // OBSERVED)
    chosen = list(paths[::step][:OBSERVED])
    seen, other = student.preprocessing, teacher.preprocessing
    photos = Photos([(path, 0) for path in chosen], seen.transform())
    images = seen.normalise(torch.stack([photos[0, index][0] for index in range(len(photos))])).contiguous()
    view = View(seen.mean, seen.std, other.mean, other.std, other.img_size)
    ours, theirs = _taps(run, student.network, teacher.network, seen, other)
    with torch.no_grad():
        maps = [dry_forward(ours, images).features, dry_forward(theirs, view(images)).features]
    stages = [stage for stage in run.matchings[-1].stages if stage.name.startswith("stage")][: len(maps[0])]
    if not stages or len(stages) != len(maps[0]):
        raise ValueError(f"the flow has {len(stages)} stages, the networks {len(maps[0])} taps")
    shown = [round(n) for n in np.linspace(0, len(chosen) - 1, min(SHOWN, len(chosen)))]
    pictures = [photograph(chosen[n], SIDE) or "" for n in shown]
    found = []
    for stage, own, guide, path in zip(stages, *maps, ours.paths, strict=True):
        if (own.shape[1], guide.shape[1]) != (stage.num_student, stage.num_teacher):
            raise ValueError(f"{stage.name} matches other numbers of channels than the networks have")
        title = f"{stage.name}, {path}"
        found.append(StagePictures(title, pictures, _rows(stage, own, at_size_of(own, guide), shown)))
    return found


def _rows(stage: Stage, student: Tensor, teacher: Tensor, shown: Sequence[int]) -> list[Row]:
    cost = channel_cost(student, teacher).double().numpy()  # (S, T)
    matched = stage.matrix()
    guided = np.flatnonzero(matched.any(1))
    mean = (np.where(matched, cost, 0).sum(1) / np.maximum(matched.sum(1), 1))[guided]
    order = guided[np.argsort(mean, kind="stable")]
    rows = []
    for place in np.linspace(0, len(order) - 1, min(CHANNELS, len(order))).round().astype(int):
        own = int(order[place])
        guides = sorted(np.flatnonzero(matched[own]).tolist(), key=lambda t: cost[own, t])[:GUIDES]
        maps = [
            [channel_map(values.double().numpy()) for values in (student[n, own], *(teacher[n, t] for t in guides))]
            for n in shown
        ]
        cosine = 1 - float(cost[own, np.flatnonzero(matched[own])].mean()) / 2
        rows.append(Row(f"channel {own}, teacher's {', '.join(map(str, guides))}", cosine, maps))
    return rows


def _taps(
    run: Run, student: nn.Module, teacher: nn.Module, seen: Preprocessing, other: Preprocessing
) -> tuple[Taps, Taps]:
    """Tap both networks where the run did: at paths that were named, those of their families, or found ones."""
    named = [run.options.get("student_taps"), str(run.options.get("teacher_taps") or "").split(";")[0]]
    archs = [run.arch, str(run.teachers[0].get("arch"))]
    networks = (student, teacher)
    known = [
        paths.split(",") if paths and paths != AUTO else None if paths else default_taps(arch, network)
        for paths, arch, network in zip(named, archs, networks, strict=True)
    ]
    ours, theirs = known
    if ours is None or theirs is None:
        sizes = (seen.img_size, other.img_size)
        taps = [
            find_taps(network, size) if paths is None else describe_taps(network, paths, size)
            for network, paths, size in zip(networks, known, sizes, strict=True)
        ]
        pairs = pair_taps(taps[0], taps[1], *sizes)
        ours, theirs = [own.path for own, _ in pairs], [guide.path for _, guide in pairs]
    elif not any(named):  # the published pairs leave the shallowest stages unused
        depth = min(len(ours), len(theirs))
        ours, theirs = ours[-depth:], theirs[-depth:]
    return Taps(student, ours), Taps(teacher, theirs)
