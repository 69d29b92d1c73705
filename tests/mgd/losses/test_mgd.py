from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mgd import ChannelMatching, Outputs, channel_cost, partial_l2, reduce_channels, solve_flow
from tests.mgd.losses.ranks import Loss, check_two_ranks

STUDENT, TEACHER = (4, 6), (8, 15)


def maps(channels: tuple[int, ...], seed: int, batch: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, c, 6 // (i + 1), 6 // (i + 1), generator=generator) for i, c in enumerate(channels)]


def outputs(channels: tuple[int, ...], seed: int) -> Outputs:
    return Outputs(torch.zeros(5, 3), maps(channels, seed))


def matching(reducer: str = "amp", **options: Any) -> ChannelMatching:
    return ChannelMatching(STUDENT, TEACHER, [-torch.rand(t) for t in TEACHER], reducer=reducer, **options)


@pytest.mark.parametrize("reducer", ["amp", "sp", "sm"])
def test_loss_is_the_weighted_sum_of_its_parts(reducer: str) -> None:
    term = matching(reducer)
    student, teacher = outputs(STUDENT, 0), outputs(TEACHER, 1)
    term.observe(student, teacher)
    flows = term.rematch()
    expected = 0.0
    for i, (s, t, flow) in enumerate(zip(student.features, teacher.features, flows, strict=True)):
        capacity = "single" if reducer == "sm" else "spread"
        assert flow.total_cost == pytest.approx(solve_flow(channel_cost(s, t), capacity=capacity).total_cost)
        target, margin = reduce_channels(t, term.stages[i].get_buffer("margin"), flow, reducer)
        normalised = nn.functional.batch_norm(s, None, None, training=True)
        expected += partial_l2(normalised, target, margin).item() / 2 ** (1 - i)
    assert term(student, [teacher]).item() == pytest.approx(expected / 5, rel=1e-5)


def matched(**options: Any) -> ChannelMatching:
    term = matching(**options)
    term.observe(outputs(STUDENT, 0), outputs(TEACHER, 1))
    term.rematch()
    return term


def test_the_mean_form_is_the_error_per_element() -> None:
    student, teacher = outputs(STUDENT, 0), outputs(TEACHER, 1)
    term = matched(form="mean")
    expected = 0.0
    for stage, s, t in zip(term.stages, student.features, teacher.features, strict=True):
        target, margin = reduce_channels(t, stage.get_buffer("margin"), stage.get_buffer("index"))
        normalised = nn.functional.batch_norm(s, None, None, training=True)
        expected += partial_l2(normalised, target, margin).item() / s.numel()
    assert term(student, [teacher]).item() == pytest.approx(expected, rel=1e-5)


def test_the_mean_form_is_the_published_sum_over_the_size_of_the_last_stage() -> None:
    shapes = ((2, 8, 8), (4, 4, 4))  # a stage halves the side and doubles the channels
    student, teacher = ([torch.randn(5, *shape) for shape in shapes] for _ in range(2))
    losses = {}
    for form in ("sum", "mean"):
        term = ChannelMatching((2, 4), (2, 4), [torch.zeros(2), torch.zeros(4)], form=form, assignment="identity")
        term.observe(student, teacher)
        term.rematch()
        losses[form] = term(Outputs(torch.zeros(5, 3), student), [Outputs(torch.zeros(5, 3), teacher)]).item()
    assert losses["mean"] == pytest.approx(losses["sum"] / (4 * 4 * 4), rel=1e-5)


def test_the_mean_form_does_not_know_the_image_size() -> None:
    student, teacher = outputs(STUDENT, 0), outputs(TEACHER, 1)
    tiled = [Outputs(o.logits, [m.tile(1, 1, 2, 2) for m in o.features]) for o in (student, teacher)]
    for form, factor in (("sum", 4), ("mean", 1), ("relative", 1)):
        term = matched(form=form)
        assert term(tiled[0], [tiled[1]]).item() == pytest.approx(factor * term(student, [teacher]).item(), rel=1e-5)


def test_controls_pose_other_problems() -> None:
    kinds = ("cheapest", "costliest", "identity", "random")
    flows = {kind: matched(assignment=kind).flows for kind in kinds}
    cost = [channel_cost(s, t).numpy() for s, t in zip(maps(STUDENT, 0), maps(TEACHER, 1), strict=True)]
    for found in flows.values():
        for flow, c in zip(found, cost, strict=True):
            assert (flow.matrix.sum(0) == 1).all()
            assert flow.total_cost == pytest.approx((flow.matrix * c).sum(), rel=1e-5)
    totals = {kind: [flow.total_cost for flow in found] for kind, found in flows.items()}
    for best, other, worst in zip(totals["cheapest"], totals["random"], totals["costliest"], strict=True):
        assert best < other < worst
    assert (flows["identity"][0].index == [[0, 2, 4, 6], [1, 3, 5, 7]]).all()


def test_random_flows_are_redrawn_and_repeat_with_their_seed() -> None:
    def draws(seed: int) -> list[np.ndarray]:
        term, found = matching(assignment="random", seed=seed), []
        for _ in range(2):
            term.observe(outputs(STUDENT, 0), outputs(TEACHER, 1))
            found.append(term.rematch()[1].matrix)
        return found

    first, second = draws(0)
    assert (first != second).any() and (first != draws(1)[0]).any()
    assert (first == draws(0)[0]).all() and (second == draws(0)[1]).all()


def test_observing_in_batches_equals_observing_at_once() -> None:
    once, parts = matching(), matching()
    student, teacher = maps(STUDENT, 0), maps(TEACHER, 1)
    once.observe(student, teacher)
    for part in (slice(0, 2), slice(2, 5)):
        parts.observe([m[part] for m in student], [m[part] for m in teacher])
    for a, b in zip(once.rematch(), parts.rematch(), strict=True):
        assert (a.index == b.index).all() and a.total_cost == pytest.approx(b.total_cost)


def test_costs_are_observed_while_training() -> None:
    term, other = matching(observe_share=0.5), matching()
    student, teacher = outputs(STUDENT, 0), outputs(TEACHER, 1)
    for t in (term, other):
        t.observe(student, teacher)
        t.rematch()
    term.eval()(student, [teacher])
    with pytest.raises(RuntimeError, match="no images"):
        term.rematch()
    term.train()(student, [teacher])
    other.observe([m[:3] for m in student.features], [m[:3] for m in teacher.features])  # 2.5 of 5 images, rounded up
    assert [flow.total_cost for flow in term.rematch()] == [flow.total_cost for flow in other.rematch()]


def test_rematch_forgets_what_was_observed() -> None:
    term = matching()
    term.observe(maps(STUDENT, 0), maps(TEACHER, 1))
    term.rematch()
    with pytest.raises(RuntimeError, match="no images"):
        term.rematch()
    term.observe(maps(STUDENT, 2), maps(TEACHER, 3))
    fresh = matching()
    fresh.observe(maps(STUDENT, 2), maps(TEACHER, 3))
    assert all((a.index == b.index).all() for a, b in zip(term.rematch(), fresh.rematch(), strict=True))


def test_rematch_forgets_maps_that_are_not_finite() -> None:
    term = matched()
    before = [flow.index for flow in term.flows]
    term.observe([m * torch.nan for m in maps(STUDENT, 2)], maps(TEACHER, 3))
    with pytest.raises(ValueError, match="finite"):
        term.rematch()
    assert all((a.index == b).all() for a, b in zip(term.flows, before, strict=True))
    term.observe(maps(STUDENT, 2), maps(TEACHER, 3))
    assert all(np.isfinite(flow.total_cost) for flow in term.rematch())


def test_state_dict_restores_flows_margins_and_sums() -> None:
    term = matching()
    term.observe(maps(STUDENT, 0), maps(TEACHER, 1))
    term.rematch()
    term.observe(maps(STUDENT, 2), maps(TEACHER, 3))
    restored = ChannelMatching(STUDENT, TEACHER, [torch.zeros(t) for t in TEACHER])
    assert not restored.matched
    restored.load_state_dict(term.state_dict())
    student, teacher = outputs(STUDENT, 4), outputs(TEACHER, 5)
    assert restored.matched
    assert restored(student, [teacher]).item() == term(student, [teacher]).item()
    for a, b in zip(term.flows, restored.flows, strict=True):
        assert (a.index == b.index).all() and a.total_cost == b.total_cost
    for a, b in zip(term.rematch(), restored.rematch(), strict=True):
        assert (a.index == b.index).all()


def test_margins_are_measured_where_none_are_given() -> None:
    term = ChannelMatching(STUDENT, TEACHER, [None, torch.zeros(TEACHER[1])])
    teacher = maps(TEACHER, 1)
    term.observe(maps(STUDENT, 0), teacher)
    term.rematch()
    expected = [values[values < 0].mean().item() for values in teacher[0].transpose(0, 1).flatten(1)]
    np.testing.assert_allclose(term.stages[0].get_buffer("margin").numpy(), expected, rtol=1e-5)
    assert not term.stages[1].get_buffer("margin").any()
    later = [m - 1 for m in teacher]
    term.observe(maps(STUDENT, 0), later)
    term.rematch()  # what was measured before is forgotten
    expected = [values[values < 0].mean().item() for values in later[0].transpose(0, 1).flatten(1)]
    np.testing.assert_allclose(term.stages[0].get_buffer("margin").numpy(), expected, rtol=1e-5)


def test_random_drop_draws_from_the_generator_it_is_given() -> None:
    term, student, teacher = matched(reducer="rd"), outputs(STUDENT, 0), outputs(TEACHER, 1)
    values = []
    for seed in (1, 1, 2):
        term.generator = torch.Generator().manual_seed(seed)
        values.append(term(student, [teacher]).item())
    assert values[0] == values[1] != values[2]


def test_a_silent_teacher_gives_a_finite_relative_loss() -> None:
    term, teacher = matched(form="relative"), Outputs(torch.zeros(5, 3), [m * 0 - 1 for m in maps(TEACHER, 1)])
    assert term(outputs(STUDENT, 0), [teacher]).isfinite()


def test_gradient_reaches_the_student_and_the_adapters_only() -> None:
    term = matching("rd")
    student = Outputs(torch.zeros(5, 3), [m.requires_grad_() for m in maps(STUDENT, 0)])
    teacher = Outputs(torch.zeros(5, 3), [m.requires_grad_() for m in maps(TEACHER, 1)])
    term.observe(student, teacher)
    term.rematch()
    term(student, [teacher]).backward()
    assert all(m.grad is not None and m.grad.any() for m in student.features)
    assert all(m.grad is None for m in teacher.features)
    assert {name for name, p in term.named_parameters() if p.grad is not None} == {
        f"stages.{i}.adapter.{name}" for i in (0, 1) for name in ("weight", "bias")
    }


def test_a_wider_student_and_equal_widths() -> None:
    term = ChannelMatching((9, 8), (4, 8), [None, None])
    student, teacher = maps((9, 8), 0), maps((4, 8), 1)
    term.observe(student, teacher)
    wide, equal = term.rematch()
    assert wide.matrix.sum(0).tolist() == pytest.approx([2.25] * 4, abs=0.75)
    assert sorted(equal.index[0]) == list(range(8))
    assert torch.isfinite(term(Outputs(torch.zeros(5, 3), student), [Outputs(torch.zeros(5, 3), teacher)]))


def test_bf16() -> None:
    term = matching()
    student, teacher = outputs(STUDENT, 0), outputs(TEACHER, 1)
    term.observe(student, teacher)
    term.rematch()
    half = [Outputs(o.logits, [m.bfloat16() for m in o.features]) for o in (student, teacher)]
    with torch.autocast("cpu", torch.bfloat16):
        loss = term(half[0], [half[1]])
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(term(student, [teacher]).item(), rel=2e-2)


def test_maps_that_do_not_belong_together_are_refused() -> None:
    term, student, teacher = matched(), outputs(STUDENT, 0), outputs(TEACHER, 1)
    for wrong in ([m[0] for m in teacher.features], [m[:3] for m in teacher.features]):
        with pytest.raises(ValueError, match="stage 0 of a ChannelMatching compares maps"):
            term(student, [Outputs(teacher.logits, wrong)])
    with pytest.raises(ValueError, match="has one teacher and got 2"):
        term(student, [teacher, teacher])


def test_wrong_use_is_refused() -> None:
    with pytest.raises(RuntimeError, match="rematch"):
        matching()(outputs(STUDENT, 0), [outputs(TEACHER, 1)])
    with pytest.raises(RuntimeError, match="rematch"):
        _ = matching().flows
    with pytest.raises(ValueError, match="2 maps"):
        matching().observe(maps(STUDENT, 0)[:1], maps(TEACHER, 1)[:1])
    for capacity in ("truncate", "reference"):
        with pytest.raises(ValueError, match="single"):
            matching("sm", capacity=capacity)
    with pytest.raises(ValueError, match="amp"):
        matching("mean")
    with pytest.raises(ValueError, match="relative"):
        matching(form="max")
    for share in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="observe_share"):
            matching(observe_share=share)
    with pytest.raises(ValueError, match="unknown solver 'fast'"):
        matching(solver="fast")
    with pytest.raises(ValueError, match="costliest"):
        matching(assignment="best")
    with pytest.raises(ValueError, match="per stage"):
        ChannelMatching((4,), (8, 8), [None])
    with pytest.raises(ValueError, match="8 margins"):
        ChannelMatching((4,), (8,), [torch.zeros(7)])


