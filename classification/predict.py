"""Classify images with a trained network: python predict.py CHECKPOINT PATH..."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from classification.errors import RunError, UserError, one_line
from classification.options.fields import count, number
from classification.options.first_look import run_command
from classification.options.parser import Parser
from classification.paths import exists, is_file, is_folder, weights_of
from classification.system.new_files import check_new, write_whole

if TYPE_CHECKING:
    from torch import device

    from classification.data.inference import PixelBatch
    from classification.models.exported import Classifier
    from classification.runs.predictions import Prediction, Table

PROG = "predict.py"
USUAL_TOP = 5  # classes per image
EXAMPLE = "example: %(prog)s runs/student/best.pth holidays --csv holidays.csv"


def build_parser(prog: str = PROG) -> Parser:
    """Return the parser; it needs no torch."""
    parser = Parser(prog, description=(__doc__ or "").partition(":")[0] + ".", epilog=EXAMPLE, allow_abbrev=False)
    add = parser.add_argument
    add(
        "checkpoint", metavar="CHECKPOINT", type=Path, help="a best.pth, weights, a run folder, or a file of mgd export"
    )
    about = "an image; a folder of images; a tar shard; a list with one path per line; or - for a list on stdin"
    add("paths", metavar="PATH", nargs="+", help=about)
    add("--top-k", type=count, metavar="K", help=f"classes per image, most likely first ({USUAL_TOP})")
    add("--csv", type=Path, metavar="FILE", help="write path, rank, class and probability")
    add("--json", type=Path, metavar="FILE", help="write class_ids, scores, file_name and label_names")
    add("--force", action="store_true", help="replace these files if they exist")
    add(
        "--class-names",
        type=Path,
        metavar="FILE",
        help="file with one class name per line, instead of the names in the checkpoint",
    )
    add("-b", "--batch-size", type=count, default=32, metavar="N", help="images per batch (32)")
    usual = min(4, os.cpu_count() or 1)
    add("-j", "--workers", type=number(int, 0, 1024), default=usual, metavar="N", help=f"loading processes ({usual})")
    add("--arch", metavar="NAME", help="the network, if the checkpoint does not name it")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (auto)")
    return parser


def parse(words: list[str], prog: str = PROG) -> argparse.Namespace:
    """Return the options, checked as far as that needs no torch.

    Raises:
        UserError: a mistake in them.
    """
    args = build_parser(prog).parse_intermixed_args(words)
    args.checkpoint = weights_of(args.checkpoint)
    inputs = {"the checkpoint": args.checkpoint, "the file of --class-names": args.class_names}
    taken = {path.resolve(): name for name, path in inputs.items() if path is not None}
    for option, path in (("--csv", args.csv), ("--json", args.json)):
        if path is None:
            continue
        if path.resolve() in taken:
            raise UserError(f"{option} {path} is {taken[path.resolve()]}: give another file")
        if not exists(path) or is_file(path) or is_folder(path):  # not /dev/stdout
            check_new(path, force=args.force, option=option)
        taken[path.resolve()] = f"the file of {option}"
    return args


def predict(args: argparse.Namespace) -> None:
    """Print the classes of every image, and write the files.

    Raises:
        UserError: a mistake of the user's, found before work starts.
        RunError: some images could not be read; what was found of the others is written.
    """
    from classification.data.inference import find_paths, read_batches
    from classification.options.config import check_devices
    from classification.options.devices import Devices
    from classification.runs import predictions
    from classification.runs.world import device_of

    devices = Devices(device=args.device)
    check_devices(devices)
    found = find_paths(args.paths, sys.stdin.buffer)
    network = _open(args, device_of(devices))
    names = predictions.class_names(args.class_names, network.classes, network.num_classes)
    _check_inputs(args, found.paths)
    notes = [*found.notes, network.note]
    if network.classes is None and args.class_names is None:
        notes.append(f"{args.checkpoint} names no classes, so their numbers are shown: give --class-names FILE")
    if args.top_k is not None and args.top_k > network.num_classes:
        notes.append(f"--top-k {args.top_k}: there are {network.num_classes} classes, and all are shown")
    for note in notes:
        print(f"=> {one_line(note)}", file=sys.stderr)
    batches = read_batches(found.paths, network.preprocessing, args.batch_size, args.workers)
    table, top = predictions.Table(found.paths, names), min(args.top_k or USUAL_TOP, network.num_classes)
    said, bad = _said(network, batches, table, top, len(found.paths))
    if args.csv is not None:
        write_whole(args.csv, predictions.to_csv(said, names), "--csv")
    if args.json is not None:
        write_whole(args.json, predictions.to_json(said, names), "--json")
    if bad:
        raise RunError(f"{bad} of {len(found.paths)} images could not be read and were skipped")


def _open(args: argparse.Namespace, where: device) -> Classifier:
    """Open the checkpoint, or the exported file, which says its network and runs on the CPU."""
    from classification.models.exported import kind_of, open_checkpoint, open_exported

    kind = kind_of(args.checkpoint)
    if kind is None:
        return open_checkpoint(args.checkpoint, args.arch, where)
    for option, given in (("--arch", args.arch is not None), ("--device", args.device not in ("auto", "cpu"))):
        if given:
            raise UserError(
                f"{args.checkpoint} is an exported file, which runs on the CPU as it is: leave out {option}"
            )
    return open_exported(args.checkpoint, kind)


def _check_inputs(args: argparse.Namespace, paths: list[str]) -> None:
    """Refuse to write over an image."""
    for option, path in (("--csv", args.csv), ("--json", args.json)):
        if path is not None and is_file(path) and any(Path(image).resolve() == path.resolve() for image in paths):
            raise UserError(f"{option} {path} is one of the images: give another file")


def _said(
    network: Classifier, batches: Iterator[PixelBatch], table: Table, top: int, total: int
) -> tuple[list[Prediction], int]:
    """Print the line of every image; return all predictions, and how many images could not be read."""
    import torch
    from tqdm import tqdm

    from classification.runs.predictions import predictions

    said, bad = [], 0
    with tqdm(total=total, leave=False, disable=None, dynamic_ncols=True) as bar:
        for batch in batches:
            for path, cause in batch.unreadable:
                bar.write(one_line(f"image {path} cannot be read ({cause})"), file=sys.stderr)
            bad += len(batch.unreadable)
            if batch.paths:
                try:
                    logits = network.logits(batch.pixels)
                except torch.OutOfMemoryError as error:
                    raise RunError(f"a batch of {len(batch.paths)} images needs too much memory: lower -b") from error
                new = predictions(batch.paths, logits, top)
                bar.write("\n".join(map(table.line, new)))
                said += new
            bar.update(len(batch.paths) + len(batch.unreadable))
    return said, bad


def main(argv: list[str] | None = None, prog: str = PROG) -> int:
    """Run the script, called by the name `prog`; return its exit status."""
    return run_command(lambda words: predict(parse(words, prog)), argv, prog)


if __name__ == "__main__":
    sys.exit(main())
