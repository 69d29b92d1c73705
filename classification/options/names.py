"""Words of the library, copied for a parser that must not import torch; a test compares them with the library's."""

from __future__ import annotations

ASSIGNMENTS = ("cheapest", "costliest", "identity", "random")
CAPACITIES = ("spread", "truncate", "reference", "single", "soft", "unbalanced")
COSTS = ("cosine", "correlation", "gradient")
FORMS = ("sum", "mean", "relative")
GROUPS = ("student", "teacher")
REDUCERS = ("amp", "rd", "sp", "sm", "linear")
SOLVERS = ("ortools", "scipy", "sparse")
LARGEST_SIZE = 4096  # of an image's side, in pixels; beyond, one zero too many would take all memory
BEST_BY = ("top1", "balanced_accuracy", "macro_f1", "loss")  # measures by which best.pth may be chosen
LABELS = ("true", "pseudo", "none")  # of --labels
TRACKERS = ("tensorboard", "trackio")  # of --track
# The teachers of the published pairs; every other student gets resnet50.
DEFAULT_TEACHER = {"resnet50": "resnet152"}
TAPS = "frozen teachers and taps"  # a section of --help-all
