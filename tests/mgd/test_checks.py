"""Public functions refuse what would broadcast, or what they cannot mean, in one sentence."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mgd import (
    Batch,
    ChannelMatching,
    Ensemble,
    Outputs,
    View,
    bn_margin,
    channel_cost,
    losses,
    partial_l2,
    reduce_channels,
    solve_flow,
    solve_plan,
)
from mgd.flow import ChannelCost, slots, solve_control
from mgd.losses.align import same_size
from mgd.losses.crd import candidates, crd
from mgd.losses.margin import MeasuredMargin, sum_partial_l2
from mgd.losses.masked_generative import draw_mask
from mgd.losses.reviewkd import context_loss
from tests.mgd.nets import built, ready

TARGET = torch.tensor([0, 4, 2, 1])
MAPS = torch.zeros(2, 3, 4, 4)
LOGIT_LOSSES: dict[str, Callable[..., Tensor]] = {
    "kd": losses.kd,
    "dkd": losses.dkd,
    "dist": losses.dist,
    "wsl": partial(losses.wsl, target=TARGET),
    "dml": losses.dml,
    "ssld": losses.ssld,
    "meal": losses.meal,
    "wttm": losses.wttm,
    "mlkd": losses.mlkd,
}
MAP_LOSSES: dict[str, Callable[..., Tensor]] = {
    "at": losses.at,
    "map_l2": losses.map_l2,
    "wkd_maps": losses.wkd_maps,
    "similarity": losses.similarity,
    "context_loss": context_loss,
    "afd": lambda s, t: losses.afd([s], [t], torch.ones(len(s), 1, 1)),
    "channel_cost": channel_cost,
    "partial_l2": lambda s, t: partial_l2(s, t, torch.zeros(t.shape[1:2])),
}


@pytest.mark.parametrize("name", LOGIT_LOSSES)
@pytest.mark.parametrize(
    ("student", "teacher"),
    [((4, 5), (1, 5)), ((4, 5), (4, 1)), ((4, 1), (4, 5)), ((1, 5), (4, 5)), ((4, 5), (5,)), ((5,), (5,)),
     ((0, 5), (0, 5)), ((4, 5), (4, 6)), ((), ())],
)  # fmt: skip
def test_logits_of_other_shapes(name: str, student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
    shapes = re.escape(f"got {student} of the student, {teacher} of the teacher")
    with pytest.raises(ValueError, match=rf"{name} compares logits \(B, K\) of the same images.*{shapes}"):
        LOGIT_LOSSES[name](torch.zeros(student), torch.zeros(teacher))
    LOGIT_LOSSES[name](torch.zeros(4, 5), torch.zeros(4, 5))


@pytest.mark.parametrize("name", [*LOGIT_LOSSES, "standardise", "ce"])
def test_dense_logits_say_how_to_flatten(name: str) -> None:
    dense = torch.randn(2, 5, 3, 3)
    alone = {
        "standardise": losses.standardise,
        "ce": lambda z: losses.CE()(Outputs(z), [], Batch(torch.zeros(2, 3, 3).long())),
    }
    call = partial(alone[name], dense) if name in alone else partial(LOGIT_LOSSES[name], dense, dense)
    with pytest.raises(ValueError, match=r"logits\.movedim\(1, -1\)\.flatten\(0, -2\)"):
        call()
    assert dense.movedim(1, -1).flatten(0, -2).shape == (18, 5)
    assert torch.equal(dense.movedim(1, -1).flatten(0, -2)[4], dense[0, :, 1, 1])


@pytest.mark.parametrize("name", LOGIT_LOSSES)
def test_what_is_no_tensor(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name}: teacher must be a tensor; got a ndarray"):
        LOGIT_LOSSES[name](torch.zeros(4, 5), [np.zeros((4, 5))] if name == "meal" else np.zeros((4, 5)))


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["kd", "dkd", "dist", "wsl"])
def test_temperatures(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}: temperature must be positive; got {value}"):
        LOGIT_LOSSES[name](torch.zeros(4, 5), torch.zeros(4, 5), temperature=value)
    term: Any = losses.LOSSES[name]
    with pytest.raises(ValueError, match=f"temperature must be positive; got {value}"):
        term(temperature=value)


@pytest.mark.parametrize(
    ("name", "target", "message"),
    [
        ("dkd", torch.tensor([0, 1, 5, 2]), r"dkd needs class indices in \[0, 5\); got 0 to 5"),
        ("wsl", torch.tensor([0, -100, 1, 2]), r"wsl needs class indices in \[0, 5\); got -100 to 2"),
        ("dkd", torch.tensor([0, 1, 2]), r"a class index per image, \(4,\) int64; got a target \(3,\) of torch.int64"),
        ("dkd", torch.zeros(4), "of torch.float32"),
        ("wsl", torch.zeros(4, dtype=torch.int32), "of torch.int32"),
        ("wsl", torch.zeros(4, 6), r"or probabilities \(4, 5\) of mixed images; got a target \(4, 6\)"),
        ("dkd", torch.full((4, 5), 0.2), r"got a target \(4, 5\)"),
        ("ce", torch.tensor([0, 1, 5, 2]), r"ce needs class indices in \[0, 5\)"),
        ("ce", torch.zeros(3).long(), r"got a target \(3,\)"),
    ],
)
def test_targets(name: str, target: Tensor, message: str) -> None:
    logits = torch.zeros(4, 5)
    term = losses.LOSSES[name]()
    with pytest.raises(ValueError, match=message):
        term(Outputs(logits), [Outputs(logits)], Batch(target))


def test_mixed_labels_are_taken_where_they_mean_something() -> None:
    student, teacher = torch.randn(2, 4, 5)
    sure = torch.eye(5)[TARGET]
    torch.testing.assert_close(losses.wsl(student, teacher, sure), losses.wsl(student, teacher, TARGET))


@pytest.mark.parametrize("name", MAP_LOSSES)
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ((4, 3, 2, 2), (1, 3, 2, 2)),
        ((1, 3, 2, 2), (4, 3, 2, 2)),
        ((4, 3), (4, 3)),
        ((4, 4, 3), (4, 4, 3)),
        ((0, 3, 2, 2),) * 2,
    ],
)
def test_maps_of_other_shapes(name: str, student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=rf"{name} compares maps \(B, C, H, W\) of the same images.*; got \({student[0]}"
    ):
        MAP_LOSSES[name](torch.zeros(student), torch.zeros(teacher))
    MAP_LOSSES[name](torch.zeros(4, 3, 2, 2), torch.zeros(4, 3, 2, 2))


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "channels": (lambda: losses.map_l2(torch.zeros(2, 3, 4, 4), torch.zeros(2, 1, 4, 4)), "images and channels"),
    "sizes": (lambda: context_loss(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4), sizes=(0,)), "at least 1"),
    "two maps": (lambda: same_size(torch.zeros(2, 3, 4, 4), torch.zeros(1, 3, 4, 4)), "same images"),
    "embeddings": (lambda: losses.rkd(torch.zeros(4, 3), torch.zeros(1, 3)), r"embeddings .* got \(4, 3\)"),
    "embedding weights": (lambda: losses.rkd(torch.zeros(4, 3), torch.zeros(4, 3), angle=-1), "rkd: angle"),
    "attention": (
        lambda: losses.afd([torch.zeros(4, 3, 2, 2)] * 2, [torch.zeros(4, 3, 2, 2)], torch.ones(4, 1, 1)),
        r"\(4, 1, 2\)",
    ),
    "no taps": (lambda: losses.afd([], [torch.zeros(4, 3, 2, 2)], torch.ones(4, 1, 1)), "at least one each"),
    "alpha": (lambda: losses.dkd(torch.zeros(4, 5), torch.zeros(4, 5), alpha=-1), "dkd: alpha must be at least 0"),
    "beta": (lambda: losses.dist(torch.zeros(4, 5), torch.zeros(4, 5), beta=math.nan), "dist: beta"),
    "weights": (
        lambda: losses.meal(torch.zeros(4, 5), [torch.zeros(4, 5)], teacher_weights=[-1.0]),
        "teacher_weights must be positive",
    ),
    "scores": (lambda: crd(torch.zeros(4, 1), torch.zeros(()), num_images=9), "K >= 1"),
    "normaliser": (lambda: crd(torch.zeros(4, 3), torch.zeros(4), num_images=9), "scalar log_normaliser"),
    "negatives": (lambda: candidates(0, 10, 9), r"count in \[1, num_images\]"),
    "mask": (lambda: draw_mask(torch.zeros(2, 3, 4, 4), 0.5, "rows"), "unknown mask 'rows'"),
    "ratio": (lambda: draw_mask(torch.zeros(2, 3, 4, 4), 1.0), r"in \[0, 1\)"),
    "margin": (lambda: partial_l2(MAPS, MAPS, torch.zeros(1)), r"a margin \(3,\).*; got \(1,\)"),
    "slices": (
        lambda: sum_partial_l2(torch.zeros(5, 3, 4, 4), torch.zeros(2, 3, 4, 4), lambda part: (part, torch.zeros(3))),
        "each of 5 images; got 2",
    ),
    "measured": (lambda: MeasuredMargin(3).update(torch.zeros(2, 1, 4, 4)), r"a margin \(1,\); got \(3,\)"),
    "resolution": (lambda: ChannelCost(3, 3).update(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 1, 1)), "resolution"),
    "margins": (
        lambda: reduce_channels(torch.zeros(2, 3, 4, 4), torch.zeros(1), torch.tensor([[0, 1]])),
        r"a margin \(3,\); got \(1,\)",
    ),
    "tokens": (
        lambda: reduce_channels(torch.zeros(2, 3, 4), torch.zeros(3), torch.tensor([[0, 1]])),
        r"\(B, C, H, W\)",
    ),
    "member": (
        lambda: reduce_channels(torch.zeros(2, 3, 4, 4), torch.zeros(3), torch.tensor([[0, 3]])),
        "names teacher channel 3; the maps have 3",
    ),
    "index": (
        lambda: reduce_channels(torch.zeros(2, 3, 4, 4), torch.zeros(3), torch.tensor([0, 1])),
        r"\(G, S\) int64; got \(2,\)",
    ),
    "slots": (lambda: slots(0, 4), "channels on both sides"),
    "costs": (lambda: solve_flow(np.zeros((2, 0))), "channels on both sides"),
    "control": (lambda: solve_control(np.zeros((2, 4)), "best", ()), "cheapest, costliest, identity, random"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_else_is_refused(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_a_layer_without_weights_of_a_norm_has_no_margin() -> None:
    with pytest.raises(TypeError, match="bn_margin needs a batch normalisation; got a Conv2d"):
        bn_margin(nn.Conv2d(3, 4, 1))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["kd", "dist", "dml", "ssld", "meal"])
def test_a_number_in_the_place_of_the_target(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name}: the third argument is the target, .*; got a float: pass what"):
        LOGIT_LOSSES[name](torch.zeros(4, 5), torch.zeros(4, 5), 2.0)


@pytest.mark.parametrize("name", [*LOGIT_LOSSES, *MAP_LOSSES])
@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_numbers_that_are_not_floating_point(name: str, dtype: torch.dtype) -> None:
    call, shape = (LOGIT_LOSSES[name], (4, 5)) if name in LOGIT_LOSSES else (MAP_LOSSES[name], (4, 3, 2, 2))
    with pytest.raises(TypeError, match=f"teacher must hold floating-point numbers; got {dtype}"):
        call(torch.zeros(shape), torch.zeros(shape, dtype=dtype))


def test_teachers_logits_may_come_one_by_one() -> None:
    student, *teachers = torch.randn(3, 4, 5)
    assert losses.meal(student, (t for t in teachers)) == losses.meal(student, teachers)  # type: ignore[arg-type]


def test_probabilities_of_any_type_give_a_loss_in_float32() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        target = torch.full((4, 5), 0.25, dtype=dtype)
        loss = losses.CE()(Outputs(torch.zeros(4, 5)), [], Batch(target))
        assert loss.dtype == torch.float32 and loss.item() == pytest.approx(1.25 * math.log(5))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (torch.tensor([3]), r"a position in the data set per image, \(4,\) int64; got \(1,\)"),
        (torch.arange(4).int(), "of torch.int32"),
        (torch.tensor([0, 1, 2, 9]), "built for 9 images; got positions 0 to 9"),
        (torch.tensor([0, 1, 2, -1]), "got positions -1 to 2"),
    ],
)
def test_positions_in_the_data_set(index: Tensor, message: str) -> None:
    logits = Outputs(torch.randn(4, 5))
    with pytest.raises(ValueError, match=message):
        losses.CRD(5, [5], 9, num_negatives=4)(logits, [logits], Batch(index=index))


@pytest.mark.parametrize("name", [name for name, term in losses.LOSSES.items() if "maps" in term.needs])
def test_a_teacher_of_one_channel_or_none_is_no_map_to_compare(name: str) -> None:
    student = Outputs(torch.zeros(4, 5), [torch.randn(4, 3, 2, 2)])
    teachers = [Outputs(torch.zeros(4, 5), [torch.randn(4, c, 2, 2)]) for c in (6, 1)]
    term = ready(losses.LOSSES[name], student, teachers[:1], 20)
    if name not in ("at", "similarity", "afd"):  # which compare maps of any width, or refuse by a product of matrices
        found = r"got \(4, 6, 2, 2\) of the student, \(4, 1, 2, 2\) of the teacher"
        with pytest.raises(ValueError, match="got maps with 3 and 1" if name == "mgd" else found):
            term(student, teachers[1:], Batch())
    none = "got 1 of the student, 0 of the teacher" if name == "mgd" else "compares feature maps: tap both networks"
    with pytest.raises(ValueError, match=none):
        term(student, [Outputs(torch.zeros(4, 5))], Batch())


def test_maps_of_a_matching() -> None:
    term = ChannelMatching([2], [3], [None])
    student, teacher = [torch.randn(4, 2, 2, 2)], [torch.randn(4, 3, 2, 2)]
    with pytest.raises(ValueError, match=r"stage 0 .* has 2 channels of the student and 3 of the teacher; .* 3 and 2"):
        term.observe(teacher, student)
    with pytest.raises(ValueError, match=r"stage 0 .* compares maps \(B, C, H, W\)"):
        term.observe([student[0].flatten(2)], [teacher[0].flatten(2)])
    with pytest.raises(ValueError, match="stage_weights must be at least 0; got nan"):
        ChannelMatching([2], [3], [None], stage_weights=[math.nan])


def test_the_index_of_a_flow_as_an_array() -> None:
    maps, flow = torch.randn(2, 5, 2, 2), solve_flow(np.arange(10.0).reshape(2, 5))
    expected = reduce_channels(maps, torch.zeros(5), flow)[0]
    index: Any = flow.index  # as an untyped caller may pass it
    assert torch.equal(reduce_channels(maps, torch.zeros(5), index)[0], expected)


def test_networks_of_other_classes_are_no_ensemble() -> None:
    networks = [nn.Sequential(nn.Flatten(), nn.Linear(12, k)) for k in (3, 1)]
    with pytest.raises(ValueError, match=r"one number of classes; got \[\(2, 3\), \(2, 1\)\]"):
        Ensemble(networks)(torch.zeros(2, 3, 2, 2))


@pytest.mark.parametrize("given", [{"own_std": (1, 0, 1)}, {"std": (1, -1, 1)}, {"mean": (0,)}, {"size": 0}])
def test_a_view_that_cannot_be(given: dict[str, Any]) -> None:
    usual: dict[str, Any] = {"mean": (0, 0, 0), "std": (1, 1, 1), "own_mean": (0, 0, 0), "own_std": (1, 1, 1)}
    View(**usual)
    with pytest.raises(ValueError, match="View"):
        View(**usual | given)


NEED_TWO = ("dkd", "meal", "wkd_logits")


@pytest.mark.parametrize("name", losses.LOSSES)
def test_one_class_is_refused_when_a_term_is_built_or_works(name: str) -> None:
    networks = [Outputs(torch.randn(4, 1, requires_grad=True), [torch.randn(4, c, 2, 2)]) for c in (3, 5)]
    kind = losses.LOSSES[name]
    if name in NEED_TWO:
        with pytest.raises(ValueError, match=f"{name} needs 2 classes or more; got .1, 1. of the student"):
            built(kind, networks[0], networks[1:], 20)
        return
    loss = ready(kind, networks[0], networks[1:], 20)(
        *networks[:1], networks[1:], Batch(torch.zeros(4).long(), torch.arange(4))
    )
    assert loss.isfinite()


@pytest.mark.parametrize("name", LOGIT_LOSSES)
def test_a_teacher_of_other_classes_is_refused_when_a_term_of_logits_is_built(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} compares logits .*; got \(1, 5\) of the student, \(1, 1\)"):
        built(losses.LOSSES[name], Outputs(torch.zeros(2, 5)), [Outputs(torch.zeros(2, 1))], 20)


def test_checks_read_no_values_on_another_device() -> None:
    student, teacher = (torch.zeros(4, 5, device="meta") for _ in range(2))  # whose values cannot be read
    target = torch.zeros(4, dtype=torch.int64, device="meta")
    for name, call in LOGIT_LOSSES.items():
        value = call(student, teacher, target=target) if name in ("dkd", "wsl") else call(student, teacher)
        assert value.device.type == "meta"
    index, maps = torch.zeros(2, 3, dtype=torch.int64, device="meta"), torch.zeros(4, 6, 2, 2, device="meta")
    assert reduce_channels(maps, torch.zeros(6, device="meta"), index)[0].shape == (4, 3, 2, 2)


def test_a_margin_by_pixel_is_none_of_channels() -> None:
    maps = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"reduce_channels needs a margin \(3,\); got \(2, 3, 4, 4\)"):
        reduce_channels(maps, maps, torch.tensor([[0, 1]]))


LOGITS = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("function", "values", "message"),
    [
        (partial(losses.kd, LOGITS, LOGITS), {"temperature": "2"}, "temperature must be a number; got '2'"),
        (partial(losses.wkd_maps, MAPS, MAPS), {"grid": 1.5}, "wkd_maps: grid must be a whole number; got 1.5"),
        (partial(losses.wkd_maps, MAPS, MAPS), {"grid": True}, "wkd_maps: grid must be a whole number; got True"),
        (partial(losses.wkd_maps, MAPS, MAPS), {"grid": 0}, "wkd_maps: grid must be positive; got 0"),
        (partial(losses.mlkd, LOGITS, LOGITS), {"temperatures": 4.0}, "must be a list of numbers; got 4.0"),
        (partial(solve_plan, [[1.0]]), {"epsilon": "small"}, "solve_plan: epsilon must be a number; got 'small'"),
        (partial(solve_plan, [["a"]]), {"epsilon": 1}, "cost must be a matrix .* of numbers, with rows of one length"),
        (partial(solve_flow, [[1], [1, 2]]), {}, "cost must be a matrix .* of numbers, with rows of one length"),
    ],
)
def test_numbers_of_another_kind_are_refused(
    function: Callable[..., Any], values: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        function(**values)


def test_a_cost_between_classes_that_the_transport_cannot_hold_is_refused() -> None:
    logits, cost = torch.randn(2, 3), 1 - torch.eye(3)
    assert losses.wkd_logits(logits, logits, cost=2 * cost).isfinite()
    for wrong in (-cost, 3 * cost, cost * math.nan):
        with pytest.raises(ValueError, match="needs costs from 0 to 40 epsilon, 2 here"):
            losses.wkd_logits(logits, logits, cost=wrong)
