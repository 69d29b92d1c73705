"""Soft capacities, groups of the teacher, costs, the linear reducer and stages across, in a matching."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mgd
from mgd import Batch, ChannelMatching, Outputs, channel_cost, partial_l2, solve_flow
from mgd.flow import energy_kept, group_weights, soft_weights
from mgd.losses.mgd import EachMatching
from tests.mgd.nets import TOY_TAPS, Seen, built, toy, toy_maps

STUDENT, TEACHER = (4, 6), (8, 15)


def maps(channels: tuple[int, ...], seed: int, batch: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, c, 6 // (i + 1), 6 // (i + 1), generator=generator) for i, c in enumerate(channels)]


def outputs(channels: tuple[int, ...], seed: int) -> Outputs:
    return Outputs(torch.zeros(5, 3), maps(channels, seed))


def matched(student: Outputs | None = None, teacher: Outputs | None = None, **options: Any) -> ChannelMatching:
    term = ChannelMatching(STUDENT, TEACHER, [-torch.rand(t) for t in TEACHER], **options)
    term.observe(student or outputs(STUDENT, 0), teacher or outputs(TEACHER, 1))
    term.rematch()
    return term


def buffer(term: nn.Module, stage: int, name: str) -> Tensor:
    return term.get_submodule(f"stages.{stage}").get_buffer(name)


def gram(teacher: Tensor) -> np.ndarray:
    rows = teacher.clamp_min(0).double().transpose(0, 1).flatten(1).numpy()
    product: np.ndarray = rows @ rows.T
    return product


def weighted_loss(term: ChannelMatching, weights: list[Tensor]) -> float:
    """The loss against sums of the teacher's channels by these weights, stage by stage."""
    total = 0.0
    pairs = zip(maps(STUDENT, 0), maps(TEACHER, 1), weights, strict=True)
    for i, (ours, theirs, w) in enumerate(pairs):
        target = torch.einsum("st,bthw->bshw", w.float(), theirs)
        margin = w.float() @ buffer(term, i, "margin")
        total += partial_l2(nn.functional.batch_norm(ours, None, None, training=True), target, margin).item() / 2 ** (
            1 - i
        )
    return total / 5


@pytest.mark.parametrize("capacity", ["soft", "unbalanced"])
def test_soft_targets_are_sums_by_the_plan(capacity: Any) -> None:
    term = matched(capacity=capacity, epsilon=0.3, penalty=0.7)
    costs = [channel_cost(s, t) for s, t in zip(maps(STUDENT, 0), maps(TEACHER, 1), strict=True)]
    weights = [
        torch.tensor(soft_weights(cost, epsilon=0.3, penalty=0.7 if capacity == "unbalanced" else None))
        for cost in costs
    ]
    for i, (expected, cost, flow) in enumerate(zip(weights, costs, term.flows, strict=True)):
        torch.testing.assert_close(buffer(term, i, "weights"), expected.float(), atol=1e-5, rtol=1e-4)
        assert (flow.index == solve_flow(cost).index).all() and flow.weights is not None
    loss = term(outputs(STUDENT, 0), [outputs(TEACHER, 1)])
    assert loss.item() == pytest.approx(weighted_loss(term, weights), rel=1e-4)
    assert "stages.1.weights" in term.state_dict() and "stages.1.weights" not in matched().state_dict()
    other = ChannelMatching(STUDENT, TEACHER, [torch.zeros(t) for t in TEACHER], capacity=capacity)
    other.load_state_dict(term.state_dict())
    assert other(outputs(STUDENT, 0), [outputs(TEACHER, 1)]).item() == pytest.approx(loss.item(), rel=1e-6)


