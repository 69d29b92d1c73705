"""Two real gloo processes, by the published flags and by torchrun, against one process."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from classification import main_mgd
from classification.options.config import parse
from classification.runs import launch
from classification.runs.place import Place
from classification.runs.world import Seed, seed_everything
from classification.training import distilling
from tests.classification.seams import fix_norms, run_changed
from tests.classification.test_main import options, records, without

SCRIPT = str(Path(main_mgd.__file__))
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def run_ranks(launch: str, words: list[str]) -> list[str]:
    """Run two ranks and return what each launched process printed."""
    if launch == "torchrun":
        rendezvous = f"--master-port={free_port()}"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", rendezvous]
        commands = [[*torchrun, SCRIPT, *words]]
    else:
        flags = ["--world-size", "2", "--dist-url", f"tcp://127.0.0.1:{free_port()}", "--rank"]
        commands = [[sys.executable, SCRIPT, *words, *flags, rank] for rank in ("0", "1")]
    started = [
        subprocess.Popen(c, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for c in commands
    ]
    outs = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0] * len(started), outs
    return [out for out, _ in outs]


@pytest.mark.parametrize("launch", ["flags", "torchrun"])
def test_two_ranks_match_as_one(launch: str, distil: list[str], tmp_path: Path) -> None:
    words = options(distil, mgd_update_freq="0", lr="1e-6", epochs="2")
    outs = run_ranks(launch, options(words, output=str(tmp_path / "two")))
    assert outs[0].count("epoch 2/2  loss") == 1 and all("epoch" not in out for out in outs[1:])
    assert main_mgd.main(options(words, output=str(tmp_path / "one"))) == 0
    one, two = (np.load(tmp_path / name / "flow" / "0000.npz") for name in ("one", "two"))
    for stage in range(3):
        np.testing.assert_allclose(one[f"cost{stage}"], two[f"cost{stage}"], atol=1e-5)
        assert (one[f"index{stage}"] == two[f"index{stage}"]).all()
    alone, both = records(tmp_path / "one"), records(tmp_path / "two")
    assert [line["epoch"] for line in both] == [0, 1]
    # Every validation image is counted once, and batch statistics are the only difference in training.
    assert both[0]["valid_top5"] == alone[0]["valid_top5"] == 100
    assert both[0]["valid_top1"] * 15 / 100 == pytest.approx(round(both[0]["valid_top1"] * 15 / 100))
    assert both[0]["train_ce"] == pytest.approx(alone[0]["train_ce"], rel=0.2)


def test_a_rank_that_fails_takes_the_others_down_and_names_the_image(distil: list[str], tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    shutil.copytree(distil[0], photos)
    for image in sorted((photos / "valid").rglob("*.png"))[1::2]:  # the images of rank 1
        image.write_bytes(b"no image")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    words = [*torchrun, SCRIPT, str(photos), *distil[1:]]
    done = subprocess.run(words, env=ENV, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.count("cannot be read") == 1, done.stderr


def test_a_mistake_is_told_once_a_node(distil: list[str]) -> None:
    words = options(distil, teacher_taps="nowhere")
    for rank, local, lines in (("0", "0", 1), ("1", "1", 0), ("1", "0", 1)):
        env = {**ENV, "RANK": rank, "LOCAL_RANK": local, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        done = subprocess.run([sys.executable, SCRIPT, *words], env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == lines, done.stderr


def test_ranks_that_were_told_other_things_do_not_start(distil: list[str], tmp_path: Path) -> None:
    url = f"tcp://127.0.0.1:{free_port()}"
    started = []
    for rank, lr in (("0", "0.05"), ("1", "0.5")):
        words = options(distil, rank=rank, world_size="2", dist_url=url, lr=lr, output=str(tmp_path / rank))
        started.append(subprocess.Popen([sys.executable, SCRIPT, *words], env=ENV, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [1, 1], errors
    assert any("options, teachers or training images differ between the ranks: [1] from 0" in e for e in errors)


def test_the_script_runs_from_inside_its_folder(distil: list[str]) -> None:
    where = Path(SCRIPT).parent
    done = subprocess.run([sys.executable, "main_mgd.py", *distil], cwd=where, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert torch.load(Path(distil[-1]) / "best.pth", weights_only=True)["num_classes"] == 3


def test_a_killed_rank_is_named_and_the_restarted_run_ends_as_the_one_left_alone(
    distil: list[str], tmp_path: Path
) -> None:
    from torture import differences

    words = options(distil, epochs="3", distiller="mgd+kd", mgd_reducer="rd", checkpoint_every_steps="2", resume="auto")
    words = options(words, mgd_observe="online")  # sums of both ranks, of which the first keeps the checkpoint
    child = tmp_path / "child.py"
    child.write_text(
        "import os, signal, sys\n"
        "from classification import main_mgd\n"
        "from classification.training.step import Stepper\n"
        "step, done = Stepper._step, []\n"
        "def killed(self, *inputs):\n"
        "    done.append(1)\n"
        "    if (os.environ['RANK'], os.environ['TORCHELASTIC_RESTART_COUNT'], len(done)) == ('1', '0', 8):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return step(self, *inputs)\n"
        "if sys.argv.pop(1) == 'kill':\n"
        "    Stepper._step = killed\n"
        "sys.exit(main_mgd.main())\n"
    )
    errors = []
    for how in ("kill", "alone"):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1"]
        command = [*torchrun, f"--master-port={free_port()}", str(child), how]
        words = options(words, output=str(tmp_path / how))
        done = subprocess.run([*command, *words], env=ENV, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        errors.append(done.stderr)
    assert "rank 0 stops: rank 1 died" in errors[0] and "died" not in errors[1], errors[0]
    assert differences(tmp_path / "kill", tmp_path / "alone") == []


def test_spawned_ranks_of_a_run_that_is_done_leave_in_good_order(distil: list[str]) -> None:
    words = options(without(distil, "--loss-factor"), distiller="kd", epochs="1")
    assert main_mgd.main(words) == 0
    kept = (Path(distil[-1]) / "last.pth").read_bytes()
    words = options(words, resume="auto", dist_url=f"tcp://127.0.0.1:{free_port()}")
    task = launch.Task(words, "main_mgd.py", partial(parse, distillation=True), distilling.prepare, distilling.execute)
    assert launch._spawn(task, Seed(0, True), Place(0, 2, 2, True, False)) == 0
    assert (Path(distil[-1]) / "last.pth").read_bytes() == kept


def test_every_rank_draws_its_own_numbers_and_choices_of_convolutions_are_as_asked() -> None:

    cudnn, before = torch.backends.cudnn, torch.get_rng_state()
    try:
        drawn = []
        for rank in (0, 1, 0):
            seed_everything(3, rank, deterministic=False)
            drawn.append((random.random(), np.random.rand(), float(torch.rand(1))))
        assert drawn[0] == drawn[2] and not set(drawn[0]) & set(drawn[1])
        for deterministic in (False, True):
            seed_everything(3, 0, deterministic=deterministic)
            assert torch.are_deterministic_algorithms_enabled() == deterministic
            assert (cudnn.deterministic, cudnn.benchmark) == (deterministic, not deterministic)
    finally:
        torch.use_deterministic_algorithms(False)
        cudnn.deterministic, cudnn.benchmark = False, False
        torch.set_rng_state(before)


CHILD = """
import os, signal, sys
from classification import main_mgd
from classification.training.step import Stepper
from torch import nn
how, step, done = sys.argv.pop(1), Stepper._step, []
if how == 'fixed':  # norms use fixed statistics: what ranks and parts compute is then the same function
    forward = nn.BatchNorm2d.forward
    def fixed(self, x):
        self.training = False
        return forward(self, x)
    nn.BatchNorm2d.forward = fixed
