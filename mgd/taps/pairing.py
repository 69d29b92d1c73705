"""Pair the taps of a student and a teacher: by resolution, then by depth."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import nn

from mgd.taps.discovery import find_taps
from mgd.taps.sizes import Size, height_and_width
from mgd.taps.tap import Tap, table

EQUAL = 0.3  # octaves; sizes that differ by less count as equal
MOST = 2.0  # octaves; largest difference of paired sizes
Price = Callable[[Tap, Tap], float | None]  # of a pair; None if it is not allowed


def pair_taps(
    student: nn.Module | Sequence[Tap],
    teacher: nn.Module | Sequence[Tap],
    images_or_size: Size,
    teacher_size: Size | None = None,
) -> list[tuple[Tap, Tap]]:
    """Pair the taps of two networks.

    The order is kept: of two student taps, the deeper one is never paired with the shallower teacher tap. Resolutions
    are compared relative to the images of each network. Taps of equal resolution are paired; of several, those nearest
    in depth. If no two resolutions are equal, as many taps as possible are paired whose sizes differ by at most a
    factor of 4, those nearest in size. If a network has several taps of only one resolution, as a plain ViT, all are
    paired by depth, within the same factor.

    If the sizes of a pair differ, terms average or interpolate the teacher's map to the student's size: compare
    `student_tap.size` and `teacher_tap.size`.

    Args:
        student: a network, whose taps are found by `find_taps`; or taps, for example of `describe_taps`.
        teacher: likewise.
        images_or_size: images of both networks, or their height and width; see `find_taps`.
        teacher_size: images of the teacher, or their size, if they differ.

    Returns:
        Pairs (student's, teacher's), from shallow to deep; taps without a partner are left out.

    Raises:
        ValueError: no two taps can be paired; the message shows both tables.
    """
    teacher_images = images_or_size if teacher_size is None else teacher_size
    ours = _taps(student, images_or_size)
    theirs = _taps(teacher, teacher_images)
    ratio = math.log2(height_and_width(teacher_images)[0] / height_and_width(images_or_size)[0])
    pairs = _align(ours, theirs, _by_depth(ratio)) if any(map(_one_resolution, (ours, theirs))) else []
    for most in (EQUAL, MOST):
        pairs = pairs or _align(ours, theirs, _by_size(ratio, most))
    if not pairs:
        raise ValueError(
            "no tap of the student fits one of the teacher: their sizes, relative to the images, differ by more than "
            "a factor of 4, or there are none. Name equally many taps of each network, or use images of another "
            f"size.\nstudent:\n{table(ours)}\nteacher:\n{table(theirs)}"
        )
    return pairs


def _taps(network: nn.Module | Sequence[Tap], images_or_size: Size) -> list[Tap]:
    taps = find_taps(network, images_or_size) if isinstance(network, nn.Module) else network
    return sorted(taps, key=lambda tap: tap.depth)


def _one_resolution(taps: Sequence[Tap]) -> bool:
    return len(taps) > 1 and len({tap.size for tap in taps}) == 1


def _octaves(student: Tap, teacher: Tap, ratio: float) -> float:
    return abs(math.log2(teacher.size[0] / student.size[0]) - ratio)


def _by_size(ratio: float, most: float) -> Price:
    def price(student: Tap, teacher: Tap) -> float | None:
        octaves = _octaves(student, teacher, ratio)
        # Size counts first: depths differ by at most 1.
        return 10 * octaves + abs(student.depth - teacher.depth) if octaves <= most else None

    return price


def _by_depth(ratio: float) -> Price:
    def price(student: Tap, teacher: Tap) -> float | None:
        return abs(student.depth - teacher.depth) if _octaves(student, teacher, ratio) <= MOST else None

    return price


def _align(student: Sequence[Tap], teacher: Sequence[Tap], price: Price) -> list[tuple[Tap, Tap]]:
    """Return as many pairs in order as possible, at the least price: best[i][j] is for the first i and j taps."""
    best: list[list[tuple[int, float, list[tuple[Tap, Tap]]]]] = [
        [(0, 0.0, []) for _ in range(len(teacher) + 1)] for _ in range(len(student) + 1)
    ]
    for i, ours in enumerate(student, 1):
        for j, theirs in enumerate(teacher, 1):
            choices = [best[i - 1][j], best[i][j - 1]]
            cost = price(ours, theirs)
            if cost is not None:
                num, total, pairs = best[i - 1][j - 1]
                choices.append((num - 1, total + cost, [*pairs, (ours, theirs)]))
            best[i][j] = min(choices, key=lambda choice: choice[:2])
    return best[-1][-1][2]
