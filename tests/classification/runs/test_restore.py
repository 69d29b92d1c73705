from __future__ import annotations

import copy

import pytest
import torch

from classification.errors import UserError
from classification.runs.random_state import random_state, set_random_state
from classification.runs.restore import explain_damage
from classification.runs.world import World


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


def test_errors_while_a_state_is_loaded_become_one_sentence() -> None:
    with (
        pytest.raises(UserError, match=r"^x is damaged, .* \(KeyError: 'step'\): resume from another"),
        explain_damage("x"),
    ):
        raise KeyError("step")
    with pytest.raises(UserError, match=r"^as it is$"), explain_damage("x"):
        raise UserError("as it is")


@pytest.mark.parametrize("error", [NameError("typo"), ImportError("gone"), MemoryError(), torch.OutOfMemoryError()])
def test_errors_of_the_program_and_of_the_machine_do_not_blame_the_file(error: Exception) -> None:
    with pytest.raises(type(error)), explain_damage("x"):
        raise error
