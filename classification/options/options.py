"""All options of the main scripts, collected from the groups that declare them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from classification.options.devices import Devices
from classification.options.fields import Option, declared
from classification.options.groups import Data, Networks, Optimisation, Run
from classification.options.pile_options import Pile
from classification.options.published import ALIASES
from classification.options.term_options import Terms

if TYPE_CHECKING:
    from classification.options.terms import TermSpec

GROUPS = (Data, Pile, Run, Optimisation, Networks, Devices, Terms)


def all_options(*, distillation: bool = True) -> Iterator[Option]:
    """Yield every option of main_mgd.py (with `distillation`) or main_base.py, group by group."""
    for group in GROUPS:
        title = (group.__doc__ or "").lower()
        for found in declared(group):
            if distillation or not found.distillation:
                yield replace(found, section=found.section or title)


def names_where(what: str) -> frozenset[str]:
    """Return the names of the options with this mark of `Option`: "free", "anew", "reading", "file" or "place"."""
    return frozenset(found.name for found in all_options() if getattr(found, what))


@dataclass(frozen=True)
class Options:
    """The options of a run, parsed and checked; nothing changes them afterwards.

    What is found out later (classes, seed, the image size of a network's file) is in the `Job`.

    Args:
        data: which images, and how they are read.
        pile: images that a teacher labelled.
        run: where a run writes, and what it does.
        optimisation: epochs, batches and rates.
        networks: the student and its teachers, as they were typed.
        devices: processors, ranks and number types.
        terms: the terms, as they were typed.
        command: the words of the command line, the script first.
        distils: whether it is a run of main_mgd.py.
        table: the terms by name, from options and recipe.
        teachers: the description of each teacher: arch, resume, frozen, and of a recipe's weights, weight, img_size ...
        distiller: the names of the terms except that of the labels, joined by +.
        labels: which labels count: true, pseudo or none, as --labels has it; none where the terms use none.
        term_digest: of the file of --term-module, or None.
    """

    data: Data
    pile: Pile
    run: Run
    optimisation: Optimisation
    networks: Networks
    devices: Devices
    terms: Terms
    command: tuple[str, ...] = ()
    distils: bool = False
    table: Mapping[str, TermSpec] = field(default_factory=dict)
    teachers: Sequence[Mapping[str, Any]] = ()
    distiller: str = ""
    labels: str = "true"
    term_digest: str | None = None

    @property
    def labelled(self) -> bool:
        """Whether the terms use labels."""
        return self.labels != "none"

    @property
    def student_taps(self) -> str | None:
        """The paths that the user names for the student."""
        return self.networks.student_taps or self.networks.taps

    @property
    def teacher_taps(self) -> str | None:
        """The paths that the user names for the teachers, those of several separated by ;."""
        return self.networks.teacher_taps or self.networks.taps


def make_options(values: Mapping[str, Any], **more: Any) -> Options:
    """Return the options with these values; a missing one has its default.

    Args:
        values: as the parser gives them.
        more: the fields of `Options` beside the groups.
    """
    made: dict[str, Any] = {}
    for group in GROUPS:
        given = {entry.name: values[entry.name] for entry in fields(group) if entry.name in values}
        kind: Any = group
        made[group.__name__.lower()] = kind(**{n: tuple(v) if isinstance(v, list) else v for n, v in given.items()})
    return Options(**made, **more)


def recorded(options: Options, **found: Any) -> dict[str, Any]:
    """Return the options as a run records them, by name; each term with all its keys, instead of published spellings.

    Args:
        options: of the run.
        found: what was found out later, by the same names.
    """
    names = [option.name for option in all_options(distillation=options.distils) if option.name not in ALIASES]
    groups = [getattr(options, group.__name__.lower()) for group in GROUPS]
    values = {entry.name: getattr(group, entry.name) for group in groups for entry in fields(group)}
    kept = {name: list(values[name]) if isinstance(values[name], tuple) else values[name] for name in names}
    kept |= {"labels": options.labels, "teachers": [dict(teacher) for teacher in options.teachers]}
    if options.distils:
        kept |= {"distiller": options.distiller, "term_digest": options.term_digest}
        kept |= {"student_taps": options.student_taps, "teacher_taps": options.teacher_taps}
    return {**kept, **found, "terms": {name: spec.record() for name, spec in options.table.items()}}
