"""Two gloo ranks: weights without gradients, folders that differ, signals at bad moments, a rank that hangs."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from classification import main_mgd
from tests.classification.runs import ranks
from tests.classification.test_main import options, records, without


def both(words: list[str]) -> list[list[str]]:
    return [words, words]


def test_weights_without_a_gradient_train_on(distil: list[str], tmp_path: Path) -> None:
    """The head of a student whose terms read maps alone, beside one process that trains the same batches."""
    words = options(distil, distiller="mgd", labels="0", epochs="1", b="9", momentum="0.9")
    found = ranks.run(both(words), tmp_path / "said")
    assert [end.status for end in found] == [0, 0], found
    first = torch.load(Path(distil[-1]) / "last.pth", weights_only=True)
    assert records(Path(distil[-1]))[0]["train_mgd"] > 0
    fresh = torch.load(Path(distil[-1]) / "best.pth", weights_only=True)["state_dict"]
    head = [name for name in fresh if name.startswith(("fc.", "linear."))]
    assert head and all(torch.isfinite(first["state_dict"][name]).all() for name in head)


def test_a_run_folder_that_one_rank_does_not_see_is_refused_at_once(distil: list[str], tmp_path: Path) -> None:
    words = options(without(distil, "--loss-factor"), distiller="kd", epochs="1")
    assert [end.status for end in ranks.run(both(words), tmp_path / "first")] == [0, 0]
    again = options(words, resume="auto", epochs="2")
    found = ranks.run([again, options(again, output=str(tmp_path / "elsewhere"))], tmp_path / "again")
    assert [end.status for end in found] == [1, 1], found
    assert any(
        "the checkpoints to resume from" in end.err and "differ between the ranks: [1]" in end.err for end in found
    )
    # On a folder that both see, the line may be typed again, also when the run is done.
    done = options(words, resume="auto")
    assert [end.status for end in ranks.run(both(done), tmp_path / "done")] == [0, 0]


@pytest.mark.parametrize("what", ["other", "missing"])
def test_validation_images_that_differ_are_refused(distil: list[str], tmp_path: Path, what: str) -> None:
    photos = tmp_path / "photos"
    shutil.copytree(distil[0], photos)
    images = sorted((photos / "valid").rglob("*.png"))
    if what == "missing":
        images[-1].unlink()
    else:
        shutil.copyfile(images[0], images[-1])  # another image under the same name
    words = options(without(distil, "--loss-factor"), distiller="kd", epochs="1")
    found = ranks.run([words, [str(photos), *words[1:]]], tmp_path / "said")
    assert [end.status for end in found] == [1, 1], found
    assert any("validation images differ between the ranks: [1] from 0" in end.err for end in found)


def counted_steps(before: Callable[[int], None]) -> list[int]:
    """Count the steps of this process, and call `before` with the number of each."""
    stepper: Any = importlib.import_module("classification.training.step").Stepper
    steps: list[int] = []
    step = stepper._step

    def counted(*inputs: object) -> object:
        steps.append(1)
        before(len(steps))
        return step(*inputs)

    stepper._step = counted
    return steps


def send_while_writing(rank: int) -> None:
    """Have rank 1 send SIGTERM to itself and to rank 0, again and again, while rank 0 writes its second checkpoint."""
    from classification.runs import checkpoint

    written: list[int] = []
    save = checkpoint.save

    def slow(content: object, file: object) -> None:
        written.append(1)
        if len(written) == 2:
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.1)
        save(content, file)

    checkpoint.save = slow


def test_a_signal_that_comes_again_while_a_checkpoint_is_written_does_not_cut_it(
    distil: list[str], tmp_path: Path
) -> None:
    words = options(without(distil, "--loss-factor"), distiller="kd", epochs="2")
    found = ranks.run(both(words), tmp_path / "said", prepare=send_while_writing)
    assert [end.status for end in found] == [128 + signal.SIGTERM] * 2, found
    assert "the state is saved; to resume the run" in found[0].err
    state = torch.load(Path(distil[-1]) / "last.pth", weights_only=True)["resume"]
    assert (state["epoch"], state["seen"]) == (0, 27)  # the first epoch is trained, and not evaluated
    found = ranks.run(both(options(words, resume="auto")), tmp_path / "again")
    assert [end.status for end in found] == [0, 0] and len(records(Path(distil[-1]))) == 2


def signal_in_evaluation(rank: int) -> None:
    """Have rank 1 get SIGTERM in the evaluation behind the first epoch."""
    engine: Any = importlib.import_module("classification.training.engine")
    tally, steps = engine.tally, counted_steps(lambda number: None)
    engine.LOOK = 1

    def signalled(*inputs: object) -> object:
        if steps and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return tally(*inputs)

    engine.tally = signalled


def test_an_evaluation_is_left_by_all_ranks_where_one_gets_a_signal(distil: list[str], tmp_path: Path) -> None:
    words = options(without(distil, "--loss-factor"), distiller="kd", epochs="2", b="4")
    found = ranks.run(both(words), tmp_path / "said", prepare=signal_in_evaluation)
    assert [end.status for end in found] == [128 + signal.SIGTERM] * 2, found
    state = torch.load(Path(distil[-1]) / "last.pth", weights_only=True)["resume"]
    assert (state["epoch"], state["seen"]) == (0, 27)


def hang(rank: int) -> None:
    """Stop rank 1 in its third step; have the others notice after a second."""
    from classification.runs import heartbeat

    heartbeat.EVERY, heartbeat.SILENT = 0.2, 2.0
    counted_steps(lambda number: os.kill(os.getpid(), signal.SIGSTOP) if (rank, number) == (1, 3) else None)


def test_a_rank_that_hangs_is_named_and_the_run_ends_after_the_timeout(distil: list[str], tmp_path: Path) -> None:
    words = options(without(distil, "--loss-factor"), distiller="kd", epochs="1", dist_timeout="8")

    def meanwhile(processes: list[int]) -> None:
        end = time.monotonic() + 120
        while time.monotonic() < end and Path(f"/proc/{processes[0]}").exists():
            state = Path(f"/proc/{processes[0]}/stat").read_text().rpartition(")")[2].split()[0]
            if state == "Z":
                break
            time.sleep(0.2)
        os.kill(processes[1], signal.SIGKILL)

    found = ranks.run(both(words), tmp_path / "said", prepare=hang, meanwhile=meanwhile)
    assert found[0].status == 1 and "waiting for rank 1 (process" in found[0].err, found


def solve_otherwise(rank: int) -> None:
    """Have rank 1 find other flows, as a processor may that rounds in another way."""
    flows: Any = importlib.import_module("mgd.losses.flows")
    solve = flows.solve_control
    if rank == 1:
        flows.solve_control = lambda cost, assignment, seed, **how: solve(cost, "costliest", seed, **how)


def test_flows_that_a_rank_finds_otherwise_are_those_of_the_first(distil: list[str], tmp_path: Path) -> None:
    """The ranks' parts of a batch differ in size, which terms that compare images have to know."""
    words = options(distil, distiller="mgd+similarity+kd", epochs="1", b="9", accumulate="2")
    found = ranks.run(both(words), tmp_path / "said", prepare=solve_otherwise)
    assert [end.status for end in found] == [0, 0], found
    one = tmp_path / "one"
    alone = options(words, output=str(one))
    assert main_mgd.main(alone) == 0
    kept, expected = (np.load(folder / "flow" / "0000.npz") for folder in (Path(distil[-1]), one))
    assert all((kept[f"index{n}"] == expected[f"index{n}"]).all() for n in range(3))


