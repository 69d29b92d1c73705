"""Class weights of cross-entropy, for --class-weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from classification.data.unequal import class_weights
from classification.errors import UserError
from classification.options.published import LABELLED
from classification.training.job import Job


def hyper_of(job: Job, name: str) -> Any:
    """Return the hyper-parameters of a term; those of cross-entropy with class weights if --class-weights is given.

    Raises:
        UserError: a recipe gives class weights, too.
    """
    hyper = job.options.table[name].hyper
    if name != LABELLED or job.options.data.class_weights is None:
        return hyper
    if hyper.class_weights is not None:
        raise UserError(f"--class-weights and {LABELLED}.class_weights both weigh the classes: leave one out")
    return replace(hyper, class_weights=class_weights([label for _, label in job.data.train], job.num_classes))
