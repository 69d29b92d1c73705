"""The formulas of the method, written out element by element: slow, and as close to the text as Python gets."""

from __future__ import annotations

import itertools
import math

import numpy as np


def channel_cost(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    batch, num_student = student.shape[:2]
    cost = np.zeros((num_student, teacher.shape[1]))
    for s, t, b in itertools.product(range(num_student), range(teacher.shape[1]), range(batch)):
        x, y = student[b, s].ravel().astype(float), teacher[b, t].ravel().astype(float)
        lengths = math.sqrt(x @ x) * math.sqrt(y @ y)
        cost[s, t] += 2 - 2 * ((x @ y) / lengths if lengths > 0 else 0.0)
    array: np.ndarray = cost / batch
    return array


def bn_margin(weight: float, bias: float) -> float:
    scale, mean = abs(weight), bias
    if scale == 0:
        return min(mean, 0.0)
    below = 0.5 * math.erfc(mean / scale / math.sqrt(2))
    if below <= 0.001:
        return -3 * scale
    return mean - scale * math.exp(-0.5 * (mean / scale) ** 2) / math.sqrt(2 * math.pi) / below


def best_total(cost: np.ndarray, capacity: str) -> float:
    """The least cost over every admissible assignment, by trying them all."""
    num_student, num_teacher = cost.shape
    if num_student > num_teacher:
        return best_total(cost.T, "spread")
    if capacity == "single":
        chosen = itertools.permutations(range(num_teacher), num_student)
        value: float = min(sum(cost[s, t] for s, t in enumerate(teachers)) for teachers in chosen)
        return value
    low = num_teacher // num_student
    if capacity == "reference":
        return best_total(cost[:, : num_student * low], "spread")
    best = math.inf
    owners = [*range(num_student), *([-1] if capacity == "truncate" else [])]
    for assignment in itertools.product(owners, repeat=num_teacher):
        counts = [assignment.count(s) for s in range(num_student)]
        high = low if capacity == "truncate" else -(-num_teacher // num_student)
        if min(counts) >= low and max(counts) <= high:
            best = min(best, sum(cost[s, t] for t, s in enumerate(assignment) if s >= 0))
    return best


def reduce_pixel(values: list[float], reducer: str) -> float:
    if reducer == "amp":
        return max(values, key=abs)
    if reducer == "sp":
        return max(values)
    if reducer == "sp_mean":
        return sum(values) / len(values)
    (value,) = values
    return value


def partial_l2(student: np.ndarray, target: np.ndarray, margin: np.ndarray) -> float:
    total = 0.0
    for b, s, y, x in np.ndindex(student.shape):
        wanted = max(float(target[b, s, y, x]), float(margin[s]))
        value = float(student[b, s, y, x])
        if value > wanted or wanted > 0:
            total += (value - wanted) ** 2
    return total


def kd(student: np.ndarray, teacher: np.ndarray, temperature: float) -> float:
    total = 0.0
    for zs, zt in zip(student.astype(float) / temperature, teacher.astype(float) / temperature, strict=True):
        ps, pt = np.exp(zs) / np.exp(zs).sum(), np.exp(zt) / np.exp(zt).sum()
        total += sum(p * (math.log(p) - math.log(q)) for p, q in zip(pt, ps, strict=True))
    return temperature**2 * total / len(student)
