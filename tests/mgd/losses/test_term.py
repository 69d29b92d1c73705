from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mgd import Batch, Outputs, losses
from mgd.losses.term import EachTeacher, LogitTerm, Term, standardise
from tests.mgd.nets import built

TARGET = torch.tensor([0, 2, 1])
SHARES = torch.full((3, 1, 1), 1.0)


class Gap(Term):
    """The mean distance of the last maps, or of the logits."""

    def against(self, number: int, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        a, b = (o.features[-1] if o.features else o.logits for o in (student, teacher))
        return (a - b).abs().mean()


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def outputs(value: float) -> Outputs:
    return Outputs(torch.full((3, 4), value), [torch.full((3, 2, 2, 2), value)])


def test_teachers_count_by_their_weights() -> None:
    teachers = [outputs(1.0), outputs(5.0)]
    assert Gap()(outputs(0.0), teachers, Batch()).item() == 3.0
    assert Gap(teacher_weights=[3, 1])(outputs(0.0), teachers, Batch()).item() == 2.0
    with pytest.raises(ValueError, match="has 2 teacher weights and got 1 teachers"):
        Gap(teacher_weights=[3, 1])(outputs(0.0), teachers[:1], Batch())


@pytest.mark.parametrize("weights", [[], [1.0, 0.0], [1.0, -1.0], [math.nan], [math.inf]])
def test_weights_that_are_none_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="teacher_weights must be positive"):
        Gap(teacher_weights=weights)


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
    hypers = {name: t.Hyper for name, t in losses.LOSSES.items() if "temperature" in {f.name for f in fields(t.Hyper)}}
    assert hypers.keys() == {"crd", "dist", "dkd", "kd", "wsl"}
    for name, hyper in hypers.items():
        for temperature in (0.0, -1.0, math.nan, math.inf):
            with pytest.raises(ValueError, match=f"{name}: temperature must be positive"):
                hyper(temperature=temperature)


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
    for made, called in ((1, 2), (2, 1)):
        with pytest.raises(ValueError, match=f"has {made} teacher weights and got {called} teachers"):
            LAYERED[name](made)(outputs(0.5), [outputs(1.0)] * called, batch)
    with pytest.raises(ValueError, match="teacher"):
        LAYERED[name](0)


def test_the_relu_is_for_both_networks() -> None:
    term = Gap()
    term.rectify = True
    for student, teacher, gap in ((-1.0, 2.0, 2.0), (2.0, -1.0, 2.0), (-1.0, -5.0, 0.0)):
        assert term(outputs(student), [outputs(teacher)], Batch()).item() == gap


LOGIT_TERMS: dict[str, Any] = {
    name: t for name, t in losses.LOSSES.items() if issubclass(t, LogitTerm) and name != "meal"
}


@pytest.mark.parametrize("name", LOGIT_TERMS)
def test_standardised_terms_see_both_networks_standardised(name: str) -> None:
    student, teacher = 3 * randn(3, 4) + 1, 5 * randn(3, 4, seed=1)
    plain, standard = LOGIT_TERMS[name](), LOGIT_TERMS[name](standardised=True)
    expected = plain(Outputs(standardise(student)), [Outputs(standardise(teacher))], Batch(TARGET))
    torch.testing.assert_close(standard(Outputs(student), [Outputs(teacher)], Batch(TARGET)), expected)
    assert not torch.isclose(plain(Outputs(student), [Outputs(teacher)], Batch(TARGET)), expected)


@pytest.mark.parametrize("name", LOGIT_TERMS)
def test_logit_terms_weigh_their_teachers(name: str) -> None:
    student, teachers, batch = Outputs(randn(3, 4)), [Outputs(randn(3, 4, seed=s)) for s in (1, 2)], Batch(TARGET)
    term = LOGIT_TERMS[name](teacher_weights=[3, 1])
    each = [term.against(n, student, teacher, batch) for n, teacher in enumerate(teachers)]
    torch.testing.assert_close(term(student, teachers, batch), (3 * each[0] + each[1]) / 4)


def test_terms_default_to_what_their_functions_do() -> None:
    student, teacher = randn(3, 4), randn(3, 4, seed=1)
    for name in ("kd", "dist", "dkd", "wsl", "dml", "ssld"):
        function = losses.ssld if name == "ssld" else getattr(losses, name)
        value = LOGIT_TERMS[name]()(Outputs(student), [Outputs(teacher)], Batch(TARGET))
        torch.testing.assert_close(value, function(student, teacher, TARGET))
    torch.testing.assert_close(losses.kd(student, teacher), losses.kd(student, teacher, temperature=4.0))


WEIGHTS = {
    "afd": 50.0,
    "at": 1000.0,
    "crd": 0.8,
    "dist": 2.0,
    "fitnet": 100.0,
    "mgd": 5.0,
    "ofd": 1e-3,
    "similarity": 3000.0,
    "wsl": 2.5,
}


def test_weights_are_those_of_the_sources() -> None:
    assert {name: term.weight for name, term in losses.LOSSES.items() if term.weight != 1} == WEIGHTS


def test_what_terms_read() -> None:
    assert {n for n, t in losses.LOSSES.items() if t.rectified} == {
        "afd",
        "at",
        "crd",
        "fitnet",
        "masked_generative",
        "rkd",
        "similarity",
    }
    assert {n for n, t in losses.LOSSES.items() if not t.paired} == {"afd", "crd", "rkd", "similarity"}


def test_the_value_is_float32_whatever_the_logits_are() -> None:
    half = outputs(0.5)
    half = Outputs(half.logits.bfloat16(), [f.bfloat16() for f in half.features])
    assert Gap()(half, [outputs(1.0)], Batch()).dtype == torch.float32


@pytest.mark.parametrize("name", ["map_l2", "masked_generative", "fitnet", "ofd", "reviewkd", "afd", "crd"])
def test_terms_with_layers_weigh_their_teachers(name: str) -> None:
    student, teachers = outputs(0.5), [outputs(1.0), outputs(2.0)]
    torch.manual_seed(0)
    term = built(losses.LOSSES[name], student, teachers, 10, teacher_weights=[3.0, 1.0]).eval()
    batch = Batch(TARGET, torch.arange(3))
    each = [term.against(n, student, teacher, batch) for n, teacher in enumerate(teachers)]
    torch.testing.assert_close(term(student, teachers, batch), 0.75 * each[0] + 0.25 * each[1])


@pytest.mark.parametrize("name", ["map_l2", "masked_generative"])
def test_another_tap_than_the_last_is_compared(name: str) -> None:
    student, teacher = (
        Outputs(torch.zeros(2, 5), [randn(2, c, 4, 4, seed=s + c) for c in widths])
        for s, widths in ((0, (3, 4)), (10, (5, 6)))
    )
    torch.manual_seed(0)
    term = built(losses.LOSSES[name], student, [teacher], 10, tap=0).eval()
    alone = [Outputs(o.logits, o.features[:1]) for o in (student, teacher)]
    torch.manual_seed(0)
    other = built(losses.LOSSES[name], alone[0], alone[1:], 10).eval()
    torch.testing.assert_close(term(student, [teacher], Batch()), other(alone[0], alone[1:], Batch()))
