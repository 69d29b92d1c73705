"""Words of the library, copied for a parser that must not import torch; a test compares them with the library's."""

from __future__ import annotations

ASSIGNMENTS = ("cheapest", "costliest", "identity", "random")
FORMS = ("sum", "mean", "relative")
SOLVERS = ("ortools", "scipy", "sparse")
LARGEST_SIZE = 4096  # of an image's side, in pixels; beyond, one zero too many would take all memory
