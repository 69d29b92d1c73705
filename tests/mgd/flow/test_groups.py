"""Groups of teacher channels: against trying them all, and cases worked out by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from mgd.flow import assign_groups, energy_kept, group_channels, group_weights, solve_flow
from mgd.flow.flow import Array


def gram_of(channels: int, seed: int = 0, values: int = 40) -> Array:
    responses = np.random.default_rng(seed).normal(size=(channels, values)).clip(0)
    matrix: Array = responses @ responses.T
    return matrix


def literal_energy(gram: Array, index: Array) -> float:
    """The sum of each group's largest eigenvalue over the trace, by the general solver for eigenvalues."""
    groups = [[t for t in column if t >= 0] for column in index.T]
    carried = [max(np.linalg.eigvals(gram[np.ix_(group, group)]).real) for group in groups]
    return float(sum(carried) / np.trace(gram))


def test_the_energy_kept_is_the_leading_eigenvalue_of_each_group() -> None:
    gram = gram_of(7)
    for index in ([[0, 1, 2], [3, 4, 5], [6, -1, -1]], [[0], [5]], [[6, 5, 4, 3, 2, 1, 0]]):
        found = energy_kept(torch.tensor(gram), np.array(index))
        assert found == pytest.approx(literal_energy(gram, np.array(index)), rel=1e-7)
    assert energy_kept(gram, np.arange(7)[None]) == pytest.approx(1)
    assert energy_kept(np.zeros((3, 3)), np.array([[0], [1], [2]])) == 1


def test_no_weights_carry_more_than_those_of_the_linear_reducer() -> None:
    responses = np.random.default_rng(1).normal(size=(6, 30)).clip(0)
    gram, index = responses @ responses.T, np.array([[0, 3], [1, 4], [2, 5]])
    weights = group_weights(gram, index)
    assert (weights >= 0).all() and weights.sum(axis=1) == pytest.approx([1] * 2)
    assert (np.flatnonzero(weights[0]) == [0, 1, 2]).all() and (np.flatnonzero(weights[1]) == [3, 4, 5]).all()

    def carried(matrix: Array) -> float:
        targets = matrix @ responses
        total = 0.0
        for group, y in zip(index.T, targets, strict=True):
            total += float(np.square(responses[group] @ y).sum() / (y @ y))
        return total

    assert carried(weights) / np.trace(gram) == pytest.approx(energy_kept(gram, index), rel=1e-7)
    generator = np.random.default_rng(2)
    for _ in range(50):
        assert carried(np.abs(weights + 0.3 * generator.random(weights.shape) * (weights > 0))) < carried(weights)


def test_weights_by_hand() -> None:
    # [[2, 1], [1, 2]]: the leading eigenvector is (1, 1). [[3, sqrt 2], [sqrt 2, 2]]: (sqrt 2, 1), with value 4.
    gram = np.zeros((4, 4))
    gram[:2, :2], gram[2:, 2:] = [[2, 1], [1, 2]], [[3, 2**0.5], [2**0.5, 2]]
    weights = group_weights(gram, np.array([[0, 2], [1, 3]]))
    expected = [[0.5, 0.5, 0, 0], [0, 0, 2**0.5 / (1 + 2**0.5), 1 / (1 + 2**0.5)]]
    np.testing.assert_allclose(weights, expected, atol=1e-7)
    assert energy_kept(gram, np.array([[0, 2], [1, 3]])) == pytest.approx((3 + 4) / 9)


