"""Is a GPU right and fast here? python scripts/device_check.py: ten minutes at most; without a GPU a dry run.

    flows      costs and flows on the device beside those on the CPU
    losses     every term, loss and gradient, in three precisions beside float32 on the CPU
    waits      what has the processor wait for the GPU in a step of a run
    compile    inductor beside eager: losses, images per second (a dry run traces, and compiles nothing)
    resume     --deterministic 1: a run that is cut and resumed ends as the one left alone, bit for bit
    step       images per second and peak memory of a step beside the plain form (scripts/plain.py)
    loader     images per second of the loading processes

Each part is tried even if one before it fails. Without ortools flows are scipy's; without tensorboardX runs write no
events. Writes device.json in the folder of --output, and ends with status 1 if something is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import io
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import mgd
from classification.data.loading import Photos, TrainBatches, make_loader
from classification.data.transforms import train_transform
from classification.models import build
from classification.options.config import parse
from classification.runs.world import Seed, World
from classification.training.distilling import prepare
from classification.training.engine import Engine
from classification.training.precision import MixedPrecision, autocast
from classification.training.step import Stepper
from mgd.losses import LOSSES

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
STUDENT, TEACHER = "cifar_resnet8_w0.5", "cifar_resnet8"
DRAWS = ("crd", "masked_generative", "rd")  # terms with random draws, which differ between devices
PEERS = ("dml", "udml")  # terms without a frozen teacher
NARROW = {"off": 2e-3, "bf16": 0.1, "fp16": 0.1}  # relative difference of losses and gradients that is allowed


@dataclass
class Check:
    """The device, where files are, and what was found."""

    device: torch.device
    work: Path
    found: dict[str, Any] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    def expect(self, right: bool, what: str) -> None:
        """Note what is wrong."""
        if not right:
            self.wrong.append(what)
            print(f"    WRONG: {what}", flush=True)

    def wait(self) -> None:
        """Wait until the device has done what it was asked."""
        if self.gpu:
            torch.cuda.synchronize(self.device)


def write_photos(folder: Path, train: int, valid: int, size: tuple[int, int], suffix: str) -> Path:
    """Write smooth random pictures of three classes."""
    draw = np.random.default_rng(0)
    for part, num in (("train", train), ("valid", valid)):
        for label in range(3):
            place = folder / part / f"class{label}"
            place.mkdir(parents=True)
            for number in range(num):
                coarse = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8) // 2 + 40 * label
                Image.fromarray(coarse.astype(np.uint8)).resize(size).save(place / f"{number}.{suffix}")
    return folder


def words(check: Check, terms: str, *more: str) -> list[str]:
    """Return the options of a tiny distillation."""
    base = [str(check.work / "photos"), "-a", STUDENT, "--teacher-arch", TEACHER, "--teacher-resume"]
    base += [str(check.work / "teacher.pth"), "--img-size", "16", "-b", "16", "-j", "0", "--train-crop", "pad"]
    base += ["--seed", "0", "--distiller", terms]
    if "mgd" in terms.split("+") and importlib.util.find_spec("ortools") is None:
        base += ["--term", "mgd.solver=scipy"]
    return [*base, *([] if terms in PEERS else ["--teacher-dtype", "float32"]), *more]


def stepper_of(check: Check, device: torch.device, terms: str, amp: str) -> Stepper:
    """Build a run on a device, its terms updated."""
    where = "cuda:0" if device.type == "cuda" else "cpu"
    folder = tempfile.mkdtemp(dir=check.work)
    typed = words(check, terms, "--device", where, "--amp", amp, "--output", folder)
    options = parse(typed, "main_mgd.py", distillation=True)
    with contextlib.redirect_stdout(io.StringIO()):
        job = prepare(options, Seed(0, True))
        assert job.distiller is not None
        engine = Engine(job, World(device=device))
        stepper = Stepper(engine)
        images = partial(engine.training_images, 0)
        stepper.distiller.update(0, images, seed=0, context=engine.autocast)
    stepper.wrapped.train()
    torch.manual_seed(0)
    return stepper


def batch_of(stepper: Stepper, num: int = 16) -> list[Tensor]:
    """Return a batch as the loader gives it."""
    size, draw = stepper.job.preprocessing.img_size, torch.Generator().manual_seed(0)
    views = [2] if any("views" in spec.needs for spec in stepper.options.table.values()) else []
    images = torch.randint(0, 256, (num, *views, size, size, 3), dtype=torch.uint8, generator=draw)
    return [images, torch.arange(num) % 3, torch.arange(num)]


def check_flows(check: Check) -> dict[str, Any]:
    """Compare costs and flows of maps, in three shapes."""
    rows: list[dict[str, Any]] = []
    for student, teacher in ((64, 256), (96, 130), (160, 40)):
        draw = torch.Generator().manual_seed(student)
        maps = [torch.randn(32, width, 14, 14, generator=draw) for width in (student, teacher)]
        one, other = (mgd.channel_cost(maps[0].to(d), maps[1].to(d)) for d in (CPU, check.device))
        apart = float((one - other.cpu()).abs().max())
        totals = [mgd.solve_flow(cost.cpu(), solver="scipy").total_cost for cost in (one, other)]
        rows.append({"shape": [student, teacher], "cost_apart": apart, "totals": totals})
        check.expect(apart < 1e-4, f"the cost of {student} x {teacher} channels differs by {apart:.2g}")
        check.expect(abs(totals[0] - totals[1]) < 1e-3 * totals[0], f"flows of {student} x {teacher} cost {totals}")
    return {"rows": rows, "largest": max(row["cost_apart"] for row in rows)}


def _loss_and_gradient(check: Check, device: torch.device, name: str, amp: str) -> list[float]:
    stepper = stepper_of(check, device, name, amp)
    images, target, index = batch_of(stepper)
    values = stepper.forward(images, target, index, 0)
    values["loss"].mean().backward()
    check.wait()
    weights = [p for p in stepper.student.parameters() if p.grad is not None]
    return [
        float(values["loss"].detach().mean()),
        float(torch.stack([p.grad.norm() for p in weights if p.grad is not None]).norm()),
    ]


def check_losses(check: Check) -> dict[str, Any]:
    """Compare every term in three precisions with float32 on the CPU."""
    found: dict[str, Any] = {}
    names = [name for name in LOSSES if name != "ce"]
    for name in names:
        expected = _loss_and_gradient(check, CPU, name, "off")
        for amp in ("off", "bf16", *(["fp16"] if check.gpu else [])):
            got = _loss_and_gradient(check, check.device, name, amp)
            apart = max(abs(a - b) / max(abs(b), 1e-6) for a, b in zip(got, expected, strict=True))
            found[f"{name} {amp}"] = {"got": got, "expected": expected, "apart": apart}
            check.expect(all(np.isfinite(got)), f"{name} in {amp} is not finite: {got}")
            check.expect(apart < NARROW[amp] or name in DRAWS, f"{name} in {amp}: {got} beside {expected}")
    worst = {amp: max((v["apart"], n) for n, v in found.items() if n.endswith(amp) and n.split()[0] not in DRAWS)
             for amp in ("off", "bf16", *(["fp16"] if check.gpu else []))}  # fmt: skip
    return {"terms": found, "worst": worst}


def check_waits(check: Check) -> dict[str, Any]:
    """Count what waits for the GPU in a step behind the first ones, by torch's own debug mode."""
    found: dict[str, Any] = {}
    for how in ("mgd", "mgd+kd", "kd"):
        stepper = stepper_of(check, check.device, how, "bf16")
        for step in range(4):
            if step == 3 and check.gpu:
                torch.cuda.set_sync_debug_mode("warn")
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                stepper(_pinned(check, batch_of(stepper)), 0, step + 1, 16)
        if check.gpu:
            torch.cuda.set_sync_debug_mode("default")
        lines = [f"{Path(w.filename).name}:{w.lineno}" for w in said if "synchroniz" in str(w.message)]
        found[how] = lines if check.gpu else "not counted on a CPU: see tests/fake_cuda.py"
        check.expect(not lines, f"a step of {how} waits for the GPU at {lines}")
    return found


