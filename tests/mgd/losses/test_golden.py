"""Agreement with numbers of the published implementation (float32, CPU)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import mgd
from mgd.taps import Outputs

GOLDEN = np.load(Path(__file__).parents[2] / "data" / "mgd_reference.npz")
STAGES = (0, 1)
REDUCERS = ("amp", "sp", "sm")


def tensor(name: str) -> torch.Tensor:
    return torch.from_numpy(GOLDEN[name])


def batch_norm(stage: int) -> nn.BatchNorm2d:
    bn = nn.BatchNorm2d(len(GOLDEN[f"bn_weight{stage}"]))
    with torch.no_grad():
        bn.weight.copy_(tensor(f"bn_weight{stage}"))
        bn.bias.copy_(tensor(f"bn_bias{stage}"))
    return bn


def capacity(reducer: str) -> str:
    return "single" if reducer == "sm" else "spread"


def golden_members(reducer: str, stage: int) -> list[set[int]]:
    num_student = GOLDEN[f"student{stage}"].shape[1]
    groups = GOLDEN[f"{reducer}_index{stage}"].reshape(-1, num_student)
    return [set(column.tolist()) for column in (groups[:1] if reducer == "sm" else groups).T]


@pytest.mark.parametrize("stage", STAGES)
def test_margin(stage: int) -> None:
    np.testing.assert_allclose(mgd.bn_margin(batch_norm(stage)).numpy(), GOLDEN[f"margin{stage}"], atol=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_cost(stage: int) -> None:
    cost = mgd.channel_cost(tensor(f"student{stage}"), tensor(f"teacher{stage}"))
    np.testing.assert_allclose(cost.numpy(), GOLDEN[f"cost{stage}"], atol=1e-5)


@pytest.mark.parametrize("solver", ["ortools", "scipy"])
@pytest.mark.parametrize("reducer", REDUCERS)
@pytest.mark.parametrize("stage", STAGES)
def test_flow(stage: int, reducer: str, solver: str) -> None:
    cost = GOLDEN[f"cost{stage}"]
    flow = mgd.solve_flow(cost, capacity=capacity(reducer), solver=solver)
    members = golden_members(reducer, stage)
    published = sum(cost[s, t] for s, column in enumerate(members) for t in column)
    assert flow.total_cost == pytest.approx(published, rel=1e-6)
    assert [set(column.tolist()) - {-1} for column in flow.index.T] == members


@pytest.mark.parametrize("reducer", REDUCERS)
@pytest.mark.parametrize("stage", STAGES)
def test_target_loss_and_gradient(stage: int, reducer: str) -> None:
    student, teacher = tensor(f"student{stage}").requires_grad_(), tensor(f"teacher{stage}")
    flow = mgd.solve_flow(GOLDEN[f"cost{stage}"], capacity=capacity(reducer))
    target, margin = mgd.reduce_channels(teacher, tensor(f"margin{stage}"), flow, reducer)
    loss = mgd.partial_l2(student, target, margin)
    loss.backward()
    np.testing.assert_allclose(target.numpy(), GOLDEN[f"{reducer}_target{stage}"], rtol=1e-4)
    np.testing.assert_allclose(margin.numpy(), GOLDEN[f"{reducer}_margin{stage}"], rtol=1e-4, atol=1e-6)
    assert loss.item() == pytest.approx(float(GOLDEN[f"{reducer}_partial_l2_{stage}"]), rel=1e-4)
    assert student.grad is not None
    np.testing.assert_allclose(student.grad.numpy(), GOLDEN[f"{reducer}_grad{stage}"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reducer", REDUCERS)
def test_whole_loss(reducer: str) -> None:
    students = [tensor(f"student{i}") for i in STAGES]
    teachers = [tensor(f"teacher{i}") for i in STAGES]
    matching = mgd.ChannelMatching(
        [m.shape[1] for m in students],
        [m.shape[1] for m in teachers],
        [mgd.bn_margin(batch_norm(i)) for i in STAGES],
        reducer=reducer,
    )
    matching.observe(students, teachers)
    matching.rematch()
    logits = tensor("student_logits")
    loss = matching(Outputs(logits, students), [Outputs(logits, teachers)])
    assert loss.item() * len(logits) == pytest.approx(float(GOLDEN[f"{reducer}_total"]), rel=1e-4)


def test_kd() -> None:
    loss = mgd.losses.kd(tensor("student_logits"), tensor("teacher_logits"), temperature=1.5)
    assert loss.item() == pytest.approx(float(GOLDEN["kd"]), rel=1e-5)
