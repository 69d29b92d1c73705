"""Distil a small network on a folder of photographs: python examples/distil_your_folder.py photos [--epochs 5]

`photos` has train/CLASS/*.jpg and valid/CLASS/*.jpg; `mgd prepare` makes it from one folder per class. A ResNet-18 is
trained first, as the teacher. Read this file from top to bottom, and change what you like.
"""

import argparse
from pathlib import Path

import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import mgd

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder")
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--size", type=int, default=96)
args = parser.parse_args()
for part in ("train", "valid"):
    if not Path(args.folder, part).is_dir():
        parser.error(f"there is no folder {Path(args.folder, part)}: `mgd prepare` makes it")
torch.manual_seed(0)

# 1. The photographs: cropped and mirrored at random for training, only resized for validation.
crop = [v2.RandomResizedCrop(args.size), v2.RandomHorizontalFlip()]
to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)]
photos = ImageFolder(f"{args.folder}/train", v2.Compose([*crop, *to_tensor]))
others = ImageFolder(f"{args.folder}/valid", v2.Compose([v2.Resize((args.size, args.size)), *to_tensor]))
train, valid = DataLoader(photos, 32, shuffle=True, drop_last=True), DataLoader(others, 32)


@torch.no_grad()
def accuracy(network: nn.Module) -> float:
    network.eval()
    right = torch.cat([network(images).argmax(1) == target for images, target in valid])
    return 100 * float(right.float().mean())


# 2. The teacher. If you have a better one, load it here.
teacher = torchvision.models.resnet18(num_classes=len(photos.classes))
optimizer = torch.optim.SGD(teacher.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
for _ in range(args.epochs):
    for images, target in train:
        optimizer.zero_grad()
        F.cross_entropy(teacher.train()(images), target).backward()
        optimizer.step()
print(f"teacher: {accuracy(teacher):.1f} %")

# 3. The taps, where feature maps are read: before a ReLU, paired by resolution.
student = torchvision.models.shufflenet_v2_x0_5(num_classes=len(photos.classes))
pairs = mgd.pair_taps(student, teacher.eval(), args.size)
tapped, teaching = mgd.Taps(student, [tap.path for tap, _ in pairs]), mgd.Taps(teacher, [tap.path for _, tap in pairs])
for ours, theirs in pairs:
    print(f"{ours.path}, {ours.channels} channels <- {theirs.path}, {theirs.channels}")

# 4. The loss, a sum of terms: labels (ce), matched maps (mgd), predictions (kd).
images, _ = next(iter(train))
probes = mgd.probe(tapped, images, frozen=False), mgd.probe(teaching, images)
matching = mgd.ChannelMatching.build(probes[0], probes[1:], len(photos), mgd.ChannelMatching.Hyper(form="relative"))
terms = {"ce": (mgd.losses.CE(), 1.0), "mgd": (matching, 16.0), "kd": (mgd.losses.KD(temperature=1.5), 1.0)}
distiller = mgd.Distiller(tapped, mgd.freeze(teaching), terms)

# 5. Training. `update` matches channels again before every second epoch.
optimizer = torch.optim.SGD(distiller.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
for epoch in range(args.epochs):
    distiller.update(epoch, train)
    for images, target in train:
        optimizer.zero_grad()
        distiller.train()(images, target, epoch=epoch)["loss"].backward()
        optimizer.step()
    print(f"epoch {epoch + 1}: student {accuracy(student):.1f} %")
torch.save(student.state_dict(), "student.pth")
