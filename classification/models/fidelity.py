"""Compare an exported file with its network: accuracy, agreement, size and latency, and whether it may be used."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from classification.models.intervals import difference_interval

EXACT_TOLERANCE = 1e-3  # of the largest logit: allowed difference of a file that computes in float32


@dataclass(frozen=True)
class Fidelity:
    """The comparison of two networks on the same images.

    Args:
        images: number of images.
        labelled: whether their classes are known.
        right: number of images that both classify correctly, only the first, only the second, neither.
        agree: number of images for which both predict the same class.
        difference: largest difference of two logits; not finite if a logit is not.
        largest: largest absolute logit of the first network.
    """

    images: int
    labelled: bool
    right: tuple[int, int, int, int]
    agree: int
    difference: float
    largest: float

    def top1(self) -> tuple[float, float]:
        """Return the accuracies of both in percent."""
        both, first, second, _ = self.right
        return 100 * (both + first) / self.images, 100 * (both + second) / self.images

    def interval(self) -> tuple[float, float]:
        """Return the 95 % interval of the difference in top-1, in points, by a paired bootstrap over the images."""
        return difference_interval(self.right)

    def fault(self, tolerance: float, *, exact: bool) -> str | None:
        """Return why the second network must not replace the first, or None if it may.

        Args:
            tolerance: points by which top-1 may fall; it is a fault if the whole interval lies below -tolerance.
            exact: whether the second computes in the same precision, so that its logits must be equal.
        """
        if not np.isfinite(self.difference):
            return "its logits are not finite"
        if self.labelled and (interval := self.interval())[1] < -tolerance:
            before, after = self.top1()
            low, high = interval
            return (
                f"top-1 changes by {after - before:+.2f} points (95 % interval {low:+.2f} to {high:+.2f}), "
                f"and --tolerance allows it to fall by {tolerance:g}"
            )
        if exact and self.difference > EXACT_TOLERANCE * self.largest:
            return f"its logits differ by up to {self.difference:.3g}, where the largest is {self.largest:.3g}"
        return None


def compare(
    before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]]
) -> Fidelity:
    """Compare the logits of two networks on batches of (images, classes); class -1 means unknown."""
    right, agree, images, difference, largest = torch.zeros(4, dtype=torch.int64), 0, 0, 0.0, 0.0
    labelled = True
    for pixels, target in batches:
        before_logits, after_logits = before(pixels), after(pixels)
        first, second = before_logits.argmax(1), after_logits.argmax(1)
        outcome = 2 * (first != target).long() + (second != target).long()  # 0 both right ... 3 neither
        right += torch.bincount(outcome, minlength=4)
        agree += int((first == second).sum())
        images += len(target)
        labelled &= bool((target >= 0).all())
        distance = (before_logits - after_logits).abs().max().item()
        difference = distance if not np.isfinite(distance) else max(difference, distance)
        largest = max(largest, before_logits.abs().max().item())
        if not np.isfinite(difference):
            break
    both, one, other, neither = right.tolist()
    return Fidelity(images, labelled, (both, one, other, neither), agree, difference, largest)


def table(fidelity: Fidelity, sizes: tuple[int, int], latencies: dict[int, tuple[float, float]]) -> list[str]:
    """Return the lines of a table that compares both.

    Args:
        fidelity: the comparison.
        sizes: bytes of the network's weights, and of the file.
        latencies: milliseconds of both, by batch size.
    """
    rows = [("", "before", "after", "")]
    if fidelity.labelled:
        before, after = fidelity.top1()
        low, high = fidelity.interval()
        change = f"{after - before:+.2f} points (95 % interval {low:+.2f} to {high:+.2f})"
        rows.append(("top-1, %", f"{before:.2f}", f"{after:.2f}", change))
    rows.append(("agreement, %", "", f"{100 * fidelity.agree / fidelity.images:.2f}", f"of {fidelity.images} images"))
    rows.append(
        ("largest difference of logits", "", f"{fidelity.difference:.3g}", f"of logits up to {fidelity.largest:.3g}")
    )
    rows.append(("bytes", f"{sizes[0]:,}", f"{sizes[1]:,}", f"{sizes[1] / sizes[0]:.2f} x"))
    rows += [
        (f"latency of batch {size}, ms", f"{one:.2f}", f"{other:.2f}", f"{other / one:.2f} x")
        for size, (one, other) in latencies.items()
    ]
    return [f"{name:<30}{one:>12}{other:>12}  {note}".rstrip() for name, one, other, note in rows]
