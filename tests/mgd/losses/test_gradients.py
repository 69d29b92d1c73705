"""Whatever the logits and maps are: where a term's loss is finite, so is its gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from mgd import Batch, ChannelMatching, Outputs, losses
from mgd.losses import LOSSES, Term, standardise
from tests.mgd.nets import built, ready

Change = Callable[[Tensor], Tensor]


def first(x: Tensor, factor: float) -> Tensor:
    """Scale the first image alone."""
    return torch.cat([factor * x[:1], x[1:]])


def shifted(x: Tensor, gap: float) -> Tensor:
    """Lower the last class, or channel, of all images."""
    x = x.clone()
    x[:, -1] -= gap
    return x


LOGITS: dict[str, Change] = {
    "usual": lambda z: z,
    "gap 9": lambda z: shifted(z, 9.2),
    "gap 90": lambda z: shifted(z, 92.0),
    "gap 95": lambda z: shifted(z, 95.0),
    "gap 1900": lambda z: shifted(z, 1900.0),
    "gap 1e30": lambda z: shifted(z, 1e30),
    "lead 1000": lambda z: shifted(z, -1000.0),
    "constant": lambda z: 0 * z + 17.1,
    "nearly constant": lambda z: 0.3 + 1e-6 * z,
    "equal images": lambda z: z[:1].expand_as(z),
    "one image tiny": lambda z: first(z, 1e-25),
    **{f"times {s:g}": lambda z, s=s: s * z for s in (1e-40, 1e-20, 1e-8, 1e8, 1e18, 1e30)},  # type: ignore[misc]
}
MAPS: dict[str, Change] = {
    "usual": lambda m: m,
    "zero": lambda m: 0 * m,
    "constant": lambda m: 0 * m + 0.7,
    "negative": lambda m: -m.abs() - 1,
    "equal images": lambda m: m[:1].expand_as(m),
    "nearly equal images": lambda m: m[:1] + 1e-7 * m,
    "an image of zeros": lambda m: first(m, 0.0),
    "one image tiny": lambda m: first(m, 1e-25),
    "a channel far below": lambda m: shifted(m, 1e4),
    **{f"times {s:g}": lambda m, s=s: s * m for s in (1e-40, 1e-20, 1e-8, 1e8, 1e18)},  # type: ignore[misc]
}


def outputs(images: int, seed: int, widths: tuple[int, int], logits: Change, maps: Change) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    features = [torch.randn(images, c, s, s, generator=generator) for c, s in zip(widths, (4, 2), strict=True)]
    made = [maps(m).requires_grad_() for m in features]
    return Outputs(logits(torch.randn(images, 3, generator=generator)).requires_grad_(), made)


def check(make: Callable[[Outputs, Outputs], torch.nn.Module], pair: list[Outputs], what: str) -> None:
    student, teacher = pair
    torch.manual_seed(0)
    term = make(student, teacher)
    images = len(student.logits)
    loss = term(student, [teacher], Batch(torch.arange(images) % 3, torch.arange(images)))
    inputs = [x for x in (student.logits, *student.features, *term.parameters()) if x.requires_grad]
    gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
    finite = all(bool(g.isfinite().all()) for g in gradients if g is not None)
    assert finite or not loss.isfinite(), f"{what}: a loss of {loss.item()} has a gradient that is not finite"
    assert loss.isfinite() or "1e+18" in what or "1e+30" in what, f"{what}: the loss is {loss.item()}"


def hypers(name: str) -> set[str]:
    """Names of a term's hyper-parameters."""
    return {field.name for field in fields(LOSSES[name].Hyper)}


def variants(name: str) -> list[dict[str, Any]]:
    known = hypers(name)
    scales = [{"temperature": t} for t in (0.1, 1.0, 20.0)] if "temperature" in known and name != "crd" else [{}]
    both = [{"symmetric": True}] if "symmetric" in known else []
    return [*scales, *both, *([{"standardised": True}] if "standardised" in known else [])]


def pairs(conditions: dict[str, Change]) -> list[tuple[str, str]]:
    """The condition for the student alone, and for both."""
    return [(a, b) for a in conditions for b in {"usual": 0, a: 0}]


