"""The tables of records."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import mgd
from mgd.losses.flows import flow_record
from tests.records import record


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))


def test_all_numbers_that_a_flow_logs_come_back(tmp_path: Path) -> None:
    from results_table import keep_record, read_table

    flow = replace(mgd.solve_flow(torch.rand(2, 4)), weights=np.full((2, 4), 0.5), energy=0.75)
    numbers, _ = flow_record([flow], [torch.rand(2, 4)], 1.5, before=[flow])
    numbers["stages_moved"] = 1.0
    plain = record("first", 0)
    kept = record("first", 0, curve=[{**plain.curve[0], **numbers}, plain.curve[1]], seconds=51.5)
    keep_record(tmp_path / "table.csv", kept)
    assert len(numbers) == 6
    assert read_table(tmp_path / "table.csv") == [kept]


def test_a_table_with_a_column_that_is_no_metric_is_refused(tmp_path: Path) -> None:
    from results_table import TableError, curves_of, keep_record, read_table

    table = tmp_path / "table.csv"
    keep_record(table, record("one", 0))
    curves = curves_of(table)
    curves.write_text(curves.read_text().replace("valid_top1", "valid top1", 1))
    with pytest.raises(TableError, match="valid top1"):
        read_table(table)
