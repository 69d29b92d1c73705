"""Terms of a run: which losses, their weights over the epochs, their hyper-parameters; from options and recipes."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, cos, isfinite, pi
from typing import Any, Literal

from pydantic import ConfigDict, PydanticUserError, TypeAdapter

from classification.errors import UserError, quoted
from classification.options.published import LABELLED
from classification.options.strict_yaml import read_yaml
from mgd.losses import Term

TermClasses = Mapping[str, type[Term]]


@dataclass(frozen=True)
class Schedule:
    """The weight of a term over the epochs.

    Args:
        weight: its factor; None for the term's own.
        warmup: epochs over which it grows from 0.
        start: its first epoch, counted from 0.
        stop: the epoch before which it ends; None for the end of the run.
        decay: "constant", or falling to 0 over all epochs by a line or half a cosine.
    """

    weight: float | None = None
    warmup: float = 0
    start: float = 0
    stop: float | None = None
    decay: Literal["constant", "linear", "cosine"] = "constant"

    def __post_init__(self) -> None:
        for name in ("weight", "warmup", "start", "stop"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} must be a number of at least 0; got {value}")

    def at(self, own: float, epochs: int, epoch: int) -> float:
        """Return the weight in `epoch`, counted from 0.

        weight, times (epoch + 1 - start) / warmup until that is 1; 0 before `start` and from `stop` on; times the
        decay.

        Args:
            own: the term's weight, where the schedule says none.
            epochs: of the run.
            epoch: counted from 0.
        """
        if not self.start <= epoch < (epochs if self.stop is None else self.stop):
            return 0.0
        part = epoch / epochs
        fall = {"constant": 1.0, "linear": 1 - part, "cosine": 0.5 * (1 + cos(pi * part))}[self.decay]
        weight = float(own if self.weight is None else self.weight)
        return weight * fall * (min(1.0, (epoch + 1 - self.start) / self.warmup) if self.warmup else 1.0)


@dataclass(frozen=True)
class TermSpec:
    """One term of a run: its class, its hyper-parameters, its weight over the epochs."""

    kind: type[Term]
    hyper: Any
    schedule: Schedule = dataclasses.field(default_factory=Schedule)

    @property
    def needs(self) -> frozenset[str]:
        """What the term needs, with these hyper-parameters."""
        return self.kind.needed(self.hyper)

    def without_effect(self) -> Mapping[str, str]:
        """Return the keys that the other keys leave without effect, each with what it needs."""
        idle: Mapping[str, str] = getattr(self.hyper, "without_effect", dict)()
        return idle

    def record(self) -> dict[str, Any]:
        """Return all keys as a run records them; those of the schedule only where they differ from the defaults."""
        usual, own = dataclasses.asdict(Schedule()), dataclasses.asdict(self.schedule)
        return {k: v for k, v in own.items() if v != usual[k]} | dataclasses.asdict(self.hyper)


Table = Mapping[str, TermSpec]


def names_of(distiller: str, classes: TermClasses) -> list[str]:
    """Return the terms that `--distiller` names.

    Raises:
        UserError: an unknown name, or one twice.
    """
    names = distiller.split("+")
    for name in names:
        if name == LABELLED:
            raise UserError(f"{name} is added automatically if labels are used: leave it out of --distiller")
        if not name:
            raise UserError(f"--distiller {quoted(distiller)} has an empty term: write a sum such as mgd+kd")
        if name not in classes:
            raise UserError(
                f"unknown distiller {name!r}: use one of {', '.join(n for n in classes if n != LABELLED)}, or a sum "
                f"such as mgd+kd{close_ones(name, classes)}"
            )
    if len(set(names)) < len(names):
        raise UserError(f"--distiller {distiller} names a term twice")
    return names


def close_ones(name: str, names: Iterable[str]) -> str:
    """Return "; close ones are a, b" where some of the names resemble `name`, else an empty string."""
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"; close ones are {', '.join(near)}" if near else ""


def term_table(
    entries: Mapping[str, Mapping[str, Any]], changes: Sequence[str], classes: TermClasses
) -> dict[str, TermSpec]:
    """Make the terms of a run; every key is checked here.

    Args:
        entries: {name: {key: value}} of a recipe and the options.
        changes: NAME.KEY=VALUE of --term, which win.
        classes: the classes of terms, by name.

    Raises:
        UserError: a term that is not there, an unknown key, a value of the wrong kind.
    """
    if unknown := [name for name in entries if name not in classes]:
        raise UserError(f"unknown term {quoted(unknown[0])}: use {', '.join(classes)}{close_ones(unknown[0], classes)}")
    table = {name: {key: _as_number(value) for key, value in entry.items()} for name, entry in entries.items()}
    for change in changes:
        where, equals, text = change.partition("=")
        name, dot, key = where.partition(".")
        if not equals or not dot or not key:
            raise UserError(f"--term {change}: expected NAME.KEY=VALUE, for example dkd.beta=2")
        if name not in table:
            raise UserError(f"--term {change}: this run has the terms {', '.join(table)}, but no {name}")
        try:
            table[name][key] = _as_number(read_yaml(text))
        except UserError as error:
            raise UserError(f"--term {quoted(change)}: {error}") from error
    return {name: _spec(name, classes[name], entry) for name, entry in table.items()}


def _as_number(value: Any) -> Any:
    """Turn 1e-4, which is text in YAML, into the number that is meant, in lists too."""
    if isinstance(value, list):
        return [_as_number(part) for part in value]
    with contextlib.suppress(ValueError):
        return float(value) if isinstance(value, str) else value
    return value


def _spec(name: str, kind: type[Term], entry: Mapping[str, Any]) -> TermSpec:
    timing, hyper = fields_of(Schedule), fields_of(kind.Hyper)
    for key in entry:
        if key not in {**timing, **hyper}:
            keys = [*timing, *hyper]
            raise UserError(f"term {name} has no {key!r}: it takes {', '.join(keys)}{close_ones(key, keys)}")
    values = {key: _checked(f"{name}.{key}", {**timing, **hyper}[key], value) for key, value in entry.items()}
    try:
        return TermSpec(
            kind,
            kind.Hyper(**{key: value for key, value in values.items() if key in hyper}),
            Schedule(**{key: value for key, value in values.items() if key in timing}),
        )
    except (ValueError, TypeError) as error:
        raise UserError(f"term {name}: {error}") from error


def fields_of(kind: type[Any]) -> dict[str, Any]:
    """Return {name: type} of the fields of a dataclass.

    Raises:
        UserError: a class that is no dataclass, or types that cannot be read.
    """
    if not dataclasses.is_dataclass(kind):
        raise UserError(f"{kind.__qualname__} must be a dataclass: write @dataclass(frozen=True) above it")
    try:
        hints = typing.get_type_hints(kind)
    except Exception as error:  # a name that is not imported, or anything else that an annotation may do
        raise UserError(f"the types of {kind.__qualname__} cannot be read: {error}") from error
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _checked(where: str, hint: Any, value: Any) -> Any:
    """Convert a value of a recipe to its type, such as a list of numbers to a tuple.

    Raises:
        UserError: a value of another type.
    """
    config = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
    try:
        return TypeAdapter(hint, config=config).validate_json(json.dumps(value))
    except PydanticUserError as error:
        raise UserError(f"{where} has a type that no recipe can express, {_called(hint)}: leave it out") from error
    except (ValueError, TypeError) as error:  # of pydantic, or a value that JSON cannot express
        raise UserError(f"{where} must be {_called(hint)}; got {quoted(value)}") from error


WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", type(None): "null"}


def _called(hint: Any) -> str:
    """Describe in words the values of a type."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint in WORDS:
        return WORDS[hint]
    if origin is Literal:
        return "one of " + ", ".join(map(str, parts))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_called, parts))
    if origin in (tuple, list, Sequence) and parts and parts[0] is not Ellipsis:
        kinds = " or ".join(sorted({_called(part) for part in parts if part is not Ellipsis}))
        what = {"a number": "numbers", "a whole number": "whole numbers", "a word": "words"}.get(kinds, "values")
        return f"a list of {what}" if Ellipsis in parts or origin is not tuple else f"a list of {len(parts)} {what}"
    return str(getattr(hint, "__name__", hint))


