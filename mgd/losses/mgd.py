"""The matching guided distillation term: adapters, margins and flows, and how they are renewed."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mgd.checks import check_at_least_0, check_maps, check_positive
from mgd.flow import Flow, slots
from mgd.flow.cost import TINY
from mgd.losses.align import at_size_of
from mgd.losses.flows import FlowOptions, check_pairs, flow_record, say_margins, say_sizes
from mgd.losses.margin import sum_partial_l2
from mgd.losses.reduce import reduce_channels
from mgd.losses.stage import Stage
from mgd.losses.term import EachTeacher, Term, Update, Views
from mgd.taps import Batch, Outputs, Probe

BOUND = 100.0  # of a stage in the relative form: the square of ten times the norm of the teacher
SLICE = 2**18  # elements of a student's maps that are compared at once on a processor


def _maps(outputs: Outputs | Sequence[Tensor]) -> Sequence[Tensor]:
    return outputs.features if isinstance(outputs, Outputs) else outputs


class ChannelMatching(Term):
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

    A teacher's map of another resolution is brought to the student's, see `align.at_size_of`.

    Use: `update` before every epoch, then call as a term. By hand: `observe` batches in eval mode, `rematch` to solve
    the flows. Flows, margins and cost sums are buffers; `load_state_dict` restores them.

    Args:
        student_channels: S of every stage.
        teacher_channels: T of every stage.
        margins: (T,) per stage, or None for a stage whose margin is measured on the map while observing.
        hyper: the hyper-parameters, see `Term`.
        seed: of the assignment "random".
        observe_share: share of each training batch whose costs `forward` adds to the sums, in [0, 1]; 0 for none.
        values: the hyper-parameters by name.

    Raises:
        ValueError: lists of different length, margins of the wrong length, a hyper-parameter outside its range.

    Reference: Yue, Deng, Zhou, 2020, arXiv:2008.09958.
    """

    needs = frozenset({"maps", "frozen"})
    fuses = True
    weight = 5.0

    @dataclass(frozen=True, kw_only=True)
    class Hyper(FlowOptions):
        """Hyper-parameters of `ChannelMatching`.

        Args:
            reducer: how the teacher channels of a student channel become one target, see `mgd.reduce_channels`.
            capacity: see `FlowOptions`; None for "spread", or for "single" where the reducer is "sm".
            form: "sum", "mean" or "relative", see `ChannelMatching`.
            loss_factor: in the form "sum" the term's weight is one over it; 1e4 suits 224 px.
            update_freq: epochs between two matchings; 0 for one alone, before training.
            observe: "pass", costs are measured in a pass before each matching, or "online", on a share of each training
                batch, except for the first matching.
            margin: "bn", from the norm before the tap where there is one, "map", measured, or "none".
            stage_weights: factor of every stage; None for those of the form.
        """

        reducer: Literal["amp", "sp", "sp_mean", "rd", "sm"] = "amp"
        capacity: Literal["spread", "truncate", "reference", "single"] | None = None
        form: Literal["sum", "mean", "relative"] = "sum"
        loss_factor: float = 1e4
        update_freq: int = 2
        observe: Literal["pass", "online"] = "pass"
        margin: Literal["bn", "map", "none"] = "bn"
        stage_weights: tuple[float, ...] | None = None

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.reducer == "sm" and self.capacity not in (None, "single"):
                raise ValueError(f"reducer 'sm' matches one to one: capacity must be 'single', not {self.capacity!r}")
            check_positive("mgd", loss_factor=self.loss_factor)
            check_at_least_0("mgd", update_freq=self.update_freq)
            if self.observe == "online" and not self.update_freq:
                raise ValueError("observe 'online' goes with an update_freq of at least 1")
            for weight in self.stage_weights or ():
                check_at_least_0("mgd", stage_weights=weight)

        def used_capacity(self) -> str:
            return "single" if self.reducer == "sm" else super().used_capacity()

        def without_effect(self) -> dict[str, str]:
            if self.form == "sum":
                return {"weight": "the form mean or relative"}
            return {"loss_factor": "the form sum"}

    hyper: Hyper
    num_updates: Tensor

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        margins: Sequence[Tensor | None],
        hyper: Hyper | None = None,
        *,
        seed: int = 0,
        observe_share: float = 0.0,
        **values: Any,
    ) -> None:
        super().__init__(hyper, **values)
        num, form, weights = len(student_channels), self.hyper.form, self.hyper.stage_weights
        if weights is None:
            weights = tuple(0.5 ** (num - 1 - i) if form == "sum" else 1.0 for i in range(num))
        lengths = {num, len(teacher_channels), len(margins), len(weights)}
        if num == 0 or len(lengths) > 1:
            raise ValueError("student_channels, teacher_channels, margins and stage_weights need one entry per stage")
        if not 0 <= observe_share <= 1:
            raise ValueError(f"observe_share must be in [0, 1]; got {observe_share}")
        self.stage_weights, self.seed, self.observe_share = weights, seed, observe_share
        if form == "sum":
            self.weight = 1 / self.hyper.loss_factor
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        self.stages = nn.ModuleList(
            Stage(s, t, margin, slots(s, t, self.hyper.used_capacity()))
            for s, t, margin in zip(student_channels, teacher_channels, margins, strict=True)
        )
        self.generator: torch.Generator | None = None  # source of "rd"'s draws; None: the device's default one
        self.costs: list[Tensor] = []  # (S, T) of every stage at the last rematch
        self.dead: list[int] = []  # stages whose teacher's map was nowhere above 1e-15 at the last rematch
        self.paths: Sequence[str] = ()  # of the teacher's taps, for messages
        self._details: list[tuple[str, float]] = []  # solver and seconds of the last rematch
        self._matched = False
        self.register_load_state_dict_post_hook(_mark_loaded)  # type: ignore[no-untyped-call]

    @classmethod
    def make(cls, student: Probe, teachers: Sequence[Probe], num_images: int, hyper: Hyper) -> Term:
        check_pairs(student, teachers)
        share = min(1.0, hyper.max_images / (num_images * hyper.update_freq)) if hyper.observe == "online" else 0.0
        terms, notes = [], []
        for teacher in teachers:
            margins = [
                _margin(hyper.margin, given, width)
                for given, width in zip(
                    teacher.margins or [None] * len(teacher.channels), teacher.channels, strict=True
                )
            ]
            terms.append(cls(student.channels, teacher.channels, margins, hyper, observe_share=share))
            terms[-1].paths = teacher.paths
            notes += [say_margins(teacher, hyper.margin)] if teacher.paths else []
            notes += say_sizes(student, teacher)
        term = terms[0] if len(terms) == 1 else EachMatching(terms)
        term.notes = notes
        return term

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
            Flow(stage.index.cpu().numpy().copy(), stage.num_teacher, float(stage.total_cost), solver, seconds)
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
            solved = [self.hyper.solve(cost, (self.seed, number, i)) for i, cost in enumerate(self.costs)]
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

    def update(self, epoch: int, views: Views) -> Update:
        """Observe both networks and solve the flows anew, every `update_freq` epochs and where there are none yet."""
        return _update([self], epoch, views)

    def check_state(self) -> None:
        """Refuse flows that name channels which the teacher lacks."""
        for number, stage in enumerate(self._stages()):
            if ((stage.index < -1) | (stage.index >= stage.num_teacher)).any():
                raise ValueError(f"the flow of stage {number} names channels that the teacher lacks")

    def collect(self, *, first: bool) -> None:
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
            if self.hyper.form == "sum":
                scale: Tensor | float = len(adapted)
            elif self.hyper.form == "mean":
                scale = adapted.numel()
            else:
                scale = torch.maximum(energy, error.detach() / BOUND).clamp_min(1e-30)
            loss = loss + weight * error / scale
        return loss

    def _observed(self, num_images: int) -> int:
        return -int(-self.observe_share * num_images // 1)  # rounded up

    def _compare(self, stage: Stage, student_map: Tensor, teacher_map: Tensor) -> tuple[Tensor, Tensor]:
        """Return a stage's error and, for the relative form, the energy of its target."""

        def reduce(part: Tensor) -> tuple[Tensor, Tensor]:
            return reduce_channels(part, stage.margin, stage.index, self.hyper.reducer, self.generator)

        size = SLICE if student_map.device.type == "cpu" else None  # a slice stays in a processor's cache
        return sum_partial_l2(
            student_map, teacher_map, reduce, slice_size=size, with_energy=self.hyper.form == "relative"
        )

    def _stages(self) -> list[Stage]:
        return [stage for stage in self.stages if isinstance(stage, Stage)]

    def _pairs(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> list[tuple[Stage, Tensor, Tensor]]:
        if not len(student) == len(teacher) == len(self.stages):
            raise ValueError(
                f"expected {len(self.stages)} maps a network; "
                f"got {len(student)} of the student, {len(teacher)} of the teacher"
            )
        for number, (stage, *maps) in enumerate(zip(self._stages(), student, teacher, strict=True)):
            check_maps(f"stage {number} of a ChannelMatching", *maps)
            wanted, found = tuple(stage.cost.cosine.shape), (maps[0].shape[1], maps[1].shape[1])
            if found != wanted:
                raise ValueError(
                    f"stage {number} of a ChannelMatching has {wanted[0]} channels of the student and {wanted[1]} of "
                    f"the teacher; got maps with {found[0]} and {found[1]}"
                )
        sized = [at_size_of(ours, theirs) for ours, theirs in zip(student, teacher, strict=True)]
        return list(zip(self._stages(), student, sized, strict=True))

    def _require_flows(self) -> None:
        if not self._matched:
            raise RuntimeError("no flows yet: observe some batches and call rematch() before training")


class EachMatching(EachTeacher):
    """A `ChannelMatching` per teacher, all renewed in one pass over the images."""

    needs = frozenset({"maps"})

    def __init__(self, terms: Sequence[ChannelMatching]) -> None:
        super().__init__(terms)
        self.weight = terms[0].weight

    def update(self, epoch: int, views: Views) -> Update:
        return _update([term for term in self.terms if isinstance(term, ChannelMatching)], epoch, views)


def _margin(kind: str, given: Tensor | None, width: int) -> Tensor | None:
    """Return the margins of a tap, or None where they are measured on the map."""
    if kind == "none":
        return torch.full((width,), -torch.inf)
    return given if kind == "bn" else None


@torch.no_grad()
def _update(terms: Sequence[ChannelMatching], epoch: int, views: Views) -> Update:
    """Renew the flows of matchings, one per teacher, where the epoch is one of theirs or they have none yet."""
    hyper, start = terms[0].hyper, time.perf_counter()
    matched = all(term.matched for term in terms)
    due = epoch % hyper.update_freq == 0 if hyper.update_freq else epoch == 0
    if matched and not due:
        return {}, {}
    before = [flow for term in terms for flow in term.flows] if matched else None
    if not (matched and terms[0].observe_share):
        for student, teachers, _ in views(hyper.max_images):
            for term, teacher in zip(terms, teachers, strict=True):
                term.observe(student, teacher)
    flows: list[Flow] = []
    for term in terms:
        term.seed = views.seed
        flows += term.rematch()
        for stage in term.dead:
            where = f"tap {term.paths[stage]} (stage {stage})" if term.paths else f"stage {stage}"
            text = f"the teacher's map at {where} is nowhere positive, and nothing is taught there: tap another module"
            warnings.warn(text, stacklevel=3)
    costs = [cost for term in terms for cost in term.costs]
    return flow_record(flows, costs, time.perf_counter() - start, before)


def _mark_loaded(module: nn.Module, _: Any) -> None:
    assert isinstance(module, ChannelMatching)
    module._details = []
    module._matched = all(bool((stage.index[0] >= 0).all()) for stage in module._stages())
