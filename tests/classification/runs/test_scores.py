"""Scores against cases by hand, scikit-learn and SciPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn import metrics
from sklearn.calibration import calibration_curve
from torch import nn

from classification.runs.scores import (
    Predictions,
    calibration_error,
    compare,
    per_image,
    scores,
)


def said(predicted: list[int], target: list[int], probability: float = 1.0) -> Predictions:
    count = len(target)
    return Predictions(
        np.array(predicted), np.full(count, probability), np.ones(count, bool), np.zeros(count), np.array(target)
    )


def random_predictions(classes: int, images: int) -> tuple[torch.Tensor, Predictions]:
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(classes, (images,), generator=generator)
    logits = torch.randn(images, classes, generator=generator) + 2 * nn.functional.one_hot(target, classes)
    return logits, Predictions.of(per_image(logits, target))


def test_scores_by_hand() -> None:
    found = scores(said([0, 0, 1, 1], [0, 0, 0, 1], probability=0.9), ["a", "b", "c"])
    assert found["top1"] == 75 and found["images"] == 4
    assert found["balanced_accuracy"] == pytest.approx(100 * (2 / 3 + 1) / 2)
    assert found["macro_f1"] == pytest.approx(100 * (2 * 2 / (2 * 2 + 1) + 2 / 3) / 2)  # 2 TP / (2 TP + FP + FN)
    assert found["ece"] == pytest.approx(100 * (0.9 - 0.75))
    assert found["per_class"] == [
        {"name": "a", "images": 3, "correct": 2},
        {"name": "b", "images": 1, "correct": 1},
        {"name": "c", "images": 0, "correct": 0},
    ]


def test_scores_agree_with_scikit_learn() -> None:
    logits, predictions = random_predictions(classes=7, images=400)
    found, target, chances = scores(predictions, "abcdefg"), predictions.target, logits.softmax(1).numpy()
    assert found["top1"] == pytest.approx(100 * metrics.accuracy_score(target, chances.argmax(1)))
    assert found["top5"] == pytest.approx(100 * metrics.top_k_accuracy_score(target, chances, k=5))
    assert found["loss"] == pytest.approx(metrics.log_loss(target, chances), rel=1e-5)
    assert found["balanced_accuracy"] == pytest.approx(100 * metrics.balanced_accuracy_score(target, chances.argmax(1)))
    assert found["macro_f1"] == pytest.approx(100 * metrics.f1_score(target, chances.argmax(1), average="macro"))
    matrix = metrics.confusion_matrix(target, chances.argmax(1))
    assert [entry["correct"] for entry in found["per_class"]] == matrix.diagonal().tolist()
    assert [entry["images"] for entry in found["per_class"]] == matrix.sum(1).tolist()
    right = chances.argmax(1) == target
    accuracy, confidence = calibration_curve(right, chances.max(1), n_bins=15)
    counts = np.histogram(chances.max(1), bins=np.linspace(0, 1, 16))[0]
    expected = np.abs(accuracy - confidence) @ counts[counts > 0] / 400
    assert found["ece"] == pytest.approx(100 * expected, rel=1e-5)


def test_a_bin_holds_its_upper_end() -> None:
    right = np.array([True, False])
    assert calibration_error(np.array([0.5, 0.25]), right, bins=4) == pytest.approx((0.5 + 0.25) / 2)
    # In one bin, gaps of unlike sign would cancel.
    assert calibration_error(np.array([0.5, 0.5]), right, bins=4) == pytest.approx(0)


def test_two_networks_by_hand() -> None:
    student, teacher = said([0, 1, 1, 2], [0, 1, 2, 0]), said([0, 0, 1, 0], [0, 1, 2, 0])
    found = compare(student, teacher)
    assert (found["top1_difference"], found["agreement"]) == (0, 50)
    assert found["interval"][0] < 0 < found["interval"][1] and found["verdict"] == "UNDECIDED"
    assert compare(student, student)["verdict"] == "NO DIFFERENCE"
    assert compare(said([0, 0], [0, 0]), said([0, 1], [0, 0]))["top1_difference"] == 50  # the student is better
    with pytest.raises(ValueError, match="same images"):
        compare(student, said([0], [0]))