def test_a_tiny_epsilon_is_the_mean_over_the_exact_flow_where_the_student_divides_the_teacher() -> None:
    both = [
        ChannelMatching([4], [8], [torch.zeros(8)], **options)
        for options in ({"capacity": "soft", "epsilon": 1e-3}, {"reducer": "sp_mean"})
    ]
    student, teacher = (Outputs(torch.zeros(5, 3), maps(c, seed)[:1]) for c, seed in ((STUDENT, 0), (TEACHER, 1)))
    losses = []
    for term in both:
        term.observe(student, teacher)
        term.rematch()
        losses.append(term(student, [teacher]).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_linear_reducer_takes_the_weights_of_each_group() -> None:
    term = matched(reducer="linear")
    weights = [
        torch.tensor(group_weights(gram(t), flow.index)) for t, flow in zip(maps(TEACHER, 1), term.flows, strict=True)
    ]
    assert term(outputs(STUDENT, 0), [outputs(TEACHER, 1)]).item() == pytest.approx(
        weighted_loss(term, weights), rel=1e-4
    )
    assert [(flow.index == other.index).all() for flow, other in zip(term.flows, matched().flows, strict=True)] == [
        True
    ] * 2


def grouped_teacher() -> tuple[Outputs, list[list[int]]]:
    """A teacher whose channels are copies of few, in another order, with other factors."""
    generator = torch.Generator().manual_seed(3)
    features, groups = [], []
    for channels, parts, side in ((8, 4, 6), (15, 6, 3)):
        order = torch.randperm(channels, generator=generator)
        sources = torch.randn(5, parts, side, side, generator=generator)
        factors = torch.rand(channels, generator=generator) + 0.5
        features.append(sources[:, order % parts] * factors[:, None, None])
        groups.append((order % parts).tolist())
    return Outputs(torch.zeros(5, 3), features), groups


def test_teacher_first_puts_channels_together_that_are_alike() -> None:
    teacher, groups = grouped_teacher()
    term = matched(teacher=teacher, groups="teacher")
    for flow, alike in zip(term.flows, groups, strict=True):
        assert sorted(flow.index[flow.index >= 0]) == list(range(len(alike)))
        assert {len({alike[t] for t in column if t >= 0}) for column in flow.index.T} == {1}
    assert any((a.matrix != b.matrix).any() for a, b in zip(term.flows, matched(teacher=teacher).flows, strict=True))
    cost = channel_cost(maps(STUDENT, 0)[0], teacher.features[0]).double().numpy()
    flow = term.flows[0]
    members = [flow.index[:, s] for s in range(4)]
    assert flow.total_cost == pytest.approx(sum(cost[s, m].sum() for s, m in enumerate(members)), rel=1e-5)
    best = solve_flow(np.stack([cost[:, m].sum(axis=1) for m in members], axis=1)).total_cost
    assert flow.total_cost == pytest.approx(best, rel=1e-5)


def test_groups_of_a_teacher_that_is_no_wider_are_the_students_flow() -> None:
    flows = []
    for groups in ("student", "teacher"):
        term = ChannelMatching([9], [8], [None], groups=groups)
        term.observe(maps((9,), 0), maps((8,), 1))
        flows.append(term.rematch()[0])
    assert (flows[0].index == flows[1].index).all()


def test_the_energy_kept_is_logged() -> None:
    student, teacher = outputs(STUDENT, 0), outputs(TEACHER, 1)
    seen = Seen([(student, [teacher])])
    numbers, arrays = built(ChannelMatching, student, [teacher], energy=True).update(0, seen)
    expected = [energy_kept(gram(t), arrays[f"index{i}"]) for i, t in enumerate(teacher.features)]
    assert [arrays[f"energy_kept{i}"] for i in range(2)] == pytest.approx(expected, rel=1e-5)
    assert numbers["energy_kept"] == pytest.approx(np.mean(expected), rel=1e-5) and "channels_per_target" not in numbers
    numbers, arrays = built(ChannelMatching, student, [teacher], capacity="soft").update(
        0, Seen([(student, [teacher])])
    )
    counts = [np.exp(-(w * np.log(w)).sum(axis=1)).mean() for w in (arrays["weights0"], arrays["weights1"])]
    assert numbers["channels_per_target"] == pytest.approx(np.mean(counts), rel=1e-4) and "energy_kept" not in numbers


def test_the_correlation_is_what_it_says() -> None:
    term = matched(cost="correlation")
    for cost, s, t in zip(term.costs, maps(STUDENT, 0), maps(TEACHER, 1), strict=True):
        torch.testing.assert_close(cost.float(), channel_cost(s, t, "correlation"), atol=1e-5, rtol=1e-4)


def test_the_gradient_cost_compares_maps_times_gradients() -> None:
    images, labels = torch.randn(6, 3, 5, 5), torch.tensor([0, 1, 2, 0, 1, 2])
    nets = [toy(4, seed=0).eval(), toy(8, seed=1).eval()]
    student, teacher = (mgd.Taps(net, TOY_TAPS) for net in nets)
    probes = mgd.probe(student, images, frozen=False), mgd.probe(teacher, images)
    term = ChannelMatching.build(probes[0], [probes[1]], 10, ChannelMatching.Hyper(cost="gradient"))
    assert isinstance(term, ChannelMatching)
    distiller = mgd.Distiller(student, mgd.freeze(teacher), {"mgd": (term, 1.0)})
    _, arrays = distiller.update(0, [(images[:4], labels[:4]), (images[4:], labels[4:])])["mgd"]
    weighted = []
    for net in nets:  # by hand: the gradient for the second map, through mean and last layer
        net.requires_grad_(False)
        last = toy_maps(net, images)[1].requires_grad_()
        logits = net.fc(torch.relu(last).mean((2, 3)))
        slope = (logits.softmax(1) - nn.functional.one_hot(labels, 3)) @ net.fc.weight / 25
        weighted.append(last.detach() * slope[:, :, None, None] * (last > 0))
    np.testing.assert_allclose(arrays["cost1"], channel_cost(*weighted), atol=1e-5)
    assert all(weight.grad is None for weight in student.parameters())
    with pytest.raises(ValueError, match="needs the gradients of both networks"):
        term.observe(maps((4, 4), 0), maps((8, 8), 1))


def test_without_labels_gradients_are_those_of_the_likeliest_class() -> None:
    images = torch.randn(4, 3, 5, 5)
    teacher = mgd.Taps(toy(8, seed=1), TOY_TAPS)
    found = []
    for labels in ((), (teacher.eval()(images).logits.argmax(1),)):
        probes = mgd.probe(teacher, images, frozen=False), mgd.probe(teacher, images)
        term = ChannelMatching.build(probes[0], [probes[1]], 10, ChannelMatching.Hyper(cost="gradient"))
        distiller = mgd.Distiller(teacher, mgd.freeze(mgd.Taps(teacher.model, TOY_TAPS)), {"mgd": (term, 1.0)})
        found.append(distiller.update(0, [(images, *labels)])["mgd"][1]["cost0"])
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)
    assert (np.diag(found[0]) < 1e-5).sum() == 6  # a network beside itself; two channels are dead on some image


