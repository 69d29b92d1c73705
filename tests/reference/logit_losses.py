"""The logit losses of the method's section 2, element by element in float64."""

from __future__ import annotations

import math

import numpy as np


def softmax(logits: np.ndarray, temperature: float = 1.0) -> list[float]:
    powers = [math.exp(float(z) / temperature) for z in logits]
    return [power / sum(powers) for power in powers]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def dkd(
    student: np.ndarray, teacher: np.ndarray, target: np.ndarray, temperature: float, alpha: float, beta: float
) -> float:
    total = 0.0
    for zs, zt, y in zip(student, teacher, target, strict=True):
        ps, pt = softmax(zs, temperature), softmax(zt, temperature)
        others = [k for k in range(len(ps)) if k != y]
        rest_s, rest_t = sum(ps[k] for k in others), sum(pt[k] for k in others)
        total += alpha * kl([pt[y], rest_t], [ps[y], rest_s])
        total += beta * kl([pt[k] / rest_t for k in others], [ps[k] / rest_s for k in others])
    return temperature**2 * total / len(student)


def pearson(x: list[float], y: list[float]) -> float:
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    product = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return product / math.sqrt(sum((a - mean_x) ** 2 for a in x) * sum((b - mean_y) ** 2 for b in y))


def dist(student: np.ndarray, teacher: np.ndarray, temperature: float, beta: float, gamma: float) -> float:
    ps, pt = [softmax(z, temperature) for z in student], [softmax(z, temperature) for z in teacher]
    images, classes = len(ps), len(ps[0])
    per_image = sum(pearson(ps[i], pt[i]) for i in range(images)) / images
    per_class = sum(pearson([p[k] for p in ps], [p[k] for p in pt]) for k in range(classes)) / classes
    return beta * (1 - per_image) + gamma * (1 - per_class)


def wsl(student: np.ndarray, teacher: np.ndarray, target: np.ndarray, temperature: float) -> float:
    total = 0.0
    for zs, zt, y in zip(student, teacher, target, strict=True):
        error_s, error_t = -math.log(softmax(zs)[y]), -math.log(softmax(zt)[y])
        weight = 1 - math.exp(-error_s / (error_t + 1e-7))
        ps, pt = softmax(zs, temperature), softmax(zt, temperature)
        total += weight * -sum(b * math.log(a) for a, b in zip(ps, pt, strict=True))
    return temperature**2 * total / len(student)


def dml(student: np.ndarray, teacher: np.ndarray) -> float:
    pairs = [(softmax(zs), softmax(zt)) for zs, zt in zip(student, teacher, strict=True)]
    return sum((kl(p, q) + kl(q, p)) / 2 for p, q in pairs) / len(pairs)


def meal(student: np.ndarray, teachers: list[np.ndarray], weights: list[float]) -> float:
    total = 0.0
    for i in range(len(student)):
        p = softmax(student[i])
        for k in range(len(p)):
            wanted = sum(w * softmax(z[i])[k] for w, z in zip(weights, teachers, strict=True)) / sum(weights)
            total -= wanted * math.log(p[k])
    return total / len(student)


def discriminator(student: np.ndarray, ensemble: np.ndarray, layers: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """Mean binary cross-entropy of two answers an input: (1, 0) for a student's logits, (0, 1) for the ensemble's."""
    total = 0.0
    for inputs, truth in ((student, (1, 0)), (ensemble, (0, 1))):
        for row in inputs:
            values = [float(v) for v in row]
            for number, (weight, bias) in enumerate(layers):
                values = [
                    sum(float(weight[o, i]) * v for i, v in enumerate(values)) + float(bias[o])
                    for o in range(len(bias))
                ]
                if number < len(layers) - 1:
                    values = [max(v, 0.0) for v in values]
            for value, wanted in zip(values, truth, strict=True):
                sigmoid = 1 / (1 + math.exp(-value))
                total -= math.log(sigmoid if wanted else 1 - sigmoid)
    return total / (2 * (len(student) + len(ensemble)))


def wttm(student: np.ndarray, teacher: np.ndarray, exponent: float) -> float:
    total = 0.0
    for zs, zt in zip(student, teacher, strict=True):
        powers = [p**exponent for p in softmax(zt)]
        total += sum(powers) * kl([power / sum(powers) for power in powers], softmax(zs))
    return total / len(student)


def mlkd(
    student: np.ndarray, teacher: np.ndarray, temperatures: list[float], instance: float, batch: float, classes: float
) -> float:
    total, images, num = 0.0, range(len(student)), range(student.shape[1])
    for tau in temperatures:
        p, q = ([softmax(z, tau) for z in logits] for logits in (student, teacher))
        total += instance * tau**2 * sum(kl(q[i], p[i]) for i in images) / len(images)
        for i in images:
            for j in images:
                gap = sum(p[i][k] * p[j][k] for k in num) - sum(q[i][k] * q[j][k] for k in num)
                total += batch * gap**2 / len(images)
        for k in num:
            for m in num:
                gap = sum(p[i][k] * p[i][m] for i in images) - sum(q[i][k] * q[i][m] for i in images)
                total += classes * gap**2 / len(num)
    return total


def class_cost(prototypes: np.ndarray, sharpening: float) -> list[list[float]]:
    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))

    return [[1 - math.exp(-sharpening * (1 - cosine(a, b))) for b in prototypes] for a in prototypes]


def transport(p: list[float], q: list[float], cost: list[list[float]], epsilon: float, iterations: int) -> float:
    """Sinkhorn iterations of one pair of distributions, all sums written out; the last makes the row sums p."""
    num = len(p)
    u = [1 / num] * num
    v = u
    for _ in range(iterations):
        v = [q[j] / sum(u[i] * math.exp(-cost[i][j] / epsilon) for i in range(num)) for j in range(num)]
        u = [p[i] / sum(v[j] * math.exp(-cost[i][j] / epsilon) for j in range(num)) for i in range(num)]
    return sum(u[i] * math.exp(-cost[i][j] / epsilon) * v[j] * cost[i][j] for i in range(num) for j in range(num))


def wkd_logits(
    student: np.ndarray,
    teacher: np.ndarray,
    target: np.ndarray,
    cost: list[list[float]],
    temperature: float,
    wasserstein_weight: float,
    epsilon: float,
    iterations: int,
) -> float:
    total = 0.0
    for zs, zt, y in zip(student, teacher, target, strict=True):
        total -= softmax(zt)[y] * math.log(softmax(zs)[y])
        others = [k for k in range(len(zs)) if k != y]
        p, q = softmax(zs[others], temperature), softmax(zt[others], temperature)
        inner = [[cost[i][j] for j in others] for i in others]
        total += wasserstein_weight * transport(p, q, inner, epsilon, iterations)
    return total / len(student)
