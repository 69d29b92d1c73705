"""One pair of taps of a matching: its adapter, cost sums, margin and flow."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mgd.checks import check_maps
from mgd.flow import ChannelCorrelation, ChannelCost, Flow, make_cost
from mgd.flow.gram import ChannelGram
from mgd.losses.align import at_size_of
from mgd.losses.margin import MeasuredMargin


class Stage(nn.Module):
    """One pair of taps of `ChannelMatching`.

    Args:
        num_student: S, student channels.
        num_teacher: T, teacher channels.
        margin: (T,), or None to measure it on the maps.
        depth: G, the largest number of teacher channels per student channel.
        cost: see `mgd.channel_cost`.
        gram: whether the Gram matrix of the teacher's channels is summed.
        weights: whether targets are weighted sums of teacher channels.
        adapter: whether the pair has a batch normalisation of the student's map.

    Raises:
        ValueError: the margin has another length.
    """

    index: Tensor
    margin: Tensor
    total_cost: Tensor
    peak: Tensor
    weights: Tensor | None

    def __init__(
        self,
        num_student: int,
        num_teacher: int,
        margin: Tensor | None,
        depth: int,
        *,
        cost: str = "cosine",
        gram: bool = False,
        weights: bool = False,
        adapter: bool = True,
    ) -> None:
        super().__init__()
        if adapter:
            self.adapter = nn.BatchNorm2d(num_student)
        self.cost = make_cost(num_student, num_teacher, cost)
        self.measured = MeasuredMargin(num_teacher) if margin is None else None
        self.gram = ChannelGram(num_teacher) if gram else None
        margin = torch.zeros(num_teacher) if margin is None else margin.detach().clone().float()
        if margin.shape != (num_teacher,):
            raise ValueError(f"expected {num_teacher} margins, one per teacher channel; got {tuple(margin.shape)}")
        self.register_buffer("margin", margin)
        self.register_buffer("index", torch.full((depth, num_student), -1, dtype=torch.int64))
        self.register_buffer("weights", torch.zeros(num_student, num_teacher) if weights else None)
        self.register_buffer("total_cost", torch.zeros((), dtype=torch.float64))
        # The largest observed value of the teacher's map.
        self.register_buffer("peak", torch.tensor(-torch.inf), persistent=False)

    @property
    def num_teacher(self) -> int:
        return self.margin.numel()

    @property
    def solved(self) -> bool:
        """Whether there is a flow."""
        return bool((self.index[0] >= 0).all())

    def sums(self) -> list[ChannelCost | ChannelCorrelation | MeasuredMargin | ChannelGram]:
        """Return the sums of a matching pass."""
        return [self.cost, *(total for total in (self.measured, self.gram) if total is not None)]

    def sized(self, number: int, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Return both maps, the teacher's at the student's resolution.

        Args:
            number: of the stage, for messages.
            student: (B, S, H, W).
            teacher: (B, T, H', W').

        Raises:
            ValueError: the arguments are not maps, or have other numbers of channels.
        """
        check_maps(f"stage {number} of a ChannelMatching", student, teacher)
        wanted, channels = self.cost.shape, (student.shape[1], teacher.shape[1])
        if channels != wanted:
            raise ValueError(
                f"stage {number} of a ChannelMatching has {wanted[0]} channels of the student and {wanted[1]} of "
                f"the teacher; got maps with {channels[0]} and {channels[1]}"
            )
        return student, at_size_of(student, teacher)

    @torch.no_grad()
    def observe(self, student: Tensor, teacher: Tensor, costed: tuple[Tensor, Tensor] | None = None) -> None:
        """Add a batch to the sums.

        Args:
            student: (B, S, H, W).
            teacher: (B, T, H, W), at the student's resolution.
            costed: the maps whose channels are compared; None for these.
        """
        self.cost.update(*(costed or (student, teacher)))
        self.peak.copy_(torch.maximum(self.peak, teacher.amax().float()))
        if self.measured is not None:
            self.measured.update(teacher)
        if self.gram is not None:
            self.gram.update(teacher)

    def all_reduce(self) -> None:
        """Combine the sums of all ranks."""
        for total in self.sums():
            total.all_reduce()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.peak, dist.ReduceOp.MAX)

    def forget(self) -> None:
        """Reset the sums."""
        for total in self.sums():
            total.reset()
        self.peak.fill_(-torch.inf)

    @torch.no_grad()
    def take(self, flow: Flow) -> None:
        """Store a flow that was solved on the sums, and the measured margin."""
        self.index.copy_(torch.as_tensor(flow.index))
        self.total_cost.fill_(flow.total_cost)
        if self.weights is not None:
            self.weights.copy_(torch.as_tensor(flow.weights))
        if self.measured is not None:
            self.margin.copy_(self.measured.mean())

    def flow(self, solver: str, seconds: float) -> Flow:
        """Return the flow in the buffers."""
        weights = None if self.weights is None else self.weights.double().cpu().numpy()
        return Flow(self.index.cpu().numpy().copy(), self.num_teacher, float(self.total_cost), solver, seconds, weights)
