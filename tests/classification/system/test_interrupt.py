from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from functools import partial

import pytest

from classification.errors import Stopped, UserError
from classification.options.options import Options, make_options
from classification.runs import launch
from classification.runs.world import World
from classification.system import interrupt
from classification.system.interrupt import Interrupt

INT, TERM = signal.SIGINT, signal.SIGTERM


def status_of(body: Callable[[], int]) -> int:
    """Run `body` in a forked process and return its exit status."""
    child = os.fork()
    if not child:
        os._exit(body())
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize(
    ("signals", "status"),
    [
        ((INT,), INT),
        ((TERM,), TERM),
        ((INT, INT), 128 + INT),  # a person who types it twice leaves at once
        ((TERM, TERM, TERM), TERM),  # a scheduler and a launcher send it more than once
        ((INT, TERM), INT),
        ((TERM, INT), TERM),
        ((TERM, INT, INT), 128 + INT),
    ],
)
def test_only_a_second_ctrl_c_leaves_before_the_step_is_finished(signals: tuple[int, ...], status: int) -> None:
    def body() -> int:
        with Interrupt("the step") as asked:
            for number in signals:
                os.kill(os.getpid(), number)
            return asked.signal

    assert status_of(body) == status


@pytest.mark.parametrize("number", interrupt.SIGNALS)
def test_the_first_signal_is_said_and_the_handlers_return(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(number)
    with Interrupt("the step"):
        os.kill(os.getpid(), number)
        assert "finishing the step, then exiting; Ctrl-C" in capsys.readouterr().err
        if number == TERM:
            os.kill(os.getpid(), number)
            assert capsys.readouterr().err == ""
    assert signal.getsignal(number) == before


def test_sigusr1_asks_for_a_checkpoint_once_and_ends_nothing() -> None:
    with Interrupt("the step", at_once=True) as asked:
        assert not asked.take_save()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert asked.signal == 0 and asked.take_save() and not asked.take_save()


def test_sigusr1_ends_no_process_before_training_and_no_loading_process() -> None:
    def body(prepare: Callable[[], None]) -> int:
        prepare()
        os.kill(os.getpid(), signal.SIGUSR1)
        return 7

    for prepare in (interrupt.ignore_save, interrupt.outlast):
        assert status_of(partial(body, prepare)) == 7


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


@pytest.mark.parametrize(
    ("signals", "status"), [((INT,), 7), ((TERM,), 7), ((TERM, TERM), 7), ((INT, TERM), 7), ((INT, INT), 128 + INT)]
)
def test_a_loading_process_outlasts_all_but_a_second_ctrl_c(signals: tuple[int, ...], status: int) -> None:
    def body() -> int:
        interrupt.outlast()
        for number in signals:
            os.kill(os.getpid(), number)
        return 7

    assert status_of(body) == status


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
