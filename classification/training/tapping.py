"""Where the networks of a run are tapped: at paths that were typed, published for their families, or found."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from classification.errors import UserError
from classification.models import default_taps
from classification.options.terms import needing, pairing, using
from classification.training.job import Job
from mgd import Tap, Taps, describe_taps, find_taps, pair_taps
from mgd.taps.discovery import table

AUTO = "auto"  # of --taps, --student-taps and --teacher-taps
RELUS = ("ReLU", "ReLU6")


def tap_networks(job: Job) -> list[Taps]:
    """Tap the student and its teachers where a term reads maps.

    Raises:
        UserError: unknown paths, unequal numbers of them, or no maps that can be paired.
    """
    assert job.student is not None
    terms, networks, named = job.options.table, [job.student, *job.teachers], _typed_taps(job)
    if not using(terms, "maps"):
        return [Taps(network) for network in networks]
    archs = [job.arch, *(spec["arch"] for spec in job.teacher_specs)]
    paths = [
        chosen.split(",") if chosen and chosen != AUTO else None if chosen else default_taps(arch, network)
        for chosen, arch, network in zip(named, archs, networks, strict=True)
    ]
    if any(one is None for one in paths):
        if not (needing(terms, "maps") or any(named)):  # terms that can do without maps
            return [Taps(network) for network in networks]
        return _find_taps(job, networks, paths)
    job.before_relu = not any(named)
    return _tap_at(job, networks, [one for one in paths if one is not None], shorten=not any(named))


def _typed_taps(job: Job) -> list[str | None]:
    """Return the taps that were typed for the student and for each teacher; None for a network without."""
    options, number = job.options, len(job.teachers)
    lists = options.teacher_taps.split(";") if options.teacher_taps else [None]
    named = [options.student_taps, *(lists * number if len(lists) == 1 else lists)]
    if len(named) != number + 1:
        raise UserError(f"--teacher-taps names paths of {len(named) - 1} teachers, and this run has {number}")
    return named


def _tap_at(job: Job, networks: Sequence[nn.Module], paths: list[list[str]], *, shorten: bool) -> list[Taps]:
    if shorten:  # the published pairs leave the shallowest stages unused
        depth = min(len(one) for one in paths)
        paths = [one[-depth:] for one in paths]
    for one in paths[1:]:
        if len(one) != len(paths[0]) and (paired := pairing(job.options.table)):
            raise UserError(
                f"student and teacher need the same number of taps for {', '.join(paired)}; got {len(paths[0])} "
                f"({', '.join(paths[0])}) and {len(one)} ({', '.join(one)})"
            )
    try:
        return [Taps(network, one) for network, one in zip(networks, paths, strict=True)]
    except ValueError as error:
        raise UserError(str(error)) from error


def _find_taps(job: Job, networks: Sequence[nn.Module], paths_of: Sequence[list[str] | None]) -> list[Taps]:
    """Find taps in the networks without paths, and pair student and teachers by resolution."""
    sizes = [job.preprocessing.img_size, *(seen.img_size for seen in job.teacher_preprocessing)]
    try:
        taps = [
            find_taps(network, size) if paths is None else describe_taps(network, paths, size)
            for network, paths, size in zip(networks, paths_of, sizes, strict=True)
        ]
        pairs = [pair_taps(taps[0], others, sizes[0], size) for others, size in zip(taps[1:], sizes[1:], strict=True)]
    except ValueError as error:
        raise UserError(str(error)) from error
    shared = [tap for tap in taps[0] if all(tap in [own for own, _ in found] for found in pairs)]
    partners = [{own.path: other for own, other in found} for found in pairs]
    chosen = [shared, *([partner[tap.path] for tap in shared] for partner in partners)]
    if not shared:
        raise UserError("no tap of the student can be paired with one of every teacher: name taps by --student-taps")
    job.before_relu = all(tap.activation in RELUS for row in chosen for tap in row)
    job.notes.append(f"taps were found:\n{tables(chosen)}")
    return _tap_at(job, networks, [[tap.path for tap in row] for row in chosen], shorten=False)


def tables(taps: Sequence[Sequence[Tap]]) -> str:
    """Return one table of taps per network, the student's first."""
    roles = ["student", *(["teacher"] if len(taps) == 2 else [f"teacher {n}" for n in range(1, len(taps))])]
    return "\n".join(f"{role}:\n{table(row)}" for role, row in zip(roles, taps, strict=True))


def taps_of_run(job: Job, networks: Sequence[Taps]) -> str:
    """Return the tables that --show-taps prints."""
    if not networks[0].paths:
        return "no term of this run reads maps"
    sizes = [job.preprocessing.img_size, *(seen.img_size for seen in job.teacher_preprocessing)]
    return tables([describe_taps(n.model, n.paths, size) for n, size in zip(networks, sizes, strict=True)])
