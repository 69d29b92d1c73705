"""Shared by terms that use flows between channels: options, the first flow of a run, and what is logged and kept."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mgd.flow import Flow, assign_groups, group_channels, make_cost, solve_control
from mgd.flow.gram import ChannelGram
from mgd.flow.groups import CAPACITIES_OF_GROUPS
from mgd.losses.align import at_size_of
from mgd.losses.gather import first_rank
from mgd.losses.term import HyperParameters, Update, Views
from mgd.taps import Outputs, Probe


@dataclass(frozen=True, kw_only=True)
class FlowOptions(HyperParameters):
    """How a flow between the channels of two networks is found.

    Args:
        assignment: "cheapest", or a control: "costliest", "identity" (by index: neighbouring teacher channels),
            "random" (a new one at every matching).
        capacity: how many teacher channels guide one student channel, see `mgd.solve_flow`.
        solver: "ortools", "scipy" or "sparse", all exact, or "auto", the fastest of them for the size.
        max_images: number of images observed for a matching, at least 1.
        cost: "cosine" or "correlation" of the maps, see `mgd.channel_cost`, or "gradient": the cosine of maps times the
            gradient of their network's cross-entropy, which compares the effects of channels on the loss.
        groups: "student": the flow decides which teacher channels share a target. "teacher": they are grouped first, so
            that one target carries as much of a group as possible, and each group goes to the student channel where it
            costs least; see `mgd.flow.group_channels`. If the student has as many channels or more, both are the same.
    """

    assignment: Literal["cheapest", "costliest", "identity", "random"] = "cheapest"
    capacity: Literal["spread", "truncate", "reference", "single"] | None = "spread"
    solver: Literal["auto", "ortools", "scipy", "sparse"] = "auto"
    max_images: int = 20_000
    cost: Literal["cosine", "correlation", "gradient"] = "cosine"
    groups: Literal["student", "teacher"] = "student"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_images < 1:
            raise ValueError(f"max_images must be at least 1; got {self.max_images}")
        capacity = self.capacity or self.used_capacity()
        if self.groups == "teacher" and capacity not in CAPACITIES_OF_GROUPS:
            raise ValueError(
                f"groups 'teacher' takes the capacity {' or '.join(map(repr, CAPACITIES_OF_GROUPS))}, not {capacity!r}"
            )

    def used_capacity(self) -> str:
        """Return the capacity, or its default for None."""
        return self.capacity or "spread"

    def map_cost(self) -> str:
        """Return the cost between the observed maps; see `mgd.flow.make_cost`."""
        return "cosine" if self.cost == "gradient" else self.cost

    def needs_gram(self) -> bool:
        """Return whether the Gram matrix of the teacher's channels is needed."""
        return self.groups == "teacher"

    def solve(self, cost: Tensor, seed: Sequence[int], gram: Tensor | None = None, start: Any = None) -> Flow:
        """Solve the flow of one pair of taps.

        Args:
            cost: (S, T).
            seed: of the assignment "random", and of the start of the teacher's groups.
            gram: (T, T), see `ChannelGram`; None unless `needs_gram`.
            start: (G, S) groups of the last matching, from which the search for the teacher's groups starts, or None.
        """
        if self.groups == "student" or cost.shape[0] >= cost.shape[1]:
            return solve_control(cost, self.assignment, seed, capacity=self.used_capacity(), solver=self.solver)
        started = time.perf_counter()
        groups = group_channels(
            gram, cost.shape[0], capacity=self.used_capacity(), solver=self.solver, seed=seed, start=start
        )
        flow = assign_groups(cost, groups, self.assignment, seed, solver=self.solver)
        return replace(flow, seconds=time.perf_counter() - started)


def check_pairs(student: Probe, teachers: Sequence[Probe]) -> None:
    """Check that all teachers are frozen, and have as many taps as the student.

    Raises:
        ValueError: a teacher is not frozen, or the numbers of taps differ.
    """
    for teacher in teachers:
        if not teacher.frozen:
            raise ValueError("a flow matches a student to a frozen teacher: it does not work with peers that train")
        if len(student.sizes) != len(teacher.sizes):
            raise ValueError(
                f"a flow needs equally many taps of both networks; got {len(student.sizes)} and {len(teacher.sizes)}"
            )


def say_sizes(student: Probe, teacher: Probe) -> list[str]:
    """Return a note on every tap at which the teacher's map is resized to the student's; see `at_size_of`."""
    notes = []
    for tap, (ours, theirs) in enumerate(zip(student.sizes, teacher.sizes, strict=True)):
        if ours != theirs:
            averaged = all(a % b == 0 for a, b in zip(theirs, ours, strict=True))
            notes.append(
                f"the teacher's map at tap {_name(teacher, tap)}, {theirs[0]} x {theirs[1]}, is "
                f"{'averaged' if averaged else 'interpolated'} to the {ours[0]} x {ours[1]} of the student's tap "
                f"{_name(student, tap)}"
            )
    return notes


def _name(network: Probe, tap: int) -> str:
    return network.paths[tap] if network.paths else f"number {tap}"


def margin_of(kind: str, norm_margin: Tensor | None, width: int) -> Tensor | None:
    """Return the margins of a tap of a teacher, or None to measure them on the map.

    Args:
        kind: "bn", "map" or "none".
        norm_margin: (T,) from its norm, or None.
        width: T.
    """
    if kind == "none":
        return torch.full((width,), -torch.inf)
    return norm_margin if kind == "bn" else None


def say_margins(teacher: Probe, kind: str = "bn") -> str:
    """Return a note on where the margins of a teacher's taps come from: from a norm, or measured, or none."""
    sources = []
    for path, norm in zip(teacher.paths, teacher.norms, strict=True):
        measured = f"norm {norm}" if kind == "bn" and norm is not None else "measured"
        sources.append(f"{path} {'none' if kind == 'none' else measured}")
    return f"margins: {', '.join(sources)}"


