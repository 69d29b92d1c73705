"""The table of rules for foreign images, against shares counted by hand."""

from __future__ import annotations

from pathlib import Path

import bench_foreign
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from classification.pile.shards import SCHEMA


def write(folder: Path, energies: list[float], teacher: str = "one") -> None:
    """Write scores of images with these energies."""
    folder.mkdir()
    names = [f"{number}.png" for number in range(len(energies))]
    scores = [[-0.001 * number - 0.1, -1.1 - 0.001 * number] for number in range(len(energies))]
    columns = [names, names, range(len(names)), [[0, 1]] * len(names), scores, energies]
    table = pa.table(dict(zip(SCHEMA.names, map(list, columns), strict=True)), SCHEMA)
    pq.write_table(table.replace_schema_metadata({"mgd.teacher": teacher}), folder / "0.parquet")


def test_shares_are_those_of_the_images_that_reach_the_threshold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "known", [float(value) for value in range(-10, 1)])  # -10 to 0: 80 % are at most -2
    write(tmp_path / "own", [-5.0, -4.0, -3.0, -1.0])
    write(tmp_path / "foreign", [-3.0, 1.0, 2.0, 3.0, 4.0])
    words = [word for name in ("known", "own", "foreign") for word in (f"--{name}", str(tmp_path / name))]
    bench_foreign.main([*words, "--keep", "80"])
    assert "| energy | 80 | 75.0 % | 20.0 % |" in capsys.readouterr().out
    write(tmp_path / "other", [0.0], teacher="two")
    with pytest.raises(SystemExit):
        bench_foreign.main([*words, "--own", str(tmp_path / "other")])
