"""Store a teacher's outputs, to train without it: python reinforce.py CHECKPOINT [...] DIR --output FOLDER"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from classification.errors import UserError, one_line
from classification.options.fields import count, declared, number
from classification.options.first_look import run_command
from classification.options.groups import Data
from classification.options.parser import Parser, add_option
from classification.paths import exists, is_file, is_folder, relative
from classification.pile.packages import check_packages

if TYPE_CHECKING:
    from classification.options.stored_teacher import StoredPlan, ViewOptions
    from classification.pile.reinforcing import StoreWork
    from classification.pile.scoring import Teachers

PROG = "reinforce.py"
VIEWS = ("img_size", "train_crop", "hflip", "randaugment", "random_erasing", "mixup", "cutmix")
EXAMPLE = """examples:
  %(prog)s runs/teacher/best.pth photos --samples 32 --output cache
  torchrun --nproc-per-node 8 classification/reinforce.py a.pth b.pth photos --output cache
  main_mgd.py photos --arch mobilenet_v1 --distiller kd --teacher-cache cache"""


def build_parser(prog: str = PROG) -> Parser:
    """Return the parser; it needs no torch."""
    kept = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        prog,
        description=(__doc__ or "").partition(":")[0] + ".",
        epilog=EXAMPLE,
        allow_abbrev=False,
        formatter_class=kept,
    )
    add = parser.add_argument
    about = (
        "one or more teachers (a best.pth, other weights, or a run folder), whose probabilities are averaged; then "
        "the data folder"
    )
    add("paths", metavar="PATH", nargs="+", help=about)
    add(
        "--output",
        required=True,
        metavar="FOLDER",
        type=Path,
        help="folder to write the shards into; the same line resumes",
    )
    add("--samples", type=number(int, 1, 65535), default=32, metavar="N", help="views per image (32)")
    add("--top-k", type=count, default=10, metavar="K", help="classes stored per view, most likely first (10)")
    add("--check", action="store_true", help="compute 1 %% of the images again, and compare them with FOLDER")
    about = (
        "how views are drawn, by default as for the first teacher; a run with --teacher-cache takes these options "
        "from FOLDER"
    )
    views = parser.add_argument_group(about)
    for option in declared(Data):
        if option.name in VIEWS:
            add_option(views, option)
    more = parser.add_argument_group("how it is done")
    add = more.add_argument
    add("--seed", type=number(int, 0, 2**31 - 1), default=0, help="seed of the views (0)")
    add("--shard-size", type=count, default=256, metavar="N", help="images per shard (256)")
    add("-b", "--batch-size", type=count, default=64, metavar="N", help="views per batch (64)")
    usual = min(4, os.cpu_count() or 1)
    add("-j", "--workers", type=number(int, 0, 1024), default=usual, metavar="N", help=f"loading processes ({usual})")
    add("--arch", metavar="NAME", help="the network, if the checkpoints do not name it")
    types = ("float32", "bfloat16", "float16")
    add("--teacher-dtype", choices=types, default="float32", help="number type of the teachers (float32)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (auto)")
    about = (
        "what to do with images that cannot be read: stop: end with an error; skip: read all images first, and "
        "leave such images out (stop)"
    )
    add("--bad-images", choices=("stop", "skip"), default="stop", help=about)
    return parser


def parse(words: list[str], prog: str = PROG) -> argparse.Namespace:
    """Return the options, checked as far as that needs no torch.

    Raises:
        UserError: a mistake in them.
    """
    args = build_parser(prog).parse_intermixed_args(words)  # options may stand between the paths
    check_packages(("pyarrow",), prog)
    *args.checkpoints, args.data = map(Path, args.paths)
    if not args.checkpoints:
        raise UserError(f"name the teacher's checkpoint, then the data folder, as in {prog} best.pth photos")
    if not is_folder(args.data):
        what = "is no folder" if exists(args.data) else "does not exist"
        raise UserError(f"data folder {args.data} {what}: the last path names the images, those before it the teachers")
    return args


def _checkpoint(path: Path) -> Path:
    return path / "best.pth" if is_folder(path) and is_file(path / "best.pth") else path


def find_training_images(root: Path, classes: list[str] | None, bad: str, workers: int) -> tuple[list[str], list[str]]:
    """Return the paths of the training images, relative to the data folder, and notes.

    They are those of train/; a folder without train/ and valid/ is one of images alone.

    Raises:
        UserError: no images, names that a table cannot hold, images that cannot be read, classes of another teacher.
    """
    from classification.data.image_files import LeftOut, class_names
    from classification.data.images import find_unreadable
    from classification.data.inference import find_paths
    from classification.pile.scoring import usable_paths

    split = next((root / name for name in ("valid", "val") if is_folder(root / name)), None)
    if classes and split is not None and (other := sorted(set(class_names(split, LeftOut())) - set(classes))):
        raise UserError(f"the teacher has no class {other[0]}, but {split} has: give a teacher of these classes")
    top = root / "train" if is_folder(root / "train") else root
    found = find_paths([str(top)], sys.stdin.buffer)
    kept, causes = usable_paths(found.paths)
    if causes:
        path, why = next(iter(causes.items()))
        raise UserError(f"{path} cannot stand in a table ({why})")
    notes = list(found.notes)
    if bad == "skip" and (broken := find_unreadable(kept, workers)):
        kept = [path for path in kept if path not in broken]
        notes.append(f"left out {len(broken)} images that cannot be read, for example {next(iter(broken))}")
        if not kept:
            raise UserError(f"no image of {top} can be read; the first is {next(iter(broken))}")
    return [relative(path, root) for path in kept], notes


def reinforce(args: argparse.Namespace) -> None:
    """Store what is missing, or check what is there.

    Raises:
        UserError: a mistake of the user's, found before work starts.
        RunError: what is there differs.
    """
    from classification.options.config import check_devices
    from classification.options.devices import Devices
    from classification.pile import reinforcing
    from classification.pile.scoring import open_teachers
    from classification.runs.world import device_of
    from classification.system.memory import keep_freed_memory

    devices = Devices(device=args.device)
    check_devices(devices)
    where = device_of(devices, int(os.environ.get("LOCAL_RANK", "0")))
    teachers = open_teachers([_checkpoint(path) for path in args.checkpoints], args.arch, where, same_crop=False)
    digest = teachers.digest()
    if args.img_size:
        teachers = teachers.at(args.img_size)
    names = next((member.classes for member in teachers.members if member.classes), None)
    paths, notes = find_training_images(args.data, names, args.bad_images, args.workers)
    plan = _plan(args, teachers, digest, names, paths)
    rank, size = (int(os.environ.get(name, usual)) for name, usual in (("RANK", "0"), ("WORLD_SIZE", "1")))
    work = reinforcing.StoreWork(args.output, plan, args.data, paths, rank, size, args.batch_size, args.workers)
    if args.check:
        print(f"=> checked: {reinforcing.check_stored(work, reinforcing.make_fast(teachers, plan.dtype))}")
        return
    classifier = reinforcing.classifier_bytes(teachers)
    if classifier is None or len(classifier) > reinforcing.CLASSIFIER_BYTES * len(paths):
        notes.append(
            "wkd_logits cannot train from this: the teacher's last layer is no linear one, or too large to keep"
        )
        classifier = None
    reinforcing.begin_folder(work, classifier)
    keep_freed_memory()
    for note in [*notes, *(member.note for member in teachers.members)] if rank == 0 else ():
        print(f"=> {one_line(note)}", file=sys.stderr)
    _store(work, reinforcing.make_fast(teachers, plan.dtype))


def _plan(
    args: argparse.Namespace, teachers: Teachers, digest: str, names: list[str] | None, paths: list[str]
) -> StoredPlan:
    """Return what is stored, and of whom; `digest` is that of the teachers at their own size."""
    from classification.options.stored_teacher import StoredPlan
    from classification.pile.reinforcing import render_versions
    from classification.pile.shards import paths_digest

    first = teachers.members[0]
    return StoredPlan(
        teacher=digest,
        archs=[member.arch for member in teachers.members],
        sizes=[member.preprocessing.img_size for member in teachers.members],
        dtype=args.teacher_dtype,
        num_classes=first.num_classes,
        classes=names,
        top=min(args.top_k, first.num_classes),
        samples=args.samples,
        seed=args.seed,
        views=_views(args, teachers),
        num_images=len(paths),
        images=paths_digest(paths),
        shard_size=args.shard_size,
        versions=render_versions(),
    )


def _views(args: argparse.Namespace, teachers: Teachers) -> ViewOptions:
    from classification.options.stored_teacher import ViewOptions

    seen = teachers.members[0].preprocessing
    asked = {name: getattr(args, name) for name in VIEWS}
    asked["img_size"] = asked["img_size"] or seen.img_size
    # Our checkpoints of a training with the crop "pad" resize images to the square itself; those of others may, too.
    own = ":" not in teachers.members[0].arch
    asked["train_crop"] = asked["train_crop"] or ("pad" if own and seen.resize == seen.img_size else "resized")
    return ViewOptions(**asked, mean=seen.mean)


def _store(work: StoreWork, teachers: Teachers) -> None:
    """Store, and say how far it is."""
    from tqdm import tqdm

    from classification.pile.reinforcing import bytes_per_image, store_shards
    from classification.pile.scoring import Pace

    plan, missing = work.plan, work.missing()
    mine = [number for number in missing if number % work.size == work.rank]
    pace = Pace(plan.samples * sum(len(work.images(number)) for number in mine))
    if work.rank == 0:
        each = bytes_per_image(plan, work.paths)
        print(
            f"=> {plan.num_images} images x {plan.samples} samples, {plan.views.img_size} px, crop "
            f"{plan.views.train_crop}, {plan.top} of {plan.num_classes} classes: at most about "
            f"{each * plan.num_images / 1e6:.1f} MB in {work.folder} ({each / 1e3:.1f} kB an image)",
            flush=True,
        )
        if len(missing) < plan.num_shards:
            print(f"=> resumed: {plan.num_shards - len(missing)} of {plan.num_shards} shards are there already")
    with tqdm(total=pace.total, leave=False, disable=None, dynamic_ncols=True, unit="view") as bar:

        def advance(views: int) -> None:
            pace.done += views
            bar.update(views)

        for shard in store_shards(work, teachers, advance):
            bar.write(f"=> shard {shard + 1} of {plan.num_shards}: {pace.line()}".replace("images/s", "views/s"))
    left = work.missing()
    rest = f"; other processes still work on {len(left)} shards"
    size = sum(path.stat().st_size for path in work.folder.glob("*.parquet"))
    views = plan.samples * plan.num_images
    sizes = f"; {size / 1e6:.2f} MB, {size / views:.1f} bytes per sample, {size / plan.num_images:.0f} per image"
    print(f"=> done: {pace.done} views stored into {work.folder}{rest if left else sizes}", flush=True)


def main(argv: list[str] | None = None, prog: str = PROG) -> int:
    """Run the script, called by the name `prog`; return its exit status."""
    return run_command(lambda words: reinforce(parse(words, prog)), argv, prog)


if __name__ == "__main__":
    sys.exit(main())
