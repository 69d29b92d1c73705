"""Write a trained network as a file that other programs run: python export.py CHECKPOINT --to onnx --output FILE

Or as a page that classifies pictures in the browser: python export.py CHECKPOINT --demo FOLDER
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from classification.errors import RunError, UserError
from classification.options.fields import number
from classification.options.first_look import run_command
from classification.options.int8 import missing_packages as missing_for_onnx
from classification.options.parser import Parser
from classification.paths import exists, is_file, weights_of
from classification.system.new_files import check_new, folder_beside, free_name, move, write

if TYPE_CHECKING:
    from classification.data.trial import Trial
    from classification.models.fidelity import Fidelity
    from classification.models.trained import Trained
    from classification.system.npm import Package

PROG = "export.py"
OLDEST_OPSET = 18  # torch's exporter writes no older one
CALIBRATION_BATCH = 8  # images whose activations are kept at a time
KINDS = {
    "onnx": "one ONNX file; input `images`, output `logits`, any batch size",
    "pt2": "a torch.export program, any batch size",
    "safetensors": "the weights, and a model card FILE.md beside them",
    "int8": "ONNX with weights and activations of 8 bits, calibrated on images of --data",
}
DEMO = ("teacher", "teacher-arch", "runtime")  # options that need it
EXAMPLE = "example: %(prog)s runs/student/best.pth --to int8 --output student.onnx --data photos"


def build_parser(prog: str = PROG) -> Parser:
    """Return the parser; it needs no torch."""
    kinds = "; ".join(f"{name}: {text}" for name, text in KINDS.items())
    parser = Parser(prog, description=(__doc__ or "").partition(":")[0] + ".", epilog=EXAMPLE, allow_abbrev=False)
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="a best.pth, another file of weights, or a run folder")
    add("--to", choices=KINDS, help=kinds)
    add("--output", metavar="FILE", type=Path, help="the file to write")
    add("--force", action="store_true", help="replace FILE if it exists")
    about = "instead of --to and --output: a new folder with a page that classifies pictures in the browser"
    add("--demo", metavar="FOLDER", type=Path, help=about)
    add("--teacher", metavar="CHECKPOINT", help="with --demo: the network to show beside it (the teacher of the run)")
    add("--teacher-arch", metavar="NAME", help="with --demo: the teacher's network, if its checkpoint does not name it")
    about = "with --demo: the archive of onnxruntime-web, a file or an address (33 MB from the npm registry)"
    add("--runtime", metavar="ADDRESS", help=about)
    add(
        "--data",
        metavar="DIR",
        help="images to compare on: a data folder (its valid/; for int8 also train/, to calibrate), or any folder of "
        "images",
    )
    add(
        "--tolerance",
        type=number(float, 0),
        default=0.5,
        help="how many points top-1 may fall; if the whole 95%% interval lies below that, the file is kept as "
        "FILE.rejected (0.5)",
    )
    add("--with-preprocessing", action="store_true", help="the file takes bytes 0 to 255 and normalises them itself")
    add("--opset", type=number(int, OLDEST_OPSET), metavar="N", help="version of ONNX's operators, 18 or later")
    add("--arch", metavar="NAME", help="the network, if the checkpoint does not name it")
    add(
        "--network",
        default="student",
        metavar="NAME",
        help="which network of a mutual training: student, peer1, peer2 ... (student)",
    )
    _add_int8(parser)
    add(
        "--bad-images",
        choices=("stop", "skip"),
        default="stop",
        help="what to do with images that cannot be read: end with an error, or leave them out (stop)",
    )
    add("-b", "--batch-size", type=number(int, 1), default=32, metavar="N", help="images per batch (32)")
    add("-j", "--workers", type=number(int, 0), default=0, metavar="N", help="processes that read images (0)")
    return parser


def _add_int8(parser: argparse.ArgumentParser) -> None:
    """Add the options of --to int8."""
    add = parser.add_argument
    add(
        "--calibration",
        choices=("minmax", "entropy", "percentile"),
        help="int8: how the ranges of activations are found (the scales that --int8-epochs learned, or else minmax)",
    )
    add(
        "--calibration-images",
        type=number(int, 1),
        default=256,
        metavar="N",
        help="int8: number of images to calibrate on (256)",
    )
    add(
        "--reduce-range",
        choices=("auto", "on", "off"),
        default="auto",
        help="int8: weights of 7 instead of 8 bits; auto: if this processor lacks VNNI (auto)",
    )


def parse(words: list[str], prog: str = PROG) -> argparse.Namespace:
    """Return the options, checked as far as that needs no torch.

    Raises:
        UserError: a mistake in them.
    """
    parser = build_parser(prog)
    args = parser.parse_args(words)
    if args.demo is not None:
        return _parse_demo(args)
    if alone := [flag for flag in DEMO if getattr(args, flag.replace("-", "_")) is not None]:
        raise UserError(f"--{alone[0]} works only with --demo FOLDER")
    if missing := [f"--{name}" for name in ("to", "output") if getattr(args, name) is None]:
        parser.error(f"the following arguments are required: {', '.join(missing)}; or --demo FOLDER")
    if args.to == "int8" and args.data is None:
        raise UserError("--to int8 needs --data DIR: the images to calibrate on, in DIR/train or in DIR itself")
    if args.to == "safetensors" and args.with_preprocessing:
        raise UserError(
            "--with-preprocessing needs a graph, which safetensors files do not contain: use --to onnx or pt2"
        )
    if args.to not in ("onnx", "int8") and args.opset is not None:
        raise UserError("--opset works only with --to onnx or int8")
    _check_packages(args.to, f"--to {args.to}")
    args.checkpoint = _checkpoint(Path(args.checkpoint), args.network)
    for path in (args.output, *([_card(args.output)] if args.to == "safetensors" else [])):
        check_new(path, force=args.force, device=False)
    if args.output.resolve() == args.checkpoint.resolve():
        raise UserError(f"--output {args.output} is the checkpoint itself: give another")
    return args


def _parse_demo(args: argparse.Namespace) -> argparse.Namespace:
    given = [name for name in ("to", "output", "calibration") if getattr(args, name) is not None]
    given += [name for name in ("force", "with_preprocessing") if getattr(args, name)]
    if given:
        raise UserError(
            f"--{given[0].replace('_', '-')} has no effect on --demo, which writes a whole folder: leave it out"
        )
    _check_packages("onnx", "--demo")
    if exists(args.demo):
        raise UserError(f"--demo {args.demo} exists already and is not overwritten: give a new folder")
    check_new(args.demo, option="--demo")
    args.checkpoint = _checkpoint(Path(args.checkpoint), args.network)
    args.teacher = None if args.teacher is None else weights_of(Path(args.teacher))
    return args


def _check_packages(kind: str, option: str) -> None:
    if missing := missing_packages(kind):
        names = " ".join(missing)
        raise UserError(f"{option} needs {names}: `pip install {names}`, or the extra [export] of this project")


def missing_packages(kind: str) -> list[str]:
    """Return the packages that a kind of file needs and that are not installed."""
    return missing_for_onnx() if kind in ("onnx", "int8") else []


def _checkpoint(path: Path, network: str) -> Path:
    """Return the file of one network of a run."""
    path = weights_of(path)
    if network == "student":
        return path
    found = path.with_name(f"{'best_' if path.name.startswith('best') else ''}{network}.pth")
    if not network.startswith("peer") or not is_file(found):
        names = sorted(file.stem.removeprefix("best_") for file in path.parent.glob("*peer*.pth"))
        there = ", ".join(["student", *dict.fromkeys(names)])
        raise UserError(f"--network {network}: there is no file {found}; the networks of {path} are {there}")
    return found


def _card(path: Path) -> Path:
    return path.with_name(f"{path.name}.md")


def export(args: argparse.Namespace) -> None:
    """Write the file, run it again, and print it beside the network that it comes from.

    Raises:
        UserError: a mistake of the user's.
        RunError: the file is not as good as the network; it is kept under another name.
    """
    from classification.models.card import write_card
    from classification.models.trained import open_trained

    trained = open_trained(args.checkpoint, args.arch)
    print(f"=> {trained.note}")
    trial = _trial(args, trained)
    with folder_beside(args.output) as folder:
        file = folder / args.output.name
        write(file, _content(args, trained, trial))
        found = _check(args, trained, trial, file)
        if args.to == "safetensors":
            write(_card(file), write_card(trained, args.output.name).encode(errors="backslashreplace"))
        if fault := found.fault(args.tolerance, exact=args.to != "int8"):
            kept = free_name(args.output.with_name(f"{args.output.name}.rejected"))
            move(file, kept)
            raise RunError(f"rejected, {fault}; the file is kept as {kept}")
        move(file, args.output)
        if args.to == "safetensors":
            move(_card(file), _card(args.output))
    print(f"=> done: {args.output}", flush=True)


def export_demo(args: argparse.Namespace, package: Package | None = None) -> None:
    """Write the folder of a page; each network in it is run again first, and compared.

    Args:
        args: the options.
        package: what runs networks in the browser; None for onnxruntime-web.

    Raises:
        UserError: a mistake of the user's, or no archive of onnxruntime-web.
        RunError: a file that is not as good as its network.
    """
    from classification.models.trained import open_trained
    from classification.reports.demo import MEMBERS, RUNTIME, DemoNetwork, demo_files, recorded_teacher

    files = (package or RUNTIME).read(MEMBERS, args.runtime)
    places = {"Student": (args.checkpoint, args.arch)}
    if args.teacher is not None:
        places["Teacher"] = args.teacher, args.teacher_arch
    elif (recorded := recorded_teacher(args.checkpoint)) is not None:
        places["Teacher"] = recorded
    else:
        print(
            f"=> {args.checkpoint} names no teacher, or its file is gone: give --teacher CHECKPOINT to show one next "
            "to the student"
        )
    found = {role: open_trained(*place) for role, place in places.items()}
    networks = []
    as_onnx = argparse.Namespace(**{**vars(args), "to": "onnx", "with_preprocessing": True})
    with folder_beside(args.demo, "--demo") as folder:
        for role, trained in found.items():
            print(f"=> {role.lower()}: {trained.note}")
            trial = _trial(as_onnx, trained)
            content = _content(as_onnx, trained, trial)
            write(folder / role, content)
            alike = _check(as_onnx, trained, trial, folder / role, timed=False)  # the page says how long it takes
            if fault := alike.fault(args.tolerance, exact=True):
                raise RunError(f"the {role.lower()} is rejected, {fault}")
            networks.append(DemoNetwork(role, trained.arch, trained.classes, trained.preprocessing, content))
        page = folder / "page"
        page.mkdir()  # with the usual rights, which `folder` has not
        for name, content in demo_files(networks, files).items():
            write(page / name, content)
        move(page, args.demo)
    print(f"=> done: open {args.demo / 'index.html'} in a browser, or copy the folder to any web server", flush=True)


def _trial(args: argparse.Namespace, trained: Trained) -> Trial:
    """Return the images to compare on, and print what is to be said of them."""
    from classification.data.trial import random_trial, read_trial

    if args.data is None:
        trial = random_trial(trained.preprocessing)
    else:
        known, how = (trained.classes, trained.num_classes), {"skip_bad": args.bad_images == "skip"}
        seen, workers = trained.preprocessing, args.workers
        trial = read_trial(args.data, seen, *known, calibrate=args.to == "int8", workers=workers, **how)
    for note in trial.notes:
        print(f"=> {note}")
    return trial


def _content(args: argparse.Namespace, trained: Trained, trial: Trial) -> bytes:
    """Return the file's bytes."""
    from classification.models import exporting, quantised, rounding

    graph: dict[str, Any] = {"takes_bytes": args.with_preprocessing}
    if args.to == "safetensors":
        return exporting.to_safetensors(trained)
    if args.to == "pt2":
        return exporting.to_pt2(trained, **graph)
    model = exporting.to_onnx(trained, opset=args.opset, **graph)
    if args.to == "onnx":
        return model
    reduced = args.reduce_range == "on" or (args.reduce_range == "auto" and not quantised.wide_instructions())
    scales, method = {}, args.calibration or "minmax"
    count = min(args.calibration_images, len(trial.data.train))
    if trained.int8 and args.calibration is None:
        scales, count = rounding.learned_scales(trained, opset=args.opset, **graph), 1  # of one image nothing is taken
    how = "the scales that were learned" if scales else f"{count} images for calibration by {method}"
    print(f"=> int8: {how}, weights of {7 if reduced else 8} bits")
    prepare = exporting.input_function(trained, **graph)
    images = [prepare(batch) for batch in trial.calibration(count, CALIBRATION_BATCH, args.workers)]
    said = exporting.description(trained, **graph)
    return quantised.to_int8(model, images, said, method=method, reduce_range=reduced, scales=scales)


