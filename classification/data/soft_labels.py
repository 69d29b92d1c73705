"""Soft labels of images that a teacher labelled: several classes with probabilities from the teacher's scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from classification.data.lists import score_of
from classification.errors import UserError

Likely = tuple[tuple[int, float], ...]  # (class, probability); the probabilities sum to 1


def soften(lists: Sequence[str], samples: Sequence[tuple[str, int]]) -> tuple[list[tuple[str, int]], dict[str, Likely]]:
    """Merge all lines of an image into one sample with soft labels: p_k = exp(score_k) / sum_j exp(score_j).

    Args:
        lists: the files.
        samples: (path, class index) of every line of these files.

    Returns:
        Each image once, with its likeliest class; and {path: probabilities}.

    Raises:
        UserError: a line has no score.
    """
    scores = [score for path in lists for score in _scores(path)]
    found: dict[str, dict[int, float]] = {}
    for (path, label), score in zip(samples, scores, strict=True):
        known = found.setdefault(path, {})
        known[label] = max(score, known.get(label, -math.inf))
    soft = {path: _probabilities(known) for path, known in found.items()}
    return [(path, max(known, key=known.__getitem__)) for path, known in found.items()], soft


def _scores(path: str) -> list[float]:
    scores = []
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                score = score_of(line)
                if score is None or not score < math.inf:
                    raise UserError(f"list {path}, line {number} has no score: --pile-targets soft needs one per line")
                scores.append(score)
    return scores


def _probabilities(scores: Mapping[int, float]) -> Likely:
    top = max(scores.values())
    weights = {
        label: math.exp(score - top) if score > -math.inf else float(score == top) for label, score in scores.items()
    }
    total = sum(weights.values())
    return tuple((label, weight / total) for label, weight in weights.items())


class SoftLabels:
    """Class probabilities of training images: soft labels where there are any, else 1 for the class.

    Args:
        samples: (path, class index) of every image.
        soft: soft labels by path.
        num_classes: K.
        device: of the targets.
    """

    def __init__(
        self,
        samples: Sequence[tuple[str, int]],
        soft: Mapping[str, Likely],
        num_classes: int,
        device: torch.device,
    ) -> None:
        each = [soft.get(path, ((target, 1.0),)) for path, target in samples]
        most = max(map(len, each))
        padded = [(*likely, *((0, 0.0),) * (most - len(likely))) for likely in each]
        self.classes = torch.tensor([[label for label, _ in likely] for likely in padded], device=device)
        self.probabilities = torch.tensor([[value for _, value in likely] for likely in padded], device=device)
        self.num_classes = num_classes

    def __call__(self, index: Tensor) -> Tensor:
        """Return the probabilities (B, K) of the images at `index` (B,)."""
        targets = self.probabilities.new_zeros(len(index), self.num_classes)
        return targets.scatter_add_(1, self.classes[index], self.probabilities[index])
