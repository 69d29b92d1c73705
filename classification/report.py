"""Show what runs measured, on one HTML page: python report.py RUN... --output FILE.html"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from classification.errors import UserError
from classification.options.fields import count
from classification.options.first_look import run_command
from classification.options.parser import Parser
from classification.paths import exists, is_folder
from classification.reports.packages import check_packages
from classification.system.new_files import check_new, write_whole

PROG = "report.py"
EXAMPLE = "example: %(prog)s runs/alone runs/student --output report.html --data photos"


def build_parser(prog: str = PROG) -> Parser:
    """Return the parser; it needs no torch."""
    parser = Parser(prog, description=(__doc__ or "").partition(":")[0] + ".", epilog=EXAMPLE, allow_abbrev=False)
    add = parser.add_argument
    add(
        "runs",
        metavar="RUN",
        nargs="+",
        type=Path,
        help="a run folder; a student trained alone is the control, drawn in grey",
    )
    add("--output", required=True, type=Path, metavar="FILE", help="the page, one file that needs no other")
    add("--force", action="store_true", help="replace FILE if it exists")
    add(
        "--data",
        type=Path,
        metavar="DIR",
        help="also run the networks on DIR/valid, for confusions, worst images and channels",
    )
    add(
        "--images",
        type=count,
        default=5000,
        metavar="N",
        help="use at most N images of DIR/valid, drawn at random (5000)",
    )
    return parser


def parse(words: list[str], prog: str = PROG) -> argparse.Namespace:
    """Return the options, checked as far as that needs no torch.

    Raises:
        UserError: a mistake in them, or a package that is missing.
    """
    args = build_parser(prog).parse_intermixed_args(words)
    check_new(args.output, force=args.force)
    check_packages()
    if args.data is not None and not is_folder(args.data):
        raise UserError(f"--data {args.data} {'is not a folder' if exists(args.data) else 'does not exist'}")
    return args


def report(args: argparse.Namespace) -> None:
    """Write the page.

    Raises:
        UserError: a mistake of the user's.
    """
    from classification.reports.page import make_page

    page = make_page(args.runs, data=args.data, max_images=args.images).encode(errors="backslashreplace")
    write_whole(args.output, page)
    print(f"=> written to {args.output}, {len(page) / 1e6:.2f} MB")


def main(argv: list[str] | None = None, prog: str = PROG) -> int:
    """Run the script, called by the name `prog`; return its exit status."""
    return run_command(lambda words: report(parse(words, prog)), argv, prog)


if __name__ == "__main__":
    sys.exit(main())
