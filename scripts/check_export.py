"""Export networks with random weights in every format, run each file again, and print how far its logits are.

python scripts/check_export.py [ARCH ...]
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from classification.data.preprocessing import Preprocessing
from classification.models import build
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
from classification.models.fidelity import compare
from classification.models.quantised import instruction_set, to_int8, wide_instructions
from classification.models.trained import Trained

ARCHS = (
    *("cifar_resnet20", "mobilenet_v1", "mobilenet_v2", "shufflenet_v2", "resnet18"),
    *("timm:mobilenetv3_small_100", "timm:convnext_atto", "timm:vit_tiny_patch16_224"),
)
BATCHES = (1, 7, 32)


def network(arch: str) -> Trained:
    """Return a network with random weights whose norms have the statistics of random images, as after training."""
    torch.manual_seed(0)
    module, size = build(arch, 10), 32 if arch.startswith("cifar") else 224
    seen = Preprocessing.of(size)
    module.train()
    with torch.no_grad():
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = None  # a plain mean over the batches
        for _ in range(2):
            module(seen.normalise(pictures(16, size)).contiguous())
    return Trained(Path("random.pth"), module.eval(), arch, 10, None, seen, "")


def pictures(count: int, size: int) -> Tensor:
    """Return random images in which neighbouring pixels are alike, (B, H, W, 3) bytes."""
    coarse = 255 * torch.rand(count, 3, 8, 8)
    return nn.functional.interpolate(coarse, size=size, mode="bilinear").byte().permute(0, 2, 3, 1).contiguous()


def batches(size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of several sizes, of classes that are not known."""
    torch.manual_seed(1)
    for count in BATCHES:
        yield pictures(count, size), torch.full((count,), -1)


def contents(trained: Trained) -> Iterator[tuple[str, str, bool, bytes]]:
    """Yield (name, kind, whether it takes bytes, content) of every format."""
    yield "safetensors", "safetensors", False, to_safetensors(trained)
    for takes_bytes in (False, True):
        name = " bytes" if takes_bytes else ""
        yield f"pt2{name}", "pt2", takes_bytes, to_pt2(trained, takes_bytes=takes_bytes)
        model = to_onnx(trained, takes_bytes=takes_bytes)
        yield f"onnx{name}", "onnx", takes_bytes, model
    prepare, said = input_of(trained, takes_bytes=False), description(trained, takes_bytes=False)
    torch.manual_seed(2)
    images = [prepare(pictures(8, trained.preprocessing.img_size)) for _ in range(4)]
    reduced = not wide_instructions()
    yield "int8", "int8", False, to_int8(to_onnx(trained), images, said, reduce_range=reduced)


def check(trained: Trained, folder: Path) -> Iterator[str]:
    """Yield a line per format."""
    before: Runtime = torch_runtime(trained)
    for name, kind, takes_bytes, content in contents(trained):
        path = folder / f"file.{kind}"
        path.write_bytes(content)
        after = file_runtime(path, kind, trained, takes_bytes=takes_bytes)
        found = compare(before, after, batches(trained.preprocessing.img_size))
        agree = 100 * found.agree / found.images
        numbers = f"{found.difference:>10.2e}{found.largest:>10.3g}{agree:>10.1f}{len(content):>14,}"
        yield f"{trained.arch:<30}{name:<14}{numbers}  {found.fault(0, exact=kind != 'int8') or ''}".rstrip()


def main() -> None:
    """Print the table."""
    print(f"batches of {BATCHES}; {instruction_set()}, torch {torch.__version__}")
    print(f"{'network':<30}{'format':<14}{'gap':>10}{'logit':>10}{'agree, %':>10}{'bytes':>14}")
    for arch in sys.argv[1:] or ARCHS:
        with tempfile.TemporaryDirectory() as folder:
            for line in check(network(arch), Path(folder)):
                print(line, flush=True)


if __name__ == "__main__":
    main()
