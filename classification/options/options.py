"""All options of the main scripts, out of the groups that declare them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from classification.options.fields import Option, declared
from classification.options.groups import Data, Devices, Networks, Optimisation, Run
from classification.options.term_options import Terms

GROUPS = (Data, Run, Optimisation, Networks, Devices, Terms)


def all_options(*, distillation: bool = True) -> Iterator[Option]:
    """Yield every option of main_mgd.py (with `distillation`) or main_base.py, group by group."""
    for group in GROUPS:
        title = (group.__doc__ or "").lower()
        for found in declared(group):
            if distillation or not found.distillation:
                yield replace(found, section=found.section or title)


def names_where(what: str) -> frozenset[str]:
    """Return the names of the options of which something holds: "free", "anew", "reading", "file" or "place"."""
    return frozenset(found.name for found in all_options() if getattr(found, what))
