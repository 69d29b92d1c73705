"""The terms of a run: from --distiller, --term, --labels, the published spellings and a recipe."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from classification.errors import UserError
from classification.options.published import LABELLED, WITH_KD, entries_of
from classification.options.terms import (
    Table,
    TermClasses,
    check_schedules,
    mutual,
    names_of,
    needing,
    single_class,
    term_table,
)


def choose_terms(
    options: Mapping[str, Any], recipe: Mapping[str, Any], typed: Collection[str], classes: TermClasses, epochs: int
) -> dict[str, Any]:
    """Return the table of terms, and the options that follow from it: {"table", "distiller", "labels"}.

    Args:
        options: {option: value}; the command line comes before the recipe.
        recipe: {name: {key: value}} of the recipe's `terms`; empty where it has none.
        typed: the options that were typed.
        classes: the classes of terms, by name.
        epochs: of the run.

    Raises:
        UserError: terms that do not go together, or not with the other options.
    """
    base, added = WITH_KD
    if recipe and "distiller" not in typed:
        listed = [name for name in recipe if name != LABELLED]
        names, labelled = names_of("+".join(listed), classes) if listed else [], LABELLED in recipe
    else:
        names, labelled = names_of(options["distiller"], classes), True
        labelled = options["labels"] in ("true", "pseudo") or not all(classes[name].label_free for name in names)
    if options["mgd_with_kd"]:
        if base not in names:
            raise UserError(f"--mgd-with-kd 1 needs the term {base}: name it in --distiller or in the recipe")
        names += [] if added in names else [added]
    labels = options["labels"]
    listed = [*([LABELLED] if labelled and labels != "none" else []), *names]
    table = term_table(entries_of(listed, recipe, options), options["term"], classes)
    if labels == "none" and (needed := needing(table, "labels")):
        raise UserError(f"--labels none does not work with {', '.join(needed)}, which needs labels")
    if not table:
        raise UserError("no terms are left to train with")
    check_schedules(table, epochs)
    if (options["mixup"] or options["cutmix"]) and (single := single_class(table)):
        raise UserError(
            f"--mixup and --cutmix mix images of two classes, but {', '.join(single)} needs one class per image"
        )
    if (options["mixup"] or options["cutmix"]) and (views := needing(table, "views")):
        raise UserError(f"--mixup and --cutmix mix one view of each image, but {', '.join(views)} compares two")
    if options["pile_targets"] == "soft" and (single := single_class(table)):
        raise UserError(f"--pile-targets soft gives an image several classes, but {', '.join(single)} needs one")
    if labels is None:
        labels = "true" if needing(table, "labels") else "none"
    return {"table": table, "distiller": "+".join(names), "labels": labels}


def check_teachers(table: Table, teachers: Sequence[Mapping[str, Any]], *, joined: bool) -> None:
    """Refuse teachers that do not fit the terms.

    Args:
        table: the terms.
        teachers: the description of each.
        joined: whether their probabilities are averaged to those of one teacher.

    Raises:
        UserError: naming the term or the teacher.
    """
    peers = mutual(table)
    for teacher in teachers:
        name = teacher["arch"] or "the teacher"
        if peers and teacher.get("frozen", True):
            raise UserError(f"{peers[0]} trains every network, but {name} is frozen: set frozen: false for it")
        if not peers and not teacher.get("frozen", True):
            raise UserError(f"{name} is not frozen: only mutual learning, for example dml, trains several networks")
        if peers and (keys := [key for key in ("weights", "weight", "img_size", "mean", "std") if key in teacher]):
            raise UserError(f"{name} trains like the student: leave out its {', '.join(keys)}")
    if joined:
        if len(teachers) < 2 or peers:
            raise UserError("--teacher-mean probabilities needs several frozen teachers")
        if maps := needing(table, "maps"):
            raise UserError(f"--teacher-mean probabilities gives no maps, which {', '.join(maps)} needs: leave it out")
    if peers and (names := needing(table, "frozen")):
        raise UserError(f"{names[0]} matches a student to a frozen teacher: it does not work with {peers[0]}")
