"""Where the channels of a tapped tensor are: what its path says, and what images of other sizes show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

# Names of parameters that are tokens in front of those of the image.
PREFIXES = ("cls_token", "class_token", "dist_token", "distillation_token", "reg_token", "register_tokens",
            "storage_tokens", "class_embedding")  # fmt: skip
REORDERS = ("unroll", "reroll", "mask_unit_size")  # by which a network says that its tokens are in no raster order


@dataclass(frozen=True)
class Layout:
    """What a path says of a tensor.

    Args:
        kind: "first" (B, C, H, W), "last" (B, H, W, C), "tokens" (B, N, C), or None where it says nothing.
        prefix: tokens in front of those of the image, or None where the path does not say: see `settle_prefix`.
        grid: rows and columns of tokens, or None for a square.
    """

    kind: str | None = None
    prefix: int | None = None
    grid: tuple[int, int] | None = None


def parse_layout(text: str | None) -> Layout:
    """Return what the end of a path says: "@first", "@last" or "@tokens:prefix=5:grid=14x28"."""
    if not text:
        return Layout()
    kind, *options = text.removeprefix("@").split(":")
    given = dict(option.split("=") for option in options)
    grid = [int(side) for side in given["grid"].split("x")] if "grid" in given else None
    prefix = int(given["prefix"]) if "prefix" in given else None
    return Layout(kind, prefix, (grid[0], grid[1]) if grid else None)


def stated_prefix(model: nn.Module) -> int:
    """Return how many tokens a network says that it puts in front of those of the image.

    timm's transformers say it (`num_prefix_tokens`); of others, as torchvision's and those of transformers, the
    parameters tell by their names: class, distillation and register tokens.
    """
    for module in model.modules():
        stated = getattr(module, "num_prefix_tokens", None)
        if isinstance(stated, int):
            return stated
    found = 0
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] in PREFIXES:
            found += parameter.shape[-2] if parameter.ndim == 3 else 1
    return found


def settle_prefix(layout: Layout, num_tokens: int, stated: int) -> Layout:
    """Return a layout that says how many tokens stand in front: as its path does, or none, or as the network says.

    Not every module of a network with a class token returns it: the number is the one that leaves a grid.

    Args:
        layout: of tokens.
        num_tokens: N.
        stated: as `stated_prefix` gives it.

    Raises:
        ValueError: neither number leaves a grid, or both do.
    """
    if layout.prefix is not None:
        return layout

    def fits(prefix: int) -> bool:
        left = num_tokens - prefix
        return left > 0 and left == (math.prod(layout.grid) if layout.grid else math.isqrt(left) ** 2)

    found = [prefix for prefix in sorted({0, stated}) if fits(prefix)]
    if len(found) != 1 and stated:
        how = "neither" if not found else "both"
        numbers = f"0 or, as the network says, {stated} in front leave {how} a grid"
        raise ValueError(f"of {num_tokens} tokens, {numbers}: say how many stand in front of the image's own (prefix)")
    return replace(layout, prefix=found[0] if found else 0)


def tokens_to_map(tokens: Tensor, *, prefix: int = 0, grid: tuple[int, int] | None = None) -> Tensor:
    """Turn tokens in raster order into a map: map[b, :, r, c] = tokens[b, prefix + r * columns + c].

    Args:
        tokens: (B, N, C).
        prefix: how many tokens stand in front of those of the image, as a class token; they are dropped.
        grid: rows H and columns W of the image's tokens; None where H = W.

    Returns:
        (B, C, H, W), a view where that can be.

    Raises:
        ValueError: another number of dimensions, or of tokens than prefix + H * W; without `grid`, N - prefix is no
            square.
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
    """Whether a network says that it keeps its tokens in another order than that of rows and columns, as Hiera does."""
    return any(hasattr(module, name) for module in model.modules() for name in REORDERS)


def readings(shape: Sequence[int], image: Sequence[int], slack: bool = True) -> list[str]:
    """Say how a tensor of four dimensions can be read: "first" or "last" where H and W are then as the image's.

    Args:
        shape: of the tensor.
        image: the images' (B, 3, height, width).
        slack: whether H and W may be off by the rounding of a stride.
    """
    height, width = image[2:]
    allowed = max(height, width) if slack else 0
    sides = {"first": (shape[2], shape[3]), "last": (shape[1], shape[2])}
    return [kind for kind, (h, w) in sides.items() if abs(h * width - w * height) <= allowed]


def moved(before: Sequence[int], after: Sequence[int]) -> str | None:
    """Name the layout of a tensor, whose channels do not grow, by its shapes on two images.

    Args:
        before: its shape.
        after: that of one image that is twice as wide, or twice as wide and high.

    Returns:
        "first", "last" or "tokens" as in `Layout`; "channels first" of three dimensions; "batch" where the first
        dimension is not the batch; "windows" where rows grow with the width, so that they are none; None where nothing
        tells.
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
    """Name the layout of a map of a network that brings images to a size of its own, as a detector does.

    Args:
        before: shape of the map, four dimensions.
        shapes: those of one image that is wider, and of one that is higher.

    Returns:
        "first" or "last": the two dimensions that change; None where others do.
    """
    same = [after for after in shapes if len(after) == len(before) == 4]
    changed = {axis for after in same for axis in (1, 2, 3) if before[axis] != after[axis]}
    return {frozenset({2, 3}): "first", frozenset({1, 2}): "last"}.get(frozenset(changed))


def check_stated(path: str, layout: Layout, shape: Sequence[int]) -> None:
    """Refuse a tensor that is not what its path says, or of which it must say more.

    Raises:
        ValueError: tokens that the path does not call so; a layout of another number of dimensions.
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
    """Refuse a tensor that was found to have another layout than its path says.

    Args:
        path: of the tap.
        layout: what it says; nothing means (B, C, H, W).
        shape: of the tensor.
        found: as `moved` gives it.

    Raises:
        ValueError: with what to write.
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
    """Return a tapped map unchanged, and refuse what is none: no layout is guessed from a shape.

    Args:
        x: (B, C, H, W).

    Raises:
        ValueError: another number of dimensions.
    """
    if x.ndim == 4:
        return x
    raise ValueError(
        f"expected a map (B, C, H, W); got the shape {tuple(x.shape)}: for tokens (B, N, C), end the tap's path with "
        "@tokens, or use mgd.tokens_to_map; for anything else, tap another module"
    )
