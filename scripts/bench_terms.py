"""What does a step of each term cost? python scripts/bench_terms.py: the cells of the quality table, in alternation.

Each is set up as its run is (scripts/quality.yaml), on images of noise, for time does not depend on what they show.
Before anything is timed the loss must be the weighted sum of its terms. Writes results/speed*/terms.json.
"""

from __future__ import annotations

import argparse
import shlex
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from side_by_side import alternate, keep

from classification.models import build
from classification.options import config
from classification.runs.world import Seed, World
from classification.training import alone, distilling
from classification.training.engine import Engine
from classification.training.trainer import Trainer
from classification.training.updates import update_terms

CELLS = Path(__file__).parent / "quality.yaml"
GROUPS = ("main", "terms")


def make_folder(root: Path, num_images: int) -> None:
    """Write photographs of noise, ten classes, and a teacher of no skill."""
    rng = np.random.default_rng(0)
    for split, number in (("train", num_images), ("valid", 10)):
        for index in range(number):
            path = root / split / str(index % 10) / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    torch.manual_seed(0)
    torch.save(build("cifar_resnet56", 10).state_dict(), root / "teacher.pth")


def make_step(suite: dict[str, Any], cell: dict[str, Any], root: Path) -> Callable[[], None]:
    """Return a step of one cell, matched where it matches."""
    output = Path(tempfile.mkdtemp(dir=root)) / "run"
    words = [str(root), *shlex.split(suite["base"]), *shlex.split(cell.get("options", "")), "-j", "0", "--seed", "0"]
    words += ["--output", str(output)]
    distils = cell.get("script", "main_mgd") == "main_mgd"
    if distils and cell.get("teacher", True):
        words += [*shlex.split(suite["teacher"]), "--teacher-resume", str(root / "teacher.pth")]
    options = config.parse(words, "", distillation=distils)
    job = (distilling if distils else alone).prepare(options, Seed(0, True))
    trainer = Trainer(Engine(job, World()))
    if distils:
        (output / "flow").mkdir(parents=True)
        update_terms(trainer.engine, trainer.distiller, 0)
    trainer.stepper.wrapped.train()
    batch = next(iter(trainer.loader))

    def step() -> None:
        values = trainer.stepper(batch, 19, 1, len(batch[0]))  # the last epoch: every warmup is over
        assert values is not None
        parts = [weight * values[name] for name, weight in trainer.distiller.weights(19).items()]
        torch.testing.assert_close(torch.stack(parts).sum(), values["loss"])

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    suite = yaml.safe_load(CELLS.read_text())["cifar10"]
    cells = {name: cell for name, cell in suite["cells"].items() if cell["group"] in GROUPS}
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder), 640)
        steps = {name: make_step(suite, cell, Path(folder)) for name, cell in cells.items()}
        seconds = {name: median(times) for name, times in alternate(steps, args.rounds).items()}
    for name, value in seconds.items():
        print(f"{cells[name]['row']:32} {1e3 * value:7.1f} ms, {value / seconds['alone']:5.2f} times that alone")
    keep("terms", {"steps": seconds, "threads": torch.get_num_threads()})


if __name__ == "__main__":
    main()
