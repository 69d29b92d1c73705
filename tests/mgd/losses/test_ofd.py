from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from mgd import Batch, ChannelMatching, Outputs, Probe, channel_cost, solve_flow
from mgd.flow import solve_control
from mgd.losses.margin import MeasuredMargin
from mgd.losses.ofd import OFD
from tests.mgd.losses.ranks import Loss, check_two_ranks
from tests.mgd.nets import Seen, built
from tests.reference import map_losses

STUDENT = ((3, 4, 4, 4), (3, 5, 2, 2))
TEACHER = ((3, 6, 4, 4), (3, 7, 2, 2))


def outputs(*shapes: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    return Outputs(torch.randn(3, 5, generator=generator), maps)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def regressors(term: OFD) -> list[nn.Parameter]:
    """The weights that bring the student's maps of each tap to the channels of the only teacher."""
    return [weight for name, weight in term.named_parameters() if name.endswith("regressor.0.weight")]


def measured(term: nn.Module) -> Tensor:
    found = term.get_submodule("stages.0.0.measured")
    assert isinstance(found, MeasuredMargin)
    return found.mean()


@pytest.mark.parametrize("given", [True, False])
def test_equals_the_literal_formula(given: bool) -> None:
    student, teacher = outputs(*STUDENT), outputs(*TEACHER, seed=1)
    arrays = [[x.detach().numpy() for x in net.features] for net in (student, teacher)]
    margins = [torch.linspace(-2, -0.1, 6), torch.linspace(-1, 0, 7)]
    term = built(OFD, student, [teacher], 10, margins=[margins] if given else None)
    expected_margins = [m.numpy() for m in margins] if given else [map_losses.mean_negative(x) for x in arrays[1]]
    weights = [weight.detach().numpy()[:, :, 0, 0] for weight in regressors(term)]
    expected = map_losses.ofd(arrays[0], arrays[1], weights, expected_margins)
    assert term(student, [teacher], Batch()).item() == pytest.approx(expected, rel=1e-4)


def test_by_hand() -> None:
    # Regressed to (-1, 1). Taps: teacher (-3, 2), margin -0.5: left alone, 1. Teacher (-3, -3), margin -2: 1 + 9.
    term = OFD([1, 1], [[1, 1]], margins=[[torch.tensor([-0.5]), torch.tensor([-2.0])]])
    for weight in regressors(term):
        nn.init.constant_(weight, 1.0)
    row = [torch.tensor(x).view(1, 1, 1, 2) for x in ([1.0, 3.0], [-3.0, 2.0], [-3.0, -3.0])]
    student, teacher = Outputs(torch.zeros(1, 2), [row[0], row[0]]), Outputs(torch.zeros(1, 2), row[1:])
    assert term(student, [teacher], Batch()).item() == pytest.approx(1 / 2 + 10, rel=1e-4)


def test_below_the_margin_the_teacher_makes_no_difference() -> None:
    student, teacher = outputs(*STUDENT), outputs(*TEACHER, seed=1)
    margins = [torch.full((6,), -0.3), torch.full((7,), -0.3)]
    term = built(OFD, student, [teacher], 10, margins=[margins])
    lowered = Outputs(teacher.logits, [torch.where(x < -0.3, x - 5, x) for x in teacher.features])
    torch.testing.assert_close(term(student, [lowered], Batch()), term(student, [teacher], Batch()))


def test_the_measured_margin_runs_over_all_training_batches_and_is_saved() -> None:
    student, batches = outputs(*STUDENT), [outputs(*TEACHER, seed=s) for s in (1, 2, 3)]
    term = built(OFD, student, batches[:1], 10)
    for teacher in batches[:2]:
        term(student, [teacher], Batch())
    term.eval()(student, batches[2:], Batch())
    seen = torch.cat([teacher.features[0] for teacher in batches[:2]]).detach().numpy()
    restored = OFD([4, 5], [[6, 7]])
    restored.load_state_dict(term.state_dict())
    for module in (term, restored):
        torch.testing.assert_close(measured(module), torch.as_tensor(map_losses.mean_negative(seen)).float())


def test_maps_of_other_resolution_are_pooled() -> None:
    student, teacher = outputs((3, 4, 8, 8), (3, 5, 2, 2)), outputs((3, 6, 4, 4), (3, 7, 4, 4), seed=1)
    pool = nn.functional.adaptive_avg_pool2d
    pooled = [
        Outputs(student.logits, [pool(student.features[0], 4), student.features[1]]),
        Outputs(teacher.logits, [teacher.features[0], pool(teacher.features[1], 2)]),
    ]
    term = built(OFD, student, [teacher], 10)
    torch.testing.assert_close(term(student, [teacher], Batch()), term(pooled[0], pooled[1:], Batch()))


def test_several_teachers_have_stages_of_their_own() -> None:
    student, teachers = outputs(*STUDENT), [outputs(*TEACHER, seed=1), outputs(*STUDENT, seed=2)]
    term = built(OFD, student, teachers, 10, teacher_weights=[3.0, 1.0]).train()
    term(student, teachers, Batch())
    term.eval()
    each = [term.against(i, student, teacher, Batch()) for i, teacher in enumerate(teachers)]
    torch.testing.assert_close(term(student, teachers, Batch()), (3 * each[0] + each[1]) / 4)


def test_gradient_reaches_the_student_and_the_regressors_only() -> None:
    student, teacher = outputs(*STUDENT), outputs(*TEACHER, seed=1)
    term = built(OFD, student, [teacher], 10)
    term(student, [teacher], Batch()).backward()
    assert all(x.grad is not None and x.grad.any() for x in student.features)
    assert all(x.grad is None for x in teacher.features)
    assert all(p.grad is not None and p.grad.any() for p in term.parameters())


def test_bf16_is_near_float32() -> None:
    student = outputs(*STUDENT, dtype=torch.bfloat16)
    teacher = outputs(*TEACHER, seed=1, dtype=torch.bfloat16)
    term = built(OFD, student, [teacher], 10)
    plain = term(student, [teacher], Batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = term(student, [teacher], Batch())
    assert loss.dtype == plain.dtype == torch.float32
    torch.testing.assert_close(loss, plain, rtol=2e-2, atol=0)


def test_wrong_use_is_refused() -> None:
    with pytest.raises(ValueError, match="equally many taps"):
        OFD([1, 2], [[1]])
    with pytest.raises(ValueError, match=r"expected 3 margins, one per teacher channel; got \(2,\)"):
        OFD([1], [[3]], margins=[[torch.zeros(2)]])
    for margins in ([], [[None]], [[None, None], [None, None]]):
        with pytest.raises(ValueError, match="expected margins of 1 teachers, each a list of 2 taps"):
            OFD([1, 2], [[3, 4]], margins=margins)
    with pytest.raises(ValueError, match="2 of the student, 1 of the teacher"):
        OFD([4, 5], [[6, 7]])(outputs(*STUDENT), [outputs(TEACHER[0])], Batch())
    with pytest.raises(TypeError):
        built(OFD, outputs(*STUDENT), [outputs(*TEACHER)], 10, margin=0)
    assert OFD.weight == 1e-3


def make() -> tuple[nn.Module, Loss]:
    maps, term = torch.randn(2, 8, 2, 3, 3, generator=torch.Generator().manual_seed(3)), OFD([2], [[2]])
    scale = nn.Linear(1, 1)
    nn.init.ones_(scale.weight)

    def loss(module: nn.Module, part: slice) -> Tensor:
        for teacher in (maps[0], maps[1] - 1):  # what was seen before must not count twice
            term(Outputs(torch.zeros(8, 2)[part], [teacher[part]]), [Outputs(torch.zeros(0), [teacher[part]])], Batch())
        return measured(term).sum() * scale_of(module)

    return scale, loss


def scale_of(module: nn.Module) -> Tensor:
    assert isinstance(module, nn.Linear)
    return module.weight.sum()


def test_the_measured_margin_is_that_of_all_ranks() -> None:
    assert not dist.is_initialized()
    check_two_ranks(make)


def test_from_the_cheapest_flow_it_starts_where_the_teacher_copies_the_student() -> None:
    """Teacher channels that are those of the student, normalised and shuffled: nothing is left to regress."""
    student = outputs((8, 4, 4, 4), (8, 3, 2, 2))
    order = [torch.randperm(2 * m.shape[1]) for m in student.features]
    maps = [F.batch_norm(m, None, None, training=True).repeat(1, 2, 1, 1) for m in student.features]
    teacher = Outputs(student.logits, [m[:, o].detach() for m, o in zip(maps, order, strict=True)])
    matching = ChannelMatching((4, 3), (8, 6), [None, None])
    matching.observe([m.detach().relu() for m in student.features], [m.relu() for m in teacher.features])
    margins = [torch.full((8,), -9.0), torch.full((6,), -9.0)]
    term = built(OFD, student, [teacher], 10, margins=[margins], init="flow")
    with pytest.raises(RuntimeError, match=r"call update or start\(flows\)"):
        term(student, [teacher], Batch())
    term.start(matching.rematch())
    assert term(student, [teacher], Batch()).item() < 1e-3
    assert built(OFD, student, [teacher], 10, margins=[margins])(student, [teacher], Batch()).item() > 10


def test_a_start_is_saved_and_none_is_no_start() -> None:
    def build(init: str) -> OFD:
        return OFD([2, 3], [[4, 4], [2, 6]], init=init)

    term, flows = build("flow"), [solve_flow(np.random.rand(s, t)) for s, t in ((2, 4), (3, 4), (2, 2), (3, 6))]
    again = build("flow")
    again.load_state_dict(term.state_dict())
    assert not term.ready and not again.ready
    term.start(flows)
    again.load_state_dict(term.state_dict())
    assert term.ready and again.ready
    places = [f"stages.{teacher}.{tap}.regressor.0" for teacher in (0, 1) for tap in (0, 1)]
    for place, flow in zip(places, flows, strict=True):
        assert (again.get_parameter(f"{place}.weight").detach()[:, :, 0, 0].T.numpy() == flow.matrix).all()
    assert build("random").ready and set(build("random").state_dict()) == set(term.state_dict()) - {"started"}
    with pytest.raises(ValueError, match="expected 4 flows"):
        term.start(flows[:2])
    with pytest.raises(ValueError, match="unknown init 'best'; choose from random, flow"):
        build("best")


def test_the_sum_is_over_the_images_of_the_maps() -> None:
    torch.manual_seed(0)
    student, teacher = ([torch.randn(4, 3, 2, 2)] for _ in range(2))
    term = OFD([3], [[3]], margins=[[torch.zeros(3)]])
    found = [term(Outputs(torch.zeros(n, 5), student), [Outputs(torch.zeros(n, 5), teacher)], Batch()) for n in (4, 16)]
    torch.testing.assert_close(found[1], found[0])


def seen() -> Seen:
    """Two batches of the student and of two teachers."""
    return Seen(
        [(outputs(*STUDENT, seed=s), [outputs(*TEACHER, seed=s + n) for n in (10, 20)]) for s in (1, 2)], seed=3
    )


def starting(**values: Any) -> OFD:
    return built(OFD, outputs(*STUDENT), [outputs(*TEACHER, seed=1)] * 2, 10, **values)


def test_before_training_the_regressors_start_from_flows_once() -> None:
    term, views = starting(init="flow", max_images=5), seen()
    numbers, arrays = term.update(4, views)  # whatever the epoch
    assert views.asked == [5] and term.ready
    total = 0.0
    for position, weight in enumerate(regressors(term)):  # teacher by teacher
        teacher, tap = divmod(position, 2)
        student_map = torch.cat([student.features[tap] for student, _ in views.batches])
        teacher_map = torch.cat([teachers[teacher].features[tap] for _, teachers in views.batches])
        expected = solve_flow(channel_cost(student_map, teacher_map))
        assert (weight.detach()[:, :, 0, 0].T.numpy() == expected.matrix).all()
        assert (arrays[f"index{position}"] == expected.index).all()
        total += expected.total_cost
    assert numbers["flow_cost"] == pytest.approx(total, rel=1e-4)
    with torch.no_grad():
        regressors(term)[0].add_(1)
    moved = regressors(term)[0].detach().clone()
    assert term.update(5, views) == ({}, {}) and len(views.asked) == 1
    assert torch.equal(regressors(term)[0].detach(), moved)
    restored = starting(init="flow")
    restored.load_state_dict(term.state_dict())
    assert restored.update(6, views) == ({}, {}) and len(views.asked) == 1
    assert term(views.batches[0][0], list(views.batches[0][1]), Batch()).isfinite()


def test_the_options_of_flows_reach_the_start() -> None:
    term, widths = starting(init="flow", assignment="identity", capacity="truncate"), ((4, 6), (5, 7))
    term.update(0, seen())
    for position, weight in enumerate(regressors(term)):
        num_student, num_teacher = widths[position % 2]
        pairs = solve_control(np.zeros((num_student, num_teacher)), "identity", (), capacity="truncate").matrix.T
        guiding = pairs.any(axis=1)
        assert guiding.sum() == num_student  # one each, and the others keep their weights
        assert (weight.detach()[:, :, 0, 0].numpy()[guiding] == pairs[guiding]).all()


def test_random_regressors_are_left_alone() -> None:
    term, views = starting(), seen()
    before = [weight.detach().clone() for weight in regressors(term)]
    assert term.update(0, views) == ({}, {}) and not views.asked
    assert all(torch.equal(a, b) for a, b in zip(regressors(term), before, strict=True))


def test_peers_are_refused_where_it_starts_from_a_flow_and_other_sizes_are_said() -> None:
    student, teacher = Probe(outputs(*STUDENT), frozen=False), Probe(outputs((3, 6, 2, 2), (3, 7, 2, 2)))
    assert not OFD.build(student, [teacher], 10).notes
    notes = OFD.build(student, [teacher], 10, OFD.Hyper(init="flow")).notes
    assert "2 x 2, is interpolated to the" in notes[0]
    with pytest.raises(ValueError, match="peers that train"):
        OFD.build(student, [student], 10, OFD.Hyper(init="flow"))
