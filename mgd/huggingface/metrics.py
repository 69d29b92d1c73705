"""Accuracy and macro-F1 for the Trainer, without a download."""

from __future__ import annotations

import numpy as np
from sklearn.metrics import accuracy_score, f1_score
from transformers import EvalPrediction


def accuracy_and_f1(prediction: EvalPrediction) -> dict[str, float]:
    """Return {"accuracy": share of images, "f1": mean over the classes}, both from 0 to 1: a `compute_metrics`.

    f1 = mean of 2 TP / (2 TP + FP + FN) over the classes that occur in labels or predictions

    Args:
        prediction: logits (N, K) and labels (N,).
    """
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    predicted, labels = np.argmax(logits, axis=1), prediction.label_ids
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "f1": float(f1_score(labels, predicted, average="macro", zero_division=0)),
    }
