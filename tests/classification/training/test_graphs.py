"""What torch.compile traces of a run: whole graphs, and none that is traced again once the first epoch is over."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import mgd
from classification.training.trainer import Trainer
from tests.classification.seams import run_trainer
from tests.classification.test_main import options, without

CASES = {
    "mgd+kd": {"mgd_observe": "online", "mgd_update_freq": "1", "amp": "bf16", "accumulate": "2"},
    "crd+at+dkd": {},
}


@pytest.mark.parametrize("terms", list(CASES))
def test_graphs_are_whole_and_traced_in_the_first_epoch(
    terms: str, distil: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of an epoch have two sizes, and matching passes and evaluations another mode and others."""
    compile_with = mgd.Distiller.compile
    monkeypatch.setattr(mgd.Distiller, "compile", lambda self, **how: compile_with(self, backend="eager", **how))
    found: list[int] = []

    def change(trainer: Trainer) -> None:
        say = trainer._say_epoch

        def noted(record: Any) -> None:
            found.append(counters["stats"]["unique_graphs"])
            say(record)

        trainer._say_epoch = noted  # type: ignore[method-assign]

    words = distil if "mgd" in terms.split("+") else without(distil, "--loss-factor")
    words = options(words, distiller=terms, epochs="3", compile="1", compile_student="1", **CASES[terms])
    torch._dynamo.reset()
    counters.clear()
    assert run_trainer(words, change) == 0
    assert dict(counters["graph_break"]) == {}
    assert found[0] > 0 and len(set(found[1:])) == 1, found
