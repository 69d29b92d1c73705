"""This process as one of the ranks: communication, device, seed, and the wrapping of the module that trains."""

from __future__ import annotations

import inspect
import multiprocessing
import os
import random
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from classification.errors import RunError
from classification.options.devices import Devices
from classification.runs.heartbeat import Heartbeat, Mate


@dataclass(frozen=True)
class LocalRanks:
    """The ranks of one node: the number of this one among them, their number, and their process group."""

    number: int = 0
    size: int = 1
    group: Any = None

    def gather(self, value: Any) -> list[Any]:
        """Return the value of each of these ranks, in order."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=self.group)
        return values


@dataclass(frozen=True)
class World:
    """This process among its ranks, and its device."""

    rank: int = 0
    size: int = 1
    local_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    # Reduced tensors, a few small ones per epoch; keeping them avoids a deadlock. To free the last reference to one, a
    # gloo thread waits for the interpreter's lock, while the thread with that lock waits for the group's end.
    kept: list[Tensor] = field(default_factory=list)
    mates: tuple[Mate, ...] = ()  # every rank's process
    heartbeat: Heartbeat | None = None  # None for a single rank
    # Shared with the loading processes: 1 once the job is over; then they end at the first signal.
    ending: Any = field(default_factory=lambda: multiprocessing.RawValue("b", 0))

    @property
    def first(self) -> bool:
        """Whether this rank prints and writes."""
        return self.rank == 0

    def passed(self) -> None:
        """Count a batch for the heartbeat."""
        if self.heartbeat is not None:
            self.heartbeat.passed()

    def largest(self, number: int) -> int:
        """Return the largest number of all ranks."""
        if self.size == 1:
            return number
        value = torch.tensor(number, device=self.device, dtype=torch.int64)
        self.kept.append(value)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return int(value)

    def wait(self) -> None:
        """Wait until every rank has called this."""
        if self.size > 1:
            dist.barrier()

    def say(self, text: str) -> None:
        """Print a line, on rank 0."""
        if self.first:
            print(text, flush=True)

    def sum(self, values: Tensor) -> Tensor:
        """Sum `values` over the ranks, in place, and return them."""
        if self.size > 1:
            self.kept.append(values)
            dist.all_reduce(values)
        return values

    def share(self, number: int) -> int:
        """Return rank 0's number."""
        if self.size == 1:
            return number
        value = torch.tensor(number, device=self.device, dtype=torch.int64)
        self.kept.append(value)
        dist.broadcast(value, src=0)
        return int(value)

    def check_same(self, number: int, what: str) -> None:
        """Check that a 63-bit number is the same on all ranks.

        Raises:
            RunError: it is not; the message names the ranks that differ from rank 0.
        """
        if self.size == 1:
            return
        own = torch.tensor([number], device=self.device, dtype=torch.int64)
        numbers = [torch.zeros_like(own) for _ in range(self.size)]
        self.kept.extend((own, *numbers))
        dist.all_gather(numbers, own)
        others = [rank for rank, value in enumerate(numbers) if int(value) != int(numbers[0])]
        if others:
            raise RunError(f"{what} differ between the ranks: {others} from 0; are their data and code the same?")

    @torch.no_grad()
    def average_statistics(self, module: nn.Module) -> None:
        """Replace the running means and variances of batch norms by their means over the ranks.

        The mean of the variances neglects the spread of the ranks' means, which is small after many batches. Statistics
        that are equal on all ranks do not change, bit for bit.
        """
        norms = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
        statistics = [value for norm in norms for value in (norm.running_mean, norm.running_var)]
        values = [value for value in statistics if value is not None]
        if self.size == 1 or not values:
            return
        means = self.sum(torch.cat([value.flatten().double() for value in values])) / self.size
        for value, mean in zip(values, means.split([value.numel() for value in values]), strict=True):
            value.copy_(mean.view_as(value))

    def local_ranks(self) -> LocalRanks:
        """Return the ranks of this node; every rank of the run must call this."""
        if self.size == 1:
            return LocalRanks()
        groups: dict[str, Any] = {}
        hosts = [mate.host for mate in self.mates]
        timeout = timedelta(seconds=self.heartbeat.timeout) if self.heartbeat else None
        for host in dict.fromkeys(hosts):
            ranks = [rank for rank, other in enumerate(hosts) if other == host]
            groups[host] = (ranks, dist.new_group(ranks, backend="gloo", timeout=timeout))
        ranks, group = groups[hosts[self.rank]]
        return LocalRanks(ranks.index(self.rank), len(ranks), group)

    @torch.no_grad()
    def share_state(self, module: nn.Module) -> None:
        """Copy the weights and batch norm statistics of rank 0 to every rank."""
        if self.size > 1:
            for value in (*module.parameters(), *module.buffers()):
                dist.broadcast(value, src=0)


@dataclass(frozen=True)
class Seed:
    """The seed of a run: its value, and whether the user gave it."""

    value: int
    typed: bool

    @classmethod
    def of(cls, typed: int | None) -> Seed:
        """Return the seed that was typed, or a random one."""
        return cls(random.SystemRandom().randrange(2**31) if typed is None else typed, typed is not None)


def device_of(devices: Devices, local_rank: int = 0) -> torch.device:
    """Return the device of a rank of this node."""
    if devices.gpu is not None:
        return torch.device("cuda", devices.gpu)
    if devices.device == "cpu" or (devices.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if devices.device in ("auto", "cuda"):
        return torch.device("cuda", local_rank)
    return torch.device(devices.device)


def seed_everything(seed: int, rank: int, *, deterministic: bool) -> None:
    """Seed Python, NumPy and torch, differently on each rank.

    Args:
        seed: shared by the ranks.
        rank: of this process.
        deterministic: whether operations that cannot be deterministic stop the run. If False, cuDNN also chooses the
            algorithms of convolutions by measured speed, so that they may differ from run to run.
    """
    random.seed(seed + rank)
    np.random.seed((seed + rank) % 2**32)
    torch.manual_seed(seed + rank)
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)


def wrap(module: nn.Module, world: World, devices: Devices) -> nn.Module:
    """Wrap the module that trains: in DDP for several ranks, in DataParallel for one process with several GPUs.

    DDP does not broadcast buffers: flows and cost sums are equal by construction, and statistics are shared when
    needed. It searches for unused parameters in each step, because otherwise its second step fails if some get no
    gradient, such as a head if all terms read maps.
    """
    if world.size > 1:
        ids = [world.device.index] if world.device.type == "cuda" else None
        ddp = nn.parallel.DistributedDataParallel
        new = "forward_sync_buffers" in inspect.signature(ddp).parameters  # the name since torch 2.15
        no_broadcast: dict[str, Any] = {"forward_sync_buffers" if new else "broadcast_buffers": False}
        return ddp(module, device_ids=ids, find_unused_parameters=True, **no_broadcast)
    return nn.DataParallel(module) if parallel_devices(world, devices) > 1 else module


def parallel_devices(world: World, devices: Devices) -> int:
    """Return the number of GPUs that this process uses: all visible ones if it is the only rank and none was named."""
    alone = world.size == 1 and devices.gpu is None and devices.device in ("auto", "cuda")
    return torch.cuda.device_count() if alone and world.device.type == "cuda" else 1
