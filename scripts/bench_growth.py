"""How does the cost grow? python scripts/bench_growth.py: time and memory of the parts of matching, against their size.

Parts: the term, forward and backward; observing a batch; and a whole matching pass over ranks (gloo): they go to
results/speed*/growth.json. With --solvers: each solver of a flow, into results/speed*/solvers.json. An exponent is the
slope of a line through the logarithms of the three largest sizes.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from bench_flow import correlated_cost
from side_by_side import keep
from torch import Tensor

import mgd
from classification.system.memory import keep_freed_memory
from classification.training.precision import autocast
from mgd.flow import group_channels, soft_weights

LAST = torch.channels_last
BASE = {"channels": 256, "taps": 1, "side": 28, "batch": 8}
SIZES = {
    "channels": (64, 128, 256, 512, 1024),
    "taps": (1, 2, 4, 8),
    "side": (7, 14, 28, 56),
    "batch": (2, 4, 8, 16, 32),
}
FLOWS = (64, 128, 256, 512, 1024, 2048, 4096)
SOLVERS = ("sparse", "scipy", "ortools", "soft", "teacher first")  # of S x 2 S channels


def exponent(sizes: Sequence[int], values: Sequence[float]) -> float:
    """Return the slope of log value over log size, of the three largest."""
    return float(np.polyfit(np.log(sizes[-3:]), np.log(values[-3:]), 1)[0])


def seconds(function: Callable[[], object], rounds: int) -> float:
    function()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return median(times)


def curve(what: str, along: str, sizes: Sequence[int], unit: str, values: Sequence[float]) -> dict[str, Any]:
    """Say and return one curve."""
    power = exponent(sizes, values)
    print(f"{what:24} against {along:9} {power:5.2f}  " + "  ".join(f"{v:.3g}" for v in values), flush=True)
    return {"what": what, "along": along, "sizes": list(sizes), "unit": unit, "values": list(values), "exponent": power}


def problem(solver: str, number: int) -> Callable[[], float]:
    """Return what solves S x 2 S channels; it returns what can be checked: the cost of an exact flow, else 0."""
    if solver == "teacher first":
        cosines = 2 - correlated_cost(2 * number, 2 * number, seed=0)
        gram = (cosines + cosines.T).clip(0) + np.eye(2 * number)
        return lambda: float(group_channels(gram, number).size * 0)
    cost = correlated_cost(number, 2 * number, seed=0)
    if solver == "soft":
        return lambda: float(soft_weights(cost).size * 0)
    return lambda: mgd.solve_flow(cost, solver=solver).total_cost


def solver_work(solver: str, number: int, rounds: int) -> None:
    """Print median seconds, the growth of the process's largest memory in MiB, and the cost, of one solver and size."""
    problem(solver, 8)()  # imports
    solve = problem(solver, number)
    before, times, total = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, [], 0.0
    for _ in range(rounds):
        start = time.perf_counter()
        total = solve()
        times.append(time.perf_counter() - start)
    print(median(times), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, repr(total))


def flow_curves(most: int) -> list[dict[str, Any]]:
    """Time and memory of each solver on S x 2 S channels, each size in a process of its own; exact ones must agree."""
    curves: list[dict[str, Any]] = []
    totals: dict[int, float] = {}
    sizes = [number for number in FLOWS if number <= most]
    for solver in SOLVERS:
        times, peaks = [], []
        for number in sizes:
            command = [sys.executable, __file__, "--solver-work", solver, str(number)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            taken, peak, total = map(float, done.stdout.split()[-3:])
            times.append(taken)
            peaks.append(max(peak, 0.1))
            assert total == 0 or abs(totals.setdefault(number, total) - total) < 1e-9 * total, (solver, number)
        what = f"flow, {solver}"
        curves += [curve(what, "channels", sizes, "s", times), curve(what, "channels", sizes, "MiB", peaks)]
    return curves


def maps(channels: int, taps: int, side: int, batch: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return maps of a student and a teacher of twice the channels, in bfloat16."""

    def random(width: int) -> Tensor:
        return torch.randn(batch, width, side, side).bfloat16().to(memory_format=LAST)

    return [random(channels) for _ in range(taps)], [random(2 * channels) for _ in range(taps)]


def term_curves(rounds: int) -> list[dict[str, Any]]:
    """Time of the term, forward and backward, and of observing a batch, as one size grows."""
    found = []
    for along, sizes in SIZES.items():
        steps, looks = [], []
        for size in sizes:
            shape = {**BASE, along: size}
            student, teacher = maps(**shape)
            channels, taps = shape["channels"], shape["taps"]
            term = mgd.ChannelMatching([channels] * taps, [2 * channels] * taps, [torch.zeros(2 * channels)] * taps)
            term.observe(student, teacher)
            term.rematch()
            logits = torch.zeros(shape["batch"], 1)
            own = [m.requires_grad_() for m in student]

            def step(term: Any = term, own: Any = own, teacher: Any = teacher, logits: Tensor = logits) -> None:
                with autocast("cpu", "bf16"):
                    loss = term(mgd.Outputs(logits, own), [mgd.Outputs(logits, teacher)])
                loss.backward()

            steps.append(seconds(step, rounds))
            looks.append(seconds(lambda t=term, s=own, o=teacher: t.observe(s, o), rounds))  # type: ignore[misc]
        found += [curve("term", along, sizes, "s", steps), curve("observing", along, sizes, "s", looks)]
    return found


def rank_work() -> None:
    """What each rank does: its share of 64 batches, then the matching; rank 0 prints the seconds."""
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
    term = mgd.ChannelMatching([256], [512], [torch.zeros(512)])
    student, teacher = maps(256, 1, 14, 8)
    for _ in range(2):
        dist.barrier()
        start = time.perf_counter()
        for _ in range(rank, 64, size):
            term.observe(student, teacher)
        term.rematch()
        dist.barrier()
    if rank == 0:
        print(time.perf_counter() - start)
    dist.destroy_process_group()


def rank_curve() -> dict[str, Any]:
    """Time of a matching over 1, 2 and 4 ranks, of the same images in all."""
    sizes, times = (1, 2, 4), []
    for size in sizes:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}", __file__]
        done = subprocess.run([*command, "--rank-work"], capture_output=True, text=True, check=True)
        times.append(float(done.stdout.split()[-1]))
    return curve("matching, 512 images", "ranks", sizes, "s", times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--most", type=int, default=max(FLOWS), help="the largest S of a solver")
    parser.add_argument("--solvers", action="store_true", help="measure the solvers of a flow instead")
    parser.add_argument("--rank-work", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--solver-work", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    keep_freed_memory()
    if args.rank_work:
        rank_work()
        return
    if args.solver_work:
        number = int(args.solver_work[1])
        solver_work(args.solver_work[0], number, 3 if number < 512 else 1)
        return
    if args.solvers:
        keep("solvers", {"curves": flow_curves(args.most)})
        return
    keep("growth", {"base": BASE, "curves": [*term_curves(args.rounds), rank_curve()]})


if __name__ == "__main__":
    main()
