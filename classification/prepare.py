"""Copy photographs, shrunk and split for training: python prepare.py FROM TO

FROM has one folder per class. A random tenth of each becomes TO/valid/CLASS, and the rest TO/train/CLASS. If FROM has
train/ and valid/ (or val/), and perhaps test/, with class folders, its split is kept. Copies are upright JPEG files
whose short side has at most --side pixels: twice the size that the network gets is enough. Nothing is written into
FROM. TO appears when it is complete; after an interruption, the same line resumes. TO/manifest.csv says from which file
each copy was made. Images that cannot be read are named and left out; hidden files and folders are left out, too. Files
with equal bytes count as one image, so a random split keeps them on the same side.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import warnings
from pathlib import Path

from classification.errors import UserError, one_line
from classification.options.fields import count, number
from classification.options.first_look import write_any_name
from classification.options.parser import Parser
from classification.paths import exists, is_folder

PROG = "prepare.py"
EXACT, NEAR = "in valid or test too, byte for byte", "near to one of valid or test"
EXAMPLE = "example: %(prog)s holidays photos --valid 0.1 --test 0.1 --group time"


def build_parser(prog: str = PROG) -> Parser:
    """Return the parser; it needs no torch."""
    raw, about = argparse.RawDescriptionHelpFormatter, (__doc__ or "").replace(": python prepare.py FROM TO", ".")
    parser = Parser(prog, description=about, epilog=EXAMPLE, allow_abbrev=False, formatter_class=raw)
    add, share = parser.add_argument, number(float, 0, 0.95)
    add("source", type=Path, metavar="FROM", help="the photographs; nothing is written there")
    add("folder", type=Path, metavar="TO", help="a new folder")
    add("--side", type=count, default=256, metavar="PX", help="the short side of a copy is at most PX pixels (256)")
    add("--valid", type=share, default=0.1, metavar="PART", help="share of each class for validation (0.1)")
    add("--test", type=share, default=0.0, metavar="PART", help="share of each class for testing (0)")
    about = (
        "keep these images of a class on the same side of the split: folder: those in one subfolder; time: those "
        "taken shortly after each other"
    )
    add("--group", choices=("none", "folder", "time"), default="none", help=f"{about} (none)")
    minutes = number(float, 0, open_low=True)
    add(
        "--minutes",
        type=minutes,
        default=10.0,
        metavar="N",
        help="with --group time: a pause of N minutes begins a new group (10)",
    )
    bits = number(int, 0, 20)
    add("--near", type=bits, metavar="BITS", help=
        "look for near duplicates across the split, whose hashes of 64 bits differ in at most BITS bits; 4 is usual; "
        "needs ImageHash"
    )  # fmt: skip
    add("--remove-duplicates", action="store_true", help="leave out of train/ what is also in valid/ or test/")
    add("--seed", type=number(int, 0, 2**31 - 1), default=0, help="seed of the split (0)")
    return parser


def check(args: argparse.Namespace, typed: list[str]) -> None:
    """Refuse places and options that make no sense.

    Raises:
        UserError: one of these.
    """
    if not is_folder(args.source):
        what = "is not a folder" if exists(args.source) else "does not exist"
        raise UserError(f"{args.source} {what}: give a folder with one folder of photographs per class")
    if exists(args.folder):
        raise UserError(f"{args.folder} exists already: give a new folder")
    if args.folder.resolve().is_relative_to(args.source.resolve()):
        raise UserError(
            f"{args.folder} lies in {args.source}, where it would count as a class: give a folder elsewhere"
        )
    if args.valid == 0:
        raise UserError("--valid 0 leaves nothing to validate on: give a part between 0 and 1")
    if args.valid + args.test >= 1:
        raise UserError(f"--valid {args.valid:g} and --test {args.test:g} leave nothing to train on: lower them")
    if any(word.split("=")[0] == "--minutes" for word in typed) and args.group != "time":
        raise UserError("--minutes has no effect: it works only with --group time")


def prepare(args: argparse.Namespace) -> None:
    """Copy all; print what is to be said.

    Raises:
        UserError: a mistake of the user's; the source and the disk are as before.
    """
    from classification.data import copies as work
    from classification.data.split import Shares, find_split

    if args.near is not None:
        work.check_imagehash()
    shares = Shares(args.valid, args.test, args.group, args.minutes, args.seed)
    split = find_split(args.source, shares)
    if not split.drawn and (shares.test or shares.group != "none"):
        what = "--test" if shares.test else "--group"
        raise UserError(f"{what} has no effect: {args.source} is split already; give a folder that holds CLASS folders")
    notes, copies = [*split.notes], work.name_copies(split)
    try:
        top = work.open_partial_folder(args.folder, copies, args.side)
        try:
            failures = work.write_copies(copies, top, args.side)
            notes += work.remove_empty_classes(copies, failures, top)
            copies = [copy for copy in copies if copy not in failures]
            pairs = [] if split.drawn else work.duplicate_pairs(copies)
            copies, more = work.settle_duplicates(pairs, copies, top, what=EXACT, remove=args.remove_duplicates)
            notes += more
            pairs = [] if args.near is None else work.similar_pairs(copies, top, args.near)
            copies, more = work.settle_duplicates(pairs, copies, top, what=NEAR, remove=args.remove_duplicates)
            notes += more
        except UserError:
            shutil.rmtree(top)
            raise
        (top / work.MANIFEST).write_bytes(work.manifest_csv(copies))
        (top / "plan").unlink()
        top.rename(args.folder)
    except OSError as error:
        raise UserError(f"{args.folder} cannot be written ({error.strerror}): make room, or give another") from error
    for line in [*notes, *(f"left out: {cause}" for cause in failures.values()), *work.summarise(copies)]:
        print(one_line(line))


def main(argv: list[str] | None = None, prog: str = PROG) -> int:
    """Run the script, called by the name `prog`; return its exit status."""
    write_any_name()
    words = sys.argv[1:] if argv is None else argv
    from classification.system.exit_status import attempt

    def work() -> None:
        args = build_parser(prog).parse_args(words)
        check(args, words)
        prepare(args)

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")  # they do not name the file that they concern
            return attempt(work, prog)
    except SystemExit:  # a help text was printed
        return 0


if __name__ == "__main__":
    sys.exit(main())
