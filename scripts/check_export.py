"""Write networks in every format and for both hubs, load each again, and print how far its logits are from before.

The weights of a network that is named are random; those of a checkpoint are its own. With --data, int8 is calibrated on
photographs of train/, and accuracy and agreement are those on valid/.

python scripts/check_export.py [ARCH_OR_CHECKPOINT ...] [--data DIR]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from classification.data.preprocessing import Preprocessing
from classification.data.trial import read_trial
from classification.models import NETWORKS, build
from classification.models.exporting import (
    Runtime,
    description,
    file_runtime,
    input_of,
    to_onnx,
    to_pt2,
    to_safetensors,
    torch_runtime,
)
from classification.models.fidelity import Fidelity, compare
from classification.models.hub import Classifier
from classification.models.quantised import instruction_set, to_int8, wide_instructions
from classification.models.trained import Trained, open_trained
from classification.runs.checkpoint import describe_student
from classification.system.exit_status import attempt

ARCHS = (
    *("cifar_resnet20", "mobilenet_v1", "mobilenet_v2", "shufflenet_v2", "resnet18"),
    *("timm:mobilenetv3_small_100", "timm:convnext_atto", "timm:vit_tiny_patch16_224"),
)
BATCHES = (1, 7, 32)
ROOT = Path(__file__).parents[1]


def network(arch: str, classes: int) -> Trained:
    """Return a network with random weights whose norms have the statistics of random images, as after training."""
    torch.manual_seed(0)
    module, size = build(arch, classes), 32 if arch.startswith("cifar") else 224
    seen = Preprocessing.of(size)
    module.train()
    with torch.no_grad():
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = None  # a plain mean over the batches
        for _ in range(2):
            module(seen.normalise(pictures(16, size)).contiguous())
    return Trained(Path("random.pth"), module.eval(), arch, classes, None, seen, "")


def pictures(count: int, size: int) -> Tensor:
    """Return random images in which neighbouring pixels are alike, (B, H, W, 3) bytes."""
    coarse = 255 * torch.rand(count, 3, 8, 8)
    return nn.functional.interpolate(coarse, size=size, mode="bilinear").byte().permute(0, 2, 3, 1).contiguous()


def batches(size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of several sizes, of classes that are not known."""
    torch.manual_seed(1)
    for count in BATCHES:
        yield pictures(count, size), torch.full((count,), -1)


def contents(trained: Trained, calibration: Sequence[Tensor]) -> Iterator[tuple[str, str, bool, bytes]]:
    """Yield (name, kind, whether it takes bytes, content) of every format."""
    yield "safetensors", "safetensors", False, to_safetensors(trained)
    for takes_bytes in (False, True):
        name = " bytes" if takes_bytes else ""
        yield f"pt2{name}", "pt2", takes_bytes, to_pt2(trained, takes_bytes=takes_bytes)
        model = to_onnx(trained, takes_bytes=takes_bytes)
        yield f"onnx{name}", "onnx", takes_bytes, model
    prepare, said = input_of(trained, takes_bytes=False), description(trained, takes_bytes=False)
    images = [prepare(pixels) for pixels in calibration]
    reduced = not wide_instructions()
    yield "int8", "int8", False, to_int8(to_onnx(trained), images, said, reduce_range=reduced)


def hubs(trained: Trained, folder: Path) -> Iterator[tuple[str, Runtime, int]]:
    """Yield (name, network that a hub loads, bytes of its weights)."""
    path, saved = folder / "best.pth", folder / "pretrained"
    names = [str(index) for index in range(trained.num_classes)]
    state = trained.network.state_dict()
    torch.save(describe_student(state, trained.arch, trained.num_classes, names, trained.preprocessing), path)
    prepare = input_of(trained, takes_bytes=False)
    if trained.arch in NETWORKS:
        network = torch.hub.load(str(ROOT), trained.arch, checkpoint=path, source="local", verbose=False)
        yield "hub by name", Runtime(prepare, torch.inference_mode()(network)), path.stat().st_size
    classifier = torch.hub.load(str(ROOT), "checkpoint", path, source="local", verbose=False)
    yield "hub checkpoint", Runtime(prepare, torch.inference_mode()(classifier)), path.stat().st_size
    classifier.save_pretrained(saved)
    again = Classifier.from_pretrained(str(saved))
    size = (saved / "model.safetensors").stat().st_size
    yield "from_pretrained", Runtime(prepare, torch.inference_mode()(again)), size


