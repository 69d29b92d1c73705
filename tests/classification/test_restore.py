from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from classification.errors import UserError
from classification.launch import World
from classification.random_state import random_state, set_random_state
from classification.restore import check_flows, load_optimizer, whole
from mgd import ChannelMatching


def stepped(momentum: float, decay: float) -> torch.optim.SGD:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=momentum, weight_decay=decay)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return optimizer


def test_momenta_are_taken_up_and_rates_are_not() -> None:
    saved, optimizer = stepped(0.9, 1e-4).state_dict(), stepped(0.5, 1e-2)
    saved["state"][0]["momentum_buffer"] += 1
    load_optimizer(optimizer, saved)
    assert optimizer.param_groups[0]["momentum"] == 0.5 and optimizer.param_groups[0]["weight_decay"] == 1e-2
    weight = optimizer.param_groups[0]["params"][0]
    assert torch.equal(optimizer.state[weight]["momentum_buffer"], saved["state"][0]["momentum_buffer"])


@pytest.mark.parametrize(
    ("number", "entry", "message"),
    [
        (0, {"momentum_buffer": torch.zeros(3)}, "weight 0 does not fit"),
        (1, {"momentum_buffer": torch.full((2,), torch.inf)}, "not finite"),
        (1, {"momentum_buffer": "none"}, "is 'none'"),
        (7, {"momentum_buffer": None}, "a state 7"),
        (0, {"exp_avg": torch.zeros(2, 3)}, "of .'exp_avg'."),
    ],
)
def test_momenta_of_something_else_are_refused(number: int, entry: dict[str, object], message: str) -> None:
    saved = stepped(0.9, 0.0).state_dict()
    saved["state"][number] = entry
    with pytest.raises(ValueError, match=message):
        load_optimizer(stepped(0.9, 0.0), saved)


@pytest.mark.parametrize("channel", [-2, 4])
def test_flows_that_name_other_channels_are_refused(channel: int) -> None:
    matching = ChannelMatching([2], [4], [torch.zeros(4)])
    matching.observe([torch.randn(3, 2, 5, 5)], [torch.randn(3, 4, 5, 5)])
    matching.rematch()
    check_flows(matching)
    matching.stages[0].index[0, 0] = channel
    with pytest.raises(ValueError, match="the flow of stage 0 names channels"):
        check_flows(matching)


@pytest.mark.parametrize("what", ["python", "numpy", "torch"])
def test_states_of_generators_that_are_none_are_refused(what: str) -> None:
    states = random_state(World())
    broken = copy.deepcopy(states)
    if what == "python":
        broken[0]["python"][1].fill_(-1)
    elif what == "numpy":
        broken[0]["numpy"][2] = 10**6  # it would be read from far behind the table
    else:
        broken[0]["torch"] = broken[0]["torch"][:9]
    try:
        with pytest.raises(ValueError, match="do not fit"):
            set_random_state(broken, World())
    finally:
        set_random_state(states, World())


def test_what_goes_wrong_is_told_in_a_sentence() -> None:
    with pytest.raises(UserError, match=r"^x is damaged, .* \(KeyError: 'step'\): go on from another"), whole("x"):
        raise KeyError("step")
    with pytest.raises(UserError, match=r"^as it is$"), whole("x"):
        raise UserError("as it is")
