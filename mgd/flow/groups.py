"""Groups of teacher channels that share one target: the energy that a weighted sum carries, and the best groups.

Channel t, after the ReLU, is a vector x_t over all images and pixels; gram[t, u] = <x_t, x_u> is all that is needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mgd.flow.flow import Flow, check_cost, solve_control, solve_flow

Array = NDArray[Any]
CAPACITIES_OF_GROUPS = ("spread", "truncate")
COUPLING = 1e-9  # of members, in units of their mean energy; it makes the leading eigenvector unique
ITERATIONS = 100
STARTS = 4  # number of random starts; the groups that keep the most energy are returned


def check_gram(gram: Any) -> Array:
    """Return a Gram matrix (T, T) as float64.

    Raises:
        ValueError: it is not square, or has entries that are negative or not finite.
    """
    array = np.asarray(gram.detach().double().cpu().numpy() if hasattr(gram, "detach") else gram, dtype=np.float64)
    if array.ndim != 2 or array.shape[0] != array.shape[1] or array.size == 0:
        raise ValueError(f"expected the Gram matrix of the teacher's channels, (T, T); got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError("the Gram matrix must be finite: look for NaN in the teacher's feature maps")
    if array.min() < 0:
        raise ValueError(
            f"the Gram matrix of channels after the ReLU has no negative numbers; got {array.min():g}: apply the ReLU "
            "to the maps first"
        )
    return array


def _check_groups(index: Array, num_teacher: int) -> None:
    if index.ndim != 2 or not ((index >= -1) & (index < num_teacher)).all() or not (index >= 0).any(axis=0).all():
        raise ValueError(
            f"expected groups (G, S) of the {num_teacher} teacher channels, each with a channel or more; got an index "
            f"of shape {index.shape}, from {index.min(initial=0)} to {index.max(initial=0)}"
        )


def _leading(gram: Array, index: Array) -> tuple[Array, Array]:
    """Return the leading eigenvalue (S,) of every group's Gram matrix, and its eigenvector (S, G) of length 1.

    The eigenvector is non-negative, because the matrix is (Perron, Frobenius). A slight coupling of all members makes
    it unique: if members form blocks that never respond at the same place, the strongest block has all the weight, and
    equally strong blocks share it. Members of a group that never responds have equal weights.
    """
    members = index.T  # (S, G)
    present = members >= 0
    pairs = present[:, :, None] & present[:, None, :]
    blocks = np.where(pairs, gram[members[:, :, None], members[:, None, :]], 0.0)
    mean = np.trace(blocks, axis1=1, axis2=2) / present.sum(axis=1)
    coupling = np.where(mean > 0, COUPLING * mean, 1.0)
    _, vectors = np.linalg.eigh(blocks + coupling[:, None, None] * pairs)
    vector = np.where(present, np.abs(vectors[:, :, -1]), 0.0)
    value = np.einsum("sg,sgh,sh->s", vector, blocks, vector)
    return value, vector


def _matrix(index: Array, values: Array, num_teacher: int) -> Array:
    """Write (S, G) values of members into an (S, T) matrix."""
    matrix = np.zeros((index.shape[1], num_teacher))
    slot, group = np.nonzero(index >= 0)
    matrix[group, index[slot, group]] = values.T[slot, group]
    return matrix


def group_weights(gram: Any, index: Array) -> Array:
    """Return the weights of the linear reducer: the leading eigenvector of each group's Gram matrix.

    No other weighted sum of the group, after the ReLU, carries more of the members' energy, see `energy_kept`. The
    weights of a group sum to 1. So the target of equal members equals them, as with AMP, and the weighted margin lies
    between those of the members. If the members form blocks that never respond at the same place, the strongest block
    has all the weight, and equally strong blocks share it. Members of a group that never responds have equal weights.

    Args:
        gram: (T, T), tensor or array, of the teacher's channels after the ReLU.
        index: (G, S) of a flow.

    Returns:
        (S, T) float64, at least 0; rows sum to 1.

    Raises:
        ValueError: see `check_gram`; or the groups name other channels, or one is empty.
    """
    array = check_gram(gram)
    _check_groups(index, len(array))
    _, vector = _leading(array, index)
    return _matrix(index, vector / vector.sum(axis=1, keepdims=True), len(array))


def energy_kept(gram: Any, index: Array) -> float:
    """Return the share of the teacher's energy after the ReLU that one target per group can carry.

    share = sum over groups of the leading eigenvalue of the group's Gram matrix / trace of the whole matrix. A target y
    carries sum over members of <x_t, y>^2 / |y|^2; the sum by `group_weights` after the ReLU carries the most. A sum
    before the ReLU carries at most as much, because ReLU(sum w x) <= sum w ReLU(x).

    Args:
        gram: (T, T), tensor or array, of the teacher's channels after the ReLU.
        index: (G, S) of a flow. Channels that it leaves out count as lost. A channel in several groups, as for S > T,
            counts once, for the group that carries it best.

    Returns:
        Between 0 and 1; 1 if the teacher never responds.

    Raises:
        ValueError: see `check_gram`; or the groups name other channels, or one is empty.
    """
    array = check_gram(gram)
    _check_groups(index, len(array))
    total = float(np.trace(array))
    if total <= 0:
        return 1.0
    value, vector = _leading(array, index)
    if len(np.unique(index[index >= 0])) == (index >= 0).sum():
        return float(value.sum() / total)
    carried = np.zeros(len(array))
    slot, group = np.nonzero(index >= 0)
    # <x_t, y>^2 / |y|^2 is the eigenvalue times the square of the channel's entry in the eigenvector.
    np.maximum.at(carried, index[slot, group], (value[:, None] * vector**2).T[slot, group])
    return float(carried.sum() / total)


def _start(gram: Array, num_groups: int, seed: Sequence[int]) -> Array:
    """Return (S, T) weights of the first prototypes, each one channel at unit length.

    Each channel is drawn with a probability proportional to the energy of it that no earlier prototype carries
    (k-means++). If all energy is carried, it is the first unused one by index.
    """
    generator = np.random.default_rng(list(seed))
    energy = np.diag(gram).copy()
    remaining, chosen = energy.copy(), np.zeros((num_groups, len(gram)))
    unused = np.ones(len(gram), dtype=bool)
    for group in range(num_groups):
        odds = np.where(unused, remaining.clip(0), 0.0)
        total = odds.sum()
        channel = int(generator.choice(len(gram), p=odds / total)) if total > 0 else int(np.flatnonzero(unused)[0])
        unused[channel] = False
        if energy[channel] > 0:
            chosen[group, channel] = energy[channel] ** -0.5
            remaining = np.minimum(remaining, energy - gram[channel] ** 2 / energy[channel])
    return chosen


def group_channels(
    gram: Any,
    num_groups: int,
    *,
    capacity: str = "spread",
    solver: str = "auto",
    seed: Sequence[int] = (0,),
    start: Array | None = None,
) -> Array:
    """Group the teacher's channels so that one target per group carries as much of their energy as possible.

    maximise the sum over t of <x_t, p_g(t)>^2 over groups g(t) of the given capacity and prototypes p_g of length 1.
    Two steps alternate until the sum does not grow: an exact flow assigns each channel to a prototype; each prototype
    becomes the best one of its group, sum a_t x_t with a the leading eigenvector of the group's Gram matrix. No step
    lowers the sum, which is `energy_kept` times the trace. The result depends on the start.

    Args:
        gram: (T, T), tensor or array, of the teacher's channels after the ReLU.
        num_groups: S, at most T.
        capacity: "spread", or "truncate", which leaves out the channels that are carried least; see `solve_flow`.
        solver: see `solve_flow`.
        seed: of the random starts (k-means++).
        start: (G, S) groups to start from; None for the best result of four random starts.

    Returns:
        (G, S) int64 index of the groups, as `Flow.index`; their order has no meaning.

    Raises:
        ValueError: see `check_gram`; or there are more groups than channels, or the capacity is another one.
    """
    array = check_gram(gram)
    num_teacher = len(array)
    if not 1 <= num_groups <= num_teacher:
        raise ValueError(f"expected at least 1 and at most {num_teacher} groups of as many channels; got {num_groups}")
    if capacity not in CAPACITIES_OF_GROUPS:
        raise ValueError(
            f"groups of the teacher's channels take the capacity {' or '.join(CAPACITIES_OF_GROUPS)}; got {capacity!r}"
        )
    total = float(np.trace(array))
    if total <= 0:
        return solve_flow(np.zeros((num_groups, num_teacher)), capacity=capacity, solver=solver).index
    array = array / total
    if start is not None:
        return _settle(array, _prototypes(array, start), capacity, solver)[1]
    starts = (_start(array, num_groups, (*seed, number)) for number in range(STARTS))
    results = [_settle(array, prototypes, capacity, solver) for prototypes in starts]
    return max(results, key=lambda pair: pair[0])[1]


def _settle(gram: Array, prototypes: Array, capacity: str, solver: str) -> tuple[float, Array]:
    """Alternate both steps from (S, T) prototypes until the energy does not grow; return the energy and the groups."""
    from scipy.sparse import csr_array  # slow to import

    best, index = -1.0, np.empty((0, 0), np.int64)
    for _ in range(ITERATIONS):
        carried = (csr_array(prototypes) @ gram) ** 2  # a prototype has few members
        new_index = solve_flow(-len(gram) * carried, capacity=capacity, solver=solver).index
        energy = float(_leading(gram, new_index)[0].sum())
        if energy <= best * (1 + 1e-12):
            break
        best, index = energy, new_index
        prototypes = _prototypes(gram, index)
    return best, index


def assign_groups(cost: Any, groups: Array, assignment: str, seed: Sequence[int], *, solver: str = "auto") -> Flow:
    """Give each group of teacher channels to one student channel, at the least sum of the costs of its members.

    Args:
        cost: (S, T), tensor or array; inf forbids a pair.
        groups: (G, S) index of the groups.
        assignment: see `solve_control`.
        seed: of the assignment "random".
        solver: see `solve_flow`.

    Returns:
        A flow with these groups; its `total_cost` is the sum of `cost`.

    Raises:
        ValueError: see `solve_flow`.
    """
    values = check_cost(cost)
    padded = np.concatenate([values, np.zeros((len(values), 1))], axis=1)  # -1, an empty slot, costs nothing
    flow = solve_control(padded[:, groups].sum(axis=1), assignment, seed, capacity="single", solver=solver)
    return dataclasses.replace(flow, index=groups[:, flow.index[0]], num_teacher=values.shape[1])


def _prototypes(gram: Array, index: Array) -> Array:
    """Return (S, T) weights of the best prototype of each group, at unit length; 0 if the group never responds."""
    value, vector = _leading(gram, index)
    length = np.sqrt(value, out=np.full_like(value, np.inf), where=value > 0)
    return _matrix(index, vector / length[:, None], len(gram))