def test_a_group_that_falls_apart_into_blocks() -> None:
    index = np.array([[0], [1], [2], [3]])
    strongest = np.diag([1.0, 1.0, 0.5, 0.5])
    strongest[0, 1] = strongest[1, 0] = 0.5  # blocks {0, 1}, of value 1.5, {2} and {3}
    np.testing.assert_allclose(group_weights(strongest, index), [[0.5, 0.5, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(group_weights(np.diag([2.0, 1, 2, 1]), index), [[0.5, 0, 0.5, 0]], atol=1e-6)
    np.testing.assert_allclose(group_weights(np.diag([0.0, 0, 3, 0]), index), [[0, 0, 1, 0]], atol=1e-6)
    np.testing.assert_allclose(group_weights(np.zeros((4, 4)), index), [[0.25] * 4])


@pytest.mark.parametrize("num_groups", [2, 3])
def test_few_channels_are_grouped_almost_as_well_as_can_be(num_groups: int) -> None:
    for seed in range(4):
        gram = gram_of(6, seed)
        size = 6 // num_groups
        best = max(
            literal_energy(gram, np.array(order).reshape(num_groups, size).T)
            for order in itertools.permutations(range(6))
        )
        found = group_channels(gram, num_groups, seed=(seed,))
        assert found.shape == (size, num_groups) and sorted(found.ravel()) == list(range(6))
        assert 0.93 * best <= literal_energy(gram, found) <= best + 1e-9


def test_channels_that_are_alike_are_found() -> None:
    sources = np.random.default_rng(0).normal(size=(5, 200)).clip(0)
    order = np.random.default_rng(1).permutation(20)
    responses = (np.repeat(sources, 4, axis=0) * np.random.default_rng(2).uniform(0.5, 2, (20, 1)))[order]
    groups = group_channels(responses @ responses.T, 5)
    assert {frozenset(order[column] // 4) for column in groups.T} == {frozenset([n]) for n in range(5)}
    assert energy_kept(responses @ responses.T, groups) == pytest.approx(1)


def test_groups_do_not_lose_by_going_on_and_repeat_with_their_seed() -> None:
    gram = gram_of(24, 3)
    start = np.arange(24).reshape(6, 4).T
    found = group_channels(gram, 6, start=start)
    assert energy_kept(gram, found) > energy_kept(gram, start)
    again = group_channels(gram, 6, start=found)
    assert {frozenset(c) for c in again.T} == {frozenset(c) for c in found.T}  # nothing moves any more
    assert (group_channels(gram, 6, seed=(1,)) == group_channels(gram, 6, seed=(1,))).all()


@pytest.mark.parametrize(("capacity", "count"), [("spread", 11), ("truncate", 8)])
def test_groups_keep_the_capacity(capacity: str, count: int) -> None:
    groups = group_channels(gram_of(11), 4, capacity=capacity)
    sizes = (groups >= 0).sum(axis=0)
    assert sizes.sum() == count == len(set(groups[groups >= 0])) and set(sizes) <= {2, 3}


def test_dead_channels_are_grouped_too() -> None:
    gram = gram_of(8)
    gram[:, 2:7] = gram[2:7] = 0
    groups = group_channels(gram, 4)
    assert sorted(groups.ravel()) == list(range(8))
    assert energy_kept(gram, groups) == pytest.approx(1)  # three channels respond, each in a group of its own
    assert sorted(group_channels(np.zeros((8, 8)), 4).ravel()) == list(range(8))


def test_groups_go_to_the_student_channels_that_they_cost_least() -> None:
    cost = np.random.default_rng(0).random((3, 7))
    groups = np.array([[0, 1, 4], [2, 3, 5], [6, -1, -1]])
    flow = assign_groups(cost, groups, "cheapest", (0,))
    members = [[0, 2, 6], [1, 3], [4, 5]]
    totals = {
        order: sum(cost[s, members[g]].sum() for s, g in enumerate(order)) for order in itertools.permutations(range(3))
    }
    best = min(totals, key=totals.__getitem__)
    assert flow.total_cost == pytest.approx(totals[best])
    assert [sorted(column[column >= 0]) for column in flow.index.T] == [members[g] for g in best]
    worst = assign_groups(cost, groups, "costliest", (0,))
    assert worst.total_cost == pytest.approx(max(totals.values())) and worst.num_teacher == 7
    cost[0] = [np.inf, 5, np.inf, 5, 0, 0, 0]
    assert flow.matrix.sum() == 7 and assign_groups(cost, groups, "cheapest", (0,)).index[0, 0] != 0


def test_what_is_no_gram_matrix_is_refused() -> None:
    for wrong, message in ((np.zeros((2, 3)), r"\(T, T\); got shape"), (np.full((2, 2), np.nan), "must be finite")):
        with pytest.raises(ValueError, match=message):
            energy_kept(wrong, np.array([[0]]))
    with pytest.raises(ValueError, match="at most 4 groups of as many channels; got 5"):
        group_channels(np.eye(4), 5)
    with pytest.raises(ValueError, match="take the capacity spread or truncate; got 'single'"):
        group_channels(np.eye(4), 2, capacity="single")


def test_a_channel_in_several_groups_counts_once() -> None:
    responses = np.random.default_rng(2).normal(size=(4, 40)).clip(0)
    gram = responses @ responses.T
    flow = solve_flow(np.random.default_rng(3).random((9, 4)))  # each teacher channel is a target
    assert energy_kept(gram, flow.index) == pytest.approx(1)
    # Channel 1 with 0, or with 2: what a target y carries of it is <x_1, y>^2 / |y|^2.
    groups = [[0, 1], [1, 2]]
    targets = [np.linalg.eigh(gram[np.ix_(g, g)])[1][:, -1] @ responses[g] for g in groups]
    carried = {(t, i): (responses[t] @ y) ** 2 / (y @ y) for i, y in enumerate(targets) for t in groups[i]}
    expected = carried[0, 0] + carried[2, 1] + max(carried[1, 0], carried[1, 1])
    assert energy_kept(gram, np.array(groups).T) == pytest.approx(expected / np.trace(gram), rel=1e-7)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32])
def test_a_gram_matrix_of_any_floating_type(kind: torch.dtype) -> None:
    gram = torch.tensor(gram_of(6)).to(kind)
    groups = group_channels(gram, 3)
    assert energy_kept(gram, groups) == pytest.approx(energy_kept(gram.double(), groups))


def test_wrong_gram_matrices_and_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="no negative numbers; got -1: apply the ReLU"):
        group_channels(np.array([[1.0, -1.0], [-1.0, 1.0]]), 1)
    for index in ([[0, 1], [5, 2]], [[-1], [-1]], [[0, -1]], [0, 1]):
        for function in (energy_kept, group_weights):
            with pytest.raises(ValueError, match="of the 4 teacher channels, each with a channel or more"):
                function(np.eye(4), np.array(index))
