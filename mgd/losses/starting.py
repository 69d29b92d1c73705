"""Terms whose layers can be initialised from a flow between the networks' channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mgd.flow import Flow
from mgd.losses.flows import FlowOptions, check_pairs, first_flows, say_sizes
from mgd.losses.term import Term, Update, Views, per_teacher
from mgd.taps import Outputs, Probe

IDLE = ("assignment", "capacity", "solver", "max_images", "cost", "groups")


@dataclass(frozen=True, kw_only=True)
class StartOptions(FlowOptions):
    """How the layers of a term are initialised; the fields of `FlowOptions` are used with `init` "flow".

    Args:
        init: "random", as published; or "flow": each teacher channel is predicted by the student channel that a
            matching before training assigns to it.
    """

    init: Literal["random", "flow"] = "random"

    def without_effect(self) -> dict[str, str]:
        return {} if self.init == "flow" else dict.fromkeys(IDLE, "init flow")


class StartingTerm(Term):
    """A term with layers that flows can initialise: subclasses name the matched taps, and implement `begin`.

    Args:
        student_channels: S of every matched tap.
        teacher_channels: T of every matched tap, one list per teacher.
        taps: numbers of the matched taps in the networks.
        hyper: the hyper-parameters, see `Term`.
        teacher_weights: see `Term`.
        values: the hyper-parameters by name.
    """

    hyper: Any
    started: Tensor | None

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[Sequence[int]],
        taps: Sequence[int],
        hyper: Any = None,
        *,
        teacher_weights: Sequence[float] | None = None,
        **values: Any,
    ) -> None:
        super().__init__(hyper, teacher_weights=per_teacher(teacher_weights, teacher_channels), **values)
        self.channels = (tuple(student_channels), [tuple(widths) for widths in teacher_channels])
        self.taps = tuple(taps)
        self.ready = self.hyper.init == "random"  # to be trained
        self.register_buffer("started", None if self.ready else torch.tensor(False))
        self.register_load_state_dict_post_hook(_mark_loaded)  # type: ignore[no-untyped-call]

    @classmethod
    def needed(cls, hyper: Any) -> frozenset[str]:
        return cls.needs | {"frozen"} if hyper.init == "flow" else cls.needs

    @classmethod
    def build(cls, student: Probe, teachers: Sequence[Probe], num_images: int, hyper: Any = None) -> Term:
        hyper = cls._hyper(hyper)
        if hyper.init == "flow":
            check_pairs(student, teachers)
        term = super().build(student, teachers, num_images, hyper)
        if hyper.init == "flow":
            term.notes = [*term.notes, *(note for teacher in teachers for note in say_sizes(student, teacher))]
        return term

    def begin(self, number: int, position: int, flow: Flow) -> None:
        """Initialise the layer for teacher `number` and the matched tap at `position` from a flow."""
        raise NotImplementedError

    def update(self, epoch: int, views: Views) -> Update:
        """Initialise the layers from flows, if `init` is "flow" and that was not done before."""
        if self.ready:
            return {}, {}
        device = next(self.parameters()).device
        flows, record = first_flows(*self.channels, self.hyper, views, device, taps=self.taps, rectify=self.rectify)
        self.start([flow for stages in flows for flow in stages])
        return record

    def start(self, flows: Sequence[Flow]) -> None:
        """Initialise the layers from flows between the channels of the student and its teachers.

        Args:
            flows: one per matched tap, teacher by teacher, as `ChannelMatching.rematch` returns them.

        Raises:
            ValueError: the number of flows or of their channels is wrong.
        """
        places = [(number, position) for number in range(len(self.channels[1])) for position in range(len(self.taps))]
        if len(flows) != len(places):
            raise ValueError(f"expected {len(places)} flows, one per tap and teacher; got {len(flows)}")
        for (number, position), flow in zip(places, flows, strict=True):
            self.begin(number, position, flow)
        self.ready = True
        if self.started is not None:
            self.started.fill_(True)

    def forward(self, student: Outputs, teachers: list[Outputs], batch: Any) -> Tensor:
        if not self.ready:
            raise RuntimeError(
                f"{type(self).__name__} with init 'flow' starts from flows: call update or start(flows) before training"
            )
        return super().forward(student, teachers, batch)


def _mark_loaded(module: nn.Module, _: Any) -> None:
    assert isinstance(module, StartingTerm)
    module.ready = module.started is None or bool(module.started)
