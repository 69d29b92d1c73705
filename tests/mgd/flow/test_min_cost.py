from __future__ import annotations

import numpy as np
import pytest

from mgd import solve_flow
from mgd.flow import SOLVERS
from mgd.flow.min_cost import InfeasibleError, dense_flow, likely_arcs, prices, scale_of, solve_arcs, sparse_flow


def correlated(suppliers: int, receivers: int, seed: int) -> np.ndarray:
    """Costs of features mixed from few shared sources, as real ones are."""
    generator = np.random.default_rng(seed)
    sources = generator.standard_normal((16, 200))
    maps = [generator.standard_normal((n, 16)) @ sources for n in (suppliers, receivers)]
    maps = [m + generator.standard_normal(m.shape) for m in maps]
    units = [m / np.linalg.norm(m, axis=1, keepdims=True) for m in maps]
    array: np.ndarray = 2 - 2 * units[0] @ units[1].T
    return array


CASES = [
    (60, 30, 2, False),
    (70, 30, 2, False),
    (70, 30, 2, True),
    (40, 40, 1, False),
    (90, 20, 1, True),
    (7, 3, 2, True),
]


def total(cost: np.ndarray, receiver: np.ndarray) -> float:
    matched = np.flatnonzero(receiver >= 0)
    return float(cost[matched, receiver[matched]].sum())


@pytest.mark.parametrize(("suppliers", "receivers", "demand", "leave_out"), CASES)
@pytest.mark.parametrize("degree", [1, 4, 40])
def test_few_arcs_find_the_optimum_of_all(
    suppliers: int, receivers: int, demand: int, leave_out: bool, degree: int
) -> None:
    for seed in range(3):
        cost = correlated(suppliers, receivers, seed)
        dense = dense_flow(cost, demand, leave_out)
        sparse = sparse_flow(cost, demand, leave_out, degree)
        assert total(cost, sparse) == pytest.approx(total(cost, dense), abs=1e-7)
        counts = np.bincount(sparse[sparse >= 0], minlength=receivers)
        assert counts.min() >= demand and counts.max() <= demand + (not leave_out and suppliers > receivers * demand)
        assert (sparse >= 0).sum() == (receivers * demand if leave_out else suppliers)


@pytest.mark.parametrize(("suppliers", "receivers", "demand", "leave_out"), CASES)
def test_prices_certify_an_optimum_and_refuse_anything_else(
    suppliers: int, receivers: int, demand: int, leave_out: bool
) -> None:
    cost = correlated(suppliers, receivers, 0)
    whole = np.rint(cost * scale_of(cost)).astype(np.int64)
    arcs = np.stack([a.ravel() for a in np.indices(cost.shape)])
    receiver = dense_flow(cost, demand, leave_out)

    def certify(receiver: np.ndarray) -> np.ndarray:
        own = np.where(receiver < 0, 0, whole[np.arange(suppliers), receiver])
        price = prices(whole.ravel(), own, receiver, arcs, receivers, demand, leave_out)
        # The dual bound: no assignment can cost less than the sum of what each supplier has to pay.
        assert (whole - price[:receivers] >= (own - price[receiver])[:, None]).all()
        return price

    certify(receiver)
    for attempt in range(20):  # a flow made worse by an exchange has no prices
        worse, generator = receiver.copy(), np.random.default_rng(attempt)
        i, j = generator.choice(np.flatnonzero(receiver >= 0), 2, replace=False)
        worse[[i, j]] = worse[[j, i]]
        if total(cost, worse) > total(cost, receiver) + 1e-9:
            with pytest.raises(RuntimeError, match="not optimal"):
                certify(worse)
            return
    pytest.fail("no exchange made the flow worse")


def test_likely_arcs_are_few_and_hold_a_flow() -> None:
    cost = correlated(400, 200, 0)
    arcs = likely_arcs(cost, 10)
    assert arcs.shape[1] < 0.3 * cost.size
    assert set(range(400)) == set(arcs[0]) and set(range(200)) == set(arcs[1])
    assert ((arcs[0] % 200) == arcs[1]).sum() >= 400


def test_a_receiver_dear_to_all_keeps_its_likely_arcs() -> None:
    cost = correlated(400, 200, 0)
    dear = cost + 5 * np.random.default_rng(0).random(200)
    plain, shifted = ({tuple(arc) for arc in likely_arcs(c, 10).T} for c in (cost, dear))
    assert len(plain & shifted) > 0.99 * len(plain | shifted)


