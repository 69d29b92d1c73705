"""What terms share that use flows between channels: their options, the first flow of a run, what is logged and kept."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mgd.flow import ChannelCost, Flow, solve_control
from mgd.losses.align import at_size_of
from mgd.losses.term import HyperParameters, Update, Views
from mgd.taps import Probe


@dataclass(frozen=True, kw_only=True)
class FlowOptions(HyperParameters):
    """How a flow between the channels of two networks is found.

    Args:
        assignment: "cheapest", or a control that ignores or inverts the costs: "costliest", "identity" (neighbouring
            teacher channels by index), "random" (another one at every matching).
        capacity: how many teacher channels guide one student channel, see `mgd.solve_flow`.
        solver: see `mgd.solve_flow`.
        max_images: images observed for a matching, at least 1.
    """

    assignment: Literal["cheapest", "costliest", "identity", "random"] = "cheapest"
    capacity: Literal["spread", "truncate", "reference", "single"] | None = "spread"
    solver: Literal["auto", "ortools", "scipy", "sparse"] = "auto"
    max_images: int = 20_000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_images < 1:
            raise ValueError(f"max_images must be at least 1; got {self.max_images}")

    def used_capacity(self) -> str:
        """Return the capacity, where None stands for a usual one."""
        return self.capacity or "spread"

    def solve(self, cost: Tensor, seed: Sequence[int]) -> Flow:
        """Solve the flow of one cost matrix (S, T); `seed` is that of the control "random"."""
        return solve_control(cost, self.assignment, seed, capacity=self.used_capacity(), solver=self.solver)


def check_pairs(student: Probe, teachers: Sequence[Probe]) -> None:
    """Refuse networks whose taps do not pair up, or that are no student and frozen teachers.

    Raises:
        ValueError: saying which.
    """
    for teacher in teachers:
        if not teacher.frozen:
            raise ValueError("a flow matches a student to a frozen teacher: it does not go with peers that train")
        if len(student.sizes) != len(teacher.sizes):
            raise ValueError(f"a flow needs as many taps each; got {len(student.sizes)} and {len(teacher.sizes)}")


def say_sizes(student: Probe, teacher: Probe) -> list[str]:
    """Say of every tap at which the teacher's map is brought to the student's resolution; see `at_size_of`."""
    found = []
    for tap, (ours, theirs) in enumerate(zip(student.sizes, teacher.sizes, strict=True)):
        if ours != theirs:
            averaged = all(a % b == 0 for a, b in zip(theirs, ours, strict=True))
            found.append(
                f"the teacher's map at tap {_name(teacher, tap)}, {theirs[0]} x {theirs[1]}, is "
                f"{'averaged' if averaged else 'interpolated'} to the {ours[0]} x {ours[1]} of the student's tap "
                f"{_name(student, tap)}"
            )
    return found


def _name(network: Probe, tap: int) -> str:
    return network.paths[tap] if network.paths else f"number {tap}"


def say_margins(teacher: Probe, kind: str = "bn") -> str:
    """Say of every tap of a teacher where its margins come from: a norm, the map itself, or nowhere."""
    found = []
    for path, norm in zip(teacher.paths, teacher.norms, strict=True):
        measured = f"norm {norm}" if kind == "bn" and norm is not None else "measured"
        found.append(f"{path} {'none' if kind == 'none' else measured}")
    return f"margins: {', '.join(found)}"


@torch.no_grad()
def first_flows(
    student_channels: Sequence[int],
    teacher_channels: Sequence[Sequence[int]],
    options: FlowOptions,
    views: Views,
    device: torch.device,
) -> tuple[list[list[Flow]], Update]:
    """Observe costs once and solve the flow of every tap, for a term that starts from flows.

    Args:
        student_channels: S of every tap.
        teacher_channels: T of every tap, one list per teacher.
        options: how flows are found.
        views: images as the networks see them.
        device: of the networks.

    Returns:
        One list of flows per teacher, one flow per tap; what is logged and kept of them.

    Raises:
        RuntimeError: no images.
    """
    start = time.perf_counter()
    sums = [
        [ChannelCost(s, t).to(device) for s, t in zip(student_channels, widths, strict=True)]
        for widths in teacher_channels
    ]
    for student, teachers, _ in views(options.max_images):
        for stages, teacher in zip(sums, teachers, strict=True):
            for cost, ours, theirs in zip(stages, student.features, teacher.features, strict=True):
                cost.update(ours, at_size_of(ours, theirs))
    for stage in (stage for stages in sums for stage in stages):
        stage.all_reduce()
    costs = [[stage.mean() for stage in stages] for stages in sums]
    flows = [[options.solve(cost, (views.seed, 0, i)) for i, cost in enumerate(stages)] for stages in costs]
    kept = [flow for stages in flows for flow in stages], [cost for stages in costs for cost in stages]
    return flows, flow_record(*kept, time.perf_counter() - start)


def flow_record(
    flows: Sequence[Flow], costs: Sequence[Tensor], seconds: float, before: Sequence[Flow] | None = None
) -> Update:
    """Return what is logged and kept of flows: seconds, total cost, share of changed pairs; indices and costs.

    Args:
        flows: one per tap, teacher by teacher.
        costs: (S, T) of each.
        seconds: that the matching took.
        before: the flows that these replace, or None.
    """
    numbers = {"match_seconds": seconds, "flow_cost": sum(flow.total_cost for flow in flows)}
    if before is not None:
        pairs = sum(flow.matrix.sum() for flow in before)
        kept = sum((old.matrix & flow.matrix).sum() for old, flow in zip(before, flows, strict=True))
        numbers["flow_changed"] = float(1 - kept / pairs)
    arrays: dict[str, Any] = {}
    for stage, (flow, cost) in enumerate(zip(flows, costs, strict=True)):
        arrays[f"cost{stage}"] = cost.float().cpu().numpy()
        arrays[f"index{stage}"] = flow.index
        arrays[f"num_teacher{stage}"] = flow.num_teacher
        arrays[f"total_cost{stage}"] = flow.total_cost
    return numbers, arrays
