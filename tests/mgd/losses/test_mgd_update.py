"""How a matching is built from probes and renewed before an epoch."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mgd
from mgd import ChannelMatching, Outputs, Probe, bn_margin, channel_cost, probe, solve_flow
from mgd.losses import KD, LOSSES
from mgd.losses.mgd import EachMatching
from tests.mgd.nets import TOY_TAPS, Seen, built, toy

STUDENT, TEACHER = (4, 6), (8, 15)
IMAGES = torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def outputs(channels: tuple[int, ...], seed: int, batch: int = 5) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.randn(batch, c, 6 // (i + 1), 6 // (i + 1), generator=generator) for i, c in enumerate(channels)]
    return Outputs(torch.randn(batch, 3, generator=generator), maps)


def term(margins: Sequence[Tensor | None] | None = None, num_images: int = 10, **values: Any) -> ChannelMatching:
    given = None if margins is None else [margins]
    return built(ChannelMatching, outputs(STUDENT, 0), [outputs(TEACHER, 1)], num_images, margins=given, **values)


def seen(*seeds: int, seed: int = 0) -> Seen:
    return Seen([(outputs(STUDENT, s), [outputs(TEACHER, s + 10)]) for s in seeds], seed)


def indices(found: ChannelMatching) -> list[list[list[int]]]:
    return [flow.index.tolist() for flow in found.flows]


def stage(found: nn.Module, number: int) -> Any:
    return found.get_submodule(f"stages.{number}")


def test_it_is_one_of_the_terms() -> None:
    assert LOSSES["mgd"] is ChannelMatching and ChannelMatching.needs == {"maps", "frozen"}


def test_its_widths_and_given_margins_are_those_of_the_probes() -> None:
    teacher = mgd.Taps(toy(8, seed=1), TOY_TAPS)
    net = teacher.model
    student = probe(mgd.Taps(toy(), TOY_TAPS), IMAGES, frozen=False)
    found = ChannelMatching.build(student, [probe(teacher, IMAGES)], 10)
    assert isinstance(found, ChannelMatching)
    for number, name in enumerate(("bn1", "bn2")):
        norm = net.get_submodule(name)
        assert isinstance(norm, nn.BatchNorm2d) and stage(found, number).measured is None
        torch.testing.assert_close(stage(found, number).margin, bn_margin(norm))
        assert tuple(stage(found, number).cost.cosine.shape) == (4, 8)
    assert list(found.notes) == ["margins: relu@in#0 norm bn1, relu@in#-1 norm bn2"]


def test_the_kind_of_margin_says_where_it_comes_from() -> None:
    given = [-torch.rand(TEACHER[0]), None]
    teacher = outputs(TEACHER, 11)
    measured = [
        torch.stack([values[values < 0].mean() for values in m.transpose(0, 1).flatten(1)]) for m in teacher.features
    ]
    expected: dict[str, list[Tensor]] = {
        "bn": [given[0] if given[0] is not None else measured[0], measured[1]],
        "map": measured,
        "none": [torch.full((width,), -torch.inf) for width in TEACHER],
    }
    for kind, margins in expected.items():
        found = term(given, margin=kind)
        found.update(0, seen(1))
        for number, margin in enumerate(margins):
            torch.testing.assert_close(stage(found, number).margin, margin, msg=f"{kind} {number}")
    found = term(margin="bn")  # nothing is known of norms
    found.update(0, seen(1))
    torch.testing.assert_close(stage(found, 0).margin, measured[0])


@pytest.mark.parametrize(
    ("values", "share"),
    [
        ({"observe": "online", "max_images": 30, "update_freq": 2}, 0.15),
        ({"observe": "online", "max_images": 30, "update_freq": 1}, 0.3),
        ({"observe": "online", "max_images": 1000, "update_freq": 2}, 1.0),
        ({"observe": "pass", "max_images": 30, "update_freq": 2}, 0.0),
        ({"max_images": 30, "update_freq": 0}, 0.0),
    ],
)
def test_the_share_that_is_observed_makes_up_the_images_of_a_matching(values: dict[str, Any], share: float) -> None:
    assert term(num_images=100, **values).observe_share == pytest.approx(share)


def test_its_factor_is_one_over_the_loss_factor_in_the_published_form_alone() -> None:
    assert term(loss_factor=200.0).weight == 1 / 200 and term().weight == 1e-4
    assert term(form="mean").weight == term(form="relative").weight == ChannelMatching.weight == 5.0


@pytest.mark.parametrize("solver", ["ortools", "scipy"])
def test_flows_are_those_of_all_that_was_seen(solver: str) -> None:
    found, views = term(max_images=7, solver=solver), seen(1, 2)
    numbers, arrays = found.update(0, views)
    assert views.asked == [7] and found.matched and numbers["match_seconds"] > 0
    for number in range(2):
        student, teacher = (
            torch.cat([pick.features[number] for pick in picks])
            for picks in ([s for s, _ in views.batches], [t[0] for _, t in views.batches])
        )
        cost = channel_cost(student, teacher).numpy()
        expected = solve_flow(cost, solver=solver)
        assert indices(found)[number] == expected.index.tolist() == arrays[f"index{number}"].tolist()
        np.testing.assert_allclose(arrays[f"cost{number}"], cost, atol=1e-5)
        assert arrays[f"num_teacher{number}"] == TEACHER[number]
        assert arrays[f"total_cost{number}"] == pytest.approx(expected.total_cost, rel=1e-4)
    assert numbers["flow_cost"] == pytest.approx(sum(flow.total_cost for flow in found.flows))
    assert numbers.keys() == {"match_seconds", "flow_cost"}  # nothing was there to change


def test_the_share_of_changed_pairs_is_logged_from_the_second_matching_on() -> None:
    found = term(update_freq=1)
    assert "flow_changed" not in found.update(0, seen(1))[0]
    before = [flow.matrix for flow in found.flows]
    assert found.update(1, seen(1))[0]["flow_changed"] == 0
    changed = found.update(2, seen(2))[0]["flow_changed"]
    kept = sum((old & flow.matrix).sum() for old, flow in zip(before, found.flows, strict=True))
    assert 0 < changed == pytest.approx(1 - kept / sum(TEACHER))  # every teacher channel is in one pair


@pytest.mark.parametrize(("update_freq", "due"), [(1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3]), (0, [0])])
def test_it_is_renewed_only_where_an_epoch_is_due(update_freq: int, due: list[int]) -> None:
    found = term(update_freq=update_freq)
    for epoch in range(5):
        views = seen(epoch)
        before = indices(found) if found.matched else None
        record = found.update(epoch, views)
        assert bool(views.asked) == (epoch in due) == (record != ({}, {}))
        assert (indices(found) != before) == (epoch in due)


@pytest.mark.parametrize("update_freq", [0, 2])
def test_it_is_renewed_in_any_epoch_where_there_are_no_flows(update_freq: int) -> None:
    found, views = term(update_freq=update_freq), seen(1)
    found.update(3, views)
    assert found.matched and len(views.asked) == 1
    restored = term(update_freq=update_freq)
    restored.load_state_dict(found.state_dict())
    assert restored.update(3, views) == ({}, {}) and len(views.asked) == 1


def test_costs_that_were_observed_while_training_need_no_pass() -> None:
    found, views = term(num_images=10, observe="online", max_images=10, update_freq=1), seen(1)
    found.update(0, views)
    assert len(views.asked) == 1 and found.observe_share == 1
    student, teacher = outputs(STUDENT, 5), outputs(TEACHER, 6)
    found.train()(student, [teacher])
    numbers, arrays = found.update(1, views)
    assert len(views.asked) == 1 and "flow_changed" in numbers
    expected = channel_cost(student.features[0], teacher.features[0]).numpy()
    np.testing.assert_allclose(arrays["cost0"], expected, atol=1e-5)


def test_random_flows_follow_the_seed_of_the_run() -> None:
    def drawn(seed: int) -> list[list[list[int]]]:
        found = term(assignment="random")
        found.update(0, seen(1, seed=seed))
        return indices(found)

    assert drawn(3) == drawn(3) != drawn(4)


def test_several_teachers_are_matched_in_one_pass() -> None:
    teachers = [mgd.freeze(mgd.Taps(toy(width, seed=width), TOY_TAPS)) for width in (8, 6)]
    student = mgd.Taps(toy(), TOY_TAPS)
    probes = [probe(teacher.taps, IMAGES, weight=w) for teacher, w in zip(teachers, (3.0, 1.0), strict=True)]
    found = ChannelMatching.build(probe(student, IMAGES, frozen=False), probes, 10, ChannelMatching.Hyper(form="mean"))
    assert isinstance(found, EachMatching) and found.weight == 5.0 and len(found.notes) == 2
    whole = mgd.Distiller(student, teachers, {"mgd": (found, 1.0)})
    forwards: list[int] = []
    for network in (student, *teachers):
        network.register_forward_hook(lambda module, args, out: forwards.append(len(args[0])))
    numbers, arrays = whole.update(0, [(IMAGES[:3],), (IMAGES[3:],)])["mgd"]
    assert forwards == [3, 3, 3, 2, 2, 2]  # every network sees each batch once
    maps = [mgd.dry_forward(student, IMAGES), *(teacher(IMAGES) for teacher in teachers)]
    total = 0.0
    for number in range(4):  # teacher by teacher
        cost = channel_cost(maps[0].features[number % 2], maps[1 + number // 2].features[number % 2])
        expected = solve_flow(cost)
        assert (arrays[f"index{number}"] == expected.index).all()
        total += expected.total_cost
    assert numbers["flow_cost"] == pytest.approx(total, rel=1e-4) and "index4" not in arrays
    each = [one(maps[0], [teacher], mgd.Batch()) for one, teacher in zip(found.terms, maps[1:], strict=True)]
    torch.testing.assert_close(found(maps[0], maps[1:], mgd.Batch()), 0.75 * each[0] + 0.25 * each[1])
    assert "flow_changed" in whole.update(2, [(IMAGES,)])["mgd"][0]


def test_a_teacher_that_is_silent_at_a_tap_is_warned_of() -> None:
    student, teacher = outputs(STUDENT, 0), outputs(TEACHER, 1)
    silent = Outputs(teacher.logits, [teacher.features[0], -teacher.features[1].abs()])
    for paths, where in (((), "at stage 1 is"), (("layer1", "layer2"), "at tap layer2 (stage 1) is")):
        probes = [Probe(teacher, paths=paths, norms=(None,) * len(paths))]
        found = ChannelMatching.build(Probe(student, frozen=False), probes, 10)
        with pytest.warns(UserWarning, match=re.escape(f"{where} nowhere positive")) as caught:
            found.update(0, Seen([(student, [silent])]))
        assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        term().update(0, seen(1))


def test_networks_that_cannot_be_matched_are_refused() -> None:
    student, teacher = Probe(outputs(STUDENT, 0), frozen=False), outputs(TEACHER, 1)
    for wrong, message in (
        (Probe(teacher, frozen=False), "peers that train"),
        (Probe(Outputs(teacher.logits, teacher.features[:1])), "equally many taps of both"),
        (Probe(teacher, margins=[torch.zeros(3), None]), "expected 8 margins"),
    ):
        with pytest.raises(ValueError, match=message):
            ChannelMatching.build(student, [wrong], 10)
    with pytest.raises(ValueError, match="tap both networks"):
        ChannelMatching.build(Probe(Outputs(torch.zeros(5, 3))), [Probe(teacher)], 10)
    with pytest.raises(TypeError, match=r"ChannelMatching.Hyper"):
        ChannelMatching.build(student, [Probe(teacher)], 10, KD.Hyper())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"observe": "online", "update_freq": 0}, "update_freq of at least 1"),
        ({"observe": "later"}, "unknown observe 'later'; choose from pass, online"),
        ({"margin": "bns"}, "unknown margin 'bns'; choose from bn, map, none"),
        ({"capacity": "best"}, "unknown capacity 'best'"),
        ({"update_freq": -1}, "update_freq must be at least 0"),
        ({"loss_factor": 0.0}, "loss_factor must be positive"),
        ({"stage_weights": (1.0, -1.0)}, "stage_weights must be at least 0"),
        ({"max_images": 0}, "max_images must be at least 1"),
    ],
)
def test_hyper_parameters_out_of_range_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChannelMatching.Hyper(**values)


@pytest.mark.parametrize("channel", [-2, 4])
def test_flows_that_name_other_channels_are_refused(channel: int) -> None:
    matching = ChannelMatching([2], [4], [torch.zeros(4)])
    matching.observe([torch.randn(3, 2, 5, 5)], [torch.randn(3, 4, 5, 5)])
    matching.rematch()
    matching.check_state()
    matching.stages[0].get_buffer("index")[0, 0] = channel
    with pytest.raises(ValueError, match="the flow of stage 0 names channels"):
        matching.check_state()


@pytest.mark.parametrize("reducer", ["amp", "sp", "sp_mean", "rd"])
@pytest.mark.parametrize("capacity", ["spread", "truncate", "reference", "single"])
def test_reducers_of_several_channels_go_with_every_capacity(reducer: Any, capacity: Any) -> None:
    assert ChannelMatching.Hyper(reducer=reducer, capacity=capacity).used_capacity() == capacity


@pytest.mark.parametrize(("num_student", "num_teacher"), [(3, 3), (1, 1), (3, 2), (2, 3)])
def test_another_number_of_maps_than_of_stages_is_refused(num_student: int, num_teacher: int) -> None:
    own, other = outputs((*STUDENT, 3), 0).features[:num_student], outputs((*TEACHER, 3), 1).features[:num_teacher]
    message = f"expected 2 maps a network; got {num_student} of the student, {num_teacher} of the teacher"
    with pytest.raises(ValueError, match=message):
        term().observe(own, other)


@pytest.mark.parametrize("cost", ["cosine", "gradient"])
def test_of_several_views_the_first_is_matched(cost: str) -> None:
    flows = []
    other = torch.randn(IMAGES.shape, generator=torch.Generator().manual_seed(9))
    for images in (IMAGES, torch.stack([IMAGES, other], dim=1)):
        found = ChannelMatching([4, 4], [8, 8], [None, None], cost=cost)
        student, teacher = mgd.Taps(toy(), TOY_TAPS), mgd.freeze(mgd.Taps(toy(8, seed=1), TOY_TAPS))
        mgd.Distiller(student, teacher, {"mgd": (found, 1.0)}).update(0, [(images, torch.tensor([0, 1, 2, 0, 1]))])
        flows.append((indices(found), found.costs))
    assert flows[0][0] == flows[1][0]
    torch.testing.assert_close(flows[0][1], flows[1][1])


def test_an_image_without_a_class_is_matched_by_the_likeliest_one() -> None:
    student, teacher = mgd.Taps(toy(), TOY_TAPS), mgd.freeze(mgd.Taps(toy(8, seed=1), TOY_TAPS))
    costs = []
    for target in (None, torch.full((5,), -100)):
        found = ChannelMatching([4, 4], [8, 8], [None, None], cost="gradient")
        mgd.Distiller(student, teacher, {"mgd": (found, 1.0)}).update(0, [(IMAGES, target)])
        costs.append(found.costs)
    torch.testing.assert_close(costs[0], costs[1])
    assert any(float((cost - 2).abs().max()) > 0.1 for cost in costs[0])
