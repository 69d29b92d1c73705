"""This process among its ranks: its device, its seed, what wraps the module that trains."""

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
    """The ranks of one node: the number of this one among them, how many they are, and their group."""

    number: int = 0
    size: int = 1
    group: Any = None

    def gather(self, value: Any) -> list[Any]:
        """Return what each of them gives."""
        found = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(found, value, group=self.group)
        return found


@dataclass(frozen=True)
class World:
    """This process among its ranks, and its device."""

    rank: int = 0
    size: int = 1
    local_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    # Reduced tensors, a few small ones an epoch. A gloo thread that is the last to hold one waits for the interpreter's
    # lock to free it, while the end of the process group waits for the thread holding that lock.
    kept: list[Tensor] = field(default_factory=list)
    mates: tuple[Mate, ...] = ()  # every rank's process, to name one that died
    heartbeat: Heartbeat | None = None  # among several ranks
    # Shared with the loading processes: 1 once the job is over, and they leave at the first signal.
    ending: Any = field(default_factory=lambda: multiprocessing.RawValue("b", 0))

    @property
    def first(self) -> bool:
        """Whether this rank prints and writes."""
        return self.rank == 0

    def passed(self) -> None:
        """Note that this rank has passed a batch, so that ranks that hang can be named."""
        if self.heartbeat is not None:
            self.heartbeat.passed()

    def largest(self, number: int) -> int:
        """Return the largest of the ranks' numbers."""
        if self.size == 1:
            return number
        value = torch.tensor(number, device=self.device, dtype=torch.int64)
        self.kept.append(value)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return int(value)

    def wait(self) -> None:
        """Wait until every rank has come here."""
        if self.size > 1:
            dist.barrier()

    def say(self, text: str) -> None:
        """Print a line, on rank 0."""
        if self.first:
            print(text, flush=True)

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of `values` over the ranks."""
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
        """Stop the run where a 63-bit number differs between ranks.

        Raises:
            RunError: naming the ranks that differ from rank 0.
        """
        if self.size == 1:
            return
        own = torch.tensor([number], device=self.device, dtype=torch.int64)
        found = [torch.zeros_like(own) for _ in range(self.size)]
        self.kept.extend((own, *found))
        dist.all_gather(found, own)
        others = [rank for rank, value in enumerate(found) if int(value) != int(found[0])]
        if others:
            raise RunError(f"{what} differ between the ranks: {others} from 0; are their data and code the same?")

    @torch.no_grad()
    def average_statistics(self, module: nn.Module) -> None:
        """Give every rank the mean over the ranks of each batch norm's running mean and variance.

        The variance is the mean of the ranks' variances: how far their means lie apart is left out, which is little
        after many batches. Equal statistics stay what they are, to the bit.
        """
        norms = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
        kept = [value for norm in norms for value in (norm.running_mean, norm.running_var)]
        values = [value for value in kept if value is not None]
        if self.size == 1 or not values:
            return
        means = self.sum(torch.cat([value.flatten().double() for value in values])) / self.size
        for value, mean in zip(values, means.split([value.numel() for value in values]), strict=True):
            value.copy_(mean.view_as(value))

    def local_ranks(self) -> LocalRanks:
        """Return the ranks of this node, of which this is one; every rank of the run has to ask."""
        if self.size == 1:
            return LocalRanks()
        groups: dict[str, Any] = {}
        hosts = [mate.host for mate in self.mates]
        wait_for = timedelta(seconds=self.heartbeat.timeout) if self.heartbeat else None
        for host in dict.fromkeys(hosts):
            ranks = [rank for rank, other in enumerate(hosts) if other == host]
            groups[host] = (ranks, dist.new_group(ranks, backend="gloo", timeout=wait_for))
        ranks, group = groups[hosts[self.rank]]
        return LocalRanks(ranks.index(self.rank), len(ranks), group)

    @torch.no_grad()
    def share_state(self, module: nn.Module) -> None:
        """Give every rank rank 0's weights and batch norm statistics."""
        if self.size > 1:
            for value in (*module.parameters(), *module.buffers()):
                dist.broadcast(value, src=0)


@dataclass(frozen=True)
class Seed:
    """The seed of a run: its value, and whether the user named it."""

    value: int
    typed: bool

    @classmethod
    def of(cls, typed: int | None) -> Seed:
        """Return the seed that was typed, or a fresh one."""
        return cls(random.SystemRandom().randrange(2**31) if typed is None else typed, typed is not None)


def device_of(devices: Devices, local_rank: int = 0) -> torch.device:
    """Return the device that a rank of this node works on."""
    if devices.gpu is not None:
        return torch.device("cuda", devices.gpu)
    if devices.device == "cpu" or (devices.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if devices.device in ("auto", "cuda"):
        return torch.device("cuda", local_rank)
    return torch.device(devices.device)


def seed_everything(seed: int, rank: int, *, deterministic: bool) -> None:
    """Seed Python, NumPy and torch, each rank in its own way.

    Args:
        seed: shared by the ranks.
        rank: of this process.
        deterministic: whether every operation must be; one that has no such form stops the run. GPU convolutions are
            then chosen by rule; else by their speed, which may differ from run to run.
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
    """Wrap what trains: DDP among ranks; DataParallel on one process that sees several GPUs; else nothing.

    DDP does not broadcast buffers: flows and cost sums are equal by construction, statistics are shared when needed.
    It looks in each step for weights without a gradient, as a head has where terms read maps alone: without that look
    its second step fails.
    """
    if world.size > 1:
        ids = [world.device.index] if world.device.type == "cuda" else None
        ddp = nn.parallel.DistributedDataParallel
        new = "forward_sync_buffers" in inspect.signature(ddp).parameters  # the name since torch 2.15
        no_broadcast: dict[str, Any] = {"forward_sync_buffers" if new else "broadcast_buffers": False}
        return ddp(module, device_ids=ids, find_unused_parameters=True, **no_broadcast)
    return nn.DataParallel(module) if parallel_devices(world, devices) > 1 else module


def parallel_devices(world: World, devices: Devices) -> int:
    """Return how many GPUs this process uses: all visible ones where it is alone and none was named."""
    alone = world.size == 1 and devices.gpu is None and devices.device in ("auto", "cuda")
    return torch.cuda.device_count() if alone and world.device.type == "cuda" else 1