def is_number(value: Any) -> bool:
    """Return whether a value is a number, finite, and not true or false."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


def check_schedules(table: Table, epochs: int) -> None:
    """Refuse terms that never act, and epochs in which no term acts.

    Raises:
        UserError: it names them.
    """
    turns = {0}
    for name, spec in table.items():
        start, stop = spec.schedule.start, min(epochs if spec.schedule.stop is None else spec.schedule.stop, epochs)
        if start >= stop:
            raise UserError(f"the term {name} never acts: it starts in epoch {start:g} and ends before epoch {stop:g}")
        turns |= {ceil(start), ceil(stop)}
    for epoch in sorted(turn for turn in turns if turn < epochs):
        if not any(spec.schedule.at(1.0, epochs, epoch) for spec in table.values()):
            raise UserError(f"no term acts in epoch {epoch}: change their weights, or their start and stop")


def needing(table: Table, what: str) -> list[str]:
    """Return the terms that cannot do without "labels", "maps", "index", "views" or "frozen" teachers."""
    return [name for name, spec in table.items() if what in spec.needs]


def using(table: Table, what: str) -> list[str]:
    """Return the terms that need "maps", or use them if there are any."""
    return [name for name, spec in table.items() if what in spec.needs | spec.kind.uses]


def mutual(table: Table) -> list[str]:
    """Return the terms whose teachers are peers that train too."""
    return [name for name, spec in table.items() if spec.kind.mutual]


def pairing(table: Table) -> list[str]:
    """Return the terms that compare maps tap by tap, and need the same number of taps in each network."""
    return [name for name in using(table, "maps") if table[name].kind.paired]


def single_class(table: Table) -> list[str]:
    """Return the terms that need one class per image, or the number of each image: images must not be mixed."""
    return [name for name, spec in table.items() if "labels" in spec.kind.uses or "index" in spec.needs]