def test_ranks_decode_images_together(distil: list[str], tmp_path: Path) -> None:
    words = options(without(distil, "--loss-factor"), distiller="kd", epochs="1", cache="ram")
    found = ranks.run(both(words), tmp_path / "said")
    assert [end.status for end in found] == [0, 0], found
    assert "=> decoding 27 images into memory" in found[0].out
    assert len(records(Path(distil[-1]))) == 1


def note_statistics(rank: int) -> None:
    """Print the statistics of the student's first norm before and after they are averaged."""
    world: Any = importlib.import_module("classification.runs.world").World
    average = world.average_statistics

    def first(module: nn.Module) -> list[Any]:
        norms = [part.state_dict() for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
        return [[norm[name].tolist() for name in ("running_mean", "running_var")] for norm in norms[:1]]

    def noted(self: Any, module: nn.Module) -> None:
        before = first(module)
        average(self, module)
        print(json.dumps([*before, *first(module)]), flush=True)

    world.average_statistics = noted


def test_statistics_of_norms_are_the_mean_over_the_ranks(distil: list[str], tmp_path: Path) -> None:
    words = options(without(distil, "--loss-factor"), distiller="kd", epochs="1", average_bn="1")
    found = ranks.run(both(words), tmp_path / "said", prepare=note_statistics)
    assert [end.status for end in found] == [0, 0], found
    said = [[json.loads(line) for line in end.out.splitlines() if line.startswith("[[")] for end in found]
    (before0, after0), (before1, after1) = (next(pair for pair in own if pair) for own in said)
    assert before0 != before1 and after0 == after1
    np.testing.assert_allclose(after0, (np.array(before0) + np.array(before1)) / 2, rtol=1e-6)
    kept = torch.load(Path(distil[-1]) / "best.pth", weights_only=True)["state_dict"]
    assert any(value.tolist() == after0[0] for name, value in kept.items() if name.endswith("running_mean"))


def note_images(rank: int) -> None:
    """Print the epoch and the numbers of the images of every step."""
    stepper: Any = importlib.import_module("classification.training.step").Stepper
    step = stepper._step

    def noted(*inputs: Any) -> object:
        found = step(*inputs)
        print(json.dumps([inputs[2], inputs[1][2].tolist()]), flush=True)
        return found

    stepper._step = noted


def stop_at_the_third_step(rank: int) -> None:
    note_images(rank)
    counted_steps(lambda number: os.kill(os.getpid(), signal.SIGTERM) if number == 3 and rank == 1 else None)


def test_a_run_resumes_within_an_epoch_with_another_number_of_ranks(distil: list[str], tmp_path: Path) -> None:
    words = options(without(distil, "--loss-factor"), distiller="mgd", epochs="2", b="4", resume="auto")
    ended = ranks.run(both(words), tmp_path / "two", prepare=stop_at_the_third_step)
    assert [end.status for end in ended] == [128 + signal.SIGTERM] * 2, ended
    stopped = torch.load(Path(distil[-1]) / "last.pth", weights_only=True)["resume"]
    assert stopped["epoch"] == 0 and 0 < stopped["seen"] < 27
    resumed = ranks.run([words] * 3, tmp_path / "three", prepare=note_images)
    assert [end.status for end in resumed] == [0, 0, 0], resumed
    assert "the run had 2 ranks and has 3 now: it resumes, but no longer gives the same bits" in resumed[0].out
    assert len(records(Path(distil[-1]))) == 2
    steps = [json.loads(line) for end in [*ended, *resumed] for line in end.out.splitlines() if line.startswith("[")]
    for epoch in (0, 1):  # every image once, as if nothing had happened
        assert sorted(image for number, images in steps if number == epoch for image in images) == list(range(27))
