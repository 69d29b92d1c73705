"""Processes and devices: ranks, process groups, wrapping, exit status."""

from __future__ import annotations

import contextlib
import os
import platform
import shlex
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing as mp

from classification.errors import RunError, Stopped, UserError
from classification.options.first_look import write_any_name
from classification.options.groups import Devices
from classification.options.options import Options
from classification.runs.memory import keep_freed_memory
from classification.runs.world import Seed, World, device_of


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