@pytest.mark.parametrize("form", ["sum", "relative"])
@pytest.mark.parametrize("reducer", ["amp", "sp", "sp_mean", "sm"])
def test_a_compiled_term_has_the_loss_and_the_gradient_of_a_plain_one(reducer: str, form: str) -> None:
    """Traced as for a compiler, as one graph; flows may change without another trace."""
    term, teacher = matched(reducer=reducer, form=form, observe_share=0.5), outputs(TEACHER, 1)
    for tapped in teacher.features:
        tapped.requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(term, backend="aot_eager", fullgraph=True)
    for again in (False, True):
        found = []
        for call in (term, compiled):
            student = Outputs(torch.zeros(5, 3), [m.requires_grad_() for m in maps(STUDENT, 2)])
            with torch._dynamo.config.patch(error_on_recompile=again):
                loss = call(student, [teacher])
            loss.backward()
            found.append((loss.detach(), [m.grad for m in student.features]))
            assert all(m.grad is None for m in teacher.features)
        (plain, plain_gradient), (traced, traced_gradient) = found
        torch.testing.assert_close(traced, plain)
        torch.testing.assert_close(traced_gradient, plain_gradient)
        assert [int(stage.get_buffer("cost.count")) for stage in term.stages] == [6, 6]  # 3 of 5 images, in both calls
        term.rematch()


