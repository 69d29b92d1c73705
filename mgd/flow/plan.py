"""Soft transport between student and teacher channels: entropic plans between uniform masses."""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import exp, inf
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mgd.checks import check_positive
from mgd.flow.flow import check_cost

Array = NDArray[Any]
TOLERANCE = 1e-10  # of the marginals, summed over the channels
COARSE_TOLERANCE = 1e-3  # likewise, for the larger epsilons before the final one
COARSE_ITERATIONS = 200
FACTOR = 4.0  # between successive epsilons
LARGEST = 140.0  # log of a scaling; larger ones are absorbed into the potentials
LEAST = 1e-290  # mass of a row or column of the kernel; the reciprocal of a smaller one may overflow
ROUND = 300  # scaling steps between two steps in the log domain; at least the number of channels
PLAIN = 50  # first steps without overrelaxation, to measure how fast the error shrinks
MOST_RATE = 0.99999
NEWTON_STEPS = 100
LONGEST = 1e4  # largest change of a potential in a step of Newton's method, in units of epsilon
SHIFT = 1e-14  # added to the diagonal of its matrix, in units of mass, which may be nearly singular


@dataclass(frozen=True, eq=False)
class Plan:
    """A transport plan between S student and T teacher channels.

    Args:
        matrix: (S, T) float64, at least 0: the mass from each teacher channel to each student channel. It sums to 1 if
            the transport is balanced.
        total_cost: sum of matrix * cost over the allowed pairs.
        epsilon: strength of the entropy, in units of the cost.
        num_iterations: number of iterations.
        seconds: time that they took.
    """

    matrix: Array
    total_cost: float
    epsilon: float
    num_iterations: int
    seconds: float


def solve_plan(cost: Any, *, epsilon: float, unbalanced: float | None = None, max_iterations: int = 200_000) -> Plan:
    """Find the entropic transport plan between the masses a = 1/S of the students and b = 1/T of the teachers.

    P minimises <P, cost> + epsilon KL(P || a b^T) with row sums a and column sums b; with `unbalanced` rho, the sums
    are free and rho KL(P 1 || a) + rho KL(P^T 1 || b) is added. KL counts masses: KL(p || q) = sum p log(p/q) - p + q.

    Args:
        cost: (S, T), tensor or array; inf forbids a pair.
        epsilon: in units of the cost, > 0.
        unbalanced: rho > 0, in units of the cost; None for fixed sums. Channels without an allowed pair get no mass.
        max_iterations: of the Sinkhorn algorithm and of Newton's method, which is used if Sinkhorn is slow.

    Raises:
        ValueError: the cost is not a matrix, has NaN or -inf, or forbids all pairs of a channel whose mass must move;
            epsilon or `unbalanced` are not positive; cost / epsilon exceeds float64; or with `unbalanced` and negative
            costs, the mass exceeds float64.
        RuntimeError: it does not converge within `max_iterations`.

    Reference: Cuturi, 2013, arXiv:1306.0895; Chizat et al., 2018, arXiv:1607.05816 (unbalanced);
        Schmitzer, 2019, arXiv:1610.06519 (stabilised scaling); Lehmann et al., 2021, arXiv:2012.12562 (overrelaxation).
    """
    started = time.perf_counter()
    array = check_cost(cost)
    check_positive("solve_plan", epsilon=epsilon, max_iterations=max_iterations)
    if unbalanced is not None:
        check_positive("solve_plan", unbalanced=unbalanced)
        unbalanced = float(unbalanced)
    epsilon = float(epsilon)  # a NumPy float32 would lower the precision
    allowed = array < inf
    rows, columns = allowed.any(axis=1), allowed.any(axis=0)
    if not allowed.any() or (unbalanced is None and not (rows.all() and columns.all())):
        raise ValueError(
            "cost forbids every pair of some channel, which cannot move its mass: allow a pair of each channel, or "
            "give `unbalanced`"
        )
    finite = array[np.ix_(rows, columns)]
    masses = (np.full(len(finite), 1 / len(array)), np.full(finite.shape[1], 1 / array.shape[1]))
    factor = 1.0
    if unbalanced is None:  # offsets do not change a balanced plan, but they cost precision
        finite = finite - finite.min(axis=1, keepdims=True)
        finite = finite - finite.min(axis=0, keepdims=True)
    else:  # a common offset of all costs scales the plan
        offset = float(finite.min())
        finite, factor = finite - offset, _scale_of_offset(offset, epsilon, unbalanced)
    spread = float(np.abs(finite, where=finite < inf, out=np.zeros_like(finite)).max())
    if not spread / epsilon < 1e300:
        raise ValueError(f"solve_plan: epsilon {epsilon} is too small for costs up to {spread}: choose a larger one")
    turned = len(finite) > finite.shape[1]  # Newton's method takes the potential of the shorter side
    if turned:
        finite, masses = finite.T, masses[::-1]
    sinkhorn = _Sinkhorn(finite, masses, unbalanced, int(max_iterations))
    sinkhorn.approach(epsilon, spread)
    if not sinkhorn.solve(epsilon, TOLERANCE, None):
        raise RuntimeError(
            f"solve_plan did not converge within {max_iterations} iterations at epsilon {epsilon}: choose a larger "
            "epsilon or max_iterations; with pairs forbidden there may be no plan, unless `unbalanced` is given"
        )
    matrix = np.zeros(array.shape)
    matrix[np.ix_(rows, columns)] = factor * (sinkhorn.plan.T if turned else sinkhorn.plan)
    total = float((matrix * np.where(allowed, array, 0)).sum())
    return Plan(matrix, total, epsilon, sinkhorn.num_iterations, time.perf_counter() - started)


