"""An exported file beside the network it comes from: accuracy, agreement, size, latency, and whether it may be used."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from classification.models.intervals import difference_interval

EXACT = 1e-3  # of the largest logit: what rounding may change in a file that computes in float32


@dataclass(frozen=True)
class Fidelity:
    """Two networks on the same images.

    Args:
        images: their number.
        labelled: whether their classes are known.
        right: images that both have right, the first alone, the second alone, neither.
        agree: images on which both have the same class first.
        difference: the largest between two logits; not finite where a logit is not.
        largest: the largest logit of the first.
    """

    images: int
    labelled: bool
    right: tuple[int, int, int, int]
    agree: int
    difference: float
    largest: float

    def top1(self) -> tuple[float, float]:
        """Return the accuracy of both in percent."""
        both, first, second, _ = self.right
        return 100 * (both + first) / self.images, 100 * (both + second) / self.images

    def interval(self) -> tuple[float, float]:
        """Return the 95 % interval of the difference of top-1, in points: paired bootstrap over the images."""
        return difference_interval(self.right)

    def fault(self, tolerance: float, *, exact: bool) -> str | None:
        """Say why the second may not stand for the first; None where it may.

        Args:
            tolerance: how far top-1 may fall, in points: the whole interval must lie below that to be a fault.
            exact: whether the second computes the same in the same precision.
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
        if exact and self.difference > EXACT * self.largest:
            return f"its logits differ by up to {self.difference:.3g}, where the largest is {self.largest:.3g}"
        return None


def compare(
    before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]]
) -> Fidelity:
    """Compare logits over batches of (images, classes); a class of -1 is not known."""
    right, agree, images, difference, largest = torch.zeros(4, dtype=torch.int64), 0, 0, 0.0, 0.0
    labelled = True
    for pixels, target in batches:
        ours, theirs = before(pixels), after(pixels)
        first, second = ours.argmax(1), theirs.argmax(1)
        kind = 2 * (first != target).long() + (second != target).long()  # 0 both right ... 3 neither
        right += torch.bincount(kind, minlength=4)
        agree += int((first == second).sum())
        images += len(target)
        labelled &= bool((target >= 0).all())
        gap = (ours - theirs).abs().max().item()
        difference = gap if not np.isfinite(gap) else max(difference, gap)
        largest = max(largest, ours.abs().max().item())
        if not np.isfinite(difference):
            break
    both, one, other, neither = right.tolist()
    return Fidelity(images, labelled, (both, one, other, neither), agree, difference, largest)


def table(found: Fidelity, sizes: tuple[int, int], latencies: dict[int, tuple[float, float]]) -> list[str]:
    """Return the lines that set both side by side.

    Args:
        found: logits compared.
        sizes: bytes of the weights before, and of the file.
        latencies: milliseconds before and after, by batch size.
    """
    rows = [("", "before", "after", "")]
    if found.labelled:
        before, after = found.top1()
        low, high = found.interval()
        change = f"{after - before:+.2f} points (95 % interval {low:+.2f} to {high:+.2f})"
        rows.append(("top-1, %", f"{before:.2f}", f"{after:.2f}", change))
    rows.append(("agreement, %", "", f"{100 * found.agree / found.images:.2f}", f"of {found.images} images"))
    rows.append(("largest difference of logits", "", f"{found.difference:.3g}", f"of logits up to {found.largest:.3g}"))
    rows.append(("bytes", f"{sizes[0]:,}", f"{sizes[1]:,}", f"{sizes[1] / sizes[0]:.2f} x"))
    rows += [
        (f"latency of batch {size}, ms", f"{one:.2f}", f"{other:.2f}", f"{other / one:.2f} x")
        for size, (one, other) in latencies.items()
    ]
    return [f"{name:<30}{one:>12}{other:>12}  {note}".rstrip() for name, one, other, note in rows]
