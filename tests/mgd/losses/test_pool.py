from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mgd.losses.pool import pool, pool_by_products


@pytest.mark.parametrize(("have", "want"), [((8, 8), (4, 4)), ((7, 5), (3, 2)), ((3, 4), (7, 4)), ((5, 5), (1, 1))])
def test_products_pool_as_torch_does_and_pass_the_same_gradient(have: tuple[int, int], want: tuple[int, int]) -> None:
    maps = torch.randn(2, 3, *have, dtype=torch.float64, requires_grad=True)
    by_torch, by_products = F.adaptive_avg_pool2d(maps, want), pool_by_products(maps, want)
    torch.testing.assert_close(by_products, by_torch)
    weights = torch.randn_like(by_torch)
    one, other = (torch.autograd.grad((found * weights).sum(), maps)[0] for found in (by_torch, by_products))
    torch.testing.assert_close(other, one)
    assert torch.equal(pool(maps, want), by_torch)
