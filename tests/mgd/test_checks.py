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

from mgd import Batch, Outputs, bn_margin, channel_cost, losses, partial_l2, reduce_channels, solve_flow
from mgd.flow import ChannelCost, slots, solve_control
from mgd.losses.align import same_size
from mgd.losses.crd import candidates, crd
from mgd.losses.margin import MeasuredMargin, sum_partial_l2
from mgd.losses.masked_generative import draw_mask
from mgd.losses.reviewkd import context_loss

TARGET = torch.tensor([0, 4, 2, 1])
LOGIT_LOSSES: dict[str, Callable[..., Tensor]] = {
    "kd": losses.kd,
    "dkd": losses.dkd,
    "dist": losses.dist,
    "wsl": partial(losses.wsl, target=TARGET),
    "dml": losses.dml,
    "ssld": losses.ssld,
    "meal": losses.meal,
}
MAP_LOSSES: dict[str, Callable[..., Tensor]] = {
    "at": losses.at,
    "map_l2": losses.map_l2,
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
    with pytest.raises(ValueError, match=f"temperature must be positive; got {value}"):
        losses.LOSSES[name](temperature=value)


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
    "margin": (lambda: partial_l2(*torch.zeros(2, 2, 3, 4, 4), torch.zeros(1)), r"a margin \(3,\).*; got \(1,\)"),
    "slices": (
        lambda: sum_partial_l2(torch.zeros(5, 3, 4, 4), [(torch.zeros(2, 3, 4, 4), torch.zeros(3))]),
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


NEED_TWO = ("dkd", "meal")


@pytest.mark.parametrize("name", losses.LOSSES)
def test_one_class_is_refused_when_a_term_is_built_or_works(name: str) -> None:
    networks = [Outputs(torch.randn(4, 1, requires_grad=True), [torch.randn(4, c, 2, 2)]) for c in (3, 5)]
    kind = losses.LOSSES[name]
    if name in NEED_TWO:
        with pytest.raises(ValueError, match=f"{name} needs 2 classes or more; got .1, 1. of the student"):
            kind.from_outputs(networks[0], networks[1:], 20)
        return
    loss = kind.from_outputs(networks[0], networks[1:], 20)(
        *networks[:1], networks[1:], Batch(torch.zeros(4).long(), torch.arange(4))
    )
    assert loss.isfinite()


@pytest.mark.parametrize("name", LOGIT_LOSSES)
def test_a_teacher_of_other_classes_is_refused_when_a_term_of_logits_is_built(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} compares logits .*; got \(1, 5\) of the student, \(1, 1\)"):
        losses.LOSSES[name].from_outputs(Outputs(torch.zeros(2, 5)), [Outputs(torch.zeros(2, 1))], 20)


def test_checks_read_no_values_on_another_device() -> None:
    student, teacher = (torch.zeros(4, 5, device="meta") for _ in range(2))  # whose values cannot be read
    target = torch.zeros(4, dtype=torch.int64, device="meta")
    for name, call in LOGIT_LOSSES.items():
        value = call(student, teacher, target=target) if name in ("dkd", "wsl") else call(student, teacher)
        assert value.device.type == "meta"
    index, maps = torch.zeros(2, 3, dtype=torch.int64, device="meta"), torch.zeros(4, 6, 2, 2, device="meta")
    assert reduce_channels(maps, torch.zeros(6, device="meta"), index)[0].shape == (4, 3, 2, 2)
