from __future__ import annotations

import torch
from torch import nn

from classification.averaging import average


def test_the_average_follows_its_formula_with_weights_and_statistics() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    mean = average(net, 0.5)
    expected: dict[str, torch.Tensor] = {}
    for update in range(6):
        with torch.no_grad():
            for value in (*net.parameters(), net[1].running_mean):
                value.normal_()
            net[1].num_batches_tracked += 1
        mean.update_parameters(net)
        decay = min(0.5, (1 + update) / (10 + update))
        for name, value in net.state_dict().items():
            if update == 0 or not value.is_floating_point():
                expected[name] = value.clone()
            else:
                expected[name] = decay * expected[name] + (1 - decay) * value
    for name, value in mean.module.state_dict().items():
        torch.testing.assert_close(value, expected[name])
