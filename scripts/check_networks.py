"""Make every named network a teacher, resume that run, and evaluate the network: python scripts/check_networks.py

The table has a row for every network of `classification.models`, and for one of each family of torchvision and timm
by its normalisation and its activations. Each is trained for one step on a few made images, evaluated from its own
checkpoint, and teaches a small student by its logits for one step; that run is then resumed for another. Where a
command refuses or fails, its cell has the sentence. The exit status is 1 where there is such a cell.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
import torchvision
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from classification import main_base, main_mgd
from classification.models import NETWORKS, build

CLASSES = ("bar", "dot", "sky")
# One of each family and the side of its images in pixels, the smallest that it takes or nearly so.
FAMILIES: dict[str, int] = {
    **{f"torchvision:{name}": size for name, size in {
        "alexnet": 64, "vgg11_bn": 32, "squeezenet1_1": 32, "resnext50_32x4d": 32, "wide_resnet50_2": 32,
        "regnet_x_400mf": 32, "regnet_y_400mf": 32, "mobilenet_v2": 32, "mobilenet_v3_small": 32,
        "mobilenet_v3_large": 32, "mnasnet0_5": 32, "efficientnet_b0": 32, "efficientnet_v2_s": 32,
        "shufflenet_v2_x0_5": 32, "densenet121": 32, "googlenet": 64, "inception_v3": 96, "convnext_tiny": 32,
        "swin_t": 32, "swin_v2_t": 32, "vit_b_32": 224, "maxvit_t": 224,
    }.items()},
    **{f"timm:{name}": size for name, size in {
        "resnet10t": 32, "seresnet18": 32, "resnext26ts": 32, "resnet50_gn": 32, "resnetv2_18": 32,
        "resnetv2_50x1_bit": 32, "resnetv2_50d_evos": 32, "resnetv2_50d_frn": 32, "nf_resnet26": 32,
        "nf_regnet_b0": 32, "eca_nfnet_l0": 32, "regnetx_002": 32, "regnety_002": 32, "gernet_s": 32,
        "mobilenetv3_small_050": 32, "mobilenetv4_conv_small_035": 32, "mnasnet_small": 32,
        "efficientnet_lite0": 32, "tf_efficientnet_b0": 32, "tf_efficientnet_lite0": 32,
        "tf_efficientnetv2_b0": 32, "mixnet_s": 32, "tinynet_e": 32, "lcnet_035": 32, "rexnet_100": 32,
        "ghostnet_050": 32, "repghostnet_050": 32, "repvgg_a0": 32, "mobileone_s0": 32, "repvit_m0_9": 32,
        "fastvit_t8": 256, "hgnetv2_b0": 32, "hrnet_w18_small": 32, "dla34": 32, "dpn48b": 32,
        "ese_vovnet19b_dw": 32, "selecsls42b": 32, "convnext_atto": 32, "convnextv2_atto": 32, "starnet_s1": 32,
        "mambaout_femto": 32, "edgenext_xx_small": 64, "mobilevit_xxs": 64, "poolformer_s12": 32, "pvt_v2_b0": 32,
        "efficientformer_l1": 224, "efficientformerv2_s0": 224, "levit_128s": 224, "coatnet_pico_rw_224": 224,
        "xcit_nano_12_p16_224": 224, "swin_tiny_patch4_window7_224": 224, "hiera_tiny_224": 224,
        "vit_tiny_patch16_224": 224, "deit_tiny_distilled_patch16_224": 224, "mixer_s32_224": 224,
    }.items()},
}  # fmt: skip
# torch crashes in the backward pass of its convolutions where channels are last in memory.
MORE = {"timm:fastvit_t8": ["--channels-last", "0"]}
STUDENT = "cifar_resnet8_w0.5"
HEAD = "| network | pixels | folded norms / norms | teacher of one step | resumed | evaluated from its own checkpoint |"


@dataclass(frozen=True)
class Row:
    """What came of one network: "yes", or the sentence with which a command ended."""

    arch: str
    size: int
    folded: str
    teaches: str
    resumes: str
    evaluates: str

    @property
    def works(self) -> bool:
        """Whether all three do."""
        return (self.teaches, self.resumes, self.evaluates) == ("yes", "yes", "yes")

    def __str__(self) -> str:
        cells = (self.folded, self.teaches, self.resumes, self.evaluates)
        return " | ".join([f"| `{self.arch}`", str(self.size), *(cell.replace("|", "\\|") for cell in cells)]) + " |"


def networks() -> dict[str, int]:
    """Return every network of the table and the side of its images: the named ones, then the families."""
    named = {
        arch: 96 if arch.startswith(("mobilenet", "shufflenet", "cifar_mobilenet", "pplcnet")) else 32
        for arch in NETWORKS
    }
    return {**named, **FAMILIES}


def write_photos(root: Path) -> Path:
    """Write two training images and one to validate of each class; return the folder."""
    rng = np.random.default_rng(0)
    for split, num in (("train", 2), ("valid", 1)):
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for number in range(num):
                pixels = rng.integers(0, 120, (32, 32, 3), dtype=np.uint8)
                pixels[..., label] += 120
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


def command(main: Callable[[list[str]], int], words: list[str]) -> tuple[str, str]:
    """Run a command in this process; return "yes" or why it did not end well, and what it said."""
    said, wrong = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(wrong):
            status = main(words)
    except SystemExit as end:
        status = 0 if end.code is None else 2
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", said.getvalue()
    if status == 0:
        return "yes", said.getvalue()
    lines = wrong.getvalue().strip().splitlines() or [f"exit status {status}"]
    return lines[-1][:400], said.getvalue()


def check(arch: str, size: int, photos: Path, place: Path) -> Row:
    """Train, evaluate, teach and resume with one network.

    Args:
        arch: its name.
        size: side of its images in pixels.
        photos: of `write_photos`.
        place: an empty folder for its runs.
    """
    common = f"--train-crop pad -b 6 -j 0 --seed 0 -p 1000 --momentum 0 --img-size {size}".split() + MORE.get(arch, [])
    trained = place / "trained"
    own = [str(photos), "-a", arch, *common]
    evaluates, _ = command(main_base.main, [*own, "--epochs", "1", "--lr", "0.001", "--output", str(trained)])
    if evaluates == "yes":
        evaluates, _ = command(main_base.main, [*own, "--evaluate", "--student-resume", str(trained / "last.pth")])
    weights = trained / "best.pth"
    if not weights.exists():
        weights = place / "weights.pth"
        torch.save(build(arch, len(CLASSES)).state_dict(), weights)
    teacher = ["--teacher-arch", arch, "--teacher-resume", str(weights)]
    words = [str(photos), "-a", STUDENT, *teacher, "--distiller", "kd", "--lr", "0.01", *common]
    taught = place / "taught"
    teaches, said = command(main_mgd.main, [*words, "--epochs", "1", "--output", str(taught)])
    folded = re.search(r"(\d+) of (\d+) batch norms folded", said)
    resumes = "not tried"
    if teaches == "yes":
        resumes, _ = command(main_mgd.main, [*words, "--epochs", "2", "--resume", str(taught / "last.pth")])
    return Row(arch, size, f"{folded[1]} / {folded[2]}" if folded else "", teaches, resumes, evaluates)


def safely(arch: str, size: int, photos: Path) -> Row:
    """Return the row of a network, whatever happens."""
    try:
        with tempfile.TemporaryDirectory() as place:
            return check(arch, size, photos, Path(place))
    except Exception as error:
        traceback.print_exc()
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return Row(arch, size, "", reason, "not tried", "not tried")


def all_rows(sizes: dict[str, int], photos: Path) -> Iterator[Row]:
    """Yield the row of every network, made in another process: torch itself may crash in one, and the rest go on."""
    pool = None
    for arch, size in sizes.items():
        pool = pool or ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        try:
            yield pool.submit(safely, arch, size, photos).result()
        except BrokenProcessPool:
            pool = None
            yield Row(arch, size, "", "the process crashed", "not tried", "the process crashed")
    if pool is not None:
        pool.shutdown()


def page(rows: list[Row]) -> str:
    """Return the Markdown page of the table."""
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}"
    working = sum(row.works for row in rows)
    more = " ".join(
        f"`{name}` was trained with `{' '.join(words)}`, because torch crashes without it."
        for name, words in MORE.items()
    )
    lines = [
        "# Networks as teachers",
        "",
        f"{working} of {len(rows)} networks work as teachers: networks of this project, and one of each family of",
        "torchvision and timm. Each network was tried in four steps:",
        "",
        "1. It was trained for one step.",
        "2. It was evaluated from its own `last.pth`.",
        "3. It taught a small student by its logits (term `kd`), for one step.",
        "4. That run was resumed for another step.",
        "",
        "*Folded* norms are batch norms that are merged into the convolution before them, which makes the frozen",
        f"teacher faster. The other norms are computed as they are. {more}",
        "",
        f"Made by `python scripts/check_networks.py --output docs/reference/teachers.md` with {versions}.",
        "",
        HEAD,
        "|---|---|---|---|---|---|",
        *map(str, rows),
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Run the script; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="networks to check (default: all)")
    parser.add_argument("--output", type=Path, help="file to write the page to, besides printing the table")
    args = parser.parse_args(argv)
    sizes = networks()
    if unknown := [name for name in args.names if name not in sizes]:
        parser.error(f"no row of the table: {', '.join(unknown)}")
    rows = []
    print(HEAD)
    with tempfile.TemporaryDirectory() as folder:
        photos = write_photos(Path(folder, "photos"))
        for row in all_rows({arch: sizes[arch] for arch in args.names or sizes}, photos):
            rows.append(row)
            print(row, flush=True)
    if args.output:
        args.output.write_text(page(rows))
    return 0 if all(row.works for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
