"""Distil a student from a teacher: python main_mgd.py DIR --arch mobilenet_v1 --distiller mgd --mgd-reducer amp"""

from __future__ import annotations

import sys

from classification.options.first_look import first_look

PROG = "main_mgd.py"


def main(argv: list[str] | None = None, prog: str = PROG) -> int:
    """Run the script, called by the name `prog`; return its exit status."""
    words = sys.argv[1:] if argv is None else argv
    status = first_look(words, prog, distillation=True)
    if status is not None:
        return status
    from classification.training import distilling  # imports torch, for which a help text need not wait

    return distilling.run(words, prog)


if __name__ == "__main__":
    sys.exit(main())
