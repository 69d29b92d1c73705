"""Deep mutual learning: two networks pull each other's probabilities together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from mgd.losses.kd import kd
from mgd.losses.term import LogitTerm
from mgd.taps import Outputs


def dml(student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None, *, detach: bool = True) -> Tensor:
    """Compute 1 / 2B * sum over images of [KL(p || q) + KL(q || p)], p and q the softmax of the two networks.

    One evaluation with `detach=False` trains both of two peers. Of more peers, each takes `kd` at temperature 1 against
    every other, averaged.

    Args:
        student_logits: (B, K).
        teacher_logits: (B, K), of the peer.
        target: not used; every logit loss takes it.
        detach: whether the peer is a constant, so that the gradient flows to `student_logits` only.

    Returns:
        Scalar, float32.

    Reference: Zhang et al., 2017, arXiv:1706.00384, section 3, made symmetric.
    """
    if detach:
        teacher_logits = teacher_logits.detach()
    student = F.log_softmax(student_logits.float(), dim=1)
    teacher = F.log_softmax(teacher_logits.float(), dim=1)
    # KL(p || q) + KL(q || p) = sum over the classes of (p - q) (log p - log q)
    both = (student.exp() - teacher.exp()) * (student - teacher)
    return 0.5 * both.sum(dim=1).mean()


class DML(LogitTerm):
    """Mutual learning as a term: the symmetric `dml` against one peer, KL(q || p) as in the paper against several.

    In `mgd.Mutual` each network has its own such term with its peers as constants: their gradients together are those
    of one symmetric term that trains both.

    Args:
        symmetric: whether the symmetric form is used; `from_outputs` decides by the number of peers.
        standardised: see `LogitTerm`.
        teacher_weights: see `Term`.
    """

    def __init__(
        self,
        symmetric: bool = True,
        *,
        standardised: bool = False,
        teacher_weights: Sequence[float] | None = None,
    ) -> None:
        common: dict[str, Any] = {"standardised": standardised, "teacher_weights": teacher_weights}
        if symmetric:
            super().__init__(dml, **common)
        else:
            super().__init__(kd, temperature=1.0, **common)

    @classmethod
    def from_outputs(cls, student: Outputs, teachers: Sequence[Outputs], num_images: int, **options: Any) -> DML:
        """Build it symmetric for one peer, in the paper's form for several; see `Term.from_outputs`."""
        return cls(**{"symmetric": len(teachers) == 1, **options})
