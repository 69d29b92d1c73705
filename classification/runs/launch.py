"""Start ranks: processes, process groups, exit status; and the command lines that users type."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import shlex
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing as mp

from classification.errors import RunError, Stopped, UserError
from classification.options.devices import Devices
from classification.options.first_look import write_any_name
from classification.options.options import Options
from classification.runs.heartbeat import Heartbeat, Mate, shared_devices
from classification.runs.place import Place, find_place
from classification.runs.world import Seed, World, device_of
from classification.system.exit_status import attempt
from classification.system.interrupt import ignore_save
from classification.system.memory import keep_freed_memory

TASKS = {"main_base.py": "train", "main_mgd.py": "distill"}  # of the command `mgd`, by script
PATIENCE = 30.0  # seconds that the other ranks have to end after one has failed

Parse = Callable[[list[str], str], Options]
Prepare = Callable[[Options, Seed], Any]
Execute = Callable[[Any, World], None]


@dataclass(frozen=True)
class Task:
    """The work of a command; each spawned rank does it from the same words.

    Args:
        words: the command line, without the script.
        prog: the script's name, for messages.
        parse: returns the options for words and script.
        prepare: builds and checks a job from the options, before ranks are spawned or joined.
        execute: does the job on one rank.
    """

    words: list[str]
    prog: str
    parse: Parse
    prepare: Prepare
    execute: Execute


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Ignore Pillow's warnings, which name no file, and DDP's warning about its search for unused parameters."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
        yield


def _spawned(local_rank: int, task: Task, seed: Seed, place: Place) -> None:
    def work() -> None:
        options = task.parse(task.words, task.prog)
        _start(local_rank, options.devices, place, task.prepare(options, seed), task.execute)

    with _quiet_libraries():
        status = attempt(work, task.prog)
    sys.stdout.flush()
    os._exit(status)


def _spawn(task: Task, seed: Seed, place: Place) -> int:
    """Spawn this node's ranks and return the exit status of the first that failed, or 0."""
    context = mp.spawn(_spawned, (task, seed, place), nprocs=place.local_size, join=False)
    return _join(context.processes)


def _join(processes: Sequence[Any]) -> int:
    """Wait for the ranks and return their exit status. Signals to this process are passed on to them.

    If a rank fails, the others notice and end; those that do not are killed after `PATIENCE` seconds.
    """
    status, since, signals = 0, math.inf, 0
    while alive := [process for process in processes if process.is_alive()]:
        try:
            wait([process.sentinel for process in alive], timeout=1.0)
        except (KeyboardInterrupt, Stopped) as stop:
            signals += isinstance(stop, KeyboardInterrupt)
            for process in alive:
                process.kill() if signals > 1 else process.terminate()
        failed = next((process.exitcode for process in processes if process.exitcode), 0)
        if failed and not status:
            status, since = failed if failed > 0 else 1, time.monotonic()
        if time.monotonic() - since > PATIENCE:
            for process in alive:
                process.kill()
    return status or next((process.exitcode for process in processes if process.exitcode), 0)


