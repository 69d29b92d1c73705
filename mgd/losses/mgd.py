"""The matching guided distillation term: adapters, margins and flows, and how they are renewed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import inf
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mgd.checks import check_at_least_0, check_maps
from mgd.flow import ASSIGNMENTS, SOLVERS, ChannelCost, Flow, slots, solve_control
from mgd.flow.cost import TINY
from mgd.losses.margin import MeasuredMargin, sum_partial_l2
from mgd.losses.reduce import REDUCERS, reduce_channels
from mgd.taps import Batch, Outputs

FORMS = ("sum", "mean", "relative")
BOUND = 100.0  # of a stage in the relative form: the square of ten times the norm of the teacher
SLICE = 2**18  # elements of a student's maps that are compared at once on a processor


class _Stage(nn.Module):
    """One pair of taps: its adapter, cost sums, margin and flow."""

    index: Tensor
    margin: Tensor
    total_cost: Tensor
    peak: Tensor

    def __init__(self, num_student: int, num_teacher: int, margin: Tensor | None, depth: int) -> None:
        super().__init__()
        self.adapter = nn.BatchNorm2d(num_student)
        self.cost = ChannelCost(num_student, num_teacher)
        self.measured = MeasuredMargin(num_teacher) if margin is None else None
        margin = torch.zeros(num_teacher) if margin is None else margin.detach().clone().float()
        if margin.shape != (num_teacher,):
            raise ValueError(f"expected {num_teacher} margins, one per teacher channel; got {tuple(margin.shape)}")
        self.register_buffer("margin", margin)
        self.register_buffer("index", torch.full((depth, num_student), -1, dtype=torch.int64))
        self.register_buffer("total_cost", torch.zeros((), dtype=torch.float64))
        # The largest value of the teacher's map that was observed.
        self.register_buffer("peak", torch.tensor(-torch.inf), persistent=False)

    @property
    def num_teacher(self) -> int:
        return self.margin.numel()

    def sums(self) -> list[ChannelCost | MeasuredMargin]:
        """What a matching pass accumulates."""
        return [self.cost] if self.measured is None else [self.cost, self.measured]

    def all_reduce(self) -> None:
        """Join what all ranks have observed."""
        for total in self.sums():
            total.all_reduce()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.peak, dist.ReduceOp.MAX)


def _maps(outputs: Outputs | Sequence[Tensor]) -> Sequence[Tensor]:
    return outputs.features if isinstance(outputs, Outputs) else outputs


class ChannelMatching(nn.Module):
    """Pull the student's maps before the ReLU towards the teacher channels assigned to them.

    With e_i = partial_l2(BN_i(student_i), target_i, margin_i) and target_i = reduce(teacher_i, flow_i), stage i of n:

    "sum", as published: loss = sum_i e_i / B / 2^(n-1-i), B the images of the map. It grows with pixels, channels and
        the teacher's scale.
    "mean": loss = sum_i e_i / (B S H W), the error per element. Where a stage halves the side and doubles the channels,
        this is the sum over its last stage's S H W: the same at every image size.
    "relative": loss = sum_i e_i / |max(target_i, 0)|^2. Free of the teacher's scale too; n for a student at 0. The
        denominator is that of the images at hand: over ranks, or parts of a batch, it is a mean of such ratios.
        No ratio exceeds 100: beyond, the denominator is a constant e_i / 100, and the gradient that of 100 log e_i. It
        is so for a student far above its teacher, and for a stage whose map is nowhere positive; `dead` names those.

    Use: `observe` batches in eval mode, `rematch` to solve the flows, then call as a term; again every few epochs.
    Flows, margins and cost sums are buffers; `load_state_dict` restores them.

    Args:
        student_channels: S of every stage.
        teacher_channels: T of every stage.
        margins: (T,) per stage, or None for a stage whose margin is measured on the map while observing.
        reducer: "amp", "sp", "sp_mean", "rd" or "sm"; "sm" implies capacity "single".
        capacity: see `mgd.solve_flow`.
        solver: see `mgd.solve_flow`.
        form: "sum", "mean" or "relative".
        stage_weights: factor of every stage; None for those of `form` above.
        assignment: "cheapest", or a control that ignores or inverts the costs: "costliest", "identity" (neighbouring
            teacher channels by index), "random" (another one at every `rematch`).
        seed: of "random".
        observe_share: share of each training batch whose costs `forward` adds to the sums, in [0, 1]; 0 for none.

    Raises:
        ValueError: lists of different length, margins of the wrong length, an unknown word.

    Reference: Yue, Deng, Zhou, 2020, arXiv:2008.09958.
    """

    num_updates: Tensor

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        margins: Sequence[Tensor | None],
        *,
        reducer: str = "amp",
        capacity: str = "spread",
        solver: str = "auto",
        form: str = "sum",
        stage_weights: Sequence[float] | None = None,
        assignment: str = "cheapest",
        seed: int = 0,
        observe_share: float = 0.0,
    ) -> None:
        super().__init__()
        num = len(student_channels)
        if stage_weights is None:
            stage_weights = [0.5 ** (num - 1 - i) if form == "sum" else 1.0 for i in range(num)]
        lengths = {num, len(teacher_channels), len(margins), len(stage_weights)}
        if num == 0 or len(lengths) > 1:
            raise ValueError("student_channels, teacher_channels, margins and stage_weights need one entry per stage")
        words: dict[str, tuple[str, Iterable[str]]] = {
            "reducer": (reducer, REDUCERS),
            "solver": (solver, (*SOLVERS, "auto")),
            "form": (form, FORMS),
            "assignment": (assignment, ASSIGNMENTS),
        }
        for what, (word, known) in words.items():
            if word not in known:
                raise ValueError(f"unknown {what} {word!r}; choose from {', '.join(known)}")
        if reducer == "sm" and capacity not in ("spread", "single"):
            raise ValueError(f"reducer 'sm' matches one to one: capacity must be 'single', not {capacity!r}")
        for weight in stage_weights:
            check_at_least_0("ChannelMatching", stage_weights=weight)
        if not 0 <= observe_share <= 1:
            raise ValueError(f"observe_share must be in [0, 1]; got {observe_share}")
        self.observe_share = observe_share
        self.reducer = reducer
        self.capacity = "single" if reducer == "sm" else capacity
        self.solver = solver
        self.form, self.assignment, self.seed = form, assignment, seed
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        self.stage_weights = tuple(stage_weights)
        self.stages = nn.ModuleList(
            _Stage(s, t, margin, slots(s, t, self.capacity))
            for s, t, margin in zip(student_channels, teacher_channels, margins, strict=True)
        )
        self.generator: torch.Generator | None = None  # source of "rd"'s draws; None: the device's default one
        self.costs: list[Tensor] = []  # (S, T) of every stage at the last rematch
        self.dead: list[int] = []  # stages whose teacher's map was nowhere above 1e-15 at the last rematch
        self._details: list[tuple[str, float]] = []  # solver and seconds of the last rematch
        self._matched = False
        self.register_load_state_dict_post_hook(_mark_loaded)  # type: ignore[no-untyped-call]

    @property
    def matched(self) -> bool:
        """Whether there are flows to train with."""
        return self._matched

    @property
    def flows(self) -> list[Flow]:
        """The flow of every stage, as solved last or as loaded.

        Raises:
            RuntimeError: before the first `rematch`.
        """
        self._require_flows()
        details = self._details or [("loaded", 0.0)] * len(self.stages)
        return [
            Flow(stage.index.cpu().numpy(), stage.num_teacher, float(stage.total_cost), solver, seconds)
            for stage, (solver, seconds) in zip(self._stages(), details, strict=True)
        ]

    @torch.no_grad()
    def observe(self, student: Outputs | Sequence[Tensor], teacher: Outputs | Sequence[Tensor]) -> None:
        """Add a batch to the cost sums, and to the measured margins.

        Args:
            student: `Outputs`, or its features: one (B, S, H, W) per stage.
            teacher: `Outputs`, or its features: one (B, T, H, W) per stage.
        """
        for stage, student_map, teacher_map in self._pairs(_maps(student), _maps(teacher)):
            stage.cost.update(student_map, teacher_map)
            stage.peak.copy_(torch.maximum(stage.peak, teacher_map.amax().float()))
            if stage.measured is not None:
                stage.measured.update(teacher_map)

    @torch.no_grad()
    def rematch(self) -> list[Flow]:
        """Solve every stage on the costs observed since the last call, over all ranks, and forget them.

        Returns:
            One optimal `Flow` per stage; the same on every rank.

        Raises:
            RuntimeError: nothing was observed, or the solver found no optimum.
            ValueError: a map that was observed is not finite; what was observed is forgotten.
        """
        for stage in self._stages():
            stage.all_reduce()
        self.costs = [stage.cost.mean() for stage in self._stages()]
        number = int(self.num_updates)
        try:
            solved = [
                solve_control(cost, self.assignment, (self.seed, number, i), capacity=self.capacity, solver=self.solver)
                for i, cost in enumerate(self.costs)
            ]
        except ValueError:
            self.forget()
            raise
        self.num_updates += 1
        peaks = [float(stage.peak) for stage in self._stages()]
        self.dead = [number for number, peak in enumerate(peaks) if -inf < peak < TINY]  # -inf: seen by another process
        for stage, flow in zip(self._stages(), solved, strict=True):
            stage.index.copy_(torch.as_tensor(flow.index))
            stage.total_cost.fill_(flow.total_cost)
            if stage.measured is not None:
                stage.margin.copy_(stage.measured.mean())
        self.forget()
        self._details = [(flow.solver, flow.seconds) for flow in solved]
        self._matched = True
        return solved

    def collect(self, *, first: bool) -> None:
        """Bring what all ranks have observed to the first one, as for a checkpoint."""
        for stage in self._stages():
            stage.all_reduce()
        if not first:
            self.forget()

    def forget(self) -> None:
        """Forget what was observed since the last `rematch`."""
        for stage in self._stages():
            for total in stage.sums():
                total.reset()
            stage.peak.fill_(-inf)

    def forward(self, student: Outputs, teachers: list[Outputs], batch: Batch | None = None) -> Tensor:
        """Return the loss, a scalar, against the one teacher.

        Raises:
            RuntimeError: before the first `rematch`.
            ValueError: another number of teachers or maps, or maps of another size.
        """
        if len(teachers) != 1:
            raise ValueError(f"a ChannelMatching has one teacher and got {len(teachers)}: use mgd.losses.EachTeacher")
        self._require_flows()
        if self.training and self.observe_share:
            self.observe(*([m[: self._observed(len(m))] for m in o.features] for o in (student, teachers[0])))
        loss = student.logits.new_zeros((), dtype=torch.float32)
        pairs = self._pairs(student.features, teachers[0].features)
        for (stage, student_map, teacher_map), weight in zip(pairs, self.stage_weights, strict=True):
            adapted = stage.adapter(student_map)
            error, energy = self._compare(stage, adapted, teacher_map)
            if self.form == "sum":
                scale: Tensor | float = len(adapted)
            elif self.form == "mean":
                scale = adapted.numel()
            else:
                scale = torch.maximum(energy, error.detach() / BOUND).clamp_min(1e-30)
            loss = loss + weight * error / scale
        return loss

    def _observed(self, num_images: int) -> int:
        return -int(-self.observe_share * num_images // 1)  # rounded up

    def _compare(self, stage: _Stage, student_map: Tensor, teacher_map: Tensor) -> tuple[Tensor, Tensor]:
        """Return a stage's error and, for the relative form, the energy of its target."""

        def reduce(part: Tensor) -> tuple[Tensor, Tensor]:
            return reduce_channels(part, stage.margin, stage.index, self.reducer, self.generator)

        size = SLICE if student_map.device.type == "cpu" else None  # a slice stays in a processor's cache
        return sum_partial_l2(student_map, teacher_map, reduce, slice_size=size, with_energy=self.form == "relative")

    def _stages(self) -> list[_Stage]:
        return [stage for stage in self.stages if isinstance(stage, _Stage)]

    def _pairs(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> list[tuple[_Stage, Tensor, Tensor]]:
        if not len(student) == len(teacher) == len(self.stages):
            raise ValueError(
                f"expected {len(self.stages)} maps a network; "
                f"got {len(student)} of the student, {len(teacher)} of the teacher"
            )
        for number, (stage, *maps) in enumerate(zip(self._stages(), student, teacher, strict=True)):
            check_maps(f"stage {number} of a ChannelMatching", *maps, same="resolution")
            wanted, found = tuple(stage.cost.cosine.shape), (maps[0].shape[1], maps[1].shape[1])
            if found != wanted:
                raise ValueError(
                    f"stage {number} of a ChannelMatching has {wanted[0]} channels of the student and {wanted[1]} of "
                    f"the teacher; got maps with {found[0]} and {found[1]}"
                )
        return list(zip(self._stages(), student, teacher, strict=True))

    def _require_flows(self) -> None:
        if not self._matched:
            raise RuntimeError("no flows yet: observe some batches and call rematch() before training")


def matchings(module: nn.Module) -> list[ChannelMatching]:
    """Return every `ChannelMatching` in a module, one a teacher in a distiller that has several."""
    return [found for found in module.modules() if isinstance(found, ChannelMatching)]


def _mark_loaded(module: nn.Module, _: Any) -> None:
    assert isinstance(module, ChannelMatching)
    module._details = []
    module._matched = all(bool((stage.index[0] >= 0).all()) for stage in module._stages())
