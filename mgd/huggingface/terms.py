"""The terms of a `DistillationTrainer`, and the taps of student and teacher."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mgd.losses import CE, KD, LOSSES, HyperParameters, Term
from mgd.taps import Taps, find_taps, pair_taps, probe
from mgd.teachers import Frozen, freeze

Weight = float | Callable[[int], float]
Said = Weight | None | nn.Module | HyperParameters | tuple[nn.Module | HyperParameters | None, Weight | None]
RELUS = ("ReLU", "ReLU6")


def plain_terms(temperature: float, lambda_param: float, label_smoothing: float) -> dict[str, tuple[nn.Module, Weight]]:
    """Return the terms of (1 - lambda) * cross-entropy + lambda * tau^2 KL(teacher || student).

    Args:
        temperature: tau > 0.
        lambda_param: in [0, 1].
        label_smoothing: of the cross-entropy, in [0, 1).

    Raises:
        ValueError: a value is outside its range.
        TypeError: the temperature is not a number.
    """
    if not is_number(lambda_param) or not 0 <= lambda_param <= 1:
        raise ValueError(f"lambda_param must be between 0 (labels alone) and 1 (teacher alone); got {lambda_param!r}")
    kd: dict[str, tuple[nn.Module, Weight]] = {"kd": (KD(temperature=temperature), lambda_param)}
    if lambda_param == 1:  # so that images need no labels
        return kd
    return {"ce": (CE(label_smoothing=label_smoothing), 1 - lambda_param), **kd}


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number."""
    try:
        return math.isfinite(value)
    except TypeError:
        return False


def specified(
    terms: Mapping[str, Said] | Sequence[str], label_smoothing: float
) -> dict[str, tuple[Any, Weight | None]]:
    """Return {name: (term, hyper-parameters or None; weight or None)} of the argument `terms`.

    Args:
        terms: see `DistillationTrainer`.
        label_smoothing: of "ce" without hyper-parameters.

    Raises:
        ValueError: there are no terms, a name is unknown, an entry has another form, or a term trains its teachers.
    """
    if isinstance(terms, str):
        raise ValueError(f"terms must be names or a dictionary, as {{'ce': 1, {terms!r}: None}}; got {terms!r}")
    table = dict(terms) if isinstance(terms, Mapping) else dict.fromkeys(terms)
    entries: dict[str, tuple[Any, Weight | None]] = {}
    for name, wanted in table.items():
        alone = isinstance(wanted, (nn.Module, HyperParameters))
        entry = wanted if isinstance(wanted, tuple) else (wanted, None) if alone else (None, wanted)
        if len(entry) != 2 or not (entry[0] is None or isinstance(entry[0], (nn.Module, HyperParameters))):
            raise ValueError(f"terms[{name!r}] must be a weight, or (term or hyper-parameters, weight); got {wanted!r}")
        what, weight = entry
        if not (weight is None or callable(weight) or (is_number(weight) and weight >= 0)):
            raise ValueError(
                f"the weight of terms[{name!r}] must be a number of at least 0, a function of the epoch, or None for "
                f"its default; got {weight!r}"
            )
        if not isinstance(what, nn.Module):
            if name not in LOSSES:
                near = difflib.get_close_matches(name, LOSSES, n=3, cutoff=0.4) or sorted(LOSSES)
                raise ValueError(f"unknown term {name!r}; close ones are {', '.join(near)}")
            if LOSSES[name].mutual:
                raise ValueError(f"the term {name!r} trains its teachers too: use mgd.Distiller.mutual")
        if name == "ce" and what is None:
            what = CE.Hyper(label_smoothing=label_smoothing)
        entries[name] = what, weight
    if not entries:
        raise ValueError("terms must name at least one term, as {'ce': 1, 'kd': 1}")
    return entries


def read_maps(terms: Mapping[str, tuple[Any, Weight | None]]) -> bool:
    """Return whether a term needs maps."""
    kinds = (what if isinstance(what, nn.Module) else LOSSES[name] for name, (what, _) in terms.items())
    return any("maps" in getattr(kind, "needs", ()) for kind in kinds)


def tap(
    student: nn.Module,
    teacher: Frozen,
    images: Tensor,
    named: tuple[Sequence[str], Sequence[str]] | None,
) -> tuple[Taps, Frozen, bool]:
    """Tap student and teacher at the given paths, or where pairs of taps are found.

    Args:
        student: the network to train.
        teacher: with its view.
        images: (B, 3, H, W), the student's input.
        named: paths of both networks; None to find them.

    Returns:
        The tapped student, the tapped teacher, and whether all taps lie before a ReLU (False for given paths).

    Raises:
        ValueError: paths are unknown, or no maps fit together.
    """
    network = teacher.taps.model if isinstance(teacher.taps, Taps) else teacher.taps
    if named is not None:
        return Taps(student, named[0]), freeze(Taps(network, named[1]), teacher.view), False
    viewed = images if teacher.view is None else teacher.view(images)
    pairs = pair_taps(find_taps(student, images), find_taps(network, viewed), images, viewed)
    ours, theirs = zip(*pairs, strict=True)
    before_relu = all(tap.activation in RELUS for tap in (*ours, *theirs))
    tapped = Taps(network, [tap.path for tap in theirs])
    return Taps(student, [tap.path for tap in ours]), freeze(tapped, teacher.view), before_relu


def build_terms(
    terms: Mapping[str, tuple[Any, Weight | None]],
    student: Taps,
    teacher: Frozen,
    images: Tensor,
    num_images: int,
    before_relu: bool,
) -> dict[str, tuple[nn.Module, Weight]]:
    """Build the terms that are not built yet.

    Args:
        terms: of `specified`.
        student: tapped if a term reads maps.
        teacher: likewise.
        images: (B, 3, H, W), the student's input.
        num_images: number of training images.
        before_relu: see `mgd.Probe`.

    Raises:
        ValueError: a term does not work with the networks or its hyper-parameters.
    """
    viewed = images if teacher.view is None else teacher.view(images)
    ours = probe(student, images, frozen=False, before_relu=before_relu)
    theirs = probe(teacher.taps, viewed, before_relu=before_relu)
    built: dict[str, tuple[nn.Module, Weight]] = {}
    for name, (what, weight) in terms.items():
        term = what if isinstance(what, nn.Module) else LOSSES[name].build(ours, [theirs], num_images, what)
        if weight is None:
            weight = term.weight if isinstance(term, Term) else 1.0
        built[name] = term, weight
    return built