Gradients = list[list[Tensor]]  # one list per network, one (B, C, H, W) per tap


def looks(views: Views, options: FlowOptions) -> Iterator[tuple[Outputs, list[Outputs], Gradients | None]]:
    """Yield the outputs of student and teachers on the images of a matching, and gradients if the cost needs them.

    The gradients are those of each network's cross-entropy for its maps, the student's first.
    """
    if options.cost == "gradient":
        for student, teachers, _, gradients in views.gradients(options.max_images):
            yield student, teachers, gradients
        return
    for student, teachers, _ in views(options.max_images):
        yield student, teachers, None


class _Sums(nn.Module):
    """The sums of a matching pass for one pair of taps."""

    def __init__(self, num_student: int, num_teacher: int, options: FlowOptions) -> None:
        super().__init__()
        self.cost = make_cost(num_student, num_teacher, options.map_cost())
        self.gram = ChannelGram(num_teacher) if options.needs_gram() else None

    def update(self, student: Tensor, teacher: Tensor, gradients: tuple[Tensor, Tensor] | None) -> None:
        ours, theirs = (student, teacher) if gradients is None else (student * gradients[0], teacher * gradients[1])
        self.cost.update(ours, at_size_of(ours, theirs))
        if self.gram is not None:
            self.gram.update(teacher)

    def solve(self, options: FlowOptions, seed: Sequence[int]) -> tuple[Flow, Tensor]:
        self.cost.all_reduce()
        if self.gram is not None:
            self.gram.all_reduce()
        cost = self.cost.mean()
        return options.solve(cost, seed, None if self.gram is None else self.gram.mean()), cost


@torch.no_grad()
def first_flows(
    student_channels: Sequence[int],
    teacher_channels: Sequence[Sequence[int]],
    options: FlowOptions,
    views: Views,
    device: torch.device,
    *,
    taps: Sequence[int] | None = None,
    rectify: bool = False,
) -> tuple[list[list[Flow]], Update]:
    """Observe costs once and solve the flow of every tap, for a term that starts from flows.

    Args:
        student_channels: S of every tap.
        teacher_channels: T of every tap, one list per teacher.
        options: how flows are found.
        views: of the training images.
        device: of the networks.
        taps: numbers of these taps in the networks; None for all.
        rectify: whether a ReLU is applied to the maps first.

    Returns:
        One list of flows per teacher, one flow per tap; and what is logged and kept of them.

    Raises:
        RuntimeError: there are no images.
    """
    start = time.perf_counter()
    sums = [
        [_Sums(s, t, options).to(device) for s, t in zip(student_channels, widths, strict=True)]
        for widths in teacher_channels
    ]
    chosen = range(len(student_channels)) if taps is None else taps
    for student, teachers, gradients in looks(views, options):
        for number, (stages, teacher) in enumerate(zip(sums, teachers, strict=True)):
            for stage, tap in zip(stages, chosen, strict=True):
                maps = student.features[tap], teacher.features[tap]
                ours, theirs = map(F.relu, maps) if rectify else maps
                own = None if gradients is None else (gradients[0][tap], gradients[number + 1][tap])
                stage.update(ours, theirs, own)
    solved = [[stage.solve(options, (views.seed, 0, i)) for i, stage in enumerate(stages)] for stages in sums]
    solved = first_rank(solved)
    flows = [[flow for flow, _ in stages] for stages in solved]
    costs = [cost for stages in solved for _, cost in stages]
    return flows, flow_record([flow for stages in flows for flow in stages], costs, time.perf_counter() - start)


def flow_record(
    flows: Sequence[Flow], costs: Sequence[Tensor], seconds: float, before: Sequence[Flow] | None = None
) -> Update:
    """Return what is logged and kept of flows.

    Logged are the seconds, the total cost and the share of changed pairs; and if they are known, the means over taps of
    the share of energy kept, and of the number of teacher channels per target (exp of the entropy of their weights).
    Kept are indices, costs and weights.

    Args:
        flows: one per tap, teacher by teacher.
        costs: (S, T) of each.
        seconds: duration of the matching.
        before: the flows that these replace, or None.
    """
    numbers = {"match_seconds": seconds, "flow_cost": sum(flow.total_cost for flow in flows)}
    if before is not None:
        num_pairs = sum(flow.matrix.sum() for flow in before)
        num_kept = sum(
            (old.matrix & new.matrix).sum() for old, new in zip(before, flows, strict=True) if _alike(old, new)
        )
        numbers["flow_changed"] = float(1 - num_kept / num_pairs)
    energies = [flow.energy for flow in flows if flow.energy is not None]
    if energies:
        numbers["energy_kept"] = sum(energies) / len(energies)
    counts = [flow.channels_per_target for flow in flows if flow.channels_per_target is not None]
    if counts:
        numbers["channels_per_target"] = sum(counts) / len(counts)
    arrays: dict[str, Any] = {}
    for stage, (flow, cost) in enumerate(zip(flows, costs, strict=True)):
        arrays[f"cost{stage}"] = cost.float().cpu().numpy()
        arrays[f"index{stage}"] = flow.index
        arrays[f"num_teacher{stage}"] = flow.num_teacher
        arrays[f"total_cost{stage}"] = flow.total_cost
        if flow.energy is not None:
            arrays[f"energy_kept{stage}"] = flow.energy
        if flow.weights is not None:
            arrays[f"weights{stage}"] = flow.weights.astype("float32")
    return numbers, arrays


def _alike(old: Flow, new: Flow) -> bool:
    return old.num_teacher == new.num_teacher
