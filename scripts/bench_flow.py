"""How fast is a flow? python scripts/bench_flow.py: four stages of correlated costs, our solvers against arc by arc.

The baseline is the published way: teacher and tiled student channels as a square assignment, every arc added by a call
to OR-Tools. All solvers must find the same cost before anything is timed. Writes results/speed*/flow.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from statistics import median

import numpy as np
from ortools.graph.python import linear_sum_assignment
from side_by_side import alternate, keep, question

from mgd import solve_flow

STAGES = ((128, 256), (256, 512), (512, 1024), (1024, 2048))
SOLVERS = ("ortools", "scipy", "sparse", "auto")


def correlated_cost(num_student: int, num_teacher: int, seed: int) -> np.ndarray:
    """Costs of features mixed from 256 shared random sources, plus noise: 8 images of 7 x 7."""
    generator = np.random.default_rng(seed)
    sources = generator.standard_normal((256, 8 * 49))
    maps = [generator.standard_normal((n, 256)) @ sources / 16 for n in (num_student, num_teacher)]
    maps = [m + 0.5 * generator.standard_normal(m.shape) for m in maps]
    student, teacher = (m / np.linalg.norm(m, axis=1, keepdims=True) for m in maps)
    cost: np.ndarray = 2 - 2 * student @ teacher.T
    return cost


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    stages, total = [], {name: [0.0] * args.rounds for name in ("arc by arc", *SOLVERS)}
    for shape in STAGES:
        cost = correlated_cost(*shape, seed=0)
        best = solve_flow(cost).total_cost
        for solver in SOLVERS:
            assert abs(solve_flow(cost, solver=solver).total_cost - best) < 1e-6, (shape, solver)
        assert abs(arc_by_arc(cost) - best) < 1e-5 * shape[1], shape  # it rounds to 1e-5 an arc
        ways: dict[str, Callable[[], object]] = {"arc by arc": partial(arc_by_arc, cost)}
        ways |= {solver: partial(solve_flow, cost, solver=solver) for solver in SOLVERS}
        seconds = alternate(ways, args.rounds)
        stages.append({"student": shape[0], "teacher": shape[1], "total_cost": best, "seconds": seconds})
        print(shape, "  ".join(f"{name} {median(times):.4f} s" for name, times in seconds.items()), flush=True)
        for name, times in seconds.items():
            total[name] = [a + b for a, b in zip(total[name], times, strict=True)]
    rows = [
        question(
            f"flows of four stages: arc by arc / {name}", total, "arc by arc", name, "25" if name == "auto" else ""
        )
        for name in ("auto", "scipy", "ortools")
    ]
    keep("flow", {"stages": stages, "rows": rows})


if __name__ == "__main__":
    main()
