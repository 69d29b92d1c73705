"""Signals to one of several ranks, again and again: python scripts/torture_ranks.py [DIR]

Runs of two and of three gloo ranks get SIGTERM, SIGKILL or SIGSTOP on a drawn rank, at a drawn instant in or just
behind a step, a matching pass, an evaluation or the writing of a checkpoint. The same command resumes them: 20 times
each. After every signal all ranks must have left within --dist-timeout and a minute (a rank that is stopped is killed
then), and no more steps may be lost than --checkpoint-every-steps, none by SIGTERM. In the end weights, optimizer,
flows and metrics must be those of a run left alone, bit for bit.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torture import OPTIONS, differences, make_inputs

PHASES = ("step", "matching", "evaluation", "save")
SIGNALS = {"SIGTERM": 2, "SIGKILL": 2, "SIGSTOP": 1}  # how often each, per phase and number of ranks
TIMEOUT = 15  # seconds, of --dist-timeout
PATIENCE = 60.0  # seconds beyond it after which a rank counts as hanging
EVERY = 3  # steps


@dataclass(frozen=True)
class Blow:
    """A signal: which, in which phase, at which call of it, how many seconds behind its beginning, to which rank."""

    name: str
    phase: str
    call: int
    seconds: float
    rank: int


def _one_rank(words: list[str], folder: str, rank: int, blow: Blow | None) -> None:
    """Run main_mgd as one rank, which signals itself if it is the one to be hit."""
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{name}{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    from classification import main_mgd
    from classification.training import engine, trainer
    from classification.training.step import Stepper
    from mgd import ChannelMatching

    calls = Counter[str]()
    hit = blow if blow is not None and blow.rank == rank else None
    progress = os.open(f"{folder}/progress{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def timed(name: str, function: Any) -> Any:
        def called(*inputs: Any, **named: Any) -> Any:
            if name != "evaluation" or calls["step"]:  # not the one before training
                calls[name] += 1
                if hit is not None and (name, calls[name]) == (hit.phase, hit.call):
                    number = getattr(signal, hit.name)
                    threading.Timer(hit.seconds, os.kill, (os.getpid(), number)).start()
            found = function(*inputs, **named)
            if name == "step":
                os.write(progress, f"{inputs[2]} {inputs[3] + 1}\n".encode())
            return found

        return called

    Stepper._step = timed("step", Stepper._step)  # type: ignore[method-assign]
    ChannelMatching.observe = timed("matching", ChannelMatching.observe)  # type: ignore[method-assign]
    engine.tally = timed("evaluation", engine.tally)  # type: ignore[attr-defined]
    trainer.save = timed("save", trainer.save)  # type: ignore[attr-defined]
    os._exit(main_mgd.main(words))


def start(words: Sequence[str], folder: Path, ranks: int, blow: Blow | None) -> list[int | None]:
    """Run ranks, one of them hit; return their exit statuses, None for one that hung."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["classification.training.distilling", "torch.distributed"])
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        url = f"tcp://127.0.0.1:{sock.getsockname()[1]}"
    patience = str(TIMEOUT if blow is not None else 600)
    flags = ["--world-size", str(ranks), "--dist-url", url, "--dist-timeout", patience, "--rank"]
    processes = [
        context.Process(target=_one_rank, args=([*words, *flags, str(rank)], str(folder), rank, blow))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    stopped = blow.rank if blow is not None and blow.name == "SIGSTOP" else None
    others = [process for rank, process in enumerate(processes) if rank != stopped]
    end = time.monotonic() + 1800
    while any(process.is_alive() for process in others) and time.monotonic() < end:
        time.sleep(0.05)
        if any(not process.is_alive() for process in others) or _is_stopped(processes, stopped):
            end = min(end, time.monotonic() + TIMEOUT + PATIENCE)
    hung = [process for process in others if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    return [None if process in hung else process.exitcode for process in processes]


def _is_stopped(processes: Sequence[Any], rank: int | None) -> bool:
    if rank is None:
        return False
    try:
        state = Path(f"/proc/{processes[rank].pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state == "T"


def steps_done(folder: Path, ranks: int, steps: int) -> int:
    """Return the steps of the run that some rank has done."""
    lines = [line for rank in range(ranks) for line in (folder / f"progress{rank}").read_text().splitlines()]
    return max([0, *(int(epoch) * steps + int(step) for epoch, step in map(str.split, lines))])


def steps_saved(run: Path, steps: int) -> int:
    """Return the steps that last.pth holds, 0 where there is none."""
    if not (run / "last.pth").exists():
        return 0
    state = torch.load(run / "last.pth", weights_only=True)["resume"]
    return int(state["epoch"] * steps + state["step"])


def check(blow: Blow, statuses: Sequence[int | None], lost: int) -> str:
    """Return what is wrong after a blow, or an empty text."""
    if None in statuses:
        return f"ranks hung: {statuses}"
    if all(status == 0 for status in statuses):
        return "the run ended: it is too short for the plan"
    if blow.name == "SIGTERM" and set(statuses) != {128 + signal.SIGTERM}:
        return f"SIGTERM ended the ranks by {statuses}"
    if blow.name != "SIGTERM" and any(
        status not in (1, -signal.SIGKILL) for status in statuses
    ):  # the others say who died
        return f"the ranks ended by {statuses}"
    most = 0 if blow.name == "SIGTERM" else EVERY
    return f"{lost} steps are lost" if lost > most else ""


def plan(ranks: int, generator: random.Random, signals: dict[str, int]) -> list[Blow]:
    """Draw blows, each kind of signal as often as said in each phase."""
    blows = [
        Blow(name, phase, generator.randint(1, 4), generator.uniform(0, 0.05), generator.randrange(ranks))
        for phase in PHASES
        for name, number in signals.items()
        for _ in range(number)
    ]
    generator.shuffle(blows)
    return blows


def torture(
    words: list[str], work: Path, ranks: int, steps: int, blows: Sequence[Blow], *, verbose: bool = True
) -> list[str]:
    """Hit a run again and again, finish it, and compare it with one left alone; return what went wrong."""
    folder, wrong = work / f"ranks{ranks}", []
    folder.mkdir()
    command = [*words, "--output", str(folder / "hit")]
    for number, blow in enumerate(blows):
        begun, before = time.monotonic(), steps_saved(folder / "hit", steps)
        statuses = start(command, folder, ranks, blow)
        lost = max(before, steps_done(folder, ranks, steps)) - steps_saved(folder / "hit", steps)
        if found := check(blow, statuses, lost):
            said = "\n".join((folder / f"err{rank}").read_text()[-1500:] for rank in range(ranks))
            wrong.append(f"{ranks} ranks, blow {number}, {blow}: {found}\n{said}")
        if verbose:
            seconds = time.monotonic() - begun
            print(f"{ranks} ranks {number:2d} {blow.name} rank {blow.rank} {blow.phase:10} call {blow.call}: "
                  f"{statuses}, {lost} lost, {seconds:.0f} s {found}", flush=True)  # fmt: skip
        for rank in range(ranks):
            (folder / f"progress{rank}").unlink()
    for name in ("hit", "alone"):
        statuses = start([*words, "--output", str(folder / name)], folder, ranks, None)
        if set(statuses) != {0}:
            wrong.append(f"{ranks} ranks, {name}: {statuses}\n{(folder / 'err0').read_text()[-1500:]}")
            return wrong
    if found := ", ".join(differences(folder / "alone", folder / "hit")):
        wrong.append(f"{ranks} ranks: differs from the run left alone: {found}")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", help="folder of photographs; default: digits")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="torture-ranks-"))
    data, teacher = make_inputs(work, args.data)
    images = sum(1 for path in (data / "train").rglob("*") if path.is_file())
    steps = -(-images // int(OPTIONS[OPTIONS.index("-b") + 1]))
    begun, wrong, num = time.monotonic(), [], 0
    for ranks in args.ranks:
        weights = ["--teacher-resume", str(teacher), "-j", str(ranks if ranks > 2 else 0)]
        words = [str(data.resolve()), *OPTIONS, *weights, "--epochs", str(args.epochs)]
        blows = plan(ranks, random.Random(args.seed + ranks), SIGNALS)
        wrong += torture(words, work, ranks, steps, blows)
        num += len(blows)
    print(f"{num} signals in {time.monotonic() - begun:.0f} s, {len(wrong)} times something was wrong")
    if wrong:
        sys.exit("\n".join(wrong))
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
