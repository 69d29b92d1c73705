"""Terms on maps and memories, written out element by element."""

from __future__ import annotations

import math

import numpy as np


def conv(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """Convolve with stride 1 and zeros around, so that the size stays."""
    out_channels, in_channels, side, _ = weight.shape
    batch, _, height, width = x.shape
    reach = side // 2
    out = np.zeros((batch, out_channels, height, width))
    for b, o, y, z in np.ndindex(out.shape):
        total = 0.0 if bias is None else float(bias[o])
        for i, dy, dz in np.ndindex(in_channels, side, side):
            row, column = y + dy - reach, z + dz - reach
            if 0 <= row < height and 0 <= column < width:
                total += float(weight[o, i, dy, dz]) * float(x[b, i, row, column])
        out[b, o, y, z] = total
    return out


def batch_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float = 1e-5) -> np.ndarray:
    """Normalise each channel by the batch's own statistics."""
    out = np.zeros_like(x)
    for c in range(x.shape[1]):
        values = x[:, c].ravel()
        mean = sum(values) / len(values)
        variance = sum((v - mean) ** 2 for v in values) / len(values)
        out[:, c] = (x[:, c] - mean) / math.sqrt(variance + eps) * weight[c] + bias[c]
    return out


def pool(x: np.ndarray, size: int) -> np.ndarray:
    """Average equal blocks, so that size x size remain."""
    step = x.shape[2] // size
    out = np.zeros((*x.shape[:2], size, size))
    for b, c, y, z in np.ndindex(out.shape):
        block = x[b, c, y * step : (y + 1) * step, z * step : (z + 1) * step]
        out[b, c, y, z] = block.sum() / step**2
    return out


def mean_square(x: np.ndarray, y: np.ndarray) -> float:
    return sum((float(x[at]) - float(y[at])) ** 2 for at in np.ndindex(x.shape)) / x.size


def context(student: np.ndarray, teacher: np.ndarray) -> float:
    total, weights, weight = mean_square(student, teacher), 1.0, 1.0
    for size in (4, 2, 1):
        if size < student.shape[2]:
            weight /= 2
            weights += weight
            total += weight * mean_square(pool(student, size), pool(teacher, size))
    return total / weights


def attend(own: np.ndarray, deeper: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Weigh a map and the repeated pixels of a deeper one by sigmoids of a 1x1 convolution of both."""
    step = own.shape[2] // deeper.shape[2]
    out = np.zeros(own.shape)
    for b, y, z in np.ndindex(len(own), *own.shape[2:]):
        mine, other = own[b, :, y, z], deeper[b, :, y // step, z // step]
        both = [*mine, *other]
        first, second = (
            1 / (1 + math.exp(-(float(bias[k]) + sum(float(weight[k, i, 0, 0]) * v for i, v in enumerate(both)))))
            for k in (0, 1)
        )
        out[b, :, y, z] = first * mine + second * other
    return out


def crd_negatives(drawn: list[int], anchor: int) -> list[int]:
    """Of K + 1 different images, K that are not the anchor."""
    *wanted, spare = drawn
    return [spare if image == anchor else image for image in wanted]


def crd(
    anchors: np.ndarray,
    bank: np.ndarray,
    index: list[int],
    negatives: list[list[int]],
    temperature: float,
    normaliser: float | None,
) -> tuple[float, float]:
    """One direction: the loss, and Z, estimated where it is None."""
    num_images, num_negatives = len(bank), len(negatives[0])
    exponentials = []
    for anchor, own, others in zip(anchors.astype(float), index, negatives, strict=True):
        unit = anchor / math.sqrt(sum(v * v for v in anchor))
        entries = [bank[i].astype(float) for i in (own, *others)]
        exponentials.append([math.exp(sum(u * e for u, e in zip(unit, x, strict=True)) / temperature) for x in entries])
    if normaliser is None:
        normaliser = num_images * sum(sum(row) for row in exponentials) / (len(anchors) * (1 + num_negatives))
    total = 0.0
    for row in exponentials:
        noise = num_negatives / num_images
        shares = [e / normaliser / (e / normaliser + noise) for e in row]
        total -= math.log(shares[0]) + sum(math.log(1 - share) for share in shares[1:])
    return total / len(anchors), normaliser


def crd_entry(old: np.ndarray, embedding: np.ndarray, momentum: float) -> np.ndarray:
    unit = embedding / math.sqrt(sum(v * v for v in embedding))
    mixed = momentum * old + (1 - momentum) * unit
    return mixed / math.sqrt(sum(v * v for v in mixed))
