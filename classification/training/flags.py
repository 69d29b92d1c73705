"""What any rank met in a step, exchanged between them and read without making a GPU wait."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from classification.runs.world import World


class Met(NamedTuple):
    """What any rank met in a step.

    Args:
        loss: a loss that is not finite.
        gradient: a gradient that is not finite.
        signal: the number of a signal that asks to stop, or 0.
        save: a signal that asks for a checkpoint.
    """

    loss: bool = False
    gradient: bool = False
    signal: int = 0
    save: bool = False


class Flags:
    """Exchange what ranks met in each step.

    Reading a number from a GPU waits until all its queued work is done, and then it idles until new work comes.
    So `late` flags are copied in the background, and read after the next step.

    Args:
        world: this rank.
        late: whether `exchange` returns what was met in the step before.
    """

    def __init__(self, world: World, *, late: bool) -> None:
        self.world, self.late = world, late
        self._flags = torch.zeros(4, device=world.device)  # kept: see World.kept
        self._host = torch.zeros(4).pin_memory() if late else torch.zeros(0)
        self._copied = torch.cuda.Event() if late else None
        self._pending = False

    def exchange(self, loss: Tensor, gradient: Tensor | None, signal: int, save: bool) -> Met:
        """Return what any rank met in this step, or where flags are late in the step before.

        Args:
            loss: whether this rank's loss is not finite.
            gradient: whether its gradient is not; None where nobody looked.
            signal: number of a signal that came to this rank, or 0.
            save: whether this rank was asked for a checkpoint.
        """
        before = self.settle()
        self._flags.zero_()
        self._flags[0] = loss
        if gradient is not None:
            self._flags[1] = gradient
        self._flags[2] = signal
        self._flags[3] = save
        if self.world.size > 1:
            dist.all_reduce(self._flags, op=dist.ReduceOp.MAX)
        if self._copied is None:
            return _read(self._flags)
        self._host.copy_(self._flags, non_blocking=True)
        self._copied.record()
        self._pending = True
        return before

    def settle(self) -> Met:
        """Return what was met in the last step, if it was not returned yet."""
        if self._copied is None or not self._pending:
            return Met()
        self._copied.synchronize()
        self._pending = False
        return _read(self._host)


def _read(flags: Tensor) -> Met:
    loss, gradient, signal, save = flags.int().tolist()
    return Met(bool(loss), bool(gradient), int(signal), bool(save))