def make(collected: bool) -> tuple[nn.Module, Loss]:
    student, teacher = maps(STUDENT, 0, batch=8), maps(TEACHER, 1, batch=8)
    scale = nn.Linear(1, 1)
    nn.init.ones_(scale.weight)

    def loss(module: nn.Module, part: slice) -> Tensor:
        term, first = ChannelMatching(STUDENT, TEACHER, [None, None]), part.start == 0
        term.observe([m[part] for m in student], [m[part] for m in teacher])
        if collected:
            term.collect(first=first)
            assert [int(stage.get_buffer("cost.count")) for stage in term.stages] == [8 * first] * 2
        cost = sum(flow.total_cost for flow in term.rematch())
        margins = sum(float(stage.get_buffer("margin").sum()) for stage in term.stages)
        return module.get_parameter("weight").sum() * (cost + margins)

    return scale, loss


@pytest.mark.parametrize("collected", [False, True])
def test_flows_and_margins_are_those_of_all_ranks(collected: bool) -> None:
    check_two_ranks(partial(make, collected))


@pytest.mark.parametrize("form", ["sum", "relative"])
def test_a_batch_in_slices_has_the_loss_and_gradient_of_the_whole(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    term, teacher = matched(form=form), outputs(TEACHER, 3)
    found = []
    for size in (2**18, 2 * 4 * 36):  # all 5 images; 2 at a time of the first stage
        monkeypatch.setattr("mgd.losses.mgd.SLICE", size)
        student = Outputs(torch.zeros(5, 3), [m.requires_grad_() for m in maps(STUDENT, 2)])
        loss = term(student, [teacher])
        found.append((loss.detach(), torch.autograd.grad(loss, student.features)))
    torch.testing.assert_close(found[1], found[0])


def test_stage_weights_replace_those_of_the_form() -> None:
    student, teacher = outputs(STUDENT, 0), outputs(TEACHER, 1)

    def loss(*weights: float) -> Any:
        term = ChannelMatching(STUDENT, TEACHER, [None, None], stage_weights=weights)
        term.observe(student, teacher)
        term.rematch()
        return term(student, [teacher])

    torch.testing.assert_close(loss(2.0, 3.0), 2 * loss(1.0, 0.0) + 3 * loss(0.0, 1.0))


def test_random_flows_differ_between_stages_and_go_on_from_a_saved_state() -> None:
    term = ChannelMatching((4, 4), (8, 8), [None, None], assignment="random")
    student, teacher = maps((4, 4), 0), maps((8, 8), 1)
    term.observe(student, teacher)
    first, second = term.rematch()
    assert (first.matrix != second.matrix).any()
    restored = ChannelMatching((4, 4), (8, 8), [None, None], assignment="random")
    restored.load_state_dict(term.state_dict())
    for t in (term, restored):
        t.observe(student, teacher)
    for a, b in zip(term.rematch(), restored.rematch(), strict=True):
        assert (a.matrix == b.matrix).all()


def test_a_state_saved_before_the_first_rematch_has_no_flows() -> None:
    term = matching()
    term.load_state_dict(matching().state_dict())
    assert not term.matched
    with pytest.raises(RuntimeError, match="rematch"):
        term(outputs(STUDENT, 0), [outputs(TEACHER, 1)])


def test_flows_are_solved_by_the_solver_asked_for_and_loaded_ones_say_so() -> None:
    assert {flow.solver for flow in matched(solver="ortools").flows} == {"ortools"}
    assert {flow.solver for flow in matched(solver="auto").flows} == {"scipy"}
    term = matched()
    term.load_state_dict(term.state_dict())
    assert {flow.solver for flow in term.flows} == {"loaded"}


def test_margins_given_are_copied() -> None:
    given = [torch.zeros(t) for t in TEACHER]
    term = ChannelMatching(STUDENT, TEACHER, given)
    term.load_state_dict(matching().state_dict())
    assert not any(m.any() for m in given)


def test_the_published_sum_is_over_the_images_of_the_maps() -> None:
    student, teacher = outputs(STUDENT, 0), outputs(TEACHER, 1)
    term = matched()
    expected = term(student, [teacher]).item()
    dense = [Outputs(torch.zeros(20, 3), o.features) for o in (student, teacher)]  # four rows of logits per image
    assert term(dense[0], [dense[1]]).item() == pytest.approx(expected, rel=1e-6)


def test_what_was_observed_is_forgotten_where_it_cannot_be_matched() -> None:
    term, maps = ChannelMatching([2], [3], [None]), [torch.randn(2, c, 4, 4) for c in (2, 3)]
    term.observe([maps[0]], [maps[1] * torch.nan])
    with pytest.raises(ValueError, match="NaN"):
        term.rematch()
    term.observe([maps[0]], [maps[1]])
    term.rematch()
    assert term.matched and term.costs[0].isfinite().all()