def _scale_of_offset(offset: float, epsilon: float, unbalanced: float) -> float:
    """Return the factor by which an unbalanced plan changes if `offset` is added to all costs.

    P = a b^T exp((f + g - cost) / epsilon) with f = -rho log(P 1 / a) and g likewise. For s P in place of P, f and g
    fall by rho log s each, so that epsilon log s = -2 rho log s - offset.
    """
    power = -offset / (epsilon + 2 * unbalanced)
    if power > 700:
        raise ValueError(
            f"solve_plan: for costs of {offset:g} or more, the mass of the unbalanced plan exceeds float64: subtract "
            "the least cost, or choose a larger epsilon or `unbalanced`"
        )
    return exp(power)


def soft_weights(cost: Any, *, epsilon: float = 0.1, penalty: float | None = None) -> Array:
    """Return the share of each teacher channel in the target of each student channel, by a transport plan.

    weights[s, t] = P[s, t] / sum over u of P[s, u], P = solve_plan(cost - min, epsilon * spread, penalty * spread),
    spread the standard deviation of the costs. For epsilon -> 0, if S divides T and there is only one cheapest flow,
    they are 1/G at its pairs.

    Args:
        cost: (S, T), tensor or array; inf forbids a pair.
        epsilon: strength of the entropy in units of the spread, > 0: the larger, the more channels share a target.
        penalty: None for fixed sums of the plan; else the price of mass that is not moved, in units of the spread, > 0:
            teacher channels that cost too much are then left out.

    Returns:
        (S, T) float64, rows sum to 1. A student channel without mass takes its cheapest teacher channel; equally cheap
        ones share it.

    Raises:
        ValueError: all pairs of a student channel are forbidden; see `solve_plan`.
        RuntimeError: see `solve_plan`.
    """
    array = check_cost(cost)
    check_positive("soft_weights", epsilon=epsilon, **({} if penalty is None else {"penalty": penalty}))
    if not (array < inf).any(axis=1).all():
        raise ValueError("cost forbids every pair of some student channel, which then has no target: allow one of each")
    finite = array[array < inf]
    spread = float(finite.std()) if finite.size else 0.0
    spread = spread if spread > 0 else 1.0
    cheapest = float(finite.min()) if finite.size else 0.0
    unbalanced = None if penalty is None else penalty * spread
    mass = solve_plan(array - cheapest, epsilon=epsilon * spread, unbalanced=unbalanced).matrix
    sums = mass.sum(axis=1, keepdims=True)
    empty = sums[:, 0] <= 1e-12 * mass.sum() / len(mass)
    weights = mass / np.where(sums > 0, sums, 1)
    cheapest_ones = array[empty] == array[empty].min(axis=1, keepdims=True)
    weights[empty] = cheapest_ones / cheapest_ones.sum(axis=1, keepdims=True)
    return weights


