"""Train on few labelled and many unlabelled images: python semi_supervised.py DIR --unlabelled DIR2 --output FOLDER

There are seven steps, each a command of this project: a teacher learns from the labels, or a given one is evaluated; it
scores the unlabelled images; the best per class make a list; a student learns from the list, and then from the labels;
a control learns from the labels only, for as many steps; student and control are evaluated. The last lines compare the
two on valid/, with an interval and a verdict.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from classification.errors import UserError
from classification.options.fields import count, number, positive
from classification.options.first_look import run_command
from classification.options.parser import Parser
from classification.paths import is_file, is_folder
from classification.pile.packages import check_packages

if TYPE_CHECKING:
    from classification.pile.steps import Steps

PROG = "semi_supervised.py"
EXAMPLE = """example: %(prog)s photos --unlabelled pile --output semi --arch mobilenet_v1 --img-size 128
The same line resumes. Options after -- are passed to every training: ... -- --amp bf16 --hflip 0"""


def _about() -> str:
    first, _, rest = (__doc__ or "").partition("\n")
    return f"{first.partition(':')[0]}.\n{rest}"


def build_parser(prog: str = PROG) -> Parser:
    """Return the parser; it needs no torch."""
    kept = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog, description=_about(), epilog=EXAMPLE, allow_abbrev=False, formatter_class=kept)
    add = parser.add_argument
    add("data", metavar="DIR", type=Path, help="labelled images: train/CLASS/*.jpg and valid/CLASS/*.jpg")
    add("--unlabelled", metavar="DIR2", type=Path, required=True, help="images without labels, in folders of any depth")
    add(
        "--output",
        metavar="FOLDER",
        type=Path,
        required=True,
        help="folder of everything that is made; the same line resumes",
    )
    add("-a", "--arch", default="resnet18", metavar="NAME", help="the student (resnet18)")
    add("--teacher", metavar="CHECKPOINT", type=Path, help="a teacher that is trained already")
    add(
        "--teacher-arch",
        metavar="NAME",
        help="the teacher's network (the one that its file names, or that of the student)",
    )
    add("--img-size", type=count, metavar="N", help="height and width in pixels of the images that the networks get")
    add("-b", "--batch-size", type=count, default=64, metavar="N", help="images per batch (64)")
    add("-j", "--workers", type=number(int, 0, 1024), default=2, metavar="N", help="loading processes (2)")
    about = "learning rate of all trainings except the student's last (0.05)"
    add("--lr", type=positive, default=0.05, metavar="LR", help=about)
    about = "learning rate of the student's last training (0.005)"
    add("--finetune-lr", type=positive, default=0.005, metavar="LR", help=about)
    add("--teacher-epochs", type=count, default=60, metavar="N", help="epochs of the teacher (60)")
    add("--pretrain-epochs", type=count, default=30, metavar="N", help="epochs on the list (30)")
    add("--finetune-epochs", type=count, default=30, metavar="N", help="epochs on the labels afterwards (30)")
    add("--top-p", type=count, default=1, metavar="P", help="an image may be listed for its P most likely classes (1)")
    add(
        "--top-k",
        type=count,
        metavar="K",
        help="images per class (number of images without labels / number of classes)",
    )
    about = "smallest score of an image: a probability, or a log-probability below 0"
    add("--min-score", type=number(float, -1e9, 1), metavar="S", help=about)
    about = "leave out images that look foreign: the threshold is the energy that PERCENT of the images in valid pass"
    add("--keep", type=number(float, 0, 100, open_low=True), metavar="PERCENT", help=about)
    add(
        "--margin",
        type=number(float, 0),
        default=0.5,
        metavar="POINTS",
        help="largest difference of top-1 that does not matter, in points (0.5)",
    )
    add("--seed", type=number(int, 0), default=0, metavar="N", help="seed of all trainings (0)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (auto)")
    return parser


def parse(words: list[str], prog: str = PROG) -> argparse.Namespace:
    """Return the options, checked as far as that needs no torch; `more` are the words after --.

    Raises:
        UserError: a mistake in them.
    """
    place = words.index("--") if "--" in words else len(words)
    args = build_parser(prog).parse_args(words[:place])
    args.more = words[place + 1 :]
    check_packages(("pyarrow", "duckdb", "imagehash"), PROG)
    if not is_folder(args.unlabelled):
        raise UserError(f"--unlabelled {args.unlabelled} is not a folder: give a folder of images")
    if args.teacher is not None and is_folder(args.teacher) and is_file(args.teacher / "best.pth"):
        args.teacher /= "best.pth"
    return args


def check_images(args: argparse.Namespace) -> dict[str, int]:
    """Return the number of labelled and unlabelled images and of classes.

    Raises:
        UserError: no images, a pile that holds valid, or a teacher of other classes.
    """
    from classification.data.folders import read_folder
    from classification.data.image_files import count_of, identical_pairs
    from classification.data.inference import find_paths
    from classification.models.trained import open_trained

    data = read_folder(args.data)
    paths = find_paths([str(args.unlabelled)], sys.stdin.buffer).paths
    if held := identical_pairs([path for path, _ in data.valid], paths):
        raise UserError(
            f"--unlabelled {args.unlabelled} holds {count_of(len(held), 'image')} of valid, for example {held[0][1]} "
            f"= {held[0][0]}: remove such images, or the accuracy on valid will be too high"
        )
    if args.teacher is not None:
        theirs = open_trained(args.teacher, args.teacher_arch).classes
        if theirs is not None and theirs != data.classes:
            odd = sorted(set(theirs) ^ set(data.classes))[:3]
            what = f", for example {', '.join(odd)}" if odd else ", or in another order"
            raise UserError(
                f"--teacher {args.teacher} has other classes than {args.data}{what}: give a teacher of these"
            )
    return {"labelled": len(data.train), "unlabelled": len(paths), "classes": len(data.classes)}


def control_epochs(args: argparse.Namespace, labelled: int, listed: int) -> int:
    """Return the epochs on the labels that take as many steps as the student's two trainings."""

    own, pile = (math.ceil(images / args.batch_size) for images in (labelled, listed))  # steps of an epoch
    epochs: int = round((args.pretrain_epochs * pile + args.finetune_epochs * own) / own)
    return max(1, epochs)


