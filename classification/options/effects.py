"""Options, and keys of a recipe, that would change nothing: each is refused by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from classification.errors import UserError
from classification.options.options import Options
from classification.options.published import ALIASES, LABELLED, REPLACED, WITH_KD
from classification.options.terms import Table, mutual, needing, using


def without_effect(options: Options) -> dict[str, str]:
    """Return the options that have no effect on a run, and what each of them needs."""
    terms: Table = options.table
    rules = [
        (f"the term {WITH_KD[0]}", WITH_KD[0] in terms, {"mgd_with_kd"}),
        ("a term that reads maps", bool(using(terms, "maps")), {"taps", "student_taps", "teacher_taps"}),
        ("a term that compares two views", bool(needing(terms, "views")), {"second_view"}),
        ("a frozen teacher", not mutual(terms), {"teacher_dtype", "teacher_threads", "compile_student"}),
        (
            "a run without --teacher-cache",
            not options.networks.teacher_cache or options.run.evaluate,
            {"teacher_taps", "teacher_mean", "teacher_dtype", "teacher_threads"},
        ),
        ("--lr-schedule step", options.optimisation.lr_schedule == "step", {"lr_drop_ratio", "lr_drop_epochs"}),
        ("--optimizer dot", options.optimisation.optimizer == "dot", {"dot_delta"}),
        ("labels", options.labelled, {"sampler"}),
        (f"the term {LABELLED}", LABELLED in terms, {"class_weights"}),
        ("--compile 1", bool(options.devices.compile), {"compile_student"}),
        ("--warmup 1", bool(options.optimisation.warmup), {"warmup_epochs"}),
        ("main_mgd.py", options.distils or options.data.labels != "none", {"labels"}),  # main_base.py cannot do without
        ("main_base.py", not options.distils, {"linear_probe"}),
        ("--labels true or none", options.labels != "pseudo", {"train_list", "pile_share"}),
        ("--pile-list", bool(options.pile.pile_list), {"pile_root", "pile_share", "pile_targets"}),
        ("a run without --resume", not options.run.resume, {"start_epoch"}),
    ]
    found: dict[str, str] = {}
    for needed, present, names in rules:
        for name in () if present else sorted(names):
            found.setdefault(name, needed)
    return found | _aliases(terms)


def _aliases(terms: Table) -> dict[str, str]:
    """Return the published spellings that set no key of a term here, or one without effect."""
    found: dict[str, str] = {}
    for option, keys in ALIASES.items():
        needed = []
        for name, key in (key.split(".") for key in keys):
            spec = terms.get(name)
            needed.append(f"the term {name}" if spec is None else spec.without_effect().get(key, ""))
        if all(needed):
            present = [why for why in needed if not why.startswith("the term ")]
            found[option] = " or ".join(present or needed)
    return found


def check_typed(options: Options, typed: Mapping[str, str]) -> None:
    """Refuse options of the command line that would change nothing.

    Args:
        options: the checked options.
        typed: {destination: the option as typed}.

    Raises:
        UserError: it names the option and what it needs.
    """
    for name, needed in without_effect(options).items():
        if name in typed:
            raise UserError(f"{typed[name]} has no effect here: it works only with {needed}")
    for change in options.terms.term if "term" in typed else ():
        name, _, key = change.partition("=")[0].partition(".")
        idle = options.table[name].without_effect() if name in options.table else {}
        if key in idle and key != "weight":  # a weight always has one; --mgd-weight is the one of other forms
            raise UserError(f"--term {change} has no effect here: it works only with {idle[key]}")
        if (name, key) == (LABELLED, "views") and not needing(options.table, "views"):
            raise UserError(f"--term {change} has no effect here: it works only with a term that compares two views")


def check_recipe(
    options: Options,
    alone: Options | None,
    keys: Mapping[str, str],
    nested: Mapping[str, Any],
    typed: Mapping[str, str],
) -> None:
    """Refuse keys of a recipe that would change nothing; not those that the command line alone leaves without effect.

    Args:
        options: the checked options of the run.
        alone: those of the recipe with nothing typed over it; None where these make no sense.
        keys: {destination: key} of the options that the recipe gives.
        nested: its terms and teachers.
        typed: {destination: the option as typed}.

    Raises:
        UserError: it names the recipe and the key.
    """
    if alone is None:
        return
    idle = without_effect(alone)
    for name, needed in without_effect(options).items():
        if name in keys and name in idle and name not in typed:
            raise UserError(f"recipe {options.run.config}: {keys[name]} has no effect: it works only with {needed}")
    for key, why in [*_terms(alone, keys, nested.get("terms", {}), typed), *_teachers(keys, nested, typed)]:
        raise UserError(f"recipe {options.run.config}: {key} has no effect: {why}")


def _terms(
    alone: Options, keys: Mapping[str, str], terms: Mapping[str, Any], typed: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    for option, aliased in ALIASES.items():
        for name, key in (key.split(".") for key in (*aliased, REPLACED.get(option, "."))):
            if option in keys and option not in typed and key in (terms.get(name) or {}):
                yield keys[option], f"terms.{name}.{key} says the same"
    for change in alone.terms.term:
        name, _, key = change.partition("=")[0].partition(".")
        if key in (terms.get(name) or {}):
            yield f"terms.{name}.{key}", f"term {change} says the same"
    if "labels" in keys and "labels" not in typed and LABELLED in terms and LABELLED not in alone.table:
        yield f"terms.{LABELLED}", f"{keys['labels']} is none"


def _teachers(
    keys: Mapping[str, str], nested: Mapping[str, Any], typed: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    teachers = [] if {"teacher_arch", "teacher_resume"} & set(typed) else nested.get("teachers", [])
    for number, teacher in enumerate(teachers):
        where = f"teachers[{number}]"
        if "resume" in teacher and "teacher_resume" in keys:
            yield f"{where}.resume", f"{keys['teacher_resume']} says the same"
        if "weights" in teacher and ("resume" in teacher or "teacher_resume" in keys):
            yield f"{where}.weights", "its weights are those of a file"
        if "weights" in teacher and teacher["arch"].startswith("timm:"):
            yield f"{where}.weights", "timm names its weights in arch, as timm:resnet50.a1_in1k"
        if "weights" in teacher and teacher["arch"].startswith("hf:"):
            yield f"{where}.weights", "its weights are those that arch names"
        if teacher.get("weight", 1) != 1 and len(teachers) == 1:
            yield f"{where}.weight", "there is one teacher; terms.NAME.weight weighs a term"
