from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError, dataclass, fields, replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from mgd import Batch, Distiller, Outputs, Probe, freeze, losses
from mgd.losses.term import EachTeacher, HyperParameters, LogitTerm, Term, standardise
from tests.mgd.nets import Seen, built, classifier, toy

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


class Notes(Gap):
    """Keep which of its calls came."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[object] = []

    def check_state(self) -> None:
        self.calls.append("checked")

    def collect(self, *, first: bool) -> None:
        self.calls.append(first)

    def forget(self) -> None:
        self.calls.append("forgotten")


def test_the_terms_of_teachers_are_checked_collected_and_forgotten_each() -> None:
    terms = [Notes(), Notes()]
    whole = EachTeacher([terms[0], nn.Identity(), terms[1]])
    whole.check_state()
    whole.collect(first=True)
    whole.collect(first=False)
    whole.forget()
    assert [term.calls for term in terms] == [["checked", True, False, "forgotten"]] * 2


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
    assert hypers.keys() == {"crd", "dist", "dkd", "kd", "wkd_logits", "wsl"}
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
    "wkd_maps": (losses.wkd_maps, (3, 2, 4, 4)),
    "wkd_logits": (lambda s, t: losses.wkd_logits(s, t, TARGET, cost=1 - torch.eye(4)), (3, 4)),
    "wttm": (losses.wttm, (3, 4)),
    "mlkd": (losses.mlkd, (3, 4)),
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
    "wkd_maps": lambda num: losses.WKDMaps(2, [2] * num),
    "wkd_logits": lambda num: losses.WKDLogits([1 - torch.eye(4)] * num),
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
    name: t for name, t in losses.LOSSES.items() if issubclass(t, LogitTerm) and name[0] != "m" and name != "wkd_logits"
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
    for name in ("kd", "dist", "dkd", "wsl", "dml", "ssld", "wttm"):
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
    "mlkd": 0.9,
    "ofd": 1e-3,
    "similarity": 3000.0,
    "wkd_maps": 0.02,
    "wsl": 2.5,
    "wttm": 4.0,
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
        "wkd_maps",
    }
    assert {n for n, t in losses.LOSSES.items() if not t.paired} == {"afd", "crd", "rkd", "similarity"}
    assert {n for n, t in losses.LOSSES.items() if t.label_free} == {"meal", "ssld"}
    assert {n for n, t in losses.LOSSES.items() if t.mutual} == {"dml", "udml"}


def test_the_value_is_float32_whatever_the_logits_are() -> None:
    half = outputs(0.5)
    half = Outputs(half.logits.bfloat16(), [f.bfloat16() for f in half.features])
    assert Gap()(half, [outputs(1.0)], Batch()).dtype == torch.float32


@pytest.mark.parametrize("name", ["map_l2", "wkd_maps", "masked_generative", "fitnet", "ofd", "reviewkd", "afd", "crd"])
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


@dataclass(frozen=True, kw_only=True)
class Words(HyperParameters):
    """Hyper-parameters with a word, one that may be left out, and a number."""

    word: Literal["one", "two"] = "one"
    maybe: Literal["three", "four"] | None = None
    number: float = 1.0


def test_words_that_a_literal_does_not_name_are_refused() -> None:
    found = Words(word="two", maybe="four", number=-1.0)
    assert (found.word, found.maybe, found.number) == ("two", "four", -1.0) and not found.without_effect()
    with pytest.raises(ValueError, match="unknown word 'three'; choose from one, two"):
        Words(word="three")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown maybe 'one'; choose from three, four"):
        Words(maybe="one")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="words"):
        Words(words="one")  # type: ignore[call-arg]
    with pytest.raises(FrozenInstanceError):
        found.word = "one"  # type: ignore[misc]


HYPERS = {name: term.Hyper for name, term in losses.LOSSES.items()}


@pytest.mark.parametrize("name", HYPERS)
def test_hyper_parameters_are_a_frozen_dataclass_of_types_and_defaults(name: str) -> None:
    hyper = HYPERS[name]()
    assert isinstance(hyper, HyperParameters) and HYPERS[name]() == hyper
    for field in fields(hyper):
        with pytest.raises(FrozenInstanceError):
            setattr(hyper, field.name, getattr(hyper, field.name))
        with pytest.raises(TypeError, match="positional"):
            HYPERS[name](getattr(hyper, field.name))
    with pytest.raises(TypeError, match="heads"):
        HYPERS[name](heads=2)
    assert hyper.without_effect().keys() <= {field.name for field in fields(hyper)} | {"weight"}


def networks(num: int = 1) -> list[Probe]:
    """Of a student and of teachers, with two taps each."""
    found = [Outputs(randn(2, 5, seed=n), [randn(2, c + n, 4, 4, seed=n) for c in (3, 4)]) for n in range(num + 1)]
    return [Probe(outputs, frozen=number > 0, classifier=classifier(outputs)) for number, outputs in enumerate(found)]


@pytest.mark.parametrize("name", HYPERS)
def test_a_term_is_built_with_its_hyper_parameters_or_the_defaults(name: str) -> None:
    kind, (student, *teachers) = losses.LOSSES[name], networks()
    assert kind.build(student, teachers, 20).hyper == kind.Hyper()
    hyper = kind.Hyper()
    assert kind.build(student, teachers, 20, hyper).hyper is hyper


@pytest.mark.parametrize("name", HYPERS)
def test_hyper_parameters_of_another_term_are_refused(name: str) -> None:
    kind, (student, *teachers) = losses.LOSSES[name], networks()
    for other in ("kd", "crd", "ofd"):
        if other != name:
            with pytest.raises(TypeError, match=f"{kind.__name__} takes a .*Hyper"):
                kind.build(student, teachers, 20, HYPERS[other]())


def test_hyper_parameters_come_as_one_or_by_name() -> None:
    hyper = losses.KD.Hyper(temperature=2.0)
    assert losses.KD(hyper).hyper is hyper and losses.KD(temperature=2.0).hyper == hyper
    with pytest.raises(TypeError, match="as one object or by name, not both"):
        losses.KD(hyper, temperature=2.0)
    for wrong in (losses.DKD.Hyper(), 2.0, {"temperature": 2.0}):
        with pytest.raises(TypeError, match=r"KD takes a KD\.Hyper"):
            losses.KD(wrong)
    with pytest.raises(TypeError, match="tau"):
        losses.KD(tau=2.0)


class Squares(LogitTerm):
    """A user's loss: nothing but hyper-parameters and a comparison."""

    @dataclass(frozen=True)
    class Hyper:
        scale: float = 3.0

    def compare(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None) -> Tensor:
        value: Tensor = self.hyper.scale * (student_logits - teacher_logits).square().mean()
        return value


