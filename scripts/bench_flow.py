"""How fast is a flow? python scripts/bench_flow.py: four stages of correlated costs, our solvers against arc by arc.

The baseline is the published way: teacher and tiled student channels as a square assignment, every arc added by a call
to OR-Tools. All solvers must find the same cost before anything is timed. Writes scripts/results/speed/flow.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
from ortools.graph.python import linear_sum_assignment

from classification.config import describe
from mgd import solve_flow

STAGES = ((128, 256), (256, 512), (512, 1024), (1024, 2048))
SOLVERS = ("ortools", "scipy", "sparse", "auto")
RESULT = Path(__file__).parent / "results" / "speed" / "flow.json"


def correlated_cost(num_student: int, num_teacher: int, seed: int) -> np.ndarray:
    """Costs of features mixed from 256 shared random sources, plus noise: 8 images of 7 x 7."""
    generator = np.random.default_rng(seed)
    sources = generator.standard_normal((256, 8 * 49))
    maps = [generator.standard_normal((n, 256)) @ sources / 16 for n in (num_student, num_teacher)]
    maps = [m + 0.5 * generator.standard_normal(m.shape) for m in maps]
    student, teacher = (m / np.linalg.norm(m, axis=1, keepdims=True) for m in maps)
    return 2 - 2 * student @ teacher.T


def arc_by_arc(cost: np.ndarray) -> float:
    """The published way; return the total of the costs given."""
    num_student, num_teacher = cost.shape
    whole = np.floor(1e5 * np.tile(cost, (num_teacher // num_student, 1))).astype(int).tolist()
    assignment = linear_sum_assignment.SimpleLinearSumAssignment()
    for worker, row in enumerate(whole):
        for task, value in enumerate(row):
            assignment.add_arc_with_cost(worker, task, value)
    if assignment.solve() != assignment.OPTIMAL:
        raise RuntimeError("the baseline found no optimum")
    return float(sum(cost[w % num_student, assignment.right_mate(w)] for w in range(num_teacher)))


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    rows = []
    for shape in STAGES:
        cost = correlated_cost(*shape, seed=0)
        best = solve_flow(cost).total_cost
        for solver in SOLVERS:
            assert abs(solve_flow(cost, solver=solver).total_cost - best) < 1e-6, (shape, solver)
        assert abs(arc_by_arc(cost) - best) < 1e-5 * shape[1], shape  # it rounds to 1e-5 an arc
        times: dict[str, list[float]] = {name: [] for name in ("arc by arc", *SOLVERS)}
        for _ in range(args.repeats):  # in alternation
            times["arc by arc"].append(seconds(lambda c=cost: arc_by_arc(c)))
            for solver in SOLVERS:
                times[solver].append(seconds(lambda c=cost, s=solver: solve_flow(c, solver=s)))
        rows.append({"student": shape[0], "teacher": shape[1], "total_cost": best, "seconds": times})
        print(shape, "  ".join(f"{name} {statistics.median(t):.4f} s" for name, t in times.items()), flush=True)
    medians = {name: sum(statistics.median(row["seconds"][name]) for row in rows) for name in rows[0]["seconds"]}
    for name, value in medians.items():
        print(f"{name:12} {value:8.3f} s in all, {medians['arc by arc'] / value:6.1f} times as fast as arc by arc")
    about = {key: value for key, value in describe(Namespace(command=[])).items() if key not in ("options", "command")}
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    command = f"python scripts/bench_flow.py --repeats {args.repeats}"
    RESULT.write_text(json.dumps({"command": command, **about, "stages": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
