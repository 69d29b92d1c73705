"""Group the runs of a report into recipes, controls and teachers, and compare the recipes with their controls."""

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
from classification.reports.records import Run, as_mapping, planned_epochs

# Options that may differ between the seeds of one recipe, in addition to those that change no result.
SEED_OPTIONS = frozenset(
    {"seed", "seeded", "output", "resume", "teacher_resume", "teachers", "command", "img_size_asked", "term"}
)
SHARED_OPTIONS = ("data", "valid_list", "epochs", "batch_size", "lr", "img_size", "optimizer", "pretrained")
PATH_OPTIONS = ("data", "valid_list")
NUM_COLOURS = 8
CONTROL = "var(--control)"
TEACHER = "var(--teacher)"


@dataclass(frozen=True)
class Member:
    """A run in a report.

    Args:
        run: the run.
        role: "distilled"; "alone" (without a teacher); "teacher" (of another run in the report).
        group: name of its recipe; runs of one group differ only in the seed.
        colour: of the group, as CSS.
    """

    run: Run
    role: str
    group: str
    colour: str


def group_runs(runs: Sequence[Run]) -> list[Member]:
    """Give every run a role, a group and a colour; runs alone are gray if there are distilled runs.

    Distilled runs come first and teachers last; in each role, complete runs come first.
    """
    teachers = {path for run in runs for path in teacher_folders(run)}
    roles = [_role(run, teachers) for run in runs]
    keys = [_key(run, role) for run, role in zip(runs, roles, strict=True)]
    names = _group_names(runs, roles, keys)
    colours: dict[str, str] = {}
    coloured_roles = {"distilled"} if "distilled" in roles else {"alone"}
    for role, key in zip(roles, keys, strict=True):
        if role in coloured_roles and key not in colours:
            colours[key] = f"var(--c{len(colours) % NUM_COLOURS})"
    default_colours = {"teacher": TEACHER, "alone": CONTROL}
    members = [
        Member(run, role, names[key], colours.get(key) or default_colours.get(role, CONTROL))
        for run, role, key in zip(runs, roles, keys, strict=True)
    ]
    order = ["distilled", "alone", "teacher"]
    return sorted(members, key=lambda member: (order.index(member.role), not is_complete(member.run)))


def teacher_files(run: Run) -> list[tuple[Mapping[str, Any], Path | None]]:
    """Return (description, file) of a run's frozen teachers; relative paths start where the run was started."""
    started_in = Path(str(run.config.get("folder", "")))
    files = []
    for teacher in run.teachers:
        if teacher.get("frozen", True):
            file = teacher.get("resume")
            files.append((teacher, started_in / file if isinstance(file, str) and file else None))
    return files


def teacher_folders(run: Run) -> set[Path]:
    """Return the folders with the files of a run's teachers."""
    return {path.resolve().parent for _, path in teacher_files(run) if path is not None}


def _role(run: Run, teachers: set[Path]) -> str:
    if run.teachers:
        return "distilled"
    return "teacher" if run.folder.resolve() in teachers else "alone"


def flat_options(run: Run) -> dict[str, Any]:
    """Return the options that change results, those of terms as "mgd.reducer"."""
    neutral = {*names_where("free"), *SEED_OPTIONS}
    options = {name: value for name, value in run.options.items() if name != "terms" and name not in neutral}
    for term, entry in as_mapping(run.options.get("terms")).items():
        options |= {f"{term}.{name}": value for name, value in as_mapping(entry).items()}
    return options


def _key(run: Run, role: str) -> str:
    archs = [str(teacher.get("arch")) for teacher in run.teachers]
    return json.dumps([role, archs, run.terms, flat_options(run)], sort_keys=True, default=str)


def _group_names(runs: Sequence[Run], roles: Sequence[str], keys: Sequence[str]) -> dict[str, str]:
    """Return a name per key: role or terms, with the network if there are several, and other differing options."""
    example = {key: (run, role) for run, role, key in reversed(list(zip(runs, roles, keys, strict=True)))}
    archs = {run.arch for run, role in example.values() if role != "teacher"}
    base_names = {}
    for key, (run, role) in example.items():
        base_name = {"alone": "alone", "teacher": f"teacher {run.arch}"}.get(role, " + ".join(run.terms) or "distilled")
        base_names[key] = f"{run.arch} {base_name}" if len(archs) > 1 and role != "teacher" else base_name
    names = {}
    for key, name in base_names.items():
        same_name = [example[other][0] for other in base_names if base_names[other] == name]
        names[key] = f"{name}{_distinguish(example[key][0], same_name)}" if len(same_name) > 1 else name
    return names


def _distinguish(run: Run, others: Sequence[Run]) -> str:
    """Return the options in which a run differs from others, in brackets."""
    options_of_others = [flat_options(other) for other in others]
    options = flat_options(run)
    differ = sorted(name for name in options if any(other.get(name) != options[name] for other in options_of_others))
    archs = {tuple(str(teacher.get("arch")) for teacher in other.teachers) for other in others}
    descriptions = [f"{name} {options[name]}" for name in differ[:2]]
    if len(archs) > 1:
        descriptions.insert(0, f"of {', '.join(str(teacher.get('arch')) for teacher in run.teachers)}")
    return f" ({', '.join(descriptions or [run.name])})"


