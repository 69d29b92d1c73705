from __future__ import annotations

import numpy as np
import pytest
from transformers import EvalPrediction

from mgd.huggingface import accuracy_and_f1


def test_accuracy_and_macro_f1_by_hand() -> None:
    logits = np.eye(3)[[0, 1, 1, 1]]
    labels = np.array([0, 0, 1, 2])
    # class 0: 2/(2+0+1), class 1: 2/(2+2+0), class 2: 0
    expected = {"accuracy": 0.5, "f1": (2 / 3 + 1 / 2 + 0) / 3}
    assert accuracy_and_f1(EvalPrediction(logits, labels)) == pytest.approx(expected)
