"""Soft labels of images that a teacher labelled: several classes with probabilities from the teacher's scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from classification.data.lists import score_of
from classification.errors import UserError

ClassProbabilities = tuple[tuple[int, float], ...]  # (class, probability); the probabilities sum to 1


def merge_soft_labels(
    lists: Sequence[str], samples: Sequence[tuple[str, int]]
) -> tuple[list[tuple[str, int]], dict[str, ClassProbabilities]]:
    """Merge all lines of an image into one sample with soft labels: p_k = exp(score_k) / sum_j exp(score_j).

    Args:
        lists: the files.
        samples: (path, class index) of every line of these files.

    Returns:
        Each image once, with its likeliest class; and {path: probabilities}.

    Raises:
        UserError: a line has no score, or the files have other lines than when the samples were read from them.
    """
    scores = [score for path in lists for score in _scores(path)]
    if len(scores) != len(samples):
        raise UserError(
            f"--pile-list {' '.join(lists)} had {len(samples)} lines when it was first read, and now {len(scores)}: "
            "--pile-targets soft needs files that can be read twice, not pipes"
        )
    scores_by_path: dict[str, dict[int, float]] = {}
    for (path, label), score in zip(samples, scores, strict=True):
        class_scores = scores_by_path.setdefault(path, {})
        class_scores[label] = max(score, class_scores.get(label, -math.inf))
    soft = {path: _probabilities(class_scores) for path, class_scores in scores_by_path.items()}
    return [
        (path, max(class_scores, key=class_scores.__getitem__)) for path, class_scores in scores_by_path.items()
    ], soft


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


def _probabilities(scores: Mapping[int, float]) -> ClassProbabilities:
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
        soft: Mapping[str, ClassProbabilities],
        num_classes: int,
        device: torch.device,
    ) -> None:
        per_image = [soft.get(path, ((target, 1.0),)) for path, target in samples]
        max_classes = max(map(len, per_image))
        padded = [(*labels, *((0, 0.0),) * (max_classes - len(labels))) for labels in per_image]
        self.classes = torch.tensor([[label for label, _ in labels] for labels in padded], device=device)
        self.probabilities = torch.tensor([[value for _, value in labels] for labels in padded], device=device)
        self.num_classes = num_classes

    def __call__(self, index: Tensor) -> Tensor:
        """Return the probabilities (B, K) of the images at `index` (B,)."""
        targets = self.probabilities.new_zeros(len(index), self.num_classes)
        return targets.scatter_add_(1, self.classes[index], self.probabilities[index])