def _pinned(check: Check, batch: list[Tensor]) -> list[Tensor]:
    return [tensor.pin_memory() for tensor in batch] if check.gpu else batch


def check_compile(check: Check) -> dict[str, Any]:
    """Compare the losses and the speed of compiled networks and terms with those of eager ones."""
    losses, speed = {}, {}
    for way in ("eager", "compiled"):
        stepper = stepper_of(check, check.device, "mgd+kd", "bf16")
        if way == "compiled":
            more = {} if check.gpu else {"backend": "aot_eager"}
            stepper.distiller.compile(student=True, dynamic=False, **more)
        batch, found = batch_of(stepper), []
        for step in range(5):
            values = stepper(batch, 0, step + 1, 16)
            assert values is not None
            found.append(float(values["loss"].detach()))
        losses[way], speed[way] = found, 16 / _seconds(check, lambda s=stepper, b=batch: s(b, 0, 9, 16), 10)  # type: ignore[misc]
    apart = max(abs(a - b) / abs(b) for a, b in zip(losses["compiled"], losses["eager"], strict=True))
    check.expect(apart < 0.05, f"compiled losses {losses['compiled']} beside {losses['eager']}")
    return {"apart": apart, "images_per_second": speed, "losses": losses}


def _seconds(check: Check, step: Callable[[], object], rounds: int) -> float:
    """Return the median seconds of a step, after two that are not counted."""
    times = []
    for number in range(rounds + 2):
        check.wait()
        begun = time.perf_counter()
        step()
        check.wait()
        if number > 1:
            times.append(time.perf_counter() - begun)
    return median(times)


