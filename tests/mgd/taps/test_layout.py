"""Layouts of tapped tensors: said by the path, or found where an image of another size shows them; never guessed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import mgd
from mgd.taps.layout import Layout, as_map, moved, readings, settle_prefix, stated_prefix


class Layer(nn.Module):
    """One convolution of stride 2, its map laid out by `turn` for a module `seen`, and logits."""

    def __init__(self, turn: Callable[[Tensor], Tensor], channels: int = 5, size: int | None = None) -> None:
        super().__init__()
        self.conv, self.seen, self.fc = nn.Conv2d(3, channels, 2, 2), nn.Identity(), nn.Linear(channels, 4)
        self.turn, self.size = turn, size

    def forward(self, x: Tensor) -> Tensor:
        if self.size is not None and x.shape[3] != self.size:
            raise AssertionError("another size")
        y = self.conv(x)
        self.seen(self.turn(y))
        out: Tensor = self.fc(y.mean((2, 3)))
        return out


def tokens(y: Tensor) -> Tensor:
    return y.flatten(2).transpose(1, 2)


def last(y: Tensor) -> Tensor:
    return y.permute(0, 2, 3, 1)


def with_prefix(y: Tensor) -> Tensor:
    front = torch.full((len(y), 3, y.shape[1]), 7.0)
    return torch.cat([front, tokens(y)], dim=1)


def windows(y: Tensor) -> Tensor:
    """(B, 4, 4, C): four windows of 2 x 2 pixels, which look like a map of 4 x 4."""
    rows, columns = y.shape[2] // 2, y.shape[3] // 2
    cut = y.unflatten(3, (columns, 2)).unflatten(2, (rows, 2))  # B, C, rows, 2, columns, 2
    turned: Tensor = cut.permute(0, 2, 4, 3, 5, 1)
    return turned.flatten(3, 4).flatten(1, 2)


def test_tokens_become_a_map_row_by_row() -> None:
    given = torch.arange(2 * 7 * 3).reshape(2, 7, 3)
    found = mgd.tokens_to_map(given, prefix=1, grid=(2, 3))
    assert found.shape == (2, 3, 2, 3)
    for row in range(2):
        for column in range(3):
            assert torch.equal(found[:, :, row, column], given[:, 1 + 3 * row + column])
    assert torch.equal(mgd.tokens_to_map(given[:, :4]), mgd.tokens_to_map(given[:, :4], grid=(2, 2)))


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((2, 7, 3), {}, "7 tokens are not 0 and a square"),
        ((2, 10, 3), {}, "10 tokens are not 0 and a square"),  # a class token is not guessed
        ((2, 9, 3), {"prefix": 1}, "9 tokens are not 1 and a square"),
        ((2, 1, 3), {"prefix": 1}, "1 tokens are not 1 and a square"),
        ((2, 8, 3), {"prefix": -1}, "not -1 and a square"),
        ((2, 9, 3), {"grid": (2, 4)}, "9 tokens are not 0 and a grid of 2 x 4"),
        ((2, 4, 3), {"grid": (-2, -2)}, "grid of -2 x -2"),
        ((2, 4, 3, 3), {}, r"expected tokens \(B, N, C\); got the shape \(2, 4, 3, 3\)"),
        ((4, 3), {}, "expected tokens"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(shape: tuple[int, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mgd.tokens_to_map(torch.zeros(shape), **options)


@pytest.mark.parametrize(
    ("turn", "said", "size"),
    [
        (nn.Identity(), "", (8, 8)),
        (nn.Identity(), "@first", (8, 8)),
        (nn.Identity(), "", (6, 10)),
        (last, "@last", (8, 8)),
        (last, "@last", (6, 10)),
        (tokens, "@tokens", (8, 8)),
        (tokens, "@tokens:grid=3x5", (6, 10)),
        (with_prefix, "@tokens:prefix=3", (8, 8)),
        (with_prefix, "@tokens:prefix=3:grid=3x5", (6, 10)),
        (with_prefix, "@tokens:grid=3x5:prefix=3", (6, 10)),
    ],
)
@pytest.mark.parametrize("channels", [4, 5])  # 4 x 4 pixels or tokens of 4 channels: no shape tells
@pytest.mark.parametrize("side", ["", "@in"])
def test_a_map_is_that_of_the_convolution(
    turn: Callable[[Tensor], Tensor], said: str, size: tuple[int, int], channels: int, side: str
) -> None:
    net = Layer(turn, channels)
    images = torch.randn(2, 3, *size)
    (found,) = mgd.Taps(net, [f"seen{side}{said}"])(images).features
    torch.testing.assert_close(found, net.conv(images))


@pytest.mark.parametrize(
    ("turn", "said", "size", "message"),
    [
        (last, "", (8, 8), "with its channels last: write seen@last"),
        (last, "", (6, 10), "with its channels last: write seen@last"),
        (last, "@first", (8, 8), "leave out @first and write @last"),
        (nn.Identity(), "@last", (8, 8), "channels first.*leave out @last"),
        (nn.Identity(), "@tokens", (8, 8), r"cannot be \(B, N, C\): leave out @tokens"),
        (tokens, "", (8, 8), "write seen@tokens"),
        (tokens, "@last", (8, 8), r"cannot be \(B, H, W, C\)"),
        (lambda y: y.flatten(2), "", (8, 8), "write seen@tokens"),
        (lambda y: y.flatten(2), "@tokens", (8, 8), "does not grow with the image"),
        (with_prefix, "@tokens", (8, 8), r"'seen@tokens': 19 tokens are not 0 and a square.*prefix"),
        (windows, "@last", (8, 8), r"windows of the map.*tap the module that puts them together again"),
        (windows, "", (8, 8), "windows of the map"),
        (tokens, "@tokens", (4, 16), "4 x 16, so the tokens are probably not 4 x 4"),
        (lambda y: tokens(y).transpose(0, 1), "@tokens", (8, 8), r"\(16, 2, .\) from a batch of 2"),
        (lambda y: tokens(y).transpose(0, 1), "", (8, 8), "write seen@tokens"),
        (lambda y: y.transpose(0, 1), "", (8, 8), "its first dimension is not the batch"),
    ],
)
@pytest.mark.parametrize("channels", [4, 5])
def test_another_layout_than_said_is_refused(
    turn: Callable[[Tensor], Tensor], said: str, size: tuple[int, int], message: str, channels: int
) -> None:
    images = torch.randn(2, 3, *size)
    for run in (lambda taps: taps(images), lambda taps: mgd.dry_forward(taps, images)):
        with pytest.raises(ValueError, match=message):
            run(mgd.Taps(Layer(turn, channels), [f"seen{said}"]))


def test_where_nothing_tells_the_layout_is_asked_for() -> None:
    images = torch.randn(2, 3, 8, 8)
    for turn in (nn.Identity(), last):
        with pytest.raises(
            ValueError, match=r"a shape does not tell where its channels are: write seen@first .* seen@last"
        ):
            mgd.Taps(Layer(turn, 4, size=8), ["seen"])(images)
    net = Layer(nn.Identity(), 4, size=8)
    (first,) = mgd.Taps(net, ["seen@first"])(images).features
    (other,) = mgd.Taps(net, ["seen@last"])(images).features
    assert torch.equal(other, first.permute(0, 3, 1, 2))
    with pytest.raises(ValueError, match="write seen@last"):  # the shape tells, though the network takes one size only
        mgd.Taps(Layer(last, 5, size=8), ["seen"])(images)
    halves = Layer(lambda y: y.reshape(len(y), 2, -1, y.shape[1]), 5, size=8)
    with pytest.raises(ValueError, match=r"\(2, 2, 8, 5\), and a shape does not tell"):
        mgd.Taps(halves, ["seen"])(images)


def test_looking_at_a_layout_leaves_the_network_as_it_was() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 2, 2), nn.Identity(), nn.Flatten(), nn.Linear(64, 2))
    net[2].eval()
    taps, images = mgd.Taps(net, ["2"]), torch.randn(2, 3, 8, 8)
    state = torch.get_rng_state()
    taps(images)
    assert net.training and net[1].training and not net[2].training and not taps._open
    assert int(net[0].get_buffer("num_batches_tracked")) == 1  # of the forward itself
    assert torch.equal(torch.get_rng_state(), state)
    sizes: list[int] = []
    net[0].register_forward_hook(lambda m, args, out: sizes.append(out.shape[3]))
    taps(images)
    assert sizes == [8]  # the layout is looked at once


def test_a_call_of_several_is_looked_at_by_its_number() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.seen, self.fc = nn.Conv2d(3, 4, 2, 2), nn.Identity(), nn.Linear(64, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(self.seen(x))
            self.seen(last(y))
            out: Tensor = self.fc(self.seen(y.flatten(1)))  # raises at another size, before the last call
            return out

    images = torch.randn(1, 3, 8, 8)
    for path in ("seen@in#1", "seen@in#-2"):
        with pytest.raises(ValueError, match="with its channels last"):
            mgd.Taps(Shared(), [path])(images)


@pytest.mark.parametrize("name", ["unroll", "reroll", "mask_unit_size"])
def test_tokens_in_no_raster_order_are_refused(name: str) -> None:
    net = Layer(tokens)
    setattr(net.seen, name, nn.Identity())
    with pytest.raises(ValueError, match="not in the order of rows and columns"):
        mgd.Taps(net, ["seen@tokens"])
    with pytest.raises(ValueError, match="not in the order of rows and columns"):
        mgd.Taps(net, ["seen"])(torch.randn(2, 3, 8, 8))
    assert mgd.Taps(net, ["conv"])(torch.randn(2, 3, 8, 8)).features[0].shape == (2, 5, 4, 4)


@pytest.mark.parametrize("said", ["@token", "@tokens:", "@tokens:prefix", "@tokens:grid=3", "@tokens:prefix=-1"])
def test_a_malformed_layout_is_refused(said: str) -> None:
    with pytest.raises(ValueError, match="not of the form"):
        mgd.Taps(Layer(tokens), [f"seen{said}"])


def test_growing_shows_the_layout() -> None:
    for before, after, expected in (
        ((2, 8, 8, 8), (1, 8, 8, 16), "first"),
        ((2, 8, 8, 8), (1, 8, 16, 16), "first"),
        ((2, 8, 8, 8), (1, 8, 16, 8), "last"),
        ((2, 8, 8, 8), (1, 16, 16, 8), "last"),
        ((2, 8, 8, 8), (1, 8, 8, 8), None),
        ((2, 8, 8, 8), (1, 16, 8, 16), None),
        ((2, 8, 8), (1, 16, 8), "tokens"),
        ((2, 8, 8), (1, 8, 16), "channels first"),
        ((2, 8, 8), (1, 16, 16), None),
        ((2, 8, 8), (1, 8), None),
        ((2, 8, 8, 5), (1, 16, 8, 5), "windows"),  # twice as wide an image has twice as many, not rows
        ((9, 9, 5), (18, 1, 5), "batch"),  # as many tokens as images, tokens first
    ):
        assert moved(before, after) == expected


def test_shapes_in_the_images_proportion_can_be_read() -> None:
    square, wide = (2, 3, 32, 32), (2, 3, 5, 7)
    for shape, image, expected in (
        ((2, 5, 8, 8), square, ["first"]),
        ((2, 8, 8, 5), square, ["last"]),
        ((2, 8, 8, 8), square, ["first", "last"]),
        ((2, 64, 1, 1), square, ["first"]),
        ((2, 4, 196, 96), square, []),
        ((2, 9, 3, 4), wide, ["first"]),  # stride 2, rounded up
        ((2, 3, 4, 9), wide, ["last"]),
    ):
        assert readings(shape, image) == expected


def test_a_map_is_returned_unchanged() -> None:
    x = torch.zeros(2, 3, 4, 5)
    assert as_map(x) is x


@pytest.mark.parametrize(
    "shape", [(2, 9, 3), (2, 10, 3), (50, 2, 512), (2, 256, 49), (2, 7, 3), (2, 3), (2, 3, 4, 5, 6)]
)
def test_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected a map .* got the shape"):
        as_map(torch.zeros(shape))


class Stating(Layer):
    """A network that says that three tokens stand in front, and gives them."""

    def __init__(self, turn: Callable[[Tensor], Tensor] = with_prefix) -> None:
        super().__init__(turn)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 5))
        self.reg_token = nn.Parameter(torch.zeros(1, 2, 5))


@pytest.mark.parametrize(("said", "size"), [("@tokens", (8, 8)), ("@tokens:grid=3x5", (6, 10))])
def test_the_tokens_in_front_are_those_that_the_network_says(said: str, size: tuple[int, int]) -> None:
    images = torch.randn(2, 3, *size)
    for turn in (with_prefix, tokens):  # a module that gives none of them is read too
        net = Stating(turn)
        (found,) = mgd.Taps(net, [f"seen{said}"])(images).features
        torch.testing.assert_close(found, net.conv(images))


def test_the_number_of_tokens_in_front_is_asked_for_where_the_networks_own_does_not_fit() -> None:
    net = Stating(lambda y: torch.cat([with_prefix(y), tokens(y)[:, :1]], dim=1))
    with pytest.raises(ValueError, match=r"of 20 tokens, 0 or, as the network says, 3 in front leave neither a grid"):
        mgd.Taps(net, ["seen@tokens"])(torch.randn(2, 3, 8, 8))
    assert mgd.Taps(net, ["seen@tokens:prefix=4"])(torch.randn(2, 3, 8, 8)).features[0].shape == (2, 5, 4, 4)
    with pytest.raises(ValueError, match=r"of 4 tokens.*both"):
        settle_prefix(Layout("tokens"), 4, 3)


def test_the_number_of_tokens_in_front_is_read_from_networks_of_two_libraries() -> None:
    small: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 2}
    registers = timm.models.VisionTransformer(**small, reg_tokens=4)
    distilled = timm.create_model("deit_tiny_distilled_patch16_224", **small)
    plain = torchvision.models.VisionTransformer(32, 8, 1, 2, 12, 24)
    assert [stated_prefix(net) for net in (registers, distilled, plain)] == [5, 2, 1]
    for net, path in ((registers, "blocks.0"), (distilled, "blocks.0"), (plain, "encoder.layers")):
        assert mgd.Taps(net, [f"{path}@tokens"])(torch.zeros(2, 3, 32, 32)).features[0].shape == (2, 12, 4, 4)


def test_as_many_tokens_as_images_are_no_batch() -> None:
    net = Layer(lambda y: tokens(y).transpose(0, 1))
    with pytest.raises(ValueError, match="first dimension is not the batch"):
        mgd.Taps(net, ["seen@tokens"])(torch.randn(16, 3, 8, 8))