def _check(args: argparse.Namespace, trained: Trained, trial: Trial, file: Path, *, timed: bool = True) -> Fidelity:
    """Run the file again, print both side by side, and return what was found."""
    import torch

    from classification.models import cost, exporting, fidelity, quantised

    before = exporting.torch_runtime(trained)
    after = exporting.file_runtime(file, args.to, trained, takes_bytes=args.with_preprocessing)
    print(f"=> compared on {trial.description}")
    found = fidelity.compare(before, after, trial.batches(args.batch_size, args.workers))
    latencies = {}
    first, _ = next(iter(trial.batches(1)))
    for size in cost.SIZES if timed else ():
        images = first.expand(size, -1, -1, -1)
        ours, theirs = before.prepare(images), after.prepare(images)
        one, other = cost.median_times([partial(before.compute, ours), partial(after.compute, theirs)], seconds=2.0)
        latencies[size] = one, other
    weights = sum(value.nbytes for value in trained.network.state_dict().values())
    print("\n".join(fidelity.table(found, (weights, file.stat().st_size), latencies)))
    print(f"=> {torch.get_num_threads()} threads, {quantised.instruction_set()}; {exporting.package_versions(args.to)}")
    return found


def main(argv: list[str] | None = None, prog: str = PROG) -> int:
    """Run the script, called by the name `prog`; return its exit status."""
    return run_command(lambda words: _run(parse(words, prog)), argv, prog)


def _run(args: argparse.Namespace) -> None:
    (export if args.demo is None else export_demo)(args)


if __name__ == "__main__":
    sys.exit(main())
