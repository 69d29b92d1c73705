from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mgd import solve_flow
from mgd.flow import ASSIGNMENTS, CAPACITIES, solve_control
from tests.reference import literal

SOLVERS = ("ortools", "sparse", "scipy", "auto")
TINY = [(1, 1), (1, 4), (4, 1), (2, 2), (2, 3), (2, 5), (3, 5), (3, 6), (5, 3), (5, 2), (4, 4)]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize("shape", TINY)
def test_equals_brute_force(shape: tuple[int, int], capacity: str, solver: str) -> None:
    for seed in range(3):
        cost = np.random.default_rng(seed).random(shape) * 4
        flow = solve_flow(cost, capacity=capacity, solver=solver)
        assert flow.total_cost == pytest.approx(literal.best_total(cost, capacity), rel=1e-9)


@pytest.mark.parametrize("solver", ["ortools", "sparse", "scipy"])
@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize("shape", [(8, 24), (8, 27), (24, 24), (29, 8), (16, 100)])
def test_marginals(shape: tuple[int, int], capacity: str, solver: str) -> None:
    num_student, num_teacher = shape
    flow = solve_flow(np.random.default_rng(0).random(shape), capacity=capacity, solver=solver)
    rows, columns = flow.matrix.sum(1), flow.matrix.sum(0)
    if num_student > num_teacher:
        assert (rows == 1).all()
        assert set(columns) <= {num_student // num_teacher, -(-num_student // num_teacher)}
        return
    low = 1 if capacity == "single" else num_teacher // num_student
    assert columns.max() <= 1
    if capacity == "spread":
        assert (columns == 1).all() and set(rows) <= {low, -(-num_teacher // num_student)}
    else:
        assert (rows == low).all()
    if capacity == "reference":
        assert not columns[num_student * low :].any()


@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize("shape", [(64, 128), (96, 256), (48, 130), (70, 30)])
def test_solvers_agree(shape: tuple[int, int], capacity: str) -> None:
    rng = np.random.default_rng(1)
    sources = rng.normal(size=(16, 200))
    units = [rng.normal(size=(n, 16)) @ sources + rng.normal(size=(n, 200)) for n in shape]
    units = [u / np.linalg.norm(u, axis=1, keepdims=True) for u in units]
    cost = 2 - 2 * units[0] @ units[1].T
    totals = [
        solve_flow(cost, capacity=capacity, solver=solver).total_cost for solver in ("ortools", "sparse", "scipy")
    ]
    assert totals[1:] == pytest.approx([totals[0]] * 2, rel=1e-6)


def test_ties_still_give_a_full_assignment() -> None:
    for solver in ("ortools", "sparse", "scipy"):
        flow = solve_flow(np.full((3, 7), 2.0), solver=solver)
        assert sorted(flow.index[flow.index >= 0]) == list(range(7))
        assert flow.total_cost == 14


def test_permuting_channels_permutes_the_flow() -> None:
    rng = np.random.default_rng(2)
    cost, order = rng.random((5, 13)), rng.permutation(13)
    flow, permuted = solve_flow(cost), solve_flow(cost[:, order])
    assert (permuted.matrix == flow.matrix[:, order]).all()


def test_views_of_the_result() -> None:
    cost = np.array([[0.0, 9, 0, 9, 0], [9, 0, 9, 0, 9]])
    flow = solve_flow(torch.tensor(cost))
    assert flow.index.tolist() == [[0, 1], [2, 3], [4, -1]]
    assert flow.index.dtype == np.int64
    assert flow.assignment.tolist() == [0, 1, 0, 1, 0]
    assert flow.matrix.tolist() == [[1, 0, 1, 0, 1], [0, 1, 0, 1, 0]]
    assert flow.total_cost == 0 and flow.solver == "ortools" and flow.seconds >= 0
    assert solve_flow(cost, capacity="single").assignment.tolist().count(-1) == 3
    with pytest.raises(ValueError, match="matrix"):
        _ = solve_flow(cost.T).assignment


def test_a_half_precision_tensor_that_needs_gradient_is_taken() -> None:
    cost = torch.rand(3, 6, dtype=torch.bfloat16, requires_grad=True)
    assert solve_flow(cost).total_cost == pytest.approx(literal.best_total(cost.detach().double().numpy(), "spread"))


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_costs_of_any_size_are_resolved(scale: float) -> None:
    cost = np.random.default_rng(3).random((4, 9)) * scale
    totals = [solve_flow(cost, solver=solver).total_cost for solver in ("ortools", "sparse", "scipy")]
    assert totals[1:] == pytest.approx([totals[0]] * 2, rel=1e-6)


@pytest.mark.parametrize(
    ("cost", "options", "message"),
    [
        (np.array([[1.0, np.nan]]), {}, "holds NaN or -inf: look for NaN in the feature maps"),
        (np.array([[1.0, -np.inf]]), {}, "finite, or inf where a pair is forbidden"),
        (np.array([[np.inf, np.nan]]), {}, "holds NaN or -inf"),
        (np.zeros(4), {}, "matrix"),
        (np.zeros((0, 4)), {}, "matrix"),
        (np.zeros((2, 4)), {"capacity": "sprad"}, "spread, truncate, reference, single"),
        (np.zeros((2, 4)), {"solver": "gurobi"}, "ortools, scipy, sparse, auto"),
    ],
)
def test_bad_input_is_refused(cost: np.ndarray, options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solve_flow(cost, **options)


def test_controls_keep_the_capacity_and_refuse_what_is_not_finite() -> None:
    cost = np.random.default_rng(0).random((3, 8))
    for assignment in ("cheapest", "costliest", "identity", "random"):
        flow = solve_control(cost, assignment, (0,), capacity="single", solver="scipy")
        assert flow.index.shape == (1, 3) and flow.solver == "scipy"
        with pytest.raises(ValueError, match="finite"):
            solve_control(cost * np.nan, assignment, (0,))


def test_identity_takes_neighbours_in_the_middle_of_their_share() -> None:
    assert solve_control(np.zeros((3, 9)), "identity", (), capacity="single").index.tolist() == [[1, 4, 7]]


def test_the_solver_that_was_chosen_is_named() -> None:
    assert solve_flow(np.random.rand(3, 7), solver="auto").solver == "scipy"


def exact(cost: np.ndarray) -> np.ndarray:
    """The same costs as numbers without rounding."""
    return np.array([[Fraction(c) if np.isfinite(c) else c for c in row] for row in cost.tolist()], dtype=object)


def with_offsets(shape: tuple[int, int], rng: np.random.Generator, *sides: tuple[int, int]) -> np.ndarray:
    cost = rng.integers(0, 1000, shape) * 2.0**-20  # beside 1e9 all of them keep their digits
    return cost + sum(1e9 * rng.integers(0, 5, side) for side in sides)


HARD: dict[str, Callable[[tuple[int, int], np.random.Generator], np.ndarray]] = {
    "forbidden": lambda shape, rng: np.where(rng.random(shape) < 0.35, np.inf, rng.random(shape)),
    "dear": lambda shape, rng: np.where(rng.random(shape) < 0.3, 10.0 ** rng.integers(3, 13), rng.random(shape)),
    "of every size": lambda shape, rng: 10.0 ** rng.uniform(-12, 12, shape) * rng.choice([-1, 1, 1], shape),
    "equal": lambda shape, rng: np.full(shape, rng.choice([0, 1, -3, 1e9, 1e-300, 1e300, -1e12])),
    "zeros and ones": lambda shape, rng: rng.integers(0, 2, shape).astype(float),
    "nearly equal": lambda shape, rng: with_offsets(shape, rng, (1, 1)),
    "offset by rows": lambda shape, rng: with_offsets(shape, rng, (shape[0], 1)),
    "offset by columns": lambda shape, rng: with_offsets(shape, rng, (1, shape[1])),
    "offset by both": lambda shape, rng: with_offsets(shape, rng, (shape[0], 1), (1, shape[1])),
    "close to 0": lambda shape, rng: rng.random(shape) * 1e-310,
    "close to the largest number": lambda shape, rng: (rng.random(shape) - 0.5) * 3e307,
}


@pytest.mark.parametrize("kind", HARD)
def test_hard_costs_have_the_optimum_of_exact_arithmetic(kind: str) -> None:
    rng, infeasible = np.random.default_rng(2), 0
    for shape in ((1, 3), (2, 3), (3, 3), (2, 5), (3, 6), (5, 2), (4, 1)):
        for capacity in CAPACITIES:
            cost = HARD[kind](shape, rng)
            best = literal.best_total(exact(cost), capacity)
            for solver in SOLVERS:
                if best == np.inf:
                    infeasible += 1
                    with pytest.raises(ValueError, match=f"no flow of capacity '{capacity}' avoids the .* forbidden"):
                        solve_flow(cost, capacity=capacity, solver=solver)
                    continue
                flow = solve_flow(cost, capacity=capacity, solver=solver)
                chosen = cost[flow.matrix > 0]
                assert flow.total_cost == pytest.approx(float(chosen.sum()), rel=1e-12)
                assert abs(sum(exact(chosen[None])[0]) - best) <= abs(best) * Fraction(1, 10**12), (
                    shape,
                    capacity,
                    solver,
                )
    assert (infeasible > 0) == (kind == "forbidden")


@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize("forbidden", [np.inf, 1e8, 1e12])
def test_solvers_agree_on_forbidden_pairs(forbidden: float, capacity: str) -> None:
    rng = np.random.default_rng(4)
    for shape in ((40, 110), (60, 120), (90, 40)):
        cost = np.where(rng.random(shape) < 0.3, forbidden, rng.random(shape))
        flows = [solve_flow(cost, capacity=capacity, solver=solver) for solver in ("ortools", "sparse", "scipy")]
        assert [flow.solver for flow in flows] == ["ortools", "sparse", "scipy"]
        assert (cost[flows[0].matrix > 0] < 1).all()
        assert [flow.total_cost for flow in flows[1:]] == pytest.approx([flows[0].total_cost] * 2, rel=1e-8)


def test_a_pair_that_is_dear_and_cannot_be_avoided_does_not_coarsen_the_others() -> None:
    cost = np.random.default_rng(5).random((3, 7))
    dear = np.full((4, 7), 1e10)
    dear[:3] = cost  # the last student channel has one price for all, except for the first
    dear[3, 0] = 2e10
    for solver in SOLVERS:
        flow = solve_flow(dear, capacity="single", solver=solver)
        assert cost[flow.matrix[:3] > 0].sum() == pytest.approx(literal.best_total(cost, "single"), rel=1e-9)


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_controls_avoid_forbidden_pairs(assignment: str) -> None:
    rng = np.random.default_rng(6)
    for shape in ((3, 9), (3, 8), (8, 3)):
        cost = rng.random(shape)
        cost[rng.random(shape) < 0.2] = np.inf
        for solver in SOLVERS:
            flow = solve_control(cost, assignment, (0,), solver=solver)
            assert flow.total_cost == pytest.approx(cost[flow.matrix > 0].sum()) and np.isfinite(flow.total_cost)
        if assignment == "costliest":
            worst = -literal.best_total(np.where(np.isinf(cost), np.inf, -cost), "spread")
            assert flow.total_cost == pytest.approx(worst)


def test_a_tensor_may_forbid_pairs() -> None:
    cost = torch.tensor([[torch.inf, 1.0], [0.0, 0.0]])
    assert solve_flow(cost).assignment.tolist() == [1, 0]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("unit", [1e-310, 1e-3, 1.0, 1e10])
def test_pairs_at_the_end_of_float64_leave_the_others_their_digits(unit: float, solver: str) -> None:
    cost = unit * np.random.default_rng(0).permutation(10).reshape(2, 5)
    highest = cost.copy()
    highest[0, :2] = highest[1, 4] = 1e308 if unit > 1e-200 else 1.0
    expected = literal.best_total(np.where(highest > cost, np.inf, cost), "truncate")
    assert solve_flow(highest, capacity="truncate", solver=solver).total_cost == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("cost", [np.ones((2, 3)) + 1j, torch.ones(2, 3) + 1j, np.ma.masked_equal(np.eye(3), 1)])
def test_costs_that_are_no_numbers_or_hidden_are_refused(cost: object) -> None:
    with pytest.raises(ValueError, match="real numbers, none masked: write inf where a pair is forbidden"):
        solve_flow(cost)


@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize("solver", ["ortools", "sparse"])
def test_offsets_of_whole_lines_take_no_digits(solver: str, capacity: str) -> None:
    rng = np.random.default_rng(0)
    for shape in ((2, 5), (3, 5), (5, 3), (3, 6)):
        cost = rng.integers(0, 2**20, shape) / 2**20
        for offsets in (rng.integers(0, 9, (shape[0], 1)), rng.integers(0, 9, (1, shape[1]))):
            offset = cost + 2.0**30 * offsets  # exact in float64
            found = solve_flow(offset, capacity=capacity, solver=solver).total_cost
            assert found == pytest.approx(literal.best_total(offset, capacity), rel=0, abs=1e-6)


@pytest.mark.parametrize("solver", ["ortools", "sparse"])
def test_a_dear_pair_that_cannot_be_avoided_takes_no_digits(solver: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(8):
        cost = rng.integers(1, 2**20, (3, 3)) / 2**20
        cost[:2, 1:] = 2.0**30  # two rows want one column
        found = solve_flow(cost, solver=solver).total_cost
        assert found == pytest.approx(literal.best_total(cost, "spread"), rel=0, abs=1e-6)


@pytest.mark.parametrize("solver", ["ortools", "sparse"])
def test_a_dear_pair_takes_no_digits_where_most_pairs_are_forbidden(solver: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(8):
        blocks = rng.integers(1, 2**20, (4, 3, 3)) / 2**20
        blocks[0, :2, 1:] = 2.0**30  # two rows want one column
        cost = np.full((12, 12), np.inf)
        for number, block in enumerate(blocks):
            cost[3 * number : 3 * number + 3, 3 * number : 3 * number + 3] = block
        expected = sum(literal.best_total(block, "spread") for block in blocks)
        assert solve_flow(cost, solver=solver).total_cost == pytest.approx(expected, rel=0, abs=1e-6)


@pytest.mark.parametrize("solver", ["ortools", "sparse"])
def test_a_row_that_gains_far_more_than_the_others_takes_no_digits(solver: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(8):
        cost = rng.integers(1, 2**20, (7, 7)) / 2**20
        cost[0, :3] = -(2.0**30)  # the first row takes one of these, whichever leaves the others most
        rest = min(literal.best_total(np.delete(cost[1:], column, axis=1), "single") for column in range(3))
        found = solve_flow(cost, solver=solver).total_cost
        assert found == pytest.approx(rest - 2.0**30, rel=0, abs=1e-6)


@pytest.mark.parametrize("assignment", ["best", "worst"])
def test_an_unknown_assignment_is_refused(assignment: str) -> None:
    with pytest.raises(ValueError, match=f"unknown assignment '{assignment}'; choose from cheapest"):
        solve_control(np.zeros((2, 4)), assignment, (0,))


@st.composite
def costs_with_dear_pairs(draw: st.DrawFn) -> np.ndarray:
    """Small costs, some of them raised by far more, each exact in float64 and in every sum."""
    shape = draw(st.sampled_from([(2, 4), (2, 5), (3, 3), (3, 5), (4, 3), (4, 4)]))
    entries = st.tuples(st.integers(0, 2**20), st.sampled_from([0, 0, 2**50, 2**51, -(2**49), 2**37]))
    pairs = draw(st.lists(entries, min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
    return np.array([(small + dear) / 2**20 for small, dear in pairs]).reshape(shape)


@given(costs_with_dear_pairs(), st.sampled_from(CAPACITIES), st.sampled_from(SOLVERS))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_dear_pairs_that_cannot_be_avoided_leave_the_optimum_exact(
    cost: np.ndarray, capacity: str, solver: str
) -> None:
    flow = solve_flow(cost, capacity=capacity, solver=solver)
    assert sum(exact(cost)[flow.matrix > 0]) == literal.best_total(exact(cost), capacity)


@pytest.mark.parametrize("solver", ["ortools", "sparse"])
@pytest.mark.parametrize("shape", [(12, 30), (20, 20), (30, 12)])
def test_where_most_pairs_are_dear_the_optimum_is_that_of_scipy(shape: tuple[int, int], solver: str) -> None:
    rng = np.random.default_rng(7)
    for capacity in CAPACITIES:
        small = rng.integers(0, 2**12, shape)
        cost = (small + rng.choice([0, 2**40, 2**41], shape, p=[0.1, 0.5, 0.4])) / 2**12
        found, expected = (solve_flow(cost, capacity=capacity, solver=name).total_cost for name in (solver, "scipy"))
        assert found == expected
