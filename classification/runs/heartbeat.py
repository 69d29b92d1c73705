"""Find the rank that the others wait for: ranks exchange their progress, and say who is late if nothing moves."""

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
    """One process of the run: its host, its process number, and the device that it works on."""

    host: str
    process: int
    device: str


@dataclass
class Sight:
    """A rank as this one sees it: the batches that it has passed, and when this count was first seen, on this clock."""

    count: int = -1
    beat: int = -1
    since: float = 0.0  # when `count` last changed
    heard: float = 0.0  # when `beat` last changed


class Heartbeat:
    """Exchange progress between ranks, and name those that are waited for.

    A rank that is stopped or hangs in a system call neither beats nor counts; one that hangs in a library beats and
    does not count. Both leave the others waiting in a collective, without a word, until its timeout.

    Args:
        store: shared by the ranks.
        rank: of this process.
        mates: every rank's process.
        timeout: seconds after which a collective gives up, for the message.
        say: takes a sentence.
        clock: seconds.
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
        self.count, self.moved = 0, now  # batches that this rank has passed, and when the last one was
        self._beats, self._exchanged = 0, now
        self._seen = [Sight(since=now, heard=now) for _ in mates]
        self._said: dict[int, float] = {}  # when it was last said that a rank is waited for
        self._end = threading.Event()

    def passed(self) -> None:
        """Count a batch that this rank has passed."""
        self.count, self.moved = self.count + 1, self.clock()

    def start(self) -> None:
        """Exchange and watch on two threads: an exchange does not return while rank 0, who keeps the store, hangs."""
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
        for rank, sight in enumerate(self._seen):
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
        """Say which ranks are waited for, once every ten times `SILENT`."""
        now = self.clock()
        for rank in self.waited_for(now):
            if now - self._said.get(rank, -1e9) < 10 * SILENT:
                continue
            self._said[rank] = now
            mate = self.mates[rank]
            quiet = now - self._seen[rank].since
            self.say(
                f"!! WARNING: waiting for rank {rank} (process {mate.process} on {mate.host}), without progress for "
                f"{quiet:.0f} s; the run ends after --dist-timeout {self.timeout:.0f} s of waiting"
            )

    def waited_for(self, now: float) -> list[int]:
        """Return the ranks that this one waits for; empty where it moves itself, or another rank says it."""
        if now - self.moved < SILENT:
            return []
        if now - self._exchanged > SILENT:  # rank 0, who keeps the store, does not answer
            behind = [0]
        else:
            behind = [rank for rank, sight in enumerate(self._seen) if rank != self.rank and self._hangs(sight, now)]
        speaker = next((rank for rank in range(len(self.mates)) if rank not in behind), None)
        return behind if speaker == self.rank else []

    def _hangs(self, sight: Sight, now: float) -> bool:
        silent = now - sight.heard > SILENT
        return silent or (now - sight.since > SILENT and 0 <= sight.count < self.count)


def shared_devices(mates: Sequence[Mate]) -> Mapping[str, list[int]]:
    """Return the GPUs that more than one rank works on, and those ranks."""
    found: dict[str, list[int]] = {}
    for rank, mate in enumerate(mates):
        if mate.device.startswith(("cuda", "GPU")):
            found.setdefault(f"{mate.device} of {mate.host}", []).append(rank)
    return {device: ranks for device, ranks in found.items() if len(ranks) > 1}