CUT = """
import os, signal, sys
from classification import main_mgd
from classification.training.step import Stepper
step, done, cut = Stepper._step, [], int(sys.argv.pop(1))
def counted(self, *inputs):
    done.append(1)
    if len(done) == cut:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(self, *inputs)
Stepper._step = counted
sys.exit(main_mgd.main())
"""
NO_EVENTS = """
class SummaryWriter:
    def __init__(self, *a, **k): ...
    def __getattr__(self, name):
        return lambda *a, **k: None
"""


def check_resume(check: Check) -> dict[str, Any]:
    """Cut a run of two epochs in its fourth step, resume it, and compare its files with those of one left alone."""
    paths = [str(ROOT)]
    if importlib.util.find_spec("tensorboardX") is None:
        (check.work / "stand-in").mkdir()
        (check.work / "stand-in" / "tensorboardX.py").write_text(NO_EVENTS)
        paths.append(str(check.work / "stand-in"))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    where = "cuda:0" if check.gpu else "cpu"
    base = words(check, "mgd+kd", "--deterministic", "1", "--device", where, "--epochs", "2")
    statuses = []
    for name, cut in (("alone", 0), ("cut", 4), ("cut", 0)):
        command = [sys.executable, "-c", CUT, str(cut), *base, "--resume", "auto", "--output", str(check.work / name)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        statuses.append(done.returncode)
        check.expect(done.returncode in ((0,) if cut == 0 else (128 + signal.SIGTERM,)), done.stderr[-500:])
    one, other = (
        torch.load(check.work / name / "last.pth", weights_only=True)["state_dict"] for name in ("alone", "cut")
    )
    differs = [name for name, value in one.items() if not torch.equal(value, other[name])]
    check.expect(not differs, f"a run that was cut and resumed has other weights: {differs[:5]}")
    return {"statuses": statuses, "differs": differs}


def check_step(check: Check) -> dict[str, Any]:
    """Time a step of ResNet-50 teaching mobilenet_v1, ours and plain in alternation, and measure memory."""
    from bench_step import Pair

    num, size, rounds = (256, 224, 10) if check.gpu else (4, 64, 2)
    draw = torch.Generator().manual_seed(0)
    pair = Pair("mobilenet_v1", torch.randn(4, 3, size, size, generator=draw), torch.arange(4))
    images = torch.randn(num, 3, size, size, generator=draw).to(check.device, memory_format=torch.channels_last)
    target = (torch.arange(num) % 1000).to(check.device)
    steps, peaks, loss = {}, {}, {}
    for name, module in (("ours", pair.distiller(fast=False)), ("plain", pair.plain(prefixes=False))):
        module = copy.deepcopy(module).to(check.device).to(memory_format=torch.channels_last).train()
        if name == "plain":
            plain: Any = module
            plain.margins = [margin.to(check.device) for margin in plain.margins]
            plain.flows = [flow.to(check.device) for flow in plain.flows]
        mixed = MixedPrecision(module, check.device, "bf16") if name == "ours" else module
        optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], 1e-4, momentum=0.9)

        def step(mixed: nn.Module = mixed, optimizer: torch.optim.Optimizer = optimizer, name: str = name) -> None:
            optimizer.zero_grad(set_to_none=True)
            with contextlib.nullcontext() if name == "ours" else autocast(check.device.type, "bf16"):
                loss[name] = mixed(images, target)["loss"]
            loss[name].backward()
            optimizer.step()

        steps[name] = step
    for name, step in steps.items():
        if check.gpu:
            torch.cuda.reset_peak_memory_stats()
        step()
        check.wait()
        peaks[name] = torch.cuda.max_memory_allocated() / 2**30 if check.gpu else None
    first = {name: float(value.detach()) for name, value in loss.items()}
    check.expect(abs(first["ours"] - first["plain"]) < 0.05 * abs(first["plain"]), f"first losses {first}")
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            seconds[name].append(_seconds(check, step, 1))
    return {"images": num, "size": size, "images_per_second": {n: num / median(s) for n, s in seconds.items()},
            "peak_gib": peaks, "first_losses": first}  # fmt: skip


