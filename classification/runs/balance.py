"""Weights of terms that would give every term an equal share of the gradient."""

from __future__ import annotations

from collections.abc import Mapping


def balanced(weights: Mapping[str, float], shares: Mapping[str, float]) -> dict[str, float]:
    """Rescale weights to equal gradient norms; the first term and terms without gradient keep theirs.

    Args:
        weights: factor of each term.
        shares: each term's share of the gradient with these weights; only these terms are returned.
    """
    first = next((share for share in shares.values() if share > 0), 1.0)
    return {n: weights[n] * (first / share if share > 0 else 1.0) for n, share in shares.items()}
