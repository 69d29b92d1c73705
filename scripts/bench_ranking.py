"""Measure the ranking of synthetic scores: python scripts/bench_ranking.py [--rows 100000 1000000 10000000]

Every size is ranked in a process of its own, P = 10 classes per image out of 1,000, the best K = 1,000 per class. One
line per size: seconds, processor seconds over all cores, peak memory. The shards are made and removed by the script.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from classification.pile.ranking import Rule, rank
from classification.pile.selection import list_lines
from classification.pile.shards import SCHEMA

PER_SHARD = 500_000


def write(folder: Path, rows: int, top: int, classes: int) -> None:
    """Write shards of random scores."""
    rng = np.random.default_rng(0)
    for start in range(0, rows, PER_SHARD):
        num = min(PER_SHARD, rows - start)
        offsets = np.arange(0, num * top + 1, top, dtype=np.int32)
        labels = rng.integers(0, classes, num * top).astype(np.int32)
        scores = -np.sort(rng.exponential(2, (num, top)).astype(np.float32), 1).reshape(-1)
        names = pa.array([f"pile/{index // 1000:06d}/{index:09d}.jpg" for index in range(start, start + num)])
        digests = pa.array([f"{value:032x}" for value in rng.integers(0, 2**63, num).tolist()])
        hashes = pa.array(rng.integers(0, 2**64, num, dtype=np.uint64))
        lists = [pa.ListArray.from_arrays(offsets, values) for values in (labels, scores)]
        columns = dict(zip(SCHEMA.names, [names, digests, hashes, *lists, pa.nulls(num, pa.float32())], strict=True))
        pq.write_table(pa.table(columns, SCHEMA), folder / f"{start:09d}.parquet", compression="zstd")


def measure(folder: Path, top_k: int) -> dict[str, float]:
    """Rank the shards and write their list, in this process."""
    start = time.perf_counter()
    ranking = rank(sorted(folder.glob("*.parquet")), Rule(None, top_k))
    with (folder / "list").open("wb") as file:
        file.writelines(list_lines(ranking.lists()))
    seconds, used = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    return {"seconds": seconds, "cpu": used.ru_utime + used.ru_stime, "peak_mb": used.ru_maxrss / 1e3}


def main() -> None:
    """Measure every size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--top-p", type=int, default=10)
    parser.add_argument("--top-k", type=int, default=1000)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure is not None:
        print(json.dumps(measure(args.measure, args.top_k)))
        return
    for rows in args.rows:
        with tempfile.TemporaryDirectory() as name:
            write(Path(name), rows, args.top_p, args.classes)
            words = [sys.executable, __file__, "--measure", name, "--top-k", str(args.top_k)]
            found = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
        said = f"{found['seconds']:6.1f} s, {found['cpu']:6.1f} s of processors, {found['peak_mb']:6.0f} MB"
        print(f"{rows:>10,d} rows: {said}", flush=True)


if __name__ == "__main__":
    main()
