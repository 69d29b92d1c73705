from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mgd import Batch, Outputs, losses
from mgd.losses.term import EachTeacher, LogitTerm, Term, standardise

TARGET = torch.tensor([0, 2, 1])
SHARES = torch.full((3, 1, 1), 1.0)


class Gap(Term):
    """The mean distance of the last maps, or of the logits."""

    def compare(self, number: int, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        a, b = (o.features[-1] if o.features else o.logits for o in (student, teacher))
        return (a - b).abs().mean()


def outputs(value: float) -> Outputs:
    return Outputs(torch.full((3, 4), value), [torch.full((3, 2, 2, 2), value)])


def test_teachers_count_by_their_weights() -> None:
    teachers = [outputs(1.0), outputs(5.0)]
    assert Gap()(outputs(0.0), teachers, Batch()).item() == 3.0
    assert Gap([3, 1])(outputs(0.0), teachers, Batch()).item() == 2.0
    with pytest.raises(ValueError, match="has 2 teacher weights and got 1 teachers"):
        Gap([3, 1])(outputs(0.0), teachers[:1], Batch())


@pytest.mark.parametrize("weights", [[], [1.0, 0.0], [1.0, -1.0], [math.nan], [math.inf]])
def test_weights_that_are_none_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="teacher_weights must be positive"):
        Gap(weights)


def test_each_teacher_may_have_a_term_of_its_own() -> None:
    class First(nn.Module):
        def forward(self, student: Outputs, teachers: list[Outputs], batch: Batch) -> Tensor:
            (teacher,) = teachers
            return 10 * teacher.logits.mean()

    term, teachers = EachTeacher([Gap(), First()], [1, 3]), [outputs(2.0), outputs(4.0)]
    assert term(outputs(0.0), teachers, Batch()).item() == pytest.approx((2 + 3 * 40) / 4)


def test_maps_pass_a_relu_where_they_should() -> None:
    term = Gap()
    assert term(outputs(-1.0), [outputs(2.0)], Batch()).item() == 3.0
    term.rectify = True
    assert term(outputs(-1.0), [outputs(2.0)], Batch()).item() == 2.0


def test_standardised_logits_have_mean_0_and_deviation_1() -> None:
    logits = torch.randn(5, 7) * 3 + 2
    got = standardise(logits)
    torch.testing.assert_close(got.mean(1), torch.zeros(5), atol=1e-6, rtol=0)
    torch.testing.assert_close(got.std(1, unbiased=False), torch.ones(5))
    for value in (4.0, 17.1, -0.3, 0.0):  # the mean of a thousand 17.1 is not 17.1
        assert not standardise(torch.full((2, 1000), value)).any()
    torch.testing.assert_close(standardise(-4 * logits.bfloat16()), -standardise(logits.bfloat16()))


def test_a_temperature_that_is_none_is_refused() -> None:
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="temperature must be positive"):
            LogitTerm(losses.kd, temperature=temperature)


FUNCTIONS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...]]] = {
    "kd": (losses.kd, (3, 4)),
    "dkd": (lambda s, t: losses.dkd(s, t, TARGET), (3, 4)),
    "dist": (losses.dist, (3, 4)),
    "wsl": (lambda s, t: losses.wsl(s, t, TARGET), (3, 4)),
    "dml": (losses.dml, (3, 4)),
    "ssld": (losses.ssld, (3, 4)),
    "meal": (losses.meal, (3, 4)),
    "rkd": (losses.rkd, (3, 4)),
    "at": (losses.at, (3, 2, 4, 4)),
    "map_l2": (losses.map_l2, (3, 2, 4, 4)),
    "afd": (lambda s, t: losses.afd([s], [t], SHARES), (3, 2, 4, 4)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_leave_the_teacher_alone(name: str) -> None:
    function, shape = FUNCTIONS[name]
    student, teacher = (torch.randn(shape, requires_grad=True) for _ in range(2))
    function(student, teacher).backward()
    assert student.grad is not None and student.grad.any()
    assert teacher.grad is None


LAYERED: dict[str, Callable[[int], Term]] = {
    "map_l2": lambda num: losses.MapL2(2, [2] * num),
    "masked_generative": lambda num: losses.MaskedGenerative(2, [2] * num),
    "crd": lambda num: losses.CRD(2, [2] * num, 10),
    "reviewkd": lambda num: losses.ReviewKD([2], [[2]] * num),
    "fitnet": lambda num: losses.FitNet([2], [[2]] * num),
    "ofd": lambda num: losses.OFD([2], [[2]] * num),
    "afd": lambda num: losses.AFD([2], [[2]] * num),
}


@pytest.mark.parametrize("name", LAYERED)
def test_terms_with_layers_know_how_many_teachers_they_were_built_for(name: str) -> None:
    batch = Batch(TARGET, torch.arange(3))
    for built, called in ((1, 2), (2, 1)):
        with pytest.raises(ValueError, match=f"has {built} teacher weights and got {called} teachers"):
            LAYERED[name](built)(outputs(0.5), [outputs(1.0)] * called, batch)
    with pytest.raises(ValueError, match="teacher"):
        LAYERED[name](0)
