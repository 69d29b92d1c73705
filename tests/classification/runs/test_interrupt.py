from __future__ import annotations

import multiprocessing
import os
import signal

import pytest

from classification.errors import Stopped, UserError
from classification.options.options import Options, make_options
from classification.runs import interrupt, launch
from classification.runs.interrupt import Interrupt
from classification.runs.world import World


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


def test_a_loading_process_leaves_it_to_the_one_that_trains(capfd: pytest.CaptureFixture[str]) -> None:
    with Interrupt("the step") as asked:
        child = os.fork()
        if not child:  # as Ctrl-C in a terminal, twice
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
            os._exit(asked.signal)
        _, status = os.waitpid(child, 0)
    assert (os.waitstatus_to_exitcode(status), asked.signal) == (0, 0)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("number", interrupt.SIGNALS)
def test_a_loading_process_outlasts_one_signal_and_no_second(number: int) -> None:
    for signals, status in ((1, 7), (2, 128 + number)):
        child = os.fork()
        if not child:
            interrupt.outlast()
            for _ in range(signals):
                os.kill(os.getpid(), number)
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == status


def test_a_signal_leaves_at_once_where_nothing_is_unsaved(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Stopped) as stopped, Interrupt("the step", at_once=True):
        signal.raise_signal(signal.SIGTERM)
    assert stopped.value.signal == signal.SIGTERM and capsys.readouterr().err == ""


def test_a_loading_process_leaves_at_the_first_signal_once_the_job_is_over() -> None:
    ending = multiprocessing.RawValue("b", 0)
    for over, status in ((0, 7), (1, 0)):
        ending.value = over
        child = os.fork()
        if not child:
            interrupt.outlast(0, ending)
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == status


def test_a_job_that_is_over_says_so_to_its_loading_processes() -> None:
    seen: list[tuple[int, World]] = []

    def execute(job: object, world: World) -> None:
        seen.append((world.ending.value, world))
        raise UserError("no")

    def parse(words: list[str], prog: str) -> Options:
        return make_options({"device": "cpu"})

    assert launch.run(launch.Task([], "main.py", parse, lambda *_: None, execute)) == 2
    ((during, world),) = seen
    assert (during, world.ending.value) == (0, 1)
