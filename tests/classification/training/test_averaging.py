from __future__ import annotations

import copy

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from classification.training.averaging import average, restore, state


def test_the_average_follows_its_formula_with_weights_and_statistics() -> None:
    norm = nn.BatchNorm1d(2)
    net = nn.Sequential(nn.Linear(2, 2), norm)
    assert norm.running_mean is not None and norm.num_batches_tracked is not None
    mean = average(net, 0.5)
    expected: dict[str, torch.Tensor] = {}
    for update in range(6):
        with torch.no_grad():
            for value in (*net.parameters(), norm.running_mean):
                value.normal_()
            norm.num_batches_tracked += 1
        mean.update_parameters(net)
        decay = min(0.5, (1 + update) / (10 + update))
        for name, value in net.state_dict().items():
            if update == 0 or not value.is_floating_point():
                expected[name] = value.clone()
            else:
                expected[name] = decay * expected[name] + (1 - decay) * value
    for name, value in mean.module.state_dict().items():
        torch.testing.assert_close(value, expected[name])


def test_a_restored_average_continues_as_if_never_stopped() -> None:
    def train(net: nn.Linear, mean: AveragedModel, steps: int) -> None:
        for _ in range(steps):
            with torch.no_grad():
                net.weight += torch.randn(2, 2, generator=generator)
            mean.update_parameters(net)

    generator, net = torch.Generator().manual_seed(0), nn.Linear(2, 2)
    mean = average(net, 0.9)
    train(net, mean, 3)
    result, kept = copy.deepcopy(mean.module.state_dict()), copy.deepcopy(state(mean, net))
    other = nn.Linear(2, 2)
    again = average(other, 0.9)
    other.load_state_dict(result)  # a checkpoint's result is its average
    restore(again, other, kept)
    place = generator.get_state()
    train(net, mean, 3)
    generator.set_state(place)
    train(other, again, 3)
    assert torch.equal(other.weight, net.weight)
    assert torch.equal(again.module.get_parameter("weight"), mean.module.get_parameter("weight"))
    assert state(None, net) == {}
