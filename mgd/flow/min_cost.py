"""Min-cost flow between suppliers of one unit and receivers of several, on all arcs or on the few that can matter."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class InfeasibleError(Exception):
    """There is no flow on the given arcs."""


def scale_of(cost: Array) -> float:
    """Return the factor that makes costs integers of at most 2^33: times the number of nodes, they stay below 2^63."""
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
        leave_out: whether the surplus leaves from the suppliers.
        leaving: int64 cost of leaving from each supplier, or from each receiver; None for 0.

    Returns:
        (n,) receiver of each supplier, or -1.

    Raises:
        InfeasibleError: there is no flow on these arcs.
        RuntimeError: the solver found no optimum.
    """
    from ortools.graph.python import min_cost_flow  # slow to import

    suppliers, receivers = shape
    surplus = suppliers - receivers * demand
    graph = min_cost_flow.SimpleMinCostFlow()
    arc_ids = graph.add_arcs_with_capacity_and_unit_cost(
        arcs[0], suppliers + arcs[1], np.ones(cost.size, np.int64), cost
    )
    sink = suppliers + receivers
    if surplus:
        exits = np.arange(suppliers) if leave_out else suppliers + np.arange(receivers)
        ones = np.ones(exits.size, np.int64)
        exit_cost = np.zeros_like(ones) if leaving is None else leaving
        graph.add_arcs_with_capacity_and_unit_cost(exits, np.full(exits.size, sink), ones, exit_cost)
        graph.set_node_supply(sink, -surplus)
    graph.set_nodes_supplies(np.arange(suppliers), np.ones(suppliers, np.int64))
    graph.set_nodes_supplies(suppliers + np.arange(receivers), np.full(receivers, -demand))
    status = graph.solve()
    if status == graph.INFEASIBLE:
        raise InfeasibleError(f"the arcs of a {shape} cost hold no flow")
    if status != graph.OPTIMAL:
        raise RuntimeError(f"the min-cost flow solver stopped with {status.name} on a {shape} cost")
    used = graph.flows(arc_ids) > 0
    receiver = np.full(suppliers, -1, dtype=np.int64)
    receiver[arcs[0, used]] = arcs[1, used]
    return receiver


