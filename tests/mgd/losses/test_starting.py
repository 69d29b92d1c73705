"""Terms that begin with a flow, beside OFD, which has tests of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mgd import Batch, Outputs, channel_cost, solve_flow
from mgd.losses import OFD, FitNet, MaskedGenerative, ReviewKD
from tests.mgd.nets import Seen, built

KINDS: dict[str, Any] = {"fitnet": FitNet, "masked_generative": MaskedGenerative, "ofd": OFD, "reviewkd": ReviewKD}


def outputs(channels: tuple[int, ...], seed: int) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    return Outputs(torch.zeros(5, 3), [torch.randn(5, c, 6 // (i + 1), 6 // (i + 1), generator=generator)
                                       for i, c in enumerate(channels)])  # fmt: skip


def layers(kind: str, term: nn.Module) -> dict[int, nn.Conv2d]:
    """The convolution that brings the student's map to the teacher's width, at each tap that has one."""
    names = {
        "fitnet": {1: "regressors.0.0"},
        "masked_generative": {1: "restorers.0.align"},
        "ofd": {tap: f"stages.0.{tap}.regressor.0" for tap in (0, 1)},
        "reviewkd": {tap: f"fusions.0.{tap}.leave.0" for tap in (0, 1)},
    }
    found: dict[int, nn.Conv2d] = {}
    for tap, name in names[kind].items():
        layer = term.get_submodule(name)
        assert isinstance(layer, nn.Conv2d)
        found[tap] = layer
    return found


@pytest.mark.parametrize("teacher_channels", [(8, 15), (4, 6)])
@pytest.mark.parametrize("kind", KINDS)
def test_it_begins_with_the_pairs_of_the_cheapest_flow(kind: str, teacher_channels: tuple[int, int]) -> None:
    student, teacher = outputs((4, 6), 0), outputs(teacher_channels, 1)
    term = built(KINDS[kind], student, [teacher], init="flow")
    with pytest.raises(RuntimeError, match="with init 'flow' starts from flows: call update"):
        term(student, [teacher], Batch())
    numbers, arrays = term.update(0, Seen([(student, [teacher])]))
    assert numbers["flow_cost"] > 0 and f"index{len(layers(kind, term)) - 1}" in arrays
    for tap, layer in layers(kind, term).items():
        flow = solve_flow(channel_cost(student.features[tap], teacher.features[tap]))
        middle = layer.weight[:, :, layer.kernel_size[0] // 2, layer.kernel_size[1] // 2]
        width = student.features[tap].shape[1]
        assert torch.equal(middle[:, :width], torch.tensor(flow.matrix.T).float())
        assert layer.weight.abs().sum() == middle.sum() == flow.matrix.sum()  # all else is 0
        assert layer.bias is None or not layer.bias.any()
    assert term.update(1, Seen([])) == ({}, {})  # once
    assert term(student, [teacher], Batch()).isfinite()


def test_what_reviewkd_begins_with_passes_the_student_on() -> None:
    student, teacher = outputs((4, 6), 0), outputs((4, 6), 1)
    term = built(ReviewKD, student, [teacher], init="flow", width=9)
    term.update(0, Seen([(student, [teacher])]))
    enter = term.get_submodule("fusions.0.1.enter.0")
    maps = student.features[1]
    torch.testing.assert_close(enter(maps), F.pad(maps, (0, 0, 0, 0, 0, 3)))
    with pytest.raises(ValueError, match="width must be at least 6; it is 5"):
        built(ReviewKD, student, [teacher], init="flow", width=5)


def test_flows_are_those_of_the_maps_that_are_compared() -> None:
    student, teacher = outputs((4, 6), 0), outputs((8, 15), 1)
    term = built(FitNet, student, [teacher], init="flow")
    term.rectify = True
    _, arrays = term.update(0, Seen([(student, [teacher])]))
    expected = channel_cost(student.features[1].relu(), teacher.features[1].relu())
    torch.testing.assert_close(torch.tensor(arrays["cost0"]), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_that_is_loaded_says_that_it_was_started(kind: str) -> None:
    student, teacher = outputs((4, 6), 0), outputs((8, 15), 1)
    first, second = (built(KINDS[kind], student, [teacher], init="flow") for _ in range(2))
    second.load_state_dict(first.state_dict())
    assert not second.ready
    first.update(0, Seen([(student, [teacher])]))
    second.load_state_dict(first.state_dict())
    assert second.ready and "started" not in built(KINDS[kind], student, [teacher]).state_dict()


def test_options_of_flows_go_with_such_a_start() -> None:
    for kind in KINDS.values():
        assert kind.Hyper().without_effect().keys() >= {"groups", "cost", "capacity"}
        assert not kind.Hyper(init="flow").without_effect()
        assert "frozen" in kind.needed(kind.Hyper(init="flow")) and "frozen" not in kind.needed(kind.Hyper())


def test_the_teachers_groups_may_start_a_term() -> None:
    student, teacher = outputs((3, 3), 0), outputs((6, 6), 1)
    sources = torch.randn(5, 3, 3, 3).relu()
    teacher.features[1] = sources[:, [0, 1, 2, 2, 1, 0]] * torch.tensor([1.0, 2, 3, 1, 2, 3]).view(1, 6, 1, 1)
    term = built(OFD, student, [teacher], init="flow", groups="teacher")
    _, arrays = term.update(0, Seen([(student, [teacher])]))
    assert {frozenset(column) for column in arrays["index1"].T.tolist()} == {
        frozenset(p) for p in ((0, 5), (1, 4), (2, 3))
    }
