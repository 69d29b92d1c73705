"""The layout of a tapped tensor: as its path states it, and as images of other sizes show it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

# Names of parameters that are tokens before those of the image.
PREFIXES = ("cls_token", "class_token", "dist_token", "distillation_token", "reg_token", "register_tokens",
            "storage_tokens", "class_embedding")  # fmt: skip
REORDERS = ("unroll", "reroll", "mask_unit_size")  # attributes of networks whose tokens are not in raster order


@dataclass(frozen=True)
class Layout:
    """The layout of a tensor as its path states it.

    Args:
        kind: "first" (B, C, H, W), "last" (B, H, W, C), "tokens" (B, N, C), or None if it is not stated.
        prefix: number of tokens before those of the image, or None if it is not stated: see `settle_prefix`.
        grid: rows and columns of tokens, or None for a square.
    """

    kind: str | None = None
    prefix: int | None = None
    grid: tuple[int, int] | None = None


def parse_layout(text: str | None) -> Layout:
    """Parse the end of a path: "@first", "@last" or "@tokens:prefix=5:grid=14x28"."""
    if not text:
        return Layout()
    kind, *options = text.removeprefix("@").split(":")
    values = dict(option.split("=") for option in options)
    grid = [int(side) for side in values["grid"].split("x")] if "grid" in values else None
    prefix = int(values["prefix"]) if "prefix" in values else None
    return Layout(kind, prefix, (grid[0], grid[1]) if grid else None)


def stated_prefix(model: nn.Module) -> int:
    """Return how many tokens a network puts before those of the image.

    timm's transformers state it (`num_prefix_tokens`). For others, such as those of torchvision and transformers, the
    parameters named like class, distillation and register tokens are counted.
    """
    for module in model.modules():
        stated = getattr(module, "num_prefix_tokens", None)
        if isinstance(stated, int):
            return stated
    count = 0
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] in PREFIXES:
            count += parameter.shape[-2] if parameter.ndim == 3 else 1
    return count


def settle_prefix(layout: Layout, num_tokens: int, stated: int) -> Layout:
    """Return a layout with the number of tokens before those of the image: as stated by the path, 0 or `stated`.

    Not every module of a network with a class token returns it. The number is the one that leaves a complete grid.

    Args:
        layout: of tokens.
        num_tokens: N.
        stated: the result of `stated_prefix`.

    Raises:
        ValueError: neither 0 nor `stated` leaves a grid, or both do.
    """
    if layout.prefix is not None:
        return layout

    def fits(prefix: int) -> bool:
        count = num_tokens - prefix
        return count > 0 and count == (math.prod(layout.grid) if layout.grid else math.isqrt(count) ** 2)

    fitting = [prefix for prefix in sorted({0, stated}) if fits(prefix)]
    if len(fitting) != 1 and stated:
        how = "neither" if not fitting else "both"
        numbers = f"0 or, as the network says, {stated} in front leave {how} a grid"
        raise ValueError(f"of {num_tokens} tokens, {numbers}: say how many stand in front of the image's own (prefix)")
    return replace(layout, prefix=fitting[0] if fitting else 0)


def tokens_to_map(tokens: Tensor, *, prefix: int = 0, grid: tuple[int, int] | None = None) -> Tensor:
    """Turn tokens in raster order into a map: map[b, :, r, c] = tokens[b, prefix + r * columns + c].

    Args:
        tokens: (B, N, C).
        prefix: number of tokens before those of the image, such as a class token; they are dropped.
        grid: rows H and columns W of the image's tokens; None if H = W.

    Returns:
        (B, C, H, W), a view if possible.

    Raises:
        ValueError: the number of dimensions is wrong, or N is not prefix + H * W; or without `grid`, N - prefix is not
            a square.
    """
    if tokens.ndim != 3:
        raise ValueError(f"expected tokens (B, N, C); got the shape {tuple(tokens.shape)}")
    if grid is not None and not (isinstance(grid, tuple | list) and len(grid) == 2):
        raise ValueError(f"grid must be rows and columns, as (14, 28); got {grid!r}")
    batch, num_tokens, channels = tokens.shape
    side = math.isqrt(max(num_tokens - prefix, 0))
    rows, columns = grid or (side, side)
    if prefix < 0 or rows < 1 or columns < 1 or prefix + rows * columns != num_tokens:
        if grid is not None:
            raise ValueError(f"{num_tokens} tokens are not {prefix} and a grid of {rows} x {columns}")
        raise ValueError(
            f"{num_tokens} tokens are not {prefix} and a square: say how many stand in front of the image's own "
            "(prefix), and how many rows and columns those have (grid)"
        )
    return tokens[:, prefix:].transpose(1, 2).reshape(batch, channels, rows, columns)


def reorders_tokens(model: nn.Module) -> bool:
    """Return whether a network has attributes of those with tokens in another order than raster order, as Hiera."""
    return any(hasattr(module, name) for module in model.modules() for name in REORDERS)


def readings(shape: Sequence[int], image: Sequence[int], slack: bool = True) -> list[str]:
    """Return the layouts, "first" or "last", in which a tensor has the proportions of the images.

    Args:
        shape: of the tensor, four dimensions.
        image: of the images, (B, 3, height, width).
        slack: whether H and W may differ by the rounding of a stride.
    """
    height, width = image[2:]
    allowed = max(height, width) if slack else 0
    sides = {"first": (shape[2], shape[3]), "last": (shape[1], shape[2])}
    return [kind for kind, (h, w) in sides.items() if abs(h * width - w * height) <= allowed]


def moved(before: Sequence[int], after: Sequence[int]) -> str | None:
    """Return the layout of a tensor by its shapes on two images: the channels do not grow.

    Args:
        before: its shape.
        after: its shape for one image that is twice as wide, or twice as wide and high.

    Returns:
        "first", "last" or "tokens" as in `Layout`; "channels first" for three dimensions (B, C, N); "batch" if the
        first dimension is not the batch; "windows" if apparent rows grow with the width; None if it is not clear.
    """
    if len(before) != len(after):
        return None
    if after[0] != 1:
        return "batch"
    changed = {axis for axis in range(1, len(before)) if before[axis] != after[axis]}
    if not changed:
        return None
    if len(before) == 3:
        return {frozenset({1}): "tokens", frozenset({2}): "channels first"}.get(frozenset(changed))
    if changed <= {2, 3} and 3 in changed:
        return "first"
    if changed == {1}:
        return "windows"
    return "last" if changed <= {1, 2} else None


def turned(before: Sequence[int], shapes: Sequence[Sequence[int]]) -> str | None:
    """Return the layout of a map of a network that resizes its images itself, such as a detector.

    Args:
        before: shape of the map, four dimensions.
        shapes: its shapes for one image that is wider, and for one that is higher.

    Returns:
        "first" or "last", by the two dimensions that change; None if others do.
    """
    same = [after for after in shapes if len(after) == len(before) == 4]
    changed = {axis for after in same for axis in (1, 2, 3) if before[axis] != after[axis]}
    return {frozenset({2, 3}): "first", frozenset({1, 2}): "last"}.get(frozenset(changed))


def check_stated(path: str, layout: Layout, shape: Sequence[int]) -> None:
    """Check the number of a tensor's dimensions against the layout that its path states.

    Raises:
        ValueError: it has three dimensions, and the path does not state tokens; or the numbers of dimensions differ.
    """
    size, name = tuple(shape), path.split("@tokens")[0].removesuffix("@last").removesuffix("@first")
    if len(shape) == 3 and layout.kind is None:
        raise ValueError(
            f"tap {path!r} reads three dimensions, {size}, and a shape does not tell their layout: write "
            f"{name}@tokens if they are (B, N, C) with the image's tokens row by row "
            f"({name}@tokens:prefix=1:grid=14x14 for one token in front of 14 rows and 14 columns), or else tap "
            "another module"
        )
    if layout.kind is not None and len(shape) != (3 if layout.kind == "tokens" else 4):
        wanted = {"first": "(B, C, H, W)", "last": "(B, H, W, C)", "tokens": "(B, N, C)"}[layout.kind]
        raise ValueError(f"tap {path!r} reads {size}, which cannot be {wanted}: leave out @{layout.kind}")


def check_found(path: str, layout: Layout, shape: Sequence[int], found: str | None) -> None:
    """Compare the layout that a path states with the one that was found.

    Args:
        path: of the tap.
        layout: the stated one; none means (B, C, H, W).
        shape: of the tensor.
        found: the result of `moved`.

    Raises:
        ValueError: they differ, or neither is clear; the message says what to write.
    """
    size, stated = tuple(shape), layout.kind
    if found == "batch":
        raise ValueError(f"tap {path!r} reads {size}: its first dimension is not the batch, so tap another module")
    if found == "windows":
        raise ValueError(
            f"tap {path!r} reads {size}, which are windows of the map, not its rows and columns: tap the module that "
            "puts them together again"
        )
    if found is None and stated is None:
        raise ValueError(
            f"tap {path!r} reads {size}, and a shape does not tell where its channels are: write {path}@first if it "
            f"is (B, C, H, W), {path}@last if it is (B, H, W, C), or else tap another module"
        )
    if found == "last" and stated is None:
        raise ValueError(f"tap {path!r} gives a map {size} with its channels last: write {path}@last")
    if found is None or found == (stated or "first"):
        return
    if stated == "tokens":
        raise ValueError(
            f"tap {path!r} reads {size}, whose second dimension is channels, because it does not grow with the "
            "image: tap a module that gives tokens (B, N, C)"
        )
    raise ValueError(
        f"tap {path!r} reads {size} with its channels {found}, because the other dimensions are those of the image: "
        f"leave out @{stated}{' and write @last' if found == 'last' else ''}"
    )


def as_map(x: Tensor) -> Tensor:
    """Return a tapped map unchanged; refuse tensors of other dimensions, because no layout is guessed.

    Args:
        x: (B, C, H, W).

    Raises:
        ValueError: the number of dimensions is not four.
    """
    if x.ndim == 4:
        return x
    raise ValueError(
        f"expected a map (B, C, H, W); got the shape {tuple(x.shape)}: for tokens (B, N, C), end the tap's path with "
        "@tokens, or use mgd.tokens_to_map; for anything else, tap another module"
    )