def control_of(member: Member, members: Sequence[Member]) -> list[Member]:
    """Return the runs alone of the same network, if possible only those with equal data, epochs and so on."""
    candidates = [other for other in members if other.role == "alone" and other.run.arch == member.run.arch]
    return [other for other in candidates if _budget(other.run) == _budget(member.run)] or candidates


def is_complete(run: Run) -> bool:
    """Return whether all planned epochs of a run are finished."""
    planned = planned_epochs(run.options)
    return bool(run.epochs) and (planned is None or len(run.epochs) >= planned)


def find_unfair(members: Sequence[Member]) -> dict[str, str]:
    """Return {recipe: other differences to its control}, which make the comparison unfair."""
    notes = {}
    for group in dict.fromkeys(member.group for member in members if member.role == "distilled"):
        first = next(member for member in members if member.group == group)
        for other in control_of(first, members)[:1]:
            own_options, control_options = _budget(first.run), _budget(other.run)
            differences = [
                f"{name} ({control_options[name]}, then {own_options[name]})"
                for name in SHARED_OPTIONS
                if own_options[name] != control_options[name]
            ]
            if differences:
                notes[group] = f"{other.run.name} and {first.run.name} differ in {', '.join(differences)}"
    return notes


def _budget(run: Run) -> dict[str, str]:
    """Return the options that a recipe and its control should share; paths start where the run was started."""
    started_in = Path(str(run.config.get("folder", "")))
    values = {name: run.options.get(name) for name in SHARED_OPTIONS}
    return {
        name: str(started_in / value if name in PATH_OPTIONS and isinstance(value, str) else value)
        for name, value in values.items()
    }


def compare_with_controls(members: Sequence[Member]) -> str:
    """Compare distilled runs with runs alone in one line per recipe, by the last top-1 of complete runs."""
    groups = list(dict.fromkeys(member.group for member in members if member.role == "distilled"))
    unfair = find_unfair(members)
    warning = " Other options differ as well, see Failures."
    lines = [_compare_group(group, members) + (warning if group in unfair else "") for group in groups]
    if not lines:
        scored = [member.run for member in members if member.run.last("valid_top1") is not None]
        lines = [
            f"{run.name} reaches {run.last('valid_top1'):.2f} % top-1 after {len(run.epochs)} epochs."
            for run in scored[:3]
        ]
        lines.append("No run was distilled, so there is nothing to compare." if scored else "No accuracy was recorded.")
    return "\n".join(lines)


def _compare_group(group: str, members: Sequence[Member]) -> str:
    group_members = [m for m in members if m.group == group and m.role == "distilled"]
    by_seed, control_by_seed = _by_seed(group_members), _by_seed(control_of(group_members[0], members))
    if not by_seed:
        return f"{group}: no run is complete."
    text = f"{group} reaches {statistics.mean(by_seed.values()):.2f} % top-1"
    if not control_by_seed:
        return f"{text}; there is no complete run of the same student alone to compare with."
    text += f", the same student alone {statistics.mean(control_by_seed.values()):.2f} %"
    differences = [by_seed[seed] - control_by_seed[seed] for seed in by_seed if seed in control_by_seed]
    if not differences:
        return f"{text}; no seed has both, so the difference is not tested."
    mean = statistics.mean(differences)
    if len(differences) == 1:
        return f"UNDECIDED: {text}; {mean:+.2f} points on one seed, which decides nothing."
    half_width = _half_width(differences, _resolution(members))
    low, high = mean - half_width, mean + half_width
    interval = f"95 % interval {low:+.2f} to {high:+.2f} over {len(differences)} paired seeds"
    return f"{verdict(low, high)}: {text}; {mean:+.2f} points, {interval}."


def _by_seed(members: Sequence[Member]) -> dict[str, float]:
    top1_by_seed = {}
    for member in members:
        top1 = member.run.last("valid_top1")
        if top1 is not None and is_complete(member.run):
            top1_by_seed[str(member.run.options.get("seed"))] = top1
    return top1_by_seed


def _half_width(differences: Sequence[float], resolution: float) -> float:
    """Return half the width of the 95 % t-interval of a mean."""
    from scipy.stats import t

    spread = visible_spread(differences, resolution)
    return float(t.ppf(0.975, len(differences) - 1) * spread / len(differences) ** 0.5)


def _resolution(members: Sequence[Member]) -> float:
    """Estimate the change in top-1 by one image: the smallest difference of two values of any runs and epochs."""
    values = [epoch.get("valid_top1") for member in members for epoch in member.run.epochs]
    distinct = sorted({round(value, 6) for value in values if isinstance(value, float | int)})
    return min((upper - lower for lower, upper in pairwise(distinct)), default=0.0)
