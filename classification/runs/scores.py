"""Scores of predictions, per image and in total, and the comparison of two networks: pure functions."""

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
COLUMNS = 5  # of `per_image`

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Predictions:
    """The predictions of a network for N images.

    Args:
        predicted: the likeliest class, (N,).
        probability: of that class, (N,).
        in_top5: whether the true class is among the five likeliest, (N,).
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
        """Return the predictions in rows (N, 5) of `per_image`."""
        predicted, probability, in_top5, loss, target = rows.cpu().numpy().T
        return cls(predicted.astype(np.int64), probability, in_top5 > 0, loss, target.astype(np.int64))

    @property
    def right(self) -> NDArray[np.bool_]:
        """Whether the prediction is the true class, (N,)."""
        return np.equal(self.predicted, self.target)


def per_image(logits: Tensor, target: Tensor) -> Tensor:
    """Return the columns of `Predictions`, in its order, as one tensor (B, 5) float64.

    Args:
        logits: (B, K), float32.
        target: (B,).
    """
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    wide = logits.double()
    probability = wide.softmax(1).gather(1, best[:, :1]).squeeze(1)
    loss = F.cross_entropy(wide, target, reduction="none")
    return torch.stack([best[:, 0], probability, (best == target[:, None]).any(1), loss, target], 1).double()


def class_scores(predictions: Predictions) -> dict[str, float]:
    """Return the scores in which all classes count equally, whatever their number of images, in percent.

    Returns:
        `balanced_accuracy`, the mean over the classes that have images, and `macro_f1`, the mean over the classes that
        occur in labels or predictions.
    """
    from sklearn.metrics import balanced_accuracy_score, f1_score  # slow to import, for evaluation only

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about classes that are predicted but have no images
        balanced = balanced_accuracy_score(predictions.target, predictions.predicted)
    return {
        "balanced_accuracy": 100 * float(balanced),
        "macro_f1": 100 * float(f1_score(predictions.target, predictions.predicted, average="macro", zero_division=0)),
    }


def scores(predictions: Predictions, classes: Sequence[str]) -> dict[str, Any]:
    """Return the scores of one network; all but `loss` and counts are percentages.

    Args:
        predictions: of the network.
        classes: names in order of index.

    Returns:
        `top1`, `top5`, `loss` (the mean cross-entropy), `images`; those of `class_scores`; `ece`, the expected
        calibration error; `per_class`, a list of `name`, `images`, `correct`.
    """
    images = np.bincount(predictions.target, minlength=len(classes))
    correct = np.bincount(predictions.target[predictions.right], minlength=len(classes))
    counts = zip(classes, images.tolist(), correct.tolist(), strict=False)  # a network may have more outputs
    return {
        "top1": 100 * float(predictions.right.mean()),
        "top5": 100 * float(predictions.in_top5.mean()),
        "loss": float(predictions.loss.mean()),
        "images": len(predictions.target),
        **class_scores(predictions),
        "ece": 100 * calibration_error(predictions.probability, predictions.right),
        "per_class": [{"name": name, "images": total, "correct": right} for name, total, right in counts],
    }


def calibration_error(probability: Floats, right: NDArray[np.bool_], bins: int = BINS) -> float:
    """Return the expected calibration error: sum over bins of n_b / N * |accuracy_b - mean probability_b|.

    Args:
        probability: of the predicted class, (N,).
        right: whether it is the true one, (N,).
        bins: number of equal bins over (0, 1]; each includes its upper end.

    Reference: Guo, Pleiss, Sun, Weinberger, 2017, arXiv:1706.04599, equation 5.
    """
    bin_of_image = np.clip(np.ceil(np.nan_to_num(probability) * bins).astype(np.int64) - 1, 0, bins - 1)
    gaps = np.bincount(
        bin_of_image, weights=right - probability, minlength=bins
    )  # n_b * (accuracy_b - mean probability_b)
    return float(np.abs(gaps).sum() / len(right))


def compare(student: Predictions, teacher: Predictions) -> dict[str, Any]:
    """Compare two networks on the same images.

    Returns:
        `top1_difference`, student minus teacher in points, its 95 % `interval` and the `verdict` about it, and the
        `agreement`, the percentage of images for which both predict the same class.

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
