"""Kill a run again and again, resume it, and compare it with one left alone: python scripts/torture.py [DIR]

DIR is a folder of photographs (default: the digits of scikit-learn). Every kill is a SIGKILL that the process sends to
itself at a drawn call inside a training step, a matching pass, an evaluation, or in the middle of writing a checkpoint.
The run must end with the same weights, optimizer state, flows and metrics (except seconds), bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
PHASES = ("step", "matching", "evaluation", "checkpoint")
OPTIONS = shlex.split(
    "-a cifar_resnet8_w0.5 --teacher-arch cifar_resnet8 --img-size 32 --train-crop pad -b 25 -j 0 --seed 3 -p 1000 "
    "--lr 0.05 --loss-factor 1e4 --distiller mgd+kd --mgd-reducer rd --mgd-update-freq 1 --mgd-margin map "
    "--mgd-max-images 150 --checkpoint-every-steps 3 --resume auto"
)


def run_and_die(phase: str, number: int, words: list[str]) -> int:
    """Run main_mgd in this process, with a SIGKILL at call `number` of `phase`."""
    from classification import main_mgd
    from classification.runs import checkpoint
    from classification.training import engine
    from classification.training.step import Stepper
    from mgd import ChannelMatching

    calls = Counter[str]()

    def die(name: str) -> bool:
        if name == "evaluation" and not calls["step"]:
            return False  # the evaluation before training
        calls[name] += 1
        return name == phase and calls[name] == number

    def killed(name: str, function: Any) -> Any:
        def called(*inputs: Any, **named: Any) -> Any:
            result = function(*inputs, **named)  # the work is done, and nobody gets to know
            if die(name):
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return called

    def half_saved(content: Any, file: Any) -> None:
        if die("checkpoint"):
            file.write(b"PK" + bytes(10_000))
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        torch.save(content, file)

    Stepper._step = killed("step", Stepper._step)  # type: ignore[method-assign]
    ChannelMatching.observe = killed("matching", ChannelMatching.observe)  # type: ignore[method-assign]
    engine.tally = killed("evaluation", engine.tally)  # type: ignore[attr-defined]
    checkpoint.save = half_saved
    return main_mgd.main(words)


def launch(words: list[str], *kill: str) -> int:
    """Run in a process of its own; return its status."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    child = "import sys, torture; sys.exit(torture.run_and_die(sys.argv[1], int(sys.argv[2]), sys.argv[3:]))"
    command = [sys.executable, "-c", child, *(kill or ("nothing", "0")), *words]
    done = subprocess.run(
        command, cwd=ROOT / "scripts", env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False
    )
    if done.returncode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"status {done.returncode}: {done.stderr.decode()}")
    return done.returncode


def torture(words: list[str], folder: Path, kills: dict[str, int], seed: int) -> Counter[str]:
    """Run `words` into `folder`, killed as often as `kills` says of each phase; return the kills that happened."""
    generator = random.Random(seed)
    plan = [phase for phase, number in kills.items() for _ in range(number)]
    generator.shuffle(plan)
    done = Counter[str]()
    words = [*words, "--output", str(folder)]
    while plan:
        phase = plan.pop()
        if launch(words, phase, str(generator.randint(1, 5))) == 0:
            raise RuntimeError(f"the run ended after {sum(done.values())} kills: it is too short for the plan")
        done[phase] += 1
    launch(words)
    return done


def differences(one: Path, other: Path) -> list[str]:
    """Name what differs between two run folders, seconds and speeds apart."""
    found = []
    lasts = [torch.load(folder / "last.pth", weights_only=True) for folder in (one, other)]
    parts = ("state_dict", "optimizer", "terms", "random", "best")
    flat = [dict(_leaves({"state_dict": last["state_dict"], **last["resume"]})) for last in lasts]
    for name in sorted(set(flat[0]) | set(flat[1])):
        if name.split("/")[1] in parts and not _equal(flat[0].get(name), flat[1].get(name)):
            found.append(f"last.pth {name}")
    lines = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (one, other)]
    timed = ("images_per_second", "train_seconds", "match_seconds", "peak_memory_mib")
    records = [[{k: v for k, v in json.loads(line).items() if k not in timed} for line in part] for part in lines]
    if records[0] != records[1]:
        found.append("metrics.jsonl")
    flows = [sorted(path.name for path in (folder / "flow").iterdir()) for folder in (one, other)]
    if flows[0] != flows[1]:
        found.append(f"flows {flows[0]} and {flows[1]}")
    for name in set(flows[0]) & set(flows[1]):
        with np.load(one / "flow" / name) as a, np.load(other / "flow" / name) as b:
            if set(a) != set(b) or any(not np.array_equal(a[key], b[key]) for key in a):
                found.append(f"flow/{name}")
    return found


def _leaves(value: Any, name: str = "") -> Any:
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _leaves(part, f"{name}/{key}")
    elif isinstance(value, list):
        for number, part in enumerate(value):
            yield from _leaves(part, f"{name}/{number}")
    else:
        yield name, value


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    return bool(one == other)


def make_inputs(work: Path, data: Path | None) -> tuple[Path, Path]:
    """Train a small teacher; return the folder of images, of digits where none is given, and the teacher's file."""
    if data is None:
        from prepare_digits import write_digits

        data = work / "digits"
        write_digits(data, 20)
    words = [str(data), "-a", "cifar_resnet8", "--img-size", "32", "--train-crop", "pad", "-b", "25", "--epochs", "2"]
    subprocess.run(
        [sys.executable, "-m", "classification.main_base", *words, "--output", str(work / "teacher"), "--seed", "0"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return data, work / "teacher" / "last.pth"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", help="folder of photographs; default: digits")
    parser.add_argument("--kills", type=int, default=7, help="of each kind")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp())
    data, teacher = make_inputs(work, args.data)
    weights = ["--teacher-resume", str(teacher)]
    words = [str(data.resolve()), *OPTIONS, *weights, "--epochs", str(args.epochs)]
    start = time.perf_counter()
    launch([*words, "--output", str(work / "alone")])
    alone = time.perf_counter() - start
    done = torture(words, work / "killed", dict.fromkeys(PHASES, args.kills), args.seed)
    found = differences(work / "alone", work / "killed")
    told = ", ".join(f"{done[phase]} in a {phase}" for phase in PHASES)
    print(f"{sum(done.values())} SIGKILLs: {told}; {time.perf_counter() - start - alone:.0f} s, alone {alone:.0f} s")
    if found:
        sys.exit("differs from the run left alone: " + ", ".join(found))
    print("weights, optimizer, flows, random states and metrics equal those of the run left alone, bit for bit")
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