def test_a_loss_of_logits_needs_hyper_parameters_and_a_comparison_only() -> None:
    images, target = randn(4, 3, 6, 6), torch.tensor([0, 1, 2, 0])
    student, teachers = toy(), [toy(8, seed=1), toy(8, seed=2)]
    logits = [net.eval()(images) for net in (student, *teachers)]
    each = [(logits[0] - other).square().mean() for other in logits[1:]]
    probes = [Probe(Outputs(z), weight=w) for z, w in zip(logits, (1.0, 3.0, 1.0), strict=True)]
    for hyper, scale in ((None, 3.0), (Squares.Hyper(scale=5.0), 5.0)):
        term = Squares.build(probes[0], probes[1:], 10, hyper)
        whole = Distiller(student, [freeze(net) for net in teachers], {"squares": (term, 2.0)}).eval()
        out = whole(images, target)
        expected = scale * (0.75 * each[0] + 0.25 * each[1])
        torch.testing.assert_close(out["squares"], expected)
        torch.testing.assert_close(out["loss"], 2 * expected)
        assert whole.update(0, [(images,)]) == {"squares": ({}, {})}
    assert Squares(scale=5.0).hyper == Squares.Hyper(scale=5.0)
    with pytest.raises(TypeError, match=r"Squares takes a Squares\.Hyper"):
        Squares.build(probes[0], probes[1:], 10, losses.KD.Hyper())
    with pytest.raises(ValueError, match=r"squares compares logits .*got \(1, 3\) of the student, \(1, 4\)"):
        Squares.build(probes[0], [Probe(Outputs(torch.zeros(2, 4)))], 10)


@pytest.mark.parametrize("name", sorted(losses.LOSSES.keys() - {"mgd"}))
def test_terms_without_flows_renew_nothing(name: str) -> None:
    student, teacher = networks()
    views = Seen([(student.outputs, [teacher.outputs])])
    assert losses.LOSSES[name].build(student, [teacher], 20).update(0, views) == ({}, {}) and not views.asked


@pytest.mark.parametrize("name", losses.LOSSES)
def test_equal_teachers_have_no_weights_and_others_those_of_their_probes(name: str) -> None:
    student, *teachers = networks(2)
    kind = losses.LOSSES[name]
    assert kind.build(student, teachers, 20).teacher_weights in (None, [1.0, 1.0])
    weighted = [replace(t, weight=w) for t, w in zip(teachers, (3.0, 1.0), strict=True)]
    assert kind.build(student, weighted, 20).teacher_weights == [3.0, 1.0]
    with pytest.raises(ValueError, match="teacher_weights must be positive"):
        kind.build(student, [weighted[0], replace(teachers[1], weight=-1.0)], 20)


@pytest.mark.parametrize("before_relu", [True, False])
@pytest.mark.parametrize("name", losses.LOSSES)
def test_maps_tapped_before_a_relu_pass_one_where_the_source_reads_behind_it(name: str, before_relu: bool) -> None:
    student, teacher = networks()
    student = Probe(student.outputs, frozen=False, before_relu=before_relu)
    term = losses.LOSSES[name].build(student, [teacher], 20)
    assert term.rectify == (before_relu and losses.LOSSES[name].rectified)
