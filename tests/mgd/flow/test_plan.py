"""Transport plans against POT, exact flows and what must not change them."""

from __future__ import annotations

from typing import Any

import numpy as np
import ot
import pytest
import torch

from mgd import solve_flow, solve_plan
from mgd.flow import soft_weights
from mgd.flow.plan import Array


def random_cost(num_student: int, num_teacher: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).uniform(0, 4, (num_student, num_teacher))


def masses(cost: Array) -> tuple[Array, Array]:
    return np.full(len(cost), 1 / len(cost)), np.full(cost.shape[1], 1 / cost.shape[1])


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (8, 8), (9, 4), (1, 5)])
@pytest.mark.parametrize("epsilon", [0.2, 1.0, 20.0])
def test_it_agrees_with_pot(shape: tuple[int, int], epsilon: float) -> None:
    cost = random_cost(*shape)
    plan = solve_plan(cost, epsilon=epsilon)
    expected = ot.sinkhorn(*masses(cost), cost, epsilon, method="sinkhorn_log", numItermax=100_000, stopThr=1e-12)
    np.testing.assert_allclose(plan.matrix, expected, atol=1e-6)
    assert plan.matrix.dtype == np.float64
    assert plan.total_cost == pytest.approx((expected * cost).sum(), abs=1e-6)
    assert plan.matrix.sum() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("strength", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("shape", [(3, 7), (7, 3)])
def test_it_agrees_with_pot_where_unbalanced(shape: tuple[int, int], strength: float) -> None:
    cost = random_cost(*shape)
    plan = solve_plan(cost, epsilon=0.2, unbalanced=strength)
    expected = ot.unbalanced.sinkhorn_unbalanced(
        *masses(cost), cost, 0.2, strength, reg_type="kl", numItermax=100_000, stopThr=1e-13
    )
    np.testing.assert_allclose(plan.matrix, expected, atol=1e-6)


@pytest.mark.parametrize("shape", [(4, 12), (6, 6), (8, 24)])
def test_a_tiny_epsilon_gives_the_exact_flow(shape: tuple[int, int]) -> None:
    cost = random_cost(*shape, seed=1)
    flow = solve_flow(cost)
    plan = solve_plan(torch.from_numpy(cost), epsilon=1e-4)
    np.testing.assert_allclose(plan.matrix, flow.matrix / shape[1], atol=1e-6)
    assert plan.total_cost == pytest.approx(flow.total_cost / shape[1], abs=1e-6)


def test_ties_share_the_mass() -> None:
    np.testing.assert_allclose(solve_plan(np.ones((3, 6)), epsilon=1e-3).matrix, np.full((3, 6), 1 / 18), atol=1e-9)


def test_two_by_two_by_hand() -> None:
    # The diagonal holds x each, the rest 1/2 - x each, and x / (1/2 - x) = exp(1 / epsilon).
    plan = solve_plan([[0.0, 1.0], [1.0, 0.0]], epsilon=0.5)
    x = 0.5 * np.exp(2) / (1 + np.exp(2))
    np.testing.assert_allclose(plan.matrix, [[x, 0.5 - x], [0.5 - x, x]], atol=1e-9)
    assert plan.total_cost == pytest.approx(1 - 2 * x, abs=1e-9)


def test_offsets_change_no_balanced_plan() -> None:
    cost = random_cost(4, 9)
    shifted = cost + np.array([[0.0], [5.0], [-3.0], [1e6]])
    np.testing.assert_allclose(solve_plan(shifted, epsilon=0.1).matrix, solve_plan(cost, epsilon=0.1).matrix, atol=1e-8)


@pytest.mark.parametrize("strength", [None, 0.5])
def test_a_permutation_moves_with_the_channels(strength: float | None) -> None:
    cost, generator = random_cost(5, 8), np.random.default_rng(3)
    rows, columns = generator.permutation(5), generator.permutation(8)
    plan = solve_plan(cost, epsilon=0.1, unbalanced=strength)
    moved = solve_plan(cost[rows][:, columns], epsilon=0.1, unbalanced=strength)
    np.testing.assert_allclose(moved.matrix, plan.matrix[rows][:, columns], atol=1e-8)


def test_inf_forbids_a_pair() -> None:
    cost = random_cost(3, 6)
    cost[0, :3] = np.inf
    plan = solve_plan(cost, epsilon=0.1)
    assert (plan.matrix[0, :3] == 0).all()
    np.testing.assert_allclose(plan.matrix.sum(axis=1), 1 / 3, atol=1e-9)
    assert np.isfinite(plan.total_cost)


def test_a_teacher_that_costs_too_much_teaches_nobody() -> None:
    cost = random_cost(3, 6)
    cost[:, 2], cost[:, 4] = 100, np.inf
    plan = solve_plan(cost, epsilon=0.1, unbalanced=1.0)
    assert plan.matrix[:, 2].sum() < 1e-12
    assert plan.matrix[:, 4].sum() == 0
    assert plan.matrix.sum() > 0.1


def test_refusals() -> None:
    cost = random_cost(3, 6)
    with pytest.raises(ValueError, match="epsilon must be positive"):
        solve_plan(cost, epsilon=0.0)
    with pytest.raises(ValueError, match="unbalanced must be positive"):
        solve_plan(cost, epsilon=1.0, unbalanced=-1.0)
    with pytest.raises(ValueError, match="too small"):
        solve_plan(cost, epsilon=1e-305)
    with pytest.raises(ValueError, match="NaN"):
        solve_plan(np.where(cost == cost[0, 0], np.nan, cost), epsilon=1.0)
    with pytest.raises(ValueError, match="every pair of some"):
        solve_plan(np.where(np.arange(6) == 2, np.inf, cost), epsilon=1.0)
    with pytest.raises(RuntimeError, match="did not converge"):
        solve_plan(cost, epsilon=0.01, max_iterations=3)


def test_no_plan_exists() -> None:
    # Two students may take from one teacher only, which has half of what they need.
    cost = np.array([[0.0, np.inf, np.inf], [0.0, np.inf, np.inf], [0.0, 0.0, 0.0]])
    with pytest.raises(RuntimeError, match="there may be no plan"):
        solve_plan(cost, epsilon=1.0, max_iterations=2000)


def test_a_plan_that_plain_steps_reach_in_200_000_takes_a_few_thousand() -> None:
    plan = solve_plan(random_cost(8, 8), epsilon=0.05)
    assert plan.num_iterations < 10_000
    np.testing.assert_allclose(plan.matrix.sum(axis=1), 1 / 8, atol=1e-9)
    np.testing.assert_allclose(plan.matrix.sum(axis=0), 1 / 8, atol=1e-9)


@pytest.mark.parametrize("shape", [(4, 12), (6, 6), (8, 24)])
def test_soft_weights_of_a_tiny_epsilon_are_equal_ones_at_the_pairs_of_the_exact_flow(shape: tuple[int, int]) -> None:
    cost = random_cost(*shape, seed=1)
    expected = solve_flow(cost).matrix / (shape[1] // shape[0])
    np.testing.assert_allclose(soft_weights(torch.from_numpy(cost), epsilon=1e-4), expected, atol=1e-5)


@pytest.mark.parametrize("penalty", [None, 0.5])
def test_soft_weights_are_the_rows_of_pots_plan_in_units_of_the_spread(penalty: float | None) -> None:
    cost = random_cost(5, 9) + 3
    spread, shifted = cost.std(), cost - cost.min()
    if penalty is None:
        plan = ot.sinkhorn(
            *masses(cost), shifted, 0.2 * spread, method="sinkhorn_log", numItermax=100_000, stopThr=1e-12
        )
    else:
        plan = ot.unbalanced.sinkhorn_unbalanced(
            *masses(cost), shifted, 0.2 * spread, penalty * spread, reg_type="kl", numItermax=100_000, stopThr=1e-13
        )
    found = soft_weights(cost, epsilon=0.2, penalty=penalty)
    np.testing.assert_allclose(found, plan / plan.sum(axis=1, keepdims=True), atol=1e-6)
    np.testing.assert_allclose(soft_weights(7 * cost - 100, epsilon=0.2, penalty=penalty), found, atol=1e-6)


def test_a_channel_that_costs_too_much_has_no_weight_and_none_is_left_without() -> None:
    cost = random_cost(3, 6) / 100
    cost[:, 2] = 1.0
    assert soft_weights(cost, epsilon=0.1)[:, 2].sum() > 0.4  # balanced: all must teach
    found = soft_weights(cost, epsilon=0.1, penalty=0.1)
    assert found[:, 2].max() < 1e-6 and found.sum(axis=1) == pytest.approx([1] * 3)
    cost[1] = 100.0
    cost[1, 4] = 99.0
    np.testing.assert_allclose(soft_weights(cost, epsilon=0.01, penalty=0.01)[1], np.arange(6) == 4, atol=1e-6)
    np.testing.assert_allclose(soft_weights(np.ones((2, 4))), np.full((2, 4), 0.25), atol=1e-9)


def test_soft_weights_need_positive_numbers() -> None:
    with pytest.raises(ValueError, match="epsilon must be positive; got 0"):
        soft_weights(np.eye(2), epsilon=0)
    with pytest.raises(ValueError, match="penalty must be positive; got -1"):
        soft_weights(np.eye(2), penalty=-1)


@pytest.mark.parametrize("shape", [(4, 8), (8, 16), (16, 8), (8, 30), (64, 64)])
@pytest.mark.parametrize("epsilon", [1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("seed", range(4))
def test_a_small_epsilon_converges(shape: tuple[int, int], epsilon: float, seed: int) -> None:
    cost = random_cost(*shape, seed=seed)
    plan = solve_plan(cost, epsilon=epsilon, max_iterations=20_000)
    np.testing.assert_allclose(plan.matrix.sum(axis=1), 1 / shape[0], atol=1e-9)
    np.testing.assert_allclose(plan.matrix.sum(axis=0), 1 / shape[1], atol=1e-9)
    # The plan is exp of potentials less costs, so that sums of costs around four channels are known.
    where = plan.matrix > 1e-200
    first = where[:1] & where[:, :1] & where & where[:1, :1]
    logs = np.log(plan.matrix, out=np.zeros(shape), where=where)
    around = logs - logs[:1] - logs[:, :1] + logs[:1, :1] + (cost - cost[:1] - cost[:, :1] + cost[:1, :1]) / epsilon
    np.testing.assert_allclose(around[first] * epsilon, 0, atol=1e-9)


def test_one_offset_of_all_costs_scales_an_unbalanced_plan() -> None:
    cost, epsilon, strength = random_cost(5, 8), 0.1, 0.5
    plan = solve_plan(cost, epsilon=epsilon, unbalanced=strength)
    shifted = solve_plan(cost + 3, epsilon=epsilon, unbalanced=strength)
    np.testing.assert_allclose(shifted.matrix, plan.matrix * np.exp(-3 / (epsilon + 2 * strength)), rtol=1e-7)
    far = solve_plan(cost + 1e9, epsilon=epsilon, unbalanced=strength)
    assert (far.matrix == 0).all() and far.num_iterations < 10_000
    with pytest.raises(ValueError, match="subtract the least cost"):
        solve_plan(cost - 1e9, epsilon=epsilon, unbalanced=strength)


def test_equally_cheap_teachers_share_a_student_that_no_mass_reaches() -> None:
    cost = np.array([[0.0, 0.0, 0.0, 0.0], [9.0, 9.0, 9.0, 9.0], [9.0, 9.0, 9.0, 8.0]])
    weights = soft_weights(cost, epsilon=1e-3, penalty=1e-2)
    np.testing.assert_allclose(weights, np.array([[0.25] * 4, [0.25] * 4, [0, 0, 0, 1]]))


@pytest.mark.parametrize("penalty", [None, 1.0])
def test_a_student_without_an_allowed_teacher_has_no_weights(penalty: float | None) -> None:
    cost = random_cost(3, 6)
    cost[1] = np.inf
    with pytest.raises(ValueError, match="forbids every pair"):
        soft_weights(cost, penalty=penalty)


def test_epsilon_and_penalty_may_be_numbers_of_numpy_or_torch() -> None:
    cost = random_cost(4, 6)
    expected = solve_plan(cost, epsilon=0.25, unbalanced=0.5).matrix
    kinds: list[Any] = [np.float32, np.float16, torch.tensor]
    for kind in kinds:
        found = solve_plan(cost.astype(np.float32).astype(float), epsilon=kind(0.25), unbalanced=kind(0.5)).matrix
        np.testing.assert_allclose(found, expected, atol=1e-6)
