"""Networks whose modules run in one piece cannot be tapped inside: said at once, with what to write."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mgd import Taps


@pytest.mark.parametrize("part", [False, True])
def test_a_network_that_was_compiled_before_it_was_tapped_is_refused(part: bool) -> None:
    inner: Any = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    first: Any = torch.compile(inner) if part else inner
    net: Any = nn.Sequential(first, nn.Flatten(), nn.Linear(16, 2))
    if part:
        assert Taps(net, ["0", "1"]).paths == ("0", "1")  # the part itself, and others, are read
        wrong = "0._orig_mod.0"
    else:
        net, wrong = torch.compile(net), "0.0"
    with pytest.raises(
        ValueError, match=r"compiled before it was tapped.*Taps\(network, \['0.0'\]\), and compile that"
    ):
        Taps(net, [wrong])
    net.compile()
    with pytest.raises(ValueError, match="compiled before"):
        Taps(net, ["0"])


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_scripted_network_is_refused() -> None:
    net: Any = torch.jit.trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), torch.zeros(1, 3, 2, 2))
    with pytest.raises(ValueError, match="scripted before it was tapped"):
        Taps(net, ["0"])
