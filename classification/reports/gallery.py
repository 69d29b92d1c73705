"""Pictures of matched channels: maps of student channels and of the teacher channels that guide them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from classification.data.loading import Photos
from classification.models import default_taps
from classification.models.trained import Trained
from classification.reports.pictures import channel_map, photograph
from classification.reports.records import Run
from classification.runs.matchings import Stage
from mgd import Taps, View, channel_cost, describe_taps, dry_forward, find_taps, pair_taps
from mgd.losses.align import at_size_of

NUM_OBSERVED = 64  # images on which channels are compared
NUM_DRAWN = 3  # images that are drawn
NUM_CHANNELS = 4  # student channels per stage that are drawn, from the best match to the worst
NUM_GUIDES = 2  # teacher channels that are drawn per student channel
SIDE = 72  # px of a photograph
AUTO = "auto"


@dataclass(frozen=True)
class Row:
    """A student channel and its guides.

    Args:
        title: names the channels.
        cosine: between student and guides, mean over guides and images.
        maps: per image, the map of the student and then of its guides, as data URIs.
    """

    title: str
    cosine: float
    maps: list[list[str]]


@dataclass(frozen=True)
class StagePictures:
    """The pictures of a stage.

    Args:
        title: names the stage and its tap.
        photographs: the images, as data URIs.
        rows: from the best matched channel to the worst.
    """

    title: str
    photographs: list[str]
    rows: list[Row]


def draw_gallery(run: Run, student: Trained, teacher: Trained, paths: Sequence[str]) -> list[StagePictures]:
    """Draw the channels that the last flow of a run matches.

    Args:
        run: a run with a matching.
        student: its network.
        teacher: its first teacher.
        paths: of images.

    Raises:
        ValueError: the networks do not have the taps or the channels of the flow.
    """
    step = max(1, len(paths) // NUM_OBSERVED)
    chosen = list(paths[::step][:NUM_OBSERVED])
    own, other = student.preprocessing, teacher.preprocessing
    photos = Photos([(path, 0) for path in chosen], own.transform())
    images = own.normalise(torch.stack([photos[0, index][0] for index in range(len(photos))])).contiguous()
    view = View(own.mean, own.std, other.mean, other.std, other.img_size)
    student_taps, teacher_taps = _taps(run, student, teacher)
    with torch.no_grad():
        maps = [dry_forward(student_taps, images).features, dry_forward(teacher_taps, view(images)).features]
    stages = [stage for stage in run.matchings[-1].stages if stage.name.startswith("stage")][: len(maps[0])]
    if not stages or len(stages) != len(maps[0]):
        raise ValueError(f"the flow has {len(stages)} stages, the networks {len(maps[0])} taps")
    drawn = [round(n) for n in np.linspace(0, len(chosen) - 1, min(NUM_DRAWN, len(chosen)))]
    photographs = [photograph(chosen[n], SIDE) or "" for n in drawn]
    pictures_of_stages = []
    for stage, student_map, teacher_map, path in zip(stages, *maps, student_taps.paths, strict=True):
        if (student_map.shape[1], teacher_map.shape[1]) != (stage.num_student, stage.num_teacher):
            raise ValueError(f"{stage.name} matches other numbers of channels than the networks have")
        title = f"{stage.name}, {path}"
        pictures_of_stages.append(
            StagePictures(title, photographs, _rows(stage, student_map, at_size_of(student_map, teacher_map), drawn))
        )
    return pictures_of_stages


def _rows(stage: Stage, student: Tensor, teacher: Tensor, drawn: Sequence[int]) -> list[Row]:
    cost = channel_cost(student, teacher).double().numpy()  # (S, T)
    matched = stage.matrix()
    guided_channels = np.flatnonzero(matched.any(1))
    mean_costs = (np.where(matched, cost, 0).sum(1) / np.maximum(matched.sum(1), 1))[guided_channels]
    order = guided_channels[np.argsort(mean_costs, kind="stable")]
    rows = []
    for rank in np.linspace(0, len(order) - 1, min(NUM_CHANNELS, len(order))).round().astype(int):
        channel = int(order[rank])
        guides = sorted(np.flatnonzero(matched[channel]).tolist(), key=lambda t: cost[channel, t])[:NUM_GUIDES]
        maps = [
            [channel_map(values.double().numpy()) for values in (student[n, channel], *(teacher[n, t] for t in guides))]
            for n in drawn
        ]
        cosine = 1 - float(cost[channel, np.flatnonzero(matched[channel])].mean()) / 2
        rows.append(Row(f"channel {channel}, teacher's {', '.join(map(str, guides))}", cosine, maps))
    return rows


def _taps(run: Run, student: Trained, teacher: Trained) -> tuple[Taps, Taps]:
    """Tap both networks as the run did: at the paths of its options, the default ones, or those that are found."""
    options = [run.options.get("student_taps"), str(run.options.get("teacher_taps") or "").split(";")[0]]
    archs = [run.arch, str(run.teachers[0].get("arch"))]
    networks = (student.network, teacher.network)
    paths_of_networks = [
        paths.split(",") if paths and paths != AUTO else None if paths else default_taps(arch, network)
        for paths, arch, network in zip(options, archs, networks, strict=True)
    ]
    student_paths, teacher_paths = paths_of_networks
    if student_paths is None or teacher_paths is None:
        sizes = (student.preprocessing.img_size, teacher.preprocessing.img_size)
        taps = [
            find_taps(network, size) if paths is None else describe_taps(network, paths, size)
            for network, paths, size in zip(networks, paths_of_networks, sizes, strict=True)
        ]
        pairs = pair_taps(taps[0], taps[1], *sizes)
        student_paths, teacher_paths = [own.path for own, _ in pairs], [guide.path for _, guide in pairs]
    elif not any(options):  # of default taps, the deepest ones are paired
        depth = min(len(student_paths), len(teacher_paths))
        student_paths, teacher_paths = student_paths[-depth:], teacher_paths[-depth:]
    return Taps(student.network, student_paths), Taps(teacher.network, teacher_paths)
