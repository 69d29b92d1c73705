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
        help="list of `path label score` lines, as pseudo_label.py select writes it, to train on beside train/; may be "
        "given several times",
        free=True,
        file=True,
        place=True,
    )
    pile_root: str = option(
        ".",
        metavar="DIR",
        help="folder that holds the images of --pile-list, from which their paths start; default: the current one",
        free=True,
        file=True,
        place=True,
    )
    pile_targets: str = option(
        "hard",
        choices=("hard", "soft"),
        help="hard: a line is an example of its class; soft: the lines of an image are one example of their classes, "
        "as likely as their scores say",
    )
    pile_share: float | None = option(
        None,
        kind=number(float, 0, 1, open_low=True),
        metavar="S",
        help="part of every epoch that comes from --pile-list, from 0 to 1; the smaller part is repeated, and 1 leaves "
        "train/ out; default: every line once",
    )
