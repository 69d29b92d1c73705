"""How well each rule of `pseudo_label.py select` leaves foreign images out, as a table: see docs/start/unlabelled.md.

python scripts/bench_foreign.py --known VALID --own OWN --foreign OTHER [--keep 95 80]

Each folder is an --output of `pseudo_label.py score`, all by one teacher. The threshold of a rule is the one that keeps
that percentage of the images of --known; counted is what it keeps of the others.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import duckdb

from classification.pile.ranking import STATISTICS, quantile
from classification.pile.shards import open_shards


def share_kept(files: list[Path], statistic: str, threshold: float) -> float:
    """Return the percentage of the images that reach a threshold."""
    query = f"SELECT 100 * avg(({STATISTICS[statistic]} >= {threshold!r}::FLOAT)::INT) FROM read_parquet($files)"
    with duckdb.connect() as engine:
        ((found,),) = engine.sql(query, params={"files": [str(file) for file in files]}).fetchall()
    return float(found)


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("known", "own", "foreign"):
        parser.add_argument(f"--{name}", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--keep", type=float, nargs="+", default=[95.0, 80.0], metavar="PERCENT")
    args = parser.parse_args(argv)
    known, own, foreign = (open_shards(folder) for folder in (args.known, args.own, args.foreign))
    if len({known.teacher, own.teacher, foreign.teacher}) > 1:
        parser.error("the folders are of several teachers: score all images by one")
    print("| rule | `--keep` | own images kept | foreign images kept |\n|---|---|---|---|")
    for statistic in STATISTICS:
        for keep in args.keep:
            threshold = quantile(known.files, statistic, 1 - keep / 100)
            kept = [share_kept(shards.files, statistic, threshold) for shards in (own, foreign)]
            print(f"| {statistic} | {keep:g} | {kept[0]:.1f} % | {kept[1]:.1f} % |")


if __name__ == "__main__":
    main()