def changed(self, batch, *inputs):
    done.append(1)
    if how == 'signal' and self.world.rank == 1 and len(done) == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    if how == 'poison' and self.world.rank == 1 and len(done) == 2:
        batch = [batch[0] * float('nan'), *batch[1:]]
    return step(self, batch, *inputs)
Stepper._step = changed
sys.exit(main_mgd.main())
"""


def two_ranks(how: str, words: list[str], folder: Path) -> list[tuple[int, str, str]]:
    """Run two ranks of which the second meets something; return status, output and errors of each."""
    child = folder / "child.py"
    child.write_text(CHILD)
    flags = ["--world-size", "2", "--dist-url", f"tcp://127.0.0.1:{free_port()}", "--rank"]
    commands = [[sys.executable, str(child), how, *words, *flags, rank] for rank in ("0", "1")]
    started = [
        subprocess.Popen(c, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for c in commands
    ]
    try:
        said = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *text) for process, text in zip(started, said, strict=True)]


def test_a_signal_to_one_rank_stops_all_behind_the_same_step(distil: list[str], tmp_path: Path) -> None:
    words = options(without(distil, "--loss-factor"), distiller="kd", epochs="2")
    found = two_ranks("signal", words, tmp_path)
    assert [status for status, *_ in found] == [128 + signal.SIGTERM] * 2, found
    assert torch.load(Path(distil[-1]) / "last.pth", weights_only=True)["resume"]["step"] in (3, 4)


def test_a_loss_that_is_not_finite_on_one_rank_is_left_out_on_all(distil: list[str], tmp_path: Path) -> None:
    words = options(without(distil, "--loss-factor"), distiller="kd", epochs="1", skip_nonfinite="1", accumulate="2")
    found = two_ranks("poison", words, tmp_path)
    assert [status for status, *_ in found] == [0, 0], found
    assert records(Path(distil[-1]))[0]["skipped_steps"] == 1


def test_parts_of_a_batch_on_two_ranks_give_the_update_of_the_whole(distil: list[str], tmp_path: Path) -> None:
    words = options(without(distil, "--loss-factor"), distiller="kd", epochs="1", b="9", momentum="0")
    found = two_ranks("fixed", options(words, output=str(tmp_path / "two"), accumulate="2"), tmp_path)
    assert [status for status, *_ in found] == [0, 0], found
    assert run_changed(options(words, output=str(tmp_path / "one")), fix_norms) == 0
    one, two = (torch.load(tmp_path / name / "last.pth", weights_only=True)["state_dict"] for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5, msg=name)
    alone, both = records(tmp_path / "one")[0], records(tmp_path / "two")[0]
    for key in ("train_loss", "train_ce", "train_kd", "train_top1", "valid_top1"):
        assert both[key] == pytest.approx(alone[key], rel=1e-3)


def _leave(status: int, seconds: float, ready: Any) -> None:
    def stop(number: int, _: object) -> None:
        os._exit(status + number)

    signal.signal(signal.SIGTERM, stop)
    ready.release()
    time.sleep(seconds)
    os._exit(status)


def _interrupt(ready: Any, ranks: int) -> None:
    """Send this process SIGINT once all ranks are ready."""
    for _ in range(ranks):
        ready.acquire()
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("ranks", "signalled", "status"),
    [
        ([(0, 0.0), (0, 0.3)], False, 0),
        ([(0, 0.0), (3, 0.3)], False, 3),
        ([(3, 0.0), (5, 0.5)], False, 3),  # the first that failed; the other still ends by itself
        ([(100, 60.0), (100, 60.0)], True, 100 + signal.SIGTERM),  # a signal to the launcher reaches all
    ],
)
def test_spawned_ranks_end_by_themselves(ranks: list[tuple[int, float]], signalled: bool, status: int) -> None:
    context = multiprocessing.get_context("forkserver")
    ready = context.Semaphore(0)
    processes = [context.Process(target=_leave, args=(*rank, ready)) for rank in ranks]
    for process in processes:
        process.start()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a worker of the test runner ignores it
    if signalled:
        threading.Thread(target=_interrupt, args=(ready, len(ranks)), daemon=True).start()
    try:
        assert launch._join(processes) == status
    finally:
        signal.signal(signal.SIGINT, before)
    assert all(process.exitcode in (rank[0], status) for process, rank in zip(processes, ranks, strict=True))
