from __future__ import annotations

import os
import signal

import pytest

from classification import interrupt
from classification.interrupt import Interrupt


@pytest.mark.parametrize("number", interrupt.SIGNALS)
def test_the_first_signal_is_remembered_and_the_second_leaves(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)
    before = signal.getsignal(number)
    with Interrupt("the step") as asked:
        assert asked.signal == 0
        os.kill(os.getpid(), number)
        assert asked.signal == number and left == []
        assert "finishing the step, then leaving; once more leaves at once" in capsys.readouterr().err
        os.kill(os.getpid(), number)
        assert left == [128 + number]
    assert signal.getsignal(number) == before
