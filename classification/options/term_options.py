"""The options that choose the terms of a loss and set them."""

from __future__ import annotations

from dataclasses import dataclass

from classification.options.fields import count, nonnegative, number, option, positive, switch, whole
from classification.options.names import ASSIGNMENTS, CAPACITIES, COSTS, FORMS, GROUPS, REDUCERS, SOLVERS
from classification.options.published import DISTILLER

MATCHING = "matching guided distillation"


@dataclass(frozen=True)
class Terms:
    """Terms"""

    label_smoothing: float | None = option(
        None, kind=number(float, 0, 0.9999), help="of the cross-entropy, in [0, 1); default: 0", section="training"
    )
    distiller: str = option(
        DISTILLER, help="a term, or a sum of terms as mgd+kd; cross-entropy is added to it", distillation=True
    )
    term: tuple[str, ...] = option(
        (),
        metavar="NAME.KEY=VALUE",
        help="a term's weight, warmup, start, stop, decay or hyper-parameter, as dkd.beta=2; repeatable, and wins",
        distillation=True,
    )
    term_module: str | None = option(
        None,
        metavar="FILE",
        help="a Python file with terms of your own: TERMS = {name: term class}",
        distillation=True,
        free=True,
        anew=True,
        file=True,
    )
    kd_weight: float | None = option(
        None, kind=nonnegative, help="factor of the kd term; default: 1", distillation=True
    )
    kd_temperature: float | None = option(
        None,
        kind=positive,
        help="softens both networks' logits; default: 1.5 beside mgd, 4 alone",
        distillation=True,
    )
    loss_factor: float | None = option(
        None,
        kind=positive,
        help="form sum: mgd is divided by it; default: 10000, which suits 224 px",
        section=MATCHING,
        distillation=True,
    )
    mgd_form: str | None = option(
        None,
        choices=FORMS,
        help="sum, the default, as published; mean: per element, for every image size; relative: to the teacher's maps",
        section=MATCHING,
        distillation=True,
    )
    mgd_weight: float | None = option(
        None,
        kind=nonnegative,
        help="forms mean and relative: factor of the mgd term; default: 5",
        section=MATCHING,
        distillation=True,
    )
    mgd_assignment: str | None = option(
        None,
        choices=ASSIGNMENTS,
        help="which flow; all except cheapest, the default, are controls that show what matching is worth",
        section=MATCHING,
        distillation=True,
    )
    mgd_reducer: str | None = option(
        None,
        choices=REDUCERS,
        help="how teacher channels become one target; default: amp, for soft capacities linear",
        section=MATCHING,
        distillation=True,
    )
    mgd_update_freq: int | None = option(
        None,
        kind=whole,
        help="epochs between two matchings; 0: once, before training; default: 2",
        section=MATCHING,
        distillation=True,
    )
    mgd_with_kd: int = switch(0, help="1: the same as --distiller mgd+kd", section=MATCHING, distillation=True)
    mgd_capacity: str | None = option(
        None,
        choices=CAPACITIES,
        help="how many teacher channels guide one; default: spread, for sm single; soft and unbalanced: weighted sums",
        section=MATCHING,
        distillation=True,
    )
    mgd_cost: str | None = option(
        None,
        choices=COSTS,
        help="what channels are matched by: the cosine of their maps, the default, the correlation over all images, or "
        "what they do for the loss",
        section=MATCHING,
        distillation=True,
    )
    mgd_groups: str | None = option(
        None,
        choices=GROUPS,
        help="teacher: group the teacher's channels first, by what one target can carry; default: student",
        section=MATCHING,
        distillation=True,
    )
    mgd_across: int | None = switch(
        None,
        help="1: which teacher stage teaches which student stage is matched too",
        section=MATCHING,
        distillation=True,
    )
    mgd_solver: str | None = option(
        None,
        choices=("auto", *SOLVERS),
        help="exact solver of the flow; default: auto, the fastest",
        section=MATCHING,
        distillation=True,
    )
    mgd_observe: str | None = option(
        None,
        choices=("pass", "online"),
        help="how costs are measured: pass, the default, before a matching; online: on a share of each training batch, "
        "except for the first matching",
        section=MATCHING,
        distillation=True,
    )
    mgd_max_images: int | None = option(
        None, kind=count, help="images observed for a matching; default: 20000", section=MATCHING, distillation=True
    )
    mgd_margin: str | None = option(
        None,
        choices=("bn", "map", "none"),
        help="bn, the default: from the norm before the tap, or else map",
        section=MATCHING,
        distillation=True,
    )
