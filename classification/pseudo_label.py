"""Label many images with a teacher: python pseudo_label.py score CHECKPOINT PATH... --output FOLDER"""

from __future__ import annotations

import argparse
import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from classification.errors import UserError, one_line
from classification.options.fields import count, number
from classification.options.first_look import run_command
from classification.options.names import LARGEST_SIZE
from classification.options.parser import Parser
from classification.paths import exists, is_file, is_folder
from classification.pile.packages import check_packages
from classification.system.new_files import check_new, write_whole

if TYPE_CHECKING:
    from classification.data.inference import ImagePaths
    from classification.pile.duplicates import NearCopies
    from classification.pile.ranking import Rule
    from classification.pile.scoring import ScoreWork, Teachers
    from classification.pile.shards import Shards

PROG = "pseudo_label.py"
COMMANDS = ("score", "select")
SCORE, SELECT = "write the scores that a teacher gives to images", "list the best of the scored images per class"
EXAMPLE = """examples:
  %(prog)s score runs/teacher/best.pth pile --output scores
  torchrun --nproc-per-node 8 classification/pseudo_label.py score runs/teacher/best.pth pile --output scores
  %(prog)s select scores --top-k 1000 --output chosen.txt"""


def build_parser(command: str = "", prog: str = PROG) -> Parser:
    """Return the parser of a command, or that of both; it needs no torch."""
    kept = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog, description=__doc__, epilog=EXAMPLE, allow_abbrev=False, formatter_class=kept)
    parts = parser.add_subparsers(dest="command", required=True, metavar="score|select")
    known = {
        "score": parts.add_parser("score", help=SCORE, description=f"{SCORE.capitalize()}.", allow_abbrev=False),
        "select": parts.add_parser("select", help=SELECT, description=f"{SELECT.capitalize()}.", allow_abbrev=False),
    }
    _score_options(known["score"])
    _select_options(known["select"])
    return known.get(command, parser)


def _score_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", type=Path, help="a teacher: a best.pth, other weights, or a run folder")
    about = "an image; a folder of images; a tar shard; a list with one path per line; or - for a list on stdin"
    add("paths", metavar="PATH", nargs="+", help=about)
    add(
        "--output",
        required=True,
        metavar="FOLDER",
        type=Path,
        help="folder to write the shards into; the same line resumes",
    )
    add(
        "--also",
        metavar="CHECKPOINT",
        type=Path,
        action="append",
        default=[],
        help="another teacher; probabilities are averaged",
    )
    add("--top-p", type=count, default=10, metavar="P", help="classes stored per image, most likely first (10)")
    add("--shard-size", type=count, default=8192, metavar="N", help="images per shard (8192)")
    add("-b", "--batch-size", type=count, default=32, metavar="N", help="images per batch (32)")
    usual = min(4, os.cpu_count() or 1)
    add("-j", "--workers", type=number(int, 0, 1024), default=usual, metavar="N", help=f"loading processes ({usual})")
    add("--arch", metavar="NAME", help="the network, if the checkpoint does not name it")
    about = "height and width in pixels of the images that the teachers get (that of the checkpoint)"
    add("--img-size", type=number(int, 8, LARGEST_SIZE), metavar="N", help=about)
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (auto)")


def _select_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folder", metavar="FOLDER", type=Path, help="the --output of score")
    add(
        "--output",
        required=True,
        metavar="LIST",
        type=Path,
        help="the list to write, with one `path label score` per line",
    )
    add(
        "--top-p",
        type=count,
        metavar="P",
        help="an image may be listed for its P most likely classes (all that are stored)",
    )
    add("--top-k", type=count, default=1000, metavar="K", help="images per class (1000)")
    about = "smallest score: a probability from 0 to 1, or a log-probability below 0"
    add("--min-score", type=number(float, -math.inf, 1), metavar="S", help=about)
    add(
        "--balance",
        action="store_true",
        help="repeat images of smaller classes until all classes have equally many lines",
    )
    add("--root", type=Path, metavar="DIR", help="write paths relative to DIR")
    add("--exclude", type=Path, metavar="DIR", help="leave out near copies of the images in DIR, for example of valid")
    about = "the hash of a near copy differs in at most N of 64 bits (4)"
    add("--exclude-distance", type=number(int, 0, 16), default=4, metavar="N", help=about)
    about = (
        "scores of images that do belong to the classes, for example of valid; they set the threshold that leaves "
        "out foreign images"
    )
    add("--known", type=Path, metavar="FOLDER", help=about)
    about = (
        "what is compared with the threshold: the energy, the largest score, or the difference of the two largest "
        "(energy)"
    )
    add("--rule", "--foreign-rule", type=_rule_name, choices=("energy", "min-score", "margin"), help=about)
    about = "percent of the --known images that pass the threshold (95)"
    add("--keep", type=number(float, 0, 100, open_low=True), metavar="PERCENT", help=about)
    add("--force", action="store_true", help="replace LIST if it exists")


