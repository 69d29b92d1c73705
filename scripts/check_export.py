"""Write networks in every format and for both hubs, load each again, and print how far its logits are from before.

The weights of a network that is named are random; those of a checkpoint are its own. With --data, int8 is calibrated on
photographs of train/, and accuracy and agreement are those on valid/.

python scripts/check_export.py [ARCH_OR_CHECKPOINT ...] [--data DIR] [--records results/exports.jsonl]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
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
    input_function,
    package_versions,
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
RECORDS = ROOT / "results" / "exports.jsonl"


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
    prepare, said = input_function(trained, takes_bytes=False), description(trained, takes_bytes=False)
    images = [prepare(pixels) for pixels in calibration]
    reduced = not wide_instructions()
    yield "int8", "int8", False, to_int8(to_onnx(trained), images, said, reduce_range=reduced)


def hubs(trained: Trained, folder: Path) -> Iterator[tuple[str, Runtime, int]]:
    """Yield (name, network that a hub loads, bytes of its weights)."""
    path, saved = folder / "best.pth", folder / "pretrained"
    names = [str(index) for index in range(trained.num_classes)]
    state = trained.network.state_dict()
    torch.save(describe_student(state, trained.arch, trained.num_classes, names, trained.preprocessing), path)
    prepare = input_function(trained, takes_bytes=False)
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


@dataclass(frozen=True)
class Row:
    """What was found of one format of a network.

    Args:
        arch: the network.
        format: its name here.
        gap: the largest difference of two logits, over random pictures in batches of `BATCHES`.
        largest: the largest logit there.
        agreement: random pictures of the same class, in percent.
        photographs: of --data the number, the agreement and top-1 before and after, in percent; empty without.
        bytes: of the file.
        fault: why the file may not stand for the network, or nothing.
    """

    arch: str
    format: str
    gap: float
    largest: float
    agreement: float
    photographs: tuple[float, ...]
    bytes: int
    fault: str

    def __str__(self) -> str:
        photographs = "{1:>11.1f}{2:>9.2f}{3:>9.2f}".format(*self.photographs) if self.photographs else ""
        numbers = f"{self.gap:>10.2e}{self.largest:>10.3g}{self.agreement:>10.1f}{photographs}{self.bytes:>14,}"
        return f"{self.arch:<30}{self.format:<17}{numbers}  {self.fault}".rstrip()


def check(trained: Trained, folder: Path, data: Path | None) -> Iterator[Row]:
    """Yield a row per format."""
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
        photographs: tuple[float, ...] = ()
        if known:
            alike = compare(recalled(known), after, [(pixels, target) for pixels, target, _ in known])
            photographs = alike.images, percent(alike), *alike.top1()
        fault = found.fault(0, exact=exact) or ""
        yield Row(trained.arch, name, found.difference, found.largest, percent(found), photographs, size, fault)


def recalled(known: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Callable[[Tensor], Tensor]:
    """Return what gives the logits that are known, batch by batch."""
    logits = iter([entry[2] for entry in known])
    return lambda _: next(logits)


def percent(found: Fidelity) -> float:
    """Return the agreement in percent."""
    return 100 * found.agree / found.images


def table(path: Path = RECORDS) -> str:
    """Return the table of a file of records, a row per network."""
    rows: dict[str, dict[str, Row]] = {}
    machine = ""
    for record in map(json.loads, path.read_text().splitlines()):
        row = Row(**{**record["row"], "photographs": tuple(record["row"]["photographs"])})
        rows.setdefault(row.arch, {})[row.format] = row
        machine = f"{record['images']}; {record['machine']}"
    lines = [
        "| network | top-1, %: torch | onnx | int8 | agreement, %: onnx | int8 | logits up to "
        "| gap: safetensors, pt2, hubs | onnx | int8 | bytes: safetensors | onnx | pt2 | int8 |",
        f"|{'---|' * 14}",
    ]
    for arch, formats in rows.items():
        onnx, int8 = formats["onnx"], formats["int8"]
        torch_gap = max(row.gap for name, row in formats.items() if not name.startswith(("onnx", "int8")))
        _, alike, top1, top1_onnx = onnx.photographs
        _, alike_int8, _, top1_int8 = int8.photographs
        cells = [f"{value:.2f}" for value in (top1, top1_onnx, top1_int8, alike, alike_int8)]
        cells += [f"{value:.2g}" for value in (onnx.largest, torch_gap, onnx.gap, int8.gap)]
        cells += [f"{formats[name].bytes:,}" for name in ("safetensors", "onnx", "pt2", "int8")]
        lines.append(f"| `{arch}` | {' | '.join(cells)} |")
    return "\n".join([*lines, "", machine])


def run() -> None:
    """Print a row per network and format, and keep it.

    Raises:
        UserError: a network or a file that is not there.
    """
    parser = argparse.ArgumentParser(description="Load networks again in every format, and compare their logits.")
    parser.add_argument(
        "arch", metavar="ARCH", nargs="*", default=ARCHS, help="networks, checkpoints or run folders (eight networks)"
    )
    parser.add_argument("--data", metavar="DIR", type=Path, help="folder with photographs in valid/CLASS/")
    parser.add_argument("--records", metavar="FILE", type=Path, help="also write a JSON object per row into this file")
    args = parser.parse_args()
    classes = 10 if args.data is None else len([path for path in (args.data / "valid").iterdir() if path.is_dir()])
    machine = f"{instruction_set()}, {package_versions('onnx')}"
    print(f"batches of {BATCHES}; {machine}")
    photographs = "" if args.data is None else f"{'photos, %':>11}{'before':>9}{'top-1':>9}"
    heading = f"{'gap':>10}{'logit':>10}{'agree, %':>10}{photographs}{'bytes':>14}"
    print(f"{'network':<30}{'format':<17}{heading}")
    kept = []
    for arch in args.arch:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(arch, "best.pth") if Path(arch).is_dir() else Path(arch)
            trained = open_trained(str(file)) if file.is_file() else network(arch, classes)
            for row in check(trained, Path(folder), args.data):
                print(row, flush=True)
                images = f"{int(row.photographs[0])} photographs" if row.photographs else "random pictures"
                kept.append(json.dumps({"row": asdict(row), "images": images, "machine": machine}))
                if args.records is not None:  # a run that is cut leaves what it found
                    args.records.write_text("".join(f"{line}\n" for line in kept))


if __name__ == "__main__":
    sys.exit(attempt(run, "check_export.py"))
