"""Run a training script and note its steps: python watch.py LOG.json STEPS CLASSES SCRIPT [ARGUMENT ...]

The script runs as if it had been started itself. After STEPS steps of its optimizer the process writes LOG.json and
ends. The log holds, per step, when it ended (seconds of the system's monotonic clock), how long the process had
computed by then, the loss whose gradient was taken, the cross-entropy, and T^2 KL(teacher || student) with T 4,
computed here from the outputs of the two last layers (linear, with CLASSES outputs) in float64. So every script is
measured and checked in one way, whatever it prints.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import optimizer

TEMPERATURE = 4.0


class Watch:
    """Notes about the steps of the optimizers of this process.

    Args:
        log: file to write at the end.
        steps: after which the process ends.
        classes: outputs of the last layers of student and teacher.
    """

    def __init__(self, log: Path, steps: int, classes: int) -> None:
        self.log, self.steps, self.classes = log, steps, classes
        self.rows: list[dict[str, Any]] = []
        self.found: dict[str, Any] = {}

    def begin(self) -> None:
        """Note what the functions of torch get and give, from now on."""
        torch_functions: Any = F
        tensors: Any = Tensor
        linear, cross_entropy, backward = F.linear, F.cross_entropy, tensors.backward

        def noted_linear(images: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            logits = linear(images, weight, bias)
            if len(weight) == self.classes:
                # What trains has a gradient; evaluations, which have none, come before the next step's teacher.
                self.found["student" if logits.requires_grad else "teacher"] = logits.detach()
            return logits

        def noted_cross_entropy(*args: Any, **kwargs: Any) -> Tensor:
            value: Tensor = cross_entropy(*args, **kwargs)
            if value.requires_grad:
                self.found["ce"] = value.detach()
            return value

        def noted_backward(tensor: Tensor, *args: Any, **kwargs: Any) -> None:
            self.found["loss"] = tensor.detach()
            backward(tensor, *args, **kwargs)

        torch_functions.linear, torch_functions.cross_entropy = noted_linear, noted_cross_entropy
        tensors.backward = noted_backward
        optimizer.register_optimizer_step_post_hook(self.step)

    def step(self, *_: Any) -> None:
        """Note a step; end the process after the last."""
        self.rows.append({"seconds": time.monotonic(), "cpu": time.process_time(), **self.found})
        self.found = {}
        if len(self.rows) == self.steps:
            self.log.write_text(json.dumps(self.result()))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)  # the script's own end would evaluate and save first

    def result(self) -> dict[str, Any]:
        """Return the steps, the bytes of memory and the processes."""
        parts = [os.getpid(), *children(os.getpid())]
        return {
            "steps": [values(row) for row in self.rows],
            "batches": [len(row["student"]) if "student" in row else 0 for row in self.rows],
            "peak_bytes": kilobytes(os.getpid(), "status", "VmHWM") * 1024,
            "bytes_with_workers": sum(kilobytes(part, "smaps_rollup", "Pss") for part in parts) * 1024,
            "workers": len(parts) - 1,
            "threads": torch.get_num_threads(),
        }


def values(row: dict[str, Any]) -> dict[str, float | None]:
    """Return the numbers of a step; None for what the script did not compute."""
    kd = None
    if "student" in row and "teacher" in row and len(row["student"]) == len(row["teacher"]):
        student, teacher = ((row[name].double() / TEMPERATURE).softmax(1) for name in ("student", "teacher"))
        kd = float(TEMPERATURE**2 * (teacher * (teacher / student).log()).sum(1).mean())
    loss, ce = (float(row[name]) if name in row else None for name in ("loss", "ce"))
    return {"seconds": row["seconds"], "cpu": row["cpu"], "loss": loss, "ce": ce, "kd": kd}


def children(parent: int) -> list[int]:
    """Return the processes that `parent` started and that run: the loader's workers."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it ended in the meantime
            continue
        if int(fields[1]) == parent and fields[0] != "Z":
            found.append(int(folder.name))
    return found


def kilobytes(process: int, file: str, name: str) -> int:
    """Return one size of a process that /proc tells; 0 where the process has ended."""
    try:
        lines = Path(f"/proc/{process}/{file}").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)


def main() -> None:
    log, steps, classes, script, *words = sys.argv[1:]
    Watch(Path(log), int(steps), int(classes)).begin()
    sys.argv = [script, *words]
    sys.path[0] = str(Path(script).parent)  # as Python does for a script
    runpy.run_path(script, run_name="__main__")
    sys.exit(f"{script} ended before step {steps}: lower --steps, or give a folder with more images")


if __name__ == "__main__":
    main()
