"""Find the rank that the others wait for: ranks exchange their progress, and name the one that hangs."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

EVERY = 5.0  # seconds between two exchanges
SILENT = 60.0  # seconds without progress after which the others say whom they wait for


class Store(Protocol):
    """A store of keys that all ranks see, as torch's."""

    def set(self, key: str, value: str) -> object: ...
    def check(self, keys: list[str]) -> bool: ...
    def get(self, key: str) -> bytes: ...


@dataclass(frozen=True)
class Mate:
    """A process of the run: its host, its process ID, and its device."""

    host: str
    process: int
    device: str


@dataclass
class Sight:
    """The last progress that this rank read of another, with times on this rank's clock."""

    count: int = -1  # batches that it has passed
    beat: int = -1  # exchanges that it has made
    since: float = 0.0  # when `count` last changed
    heard: float = 0.0  # when `beat` last changed


class Heartbeat:
    """Exchange progress between ranks, and name those that are waited for.

    A rank that is stopped, or hangs in a system call, makes no exchanges. One that hangs in a library makes exchanges,
    but its count of batches does not grow. In both cases, the other ranks wait silently in a collective operation until
    its timeout.

    Args:
        store: shared by the ranks.
        rank: of this process.
        mates: every rank's process.
        timeout: of collective operations, in seconds, for the message.
        say: prints a sentence.
        clock: returns seconds.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        mates: Sequence[Mate],
        timeout: float,
        say: Callable[[str], object] = lambda text: print(text, file=sys.stderr, flush=True),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store, self.rank, self.mates, self.timeout, self.say, self.clock = store, rank, mates, timeout, say, clock
        now = clock()
        self.count, self.moved = 0, now  # batches that this rank has passed, and the time of the last one
        self._beats, self._exchanged = 0, now
        self._sights = [Sight(since=now, heard=now) for _ in mates]
        self._last_warned: dict[int, float] = {}  # rank -> time of the last warning about it
        self._end = threading.Event()

    def passed(self) -> None:
        """Count a batch that this rank has passed."""
        self.count, self.moved = self.count + 1, self.clock()

    def start(self) -> None:
        """Exchange and watch in two threads: an exchange does not return while rank 0, which keeps the store, hangs."""
        for work in (self.exchange, self.watch):
            threading.Thread(target=self._repeat, args=(work,), daemon=True).start()

    def stop(self) -> None:
        """End the threads."""
        self._end.set()

    def _repeat(self, work: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError, ConnectionError):  # the store is gone: its process has ended
            while not self._end.wait(EVERY):
                work()

    def exchange(self) -> None:
        """Write this rank's progress and read the others'."""
        self._beats += 1
        self.store.set(f"heartbeat {self.rank}", json.dumps([self._beats, self.count]))
        for rank, sight in enumerate(self._sights):
            key = f"heartbeat {rank}"
            if not self.store.check([key]):
                continue
            beat, count = json.loads(self.store.get(key))
            now = self.clock()
            if beat != sight.beat:
                sight.beat, sight.heard = beat, now
            if count != sight.count:
                sight.count, sight.since = count, now
        self._exchanged = self.clock()

    def watch(self) -> None:
        """Warn about the ranks that are waited for, about each at most once in 10 * `SILENT` seconds."""
        now = self.clock()
        for rank in self.waited_for(now):
            if now - self._last_warned.get(rank, -1e9) < 10 * SILENT:
                continue
            self._last_warned[rank] = now
            mate = self.mates[rank]
            quiet = now - self._sights[rank].since
            self.say(
                f"!! WARNING: waiting for rank {rank} (process {mate.process} on {mate.host}), without progress for "
                f"{quiet:.0f} s; the run ends after --dist-timeout {self.timeout:.0f} s of waiting"
            )

    def waited_for(self, now: float) -> list[int]:
        """Return the ranks that this one waits for; none if it makes progress, or another rank warns about them."""
        if now - self.moved < SILENT:
            return []
        if now - self._exchanged > SILENT:  # rank 0, which keeps the store, does not answer
            behind = [0]
        else:
            behind = [rank for rank, sight in enumerate(self._sights) if rank != self.rank and self._hangs(sight, now)]
        first_waiting = next((rank for rank in range(len(self.mates)) if rank not in behind), None)
        return behind if first_waiting == self.rank else []

    def _hangs(self, sight: Sight, now: float) -> bool:
        silent = now - sight.heard > SILENT
        return silent or (now - sight.since > SILENT and 0 <= sight.count < self.count)


def shared_devices(mates: Sequence[Mate]) -> Mapping[str, list[int]]:
    """Return {GPU: its ranks} for GPUs that more than one rank uses."""
    ranks_by_device: dict[str, list[int]] = {}
    for rank, mate in enumerate(mates):
        if mate.device.startswith(("cuda", "GPU")):
            ranks_by_device.setdefault(f"{mate.device} of {mate.host}", []).append(rank)
    return {device: ranks for device, ranks in ranks_by_device.items() if len(ranks) > 1}
