"""Deep mutual learning: two networks pull each other's probabilities together."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from mgd.checks import check_logits, check_unused_target
from mgd.losses.term import LogitTerm, log_probabilities


def dml(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    symmetric: bool = False,
    detach: bool = True,
) -> Tensor:
    """Compute 1 / B * sum over images of KL(q || p), p and q the softmax of the network and of its peer.

    With `symmetric`, as in PaddleClas: 1 / 2B * sum over images of [KL(p || q) + KL(q || p)]. With `detach=False`, it
    trains two peers at once.

    Args:
        student_logits: (B, K).
        teacher_logits: (B, K), of the peer.
        target: not used; every logit loss takes it.
        symmetric: whether to use the mean of both directions.
        detach: whether the peer is constant, so that the gradient flows to `student_logits` only.

    Returns:
        Scalar, float32.

    Raises:
        ValueError: the shapes of the logits differ.

    Reference: Zhang et al., 2017, arXiv:1706.00384, equations 5 and 8; PaddleClas, DMLLoss, for the symmetric form.
    """
    check_logits("dml", student_logits, teacher_logits)
    check_unused_target("dml", target)
    if detach:
        teacher_logits = teacher_logits.detach()
    student = log_probabilities(student_logits)
    teacher = log_probabilities(teacher_logits)
    if not symmetric:
        return F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    # KL(p || q) + KL(q || p) = sum over the classes of (p - q) (log p - log q)
    both = (student.exp() - teacher.exp()) * (student - teacher)
    return 0.5 * both.sum(dim=1).mean()


class DML(LogitTerm):
    """`dml`, averaged over the peers.

    In mutual learning, each network has its own term, with constant peers. For two networks and the symmetric form, the
    gradients of both terms together equal those of one symmetric term that trains both.
    """

    mutual = True

    @dataclass(frozen=True, kw_only=True)
    class Hyper(LogitTerm.Hyper):
        """Hyper-parameters of `DML`.

        Args:
            symmetric: whether to take half the sum of KL in both directions, as PaddleClas does.
        """

        symmetric: bool = False

    hyper: Hyper

    def compare(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None) -> Tensor:
        return dml(student_logits, teacher_logits, target, symmetric=self.hyper.symmetric)