def _rule_name(word: str) -> str:
    return "min-score" if word == "score" else word  # as it was called before


def parse(words: list[str], prog: str = PROG) -> argparse.Namespace:
    """Return the options, checked as far as that needs no torch.

    Raises:
        UserError: a mistake in them.
    """
    command = words[0] if words else ""
    args = build_parser(command, prog).parse_args(words[1:] if command in COMMANDS else words)
    if command == "score":
        check_packages(("pyarrow",), f"{prog} score")
        for path in args.paths:
            if is_folder(path) and is_folder(Path(path) / "valid") and is_folder(Path(path) / "train"):
                raise UserError(
                    f"{path} is a data folder, and its valid/ would be part of the pile: give {Path(path) / 'train'}, "
                    "or a folder of its own"
                )
        return args
    check_packages(("pyarrow", "duckdb", *(["imagehash"] if args.exclude else [])), f"{prog} select")
    for path in (args.output, _about(args.output)):
        check_new(path, force=args.force)
    idle = [name for name in ("rule", "keep") if getattr(args, name) is not None and args.known is None]
    if idle:
        raise UserError(
            f"--{idle[0]} needs --known FOLDER, scores of images that belong to the classes: score valid, too"
        )
    if args.exclude is not None and not is_folder(args.exclude):
        what = "is no folder" if exists(args.exclude) else "does not exist"
        raise UserError(f"--exclude {args.exclude} {what}: give a folder of images")
    return args


