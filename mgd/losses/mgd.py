"""Matching guided distillation: student channels follow the teacher channels that a flow assigns to them."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from mgd.flow import Flow, slots, solve_flow
from mgd.flow.cost import TINY
from mgd.losses.flows import check_pairs, flow_record, looks, margin_of, say_margins, say_sizes
from mgd.losses.gather import first_rank
from mgd.losses.margin import sum_partial_l2
from mgd.losses.matching_options import MatchingOptions
from mgd.losses.reduce import reduce_channels
from mgd.losses.stage import Stage
from mgd.losses.term import EachTeacher, Term, Update, Views
from mgd.taps import Batch, Outputs, Probe

BOUND = 100.0  # of a stage's loss in the relative form: an error of ten times the norm of the target
# Number of elements of a student's maps that are compared at once. On a CPU they stay in the cache. On a GPU they are
# enough to use it fully, and the temporary values, some 20 bytes per element, stay small compared with the maps.
SLICE, GPU_SLICE = 2**18, 2**23


class ChannelMatching(Term):
    """Pull the student's maps before the ReLU towards the teacher channels assigned to them.

    With e_i = partial_l2(BN_i(student_i), target_i, margin_i) and target_i = reduce(teacher_i, flow_i), stage i of n:

    "sum", as published: loss = sum_i e_i / B / 2^(n-1-i), with B images. It grows with pixels, channels and the
        teacher's scale.
    "mean": loss = sum_i e_i / (B S H W), the error per element. If each stage halves the side and doubles the channels,
        this is "sum" divided by the last stage's S H W, so it does not depend on the image size.
    "relative": loss = sum_i e_i / |max(target_i, 0)|^2, which does not depend on the teacher's scale either; about n
        for a student at 0. The denominator is that of the given images, so over ranks, or parts of a batch, the loss is
        a mean of ratios. Above a ratio of 100, the denominator is a constant e_i / 100, and the gradient is that of
        100 log e_i: for a student far above its teacher, and stages whose map is nowhere positive.

    A teacher's map of another resolution is resized to the student's. With `across`, the cheapest one-to-one assignment
    decides which teacher stage teaches which student stage; all pairs of stages are observed, and `stage_weights` are
    those of the student's stages.

    Call `update` before every epoch; or without a `Distiller`, `observe` batches in eval mode, then `rematch` to solve
    the flows. Costs are `channel_cost` of the maps before BN_i, averaged over the observed images. Flows, weights,
    margins and sums are buffers; `load_state_dict` restores them.

    Args:
        student_channels: S of every stage.
        teacher_channels: T of every stage.
        margins: (T,) per stage of the teacher, or None for a stage whose margin is measured on the observed maps.
        hyper: the hyper-parameters, see `Term`.
        seed: of the assignment "random", until `update` sets that of the run.
        observe_share: share of each training batch whose costs `forward` adds to the sums, in [0, 1]; 0 for none.
        values: the hyper-parameters by name.

    Raises:
        ValueError: lists or margins have wrong lengths, or a hyper-parameter is outside its range.

    Reference: Yue, Deng, Zhou, 2020, arXiv:2008.09958.
    """

    needs = frozenset({"maps", "frozen"})
    fuses = True
    weight = 5.0

    @dataclass(frozen=True, kw_only=True)
    class Hyper(MatchingOptions):
        """Hyper-parameters of `ChannelMatching`, see `MatchingOptions`."""

    hyper: Hyper
    num_updates: Tensor
    partner: Tensor | None

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
        teachers = list(zip(teacher_channels, margins, strict=True))
        self.stages = nn.ModuleList(
            self._stage(s, *teacher) for s, teacher in zip(student_channels, teachers, strict=True)
        )
        # With `across`: the other pairs of stages, row by row, and the teacher's stage for each stage of the student.
        self.others = nn.ModuleList(
            self._stage(s, *teacher, adapter=False)
            for i, s in enumerate(student_channels)
            for j, teacher in enumerate(teachers)
            if self.hyper.across and i != j
        )
        self.register_buffer("partner", torch.arange(num) if self.hyper.across else None)
        self._partners = list(range(num))
        self.generator: torch.Generator | None = None  # for the reducer "rd"; None for the device's default one
        self.costs: list[Tensor] = []  # (S, T) of every stage at the last rematch
        self.dead: list[int] = []  # stages whose teacher's map was nowhere above `TINY` at the last rematch
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
                margin_of(hyper.margin, norm_margin, width)
                for norm_margin, width in zip(
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
    def partners(self) -> list[int]:
        """The number of the teacher's stage for each stage of the student."""
        return list(self._partners)

    @property
    def flows(self) -> list[Flow]:
        """The flow of every stage, as last solved or loaded.

        Raises:
            RuntimeError: before the first `rematch`.
        """
        self._require_flows()
        details = self._details or [("loaded", 0.0)] * len(self.stages)
        return [stage.flow(*detail) for stage, detail in zip(self._used(), details, strict=True)]

    @torch.no_grad()
    def observe(
        self,
        student: Outputs | Sequence[Tensor],
        teacher: Outputs | Sequence[Tensor],
        gradients: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None,
    ) -> None:
        """Add a batch to the cost sums, and to the measured margins.

        Args:
            student: `Outputs`, or its features: one (B, S, H, W) per stage.
            teacher: likewise.
            gradients: for the cost "gradient", those of each network's loss for its features.

        Raises:
            ValueError: the maps do not fit the stages, or gradients are missing that the cost needs.
        """
        if self.hyper.cost == "gradient" and gradients is None:
            raise ValueError("the cost 'gradient' needs the gradients of both networks: pass gradients, or call update")
        ours, theirs = (o.features if isinstance(o, Outputs) else o for o in (student, teacher))
        weighted = gradients and [
            [m * g for m, g in zip(*each, strict=True)] for each in zip((ours, theirs), gradients, strict=True)
        ]
        for i, j in self._places(every=True):
            costed = self._pair(i, j, *weighted) if weighted else None
            self._at(i, j).observe(*self._pair(i, j, ours, theirs), costed)

    @torch.no_grad()
    def rematch(self) -> list[Flow]:
        """Solve every stage on the costs observed since the last call, over all ranks, and forget them.

        Returns:
            One optimal `Flow` per stage; every rank gets those of the first one.

        Raises:
            RuntimeError: nothing was observed, or the solver found no optimum.
            ValueError: an observed map is not finite; then all observations are forgotten.
        """
        for stage in self._stages():
            stage.all_reduce()
        number = int(self.num_updates)
        places = self._places(every=True)
        costs = [self._at(*place).cost.mean() for place in places]
        try:
            solved = [self._solve(*places[n], cost, (self.seed, number, n)) for n, cost in enumerate(costs)]
            solved = first_rank(solved)
            if self.partner is not None:
                self._choose([flow.total_cost / flow.matrix.sum() for flow in solved])
        except ValueError:
            self.forget()
            raise
        self.num_updates += 1
        chosen = [places.index((i, j)) for i, j in enumerate(self._partners)]
        self.costs = [costs[n] for n in chosen]
        peaks = [float(stage.peak) for stage in self._used()]
        self.dead = [n for n, peak in enumerate(peaks) if -inf < peak < TINY]  # -inf: an earlier process observed it
        for place, flow in zip(places, solved, strict=True):
            self._at(*place).take(flow)
        self.forget()
        self._details = [(solved[n].solver, solved[n].seconds) for n in chosen]
        self._matched = True
        return [solved[n] for n in chosen]

    def _solve(self, i: int, j: int, cost: Tensor, seed: tuple[int, int, int]) -> Flow:
        stage = self._at(i, j)
        gram = None if stage.gram is None else stage.gram.mean()
        return self.hyper.solve(cost, seed, gram, stage.index.cpu().numpy() if self._matched else None)

    def _choose(self, costs: Sequence[float]) -> None:
        """Choose the teacher's stage for each stage of the student, by the costs of all pairs, row by row."""
        num = len(self.stages)
        flow = solve_flow(torch.tensor(costs, dtype=torch.float64).reshape(num, num), capacity="single")
        assert self.partner is not None
        self.partner.copy_(torch.as_tensor(first_rank(flow.index[0])))
        self._partners = self.partner.tolist()

    def update(self, epoch: int, views: Views) -> Update:
        """Observe both networks and solve the flows, every `update_freq` epochs or if there are none yet."""
        return _update([self], epoch, views)

    def check_state(self) -> None:
        if sorted(self._partners) != list(range(len(self.stages))):
            raise ValueError("each stage of the teacher must teach exactly one stage of the student")
        for number, stage in enumerate(self._stages()):
            if ((stage.index < -1) | (stage.index >= stage.num_teacher)).any():
                raise ValueError(f"the flow of stage {number} names channels that the teacher lacks")

    def collect(self, *, first: bool) -> None:
        for stage in self._stages():
            stage.all_reduce()
        if not first:
            self.forget()

    def forget(self) -> None:
        for stage in self._stages():
            stage.forget()

    def forward(self, student: Outputs, teachers: list[Outputs], batch: Batch | None = None) -> Tensor:
        """Return the loss against the only teacher, a scalar.

        Raises:
            RuntimeError: before the first `rematch`.
            ValueError: the numbers of teachers, maps or channels are wrong.
        """
        if len(teachers) != 1:
            how = "ChannelMatching.build makes one per teacher"
            raise ValueError(f"a ChannelMatching has one teacher and got {len(teachers)}: {how}")
        self._require_flows()
        if self.training and self.observe_share:
            num = -int(-self.observe_share * len(student.logits) // 1)  # rounded up
            self.observe([m[:num] for m in student.features], [m[:num] for m in teachers[0].features])
        loss = student.logits.new_zeros((), dtype=torch.float32)
        for (i, j), weight in zip(self._places(), self.stage_weights, strict=True):
            student_map, teacher_map = self._pair(i, j, student.features, teachers[0].features)
            adapted = self._at(i, i).adapter(student_map)
            error, energy = self._compare(self._at(i, j), adapted, teacher_map)
            if self.hyper.form == "sum":
                scale: Tensor | float = len(adapted)
            elif self.hyper.form == "mean":
                scale = adapted.numel()
            else:
                scale = torch.maximum(energy, error.detach() / BOUND).clamp_min(1e-30)
            loss = loss + weight * error / scale
        return loss

    def _compare(self, stage: Stage, student_map: Tensor, teacher_map: Tensor) -> tuple[Tensor, Tensor]:
        """Return a stage's error and, for the relative form, the energy of its target."""

        def reduce(part: Tensor) -> tuple[Tensor, Tensor]:
            return reduce_channels(
                part, stage.margin, stage.index, self.hyper.used_reducer(), self.generator, weights=stage.weights
            )

        size = SLICE if student_map.device.type == "cpu" else GPU_SLICE
        return sum_partial_l2(
            student_map, teacher_map, reduce, slice_size=size, with_energy=self.hyper.form == "relative"
        )

    def _stage(self, num_student: int, num_teacher: int, margin: Tensor | None, *, adapter: bool = True) -> Stage:
        hyper = self.hyper
        return Stage(
            num_student,
            num_teacher,
            margin,
            slots(num_student, num_teacher, hyper.used_capacity()),
            cost=hyper.map_cost(),
            gram=hyper.needs_gram(),
            weights=hyper.used_reducer() == "linear",
            adapter=adapter,
        )

    def _stages(self) -> list[Stage]:
        return [stage for stage in (*self.stages, *self.others) if isinstance(stage, Stage)]

    def _at(self, i: int, j: int) -> Stage:
        """Return the pair of the student's stage i and the teacher's stage j."""
        stage = self.stages[i] if i == j else self.others[i * (len(self.stages) - 1) + j - (j > i)]
        assert isinstance(stage, Stage)
        return stage

    def _places(self, *, every: bool = False) -> list[tuple[int, int]]:
        """Return the pairs of stages that are trained, or with `every`, those that are observed."""
        if every and self.partner is not None:
            return [(i, j) for i in range(len(self.stages)) for j in range(len(self.stages))]
        return list(enumerate(self._partners))

    def _used(self) -> list[Stage]:
        return [self._at(*place) for place in enumerate(self._partners)]

    def _pair(self, i: int, j: int, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the maps of a pair of stages, the teacher's at the student's resolution."""
        if not len(student) == len(teacher) == len(self.stages):
            raise ValueError(
                f"expected {len(self.stages)} maps a network; "
                f"got {len(student)} of the student, {len(teacher)} of the teacher"
            )
        return self._at(i, j).sized(i, student[i], teacher[j])

    def _require_flows(self) -> None:
        if not self._matched:
            raise RuntimeError("no flows yet: before training, call Distiller.update, or observe() and rematch()")


class EachMatching(EachTeacher):
    """A `ChannelMatching` per teacher, all updated in one pass over the images."""

    needs = frozenset({"maps"})

    def __init__(self, terms: Sequence[ChannelMatching]) -> None:
        super().__init__(terms)
        self.weight = terms[0].weight

    def update(self, epoch: int, views: Views) -> Update:
        return _update([term for term in self.terms if isinstance(term, ChannelMatching)], epoch, views)


@torch.no_grad()
def _update(terms: Sequence[ChannelMatching], epoch: int, views: Views) -> Update:
    """Update the flows of matchings, one per teacher, if the epoch is scheduled or there are none yet."""
    hyper, start = terms[0].hyper, time.perf_counter()
    matched = all(term.matched for term in terms)
    due = epoch % hyper.update_freq == 0 if hyper.update_freq else epoch == 0
    if matched and not due:
        return {}, {}
    before = [flow for term in terms for flow in term.flows] if matched else None
    if not (matched and terms[0].observe_share):
        for student, teachers, gradients in looks(views, hyper):
            for number, (term, teacher) in enumerate(zip(terms, teachers, strict=True)):
                own = None if gradients is None else (gradients[0], gradients[number + 1])
                term.observe(student, teacher, own)
    flows: list[Flow] = []
    for term in terms:
        term.seed = views.seed
        flows += term.rematch()
        for stage in term.dead:
            other = term.partners[stage]
            where = f"tap {term.paths[other]} (stage {other})" if term.paths else f"stage {other}"
            text = f"the teacher's map at {where} is nowhere positive: the student is only pushed below it; tap another"
            warnings.warn(text, stacklevel=3)
    costs = [cost for term in terms for cost in term.costs]
    numbers, arrays = flow_record(flows, costs, time.perf_counter() - start, before)
    if hyper.across:
        partners = [term.partners for term in terms]
        numbers["stages_moved"] = float(sum(i != j for each in partners for i, j in enumerate(each)))
        arrays["partner"] = torch.tensor(partners).numpy()
    return numbers, arrays


def _mark_loaded(module: nn.Module, _: Any) -> None:
    assert isinstance(module, ChannelMatching)
    module._details = []
    if module.partner is not None:
        module._partners = module.partner.tolist()
    module._matched = all(stage.solved for stage in module._stages())
