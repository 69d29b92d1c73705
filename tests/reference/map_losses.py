"""Losses on maps and on embeddings, written out element by element."""

from __future__ import annotations

import itertools
import math

import numpy as np

from tests.reference import literal


def pool(maps: np.ndarray, height: int, width: int) -> np.ndarray:
    """Adaptive average pooling: cell i of n covers the rows floor(i H / n) to ceil((i + 1) H / n)."""
    batch, channels, old_height, old_width = maps.shape
    out = np.zeros((batch, channels, height, width))
    for b, c, y, x in np.ndindex(out.shape):
        rows = range(y * old_height // height, -(-(y + 1) * old_height // height))
        columns = range(x * old_width // width, -(-(x + 1) * old_width // width))
        values = [float(maps[b, c, i, j]) for i, j in itertools.product(rows, columns)]
        out[b, c, y, x] = sum(values) / len(values)
    return out


def energy(maps: np.ndarray) -> np.ndarray:
    batch, channels, height, width = maps.shape
    out = np.zeros((batch, 1, height, width))
    for b, y, x in np.ndindex(batch, height, width):
        out[b, 0, y, x] = sum(float(maps[b, c, y, x]) ** 2 for c in range(channels)) / channels
    return out


def unit(values: np.ndarray) -> np.ndarray:
    flat = values.ravel().astype(float)
    return flat / math.sqrt(sum(v * v for v in flat))


def at(student: np.ndarray, teacher: np.ndarray) -> float:
    height, width = min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3])
    student_energy, teacher_energy = energy(pool(student, height, width)), energy(pool(teacher, height, width))
    total = 0.0
    for q_s, q_t in zip(student_energy, teacher_energy, strict=True):
        total += sum((a - b) ** 2 for a, b in zip(unit(q_s), unit(q_t), strict=True))
    value: float = total / (len(student) * height * width)
    return value


def batch_norm(rows: np.ndarray, eps: float = 1e-5) -> np.ndarray:
    """Each column of (N, C) minus its mean, over its standard deviation; weight 1 and bias 0."""
    out = np.zeros(rows.shape)
    for c in range(rows.shape[1]):
        mean = sum(rows[:, c]) / len(rows)
        variance = sum((v - mean) ** 2 for v in rows[:, c]) / len(rows)
        out[:, c] = [(v - mean) / math.sqrt(variance + eps) for v in rows[:, c]]
    return out


def regress(student: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """A 1x1 convolution (T, S) and a fresh batch normalisation in training mode."""
    batch, num_student, height, width = student.shape
    out = np.zeros((batch, len(weight), height, width))
    for b, t, y, x in np.ndindex(out.shape):
        out[b, t, y, x] = sum(float(weight[t, s]) * float(student[b, s, y, x]) for s in range(num_student))
    rows = batch_norm(out.transpose(0, 2, 3, 1).reshape(-1, len(weight)))
    return rows.reshape(batch, height, width, len(weight)).transpose(0, 3, 1, 2)


def fitnet(student: np.ndarray, teacher: np.ndarray, weight: np.ndarray) -> float:
    height, width = min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3])
    regressed, hint = regress(pool(student, height, width), weight), pool(teacher, height, width)
    errors = [(regressed[i] - hint[i]) ** 2 for i in np.ndindex(hint.shape)]
    value: float = sum(errors) / len(errors)
    return value


def mean_negative(maps: np.ndarray) -> np.ndarray:
    """The mean of the negative values of each channel; 0 where there are none."""
    margin = np.zeros(maps.shape[1])
    for c in range(maps.shape[1]):
        values = [float(v) for v in maps[:, c].ravel() if v < 0]
        margin[c] = sum(values) / len(values) if values else 0.0
    return margin


def ofd(
    students: list[np.ndarray], teachers: list[np.ndarray], weights: list[np.ndarray], margins: list[np.ndarray]
) -> float:
    total, num_taps = 0.0, len(students)
    for i, (student, teacher, weight, margin) in enumerate(zip(students, teachers, weights, margins, strict=True)):
        total += literal.partial_l2(regress(student, weight), teacher, margin) / 2 ** (num_taps - 1 - i)
    return total / len(students[0])


def smooth_l1(error: float) -> float:
    return 0.5 * error**2 if abs(error) < 1 else abs(error) - 0.5


