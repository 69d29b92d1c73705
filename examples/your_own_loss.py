"""A loss of your own, on handwritten digits: python examples/your_own_loss.py [--epochs 20]

A term is a class with a frozen dataclass `Hyper` and a method `compare`. The command line can use this file, too:
`mgd distill photos --term-module examples/your_own_loss.py --distiller ranking --term ranking.margin=0.5 ...`
"""

import argparse
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import mgd
from mgd.losses import HyperParameters, LogitTerm


class Ranking(LogitTerm):
    """Mean of max(0, margin - (z_i - z_j)) over the pairs of classes that the teacher has in the order t_i > t_j."""

    @dataclass(frozen=True, kw_only=True)
    class Hyper(HyperParameters):
        standardised: bool = True  # all logit terms: first give logits mean 0 and deviation 1
        margin: float = 1.0

    def compare(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None) -> Tensor:
        above = teacher_logits[:, :, None] > teacher_logits[:, None, :]  # (B, K, K)
        gaps = student_logits[:, :, None] - student_logits[:, None, :]
        return F.relu(self.hyper.margin - gaps)[above].mean()


TERMS = {"ranking": Ranking}  # what --term-module reads


def network(width: int) -> nn.Sequential:
    layers = [nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2 * width, 10))


def train(distiller: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(25):
            optimizer.zero_grad()
            distiller.train()(images[batch], labels[batch])["loss"].backward()
            optimizer.step()
        schedule.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    args = parser.parse_args()
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    few = slice(0, 200)  # the images to train on; the others measure accuracy

    found = {}
    for name, width, terms in (
        ("teacher", 16, {"ce": (mgd.losses.CE(), 1.0)}),
        ("student alone", 4, {"ce": (mgd.losses.CE(), 1.0)}),
        ("student with ranking", 4, {"ce": (mgd.losses.CE(), 1.0), "ranking": (Ranking(), 5.0)}),
    ):
        torch.manual_seed(0)
        found[name] = network(width)
        teachers = [mgd.freeze(found["teacher"])] if "ranking" in terms else []
        epochs = 3 * args.epochs if name == "teacher" else args.epochs
        train(mgd.Distiller(found[name], teachers, terms), images[few], labels[few], epochs)
        right = found[name].eval()(images[200:]).argmax(1) == labels[200:]
        print(f"{name}: {100 * float(right.float().mean()):.1f} %")


if __name__ == "__main__":
    main()
