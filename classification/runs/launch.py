"""Processes and devices: ranks, process groups, wrapping, exit status."""

from __future__ import annotations

import contextlib
import inspect
import os
import platform
import random
import shlex
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch import multiprocessing as mp

from classification.errors import RunError, Stopped, UserError
from classification.options.first_look import write_any_name
from classification.options.groups import Devices
from classification.options.options import Options
from classification.runs.memory import keep_freed_memory


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
    mates: tuple[tuple[str, int], ...] = ()  # host and process of every rank, to name one that died
    # Shared with the loading processes: 1 once the job is over, and they leave at the first signal.
    ending: Any = field(default_factory=lambda: mp.RawValue("b", 0))

    @property
    def first(self) -> bool:
        """Whether this rank prints and writes."""
        return self.rank == 0

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
    def share_state(self, module: nn.Module) -> None:
        """Give every rank rank 0's weights and batch norm statistics."""
        if self.size > 1:
            for value in (*module.parameters(), *module.buffers()):
                dist.broadcast(value, src=0)


@dataclass(frozen=True)
class _Place:
    """Which ranks to start here: how many, and what the first one is called."""

    first: int
    size: int
    local_size: int
    spawn: bool
    env: bool


def _place(devices: Devices) -> _Place:
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ and "TORCHELASTIC_RUN_ID" in os.environ:
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return _Place(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), local_size, False, True)
    nodes, node = devices.world_size, devices.rank
    if devices.dist_url == "env://":
        nodes = int(os.environ.get("WORLD_SIZE", nodes)) if nodes == -1 else nodes
        node = int(os.environ.get("RANK", node)) if node == -1 else node
    nodes, node = max(nodes, 1), max(node, 0)
    if devices.multiprocessing_distributed:
        local_size = max(torch.cuda.device_count(), 1) if device_of(devices).type == "cuda" else 1
        return _Place(node * local_size, nodes * local_size, local_size, local_size > 1, False)
    return _Place(node, nodes, 1, False, False)


