"""Find the taps of many networks, check each, and write a table.

python scripts/check_taps.py --output docs/reference/networks.md

Networks of torchvision and timm are built without weights, each in a process of its own. For every map that
`mgd.find_taps` finds, (a) putting the map in its own place changes no logit, and putting that of another image there
changes them; (b) a bright patch at row i and column j of an image changes the map, of stride s, most at (i / s, j / s)
for three of four patches, or the centre of what it changes follows it (correlation of rows, and of columns, at least
0.9: random weights blur a deep map, and do not mix up its order). A map that fails is tried again in a network that
blurs less: see `centre` and `settle`.
Results are kept in a file beside the table; a second run does only what is missing there. A network that is not in that
file keeps its line of the page.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from mgd.taps import Taps, dry_forward, find_taps
from mgd.taps.changed import run_changed

TORCHVISION = """alexnet vgg11 vgg16_bn resnet18 resnet50 resnext50_32x4d wide_resnet50_2 densenet121 squeezenet1_1
googlenet@96 inception_v3@160 mobilenet_v2 mobilenet_v3_small mobilenet_v3_large mnasnet0_5 mnasnet1_0 efficientnet_b0
efficientnet_b1 efficientnet_v2_s shufflenet_v2_x0_5 shufflenet_v2_x1_0 regnet_x_400mf regnet_y_400mf regnet_y_800mf
convnext_tiny swin_t swin_v2_t vit_b_32@224 maxvit_t@224"""
TIMM = """resnet10t resnet18d seresnet18 resnet26t skresnet18 ecaresnet26t resnext26ts resnet50_gn resnetv2_18
resnetv2_50x1_bit resnetv2_50d_frn resnetrs50 resnest14d res2net50_26w_4s cspresnet50 cspdarknet53 darknet53
nf_resnet26 nf_regnet_b0 eca_nfnet_l0 dm_nfnet_f0 regnetx_002 regnety_002 regnetz_b16 gernet_s mobilenetv1_100
mobilenetv2_050 mobilenetv3_small_050 mobilenetv3_large_100 mobilenetv4_conv_small_035 mobilenetv4_conv_medium
mobilenetv4_hybrid_medium mnasnet_small spnasnet_100 fbnetc_100 fbnetv3_b efficientnet_lite0 efficientnet_b0
tf_efficientnet_b0 tf_efficientnet_lite0 tf_efficientnetv2_b0 efficientnetv2_rw_t mixnet_s tinynet_e lcnet_035
rexnet_100 hardcorenas_a ghostnet_050 ghostnetv2_100 repghostnet_050 repvgg_a0 repvgg_b0 mobileone_s0 repvit_m0_9
fastvit_t8@256 fastvit_sa12@256 hgnetv2_b0 hgnet_tiny hrnet_w18_small hrnet_w18_small_v2 dla34 dla46_c dpn48b
densenet121 ese_vovnet19b_dw selecsls42b inception_v3@224 inception_v4@160 inception_next_atto inception_resnet_v2@160
xception41 legacy_xception convnext_atto convnextv2_atto convnext_femto_ols starnet_s1 mambaout_femto edgenext_xx_small
focalnet_tiny_srf davit_tiny@224 mobilevit_xxs mobilevitv2_050 poolformer_s12 poolformerv2_s12 caformer_s18
convformer_s18 pvt_v2_b0 twins_pcpvt_small@224 twins_svt_small@224 efficientformer_l1@224 efficientformerv2_s0@224
efficientvit_b0@224 efficientvit_m0@224 levit_128s@224 levit_conv_128s@224 coatnet_pico_rw_224@224
coatnet_nano_rw_224@224 maxvit_pico_rw_256@256 maxxvit_rmlp_nano_rw_256@256 gcvit_xxtiny@224 nextvit_small shvit_s1@224
swiftformer_xs@224 tiny_vit_5m_224@224 nest_tiny@224 xcit_nano_12_p16_224@224 swin_tiny_patch4_window7_224@224
swinv2_cr_tiny_224@224 hiera_tiny_224@224 convmixer_768_32 crossvit_tiny_240@240 visformer_tiny@224 cait_xxs24_224@224
coat_tiny@224 convit_tiny@224 vit_tiny_patch16_224@224 vit_small_patch32_224@224 deit_tiny_distilled_patch16_224@224
deit3_small_patch16_224@224 vit_tiny_r_s16_p8_224@224 vit_relpos_small_patch16_224@224
vit_small_patch14_reg4_dinov2@224 vit_small_patch16_dinov3@224 eva02_tiny_patch14_224@224 beit_base_patch16_224@224
mixer_s32_224@224 gmixer_12_224@224 resmlp_12_224@224 gmlp_ti16_224@224 tnt_s_patch16_224@224 pit_ti_224@224
pit_ti_distilled_224@224 sequencer2d_s@224 tresnet_m vovnet39a volo_d1_224@224 rdnet_tiny"""
PAIRS = "## Pairs that train"  # the part of the page that check_pairs.py makes
SIZE = 128
SECONDS = 1800
HEAD = """# Where networks are tapped

