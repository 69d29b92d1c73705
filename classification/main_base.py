"""Train or evaluate one network on a folder of photographs: python main_base.py DIR --arch mobilenet_v1"""

from __future__ import annotations

import sys

from classification.options.first_look import first_look

PROG = "main_base.py"


def main(argv: list[str] | None = None, prog: str = PROG) -> int:
    """Run the script, called by the name `prog`; return its exit status."""
    words = sys.argv[1:] if argv is None else argv
    status = first_look(words, prog, distillation=False)
    if status is not None:
        return status
    from classification.training import alone  # imports torch, for which a help text need not wait

    return alone.run(words, prog)


if __name__ == "__main__":
    sys.exit(main())
