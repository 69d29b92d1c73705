"""Terms of a run: which losses, their weights over the epochs, their hyper-parameters; from options and recipes."""

from __future__ import annotations

import contextlib
import difflib
import inspect
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from math import ceil, cos, isfinite, pi
from typing import Any

from classification.errors import UserError, shown
from classification.options.strict_yaml import read_yaml
from mgd import Outputs
from mgd.losses import LOSSES, Term
from mgd.losses.align import channels

# Names that stand for a sum of terms.
SUMS = {"udml": ("dml", "map_l2")}
# Terms that are meant to train without labels: beside them alone, ce is left out.
LABEL_FREE = {"ssld", "meal"}
SCHEDULE = ("weight", "warmup", "start", "stop", "decay")
DECAYS = ("constant", "linear", "cosine")
HIDDEN = ("teacher_weights", "margins")  # hyper-parameters that a recipe's teachers say

Table = dict[str, dict[str, Any]]


def names_of(distiller: str) -> list[str]:
    """Return the terms that `--distiller` names, sums spelt out.

    Raises:
        UserError: an unknown name, or one twice.
    """
    names = [name for word in distiller.split("+") for name in SUMS.get(word, (word,))]
    known = ["mgd", *LOSSES, *SUMS]
    for name in names:
        if name == "ce":
            raise UserError("ce is there by itself wherever labels are used: leave it out of --distiller")
        if not name:
            raise UserError(f"--distiller {shown(distiller)} names a term that is empty: write a sum as mgd+kd")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"; close ones are {', '.join(near)}" if near else ""
            raise UserError(
                f"unknown distiller {name!r}: use one of {', '.join(n for n in known if n != 'ce')}, or a sum as "
                f"mgd+kd{hint}"
            )
    if len(set(names)) < len(names):
        raise UserError(f"--distiller {distiller} names a term twice")
    return names


def term_table(names: Sequence[str], recipe: Mapping[str, Any], changes: Sequence[str]) -> Table:
    """Join what a recipe says of the terms `names` with the --term words; every key is checked here.

    Args:
        names: the terms, "ce" among them where labels are used.
        recipe: {name: {key: value}} of the recipe's `terms`, those of other names being left out.
        changes: NAME.KEY=VALUE, which win.

    Raises:
        UserError: a term that is not there, an unknown key, a value of the wrong kind.
    """
    for name, entry in recipe.items():
        if name in SUMS and entry:
            raise UserError(f"{name} stands for {' and '.join(SUMS[name])}: list those terms with their keys")
    table: Table = {name: dict(recipe.get(name) or {}) for name in names}
    for change in changes:
        where, equals, text = change.partition("=")
        name, dot, key = where.partition(".")
        if not equals or not dot or not key:
            raise UserError(f"--term {change}: expected NAME.KEY=VALUE, as in dkd.beta=2")
        if name not in table:
            raise UserError(f"--term {change}: this run has the terms {', '.join(table)}, and no {name}")
        try:
            table[name][key] = read_yaml(text)
        except UserError as error:
            raise UserError(f"--term {shown(change)}: {error}") from error
    for name, entry in table.items():
        table[name] = {key: _as_number(value) for key, value in entry.items()}
        _check(name, table[name])
    return table


def _as_number(value: Any) -> Any:
    """Turn 1e-4, which is text in YAML, into the number that is meant."""
    with contextlib.suppress(ValueError):
        return float(value) if isinstance(value, str) else value
    return value


def _check(name: str, entry: dict[str, Any]) -> None:
    options = {} if name == "mgd" else hyper_parameters(name)
    for key, value in entry.items():
        if option := option_of(name, key):
            raise UserError(f"{name}.{key}: write it as the option {option}")
        if key not in (*SCHEDULE, *options):
            near = difflib.get_close_matches(key, (*SCHEDULE, *options), n=2, cutoff=0.5)
            hint = f"; close ones are {', '.join(near)}" if near else ""
            raise UserError(f"term {name} has no {key!r}: it takes {', '.join((*SCHEDULE, *options))}{hint}")
        if key == "decay":
            if value not in DECAYS:
                raise UserError(f"{name}.decay must be one of {', '.join(DECAYS)}; got {shown(value)}")
        elif key in SCHEDULE and not (is_number(value) and value >= 0):
            raise UserError(f"{name}.{key} must be a number of at least 0; got {shown(value)}")
        elif key in options and not any(KINDS[kind][1](value) for kind in options[key]):
            kinds = " or ".join(KINDS[kind][0] for kind in options[key])
            raise UserError(f"{name}.{key} must be {kinds}; got {shown(value)}")
        elif key == "label_smoothing" and not 0 <= value < 1:
            raise UserError(f"{name}.{key} must be at least 0 and below 1; got {shown(value)}")


def option_of(name: str, key: str) -> str | None:
    """Return the option of the command line that says a term's hyper-parameter, where there is one."""
    has_one = key not in SCHEDULE if name == "mgd" else (name, key) == ("kd", "temperature")
    return f"--{name}-{key.replace('_', '-')}" if has_one else None


def is_number(value: Any) -> bool:
    """Return whether a value is a number, finite, and not true or false."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


# Types of hyper-parameters: how they are called, and what they take.
KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "float": ("a number", is_number),
    "int": ("a whole number", lambda value: is_number(value) and isinstance(value, int)),
    "bool": ("true or false", lambda value: isinstance(value, bool)),
    "str": ("a word", lambda value: isinstance(value, str)),
    "Sequence[float]": ("a list of numbers", lambda value: isinstance(value, list) and all(map(is_number, value))),
    "None": ("null", lambda value: value is None),
}


def hyper_parameters(name: str) -> dict[str, list[str]]:
    """Return a term's hyper-parameters and their `KINDS`."""
    found = inspect.signature(LOSSES[name]).parameters.values()
    named = [p for p in found if p.default is not p.empty and p.name not in HIDDEN]
    return {p.name: p.annotation.split(" | ") for p in named}


