"""Say whether distillation helps on a task: python compare.py DIR --students ARCH... --seeds K --output FOLDER"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from classification.errors import RunError, UserError
from classification.options.fields import Option, count, number
from classification.options.first_look import write_any_name
from classification.options.options import all_options
from classification.options.parser import Parser, add_options, typed_words
from classification.paths import exists, is_folder, weights_of

if TYPE_CHECKING:
    from classification.reports.comparison import Plan
    from classification.training.estimate import Cost

PROG = "compare.py"
EXAMPLE = """example: %(prog)s photos --students mobilenet_v1 --teacher runs/teacher/last.pth \\
    --img-size 128 --epochs 15 -b 32 --output runs/compare
Options of training, such as --epochs and --lr, are those of mgd train (see --help-all there). All runs use them."""
# What compare.py says itself, or what belongs to a single run.
OWN = {
    *("data", "arch", "teacher_arch", "teacher_resume", "output", "resume", "resume_override", "evaluate", "seed"),
    *("start_epoch", "world_size", "rank", "dist_url", "labels"),
}
BUDGET = {"epochs": "--epochs", "batch_size": "-b", "accumulate": "--accumulate"}


def shared_options() -> list[Option]:
    """Return the options that all runs take over."""
    return [option for option in all_options(distillation=False) if option.name not in OWN]


def build_parser(prog: str = PROG, *, with_shared: bool = True) -> Parser:
    """Return the parser; it needs no torch."""
    parser = Parser(
        prog,
        usage="%(prog)s DIR --students ARCH... --output FOLDER [options]",
        description=(__doc__ or "").partition(":")[0] + ".",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("data", metavar="DIR", help="folder of photographs: train/CLASS/*.jpg and valid/CLASS/*.jpg (or val/)")
    add("--students", nargs="+", required=True, metavar="ARCH", help="networks to train")
    usual = ["alone", "kd", "recommended"]
    about = (
        "what to compare with training alone: a sum of terms, such as kd or mgd+ofd; the name of a file in "
        "classification/recipes, such as recommended; or a YAML file"
    )
    add("--recipes", nargs="+", default=usual, metavar="NAME", help=f"{about} ({' '.join(usual)})")
    add("--seeds", type=number(int, 2, 1000), default=5, metavar="K", help="largest number of runs per recipe (5)")
    add(
        "--output",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="folder of all runs and results; the same line resumes",
    )
    add("--teacher", metavar="CHECKPOINT", help="run folder or weights of the teacher; default: one is trained first")
    add(
        "--teacher-arch",
        metavar="ARCH",
        help="the teacher's network; default: the one in its file, or resnet50 (resnet152 for the student resnet50)",
    )
    add(
        "--teacher-epochs",
        type=count,
        metavar="N",
        help="epochs of the teacher's training; default: as many as for the students",
    )
    margin = number(float, 0, 100)
    add(
        "--margin",
        type=margin,
        default=0.5,
        metavar="POINTS",
        help="largest difference of top-1 that does not matter, in points (0.5)",
    )
    sure = number(float, 0.5, 0.9999)
    add("--confidence", type=sure, default=0.95, metavar="P", help="confidence of all intervals together (0.95)")
    add("--jobs", type=count, default=1, metavar="N", help="runs at the same time (1)")
    add("--threads", type=count, metavar="N", help="threads per run; default: the number of cores divided by --jobs")
    add("--page", type=Path, metavar="FILE.html", help="write a page about all runs, as mgd report does")
    add("--plan", action="store_true", help="only print how long the comparison takes and what it needs")
    if with_shared:
        add_options(parser, shared_options())
    return parser


@dataclass(frozen=True)
class Asked:
    """What was typed.

    Args:
        own: the options of compare.py.
        words: those of training.
    """

    own: argparse.Namespace
    words: tuple[str, ...]

    @property
    def threads(self) -> int:
        """Threads of a run."""
        return int(self.own.threads or max(1, (os.cpu_count() or 1) // self.own.jobs))


def parse(words: list[str], prog: str = PROG) -> Asked:
    """Return what was typed, as far as it can be checked without torch.

    Raises:
        UserError: a mistake in it.
    """
    if "-h" in words or "--help" in words:
        build_parser(prog, with_shared=False).parse_args(["--help"])
    parser = build_parser(prog)
    taken = {flag: option.name for option in all_options(distillation=True) for flag in option.flags}
    for word in words:
        flag = word.split("=")[0]
        if flag in taken and flag not in parser._option_string_actions:
            near = difflib.get_close_matches(flag, parser._option_string_actions, n=1)
            raise UserError(
                f"{flag} belongs to a single run: mgd compare sets it, or you can write it into a recipe file"
                + (f"; close is {near[0]}" if near else "")
            )
        if word.startswith("--") and flag not in parser._option_string_actions:
            parser.error(f"unrecognized arguments: {word}")  # before others are missed
    own = parser.parse_args(words)
    return Asked(own, tuple(typed_words(parser, own, shared_options())))


def plan_of(asked: Asked) -> tuple[Plan, list[str]]:
    """Return the plan, checked, and the classes of the images.

    Raises:
        UserError: a mistake of the user's.
    """
    from classification.data.folders import read_folder
    from classification.models import known_name
    from classification.models.weights import read_weights
    from classification.options.config import parse as parse_run
    from classification.options.names import DEFAULT_TEACHER
    from classification.options.terms import mutual
    from classification.reports.comparison import ALONE, Plan, Recipe

    own, words = asked.own, asked.words
    for option, given in (("--students", own.students), ("--recipes", own.recipes)):
        if joined := next((word for word in given if "," in word and not exists(Path(word))), None):
            raise UserError(f"{option} {joined}: separate them by spaces, as in {option} {joined.replace(',', ' ')}")
    data = read_folder(own.data, train_list=own.train_list, valid_list=own.valid_list, num_classes=own.num_classes)
    if own.teacher is not None:
        file = weights_of(Path(own.teacher))
        arch = own.teacher_arch or known_name(read_weights(str(file)).arch or "")
        teacher = ("--teacher-resume", str(file), *(("--teacher-arch", arch) if arch else ()))
        trains: tuple[str, ...] = ()
        if own.teacher_epochs:
            raise UserError("--teacher-epochs has no effect: the network of --teacher is trained already")
    else:
        arch = own.teacher_arch or DEFAULT_TEACHER.get(own.students[0], "resnet50")
        teacher = ("--teacher-resume", str(own.output / "runs" / "teacher" / "last.pth"), "--teacher-arch", arch)
        trains = (*words, *(("--epochs", str(own.teacher_epochs)) if own.teacher_epochs else ()), "-a", arch)
    named = own.recipes if ALONE in own.recipes else [ALONE, *own.recipes]
    recipes = tuple(Recipe.of(word) for word in named)
    if own.config and (twice := [recipe.name for recipe in recipes if "--config" in recipe.words]):
        raise UserError(
            f"--config and the recipe {twice[0]} are both recipe files: type the options of --config instead"
        )
    peers = tuple(
        recipe.name
        for recipe in recipes
        if recipe.script == "main_mgd"
        and mutual(parse_run([own.data, *words, *recipe.words], "main_mgd.py", distillation=True).table)
    )
    plan = Plan(
        own.data, tuple(own.students), recipes, own.seeds, own.confidence, own.margin, 100 / len(data.valid),
        words, teacher, trains, peers,
    )  # fmt: skip
    check_budget(plan)
    return plan, data.classes


def check_budget(plan: Plan) -> None:
    """Refuse recipes that train for longer than others, or on images of another size.

    Raises:
        UserError: naming the recipe and the option to type.
    """
    from classification.options.config import parse as parse_run

    found = {}
    for pair in plan.pairs():
        script, words = plan.words_of(pair)
        options = parse_run(list(words), f"{script}.py", distillation=script == "main_mgd")
        values = {flag: getattr(options.optimisation, name) for name, flag in BUDGET.items()}
        found[pair] = {**values, "--img-size": options.data.img_size}
    first, usual = next(iter(found.items()))
    for pair, values in found.items():
        for flag, value in values.items():
            if value != usual[flag]:
                raise UserError(
                    f"the recipe {pair[1]} has {flag} {value}, and {first[1]} {usual[flag]}: type {flag} N, so that "
                    "all have the same budget"
                )


def check_output(folder: Path) -> None:
    """Refuse an output folder that is something else, or holds something else.

    Raises:
        UserError: it does.
    """
    from classification.reports.comparison import PLAN
    from classification.runs.checkpoint import LOCK

    if exists(folder) and not is_folder(folder):
        raise UserError(f"--output {folder} is a file: give a folder")
    if not os.access(place := existing(folder), os.W_OK):
        raise UserError(f"--output {folder}: {place} cannot be written to: give another")
    if is_folder(folder) and not exists(folder / PLAN) and any(path.name != LOCK for path in folder.iterdir()):
        raise UserError(f"--output {folder} contains files that are not of a comparison: give another folder")


def existing(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    return next(path for path in (folder.resolve(), *folder.resolve().parents) if is_folder(path))


def foresee(plan: Plan, classes: list[str], asked: Asked) -> str:
    """Measure a few steps of every recipe; return how long all takes, and what it needs.

    Raises:
        UserError: a mistake in a recipe, or a disk that is too small.
        RunError: steps that fail.
    """
    import multiprocessing
    import shutil
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    from classification.training.estimate import TEACHER, NewTeacher, Tried, estimate

    pairs, trains = plan.pairs(), bool(plan.teacher_words)
    file = plan.teacher[1]
    tried = [Tried("main_base", (plan.data, *plan.teacher_words))] if trains else []
    for script, words in map(plan.words_of, pairs):
        tried.append(Tried(script, tuple(TEACHER if trains and word == file else word for word in words)))
    teacher = NewTeacher(plan.teacher[-1], classes) if trains else None
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            costs, notes = pool.submit(estimate, tried, teacher, asked.threads, time.time()).result()
        except BrokenProcessPool as error:
            raise RunError(
                "the process that tried the recipes died: if memory is short, lower -b or --img-size"
            ) from error
    for note in notes:
        print(f"=> {note}", flush=True)
    first, rest = (costs[:1], costs[1:]) if trains else ([], costs)
    seconds = sum(c.seconds for c in first) + plan.seeds * sum(c.seconds for c in rest) / min(asked.own.jobs, len(rest))
    disk = sum(c.disk_bytes for c in first) + plan.seeds * sum(c.disk_bytes for c in rest)
    if (free := shutil.disk_usage(existing(asked.own.output)).free) < disk:
        raise UserError(
            f"--output {asked.own.output} will take {_size(disk)}, but only {_size(free)} are free: make room"
        )
    return said_of(plan, costs, seconds, disk, asked.own.jobs)


def said_of(plan: Plan, costs: list[Cost], seconds: float, disk: int, jobs: int) -> str:
    """Return what is said before the first run."""
    from classification.runs.progress import duration

    runs = f"{plan.seeds * len(plan.pairs())} runs at most ({len(plan.pairs())} per seed)"
    teacher = " and the teacher's" if plan.teacher_words else ""
    memory = min(jobs, len(costs)) * max(cost.memory_bytes for cost in costs)
    return f"{runs}{teacher}: about {duration(seconds)} at most, {_size(memory)} of memory, {_size(disk)} of disk"


def _size(amount: float) -> str:
    return f"{amount / 1e9:.1f} GB" if amount >= 1e9 else f"{max(1, amount / 1e6):.0f} MB"


def compare(asked: Asked) -> None:
    """Run the comparison; what is done already is kept.

    Raises:
        UserError: a mistake of the user's, found before work starts.
        RunError: a run that failed.
    """
    from classification.reports.comparison import PLAN, save_plan
    from classification.runs.checkpoint import lock_folder

    folder = asked.own.output
    check_output(folder)
    if asked.own.page is not None:
        from classification.reports.packages import check_packages
        from classification.system.new_files import check_new

        check_packages()
        check_new(asked.own.page, force=True, option="--page")
    plan, classes = plan_of(asked)
    if exists(folder / PLAN):
        save_plan(plan, folder)
    else:
        print(f"=> {foresee(plan, classes, asked)}", flush=True)
    if asked.own.plan:
        return
    with lock_folder(folder):
        save_plan(plan, folder)
        for name in ("runs", "logs"):
            (folder / name).mkdir(exist_ok=True)
        for line in run(plan, asked):
            print(line, flush=True)


def run(plan: Plan, asked: Asked) -> Iterator[str]:
    """Do the runs seed by seed, until all is decided; yield what is to be said, the verdicts last."""
    from classification.reports import comparison
    from classification.runs.repeated import last_top1, run_all, warnings_in

    folder, jobs, warned = asked.own.output, asked.own.jobs, dict[str, None]()
    if plan.teacher_words:
        for done in run_all([plan.teacher_command(folder)], jobs=1, threads=asked.own.threads or os.cpu_count() or 1):
            yield f"teacher: top-1 {last_top1(done.folder):.2f}"
    found: dict[tuple[str, str], dict[int, float]] = {}
    verdicts = comparison.judge_all(plan, found)
    for seed in comparison.seeds_of(plan):
        commands = {plan.command(folder, pair, seed): pair for pair in comparison.undecided_pairs(plan, verdicts)}
        for done in run_all(list(commands), jobs=jobs, threads=asked.threads):
            pair = commands[done]
            found.setdefault(pair, {})[seed] = top1 = last_top1(done.folder)
            yield f"{pair[0]}, {pair[1]}, seed {seed}: top-1 {top1:.2f}"
            new = [line for line in warnings_in(done.log) if line not in warned]
            yield from new
            warned |= dict.fromkeys(new)
        verdicts |= {p: v for p, v in comparison.judge_all(plan, found).items() if seed in found.get(p, {})}
        comparison.save_comparison(plan, found, verdicts, folder)
        if not comparison.undecided_pairs(plan, verdicts):
            break
    yield comparison.table(plan, found, verdicts)
    decided_first = sorted(verdicts.items(), key=lambda item: not item[1].decided)
    lines = [comparison.describe_verdict(verdict, pair, plan.confidence) for pair, verdict in decided_first]
    if asked.own.page is not None:
        runs = [plan.command(folder, pair, seed).folder for pair in found for seed in found[pair]]
        write_page(asked.own.page, runs, "\n".join(f"{line}." for line in lines))
    yield from lines


def write_page(path: Path, runs: list[Path], verdict: str) -> None:
    """Write the page about the runs."""
    from classification.reports.page import make_page
    from classification.system.new_files import write_whole

    write_whole(path, make_page(runs, verdict=verdict).encode(errors="backslashreplace"), "--page")


def main(argv: list[str] | None = None, prog: str = PROG) -> int:
    """Run the script, called by the name `prog`; return its exit status."""
    write_any_name()
    words = sys.argv[1:] if argv is None else argv
    try:
        asked_or_status = _asked(words, prog)
        if isinstance(asked_or_status, int):
            return asked_or_status
        from classification.system.exit_status import attempt  # after help and typing mistakes, which need no torch

        status = attempt(lambda: compare(asked_or_status), prog)
        if status in (130, 143):
            print(f"{prog}: type the same line to resume", file=sys.stderr, flush=True)
        return status
    except SystemExit:  # a help text was printed
        return 0


def _asked(words: list[str], prog: str) -> Asked | int:
    try:
        return parse(words, prog)
    except UserError as error:
        print(f"{prog}: {error}", file=sys.stderr, flush=True)
        return 2


if __name__ == "__main__":
    sys.exit(main())