def _start(local_rank: int, devices: Devices, place: Place, job: Any, execute: Execute) -> None:
    rank = place.first + local_rank
    device = device_of(devices, place.local + local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    world = World(rank, place.size, place.local_size, device)
    if place.size > 1:
        if device.type == "cpu" and not place.env and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // place.size))  # the ranks may share this machine
        backend = devices.dist_backend or ("nccl" if device.type == "cuda" else "gloo")
        url = "env://" if place.env else devices.dist_url
        try:
            store, *_ = next(dist.rendezvous(url, rank, place.size))
            # After a restart, the launcher's store may still have the addresses of the earlier ranks.
            restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            own_store = dist.PrefixStore(f"attempt {restarts}", store)
            timeout = timedelta(seconds=devices.dist_timeout)
            dist.init_process_group(backend, store=own_store, rank=rank, world_size=place.size, timeout=timeout)
            world = _meet(world, own_store, devices.dist_timeout)
        except (ValueError, RuntimeError) as error:
            where = f"rank {rank} of {place.size} cannot join the others at {url} over {backend}"
            raise UserError(f"{where}: {' '.join(str(error).split())[:200]}") from error
    _execute(job, world, execute)


def _execute(job: Any, world: World, execute: Execute) -> None:
    """Do the job on this rank.

    Raises:
        RunError: another rank is gone.
    """
    try:
        execute(job, world)
        if dist.is_initialized():
            dist.barrier()  # no rank leaves while others still communicate
            dist.destroy_process_group()
    except (UserError, RunError, Stopped):
        raise
    except Exception as error:
        if not (world.mates and lost_a_rank(error)):
            raise
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher may end this process before it has said why
        lost = _lost(world.mates)
        raise RunError(f"rank {world.rank} stops: {lost}; --resume continues from last.pth") from error
    finally:
        world.ending.value = 1
        if world.heartbeat is not None:
            world.heartbeat.stop()


def _meet(world: World, store: dist.Store, timeout: float) -> World:
    """Exchange processes and devices with the other ranks, and start the heartbeat.

    Raises:
        UserError: two ranks use the same GPU.
    """
    mates: list[Any] = [None] * world.size
    name = str(world.device)
    if world.device.type == "cuda":  # the number of a GPU depends on what each process sees
        name = f"GPU {getattr(torch.cuda.get_device_properties(world.device), 'uuid', world.device.index)}"
    dist.all_gather_object(mates, Mate(platform.node(), os.getpid(), name))
    for device, ranks in shared_devices(mates).items():
        raise UserError(
            f"ranks {' and '.join(map(str, ranks))} all use {device}: start one rank per GPU with torchrun "
            "--nproc-per-node, or give each rank its own --gpu"
        )
    heartbeat = Heartbeat(store, world.rank, mates, timeout)
    heartbeat.start()
    here = sum(mate.host == platform.node() for mate in mates)
    return replace(world, mates=tuple(mates), local_size=here, heartbeat=heartbeat)


def lost_a_rank(error: Exception) -> bool:
    """Return whether an error says that the ranks can no longer communicate."""
    return any(word in str(error) for word in ("gloo", "NCCL", "Connection", "Broken pipe"))


def _lost(mates: Sequence[Mate]) -> str:
    """Name the ranks of this machine that have ended; wait up to 5 s, as a process may still be ending."""
    for _ in range(50):
        here = [(rank, mate.process) for rank, mate in enumerate(mates) if mate.host == platform.node()]
        gone = [rank for rank, process in here if not _alive(process)]
        if gone:
            return f"rank {', '.join(map(str, gone))} died"
        time.sleep(0.1)
    return "another rank is gone, or cannot be reached"


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return not Path("/proc/self").exists()  # without /proc, every process counts as alive


def run(task: Task) -> int:
    """Do a task in one process or several, and return the exit status.

    A rank that fails ends at once: to destroy its process group properly, it would have to wait for the other ranks.

    Returns:
        0 if it is done, 2 for a mistake of the user's, 130 or 143 after SIGINT or SIGTERM, 1 for anything else.
    """
    write_any_name()
    ignore_save()
    is_rank = False
    status = 0

    def work() -> None:
        nonlocal is_rank, status
        options = task.parse(task.words, task.prog)
        seed, place = Seed.of(options.run.seed), find_place(options.devices)
        job = task.prepare(options, seed)
        if place.spawn:
            del job  # each rank builds its own
            status = _spawn(task, seed, place)
            return
        is_rank = True
        _start(0, options.devices, place, job, task.execute)

    def say(text: str) -> None:
        if is_rank or os.environ.get("LOCAL_RANK", "0") == "0":  # earlier errors are the same on every rank
            print(text, file=sys.stderr, flush=True)

    with _quiet_libraries():
        status = attempt(work, task.prog, say) or status
    if dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def called_mgd() -> bool:
    """Return whether this process was started by the command `mgd`, not as a script or by torchrun."""
    return Path(sys.argv[0]).name == "mgd" and "TORCHELASTIC_RUN_ID" not in os.environ


def command(script: str, *words: str) -> str:
    """Return a command line for a script of this package, or for `mgd` if that started this process."""
    if script in TASKS and called_mgd():
        return shlex.join(["mgd", TASKS[script], *words])
    path, python = Path(__file__).resolve().parents[1] / script, shutil.which("python")
    with contextlib.suppress(ValueError):
        path = path.relative_to(Path.cwd())
    first = ["python" if python and Path(python).samefile(sys.executable) else sys.executable]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        first = ["torchrun", f"--nproc-per-node={os.environ.get('LOCAL_WORLD_SIZE', 1)}"]
    return shlex.join([*first, str(path), *words])
