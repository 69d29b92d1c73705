"""Print our functions that one image batch passes, and those that one cost matrix passes: python scripts/walk.py

The batch is the first of the second epoch of a real run of main_mgd.py, from reading its images to the end of backward.
The cost matrix is followed from maps to the reduced target: ChannelMatching observes, matches and computes its loss.

A line is one call, indented by its depth, with its file. Comprehensions are not listed, and a generator is listed once.
Nothing here names a function of ours but the public ones of mgd, so that the figures of two commits can be compared.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from inspect import CO_ASYNC_GENERATOR, CO_GENERATOR
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from prepare_digits import write_digits
from torch import nn

from classification import main_base, main_mgd
from mgd import ChannelMatching, Outputs

ROOT = Path(__file__).parents[1]
OURS = tuple(f"{ROOT / room}/" for room in ("mgd", "classification"))
SMALL = shlex.split("--img-size 16 --train-crop pad --hflip 0 -b 8 -j 0 --lr 0.05 --seed 0 --output")
TEACHER, STUDENT = "cifar_resnet8", "cifar_resnet8_w0.5"
PER_CLASS, STEPS = 4, 5  # images per class in train/, and the steps of an epoch that they make


@dataclass
class Walk:
    """Calls of our functions: (depth, name, file) in order."""

    outside: list[tuple[str, str]] = field(default_factory=list)  # functions that were running at the start
    calls: list[tuple[int, str, str]] = field(default_factory=list)

    def show(self, title: str) -> None:
        print(f"\n# {title}\n")
        for name, file in self.outside:
            print(f"(running already)  {name}  {file}")
        for depth, name, file in self.calls:
            print(f"{'  ' * depth}{name}  {file}")
        distinct = {(name, file) for _, name, file in self.calls}
        files = {file for _, file in distinct}
        print(f"\n{len(self.calls)} calls, {len(distinct)} distinct functions, {len(files)} files")


def is_ours(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(OURS) and not frame.f_code.co_name.endswith("comp>")


def place(frame: FrameType) -> tuple[str, str]:
    name = getattr(frame.f_code, "co_qualname", frame.f_code.co_name)  # 3.10 has no qualified names
    return name.replace("<locals>.", ""), str(Path(frame.f_code.co_filename).relative_to(ROOT))


def ancestors(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


class Recorder:
    """Record walks that begin at a call of a function and end where another returns, both outside of our code.

    Args:
        begins: whether a call begins a walk; the walk before it is dropped if it has not ended.
        ends: whether a return ends the walk.
    """

    def __init__(self, begins: Callable[[FrameType], bool], ends: Callable[[FrameType], bool]) -> None:
        self.begins, self.ends = begins, ends
        self.walks: list[Walk] = []
        self._walk: Walk | None = None
        self._base = 0
        self._generators: list[FrameType] = []  # kept, so that no other frame takes the place of one

    def start(self) -> None:
        self._walk, self._base, self._generators = Walk(), sum(map(is_ours, ancestors(sys._getframe()))), []

    def stop(self) -> None:
        if self._walk is not None:
            self.walks.append(self._walk)
        self._walk = None

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        if event == "call" and self.begins(frame):
            running = [place(f) for f in ancestors(frame) if is_ours(f)]
            self._walk, self._base, self._generators = Walk(running[::-1]), len(running), []
        elif event == "call" and self._walk is not None and is_ours(frame):
            if frame.f_code.co_flags & (CO_GENERATOR | CO_ASYNC_GENERATOR):
                if frame in self._generators:
                    return
                self._generators.append(frame)
            depth = sum(map(is_ours, ancestors(frame))) - 1 - self._base
            self._walk.calls.append((depth, *place(frame)))
        elif event == "return" and self.ends(frame):
            self.stop()


@contextlib.contextmanager
def profiled(recorder: Recorder) -> Iterator[None]:
    sys.setprofile(recorder)
    try:
        yield
    finally:
        sys.setprofile(None)


def of_torch(frame: FrameType, name: str, file: str) -> bool:
    return frame.f_code.co_name == name and frame.f_code.co_filename.endswith(file)


def walk_of_a_batch(folder: Path) -> Walk:
    """Train a teacher, distil for two epochs, and return the walk of the first batch of the second."""
    write_digits(folder / "data", PER_CLASS)
    teacher = [str(folder / "data"), "-a", TEACHER, "--epochs", "1", *SMALL, str(folder / "teacher")]
    student = [str(folder / "data"), "-a", STUDENT, "--teacher-arch", TEACHER, "--distiller", "mgd", "--epochs", "2"]
    student += ["--teacher-resume", str(folder / "teacher" / "best.pth"), *SMALL, str(folder / "student")]
    recorder = Recorder(
        lambda frame: of_torch(frame, "_next_data", "torch/utils/data/dataloader.py"),
        lambda frame: of_torch(frame, "backward", "torch/autograd/__init__.py"),
    )
    log = io.StringIO()
    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        status = main_base.main(teacher)
        if not status:
            with profiled(recorder):
                status = main_mgd.main(student)
    if status or len(recorder.walks) != 2 * STEPS:
        raise SystemExit(f"expected {2 * STEPS} steps, saw {len(recorder.walks)}; the run said:\n{log.getvalue()}")
    return recorder.walks[STEPS]


def walk_of_a_cost_matrix() -> Walk:
    """Observe maps of 6 and 20 channels, match them, and return the walk to the loss."""
    generator = torch.Generator().manual_seed(0)

    def outputs(channels: int) -> Outputs:
        maps = torch.randn(4, channels, 8, 8, generator=generator)
        return Outputs(torch.randn(4, 10, generator=generator), [maps.requires_grad_()])

    matching: nn.Module = ChannelMatching([6], [20], [torch.zeros(20)])
    student, teacher = outputs(6), outputs(20)
    recorder = Recorder(lambda frame: False, lambda frame: False)
    with profiled(recorder):
        recorder.start()
        _follow(matching, student, teacher)
        recorder.stop()
    return recorder.walks[0]


def _follow(matching: Any, student: Outputs, teacher: Outputs) -> None:
    matching.observe(student, teacher)
    matching.rematch()
    matching(student, [teacher], None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        walks = {"One image batch, from disk to backward": walk_of_a_batch(Path(name))}
    walks["One cost matrix, from maps to the loss"] = walk_of_a_cost_matrix()
    for title, walk in walks.items():
        walk.show(title)


if __name__ == "__main__":
    main()
