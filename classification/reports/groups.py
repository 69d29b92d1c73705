"""Which runs belong together: seeds of one recipe, students alone as the control, teachers; and who is ahead."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from classification.models.intervals import verdict, visible_spread
from classification.options.options import names_where
from classification.reports.records import Run, mapping, planned_epochs

# What seeds of one recipe may differ in, beside what changes no result.
OWN = frozenset(
    {"seed", "seeded", "output", "resume", "teacher_resume", "teachers", "command", "img_size_asked", "term"}
)
FAIR = ("data", "valid_list", "epochs", "batch_size", "lr", "img_size", "optimizer", "pretrained")
PLACES = ("data", "valid_list")
NUM_COLOURS = 8
CONTROL = "var(--control)"
TEACHER = "var(--teacher)"


@dataclass(frozen=True)
class Member:
    """A run and its place in a report.

    Args:
        run: what its folder says.
        role: "distilled"; "alone", without a teacher; "teacher" of another run of the report.
        group: the recipe that its seeds share, in words.
        colour: of the group, as CSS.
    """

    run: Run
    role: str
    group: str
    colour: str


def group_runs(runs: Sequence[Run]) -> list[Member]:
    """Give every run a role, a group and a colour; students alone are gray where there is a distilled run.

    Distilled runs come first and teachers last, and of each, those that are whole.
    """
    teachers = {path for run in runs for path in teacher_folders(run)}
    roles = [_role(run, teachers) for run in runs]
    keys = [_key(run, role) for run, role in zip(runs, roles, strict=True)]
    names = _group_names(runs, roles, keys)
    colours: dict[str, str] = {}
    coloured = {"distilled"} if "distilled" in roles else {"alone"}
    for role, key in zip(roles, keys, strict=True):
        if role in coloured and key not in colours:
            colours[key] = f"var(--c{len(colours) % NUM_COLOURS})"
    usual = {"teacher": TEACHER, "alone": CONTROL}
    members = [
        Member(run, role, names[key], colours.get(key) or usual.get(role, CONTROL))
        for run, role, key in zip(runs, roles, keys, strict=True)
    ]
    order = ["distilled", "alone", "teacher"]
    return sorted(members, key=lambda member: (order.index(member.role), not is_whole(member.run)))


def teacher_files(run: Run) -> list[tuple[Mapping[str, Any], Path | None]]:
    """Return the frozen teachers of a run with their files, seen from where it was started."""
    start = Path(str(run.config.get("folder", "")))
    found = []
    for teacher in run.teachers:
        if teacher.get("frozen", True):
            file = teacher.get("resume")
            found.append((teacher, start / file if isinstance(file, str) and file else None))
    return found


def teacher_folders(run: Run) -> set[Path]:
    """Return the folders of the files of a run's teachers."""
    return {path.resolve().parent for _, path in teacher_files(run) if path is not None}


def _role(run: Run, teachers: set[Path]) -> str:
    if run.teachers:
        return "distilled"
    return "teacher" if run.folder.resolve() in teachers else "alone"


def flat_options(run: Run) -> dict[str, Any]:
    """Return the options that change a result, those of terms as "mgd.reducer"."""
    free = {*names_where("free"), *OWN}
    found = {name: value for name, value in run.options.items() if name != "terms" and name not in free}
    for term, entry in mapping(run.options.get("terms")).items():
        found |= {f"{term}.{name}": value for name, value in mapping(entry).items()}
    return found


def _key(run: Run, role: str) -> str:
    archs = [str(teacher.get("arch")) for teacher in run.teachers]
    return json.dumps([role, archs, run.terms, flat_options(run)], sort_keys=True, default=str)


def _group_names(runs: Sequence[Run], roles: Sequence[str], keys: Sequence[str]) -> dict[str, str]:
    """Return a name per key: role or terms, the network where there are several, what else tells groups apart."""
    first = {key: (run, role) for run, role, key in reversed(list(zip(runs, roles, keys, strict=True)))}
    archs = {run.arch for run, role in first.values() if role != "teacher"}
    plain = {}
    for key, (run, role) in first.items():
        what = {"alone": "alone", "teacher": f"teacher {run.arch}"}.get(role, " + ".join(run.terms) or "distilled")
        plain[key] = f"{run.arch} {what}" if len(archs) > 1 and role != "teacher" else what
    names = {}
    for key, name in plain.items():
        alike = [first[other][0] for other in plain if plain[other] == name]
        names[key] = f"{name}{_apart(first[key][0], alike)}" if len(alike) > 1 else name
    return names