def distances(points: np.ndarray) -> np.ndarray:
    num = len(points)
    out = np.zeros((num, num))
    for i, j in itertools.permutations(range(num), 2):
        out[i, j] = math.sqrt(sum((float(a) - float(b)) ** 2 for a, b in zip(points[i], points[j], strict=True)))
    array: np.ndarray = out / (out.sum() / (num * (num - 1)))
    return array


def angle(points: np.ndarray, i: int, j: int, k: int) -> float:
    a, b = points[i].astype(float) - points[j], points[k].astype(float) - points[j]
    lengths = math.sqrt(a @ a) * math.sqrt(b @ b)
    return a @ b / lengths if lengths > 0 else 0.0


def rkd(student: np.ndarray, teacher: np.ndarray, distance: float, angle_weight: float) -> float:
    num = len(student)
    d_s, d_t = distances(student), distances(teacher)
    pairs = sum(smooth_l1(d_s[i, j] - d_t[i, j]) for i, j in itertools.product(range(num), repeat=2))
    triples = sum(
        smooth_l1(angle(student, *triple) - angle(teacher, *triple))
        for triple in itertools.product(range(num), repeat=3)
    )
    return distance * pairs / num**2 + angle_weight * triples / num**3


def linear_norm(rows: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return batch_norm(np.array([[weight[o] @ row for o in range(len(weight))] for row in rows]))


def tap_attention(students: list[np.ndarray], teachers: list[np.ndarray], layers: dict[str, np.ndarray]) -> np.ndarray:
    """The weights (B, t, s) of fresh layers in training mode; `layers` is the state dict in numpy."""
    batch, num_s, num_t = len(students[0]), len(students), len(teachers)
    width = layers["student_position"].shape[1]
    query = np.zeros((batch, num_t, width))
    for t, teacher in enumerate(teachers):
        query[:, t] = linear_norm(pool(teacher, 1, 1)[:, :, 0, 0], layers[f"queries.{t}.0.weight"])
    key = np.zeros((batch, num_s, width))
    for s, student in enumerate(students):
        rows = linear_norm(pool(student, 1, 1)[:, :, 0, 0], layers[f"keys.{s}.0.weight"])
        key[:, s] = np.maximum(rows, 0)
    paired = linear_norm(key.reshape(batch * num_s, width), layers["bilinear.0.weight"])
    out = np.zeros((batch, num_t, num_s))
    for b, t in np.ndindex(batch, num_t):
        scores = []
        for s in range(num_s):
            matched = paired[b * num_s + s, t * width : (t + 1) * width]
            place = float(layers["teacher_position"][t] @ layers["student_position"][s])
            scores.append((query[b, t] @ matched + place) / math.sqrt(width))
        for s in range(num_s):
            out[b, t, s] = math.exp(scores[s]) / sum(math.exp(score) for score in scores)
    return out


def afd(students: list[np.ndarray], teachers: list[np.ndarray], attention: np.ndarray) -> float:
    total, batch = 0.0, len(students[0])
    for t, teacher in enumerate(teachers):
        height, width = teacher.shape[2:]
        for s, student in enumerate(students):
            pooled, goal = pool(energy(student), height, width), energy(teacher)
            for b in range(batch):
                squares = [(x - y) ** 2 for x, y in zip(unit(pooled[b]), unit(goal[b]), strict=True)]
                total += float(attention[b, t, s]) * sum(squares) / len(squares)
    return total / batch


def wkd_maps(student: np.ndarray, teacher: np.ndarray, mean_weight: float, grid: int) -> float:
    """Maps of one size that the grid divides."""
    images, channels, height, width = student.shape
    high, wide = height // grid, width // grid

    def statistics(maps: np.ndarray, b: int, c: int, i: int, j: int) -> tuple[float, float]:
        values = [
            float(maps[b, c, y, x]) for y in range(i * high, (i + 1) * high) for x in range(j * wide, (j + 1) * wide)
        ]
        mean = sum(values) / len(values)
        return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) + 1e-5)

    total: float = 0.0
    for b in range(images):
        for c in range(channels):
            for i in range(grid):
                for j in range(grid):
                    mean_s, std_s = statistics(student, b, c, i, j)
                    mean_t, std_t = statistics(teacher, b, c, i, j)
                    total += mean_weight * (mean_s - mean_t) ** 2 + (std_s - std_t) ** 2
    return float(total / (grid**2 * images))
