"""The best images per class, by a bounded heap per class in plain Python."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable

Scored = tuple[str, int, list[int | None] | None, list[float | None] | None]  # path, its hash, classes, scores


def best_per_class(
    rows: Iterable[Scored], top_p: int | None, top_k: int, min_score: float = -math.inf
) -> dict[int, list[tuple[str, float]]]:
    """Return {class: [(path, score)]}: the largest scores first, the larger hash first among equals, a path once."""
    heaps: dict[int, list[tuple[float, int, str]]] = {}
    for path, number, classes, scores in rows:
        for label, score in list(zip(classes or [], scores or [], strict=True))[:top_p]:
            if label is None or score is None or score < min_score:
                continue
            heap = heaps.setdefault(label, [])
            entry = (score + 0.0, number, path)
            there = next((other for other in heap if other[2] == path), None)
            if there is not None:
                if there < entry:
                    heap[heap.index(there)] = entry
                    heapq.heapify(heap)
            elif len(heap) < top_k:
                heapq.heappush(heap, entry)
            else:
                heapq.heappushpop(heap, entry)
    return {k: [(path, score) for score, _, path in sorted(heap, reverse=True)] for k, heap in heaps.items() if heap}
