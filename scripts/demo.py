"""The main job on scikit-learn's digits: a teacher, its student alone and distilled on three seeds; one table."""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from collect_run import collect
from prepare_digits import write_digits

from classification import main_base, main_mgd

COMMON = "--img-size 16 --train-crop pad --hflip 0 -b 25 --lr-schedule cosine --wd 5e-4 --lr 0.05 -p 1000 -j 0"
TEACHER = "-a cifar_resnet20 --epochs 30"
STUDENT = "-a cifar_resnet20_w0.5 --epochs 10"
DISTILL = "--teacher-arch cifar_resnet20 --distiller mgd --mgd-reducer amp --mgd-update-freq 2 --loss-factor 1e3"


def run(main: object, output: Path, options: str, seed: int) -> dict[str, Any]:
    """Run one of the main scripts, as one would type it, and return what it measured."""
    script = "main_base.py" if main is main_base else "main_mgd.py"
    words = [str(output.parent / "data"), *shlex.split(options), "--seed", str(seed), "--output", str(output)]
    print(f"\n$ python classification/{script} {shlex.join(words)}", flush=True)
    start = time.perf_counter()
    status = main.main(words)  # type: ignore[attr-defined]
    if status:
        sys.exit(status)
    return {**collect(output), "wall_seconds": time.perf_counter() - start}


def demo(folder: Path, per_class: int, seeds: list[int]) -> dict[str, list[dict[str, Any]]]:
    """Train a teacher in `folder`, then for each seed a student alone and a distilled one; return the measurements."""
    write_digits(folder / "data", per_class)
    distill = f"{STUDENT} {COMMON} {DISTILL} --teacher-resume {shlex.quote(str(folder / 'teacher' / 'best.pth'))}"
    runs: dict[str, list[dict[str, Any]]] = {"alone": [], "distilled": []}
    teacher = run(main_base, folder / "teacher", f"{TEACHER} {COMMON}", seeds[0])
    for seed in seeds:
        runs["alone"].append(run(main_base, folder / f"alone-{seed}", f"{STUDENT} {COMMON}", seed))
        runs["distilled"].append(run(main_mgd, folder / f"distilled-{seed}", distill, seed))
    return {"teacher": [teacher], **runs}


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Return top-1 of the last epoch (mean, standard deviation over seeds), seconds of a run, parameters."""
    lines = [f"{'':12}{'top-1 %':>8}{'+-':>7}{'seeds':>7}{'seconds':>9}{'parameters':>12}"]
    for role, results in runs.items():
        top1 = [result["last_top1"] for result in results]
        spread = f"{statistics.stdev(top1):.2f}" if len(top1) > 1 else ""
        seconds = statistics.mean(result["wall_seconds"] for result in results)
        lines.append(
            f"{role:12}{statistics.mean(top1):8.2f}{spread:>7}{len(top1):7}{seconds:9.1f}{results[0]['parameters']:12,}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S"))
    parser.add_argument("--per-class", type=int, default=20, help="labelled digits of each class")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the students; the first, the teacher's"
    )
    args = parser.parse_args()
    runs = demo(args.output, args.per_class, args.seeds)
    labelled = 10 * args.per_class
    print(f"\n{labelled} labelled digits; top-1 after the last epoch on the {1797 - labelled} others:\n\n{table(runs)}")
    print(f"\nruns are in {args.output}/ (metrics.jsonl, best.pth, flow/, TensorBoard events)")


if __name__ == "__main__":
    main()