Made by `python scripts/check_taps.py --output docs/reference/networks.md`; do not edit. Each row is a network with
random weights, and the taps that `mgd.find_taps` finds in it, from shallow to deep. Two checks show that the maps are
read correctly.

- Sides: height and width of each map; `t` means that it is made of tokens.
- Margins: `n` from the norm before a ReLU; `m` measured; `-` no margin, because nothing cuts off negative values.
- Folded norms: taps whose statistics come from a batch norm.
- In place: if each map is put back in its place, the logits stay the same; with the map of another image, they change.
- Moves: a bright patch at (i, j) changes a map of stride s most at (i / s, j / s), within one position, for three of
  four patches. Or the centre of the change follows the patch, with correlations of rows and of columns of at least 0.9.

Tokens in a wrong order fail both ways of "moves". A deep map may fail only because random weights blur it. It is then
tried again, first with larger weights in the middle of each kernel and for attention to the same position, and then
with batch norm statistics of made images. If a map still failed, its order would not be proven.
"""


def names() -> list[tuple[str, int]]:
    """Return every network and the side of its images."""
    words = [f"torchvision:{word}" for word in TORCHVISION.split()] + [f"timm:{word}" for word in TIMM.split()]
    return [(word.split("@")[0], int(word.partition("@")[2] or SIZE)) for word in words]


def build(name: str) -> nn.Module:
    """Build a network without weights; what starts at 0, as a last layer, gets other values."""
    torch.manual_seed(0)
    source, _, arch = name.partition(":")
    network: nn.Module
    if source == "timm":
        more: dict[str, Any] = {"img_size": 224} if "dinov2" in arch else {}
        network = timm.create_model(arch, pretrained=False, **more)
    else:
        more = {"init_weights": False} if arch in ("googlenet", "inception_v3") else {}
        network = torchvision.models.get_model(arch, weights=None, **more)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any() and parameter.ndim > 1:
                parameter.normal_(std=0.02)
        for module in network.modules():
            weight = getattr(module, "weight", None)
            if isinstance(module, nn.BatchNorm2d) and isinstance(weight, Tensor) and not weight.any():
                weight.fill_(0.5)
    return network.eval()


def stays(network: nn.Module, path: str, images: Tensor) -> str:
    """Return "yes" where a map is what the logits are computed from; else what is wrong."""
    with torch.no_grad():
        plain = run_changed(network, path, images, torch.clone)
        taps = Taps(network)
        logits = dry_forward(taps, images).logits
    scale = float(logits.abs().max())
    if not torch.allclose(plain, logits, rtol=1e-4, atol=1e-5 * scale):
        return f"{path}: its own map changes the logits"
    other = run_changed(network, path, images, lambda maps: maps.flip(0) + maps.std() * torch.randn_like(maps))
    return "yes" if not torch.equal(other, plain) else f"{path}: another map changes no logit"


def moves(network: nn.Module, path: str, size: int, grid: tuple[int, int]) -> str:
    """Return "yes" where patches of the image change the map where they should; else what is wrong."""
    rows, columns = (sorted({side * k // 8 for k in (1, 4, 6)}) for side in grid)
    spots = [(i, j) for i in rows for j in columns]
    images = 0.1 * torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1)).repeat(
        len(spots) + 1, 1, 1, 1
    )
    step = size / grid[0], size / grid[1]
    for number, (i, j) in enumerate(spots):
        top, left = int(i * step[0]), int(j * step[1])
        images[number, :, top : int((i + 1) * step[0]), left : int((j + 1) * step[1])] += 3
    taps = Taps(network, [path])
    maps = dry_forward(taps, images).features[0].double()
    taps.close()
    change = (maps[:-1] - maps[-1:]).square().sum(1)
    change = change / change.sum((1, 2), keepdim=True)
    change = change - change.mean(0)  # what every patch changes alike, as at the rim
    most = [divmod(int(where.argmax()), grid[1]) for where in change]
    near = [
        max(abs(a - b) for a, b in zip(spot, found, strict=True)) <= (min(grid) > 3)
        for spot, found in zip(spots, most, strict=True)
    ]
    weight = change.clamp_min(0) / change.clamp_min(0).sum((1, 2), keepdim=True)
    centres = [(weight.sum(3 - axis) * torch.arange(grid[axis - 1])).sum(1) for axis in (1, 2)]
    wanted = torch.tensor(spots, dtype=torch.float64).T
    follows = [float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in zip(wanted, centres, strict=True)]
    if sum(near) >= 0.75 * len(spots) or min(follows) >= 0.9:
        return "yes"
    return f"{path}: {sum(near)} of {len(spots)} patches near, correlation {follows[0]:.2f} and {follows[1]:.2f}"


def centre(network: nn.Module) -> None:
    """Let the middle of every kernel, and a position's own value in attention, count most: a deep map blurs less."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size[0] % 2 and module.kernel_size[0] > 1:
            middle = module.kernel_size[0] // 2
            with torch.no_grad():
                kept = module.weight[..., middle, module.kernel_size[1] // 2].clone()
                module.weight.mul_(0.1)
                module.weight[..., middle, module.kernel_size[1] // 2] = kept
        # Attention that learns a bias for each distance, as LeViT's: between random keys and queries it is a mean.
        biases, numbers = getattr(module, "attention_biases", None), getattr(module, "attention_bias_idxs", None)
        if isinstance(biases, Tensor) and isinstance(numbers, Tensor):
            with torch.no_grad():
                biases[:, int(numbers[0, 0])] += 10  # the distance of a position from itself
    network.train().eval()  # training empties what such modules keep of their biases


def settle(network: nn.Module, size: int) -> None:
    """Give batch normalisations the statistics of made images, so that no layer drowns what a patch changes."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean
        norm.train()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _ in range(2):
            coarse = torch.randn(8, 3, 8, 8, generator=generator)
            fine = 0.1 * torch.randn(8, 3, size, size, generator=generator)
            network(nn.functional.interpolate(coarse, size=(size, size), mode="bilinear") + fine)
    network.eval()


def order(network: nn.Module, size: int, maps: Sequence[tuple[str, tuple[int, int]]]) -> str:
    """Return "yes" where every map has the order of the image's positions; the network's weights are changed.

    Args:
        network: its weights are random.
        size: side of its images.
        maps: path and grid of each.
    """
    left = [(path, grid) for path, grid in maps if math.prod(grid) > 1]
    for sharpen in (None, centre, partial(settle, size=size)):
        if left:
            if sharpen is not None:
                sharpen(network)
            said = {(path, grid): moves(network, path, size, grid) for path, grid in left}
            left = [place for place in left if said[place] != "yes"]
    return "; ".join(said[place] for place in left) or "yes"


def join(said: Iterable[str]) -> str:
    """Return "yes" where all are, else what is wrong."""
    return "; ".join(text for text in said if text != "yes") or "yes"


def check(name: str, size: int) -> dict[str, Any]:
    """Return the row of one network."""
    network = build(name)
    row: dict[str, Any] = {"name": name, "size": size}
    try:
        taps = find_taps(network, size)
    except Exception as error:
        return {**row, "refused": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    row["taps"] = [vars(tap) for tap in taps]
    row["stays"] = join(stays(network, tap.path, images) for tap in taps)
    row["moves"] = order(network, size, [(tap.path, tap.size) for tap in taps])
    return row


def apart(name: str, size: int) -> dict[str, Any]:
    """Return the row of one network, checked in a process of its own."""
    context = multiprocessing.get_context("fork")  # what is imported stays imported
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=lambda: writer.send(check(name, size)), daemon=True)
    process.start()
    writer.close()
    failed = {"name": name, "size": size}
    try:
        found: dict[str, Any] = reader.recv() if reader.poll(SECONDS) else {**failed, "refused": f"over {SECONDS} s"}
    except EOFError:
        found = {**failed, "refused": "the check itself failed"}
    process.terminate()
    process.join()
    return found


def line(row: dict[str, Any]) -> str:
    """Return a row of the table."""
    if "refused" in row:
        return f"| `{row['name']}` | {row['size']} | refused: {row['refused'].replace('|', '/')} | | | | | |"
    taps = row["taps"]
    kinds = ["" if tap["kind"] == "map" else "t" for tap in taps]
    sizes = " ".join(f"{tap['size'][0]}{kind}" for tap, kind in zip(taps, kinds, strict=True))
    margins = "".join({"norm": "n", "measured": "m", "none": "-"}[tap["margin"]] for tap in taps)
    norms = f"{sum(tap['norm'] is not None for tap in taps)} of {len(taps)}"
    channels = " ".join(str(tap["channels"]) for tap in taps)
    paths = " ".join(f"`{tap['path']}`" for tap in taps)
    checks = f"{row['stays']} / {row['moves']}"
    return f"| `{row['name']}` | {row['size']} | {paths} | {sizes} | {channels} | {margins} | {norms} | {checks} |"


def write(rows: list[dict[str, Any]], output: Path) -> None:
    """Write the table; networks without a row keep the line that the page has of them."""
    before, mark, pairs = output.read_text().partition(PAIRS) if output.exists() else ("", "", "")
    lines = {text.split("`")[1]: text for text in before.splitlines() if text.startswith("| `")}
    lines |= {row["name"]: line(row) for row in rows}
    known = [lines[name] for name, _ in names() if name in lines]
    refused = sum("| refused: " in text for text in known)
    good = sum(text.endswith("| yes / yes |") for text in known)
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}"
    said = (
        f"{len(known)} networks: taps found in {len(known) - refused}, all checks passed in {good}, {refused} refused; "
        f"{versions}."
    )
    head = "| network | pixels | taps | sides (t: tokens) | channels | margins | folded norms | in place / moves |"
    table = [head, "|---|---|---|---|---|---|---|---|", *known]
    output.write_text("\n".join([HEAD, said, "", *table, ""]) + (f"\n{mark}{pairs}" if mark else ""))


def main() -> int:
    """Check what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rows", type=Path, default=Path("runs/networks.jsonl"), help="one JSON object per network")
    parser.add_argument("--only", nargs="*", help="check these again, and no others")
    args = parser.parse_args()
    sizes = dict(names())
    args.rows.parent.mkdir(parents=True, exist_ok=True)
    lines = args.rows.read_text().splitlines() if args.rows.exists() else []
    rows = {row["name"]: row for row in map(json.loads, lines)}
    for name in args.only or [name for name in sizes if name not in rows]:
        rows[name] = apart(name, sizes[name])
        args.rows.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
    write([rows[name] for name in sizes if name in rows], args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
