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