@pytest.mark.parametrize("options", [{}, {"temperature": 3.0}, {"symmetric": True}])
@pytest.mark.parametrize("name", ["ce", "kd", "dkd", "dml", "ssld", "wsl", "wttm", "meal"])
def test_a_class_left_out_by_minus_infinity_is_as_one_that_is_not_there(name: str, options: dict[str, float]) -> None:
    if not options.keys() <= hypers(name):
        return
    function: Any = torch.nn.functional.cross_entropy if name == "ce" else getattr(losses, name)
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, 3, generator=generator).requires_grad_() for _ in range(2))
    target = torch.tensor([0, 1, 2, 1])

    def loss(s: Tensor, t: Tensor) -> Tensor:
        value: Tensor = function(s, target) if name == "ce" else function(s, t, target, **options)
        return value

    expected = loss(student, teacher)
    found = loss(*(torch.cat([z, torch.full((4, 1), -torch.inf)], dim=1) for z in (student, teacher)))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, student), torch.autograd.grad(expected, student))
    if name != "ce":
        loss(student, torch.cat([teacher[:, :2], torch.full((4, 1), -torch.inf)], dim=1)).backward()
        assert student.grad is not None and student.grad.isfinite().all()


@pytest.mark.parametrize("standardised", [False, True])
@pytest.mark.parametrize("name", [name for name in LOSSES if "standardised" in hypers(name)])
def test_a_loss_of_logits_that_are_nan_is_nan(name: str, standardised: bool) -> None:
    good, bad = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    bad[1, 2] = torch.nan
    term = built(LOSSES[name], Outputs(good), [Outputs(good)], 20, standardised=standardised)
    for pair in ((good, bad), (bad, good), (bad, bad)):
        assert term(Outputs(pair[0]), [Outputs(pair[1])], Batch(torch.tensor([0, 1, 2, 1]))).isnan()


def reads_logits(name: str) -> bool:
    return "maps" not in LOSSES[name].needs


@pytest.mark.parametrize("name", [name for name in LOSSES if reads_logits(name)])
def test_of_hard_logits(name: str) -> None:
    build: type[Term] = LOSSES[name]
    for options in variants(name):
        for images in (4, 1):
            for a, b in pairs(LOGITS):
                both = [
                    outputs(images, 0, (4, 6), LOGITS[a], lambda m: m),
                    outputs(images, 1, (5, 9), LOGITS[b], lambda m: m),
                ]
                bare = [Outputs(o.logits) for o in both]
                check(lambda s, t, o=options: built(build, s, [t], 20, **o), bare, f"{name} {options} {a}, {b}")  # type: ignore[misc]


@pytest.mark.parametrize("name", [name for name, term in LOSSES.items() if "maps" in term.needs | term.uses])
def test_of_hard_maps(name: str) -> None:
    build: type[Term] = LOSSES[name]
    for images in (4, 2) if name == "afd" else (4, 1):
        for a, b in pairs(MAPS):
            both = [outputs(images, 0, (4, 6), lambda z: z, MAPS[a]), outputs(images, 1, (5, 9), lambda z: z, MAPS[b])]
            check(lambda s, t: ready(build, s, [t], 20), both, f"{name} {images} {a}, {b}")


@pytest.mark.parametrize("form", ["sum", "mean", "relative"])
@pytest.mark.parametrize("reducer", ["amp", "sp_mean", "rd"])
def test_of_matched_channels(reducer: str, form: str) -> None:
    def make(student: Outputs, teacher: Outputs) -> ChannelMatching:
        term = ChannelMatching([4, 6], [5, 9], [None, None], form=form, reducer=reducer)
        term.observe(student, teacher)
        term.rematch()
        return term

    for a, b in pairs(MAPS):
        both = [outputs(3, 0, (4, 6), lambda z: z, MAPS[a]), outputs(3, 1, (5, 9), lambda z: z, MAPS[b])]
        check(make, both, f"mgd {reducer} {form} {a}, {b}")


def test_standardised_logits_of_any_scale_are_those_of_scale_1() -> None:
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    expected = (logits - logits.mean(1, keepdim=True)) / logits.std(1, keepdim=True, unbiased=False)
    for scale in (1e-25, 1e-8, 1.0, 1e8, 1e30):
        torch.testing.assert_close(standardise(scale * logits), expected)


def test_dist_takes_a_class_that_is_left_out_as_one_that_does_not_vary() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, 3, generator=generator).requires_grad_() for _ in range(2))
    left_out = torch.full((4, 1), -torch.inf)
    for gamma, beta in ((1.0, 0.0), (0.0, 1.0)):
        found = losses.dist(*(torch.cat([z, left_out], 1) for z in (student, teacher)), beta=beta, gamma=gamma)
        p, q = (torch.cat([z.softmax(1), torch.zeros(4, 1)], 1) for z in (student, teacher))
        if gamma:  # a correlation of 0 for the class beside those of three
            expected = 1 - sum(torch.corrcoef(torch.stack([p[:, k], q[:, k]]))[0, 1] for k in range(3)) / 4
        else:
            expected = 1 - sum(torch.corrcoef(torch.stack([p[i], q[i]]))[0, 1] for i in range(4)) / 4
        torch.testing.assert_close(found, expected)
        (gradient,) = torch.autograd.grad(found, student)
        assert gradient.isfinite().all()
