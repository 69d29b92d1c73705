"""The hyper-parameters of matching guided distillation, and checks of their combinations."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from mgd.checks import check_at_least_0, check_positive
from mgd.flow import Flow, energy_kept, group_weights, soft_weights
from mgd.losses.flows import FlowOptions

SOFT = ("soft", "unbalanced")


@dataclass(frozen=True, kw_only=True)
class MatchingOptions(FlowOptions):
    """Hyper-parameters of `ChannelMatching`.

    Args:
        reducer: how the teacher channels of a student channel become one target, see `mgd.reduce_channels`; None for
            "amp", or for "linear" if the capacity is soft.
        capacity: how many teacher channels guide one student channel, see `mgd.solve_flow`. With "soft" and
            "unbalanced", targets are sums weighted by a transport plan, see `mgd.flow.soft_weights`; the flow that is
            logged is that of "spread". None for "spread", or for "single" if the reducer is "sm".
        form: "sum", "mean" or "relative", see the formula of `ChannelMatching`.
        loss_factor: in the form "sum" the term's weight is one over it; 1e4 suits 224 px.
        update_freq: n, match before epochs 0, n, 2n ...; 0 to match once, before training.
        observe: "pass": costs are measured in a pass before each matching; "online": on a share of each training
            batch, except for the first matching.
        margin: "bn": from the norm before the tap if there is one, else measured; "map": always measured; "none".
        stage_weights: factor of every stage; None for those of the form.
        across: whether the cheapest assignment of stages decides which teacher stage teaches which student stage; the
            cost of two stages is the mean cost of the matched pairs in their flow.
        epsilon: for soft capacities: strength of the entropy, in units of the spread of the costs.
        penalty: for the capacity "unbalanced": price of the mass that a plan leaves out, in the same units.
        energy: whether to measure and log the share of the teacher's energy that the groups can carry.
    """

    reducer: Literal["amp", "sp", "sp_mean", "rd", "sm", "linear"] | None = None
    capacity: Literal["spread", "truncate", "reference", "single", "soft", "unbalanced"] | None = None  # type: ignore[assignment]
    form: Literal["sum", "mean", "relative"] = "sum"
    loss_factor: float = 1e4
    update_freq: int = 2
    observe: Literal["pass", "online"] = "pass"
    margin: Literal["bn", "map", "none"] = "bn"
    stage_weights: tuple[float, ...] | None = None
    across: bool = False
    epsilon: float = 0.1
    penalty: float = 1.0
    energy: bool = False

    def __post_init__(self) -> None:
        if self.reducer is None:  # so that a run records its actual value
            object.__setattr__(self, "reducer", "linear" if self.soft else "amp")
        super().__post_init__()
        if self.reducer == "sm" and self.capacity not in (None, "single"):
            raise ValueError(f"reducer 'sm' matches one to one: capacity must be 'single', not {self.capacity!r}")
        check_positive("mgd", loss_factor=self.loss_factor, epsilon=self.epsilon, penalty=self.penalty)
        check_at_least_0("mgd", update_freq=self.update_freq)
        if self.observe == "online" and not self.update_freq:
            raise ValueError("observe 'online' needs an update_freq of at least 1")
        for weight in self.stage_weights or ():
            check_at_least_0("mgd", stage_weights=weight)
        if self.soft and self.reducer != "linear":
            raise ValueError(
                f"capacity {self.capacity!r} makes weighted sums: reducer must be 'linear', not {self.reducer!r}"
            )
        if self.soft and self.assignment != "cheapest":
            raise ValueError(
                f"capacity {self.capacity!r} follows the costs: assignment must be 'cheapest', not {self.assignment!r}"
            )
        if self.across and self.assignment != "cheapest":
            raise ValueError(f"across follows the costs: assignment must be 'cheapest', not {self.assignment!r}")
        if self.observe == "online" and self.cost == "gradient":
            raise ValueError("cost 'gradient' takes a pass of its own: observe must be 'pass', not 'online'")

    @property
    def soft(self) -> bool:
        """Whether targets are weighted by a transport plan."""
        return self.capacity in SOFT

    def used_reducer(self) -> str:
        """Return the reducer; None was replaced by the default."""
        return self.reducer or "amp"

    def used_capacity(self) -> str:
        if self.soft:
            return "spread"
        return "single" if self.reducer == "sm" else super().used_capacity()

    def needs_gram(self) -> bool:
        """Return whether the Gram matrix of the teacher's channels is needed."""
        return super().needs_gram() or self.energy or (self.used_reducer() == "linear" and not self.soft)

    def solve(self, cost: Tensor, seed: Sequence[int], gram: Tensor | None = None, start: Any = None) -> Flow:
        flow = super().solve(cost, seed, gram, start)
        weights = None
        if self.soft:
            penalty = self.penalty if self.capacity == "unbalanced" else None
            weights = soft_weights(cost, epsilon=self.epsilon, penalty=penalty)
        elif self.used_reducer() == "linear":
            weights = group_weights(gram, flow.index)
        energy = None if gram is None else energy_kept(gram, flow.index)
        return dataclasses.replace(flow, weights=weights, energy=energy)

    def without_effect(self) -> dict[str, str]:
        idle = {"weight": "the form mean or relative"} if self.form == "sum" else {"loss_factor": "the form sum"}
        if not self.soft:
            idle["epsilon"] = "the capacity soft or unbalanced"
        if self.capacity != "unbalanced":
            idle["penalty"] = "the capacity unbalanced"
        return idle
