"""Flows, which assign teacher channels to student channels: exact solutions for a cost matrix."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mgd.flow.min_cost import InfeasibleError, dense_flow, sparse_flow

Array = NDArray[Any]
CAPACITIES = ("spread", "truncate", "reference", "single")
ASSIGNMENTS = ("cheapest", "costliest", "identity", "random")
OFFSET = 64  # offsets larger than this many times the differences of costs are subtracted before solving


@dataclass(frozen=True, eq=False)
class Flow:
    """A solved assignment between S student and T teacher channels.

    Args:
        index: (G, S) int64; column s lists the teacher channels that guide student channel s in ascending order; empty
            slots are -1 and come last.
        num_teacher: T.
        total_cost: sum of the given cost over the matched pairs.
        solver: name of the solver.
        seconds: time that it took.
        weights: (S, T) float64 if targets are weighted sums of teacher channels, rows sum to 1; else None.
        energy: share of the teacher's energy that one target per group can carry, see `energy_kept`; None if it was
            not measured.
    """

    index: Array
    num_teacher: int
    total_cost: float
    solver: str
    seconds: float
    weights: Array | None = None
    energy: float | None = None

    @property
    def matrix(self) -> Array:
        """(S, T) int64, 1 where a teacher channel guides a student channel."""
        matrix = np.zeros((self.index.shape[1], self.num_teacher), dtype=np.int64)
        slot, student = np.nonzero(self.index >= 0)
        matrix[student, self.index[slot, student]] = 1
        return matrix

    @property
    def assignment(self) -> Array:
        """(T,) int64, the student channel of each teacher channel, or -1 if it guides none.

        Raises:
            ValueError: S > T, so that a teacher channel guides several student channels; use `index` or `matrix`.
        """
        if self.index.shape[1] > self.num_teacher:
            raise ValueError("with more student than teacher channels a teacher channel guides several: use .matrix")
        assignment = np.full(self.num_teacher, -1, dtype=np.int64)
        slot, student = np.nonzero(self.index >= 0)
        assignment[self.index[slot, student]] = student
        return assignment

    @property
    def channels_per_target(self) -> float | None:
        """Mean over targets of exp of the entropy of their weights, 1 to T; None without weights."""
        if self.weights is None:
            return None
        logs = np.log(self.weights, out=np.zeros_like(self.weights), where=self.weights > 0)
        return float(np.exp(-(self.weights * logs).sum(axis=1)).mean())


def slots(num_student: int, num_teacher: int, capacity: str = "spread") -> int:
    """Return G, the largest number of teacher channels that one student channel can get."""
    if capacity not in CAPACITIES:
        raise ValueError(f"unknown capacity {capacity!r}; choose from {', '.join(CAPACITIES)}")
    if num_student < 1 or num_teacher < 1:
        raise ValueError(f"a flow needs channels on both sides; got {num_student} and {num_teacher}")
    if num_student >= num_teacher or capacity == "single":
        return 1
    return -(-num_teacher // num_student) if capacity == "spread" else num_teacher // num_student


def _assignment(cost: Array, demand: int, leave_out: bool) -> Array:
    """Solve the flow as a linear assignment in which each receiver has one column per unit."""
    from scipy.optimize import linear_sum_assignment  # slow to import

    suppliers, receivers = cost.shape
    columns = np.repeat(np.arange(receivers), demand)
    tiled = cost[:, columns]
    missing = 0
    if suppliers > columns.size and not leave_out:
        # One optional column per receiver; added rows, which mean "stays empty", may take only these.
        columns = np.concatenate([columns, np.arange(receivers)])
        missing = columns.size - suppliers
        tiled = np.concatenate([tiled, cost], axis=1)
        empty = np.full((missing, columns.size), np.inf)
        empty[:, -receivers:] = 0
        tiled = np.concatenate([tiled, empty])
    try:
        row, column = linear_sum_assignment(tiled)
    except ValueError as error:  # the only possible cause, because the cost was checked
        raise InfeasibleError from error
    receiver = np.full(suppliers + missing, -1, dtype=np.int64)
    receiver[row] = columns[column]
    return receiver[:suppliers]


SOLVERS: dict[str, Callable[[Array, int, bool], Array]] = {
    "ortools": dense_flow,
    "scipy": _assignment,
    "sparse": sparse_flow,
}


def check_cost(cost: Any) -> Array:
    """Return a cost (S, T) as float64; raise ValueError if it is not a matrix of numbers, or has NaN or -inf."""
    if "complex" in str(getattr(cost, "dtype", "")) or isinstance(cost, np.ma.MaskedArray):
        raise ValueError("cost must be real numbers, none masked: write inf where a pair is forbidden")
    if hasattr(cost, "detach"):  # a tensor, on any device and of any floating type
        cost = cost.detach().double().cpu().numpy()
    try:
        array = np.asarray(cost, dtype=np.float64)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"cost must be a matrix (S, T) of numbers, with rows of one length; got a {type(cost).__name__}"
        ) from error
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"cost must be a matrix (S, T) with channels on both sides; got shape {array.shape}")
    if not array.min() > -np.inf:  # the minimum is NaN if an entry is
        raise ValueError(
            "cost must be finite, or inf where a pair is forbidden; "
            "it holds NaN or -inf: look for NaN in the feature maps"
        )
    return array


def _largest(cost: Array) -> float:
    """Return the largest finite entry of costs of at least 0."""
    largest = float(cost.max())
    return largest if largest < np.inf else float(cost.max(where=cost < np.inf, initial=0.0))


def _least(cost: Array, axis: int) -> Array:
    """Return the least finite cost along an axis, 0 if there is none."""
    least: Array = cost.min(axis=axis, keepdims=True)
    least[least == np.inf] = 0
    return least


def _sample(cost: Array) -> Array:
    sample: Array = cost[:: len(cost) // 64 + 1, :: cost.shape[1] // 64 + 1]
    return sample


def _is_even(cost: Array) -> bool:
    """Return whether `_reduced`, which is slow, would gain little precision, judged by a sample of the costs."""
    largest = max(float(cost.max()), -float(cost.min()))
    sample = _sample(cost)
    sample = sample - _least(sample, 1)
    return 1e-200 < largest < 1e200 and OFFSET * float(np.median(sample - _least(sample, 0))) >= largest


def _in_range(cost: Array) -> Array:
    """Multiply costs by a power of two if sums of them would overflow, or if they are so small as to lose precision."""
    largest = max(_largest(cost), -float(cost.min()))
    if largest == 0 or 1e-200 < largest < 1e200:
        return cost
    scaled: Array = np.ldexp(cost, (600 if largest > 1 else 0) - int(np.frexp(largest)[1]))
    return scaled


def _reduced(cost: Array, demand: int, leave_out: bool) -> Array:
    """Subtract costs that no flow can avoid, so that small differences keep their precision beside large offsets.

    Every flow uses each supplier once (or, with `leave_out`, each receiver `demand` times; without a surplus, both). So
    subtracting the least cost along such a line changes no comparison of flows.

    Returns:
        The costs, at least 0.
    """
    cost = _in_range(cost)
    fixed = 0 if leave_out else 1
    cost = cost - _least(cost, fixed)
    return cost - _least(cost, 1 - fixed) if len(cost) == cost.shape[1] * demand else cost


def _optimum(cost: Array, demand: int, leave_out: bool, solver: str) -> Array:
    """Return the receiver of each supplier in a cheapest flow, or -1.

    Integer solvers resolve 2^-58 of the largest cost. If a pair costs more than a whole flow (both without unavoidable
    costs), no optimum uses it. Such pairs are forbidden, and the rest is solved again with a finer resolution.
    """

    def paid(receiver: Array) -> float:
        matched = np.flatnonzero(receiver >= 0)
        return float(cost[matched, receiver[matched]].sum())

    if _is_even(cost):
        receiver = SOLVERS[solver](cost, demand, leave_out)
        unavoidable = float(_least(cost, 0).sum() * demand if leave_out else _least(cost, 1).sum())
        if cost.max() - cost.min() <= paid(receiver) - unavoidable:
            return receiver
    cost = _reduced(cost, demand, leave_out)
    while True:
        receiver = SOLVERS[solver](cost, demand, leave_out)
        limit = paid(receiver) * (1 + 1e-9)
        if not 0 < limit < _largest(cost):
            return receiver
        cost = _in_range(np.where(cost > limit, np.inf, cost))


def _index(student: Array, teacher: Array, num_student: int, depth: int) -> Array:
    """Return the index (G, S) of the pairs (student[i], teacher[i]), see `Flow`."""
    index = np.full((depth, num_student), -1, dtype=np.int64)
    order = np.lexsort((teacher, student))
    student, teacher = student[order], teacher[order]
    first = np.searchsorted(student, student)
    index[np.arange(student.size) - first, student] = teacher
    return index


def solve_flow(cost: Any, *, capacity: str = "spread", solver: str = "ortools") -> Flow:
    """Assign teacher channels to student channels at the least total cost, exactly.

    minimise sum of cost[s, t] F[s, t] over 0/1 matrices F in which every column sums to at most 1 and the rows to:
    "spread": floor(T/S) or ceil(T/S), and all columns are used; "truncate": floor(T/S), and the solver chooses which
    columns stay unused; "reference": as "truncate" on the first S * floor(T/S) columns (the published rule);
    "single": 1. For S > T, under any capacity, every row sums to 1 and every column to floor(S/T) or ceil(S/T).

    The resolution is about 2^-58 of the costs that matter, as fine as float64: neither offsets that all flows pay nor
    pairs that cost more than a whole flow reduce it.

    Args:
        cost: (S, T) tensor or array, of any magnitude; inf forbids a pair.
        capacity: one of the four above.
        solver: "ortools" (min-cost flow on S + T + 1 nodes), "sparse" (the same on the arcs that can matter, certified
            by dual values on all), "scipy" (linear assignment), "auto" (the fastest for the size); all are exact.

    Returns:
        An optimal `Flow`; if there are several, any of them.

    Raises:
        ValueError: the cost is not a matrix, or has NaN or -inf; capacity or solver are unknown; or every flow has
            forbidden pairs.
        RuntimeError: the solver found no optimum.

    Reference: Yue, Deng, Zhou, 2020, arXiv:2008.09958, equations 5 and 6.
    """
    array = check_cost(cost)
    num_student, num_teacher = array.shape
    depth = slots(num_student, num_teacher, capacity)
    name = ("sparse" if array.size > 100_000 else "scipy") if solver == "auto" else solver
    if name not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}; choose from {', '.join(SOLVERS)}, auto")
    num_used = num_student * depth if capacity == "reference" else num_teacher
    demand = 1 if capacity == "single" else num_teacher // num_student
    start = time.perf_counter()
    try:
        if num_student > num_teacher:
            teacher = _optimum(array, num_student // num_teacher, False, name)
            student: Array = np.arange(num_student)
        else:
            receiver = _optimum(array[:, :num_used].T, demand, capacity != "spread", name)
            teacher = np.flatnonzero(receiver >= 0)
            student = receiver[teacher]
    except InfeasibleError as error:
        raise ValueError(
            f"no flow of capacity {capacity!r} avoids the {int(np.isinf(array).sum())} forbidden pairs (cost inf) of a "
            f"{array.shape} cost: allow more pairs, or choose another capacity"
        ) from error
    seconds = time.perf_counter() - start
    total = float(array[student, teacher].sum())
    return Flow(_index(student, teacher, num_student, depth), num_teacher, total, name, seconds)


def solve_control(cost: Any, assignment: str, seed: Sequence[int], **options: str) -> Flow:
    """Solve a flow that may ignore or invert the costs. The cheapest flow's gain over it is what the costs contribute.

    Args:
        cost: (S, T), see `solve_flow`; inf forbids a pair under every assignment.
        assignment: "cheapest"; "costliest"; "identity", neighbouring teacher channels by index; "random".
        seed: of "random"; equal numbers give the same flow.
        options: of `solve_flow`.

    Returns:
        The flow; its `total_cost` is the sum of `cost`.
    """
    if assignment == "cheapest":
        return solve_flow(cost, **options)
    values = check_cost(cost)
    num_student, num_teacher = values.shape
    if assignment == "costliest":
        solved_cost = -values
    elif assignment == "identity":
        student, teacher = (np.arange(num_student) + 0.5) / num_student, (np.arange(num_teacher) + 0.5) / num_teacher
        solved_cost = np.square(student[:, None] - teacher)
    elif assignment == "random":
        solved_cost = np.random.default_rng(list(seed)).random(values.shape)
    else:
        raise ValueError(f"unknown assignment {assignment!r}; choose from {', '.join(ASSIGNMENTS)}")
    flow = solve_flow(np.where(np.isinf(values), np.inf, solved_cost), **options)
    return dataclasses.replace(flow, total_cost=float(values[flow.matrix > 0].sum()))
