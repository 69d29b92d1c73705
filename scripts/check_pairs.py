"""Train odd pairs of networks for ten steps, and write a table.

python scripts/check_pairs.py --output docs/reference/networks.md

Networks have random weights. Taps are found and paired by the library, nothing is named. The student learns from `mgd`
(form "relative") and `kd` alone, on eight made images, for ten steps of AdamW. A row says the pairs, and what the two
terms and their sum are at the first and at the last step.
Results are kept in a file; a second run does only what is missing there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from check_taps import PAIRS

from mgd import Distiller, Taps, View, freeze, pair_taps, probe
from mgd.losses import LOSSES

CLASSES = 4
STEPS = 10


@dataclass(frozen=True)
class Pair:
    """A student, its teacher, and the side of the images of each, in pixels."""

    student: str
    teacher: str
    size: int = 64
    teacher_size: int = 64

    @property
    def name(self) -> str:
        return f"{self.student} <- {self.teacher}"


ODD = [
    Pair("timm:convnext_atto", "torchvision:swin_t"),
    Pair("timm:mobilenetv3_small_100", "timm:vit_tiny_patch16_224"),
    Pair("own:mobilenet_v1", "timm:deit_tiny_distilled_patch16_224"),
    Pair("timm:efficientnet_b0", "timm:regnety_002"),
    Pair("torchvision:resnet18", "torchvision:wide_resnet50_2"),
    Pair("torchvision:vgg11_bn", "torchvision:densenet121"),
    Pair("timm:ghostnet_050", "timm:repvgg_a0"),
    Pair("timm:fastvit_t8", "timm:efficientnet_b0"),
    Pair("timm:mobilenetv4_conv_small_035", "timm:vit_small_patch14_reg4_dinov2", 128, 112),
    Pair("timm:vit_tiny_patch16_224", "timm:vit_small_patch16_224"),
    Pair("torchvision:resnet18", "transformers:vit"),
    Pair("torchvision:resnet50", "torchvision:resnet18"),
    Pair("torchvision:swin_t", "torchvision:resnet18"),
    Pair("timm:hrnet_w18_small", "timm:resnetv2_18"),
    Pair("timm:mobilevit_xxs", "timm:pvt_v2_b0"),
    Pair("torchvision:shufflenet_v2_x0_5", "timm:mixer_s32_224", 128, 128),
]


def build(name: str, size: int) -> nn.Module:
    """Build a network of random weights for images of a size."""
    source, _, arch = name.partition(":")
    network: nn.Module
    if source == "own":
        from classification.models import build as build_own

        return build_own(arch, CLASSES)
    if source == "transformers":
        from transformers import ViTConfig, ViTForImageClassification

        small: dict[str, Any] = {
            "hidden_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 96,
            "num_labels": CLASSES,
        }
        return ViTForImageClassification(ViTConfig(image_size=size, patch_size=16, **small))
    if source == "timm":
        fixed = any(word in arch for word in ("vit_tiny", "vit_small", "deit", "mixer"))
        more: dict[str, Any] = {"img_size": size} if fixed else {}
        network = timm.create_model(arch, num_classes=CLASSES, **more)
    else:
        network = torchvision.models.get_model(arch, num_classes=CLASSES)
    return network


def made_images(size: int) -> tuple[Tensor, Tensor]:
    """Return eight images and their classes: a wave whose direction is the class, and noise."""
    generator = torch.Generator().manual_seed(1)
    target = torch.arange(8) % CLASSES
    rows, columns = torch.meshgrid(torch.linspace(0, 6, size), torch.linspace(0, 6, size), indexing="ij")
    angles = target * torch.pi / CLASSES
    waves = torch.sin(rows * angles.cos()[:, None, None] + columns * angles.sin()[:, None, None])
    return waves[:, None] + 0.3 * torch.randn(8, 3, size, size, generator=generator), target


def train(pair: Pair, steps: int = STEPS) -> dict[str, Any]:
    """Train a pair; return the paths of its taps, and the terms and the loss of every step."""
    torch.manual_seed(0)
    student, teacher = build(pair.student, pair.size), build(pair.teacher, pair.teacher_size)
    found = pair_taps(student, teacher, pair.size, pair.teacher_size)
    plain = ((0.0,) * 3, (1.0,) * 3)
    view = None if pair.size == pair.teacher_size else View(*plain, *plain, pair.teacher_size)
    tapped, taught = (Taps(net, [taps[side].path for taps in found]) for side, net in enumerate((student, teacher)))
    images, target = made_images(pair.size)
    probes = probe(tapped, images, frozen=False), probe(taught, images if view is None else view(images))
    hyper = {"mgd": LOSSES["mgd"].Hyper(form="relative"), "kd": None}
    terms = {name: (LOSSES[name].build(probes[0], probes[1:], len(images), hyper[name]), 1.0) for name in hyper}
    distiller = Distiller(tapped, freeze(taught, view), terms)
    distiller.update(0, [(images, target)])
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=5e-4)
    distiller.train()
    values: dict[str, list[float]] = {"loss": [], "mgd": [], "kd": []}
    for _ in range(steps):
        optimizer.zero_grad()
        step = distiller(images, target)
        step["loss"].backward()
        optimizer.step()
        for name, kept in values.items():
            kept.append(float(step[name].detach()))
    taps = [[vars(ours), vars(theirs)] for ours, theirs in found]
    return {"name": pair.name, "size": pair.size, "teacher_size": pair.teacher_size, "taps": taps, **values}


def falls(values: list[float]) -> bool:
    """Whether the mean of the last three values is below that of the first three."""
    return sum(values[-3:]) < sum(values[:3])


def line(row: dict[str, Any]) -> str:
    """Return a row of the table."""
    if "refused" in row:
        return f"| `{row['name']}` | refused: {row['refused']} | | | | |"
    pairs = [f"`{ours['path']}` <- `{theirs['path']}`" for ours, theirs in row["taps"]]
    sizes = [f"{o['channels']}@{o['size'][0]} <- {t['channels']}@{t['size'][0]}" for o, t in row["taps"]]
    terms = [f"{row[name][0]:.3g} to {row[name][-1]:.3g}" for name in ("mgd", "kd")]
    pixels = f"{row['size']}" if row["size"] == row["teacher_size"] else f"{row['size']}, {row['teacher_size']}"
    fell = "yes" if falls(row["loss"]) else "no"
    return (
        f"| `{row['name']}` | {pixels} | {'<br>'.join(pairs)} | {'<br>'.join(sizes)} | {' | '.join(terms)} | {fell} |"
    )


def write(rows: list[dict[str, Any]], output: Path) -> None:
    """Write the table below those of the page."""
    fell = sum("loss" in row and falls(row["loss"]) for row in rows)
    head = [
        PAIRS,
        "",
        "Made by `python scripts/check_pairs.py --output docs/reference/networks.md`; do not edit. Random weights;",
        "pairs are those that `mgd.pair_taps` finds; ten steps with `mgd` (form `relative`) and `kd` on eight made",
        "images.",
        "",
        f"{len(rows)} pairs: the loss falls in {fell}.",
        "",
        "| student <- teacher | pixels | taps | channels @ side | mgd | kd | the sum falls |",
        "|---|---|---|---|---|---|---|",
    ]
    before = output.read_text().partition(PAIRS)[0].rstrip() if output.exists() else "# Networks"
    output.write_text("\n".join([before, "", *head, *map(line, rows), ""]))


def main() -> int:
    """Train what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rows", type=Path, default=Path("runs/pairs.jsonl"), help="one JSON object per pair")
    parser.add_argument("--only", nargs="*", help="train these again, by the names in the table")
    args = parser.parse_args()
    args.rows.parent.mkdir(parents=True, exist_ok=True)
    lines = args.rows.read_text().splitlines() if args.rows.exists() else []
    rows = {row["name"]: row for row in map(json.loads, lines)}
    for pair in ODD:
        if pair.name in (args.only or []) or pair.name not in rows:
            begun = time.perf_counter()
            try:
                rows[pair.name] = train(pair)
            except (ValueError, RuntimeError) as error:
                rows[pair.name] = {"name": pair.name, "refused": " ".join(str(error).split())[:300]}
            print(f"{pair.name}: {time.perf_counter() - begun:.1f} s", flush=True)
            args.rows.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
    write([rows[pair.name] for pair in ODD if pair.name in rows], args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