class _Sinkhorn:
    """The potentials f and g of P = a b^T exp((f + g - cost) / epsilon), which are improved in turn."""

    def __init__(self, cost: Array, masses: tuple[Array, Array], unbalanced: float | None, max_iterations: int) -> None:
        self.cost, self.masses = cost, masses
        self.unbalanced, self.max_iterations = unbalanced, max_iterations
        self.f, self.g = np.zeros(cost.shape[0]), np.zeros(cost.shape[1])
        self.plan = cost
        self.num_iterations = 0

    def approach(self, epsilon: float, spread: float) -> None:
        """Improve the potentials for larger epsilons, from about `spread` down to `epsilon`."""
        step = epsilon
        while step * FACTOR < spread:
            step *= FACTOR
        while step > epsilon * 1.5:
            self.solve(step, COARSE_TOLERANCE, COARSE_ITERATIONS)
            step /= FACTOR

    def solve(self, epsilon: float, tolerance: float, most: int | None) -> bool:
        """Improve the potentials for one epsilon; return whether they converged."""
        last = self.max_iterations if most is None else min(self.max_iterations, self.num_iterations + most)
        power = 1.0 if self.unbalanced is None else self.unbalanced / (self.unbalanced + epsilon)
        while self.num_iterations < last:
            self.f = self._potential(self.g[None, :], 1, epsilon, power)
            self.g = self._potential(self.f[:, None], 0, epsilon, power)
            if self._scale(epsilon, power, tolerance) or self._newton(epsilon, power, tolerance):
                return True
        return False

    def _potential(self, other: Array, axis: int, epsilon: float, power: float) -> Array:
        """Return the best potential of one side, given that of the other, in the log domain."""
        logs = (other - self.cost) / epsilon
        largest = logs.max(axis=axis, keepdims=True)
        np.exp(np.subtract(logs, largest, out=logs), out=logs)
        mean = np.tensordot(logs, self.masses[axis], (axis, 0))
        potential: Array = -power * epsilon * (np.log(mean) + largest.squeeze(axis))
        return potential

    def _scale(self, epsilon: float, power: float, tolerance: float) -> bool:
        """Improve both potentials by factors u and v on the kernel; return whether they converged.

        Products with the kernel take a tenth of the time of a step in the log domain. If the error shrinks slowly, the
        steps are overrelaxed, which reduces their number to its square root.
        """
        a, b = self.masses
        kernel = np.exp((self.f[:, None] + self.g[None, :] - self.cost) / epsilon) * a[:, None] * b[None, :]
        fixed_u, fixed_v = (power - 1) * self.f / epsilon, (power - 1) * self.g / epsilon
        log_u, log_v = np.zeros_like(a), np.zeros_like(b)
        relaxation, before, rate, done = 1.0, inf, 0.0, False
        for number in range(max(ROUND, len(a))):  # half as many take as long as a step of Newton's method
            rows = kernel @ np.exp(log_v)
            if not rows.min() > LEAST:
                break
            best_u = power * np.log(a / rows) + fixed_u
            error = float(np.abs(rows * (np.exp(best_u) - np.exp(log_u))).sum())
            log_u += relaxation * (best_u - log_u)
            columns = np.exp(log_u) @ kernel
            if not (columns.min() > LEAST and columns.max() < inf):
                break
            self.num_iterations += 1
            best_v = power * np.log(b / columns) + fixed_v
            error += float(np.abs(columns * (np.exp(best_v) - np.exp(log_v))).sum()) if number else 0
            log_v += relaxation * (best_v - log_v)
            done = number > 0 and error <= tolerance
            if done or max(log_u.max(), log_v.max()) > LARGEST or self.num_iterations >= self.max_iterations:
                break
            if number < PLAIN:
                rate, before = error / before, error
            elif number == PLAIN:  # the best factor for an error that shrinks by this rate
                relaxation = 2 / (1 + (1 - min(max(rate, 0), MOST_RATE)) ** 0.5)
        if done:
            log_v = best_v  # exact column sums, if the transport is balanced
            self.plan = np.exp(log_u)[:, None] * kernel * np.exp(log_v)[None, :]
        else:
            self.num_iterations += 1  # a round without a step counts too, so that the loop ends
        self.f, self.g = self.f + epsilon * log_u, self.g + epsilon * log_v
        return done

    def _newton(self, epsilon: float, power: float, tolerance: float) -> bool:
        """Improve both potentials by Newton's method; return whether they converged.

        With the best g for each f, a concave function of f is left; its slope is the wanted minus the actual row sums.
        Newton's method needs few steps even if the plan hardly connects groups of channels, as for a small epsilon,
        where a Sinkhorn step shrinks the error by a factor near 1.
        """
        self._complete(epsilon, power)
        slope = self._slope()
        for _ in range(NEWTON_STEPS):
            if np.abs(slope).sum() <= tolerance:
                return True
            if self.num_iterations >= self.max_iterations:
                return False
            self.num_iterations += 1
            try:
                step = epsilon * np.linalg.solve(self._curvature(epsilon, power), slope)
            except np.linalg.LinAlgError:
                return False
            if not np.isfinite(step).all():
                return False
            step *= min(1.0, LONGEST * epsilon / max(float(np.abs(step).max()), 1e-300))
            before, rising = self.f, float(slope @ step)
            for halvings in range(30):
                self.f = before + step / 2**halvings
                self._complete(epsilon, power)
                slope = self._slope()
                if slope @ step >= -0.5 * rising:  # else the step went far past the maximum
                    break
        return False

    def _complete(self, epsilon: float, power: float) -> None:
        """Compute g and the plan for f."""
        self.g = self._potential(self.f[:, None], 0, epsilon, power)
        a, b = self.masses
        self.plan = np.exp((self.f[:, None] + self.g[None, :] - self.cost) / epsilon) * a[:, None] * b[None, :]

    def _wanted(self) -> Array:
        """Return the row sums that are optimal for f."""
        a = self.masses[0]
        return a if self.unbalanced is None else a * np.exp(-self.f / self.unbalanced)

    def _slope(self) -> Array:
        slope: Array = self._wanted() - self.plan.sum(axis=1)
        return slope

    def _curvature(self, epsilon: float, power: float) -> Array:
        """Return epsilon times the negative second derivative for f."""
        columns = self.plan.sum(axis=0)
        shared = self.plan @ (self.plan / np.where(columns > 0, columns, 1)).T
        np.fill_diagonal(shared, 0)
        own = np.diag(shared.sum(axis=1))  # so that each row of own - shared sums to 0 exactly
        if self.unbalanced is None:
            # A constant in f changes nothing; this fixes it.
            curvature: Array = own - shared + own.max() / len(own)
        else:
            rows = self.plan.sum(axis=1)
            shared += np.diag(rows - own.diagonal())
            curvature = np.diag(rows + epsilon / self.unbalanced * self._wanted()) - power * shared
        curvature[np.diag_indices_from(curvature)] += SHIFT
        return curvature
