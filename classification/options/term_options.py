"""The options that choose the terms of a loss and set them."""

from __future__ import annotations

from dataclasses import dataclass

from classification.options.fields import count, nonnegative, number, option, positive, switch, whole
from classification.options.names import ASSIGNMENTS, FORMS, SOLVERS

MATCHING = "matching guided distillation"


@dataclass(frozen=True)
class Terms:
    """Terms"""

    label_smoothing: float = option(0.0, kind=number(float, 0, 0.9999), help="of the cross-entropy, in [0, 1)")
    distiller: str = option(
        "mgd", help="a term, or a sum of terms as mgd+kd; cross-entropy is added to it", distillation=True
    )
    term: tuple[str, ...] = option(
        (),
        metavar="NAME.KEY=VALUE",
        help="a term's weight, warmup, start, stop, decay or hyper-parameter, as dkd.beta=2; repeatable, and wins",
        distillation=True,
    )
    kd_weight: float = option(1.0, kind=nonnegative, help="factor of the kd term", distillation=True)
    kd_temperature: float | None = option(
        None,
        kind=positive,
        help="softens both networks' logits; default: 1.5 beside mgd, 4 alone",
        distillation=True,
    )
    loss_factor: float = option(
        1e4,
        kind=positive,
        help="form sum: mgd is divided by it (1e4 suits 224 px)",
        section=MATCHING,
        distillation=True,
    )
    mgd_form: str = option(
        "sum",
        choices=FORMS,
        help="sum: as published; mean: per element, for every image size; relative: to the teacher's maps",
        section=MATCHING,
        distillation=True,
    )
    mgd_weight: float = option(
        5.0,
        kind=nonnegative,
        help="forms mean and relative: factor of the mgd term",
        section=MATCHING,
        distillation=True,
    )
    mgd_assignment: str = option(
        "cheapest",
        choices=ASSIGNMENTS,
        help="which flow; all but cheapest are controls that show what matching is worth",
        section=MATCHING,
        distillation=True,
    )
    mgd_reducer: str = option(
        "amp",
        choices=("amp", "rd", "sp", "sm"),
        help="how teacher channels become one target",
        section=MATCHING,
        distillation=True,
    )
    mgd_update_freq: int = option(
        2,
        kind=whole,
        help="epochs between two matchings; 0: once, before training",
        section=MATCHING,
        distillation=True,
    )
    mgd_with_kd: int = switch(0, help="1: the same as --distiller mgd+kd", section=MATCHING, distillation=True)
    mgd_capacity: str | None = option(
        None,
        choices=("spread", "truncate", "reference", "single"),
        help="how many teacher channels guide one; default: spread, for sm single",
        section=MATCHING,
        distillation=True,
    )
    mgd_solver: str = option(
        "auto",
        choices=("auto", *SOLVERS),
        help="exact solver of the flow",
        section=MATCHING,
        distillation=True,
    )
    mgd_observe: str = option(
        "pass",
        choices=("pass", "online"),
        help="how costs are measured: in a pass of their own before a matching; online: on a share of each training "
        "batch, but for the first matching",
        section=MATCHING,
        distillation=True,
    )
    mgd_max_images: int = option(
        20_000, kind=count, help="images observed for a matching", section=MATCHING, distillation=True
    )
    mgd_margin: str = option(
        "bn",
        choices=("bn", "map", "none"),
        help="bn: from the norm before the tap, or else map",
        section=MATCHING,
        distillation=True,
    )
