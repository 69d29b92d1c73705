"""Pairs of taps, by resolution and by depth, on tables written by hand and on a few networks."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from torch import nn

import mgd
from mgd import Batch, ChannelMatching, Outputs, Tap, find_taps, pair_taps, probe
from tests.mgd.nets import Seen


def taps(name: str, *sizes: int, depths: tuple[float, ...] = ()) -> list[Tap]:
    depths = depths or tuple((n + 1) / len(sizes) for n in range(len(sizes)))
    return [
        Tap(f"{name}{n}", 8, (size, size), "map", None, None, "none", depth)
        for n, (size, depth) in enumerate(zip(sizes, depths, strict=True))
    ]


def pairs(
    student: list[Tap], teacher: list[Tap], size: int = 32, teacher_size: int | None = None
) -> list[tuple[str, str]]:
    return [(a.path, b.path) for a, b in pair_taps(student, teacher, size, teacher_size)]


def test_equal_sizes_are_paired_not_equal_positions() -> None:
    assert pairs(taps("s", 16, 8, 4), taps("t", 32, 16, 8)) == [("s0", "t1"), ("s1", "t2")]
    assert pairs(taps("s", 16, 8, 4), taps("t", 8)) == [("s1", "t0")]
    # Rounding of strides: an Inception's 35, 17, 8 against 37, 18, 9.
    assert pairs(taps("s", 35, 17, 8), taps("t", 37, 18, 9)) == [("s0", "t0"), ("s1", "t1"), ("s2", "t2")]


def test_of_several_taps_of_one_size_the_nearest_in_depth_is_taken() -> None:
    teacher = taps("t", 16, 8, 8, 8, depths=(0.2, 0.4, 0.7, 1.0))
    assert pairs(taps("s", 16, 8, depths=(0.3, 0.75)), teacher) == [("s0", "t0"), ("s1", "t2")]
    assert pairs(taps("s", 16, 8, 8, depths=(0.3, 0.45, 0.9)), teacher) == [("s0", "t0"), ("s1", "t1"), ("s2", "t3")]


def test_sizes_are_relative_to_the_images_of_each_network() -> None:
    student, teacher = taps("s", 56, 28, 14, 7), taps("t", 72, 36, 18, 9)
    assert pairs(student, teacher, size=224, teacher_size=288) == [(f"s{n}", f"t{n}") for n in range(4)]
    images, larger = torch.zeros(1, 3, 224, 224), torch.zeros(1, 3, 288, 288)
    assert pair_taps(student, teacher, images, larger) == list(zip(student, teacher, strict=True))


def test_sizes_that_differ_by_a_factor_are_paired_where_none_are_equal() -> None:
    assert pairs(taps("s", 14, 7), taps("t", 20, 10)) == [("s0", "t0"), ("s1", "t1")]
    assert pairs(taps("s", 7), taps("t", 28, 13, 2)) == [("s0", "t1")]


def test_a_network_of_one_resolution_is_paired_by_depth() -> None:
    plain = taps("v", 14, 14, 14, 14)
    assert pairs(plain, taps("t", 56, 28, 14, 7, depths=(0.1, 0.3, 0.8, 1))) == [
        ("v0", "t0"), ("v1", "t1"), ("v2", "t2"), ("v3", "t3")
    ]  # fmt: skip
    assert pairs(taps("s", 112, 14, 7, depths=(0.0, 0.7, 1)), plain) == [("s1", "v2"), ("s2", "v3")]
    assert pairs(plain, taps("w", 16, 16, 16, 16)) == [(f"v{n}", f"w{n}") for n in range(4)]


def test_no_pair_is_refused_with_both_tables() -> None:
    with pytest.raises(ValueError, match=r"no tap of the student(.|\n)*student:\npath .*\ns0 (.|\n)*teacher:\n.*\nt0 "):
        pairs(taps("s", 32, 32), taps("t", 4, 2))
    with pytest.raises(ValueError, match="no tap"):
        pairs([], taps("t", 4))


@pytest.mark.parametrize(
    ("student", "teacher", "size", "expected"),
    [
        (lambda: timm.create_model("mobilenetv3_small_050"), lambda: torchvision.models.resnet18(), 64, 5),
        (lambda: timm.create_model("vit_tiny_patch16_224", depth=4), lambda: torchvision.models.resnet18(), 224, 3),
        (lambda: timm.create_model("repvgg_a0"), lambda: timm.create_model("convnext_atto"), 64, 4),
    ],
)
def test_pairs_of_networks_train(student: object, teacher: object, size: int, expected: int) -> None:
    """Matching on the pairs gives a loss that reaches the student, whatever the sizes of the maps."""
    torch.manual_seed(0)
    networks: list[nn.Module] = [student(), teacher()]  # type: ignore[operator]
    found = pair_taps(networks[0], networks[1], size)
    assert len(found) == expected
    readers = [mgd.Taps(net, [p[side].path for p in found]) for side, net in enumerate(networks)]
    images = torch.randn(2, 3, size, size)
    probes = [probe(reader, images, frozen=side == 1) for side, reader in enumerate(readers)]
    term = ChannelMatching.build(probes[0], probes[1:], 2)
    outputs: list[Outputs] = [probes[0].outputs, probes[1].outputs]
    term.update(0, Seen([(outputs[0], outputs[1:])]))
    now = readers[0](images)
    loss = term(now, outputs[1:], Batch())
    loss.backward()
    weights = [p.grad for p in networks[0].parameters() if p.grad is not None]
    assert bool(loss > 0) and all(bool(g.isfinite().all()) for g in weights) and any(bool(g.any()) for g in weights)
    assert len(term.notes) == 1 + sum(a.size != b.size for a, b in found)


def test_a_published_family_goes_through_the_same_pairing() -> None:
    model = torchvision.models.resnet18()
    given = mgd.describe_taps(model, ["layer2.1.relu@in#-1", "layer3.1.relu@in#-1"], 64)
    found = pair_taps(given, find_taps(model, 64), 64)
    assert [(a.path, b.path) for a, b in found] == [
        ("layer2.1.relu@in#-1", "layer2.1.relu@in#1"),
        ("layer3.1.relu@in#-1", "layer3.1.relu@in#1"),
    ]
