"""What a flow could gain at each pair of taps: the costs of the cheapest flow and of random ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mgd.flow import ChannelCost, solve_flow
from mgd.losses.align import at_size_of
from mgd.taps import Outputs

NUM_RANDOM = 16  # random flows per pair


@dataclass(frozen=True)
class Preview:
    """Mean cost per matched pair of channels, from 0 to 4: 0 equal up to scale, 2 unrelated.

    Flows are solved on one half of the images, and their costs are measured on the other half: on its own images, the
    cheapest flow would look better than it is.

    Args:
        cheapest: of the cheapest flow.
        random: mean over random flows.
        deviation: standard deviation over the random flows.
    """

    cheapest: float
    random: float
    deviation: float

    @property
    def helps(self) -> bool:
        """Whether the cheapest flow is better than random ones, by more than two of their standard deviations."""
        return self.cheapest < self.random - max(2 * self.deviation, 1e-3)


@torch.no_grad()
def preview_flows(batches: Iterable[tuple[Outputs, Sequence[Outputs]]], seed: int = 0) -> list[list[Preview]]:
    """Compare the cheapest flow of every pair of taps with random ones, before any training.

    Args:
        batches: (student outputs, teachers' outputs) of batches of two images or more, in eval mode.
        seed: of the random flows.

    Returns:
        One list per teacher, one entry per pair of taps.

    Raises:
        ValueError: there are fewer than two images, or the networks have different numbers of taps.
    """
    sums: list[list[tuple[ChannelCost, ChannelCost]]] = []
    for student, teachers in batches:
        half = len(student.features[0]) // 2
        for number, teacher in enumerate(teachers):
            maps = list(zip(student.features, teacher.features, strict=True))
            if len(sums) <= number:
                sums.append([(_sums(*pair), _sums(*pair)) for pair in maps])
            for (solved, judged), (ours, theirs) in zip(sums[number], maps, strict=True):
                theirs = at_size_of(ours, theirs)
                if half:
                    solved.update(ours[:half], theirs[:half])
                    judged.update(ours[half:], theirs[half:])
    if not sums or any(int(pair[0].count) == 0 for pairs in sums for pair in pairs):
        raise ValueError("a preview needs two images or more")
    return [[_preview(solved.mean(), judged.mean(), seed) for solved, judged in pairs] for pairs in sums]


def _sums(student: Tensor, teacher: Tensor) -> ChannelCost:
    return ChannelCost(student.shape[1], teacher.shape[1]).to(student.device)


def _preview(solved: Tensor, judged: Tensor, seed: int) -> Preview:
    pairs = torch.as_tensor(solve_flow(solved, solver="auto").matrix).bool().to(judged.device)
    generator = torch.Generator().manual_seed(seed)
    # A random permutation of the teacher's channels gives a random flow with the same capacities.
    orders = [torch.randperm(pairs.shape[1], generator=generator).to(judged.device) for _ in range(NUM_RANDOM)]
    draws = torch.stack([judged[pairs[:, order]].mean() for order in orders])
    return Preview(float(judged[pairs].mean()), float(draws.mean()), float(draws.std()))