def run(args: argparse.Namespace) -> None:
    """Do the steps that are left, and say how the student compares.

    Raises:
        UserError: a mistake of the user's, found before work starts.
        RunError: a step failed.
    """
    from classification.pile.steps import open_steps

    found = check_images(args)
    asked = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    steps = open_steps(args.output, {**asked, **found})
    folder, data = steps.folder, str(args.data)
    common = ["-b", str(args.batch_size), "-j", str(args.workers), "--seed", str(args.seed), "--device", args.device]
    common += ["--img-size", str(args.img_size)] if args.img_size else []
    fast = ["--lr", str(args.lr)]

    def train(name: str, arch: str, epochs: int, *words: str) -> Path:
        output = folder / name
        given = [data, "-a", arch, "--epochs", str(epochs), *common, *words, *args.more]
        steps.run(name, "main_base.py", [*given, "--output", str(output), "--resume", "auto"])
        return output

    teacher = args.teacher
    if teacher is not None:  # what its labels are worth is known before they are used
        named = ["-a", args.teacher_arch] if args.teacher_arch else []
        weights = ["--evaluate", "--student-resume", str(teacher), *named, "--output", str(folder / "teacher")]
        steps.run("teacher", "main_base.py", [data, *weights, "-j", str(args.workers), "--device", args.device])
    else:
        teacher = train("teacher", args.teacher_arch or args.arch, args.teacher_epochs, *fast) / "last.pth"
    chosen = _choose(args, steps, teacher, found)
    lines = len(chosen.read_bytes().splitlines())
    lists = ["--pile-list", str(chosen), "--pile-root", str(args.unlabelled), "--pile-share", "1"]
    before = train("pretrain", args.arch, args.pretrain_epochs, *fast, *lists) / "last.pth"
    slow = ["--lr", str(args.finetune_lr), "--student-resume", str(before)]
    student = train("student", args.arch, args.finetune_epochs, *slow) / "last.pth"
    control = train("control", args.arch, control_epochs(args, found["labelled"], lines), *fast) / "last.pth"
    pair = ["--student-resume", str(student), "--teacher-resume", str(control)]
    beside = ["--output", str(folder / "evaluation"), "-j", str(args.workers), "--device", args.device]
    steps.run("evaluation", "main_mgd.py", [data, "--evaluate", *pair, *beside])
    _conclude(folder, args.margin)


def _choose(args: argparse.Namespace, steps: Steps, teacher: Path, found: dict[str, int]) -> Path:
    """Score the images without labels and list the best per class."""
    folder, data = steps.folder, args.data
    how = ["-j", str(args.workers), "-b", str(args.batch_size), "--device", args.device]
    how += ["--arch", args.teacher_arch] if args.teacher and args.teacher_arch else []
    score = ["score", str(teacher)]
    steps.run("scores", "pseudo_label.py", [*score, str(args.unlabelled), "--output", str(folder / "scores"), *how])
    valid = data / "valid" if is_folder(data / "valid") else data / "val"
    top_k = args.top_k or -(-found["unlabelled"] // found["classes"])
    words = ["select", str(folder / "scores"), "--top-p", str(args.top_p), "--top-k", str(top_k), "--force"]
    words += ["--exclude", str(valid), "--root", str(args.unlabelled)]
    words += [] if args.min_score is None else ["--min-score", str(args.min_score)]
    if args.keep is not None:
        steps.run("known", "pseudo_label.py", [*score, str(valid), "--output", str(folder / "known"), *how])
        words += ["--known", str(folder / "known"), "--keep", str(args.keep)]
    chosen = folder / "chosen.txt"
    steps.run("selection", "pseudo_label.py", [*words, "--output", str(chosen)])
    return chosen


def _conclude(folder: Path, margin: float) -> None:
    from classification.models.intervals import verdict

    found = json.loads((folder / "evaluation" / "evaluation.json").read_bytes())
    student, control = found["student"], found["teacher"]
    ((_, both),) = student["compared"].items()
    low, high = both["interval"]
    print(
        f"=> student {student['top1']:.2f}, control on labels alone {control['top1']:.2f} ({student['images']} images)"
    )
    difference = both["top1_difference"]
    print(f"=> difference {difference:+.2f} points of top-1, 95 % interval over images {low:+.2f} to {high:+.2f}")
    print(verdict(low, high, margin), flush=True)


def main(argv: list[str] | None = None, prog: str = PROG) -> int:
    """Run the script, called by the name `prog`; return its exit status."""
    return run_command(lambda words: run(parse(words, prog)), argv, prog)


if __name__ == "__main__":
    sys.exit(main())