def test_costs_that_are_zero_or_large_and_negative_are_solved() -> None:
    assert solve_flow(np.zeros((3, 7))).total_cost == 0
    cost = -1e12 * np.random.default_rng(3).random((4, 9))
    totals = [solve_flow(cost, solver=solver).total_cost for solver in ("ortools", "sparse", "scipy")]
    assert totals[1:] == pytest.approx([totals[0]] * 2, rel=1e-6)


def test_arcs_that_hold_no_flow_are_refused() -> None:
    arcs = np.array([[0, 1], [0, 0]])  # nobody supplies receiver 1
    with pytest.raises(InfeasibleError, match="hold no flow"):
        solve_arcs(np.zeros(2, np.int64), (2, 2), arcs, 1, False)


@pytest.mark.parametrize(("suppliers", "receivers", "demand", "leave_out"), CASES)
@pytest.mark.parametrize("degree", [1, 4])
def test_negative_costs(suppliers: int, receivers: int, demand: int, leave_out: bool, degree: int) -> None:
    for seed in range(3):
        cost = correlated(suppliers, receivers, seed) - 3
        dense, sparse = dense_flow(cost, demand, leave_out), sparse_flow(cost, demand, leave_out, degree)
        assert total(cost, sparse) == pytest.approx(total(cost, dense), abs=1e-7)


def test_a_surplus_in_the_wrong_place_has_no_prices() -> None:
    cost = correlated(70, 30, 0)
    whole = np.rint(cost * scale_of(cost)).astype(np.int64)
    receiver = dense_flow(cost, 2, False)
    counts, own = np.bincount(receiver, minlength=30), cost[np.arange(70), receiver]
    more = cost - own[:, None]  # what a move would cost, where it is one of a surplus to a receiver without
    more[(counts[receiver] == 2)[:, None] | (counts > 2)] = np.inf
    supplier, other = np.unravel_index(more.argmin(), more.shape)
    assert 1e-6 < more[supplier, other] < np.inf
    receiver[supplier] = other
    arcs = np.stack([a.ravel() for a in np.indices(cost.shape)])
    with pytest.raises(RuntimeError, match="not optimal"):
        prices(whole.ravel(), whole[np.arange(70), receiver], receiver, arcs, 30, 2, False)


@pytest.mark.parametrize(("suppliers", "receivers", "demand", "leave_out"), CASES)
@pytest.mark.parametrize("degree", [1, 4])
def test_forbidden_arcs_are_not_used(suppliers: int, receivers: int, demand: int, leave_out: bool, degree: int) -> None:
    for seed in range(3):
        cost = correlated(suppliers, receivers, seed)
        cost[np.random.default_rng(seed).random(cost.shape) < 0.3] = np.inf
        arcs = likely_arcs(cost, degree)
        assert np.isfinite(cost[arcs[0], arcs[1]]).all()
        dense, sparse = dense_flow(cost, demand, leave_out), sparse_flow(cost, demand, leave_out, degree)
        assert np.isfinite(total(cost, dense))
        assert total(cost, sparse) == pytest.approx(total(cost, dense), abs=1e-7)


def test_the_degree_is_the_number_of_likely_arcs_per_supplier() -> None:
    found = [likely_arcs(correlated(400, 200, seed), 10).shape[1] / 400 for seed in range(4)]
    assert all(10 * 0.9 < degree < (10 + 1) * 1.1 for degree in found)  # and one way out


@pytest.mark.parametrize("degree", [10, 24])
def test_with_as_many_arcs_as_receivers_all_are_likely(degree: int) -> None:
    assert likely_arcs(correlated(40, 10, 0), degree).shape[1] == 40 * 10


@pytest.mark.parametrize(("suppliers", "receivers", "demand", "leave_out"), CASES)
@pytest.mark.parametrize("degree", [1, 40])
def test_differences_that_coarse_integers_do_not_show_are_resolved(
    suppliers: int, receivers: int, demand: int, leave_out: bool, degree: int
) -> None:
    generator = np.random.default_rng(0)
    fine = generator.integers(0, 2**12, (suppliers, receivers))
    cost = fine * 2.0**-48 + generator.integers(0, 3, (suppliers, receivers))  # rounded to 2^-32 at first
    expected = total(cost, SOLVERS["scipy"](cost, demand, leave_out))
    for receiver in (dense_flow(cost, demand, leave_out), sparse_flow(cost, demand, leave_out, degree)):
        assert total(cost, receiver) == expected