def prices(
    cost: Array, own: Array, receiver: Array, arcs: Array, receivers: int, demand: int, leave_out: bool
) -> Array:
    """Return dual values that certify an optimal flow: u with cost[i, s] - u[s] >= cost[i, r(i)] - u[r(i)] on all arcs.

    The solver returns no dual values. They are the shortest distances between receivers in the residual network, in
    which a unit moves from r(i) to s at the difference of costs. Unmatched suppliers are at an extra receiver m, at
    cost 0.

    Args:
        cost: (A,) int64, of the arcs.
        own: (n,) int64, cost of each supplier at its receiver, 0 if it is unmatched.
        receiver: (n,) or -1.
        arcs: (2, A).
        receivers: m.
        demand: units that every receiver gets.
        leave_out: whether the surplus leaves from the suppliers; see `solve_arcs`.

    Returns:
        (m + 1,) int64; entry m is that of the extra receiver.

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
    order = np.argsort(head, kind="stable")  # fast, as the arcs are nearly in order
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
        else:  # only few prices changed
            arcs_to_update = np.flatnonzero(changed[tail])
            lengths = price[tail[arcs_to_update]] + length[arcs_to_update]
            np.minimum.at(better, head[arcs_to_update], lengths)
    raise RuntimeError("the flow is not optimal: units can still be moved at a gain")


def likely_arcs(cost: Array, degree: int) -> Array:
    """Choose arcs that an optimum will mostly use: about `degree` per supplier.

    They have the least reduced costs under rough prices. Two rounds find these: subtract from the arcs of each receiver
    what its best suppliers pay (the mean over blocks of suppliers), then from those of each supplier its least cost.
    If no arc is forbidden (cost inf), the chosen arcs allow a feasible flow.

    Returns:
        (2, A) supplier and receiver, in the order of the receivers.
    """
    suppliers, receivers = cost.shape
    scale = scale_of(cost)
    reduced = np.empty((receivers, suppliers), np.float32)
    np.multiply(cost.T, scale, out=reduced, casting="same_kind")
    forbidden = reduced == np.inf if reduced.max() == np.inf else None
    if forbidden is not None:
        reduced[forbidden] = 2.0**34  # twice the largest cost
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
    """Refine an optimum for coarse integer costs to a resolution of about 2^-58 of the largest cost.

    For any prices u of receivers, v[i] = min over s of cost[i, s] - u[s] makes all reduced costs R = cost - u - v at
    least 0, and all flows pay the same sum of u and v in addition to R. So no optimum uses an arc whose R exceeds the
    sum of R over the given flow. With u from coarse integers, this sum is small, and few arcs are left; they are solved
    without rounding.

    Args:
        cost: (n, m), inf forbids an arc.
        receiver: (n,) or -1, the given flow.
        price: (m + 1,) int64, see `prices`.
        scale: of the coarse integers; see `scale_of`.
        demand: units that every receiver gets.
        leave_out: whether the surplus leaves from the suppliers; see `solve_arcs`.

    Returns:
        (n,) or -1; the given flow if no other one costs less.
    """
    suppliers, receivers = cost.shape
    surplus = suppliers - receivers * demand
    at = np.where(receiver < 0, receivers, receiver)
    extra = np.bincount(at, minlength=receivers + 1)[:receivers] > demand

    def paid(own: Array, leaving: Array) -> Any:
        """Return the sum of R over the given flow, without what every flow pays for leaving."""
        if not surplus or leave_out:
            return own.sum()
        return own.sum() + leaving[extra].sum() - np.sort(leaving)[:surplus].sum()

    # First in float64, to leave out most arcs, because the exact computation below is slow.
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
    bound = np.clip(leaving, -gap - 1, gap + 1)  # no optimum takes exits that cost more, or omits cheaper ones
    arcs = np.stack([supplier[few], goal[few]])
    return solve_arcs(exact[few], cost.shape, arcs, demand, leave_out, bound)


def dense_flow(cost: Array, demand: int, leave_out: bool) -> Array:
    """Solve on all arcs except forbidden ones (cost inf); see `solve_arcs` and `refine`."""
    arcs = np.stack(np.nonzero(cost < np.inf))
    scale = scale_of(cost)
    rounded = np.rint(cost[arcs[0], arcs[1]] * scale).astype(np.int64)
    receiver = solve_arcs(rounded, cost.shape, arcs, demand, leave_out)
    price = prices(rounded, _own(cost, receiver, scale), receiver, arcs, cost.shape[1], demand, leave_out)
    return refine(cost, receiver, price, scale, demand, leave_out)


def _own(cost: Array, receiver: Array, scale: float) -> Array:
    """Return the cost of each supplier at its receiver, as an integer; 0 if it is unmatched."""
    own = np.zeros(len(cost), np.int64)
    matched = receiver >= 0
    own[matched] = np.rint(cost[matched, receiver[matched]] * scale).astype(np.int64)
    return own


def sparse_flow(cost: Array, demand: int, leave_out: bool, degree: int = 24) -> Array:
    """Solve on few arcs, and add all others that could lower the cost by the dual values, until there are none.

    The result is optimal on all arcs except forbidden ones (cost inf); see `refine`.
    """
    receivers = cost.shape[1]
    scale = scale_of(cost)
    arcs = likely_arcs(cost, degree)
    while True:
        rounded = np.rint(cost[arcs[0], arcs[1]] * scale).astype(np.int64)
        try:
            receiver = solve_arcs(rounded, cost.shape, arcs, demand, leave_out)
        except InfeasibleError:  # possible if arcs are forbidden
            return dense_flow(cost, demand, leave_out)
        matched, own = receiver >= 0, _own(cost, receiver, scale)
        price = prices(rounded, own, receiver, arcs, receivers, demand, leave_out)
        limit = (own - price[np.where(matched, receiver, receivers)]) / scale
        reduced = cost - price[:receivers] / scale
        rows = np.flatnonzero(reduced.min(axis=1) < limit - 1.01 / scale)
        if rows.size == 0:
            return refine(cost, receiver, price, scale, demand, leave_out)
        row, goal = np.nonzero(reduced[rows] < limit[rows, None] - 1.01 / scale)
        arcs = np.concatenate([arcs, np.stack([rows[row], goal])], axis=1)
