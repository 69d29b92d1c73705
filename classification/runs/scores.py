"""How good predictions are, per image and in all, and how two networks differ on the same images: pure functions."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from classification.models.intervals import difference_interval, verdict

BINS = 15  # of the calibration error
COLUMNS = 5

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Predictions:
    """What a network says of every image.

    Args:
        predicted: its class, (N,).
        probability: of that class, (N,).
        in_top5: whether the true class is among the first five, (N,).
        loss: cross-entropy, (N,).
        target: the true class, (N,).
    """

    predicted: Integers
    probability: Floats
    in_top5: NDArray[np.bool_]
    loss: Floats
    target: Integers

    @classmethod
    def of(cls, rows: Tensor) -> Predictions:
        """Return the rows (N, 5) of `per_image`."""
        predicted, probability, in_top5, loss, target = rows.cpu().numpy().T
        return cls(predicted.astype(np.int64), probability, in_top5 > 0, loss, target.astype(np.int64))

    @property
    def right(self) -> NDArray[np.bool_]:
        """Whether the class is the true one, (N,)."""
        return np.equal(self.predicted, self.target)


def per_image(logits: Tensor, target: Tensor) -> Tensor:
    """Return class, its probability, whether the target is in the first five, cross-entropy and target: (B, 5).

    Args:
        logits: (B, K), float32.
        target: (B,).
    """
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    wide = logits.double()
    probability = wide.softmax(1).gather(1, best[:, :1]).squeeze(1)
    loss = F.cross_entropy(wide, target, reduction="none")
    return torch.stack([best[:, 0], probability, (best == target[:, None]).any(1), loss, target], 1).double()


def class_scores(found: Predictions) -> dict[str, float]:
    """Return the scores that count classes alike, whatever their number of images, in percent.

    Returns:
        `balanced_accuracy`, the mean over the classes that there are images of, and `macro_f1`, over the classes that
        occur in labels or predictions.
    """
    from sklearn.metrics import balanced_accuracy_score, f1_score  # slow to import, for evaluation only

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes that are predicted and have no images here
        balanced = balanced_accuracy_score(found.target, found.predicted)
    return {
        "balanced_accuracy": 100 * float(balanced),
        "macro_f1": 100 * float(f1_score(found.target, found.predicted, average="macro", zero_division=0)),
    }


def scores(found: Predictions, classes: Sequence[str]) -> dict[str, Any]:
    """Return what is said of one network; all but `loss` and counts are percentages.

    Args:
        found: its predictions.
        classes: names in order of index.

    Returns:
        `top1`, `top5`, `loss` (the mean cross-entropy), `images`; those of `class_scores`; `ece`, the expected
        calibration error; `per_class`, a list of `name`, `images`, `correct`.
    """
    images = np.bincount(found.target, minlength=len(classes))
    correct = np.bincount(found.target[found.right], minlength=len(classes))
    counts = zip(classes, images.tolist(), correct.tolist(), strict=False)  # a network may have more outputs
    return {
        "top1": 100 * float(found.right.mean()),
        "top5": 100 * float(found.in_top5.mean()),
        "loss": float(found.loss.mean()),
        "images": len(found.target),
        **class_scores(found),
        "ece": 100 * calibration_error(found.probability, found.right),
        "per_class": [{"name": name, "images": there, "correct": right} for name, there, right in counts],
    }


def calibration_error(probability: Floats, right: NDArray[np.bool_], bins: int = BINS) -> float:
    """Return the expected calibration error: sum over bins of n_b / N * |accuracy_b - mean probability_b|.

    Args:
        probability: of the predicted class, (N,).
        right: whether it is the true one, (N,).
        bins: equal ones over (0, 1]; each holds its upper end.

    Reference: Guo, Pleiss, Sun, Weinberger, 2017, arXiv:1706.04599, equation 5.
    """
    place = np.clip(np.ceil(np.nan_to_num(probability) * bins).astype(np.int64) - 1, 0, bins - 1)
    gaps = np.bincount(place, weights=right - probability, minlength=bins)  # n_b * (accuracy_b - mean probability_b)
    return float(np.abs(gaps).sum() / len(right))


def compare(student: Predictions, teacher: Predictions) -> dict[str, Any]:
    """Compare two networks on the same images.

    Returns:
        `top1_difference`, student minus teacher in points, its 95 % `interval` and the `verdict` about it, and the
        `agreement`, the percentage of images that both say the same class of.

    Raises:
        ValueError: the images differ.
    """
    if not np.array_equal(student.target, teacher.target):
        raise ValueError("two networks are compared on the same images in the same order")
    ours, theirs = student.right, teacher.right
    right = [int(part.sum()) for part in (ours & theirs, theirs & ~ours, ours & ~theirs, ~ours & ~theirs)]
    interval = difference_interval(right)
    return {
        "top1_difference": 100 * (right[2] - right[1]) / len(ours),
        "interval": list(interval),
        "verdict": verdict(*interval),
        "agreement": 100 * float((student.predicted == teacher.predicted).mean()),
    }