def weight_at(entry: Mapping[str, Any], weight: float, epochs: int, epoch: int) -> float:
    """Return a term's weight in `epoch`, counted from 0.

    weight, times (epoch + 1 - start) / warmup until that is 1; 0 before `start` and from `stop` on; and by `decay`
    constant, or falling to 0 over all epochs by a line or half a cosine.
    """
    start = entry.get("start", 0)
    if not start <= epoch < entry.get("stop", epochs):
        return 0.0
    part = epoch / epochs
    fall = {"constant": 1.0, "linear": 1 - part, "cosine": 0.5 * (1 + cos(pi * part))}[entry.get("decay", "constant")]
    warmup = entry.get("warmup", 0)
    return weight * fall * (min(1.0, (epoch + 1 - start) / warmup) if warmup else 1.0)


def check_schedules(table: Table, epochs: int) -> None:
    """Refuse terms that never act, and epochs in which none does.

    Raises:
        UserError: it names them.
    """
    for name, entry in table.items():
        start, stop = entry.get("start", 0), min(entry.get("stop", epochs), epochs)
        if start >= stop:
            raise UserError(f"the term {name} never acts: it starts in epoch {start} and ends before epoch {stop}")
    turns = {0, *(ceil(entry[key]) for entry in table.values() for key in ("start", "stop") if key in entry)}
    for epoch in sorted(turn for turn in turns if turn < epochs):
        if not any(weight_at(entry, entry.get("weight", 1.0), epochs, epoch) for entry in table.values()):
            raise UserError(f"no term acts in epoch {epoch}: their weights, or starts and stops, leave it without any")


def schedule(args: Namespace, name: str, weight: float, epochs: int) -> Any:
    """Return the weight of a term as a function of the epoch."""
    entry = args.terms[name]
    return partial(weight_at, entry, float(entry.get("weight", weight)), epochs)


def build_term(
    args: Namespace, name: str, student: Outputs, teachers: Sequence[Outputs], num_images: int, **more: Any
) -> Term:
    """Build one of `LOSSES` for networks of such outputs.

    At the networks' own taps, which lie before a ReLU, a term whose source reads maps behind it applies one; maps that
    are tapped by name are taken as they are.

    Args:
        args: the checked options.
        name: of the term.
        student: of a dry forward.
        teachers: the same, one a teacher.
        num_images: training images.
        more: what no option says.

    Raises:
        UserError: hyper-parameters that it refuses, taps that it needs, tapped tensors that are no maps.
    """
    kind = LOSSES[name]
    options = {key: value for key, value in args.terms[name].items() if key not in SCHEDULE}
    options = {**more, **given(args, name), **options}
    if "maps" in kind.needs and not student.features:
        raise UserError(f"the term {name} compares feature maps: name the taps by --student-taps and --teacher-taps")
    try:
        if using([name], "maps"):
            for outputs in (student, *teachers):
                channels(outputs)
        term = kind.from_outputs(student, teachers, num_images, **options)
        term.rectify = kind.rectified and not (args.student_taps or args.teacher_taps)
        return term
    except (ValueError, TypeError, RuntimeError) as error:  # torch's own: shapes, or memory that is not there
        raise UserError(f"term {name}: {error}") from error


def given(args: Namespace, name: str) -> dict[str, Any]:
    """Return what options of their own, and a recipe's teachers, say of a term."""
    if name == "ce":
        return {"label_smoothing": args.label_smoothing}
    found: dict[str, Any] = {"temperature": args.kd_temperature} if name == "kd" else {}
    weights = [float(teacher.get("weight", 1.0)) for teacher in args.teachers]
    unequal = len(set(weights)) > 1 and args.teacher_mean == "terms"
    return {**found, "teacher_weights": weights} if unequal else found


def needing(names: Iterable[str], what: str) -> list[str]:
    """Return those of the terms that cannot do without "labels" or "maps"."""
    return [name for name in names if (what == "maps" if name == "mgd" else what in LOSSES[name].needs)]


def using(names: Iterable[str], what: str) -> list[str]:
    """Return those of the terms that need "maps", or use them where they are there."""
    return [name for name in names if name == "mgd" or what in LOSSES[name].needs | LOSSES[name].uses]


def needing_flows(table: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return those of the terms that want student and teacher matched: mgd, and what begins with a flow."""
    return [name for name, entry in table.items() if name == "mgd" or entry.get("init") == "flow"]


def pairing(names: Iterable[str]) -> list[str]:
    """Return those of the terms that compare maps tap by tap, and need as many of each network."""
    kinds = {name: LOSSES[name] for name in names if name != "mgd"}
    paired = [n for n, kind in kinds.items() if kind.paired and "maps" in kind.needs | kind.uses]
    return (["mgd"] if "mgd" in names else []) + paired


def single_class(names: Iterable[str]) -> list[str]:
    """Return those of the terms that take one class an image, or know images by their number: none may be mixed."""
    kinds = {name: LOSSES[name] for name in names if name != "mgd"}
    return [name for name, kind in kinds.items() if "labels" in kind.uses or "index" in kind.needs]