def runtimes(trained: Trained, folder: Path, calibration: Sequence[Tensor]) -> Iterator[tuple[str, bool, Runtime, int]]:
    """Yield (name, whether it computes in float32, what runs it, bytes) of every format."""
    for name, kind, takes_bytes, content in contents(trained, calibration):
        path = folder / f"file.{kind}"
        path.write_bytes(content)
        yield name, kind != "int8", file_runtime(path, kind, trained, takes_bytes=takes_bytes), len(content)
    for name, runtime, size in hubs(trained, folder):
        yield name, True, runtime, size


def check(trained: Trained, folder: Path, data: Path | None) -> Iterator[str]:
    """Yield a line per format."""
    before: Runtime = torch_runtime(trained)
    known: list[tuple[Tensor, Tensor, Tensor]] = []  # of the photographs: pixels, classes, logits before
    torch.manual_seed(2)
    calibration = [pictures(8, trained.preprocessing.img_size) for _ in range(4)]
    if data is not None:
        trial = read_trial(data, trained.preprocessing, trained.classes, trained.num_classes, calibrate=True)
        known = [(pixels, target, before(pixels)) for pixels, target in trial.batches(max(BATCHES))]
        calibration = list(trial.calibration(256, 8))
    for name, exact, after, size in runtimes(trained, folder, calibration):
        found = compare(before, after, batches(trained.preprocessing.img_size))
        photographs = ""
        if known:
            alike = compare(recalled(known), after, [(pixels, target) for pixels, target, _ in known])
            photographs = f"{percent(alike):>11.1f}{alike.top1()[0]:>9.2f}{alike.top1()[1]:>9.2f}"
        numbers = f"{found.difference:>10.2e}{found.largest:>10.3g}{percent(found):>10.1f}{photographs}{size:>14,}"
        yield f"{trained.arch:<30}{name:<17}{numbers}  {found.fault(0, exact=exact) or ''}".rstrip()


def recalled(known: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Callable[[Tensor], Tensor]:
    """Return what gives the logits that are known, batch by batch."""
    logits = iter([entry[2] for entry in known])
    return lambda _: next(logits)


def percent(found: Fidelity) -> float:
    """Return the agreement in percent."""
    return 100 * found.agree / found.images


def table() -> None:
    """Print the table.

    Raises:
        UserError: a network or a file that is not there.
    """
    parser = argparse.ArgumentParser(description="Load networks again in every format, and compare their logits.")
    parser.add_argument(
        "arch", metavar="ARCH", nargs="*", default=ARCHS, help="networks, checkpoints or run folders (eight networks)"
    )
    parser.add_argument("--data", metavar="DIR", type=Path, help="folder with photographs in valid/CLASS/")
    args = parser.parse_args()
    classes = 10 if args.data is None else len([path for path in (args.data / "valid").iterdir() if path.is_dir()])
    print(f"batches of {BATCHES}; {instruction_set()}, torch {torch.__version__}")
    photographs = "" if args.data is None else f"{'photos, %':>11}{'before':>9}{'top-1':>9}"
    heading = f"{'gap':>10}{'logit':>10}{'agree, %':>10}{photographs}{'bytes':>14}"
    print(f"{'network':<30}{'format':<17}{heading}")
    for arch in args.arch:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(arch, "best.pth") if Path(arch).is_dir() else Path(arch)
            trained = open_trained(str(file)) if file.is_file() else network(arch, classes)
            for line in check(trained, Path(folder), args.data):
                print(line, flush=True)


if __name__ == "__main__":
    sys.exit(attempt(table, "check_export.py"))
