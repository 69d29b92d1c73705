from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch import multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode

from mgd.losses.gather import first_rank, gather
from mgd.losses.mgd import ChannelMatching
from tests.mgd.losses.ranks import SPLIT, Loss, check_two_ranks


def make(counts: Sequence[int] | None = None) -> tuple[nn.Module, Loss]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 4, generator=generator)
    layer = nn.Linear(4, 3)
    nn.init.constant_(layer.weight, 0.1)
    nn.init.constant_(layer.bias, 0.2)

    def loss(module: nn.Module, part: slice) -> Tensor:
        whole = gather(module(images[part]), counts)
        return (whole - whole.mean(0)).square().sum() + whole.cumsum(0).sin().sum()

    return layer, loss


class Reads(TorchDispatchMode):
    """Count the numbers that are read: each would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += func.name() == "aten::_local_scalar_dense"
        return func(*args, **(kwargs or {}))


def make_counted() -> tuple[nn.Module, Loss]:
    """With the ranks' counts nothing is read; without them, something is."""
    layer, loss = make(SPLIT)
    _, asking = make()

    def without_reading(module: nn.Module, part: slice) -> Tensor:
        for function, fewest, most in ((loss, 0, 0), (asking, 1, 10)):
            with Reads() as reads:
                value = function(module, part)
            if dist.is_initialized():
                assert fewest <= reads.seen <= most, reads.seen
        return value

    return layer, without_reading


def make_shared() -> tuple[nn.Module, Loss]:
    layer, _ = make()

    def loss(module: nn.Module, part: slice) -> Tensor:
        assert isinstance(module, nn.Linear)
        images = torch.ones(8, 4)[part]
        local, whole = module.weight * 1, gather(images @ module.weight.T)
        same = gather(local[None, :, :1].expand(len(images), -1, -1).squeeze(-1))
        return whole.sum() + same.sum()  # both get one tensor of ones as their gradient

    return layer, loss


@pytest.mark.parametrize("made", [make, make_counted])
def test_two_ranks_compute_the_loss_and_gradients_of_one(made: Any) -> None:
    check_two_ranks(made)


def test_a_gradient_that_others_use_too_is_left_as_it_is() -> None:
    check_two_ranks(make_shared)


def test_without_ranks_nothing_happens() -> None:
    x = torch.randn(3, 2)
    assert gather(x) is x and gather(x, [3]) is x
    found = [x]
    assert first_rank(found) is found


def _rank(rank: int, where: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{where}/meet", rank=rank, world_size=2)
    with pytest.raises(ValueError, match=rf"rank {rank} has 2 images; the counts of the ranks are \[3, 3\]"):
        gather(torch.zeros(2, 1), [3, 3])
    maps = torch.randn(4, 6, 3, 3, generator=torch.Generator().manual_seed(0))
    # A seed per rank stands for a processor that solves a tie in another way.
    term = ChannelMatching([6, 6], [6, 6], [torch.zeros(6)] * 2, seed=rank, assignment="random")
    term.observe([maps, maps.flip(0)], [maps.flip(1), maps])
    flows = term.rematch()
    kept = [torch.from_numpy(flow.index) for flow in flows], [stage.index for stage in term._stages()]
    torch.save(kept, f"{where}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_every_rank_takes_the_flows_of_the_first(tmp_path: Path) -> None:
    mp.spawn(_rank, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert len(first[1]) == len(second[1]) == 2
    for own, other in zip([*first[0], *first[1]], [*second[0], *second[1]], strict=True):
        assert (own == other).all()
    alone = ChannelMatching([6], [6], [torch.zeros(6)], seed=1, assignment="random")
    maps = torch.randn(4, 6, 3, 3, generator=torch.Generator().manual_seed(0))
    alone.observe([maps], [maps.flip(1)])
    assert (torch.from_numpy(alone.rematch()[0].index) != second[1][0]).any()  # what the second rank would have taken
