"""How much memory does a step need? python scripts/bench_memory.py: each way in a process of its own.

The ways are those of bench_step.py, which also checks that they compute the same. Counted is the most that the process
held at once from the first step on (VmHWM, Linux), the median of three processes. Writes results/speed*/memory.json.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import re
import subprocess
import sys
from pathlib import Path
from statistics import median

from bench_step import STEPS, STUDENTS, check, make_pair
from side_by_side import keep

from classification.system.memory import keep_freed_memory

RUNS = 3  # of each way, whose median counts: peaks of the same code differ by 4 %


def peak(arch: str, way: str, batch_size: int, img_size: int, steps: int) -> int:
    """Return the most bytes that this process holds during some steps."""
    pair = make_pair(arch, batch_size, img_size)
    step = STEPS[way](pair)
    del pair.student, pair.teacher, pair.matching
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # count from here
    keep_freed_memory()
    for _ in range(steps):
        step()
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-b", "--batch-size", type=int, default=16)
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--one", nargs=2, metavar=("ARCH", "WAY"), help="print the bytes of one way, and leave")
    args = parser.parse_args()
    if args.one:
        arch, way = args.one
        print(peak(arch, way, args.batch_size, args.img_size, args.steps))
        return
    rows = []
    for arch in STUDENTS:
        check(make_pair(arch, 4, 64))
        found = {}
        for way in STEPS:
            command = [sys.executable, __file__, "--one", arch, way, "-b", str(args.batch_size)]
            command += ["--img-size", str(args.img_size), "--steps", str(args.steps)]
            runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(RUNS)]
            found[way] = int(median(int(run.stdout) for run in runs))
        print(arch, {way: f"{size / 2**30:.2f} GiB" for way, size in found.items()}, flush=True)
        names = {"compiled": "ours with --compile 1", "ahead": "ours, the teacher ahead"}
        most = "at most 1.10"
        pairs = (("plain", "ours", ""), ("ours", "floor", most), ("compiled", "floor", most), ("ahead", "floor", ""))
        for slow, fast, target in pairs:
            what = f"memory of a step of {arch}: {names.get(slow, slow)} / {fast}"
            rows.append({"what": what, "ratio": found[slow] / found[fast], "target": target, "bytes": found})
    keep("memory", {"batch_size": args.batch_size, "img_size": args.img_size, "rows": rows})


if __name__ == "__main__":
    main()
