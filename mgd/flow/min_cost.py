"""Min-cost flow between suppliers of one unit and receivers of several, on all arcs or on the few that can matter."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class InfeasibleError(Exception):
    """No flow keeps to the arcs."""


def scale_of(cost: Array) -> float:
    """Return what turns costs into integers: as fine as leaves the solver's own scaling by nodes far from 2^63."""
    largest = float(max(cost.max(), -cost.min()))
    if largest == np.inf:
        largest = float(np.abs(cost).max(where=np.isfinite(cost), initial=0.0))
    return 2.0**33 / (largest or 1.0)


def solve_arcs(
    cost: Array, shape: tuple[int, int], arcs: Array, demand: int, leave_out: bool, leaving: Array | None = None
) -> Array:
    """Solve on n + m + 1 nodes: suppliers of one unit, receivers of `demand`, one node that takes the surplus.

    The surplus n - m * demand leaves from the suppliers (`leave_out`: they stay unmatched) or from the receivers (each
    keeps at most one unit more).

    Args:
        cost: (A,) int64, of the arcs.
        shape: (n, m).
        arcs: (2, A), supplier and receiver of each arc.
        demand: units that every receiver gets.
        leave_out: where the surplus leaves.
        leaving: int64 cost of each way out, one per supplier or per receiver; None for 0.

    Returns:
        (n,) receiver of each supplier, or -1.

    Raises:
        InfeasibleError: there is no flow on these arcs.
        RuntimeError: the solver found no optimum.
    """
    from ortools.graph.python import min_cost_flow  # slow to import, and of use here alone

    suppliers, receivers = shape
    surplus = suppliers - receivers * demand
    graph = min_cost_flow.SimpleMinCostFlow()
    found = graph.add_arcs_with_capacity_and_unit_cost(arcs[0], suppliers + arcs[1], np.ones(cost.size, np.int64), cost)
    sink = suppliers + receivers
    if surplus:
        exits = np.arange(suppliers) if leave_out else suppliers + np.arange(receivers)
        free = np.zeros(exits.size, np.int64)
        paid = free if leaving is None else leaving
        graph.add_arcs_with_capacity_and_unit_cost(exits, np.full(exits.size, sink), free + 1, paid)
        graph.set_node_supply(sink, -surplus)
    graph.set_nodes_supplies(np.arange(suppliers), np.ones(suppliers, np.int64))
    graph.set_nodes_supplies(suppliers + np.arange(receivers), np.full(receivers, -demand))
    status = graph.solve()
    if status == graph.INFEASIBLE:
        raise InfeasibleError(f"the arcs of a {shape} cost hold no flow")
    if status != graph.OPTIMAL:
        raise RuntimeError(f"the min-cost flow solver stopped with {status.name} on a {shape} cost")
    used = graph.flows(found) > 0
    receiver = np.full(suppliers, -1, dtype=np.int64)
    receiver[arcs[0, used]] = arcs[1, used]
    return receiver


def prices(
    cost: Array, own: Array, receiver: Array, arcs: Array, receivers: int, demand: int, leave_out: bool
) -> Array:
    """Return dual values that certify an optimal flow: u with cost[i, s] - u[s] >= cost[i, r(i)] - u[r(i)] on all arcs.

    They are the shortest distances between receivers in the residual network, where a unit moves from r(i) to s at the
    difference of cost: the solver itself shows none. An unmatched supplier is with an extra receiver m, at cost 0.

    Args:
        cost: (A,) int64, of the arcs.
        own: (n,) int64, cost of each supplier at its receiver, 0 where unmatched.
        receiver: (n,) or -1.
        arcs: (2, A).
        receivers: m.
        demand: units that every receiver gets.
        leave_out: where the surplus leaves; see `solve_arcs`.

    Returns:
        (m + 1,) int64; entry m is of the extra receiver.

    Raises:
        RuntimeError: the flow is not optimal on these arcs.
    """
    at = np.where(receiver < 0, receivers, receiver)
    tail, head = at[arcs[0]], arcs[1]
    length = cost - own[arcs[0]]
    matched = np.flatnonzero(receiver >= 0)
    if leave_out:
        tail = np.concatenate([tail, at[matched]])
        head = np.concatenate([head, np.full(matched.size, receivers)])
        length = np.concatenate([length, -own[matched]])
    elif len(receiver) > receivers * demand:
        extra = np.bincount(at, minlength=receivers)[:receivers] > demand
        node = np.full(receivers, receivers)
        tail = np.concatenate([tail, np.where(extra, node, np.arange(receivers))])
        head = np.concatenate([head, np.where(extra, np.arange(receivers), node)])
        length = np.concatenate([length, np.zeros(receivers, np.int64)])
    order = np.argsort(head, kind="stable")  # nearly in order as it is
    tail, head, length = tail[order], head[order], length[order]
    first = np.flatnonzero(np.r_[True, head[1:] != head[:-1]])
    reached = head[first]
    price = np.zeros(receivers + 1, np.int64)
    better = price.copy()
    better[reached] = np.minimum(np.minimum.reduceat(length, first), 0)
    for _ in range(receivers + 2):
        changed = better < price
        if not changed.any():
            return price
        price = better.copy()
        if changed.mean() > 0.1:
            better[reached] = np.minimum(np.minimum.reduceat(price[tail] + length, first), price[reached])
        else:  # from the few that changed
            some = np.flatnonzero(changed[tail])
            np.minimum.at(better, head[some], price[tail[some]] + length[some])
    raise RuntimeError("the flow is not optimal: units can still be moved at a gain")


