"""The published spellings: which key of which term an option sets, and what depends on other terms; without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DISTILLER = "mgd"  # the terms of a run that names none
LABELLED = "ce"  # the term that is added wherever labels are used
WITH_KD = ("mgd", "kd")  # --mgd-with-kd 1 adds the second to the first

FLOWS = ("mgd", "ofd", "fitnet", "masked_generative", "reviewkd")  # the terms that a flow guides, or may start
SWITCHES = ("mgd_across",)  # 0 or 1 as an option, true or false as a key


def _of_flows(key: str) -> tuple[str, ...]:
    return tuple(f"{term}.{key}" for term in FLOWS)


# {option: the keys that it says, "term.key"}; it counts for each of these terms that a run has.
ALIASES: dict[str, tuple[str, ...]] = {
    "kd_temperature": ("kd.temperature",),
    "kd_weight": ("kd.weight",),
    "label_smoothing": ("ce.label_smoothing",),
    "loss_factor": ("mgd.loss_factor",),
    "mgd_across": ("mgd.across",),
    "mgd_assignment": _of_flows("assignment"),
    "mgd_capacity": _of_flows("capacity"),
    "mgd_cost": _of_flows("cost"),
    "mgd_form": ("mgd.form",),
    "mgd_groups": _of_flows("groups"),
    "mgd_margin": ("mgd.margin",),
    "mgd_max_images": _of_flows("max_images"),
    "mgd_observe": ("mgd.observe",),
    "mgd_reducer": ("mgd.reducer",),
    "mgd_solver": _of_flows("solver"),
    "mgd_update_freq": ("mgd.update_freq",),
    "mgd_weight": ("mgd.weight",),
}
# {key: (beside which term, the value that it then has where nobody says another)}
BESIDE: dict[str, tuple[str, Any]] = {"kd.temperature": ("mgd", 1.5)}

# {option: (values, the term that alone takes them in a run that has it)}: a flow that starts a term is one of pairs
OF_ONE: dict[str, tuple[tuple[str, ...], str]] = {"mgd_capacity": (("soft", "unbalanced"), "mgd")}

# {option: the key that it stands in for, and drops}
REPLACED = {"loss_factor": "mgd.weight"}

Entries = dict[str, dict[str, Any]]


def entries_of(names: list[str], recipe: Mapping[str, Any], options: Mapping[str, Any]) -> Entries:
    """Join what a recipe and the options say of terms: {name: {key: value}}; an option wins.

    Args:
        names: the terms of the run.
        recipe: {name: {key: value}}.
        options: {option: value}, None for those that were not given.
    """
    found: Entries = {name: dict(recipe.get(name) or {}) for name in names}
    for option, keys in ALIASES.items():
        if options.get(option) is None:
            continue
        values, only = OF_ONE.get(option, ((), ""))
        alone = options[option] in values and only in found
        for name, key in (key.split(".") for key in keys):
            if name == only if alone else name in found:
                found[name].pop(REPLACED.get(option, "").rpartition(".")[2], None)
                found[name][key] = bool(options[option]) if option in SWITCHES else options[option]
    for where, (beside, value) in BESIDE.items():
        name, key = where.split(".")
        if name in found and beside in found:
            found[name].setdefault(key, value)
    return found


def without_aliases(options: Mapping[str, Any]) -> tuple[dict[str, Any], Entries]:
    """Split the options of a run folder into those beside the terms, and what is said of each term.

    Runs of before terms had all their keys to themselves recorded the aliases, each with its effective value.

    Args:
        options: as recorded, "terms" among them.
    """
    given = {option: options[option] for option in ALIASES if option in options}
    usual = "single" if given.get("mgd_reducer") == "sm" else "spread"
    if given.get("mgd_capacity") == usual:
        del given["mgd_capacity"]
    given.pop("mgd_weight" if given.get("mgd_form", "sum") == "sum" else "loss_factor", None)
    terms = options.get("terms") or {}
    entries = entries_of(list(terms), terms, given) if given else {name: dict(terms[name]) for name in terms}
    rest = {name: value for name, value in options.items() if name not in ALIASES}
    if rest.get("labels") in (0, 1):  # of before there were pseudo-labels
        rest["labels"] = "true" if rest["labels"] else "none"
    return rest, entries