def device_of(devices: Devices, local_rank: int = 0) -> torch.device:
    """Return the device that a rank of this node works on."""
    if devices.gpu is not None:
        return torch.device("cuda", devices.gpu)
    if devices.device == "cpu" or (devices.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if devices.device in ("auto", "cuda"):
        return torch.device("cuda", local_rank)
    return torch.device(devices.device)


@dataclass(frozen=True)
class Seed:
    """The seed of a run: its value, and whether the user named it."""

    value: int
    typed: bool

    @classmethod
    def of(cls, typed: int | None) -> Seed:
        """Return the seed that was typed, or a fresh one."""
        return cls(random.SystemRandom().randrange(2**31) if typed is None else typed, typed is not None)


Parse = Callable[[list[str], str], Options]
Prepare = Callable[[Options, Seed], Any]
Execute = Callable[[Any, World], None]


@dataclass(frozen=True)
class Task:
    """What one command does; ranks that are spawned do it anew, out of the same words.

    Args:
        words: the command line, without the script.
        prog: the script's name, in front of messages.
        parse: makes the options of the words.
        prepare: builds a job from the options and checks all that can be wrong, before ranks are spawned or joined.
        execute: does the job on one rank.
    """

    words: list[str]
    prog: str
    parse: Parse
    prepare: Prepare
    execute: Execute


@contextlib.contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Ignore Pillow's warnings, which do not name the file that they concern."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        yield


def _spawned(local_rank: int, task: Task, seed: Seed, place: _Place) -> None:
    prog = task.prog
    try:
        with _quiet_pillow():
            options = task.parse(task.words, prog)
            _start(local_rank, options.devices, place, task.prepare(options, seed), task.execute)
    except UserError as error:
        print(f"{prog}: {error}", file=sys.stderr, flush=True)
        os._exit(2)
    except RunError as error:
        print(f"{prog}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    except Stopped as stop:
        _say_stopped(stop, prog)
        os._exit(128 + stop.signal)


def _spawn(task: Task, seed: Seed, place: _Place) -> int:
    """Spawn this node's ranks and return their exit status. If this process is stopped, the ranks are terminated."""
    context = mp.spawn(_spawned, (task, seed, place), nprocs=place.local_size, join=False)
    try:
        while not context.join():
            pass
    except mp.ProcessExitedException as error:
        return error.exit_code if error.exit_code > 0 else 1
    except BaseException:
        for process in context.processes:
            process.terminate()
        raise
    return 0


def _start(local_rank: int, devices: Devices, place: _Place, job: Any, execute: Execute) -> None:
    rank = place.first + local_rank
    local = int(os.environ.get("LOCAL_RANK", 0)) if place.env else local_rank
    device = device_of(devices, local)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    mates: list[tuple[str, int]] = []
    if place.size > 1:
        if device.type == "cpu" and not place.env and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // place.size))  # the ranks may share this machine
        backend = devices.dist_backend or ("nccl" if device.type == "cuda" else "gloo")
        url = "env://" if place.env else devices.dist_url
        try:
            store, *_ = next(dist.rendezvous(url, rank, place.size))
            # After a restart the launcher's store may still hold the addresses of the ranks before.
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            named = dist.PrefixStore(f"attempt {attempt}", store)
            dist.init_process_group(backend, store=named, rank=rank, world_size=place.size)
            mates = _meet(place.size)
        except (ValueError, RuntimeError) as error:
            where = f"rank {rank} of {place.size} cannot join the others at {url} by {backend}"
            raise UserError(f"{where}: {' '.join(str(error).split())[:200]}") from error
    _execute(job, World(rank, place.size, place.local_size, device, mates=tuple(mates)), execute)


def _execute(job: Any, world: World, execute: Execute) -> None:
    """Do the job on this rank.

    Raises:
        RunError: another rank is gone.
    """
    try:
        execute(job, world)
        if dist.is_initialized():
            dist.barrier()  # nobody leaves while others still talk
            dist.destroy_process_group()
    except (UserError, RunError, Stopped):
        raise
    except Exception as error:
        if not (world.mates and lost_a_rank(error)):
            raise
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher ends us meanwhile, and we say why first
        lost = _lost(world.mates)
        raise RunError(f"rank {world.rank} stops: {lost}; --resume goes on from last.pth") from error
    finally:
        world.ending.value = 1


def _meet(size: int) -> list[tuple[str, int]]:
    mates: list[Any] = [None] * size
    dist.all_gather_object(mates, (platform.node(), os.getpid()))
    return mates


def lost_a_rank(error: Exception) -> bool:
    """Whether an error says that the ranks can no longer talk to each other."""
    return any(word in str(error) for word in ("gloo", "NCCL", "Connection", "Broken pipe"))


def _lost(mates: Sequence[tuple[str, int]]) -> str:
    """Name the ranks of this machine that are gone; wait a little, their end may not have been noticed yet."""
    for _ in range(50):
        gone = [rank for rank, (host, pid) in enumerate(mates) if host == platform.node() and not _alive(pid)]
        if gone:
            return f"rank {', '.join(map(str, gone))} died"
        time.sleep(0.1)
    return "another rank is gone, or cannot be reached"


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return not Path("/proc/self").exists()  # where there is no /proc nothing is known


def run(task: Task) -> int:
    """Do a task in one process or several, and turn what happened into an exit status.

    A rank that fails leaves at once: ending its process group in good order would wait for the other ranks.

    Returns:
        0 done, 2 a mistake of the user's, 130 or 143 after SIGINT or SIGTERM, 1 anything else.
    """
    with _quiet_pillow():
        status = _attempt(task)
    if dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _attempt(task: Task) -> int:
    """Parse, check, start the ranks, and turn what happened into an exit status."""
    prog = task.prog
    write_any_name()
    with contextlib.suppress(ValueError):  # outside the main thread the caller has its own way to stop
        signal.signal(signal.SIGTERM, _terminate)
    joined = False
    try:
        options = task.parse(task.words, prog)
        seed, place = Seed.of(options.run.seed), _place(options.devices)
        job = task.prepare(options, seed)
        if place.spawn:
            del job  # each rank builds its own
            return _spawn(task, seed, place)
        joined = True
        _start(0, options.devices, place, job, task.execute)
    except UserError as error:
        if joined or os.environ.get("LOCAL_RANK", "0") == "0":  # what is wrong before that is wrong on every rank here
            print(f"{prog}: {error}", file=sys.stderr, flush=True)
        return 2
    except RunError as error:
        print(f"{prog}: {error}", file=sys.stderr, flush=True)
        return 1
    except Stopped as stop:
        _say_stopped(stop, prog)
        return 128 + stop.signal
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130
    except _Terminated:
        print(f"{prog}: terminated", file=sys.stderr)
        return 143
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def _say_stopped(stop: Stopped, prog: str) -> None:
    if stop.resume:
        name = signal.Signals(stop.signal).name
        print(f"{prog}: {name}: the state is saved; to resume the run:\n{stop.resume}", file=sys.stderr, flush=True)


def command(script: str, *words: str) -> str:
    """Return a command line of one of the scripts beside this file, to be typed where this process was started."""
    path, python = Path(__file__).resolve().parents[1] / script, shutil.which("python")
    with contextlib.suppress(ValueError):
        path = path.relative_to(Path.cwd())
    first = ["python" if python and Path(python).samefile(sys.executable) else sys.executable]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        first = ["torchrun", f"--nproc-per-node={os.environ.get('LOCAL_WORLD_SIZE', 1)}"]
    return shlex.join([*first, str(path), *words])


class _Terminated(BaseException):
    """SIGTERM came."""


def _terminate(*_: object) -> None:
    raise _Terminated


def seed_everything(seed: int, rank: int, *, seeded: bool, deterministic: bool) -> None:
    """Seed Python, NumPy and torch, each rank in its own way.

    Args:
        seed: shared by the ranks.
        rank: of this process.
        seeded: whether the user named the seed; GPU convolutions are then chosen by rule, not by timing.
        deterministic: whether every operation must be; one that has no such form stops the run.
    """
    random.seed(seed + rank)
    np.random.seed((seed + rank) % 2**32)
    torch.manual_seed(seed + rank)
    torch.backends.cudnn.deterministic = seeded or deterministic
    torch.backends.cudnn.benchmark = not (seeded or deterministic)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)


def wrap(module: nn.Module, world: World, devices: Devices) -> nn.Module:
    """Wrap what trains: DDP among ranks; DataParallel on one process that sees several GPUs; else nothing.

    DDP does not broadcast buffers: flows and cost sums are equal by construction, statistics are shared when needed.
    """
    if world.size > 1:
        ids = [world.device.index] if world.device.type == "cuda" else None
        ddp = nn.parallel.DistributedDataParallel
        new = "forward_sync_buffers" in inspect.signature(ddp).parameters  # the name since torch 2.15
        no_broadcast: dict[str, Any] = {"forward_sync_buffers" if new else "broadcast_buffers": False}
        return ddp(module, device_ids=ids, **no_broadcast)
    return nn.DataParallel(module) if parallel_devices(world, devices) > 1 else module


def parallel_devices(world: World, devices: Devices) -> int:
    """Return how many GPUs this process uses: all visible ones where it is alone and none was named."""
    alone = world.size == 1 and devices.gpu is None and devices.device in ("auto", "cuda")
    return torch.cuda.device_count() if alone and world.device.type == "cuda" else 1
