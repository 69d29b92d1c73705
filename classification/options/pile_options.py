"""The options of images that a teacher labelled."""

from __future__ import annotations

from dataclasses import dataclass

from classification.options.fields import number, option


@dataclass(frozen=True)
class Pile:
    """Images with pseudo-labels"""

    pile_list: tuple[str, ...] = option(
        (),
        metavar="FILE",
        help="list with one `path label score` per line, written by mgd select, to train on in addition "
        "to train/; may be given several times",
        free=True,
        file=True,
        place=True,
    )
    pile_root: str = option(
        ".",
        metavar="DIR",
        help="folder to which the paths in --pile-list are relative; default: the current one",
        free=True,
        file=True,
        place=True,
    )
    pile_targets: str = option(
        "hard",
        choices=("hard", "soft"),
        help="hard: each line is an example of its class; soft: all lines of an image are one example, with the "
        "probabilities of its classes from the scores",
    )
    pile_share: float | None = option(
        None,
        kind=number(float, 0, 1, open_low=True),
        metavar="S",
        help="share of each epoch that comes from --pile-list, from 0 to 1; the smaller part is repeated, and 1 "
        "leaves out train/; default: every line once",
    )