def crossed() -> tuple[Outputs, Outputs]:
    """A student whose first stage is like the teacher's second, and the other way round."""
    teacher = outputs(TEACHER, 1)
    first = nn.functional.interpolate(teacher.features[1][:, :4], scale_factor=2.0, mode="bilinear")
    second = nn.functional.adaptive_avg_pool2d(teacher.features[0], 3)[:, [0, 1, 2, 3, 4, 5]]
    return Outputs(torch.zeros(5, 3), [first, second]), teacher


def test_across_lets_the_stages_choose() -> None:
    student, teacher = crossed()
    term = built(ChannelMatching, student, [teacher], across=True)
    numbers, arrays = term.update(0, Seen([(student, [teacher])]))
    assert term.partners == [1, 0] and numbers["stages_moved"] == 2 and arrays["partner"].tolist() == [[1, 0]]
    assert [flow.num_teacher for flow in term.flows] == [15, 8]
    plain = built(ChannelMatching, student, [teacher])
    assert numbers["flow_cost"] < plain.update(0, Seen([(student, [teacher])]))[0]["flow_cost"]
    swapped = ChannelMatching(STUDENT, (15, 8), [None, None])
    turned = Outputs(teacher.logits, teacher.features[::-1])
    swapped.update(0, Seen([(student, [turned])]))
    torch.testing.assert_close(term(student, [teacher]), swapped(student, [turned]))
    other = built(ChannelMatching, student, [teacher], across=True)
    other.load_state_dict(term.state_dict())
    other.check_state()
    torch.testing.assert_close(other(student, [teacher]), term(student, [teacher]))
    other.get_buffer("partner").fill_(1)
    other.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="must teach exactly one"):
        other.check_state()


def test_across_keeps_stages_that_fit() -> None:
    teacher = outputs(TEACHER, 1)
    student = Outputs(torch.zeros(5, 3), [teacher.features[0][:, :4], teacher.features[1][:, :6]])
    term = built(ChannelMatching, student, [teacher], across=True)
    numbers, _ = term.update(0, Seen([(student, [teacher])]))
    plain = built(ChannelMatching, student, [teacher])
    plain.update(0, Seen([(student, [teacher])]))
    assert numbers["stages_moved"] == 0
    torch.testing.assert_close(term(student, [teacher]), plain(student, [teacher]))
    term(student, [teacher]).backward()
    assert all(weight.grad is not None for weight in term.parameters())  # as ranks need it
    assert {n for n, _ in term.named_parameters()} == {n for n, _ in plain.named_parameters()}


def test_several_teachers_choose_each_for_itself() -> None:
    student, teacher = crossed()
    turned = Outputs(
        teacher.logits, [student.features[0].repeat(1, 2, 1, 1), student.features[1].repeat(1, 3, 1, 1)[:, :15]]
    )
    probes = [mgd.Probe(each) for each in (teacher, turned)]
    term = ChannelMatching.build(mgd.Probe(student, frozen=False), probes, 10, ChannelMatching.Hyper(across=True))
    assert isinstance(term, EachMatching)
    _, arrays = term.update(0, Seen([(student, [teacher, turned])]))
    assert arrays["partner"].tolist() == [[1, 0], [0, 1]]
    assert term(student, [teacher, turned], Batch()).isfinite()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"capacity": "soft", "reducer": "amp"}, "makes weighted sums: reducer must be 'linear', not 'amp'"),
        ({"capacity": "unbalanced", "assignment": "random"}, "assignment must be 'cheapest', not 'random'"),
        ({"groups": "teacher", "capacity": "reference"}, "takes the capacity 'spread' or 'truncate', not 'reference'"),
        ({"across": True, "assignment": "identity"}, "across follows the costs"),
        ({"cost": "gradient", "observe": "online"}, "takes a pass of its own"),
        ({"epsilon": 0.0}, "epsilon must be positive"),
        ({"penalty": -1.0}, "penalty must be positive"),
    ],
)
def test_words_that_do_not_go_together_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChannelMatching.Hyper(**values)


def test_the_published_matching_is_the_default() -> None:
    usual = ChannelMatching.Hyper()
    assert (usual.reducer, usual.used_capacity(), usual.cost, usual.groups) == ("amp", "spread", "cosine", "student")
    assert not usual.across and not usual.energy and not usual.needs_gram()
    assert ChannelMatching.Hyper(capacity="soft").reducer == "linear"
    assert usual.without_effect() == {
        "weight": "the form mean or relative",
        "epsilon": "the capacity soft or unbalanced",
        "penalty": "the capacity unbalanced",
    }
