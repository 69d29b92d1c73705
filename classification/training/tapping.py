"""Tap the networks of a run: at the paths of the options, at default paths, or where taps are found."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from classification.errors import UserError
from classification.models import default_taps
from classification.options.terms import needing, pairing, using
from classification.training.job import Job
from classification.training.previewing import preview
from mgd import Tap, Taps, describe_taps, dry_forward, find_taps, pair_taps
from mgd.taps.pairing import EQUAL
from mgd.taps.tap import table

AUTO = "auto"  # of --taps, --student-taps and --teacher-taps
RELUS = ("ReLU", "ReLU6")
UNREADABLE = (ValueError, TypeError, RuntimeError)  # errors of taps that are not reached, or read no map


def tap(job: Job) -> list[Taps]:
    """Tap the student and its teachers, if a term reads maps.

    Raises:
        UserError: paths are unknown, their numbers do not fit the terms, or no maps fit together.
    """
    assert job.student is not None
    terms, networks, named = job.options.table, [job.student, *job.teachers], _named(job)
    if not using(terms, "maps"):
        return [Taps(network) for network in networks]
    archs = [job.arch, *(spec["arch"] for spec in job.specs)]
    chosen = [
        _paths(text) if text else default_taps(arch, network)
        for text, arch, network in zip(named, archs, networks, strict=True)
    ]
    unknown = [paths is None for paths in chosen]
    if any(unknown) and not (needing(terms, "maps") or any(named)):
        return [Taps(network) for network in networks]
    paths = [own for own in chosen if own is not None]
    if any(unknown) or not (any(named) or _sizes_agree(job, networks, paths)):
        return _found(job, networks, chosen)
    job.before_relu = not any(named)
    return _tapped(job, networks, paths, shorten=not any(named))


def _paths(text: str) -> list[str] | None:
    """Return the paths that an option names, or None to find them."""
    return None if text == AUTO else [path.strip() for path in text.split(",")]


def _sizes_agree(job: Job, networks: Sequence[nn.Module], paths: Sequence[list[str]]) -> bool:
    """Return whether the default taps of all networks have equal relative sizes, or no term compares them in pairs."""
    if not pairing(job.options.table):
        return True
    sizes, depth = _image_sizes(job), min(map(len, paths))
    try:
        student, *teachers = (_relative_sizes(*each) for each in zip(networks, paths, sizes, strict=True))
    except (RuntimeError, ValueError):  # a network that does not run is refused later, with a reason
        return True
    return all(
        abs(math.log2(ours / theirs)) <= EQUAL
        for teacher in teachers
        for ours, theirs in zip(student[-depth:], teacher[-depth:], strict=True)
    )


def _relative_sizes(network: nn.Module, paths: list[str], size: int) -> list[float]:
    """Return the height of the map at each tap, divided by that of the images."""
    taps = Taps(network, paths)
    try:
        return [feature.shape[2] / size for feature in dry_forward(taps, torch.zeros(1, 3, size, size)).features]
    finally:
        taps.close()


def _image_sizes(job: Job) -> list[int]:
    """Return the side of the images of the student and of each teacher, in pixels."""
    return [job.preprocessing.img_size, *(teacher.img_size for teacher in job.teacher_preprocessing)]


def _named(job: Job) -> list[str | None]:
    """Return the tap options of the student and of each teacher."""
    options, number = job.options, len(job.teachers)
    lists = options.teacher_taps.split(";") if options.teacher_taps else [None]
    named = [options.student_taps, *(lists * number if len(lists) == 1 else lists)]
    if len(named) != number + 1:
        raise UserError(f"--teacher-taps names paths of {len(named) - 1} teachers, but there are {number}")
    return named


def _tapped(job: Job, networks: Sequence[nn.Module], paths: list[list[str]], *, shorten: bool) -> list[Taps]:
    if shorten:  # published pairs leave the shallowest taps out
        depth = min(map(len, paths))
        paths = [own[-depth:] for own in paths]
    for theirs in paths[1:]:
        if len(theirs) != len(paths[0]) and (paired := pairing(job.options.table)):
            raise UserError(
                f"student and teacher need equally many taps for {', '.join(paired)}; got {len(paths[0])} "
                f"({', '.join(paths[0])}) and {len(theirs)} ({', '.join(theirs)})"
            )
    try:
        return [Taps(network, own) for network, own in zip(networks, paths, strict=True)]
    except ValueError as error:
        raise UserError(str(error)) from error


def _found(job: Job, networks: Sequence[nn.Module], named: Sequence[list[str] | None]) -> list[Taps]:
    """Find the taps of networks without paths, and pair the taps of student and teachers by resolution."""
    sizes = _image_sizes(job)
    try:
        taps = [
            find_taps(network, size) if paths is None else describe_taps(network, paths, size)
            for network, paths, size in zip(networks, named, sizes, strict=True)
        ]
        pairs = [pair_taps(taps[0], others, sizes[0], size) for others, size in zip(taps[1:], sizes[1:], strict=True)]
    except UNREADABLE as error:
        sentence, _, tables = str(error).partition("\n")
        how = "; on this command line those are --student-taps A,B --teacher-taps C,D and --img-size" if tables else ""
        raise UserError(sentence.removesuffix(".") + how, tables) from error
    shared = [tap for tap in taps[0] if all(tap in [own for own, _ in matched] for matched in pairs)]
    partners = [{own.path: other for own, other in matched} for matched in pairs]
    chosen = [shared, *([partner[tap.path] for tap in shared] for partner in partners)]
    if not shared:
        raise UserError(
            "no tap of the student fits one of every teacher: name equally many taps of each, with --student-taps A,B "
            "and --teacher-taps C,D;E,F",
            show(taps),
        )
    job.before_relu = all(tap.activation in RELUS for row in chosen for tap in row)
    how = "found" if None in named else "paired by the sizes of their maps"
    job.notes.append(f"taps were {how}:\n{show(chosen)}")
    return _tapped(job, networks, [[tap.path for tap in row] for row in chosen], shorten=False)


def show(taps: Sequence[Sequence[Tap]]) -> str:
    """Return one table per network: the student's taps, then those of each teacher."""
    roles = ["student", *(["teacher"] if len(taps) == 2 else [f"teacher {n}" for n in range(1, len(taps))])]
    return "\n".join(f"{role}:\n{table(row)}" for role, row in zip(roles, taps, strict=True))


def described(job: Job, networks: Sequence[Taps]) -> str:
    """Return the output of --show-taps: the taps of a run, and what a flow could gain at each pair."""
    if not networks[0].paths:
        return "no term of this run reads maps"
    try:
        described = [describe_taps(n.model, n.paths, size) for n, size in zip(networks, _image_sizes(job), strict=True)]
    except UNREADABLE as error:
        raise UserError(str(error)) from error
    if not pairing(job.options.table):
        return show(described)
    return "\n".join([show(described), *preview(job, networks, described)])