def _apart(run: Run, alike: Sequence[Run]) -> str:
    """Return the options that tell a run from others, in brackets."""
    every = [flat_options(other) for other in alike]
    own = flat_options(run)
    differ = sorted(name for name in own if any(other.get(name) != own[name] for other in every))
    archs = {tuple(str(teacher.get("arch")) for teacher in other.teachers) for other in alike}
    said = [f"{name} {own[name]}" for name in differ[:2]]
    if len(archs) > 1:
        said.insert(0, f"of {', '.join(str(teacher.get('arch')) for teacher in run.teachers)}")
    return f" ({', '.join(said or [run.name])})"


def control_of(member: Member, members: Sequence[Member]) -> list[Member]:
    """Return the runs alone of the same network: those of the same budget, or else all."""
    alike = [other for other in members if other.role == "alone" and other.run.arch == member.run.arch]
    return [other for other in alike if _budget(other.run) == _budget(member.run)] or alike


def is_whole(run: Run) -> bool:
    """Return whether all planned epochs of a run are finished."""
    planned = planned_epochs(run.options)
    return bool(run.epochs) and (planned is None or len(run.epochs) >= planned)


def unlike(members: Sequence[Member]) -> dict[str, str]:
    """Say of each recipe that differs from its control in more than the recipe in what it does."""
    found = {}
    for group in dict.fromkeys(member.group for member in members if member.role == "distilled"):
        first = next(member for member in members if member.group == group)
        for other in control_of(first, members)[:1]:
            ours, theirs = _budget(first.run), _budget(other.run)
            differ = [f"{name} ({theirs[name]}, then {ours[name]})" for name in FAIR if ours[name] != theirs[name]]
            if differ:
                found[group] = f"{other.run.name} and {first.run.name} differ in {', '.join(differ)}"
    return found


def _budget(run: Run) -> dict[str, str]:
    """Return what a recipe and its control should share; places are seen from where the run was started."""
    start = Path(str(run.config.get("folder", "")))
    found = {name: run.options.get(name) for name in FAIR}
    return {
        name: str(start / value if name in PLACES and isinstance(value, str) else value)
        for name, value in found.items()
    }


def verdict_of(members: Sequence[Member]) -> str:
    """Say in a line per recipe how the distilled runs compare with those alone: top-1 of the last epoch, whole runs."""
    groups = list(dict.fromkeys(member.group for member in members if member.role == "distilled"))
    more = unlike(members)
    unequal = " Other options differ as well, see Failures."
    said = [_compared(group, members) + (unequal if group in more else "") for group in groups]
    if not said:
        whole = [member.run for member in members if member.run.last("valid_top1") is not None]
        said = [
            f"{run.name} reaches {run.last('valid_top1'):.2f} % top-1 after {len(run.epochs)} epochs."
            for run in whole[:3]
        ]
        said.append("No run was distilled, so there is nothing to compare." if whole else "No accuracy was recorded.")
    return "\n".join(said)


def _compared(group: str, members: Sequence[Member]) -> str:
    own = [m for m in members if m.group == group and m.role == "distilled"]
    ours, theirs = _by_seed(own), _by_seed(control_of(own[0], members))
    if not ours:
        return f"{group}: no run is complete."
    said = f"{group} reaches {statistics.mean(ours.values()):.2f} % top-1"
    if not theirs:
        return f"{said}; there is no complete run of the same student alone to compare with."
    said += f", the same student alone {statistics.mean(theirs.values()):.2f} %"
    pairs = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    if not pairs:
        return f"{said}; no seed has both, so the difference is not tested."
    mean = statistics.mean(pairs)
    if len(pairs) == 1:
        return f"UNDECIDED: {said}; {mean:+.2f} points on one seed, which decides nothing."
    half = _half_width(pairs, _resolution(members))
    low, high = mean - half, mean + half
    interval = f"95 % interval {low:+.2f} to {high:+.2f} over {len(pairs)} paired seeds"
    return f"{verdict(low, high)}: {said}; {mean:+.2f} points, {interval}."


def _by_seed(members: Sequence[Member]) -> dict[str, float]:
    found = {}
    for member in members:
        top1 = member.run.last("valid_top1")
        if top1 is not None and is_whole(member.run):
            found[str(member.run.options.get("seed"))] = top1
    return found


def _half_width(differences: Sequence[float], resolution: float) -> float:
    """Return half of the 95 % t-interval of a mean."""
    from scipy.stats import t

    spread = visible_spread(differences, resolution)
    return float(t.ppf(0.975, len(differences) - 1) * spread / len(differences) ** 0.5)


def _resolution(members: Sequence[Member]) -> float:
    """Return the smallest step between two accuracies of any runs and epochs: one image is worth that, or less."""
    values = [epoch.get("valid_top1") for member in members for epoch in member.run.epochs]
    found = sorted({round(value, 6) for value in values if isinstance(value, float | int)})
    return min((upper - lower for lower, upper in pairwise(found)), default=0.0)
