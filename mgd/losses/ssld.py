"""Simple semi-supervised label distillation: agree with a frozen teacher, on images with labels or without."""

from __future__ import annotations

from collections.abc import Sequence

from mgd.losses.dml import dml
from mgd.losses.term import LogitTerm


class SSLD(LogitTerm):
    """`dml` against a frozen teacher, as a term: [KL(p_s || p_t) + KL(p_t || p_s)] / 2, batch mean, no labels.

    Args:
        standardised: see `LogitTerm`.
        teacher_weights: see `Term`.

    Reference: Cui et al., 2021, arXiv:2103.05959, section 3.
    """

    def __init__(self, *, standardised: bool = False, teacher_weights: Sequence[float] | None = None) -> None:
        super().__init__(dml, standardised=standardised, teacher_weights=teacher_weights)
