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
        None,
        kind=number(float, 0, 0.9999),
        help="label smoothing of the cross-entropy, in [0, 1); default: 0",
        section="training",
    )
    distiller: str = option(
        DISTILLER, help="a term, or a sum of terms such as mgd+kd; cross-entropy is added", distillation=True
    )
    term: tuple[str, ...] = option(
        (),
        metavar="NAME.KEY=VALUE",
        help="set the weight, warmup, start, stop, decay or a hyper-parameter of a term, for example dkd.beta=2; may "
        "be given several times, and overrides other options",
        distillation=True,
    )
    term_module: str | None = option(
        None,
        metavar="FILE",
        help="a Python file with your own terms: TERMS = {name: term class}",
        distillation=True,
        free=True,
        anew=True,
        file=True,
    )
    kd_weight: float | None = option(
        None, kind=nonnegative, help="weight of the term kd; default: 1", distillation=True
    )
    kd_temperature: float | None = option(
        None,
        kind=positive,
        help="temperature of the term kd, which softens the probabilities of both networks; default: 1.5 together "
        "with mgd, or else 4",
        distillation=True,
    )
    loss_factor: float | None = option(
        None,
        kind=positive,
        help="for --mgd-form sum: the term mgd is divided by this; default: 10000, which suits 224 px",
        section=MATCHING,
        distillation=True,
    )
    mgd_form: str | None = option(
        None,
        choices=FORMS,
        help="sum (default): the published form, which grows with the image size; mean: mean per element, for any "
        "image size; relative: error relative to the size of the target",
        section=MATCHING,
        distillation=True,
    )
    mgd_weight: float | None = option(
        None,
        kind=nonnegative,
        help="for --mgd-form mean or relative: weight of the term mgd; default: 5",
        section=MATCHING,
        distillation=True,
    )
    mgd_assignment: str | None = option(
        None,
        choices=ASSIGNMENTS,
        help="which flow is used; default: cheapest; the others are controls, which show what matching is worth",
        section=MATCHING,
        distillation=True,
    )
    mgd_reducer: str | None = option(
        None,
        choices=REDUCERS,
        help="how several teacher channels become one target; default: amp, or linear for --mgd-capacity soft and "
        "unbalanced",
        section=MATCHING,
        distillation=True,
    )
    mgd_update_freq: int | None = option(
        None,
        kind=whole,
        help="number of epochs between two matchings; 0: match once, before training; default: 2",
        section=MATCHING,
        distillation=True,
    )
    mgd_with_kd: int = switch(0, help="1: the same as --distiller mgd+kd", section=MATCHING, distillation=True)
    mgd_capacity: str | None = option(
        None,
        choices=CAPACITIES,
        help="how many teacher channels guide one student channel; default: spread, or single for --mgd-reducer sm; "
        "soft and unbalanced make weighted sums",
        section=MATCHING,
        distillation=True,
    )
    mgd_cost: str | None = option(
        None,
        choices=COSTS,
        help="by what channels are matched: cosine (default): the cosine of their maps; correlation: their "
        "correlation over all images; gradient: what they do for the loss",
        section=MATCHING,
        distillation=True,
    )
    mgd_groups: str | None = option(
        None,
        choices=GROUPS,
        help="teacher: first group the teacher's channels so that one target can carry each group well; default: "
        "student",
        section=MATCHING,
        distillation=True,
    )
    mgd_across: int | None = switch(
        None,
        help="1: also match which teacher stage teaches which student stage",
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
        help="how costs are measured: pass (default): in a pass over images before each matching; online: on a part "
        "of each training batch, except for the first matching",
        section=MATCHING,
        distillation=True,
    )
    mgd_max_images: int | None = option(
        None,
        kind=count,
        help="number of images on which a matching is based; default: 20000",
        section=MATCHING,
        distillation=True,
    )
    mgd_margin: str | None = option(
        None,
        choices=("bn", "map", "none"),
        help="where margins come from: bn (default): the norm before the tap, or else as map; map: measured on the "
        "teacher's maps; none: no margin",
        section=MATCHING,
        distillation=True,
    )