def _about(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _checkpoint(path: Path) -> Path:
    return path / "best.pth" if is_folder(path) and is_file(path / "best.pth") else path


def score(args: argparse.Namespace) -> None:
    """Write the shards that are missing.

    Raises:
        UserError: a mistake of the user's, found before work starts.
    """
    from classification.data.inference import find_paths
    from classification.options.config import check_devices
    from classification.options.devices import Devices
    from classification.pile.scoring import ScoreWork, open_teachers, usable_paths
    from classification.pile.shards import Plan, begin_folder, paths_digest
    from classification.runs.world import device_of

    devices = Devices(device=args.device)
    check_devices(devices)
    found = find_paths(args.paths, sys.stdin.buffer)
    where = device_of(devices, int(os.environ.get("LOCAL_RANK", "0")))
    teachers = open_teachers(
        [_checkpoint(path) for path in (args.checkpoint, *args.also)], args.arch, where, args.img_size
    )
    paths, causes = usable_paths(found.paths)
    if not paths:
        raise UserError(f"no image of {args.paths[0]} can be scored: {next(iter(causes.values()))}")
    first = teachers.members[0]
    top = min(args.top_p, first.num_classes)
    names = next((member.classes for member in teachers.members if member.classes), None)
    digest = paths_digest(paths)
    plan = Plan(teachers.digest(), first.num_classes, names, top, len(paths), digest, args.shard_size)
    begin_folder(args.output, plan)
    rank, size = (int(os.environ.get(name, usual)) for name, usual in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if rank == 0:
        _say_start(teachers, found, causes, len(found.paths) - len(paths) - len(causes))
    _score(ScoreWork(args.output, plan, paths, rank, size, args.batch_size, args.workers), teachers)


def _say_start(teachers: Teachers, found: ImagePaths, causes: dict[str, str], repeated: int) -> None:
    from classification.pile.scoring import unreadable_lines

    notes = [*found.notes, *(member.note for member in teachers.members), *unreadable_lines(causes)]
    notes += [f"{repeated} paths were named more than once, and are scored once"] if repeated else []
    for note in notes:
        print(f"=> {one_line(note)}", file=sys.stderr)


def _score(work: ScoreWork, teachers: Teachers) -> None:
    """Score, and say how far it is."""
    from tqdm import tqdm

    from classification.pile.scoring import Pace, score, unreadable_lines
    from classification.pile.shards import shard_path

    missing = [number for number in work.order() if not exists(shard_path(work.folder, number))]
    mine = [number for number in missing if number % work.size == work.rank]
    total = sum(len(work.images(number)) for number in mine)
    pace, bad = Pace(total), 0
    if len(missing) < work.plan.num_shards and work.rank == 0:
        print(f"=> resumed: {work.plan.num_shards - len(missing)} of {work.plan.num_shards} shards are there already")
    with tqdm(total=total, leave=False, disable=None, dynamic_ncols=True, unit="image") as bar:

        def advance(images: int) -> None:
            pace.done += images
            bar.update(images)

        for number, unreadable in score(work, teachers, advance):
            bad += len(unreadable)
            for line in unreadable_lines(unreadable):
                bar.write(one_line(f"{PROG}: {line}"), file=sys.stderr)
            bar.write(f"=> shard {number + 1} of {work.plan.num_shards}: {pace.line()}")
    left = sum(not exists(shard_path(work.folder, number)) for number in range(work.plan.num_shards))
    skipped = f", {bad} images left out" if bad else ""
    rest = f"; other processes still work on {left} shards" if left else ""
    print(f"=> done: {pace.done - bad} images scored into {work.folder}{skipped}{rest}", flush=True)


def select(args: argparse.Namespace) -> None:
    """Write the list.

    Raises:
        UserError: a mistake of the user's.
    """
    from classification.pile import selection
    from classification.pile.shards import open_shards

    shards = open_shards(args.folder)
    rule = _rule(args, shards)
    chosen = selection.select(shards, rule, _copies(args))
    content = b"".join(selection.list_lines(chosen.lists(balance=args.balance), args.root))
    write_whole(args.output, content)
    write_whole(_about(args.output), selection.list_description(shards, rule, chosen, args.root))
    sizes = chosen.sizes()
    if chosen.copies:
        path, original = next(iter(chosen.copies.items()))
        print(
            f"=> left out {len(chosen.copies)} near copies of images of {args.exclude}, for example {path} of "
            f"{original}"
        )
    empty = [] if shards.num_classes is None else sorted(set(range(shards.num_classes)) - set(sizes))
    if empty:
        names = [shards.classes[label] if shards.classes else str(label) for label in empty[:5]]
        print(f"=> {len(empty)} classes have no image: {', '.join(map(one_line, names))}{' ...' if empty[5:] else ''}")
    images = f"{min(sizes.values())} to {max(sizes.values())} images in {len(sizes)} classes"
    print(f"=> done: {content.count(10)} lines in {args.output}; {images}")


def _rule(args: argparse.Namespace, shards: Shards) -> Rule:
    """Return what to choose, the thresholds of foreign images measured on known ones."""
    from classification.pile.ranking import Rule, quantile
    from classification.pile.shards import PLAN, open_shards, read_plan

    if args.top_p is not None and is_file(args.folder / PLAN):
        stored = read_plan(args.folder).top
        if args.top_p > stored:
            raise UserError(
                f"--top-p {args.top_p} is more than the {stored} classes per image in {args.folder}: score with more"
            )
    low = -math.inf if args.min_score is None else args.min_score
    rule = Rule(args.top_p, args.top_k, low if low < 0 else math.log(low) if low else -math.inf)
    if args.known is None:
        return rule
    name, keep = args.rule or "energy", 95.0 if args.keep is None else args.keep
    known = open_shards(args.known)
    if known.teacher != shards.teacher:
        raise UserError(f"--known {args.known} has scores of another teacher than {args.folder}: use one teacher")
    if name == "energy" and not (known.energy and shards.energy):
        old = args.folder if known.energy else args.known
        raise UserError(f"--rule energy: {old} has no energies: score again, or use --rule margin")
    found = quantile(known.files, name, 1 - keep / 100)
    what, rule = {
        "margin": (f"two likeliest classes differ by less than {found:.4g}", replace(rule, min_margin=found)),
        "min-score": (f"log-probability is below {found:.4g}", replace(rule, min_score=max(rule.min_score, found))),
        "energy": (f"energy is above {-found:.4g}", replace(rule, max_energy=-found)),
    }[name]
    print(f"=> foreign: images whose {what} ({keep:g} % of {args.known} pass)")
    return rule


def _copies(args: argparse.Namespace) -> NearCopies | None:
    if args.exclude is None:
        return None
    from classification.data.inference import find_paths
    from classification.pile.duplicates import NearCopies

    paths = find_paths([str(args.exclude)], sys.stdin.buffer).paths
    return NearCopies(paths, args.exclude_distance, os.cpu_count() or 1)


def main(argv: list[str] | None = None, prog: str = PROG) -> int:
    """Run the script, called by the name `prog`; return its exit status."""

    def work(words: list[str]) -> None:
        args = parse(words, prog)
        (score if words[0] == "score" else select)(args)

    given = sys.argv[1:] if argv is None else argv
    task = " ".join([prog, *(word for word in given[:1] if word in ("score", "select"))])
    return run_command(work, given, task)


if __name__ == "__main__":
    sys.exit(main())
