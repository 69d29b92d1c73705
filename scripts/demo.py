"""The main job on scikit-learn's digits: a teacher, its student alone, the same student distilled; one table."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path

from collect_run import collect
from prepare_digits import write_digits

from classification import main_base, main_mgd

COMMON = "--img-size 16 --train-crop pad --hflip 0 -b 25 --lr-schedule cosine --wd 5e-4 --lr 0.05 -p 1000 -j 0"
TEACHER = "-a cifar_resnet20 --epochs 30"
STUDENT = "-a cifar_resnet20_w0.5 --epochs 10"
DISTILL = "--teacher-arch cifar_resnet20 --distiller mgd --mgd-reducer amp --mgd-update-freq 2 --loss-factor 1e3"


def run(role: str, main: object, folder: Path, options: str, seed: int) -> dict[str, object]:
    """Run one of the main scripts, as one would type it, and return a row of the table."""
    script = "main_base.py" if main is main_base else "main_mgd.py"
    words = [str(folder / "data"), *shlex.split(options), "--seed", str(seed), "--output", str(folder / role)]
    print(f"\n$ python classification/{script} {shlex.join(words)}", flush=True)
    start = time.perf_counter()
    status = main.main(words)  # type: ignore[attr-defined]
    if status:
        sys.exit(status)
    seconds = time.perf_counter() - start
    result = collect(folder / role)
    return {"role": role, "top1": result["last_top1"], "seconds": seconds, "parameters": result["parameters"]}


def demo(folder: Path, per_class: int, seed: int) -> list[dict[str, object]]:
    """Run the three steps in `folder` and return the table's rows."""
    write_digits(folder / "data", per_class)
    teacher = f"--teacher-resume {shlex.quote(str(folder / 'teacher' / 'best.pth'))}"
    return [
        run("teacher", main_base, folder, f"{TEACHER} {COMMON}", seed),
        run("alone", main_base, folder, f"{STUDENT} {COMMON}", seed),
        run("distilled", main_mgd, folder, f"{STUDENT} {COMMON} {DISTILL} {teacher}", seed),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S"))
    parser.add_argument("--per-class", type=int, default=20, help="labelled digits of each class")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows = demo(args.output, args.per_class, args.seed)
    labelled = 10 * args.per_class
    print(f"\n{labelled} labelled digits; top-1 after the last epoch on the {1797 - labelled} others:\n")
    print(f"{'':12}{'top-1 %':>8}{'seconds':>9}{'parameters':>12}")
    for row in rows:
        print(f"{row['role']:12}{row['top1']:8.2f}{row['seconds']:9.1f}{row['parameters']:12,}")
    print(f"\nruns are in {args.output}/ (metrics.jsonl, best.pth, flow/, TensorBoard events)")


if __name__ == "__main__":
    main()