def check_loader(check: Check) -> dict[str, Any]:
    """Time the loading processes alone, on JPEG files of a usual size."""
    folder = write_photos(check.work / "large", 256 if check.gpu else 32, 1, (500, 375), "jpg")
    samples = [(str(path), 0) for path in sorted((folder / "train").rglob("*.jpg"))]
    workers, found = min(16, os.cpu_count() or 1), {}
    photos = Photos(samples, train_transform(224, "resized"), 0)
    batches = TrainBatches(len(samples), 32, 0)
    loading = make_loader(photos, batches, workers, check.device)
    for epoch in range(2):  # the first one starts the processes
        batches.begin(epoch)
        begun = time.perf_counter()
        for images, *_ in loading:
            images.to(check.device, non_blocking=True)
        check.wait()
        found = {"workers": workers, "images_per_second": len(samples) / (time.perf_counter() - begun)}
    return found


PARTS: dict[str, Callable[[Check], dict[str, Any]]] = {
    "flows": check_flows,
    "losses": check_losses,
    "waits": check_waits,
    "compile": check_compile,
    "resume": check_resume,
    "step": check_step,
    "loader": check_loader,
}


def about(device: torch.device) -> dict[str, Any]:
    """Return the machine, versions, and which packages are missing."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    missing = [name for name in ("ortools", "tensorboardX") if importlib.util.find_spec(name) is None]
    return {
        "device": str(device),
        "name": name,
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "missing": missing,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT", ".")), help="folder of device.json")
    args = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False
    with tempfile.TemporaryDirectory() as work:
        check = Check(torch.device("cuda", 0) if args.device == "cuda" else CPU, Path(work))
        write_photos(check.work / "photos", 24, 8, (16, 16), "png")
        torch.manual_seed(0)
        torch.save(build(TEACHER, 3).state_dict(), check.work / "teacher.pth")
        check.found["about"] = about(check.device)
        print(json.dumps(check.found["about"]), flush=True)
        for name in args.parts:
            begun = time.perf_counter()
            try:
                check.found[name] = PARTS[name](check)
            except Exception as error:
                traceback.print_exc()
                check.expect(False, f"{name} ended with {type(error).__name__}: {error}")
            short = {k: v for k, v in check.found.get(name, {}).items() if k not in ("terms", "rows", "losses")}
            print(f"{name}: {time.perf_counter() - begun:.0f} s {json.dumps(short)}", flush=True)
            content = {**check.found, "wrong": check.wrong}
            (args.output / "device.json").write_text(json.dumps(content, indent=1) + "\n")
    print("all right" if not check.wrong else f"{len(check.wrong)} things are wrong")
    sys.exit(bool(check.wrong))


if __name__ == "__main__":
    main()
