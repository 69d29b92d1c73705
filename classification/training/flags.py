"""Exchange between ranks whether a step failed or a signal came, without making a GPU wait."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from classification.runs.world import World


class Met(NamedTuple):
    """What happened on any rank in a step.

    Args:
        loss: whether a loss was not finite.
        gradient: whether a gradient was not finite.
        signal: number of a signal to stop, or 0.
        save: whether a signal asked for a checkpoint.
    """

    loss: bool = False
    gradient: bool = False
    signal: int = 0
    save: bool = False


class Flags:
    """Exchange `Met` between the ranks in each step.

    Reading a number from a GPU waits until all its queued work is done, and then the GPU is idle until new work comes.
    So `late` flags are copied in the background, and read after the next step.

    Args:
        world: this rank.
        late: whether `exchange` returns the flags of the previous step.
    """

    def __init__(self, world: World, *, late: bool) -> None:
        self.world, self.late = world, late
        self._flags = torch.zeros(4, device=world.device)  # kept alive, see World.kept
        self._host = torch.zeros(4).pin_memory() if late else torch.zeros(0)
        self._copied = torch.cuda.Event() if late else None
        self._pending = False

    def exchange(self, loss: Tensor, gradient: Tensor | None, signal: int, save: bool) -> Met:
        """Return what happened on any rank in this step, or if flags are late, in the previous one.

        Args:
            loss: whether this rank's loss is not finite.
            gradient: whether its gradient is not finite; None if that was not checked.
            signal: number of a signal to this rank, or 0.
            save: whether this rank was asked for a checkpoint.
        """
        previous = self.settle()
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
        return previous

    def settle(self) -> Met:
        """Return the flags of the last step, if they have not been returned yet."""
        if self._copied is None or not self._pending:
            return Met()
        self._copied.synchronize()
        self._pending = False
        return _read(self._host)


def _read(flags: Tensor) -> Met:
    loss, gradient, signal, save = flags.int().tolist()
    return Met(bool(loss), bool(gradient), int(signal), bool(save))
