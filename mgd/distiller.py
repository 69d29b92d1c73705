"""One student, its teachers and a weighted sum of terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mgd.taps import Batch, Outputs, Taps
from mgd.teachers import Frozen

Weight = float | Callable[[int], float]


class Distiller(nn.Module):
    """Compute the loss of a student: the weighted sum of terms over its and its teachers' outputs.

    loss = sum over terms of weight * term(student outputs, teachers' outputs, batch)

    Teachers are not submodules: their weights stay out of `parameters()`, of `state_dict()` and of whatever wraps the
    distiller; `.to()` moves them along.

    Args:
        student: `Taps` around the network to train, or a network without taps.
        teachers: one or several of what `mgd.freeze` returns.
        terms: {name: (term, weight)}; a term is a module (student, teachers, batch) -> scalar, a weight a number or a
            function of the epoch (from 0).

    Raises:
        ValueError: a teacher that was not frozen; no terms; a term named "loss" or "logits".
    """

    def __init__(
        self,
        student: nn.Module,
        teachers: nn.Module | Sequence[nn.Module],
        terms: Mapping[str, tuple[nn.Module, Weight]],
    ) -> None:
        super().__init__()
        self.student = student if isinstance(student, Taps) else Taps(student)
        self.teachers = (teachers,) if isinstance(teachers, nn.Module) else tuple(teachers)
        for teacher in self.teachers:
            if not isinstance(teacher, Frozen):
                raise ValueError(f"a {type(teacher).__name__} is not frozen: pass mgd.freeze(teacher)")
        if not terms or {"loss", "logits"} & set(terms):
            raise ValueError('terms must hold at least one term, and none named "loss" or "logits"')
        self.terms = nn.ModuleDict({name: term for name, (term, _) in terms.items()})
        self._weights = {name: weight for name, (_, weight) in terms.items()}

    def weights(self, epoch: int) -> dict[str, float]:
        """Return the weight of each term in `epoch`, counted from 0."""
        return {name: float(w(epoch) if callable(w) else w) for name, w in self._weights.items()}

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Distiller:
        for teacher in self.teachers:
            teacher._apply(fn, recurse)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def forward(
        self, images: Tensor, target: Tensor | None = None, index: Tensor | None = None, epoch: int = 0
    ) -> dict[str, Tensor]:
        """Return {"loss": scalar, "logits": (B, K) of the student, name: raw value of each term}.

        Args:
            images: (B, 3, H, W).
            target: (B,) class indices, or None.
            index: (B,) positions of the images in the data set, for terms with a memory.
            epoch: epoch of training, counted from 0.
        """
        teachers: list[Outputs] = [teacher(images) for teacher in self.teachers]
        student: Outputs = self.student(images)
        batch = Batch(target, index, epoch)
        values: dict[str, Tensor] = {name: term(student, teachers, batch) for name, term in self.terms.items()}
        weights = self.weights(epoch)
        loss = sum((weights[name] * value for name, value in values.items()), student.logits.new_zeros(()))
        return {"loss": loss, "logits": student.logits, **values}
