"""The step on a pretended GPU: devices never mix, and nothing waits for the GPU. See tests/fake_cuda.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mgd.losses import LOSSES

ROOT = Path(__file__).parents[3]
PLAIN = [
    *(f"--distiller {name}" for name in LOSSES if name != "ce"),
    *(f"--distiller mgd --mgd-reducer {reducer}" for reducer in ("sp", "rd", "sm")),
    *(f"--distiller mgd --term mgd.capacity={capacity}" for capacity in ("truncate", "reference", "single")),
    "--distiller mgd --mgd-margin map",
    "--distiller mgd --mgd-observe online",
    "--distiller mgd+kd --amp bf16",
    "--distiller ofd --amp bf16",
    "--distiller mgd --labels 0",
    "--distiller kd --ema 0.99",
    "--distiller mgd+kd --accumulate 2",
    "--distiller kd --mixup 0.2 --cutmix 1",
    "--distiller kd --optimizer muon",
    "--distiller kd --optimizer adamw --clip-gradients 1",
    "--distiller kd --optimizer lamb --no-decay norms",
    "--distiller kd --optimizer dot",
    "--distiller mgd --channels-last 0",
]
# The gradient scaler of torch asks whether gradients overflowed; a step can only be left out if that is known in time.
WAITING = {
    "--distiller mgd+kd --amp fp16": "self.scaler.step(self.optimizer)",
    "--distiller kd --skip-nonfinite 3": "flags.int().tolist()",
}
PARALLEL = [f"DataParallel --distiller {name}" for name in LOSSES if name not in ("ce", "crd")]


@pytest.fixture(scope="module")
def found(photos: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    recipe = tmp_path_factory.mktemp("recipe") / "two.yaml"
    own = "img_size: 24, mean: [0.4, 0.4, 0.4], std: [0.3, 0.3, 0.3]"
    lines = [f"  - {{arch: cifar_resnet8, resume: {teacher}{more}}}" for more in ("", f", {own}")]
    recipe.write_text("\n".join(["teachers:", *lines, ""]))
    two = [f"DataParallel --config {recipe} --distiller {how}" for how in ("meal", "kd --teacher-mean probabilities")]
    words = [str(photos), str(teacher), *PLAIN, *WAITING, *PARALLEL, *two]
    command = [sys.executable, "-m", "tests.fake_cuda", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {result.pop("words").replace(str(recipe), "TWO"): result for result in results}


def test_every_kind_of_wait_is_seen_and_devices_that_mix_are_refused(found: dict[str, dict[str, Any]]) -> None:
    assert found["controls"]["waits"] == {
        "item": 1,
        "if": 1,
        "mask": "DynamicOutputShapeException",
        "pageable copy": 1,
        "copy back": 1,
        "background copy": 0,
        "plain step": 0,
        "two devices": "FakeTensorDeviceMismatchError",
    }


def test_a_plain_step_waits_for_nothing(found: dict[str, dict[str, Any]]) -> None:
    assert {words: found[words] for words in PLAIN if found[words] != {"waits": {}}} == {}


def test_waits_that_are_asked_for_are_the_only_ones(found: dict[str, dict[str, Any]]) -> None:
    for words, line in WAITING.items():
        assert len(found[words]["waits"]) == 1 and line in next(iter(found[words]["waits"])), found[words]


def test_replicas_of_data_parallel_stay_on_their_gpus(found: dict[str, dict[str, Any]]) -> None:
    names = [*PARALLEL, "DataParallel --config TWO --distiller meal"]
    names += ["DataParallel --config TWO --distiller kd --teacher-mean probabilities"]
    assert {words: found[words] for words in names if found[words] != {"waits": {}}} == {}


def test_what_the_matching_adds_on_a_gpu_is_small_beside_the_maps(found: dict[str, dict[str, Any]]) -> None:
    """Made at once, targets and errors in float32 took 2.1 GiB for a moment."""
    memory, gibi = found["memory"], 2**30
    assert memory["maps"] == pytest.approx(1.077 * gibi, rel=0.03)  # of bfloat16 by hand, and some buffers
    assert memory["added"] < memory["kept"] + 0.25 * gibi and memory["added"] < memory["maps"]