def likely_arcs(cost: Array, degree: int) -> Array:
    """Choose arcs that an optimum will mostly use: about `degree` a supplier, and a way out.

    They are those of the least reduced cost under rough prices, which make zero, twice in turn, what a receiver's best
    suppliers pay (the mean over blocks of suppliers) and each supplier's cheapest arc. A feasible flow is among them
    where no arc is forbidden (cost inf).

    Returns:
        (2, A) supplier and receiver, in the order of the receivers.
    """
    suppliers, receivers = cost.shape
    scale = scale_of(cost)
    reduced = np.empty((receivers, suppliers), np.float32)
    np.multiply(cost.T, scale, out=reduced, casting="same_kind")
    forbidden = reduced == np.inf if reduced.max() == np.inf else None
    if forbidden is not None:
        reduced[forbidden] = 2.0**34  # twice the dearest
    blocks = min(suppliers, 4 * max(1, suppliers // receivers))
    first = np.arange(blocks) * suppliers // blocks
    for _ in range(2):
        reduced -= np.minimum.reduceat(reduced, first, axis=1).mean(axis=1, keepdims=True)
        reduced -= reduced.min(axis=0)
    sample = reduced[:, :: max(1, suppliers // 64)].ravel()
    rank = min(sample.size - 1, degree * sample.size // receivers)
    chosen = reduced <= np.partition(sample, rank)[rank]
    chosen[np.arange(suppliers) % receivers, np.arange(suppliers)] = True
    if forbidden is not None:
        chosen[forbidden] = False
    receiver, supplier = np.divmod(np.flatnonzero(chosen), suppliers)
    return np.stack([supplier, receiver])


def refine(cost: Array, receiver: Array, price: Array, scale: float, demand: int, leave_out: bool) -> Array:
    """Return the optimum in integers of 2^-58 or so of the dearest arc, given that of coarser ones.

    Whatever the prices u of receivers, v[i] = min over s of cost[i, s] - u[s] makes all R = cost - u - v at least 0,
    and every flow costs the same sum of u and v beside its R. So no optimum uses an arc whose R exceeds what the flow
    at hand pays in R. That is little where u is from coarser integers, and the few arcs left are solved without
    rounding.

    Args:
        cost: (n, m), inf forbids an arc.
        receiver: (n,) or -1, a flow.
        price: (m + 1,) int64, see `prices`.
        scale: of those integers; see `scale_of`.
        demand: units that every receiver gets.
        leave_out: where the surplus leaves; see `solve_arcs`.

    Returns:
        (n,) or -1; the flow at hand where no other one pays less.
    """
    suppliers, receivers = cost.shape
    surplus = suppliers - receivers * demand
    at = np.where(receiver < 0, receivers, receiver)
    extra = np.bincount(at, minlength=receivers + 1)[:receivers] > demand

    def paid(own: Array, leaving: Array) -> Any:
        """Return what the flow at hand pays in R beyond what the ways out cost every flow."""
        if not surplus or leave_out:
            return own.sum()
        return own.sum() + leaving[extra].sum() - np.sort(leaving)[:surplus].sum()

    # In float64 first, to leave out most arcs: what follows is exact, and takes long.
    rough = price / scale
    reduced = cost - rough[:receivers]
    least = np.minimum(reduced.min(axis=1), -rough[receivers]) if leave_out else reduced.min(axis=1)
    own = np.where(receiver < 0, -rough[receivers], reduced[np.arange(suppliers), receiver]) - least
    largest = (2.0**33 + float(np.abs(price).max())) / scale
    noise = suppliers * largest * 2.0**-48
    likely = reduced <= (least + 2 * max(0.0, float(paid(own, rough[:receivers] - rough[receivers]))) + noise)[:, None]
    supplier, goal = np.nonzero(likely)
    exponent = 59 - int(np.frexp(largest)[1])
    fine = np.rint(np.ldexp(rough, exponent)).astype(np.int64)
    exact = np.rint(np.ldexp(cost[supplier, goal], exponent)).astype(np.int64) - fine[goal]
    least = np.full(suppliers, -fine[receivers] if leave_out else np.iinfo(np.int64).max)
    np.minimum.at(least, supplier, exact)
    exact -= least[supplier]
    leaving = -fine[receivers] - least if leave_out else fine[:receivers] - fine[receivers]
    used = np.flatnonzero(receiver[supplier] == goal)
    own = leaving * (receiver < 0) if leave_out else np.zeros(suppliers, np.int64)
    own[supplier[used]] = exact[used]
    gap = int(paid(own, leaving))
    if gap == 0:
        return receiver
    few = exact <= gap
    bound = np.clip(leaving, -gap - 1, gap + 1)  # no optimum takes a dearer way out, or not a cheaper one
    arcs = np.stack([supplier[few], goal[few]])
    return solve_arcs(exact[few], cost.shape, arcs, demand, leave_out, bound)


def dense_flow(cost: Array, demand: int, leave_out: bool) -> Array:
    """Solve on all arcs but those of cost inf; see `solve_arcs` and `refine`."""
    arcs = np.stack(np.nonzero(cost < np.inf))
    scale = scale_of(cost)
    whole = np.rint(cost[arcs[0], arcs[1]] * scale).astype(np.int64)
    receiver = solve_arcs(whole, cost.shape, arcs, demand, leave_out)
    price = prices(whole, _own(cost, receiver, scale), receiver, arcs, cost.shape[1], demand, leave_out)
    return refine(cost, receiver, price, scale, demand, leave_out)


def _own(cost: Array, receiver: Array, scale: float) -> Array:
    """Return what each supplier pays, as an integer, 0 where it is unmatched."""
    own = np.zeros(len(cost), np.int64)
    matched = receiver >= 0
    own[matched] = np.rint(cost[matched, receiver[matched]] * scale).astype(np.int64)
    return own


def sparse_flow(cost: Array, demand: int, leave_out: bool, degree: int = 24) -> Array:
    """Solve on few arcs, certify by the prices that no other arc would help, and add those that would until none does.

    The result is optimal on all arcs but those of cost inf; see `refine`.
    """
    receivers = cost.shape[1]
    scale = scale_of(cost)
    arcs = likely_arcs(cost, degree)
    while True:
        whole = np.rint(cost[arcs[0], arcs[1]] * scale).astype(np.int64)
        try:
            receiver = solve_arcs(whole, cost.shape, arcs, demand, leave_out)
        except InfeasibleError:  # as may be where arcs are forbidden
            return dense_flow(cost, demand, leave_out)
        matched, own = receiver >= 0, _own(cost, receiver, scale)
        price = prices(whole, own, receiver, arcs, receivers, demand, leave_out)
        most = (own - price[np.where(matched, receiver, receivers)]) / scale
        reduced = cost - price[:receivers] / scale
        rows = np.flatnonzero(reduced.min(axis=1) < most - 1.01 / scale)
        if rows.size == 0:
            return refine(cost, receiver, price, scale, demand, leave_out)
        missing, where = np.nonzero(reduced[rows] < most[rows, None] - 1.01 / scale)
        arcs = np.concatenate([arcs, np.stack([rows[missing], where])], axis=1)
