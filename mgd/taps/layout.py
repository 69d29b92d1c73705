"""Where the channels of a tapped tensor are: what its path says, and what images of other sizes show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

REORDERS = ("unroll", "reroll", "mask_unit_size")  # by which a network says that its tokens are in no raster order


@dataclass(frozen=True)
class Layout:
    """What a path says of a tensor.

    Args:
        kind: "first" (B, C, H, W), "last" (B, H, W, C), "tokens" (B, N, C), or None where it says nothing.
        prefix: tokens in front of those of the image.
        grid: rows and columns of tokens, or None for a square.
    """

    kind: str | None = None
    prefix: int = 0
    grid: tuple[int, int] | None = None


def parse_layout(text: str | None) -> Layout:
    """Return what the end of a path says: "@first", "@last" or "@tokens:prefix=5:grid=14x28"."""
    if not text:
        return Layout()
    kind, *options = text.removeprefix("@").split(":")
    given = dict(option.split("=") for option in options)
    grid = [int(side) for side in given["grid"].split("x")] if "grid" in given else None
    return Layout(kind, int(given.get("prefix", 0)), (grid[0], grid[1]) if grid else None)


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
    """Name the layout of a tensor whose shape went from `before` to `after` as the image grew: channels do not grow."""
    if len(before) != len(after):
        return None
    changed = {axis for axis in range(1, len(before)) if before[axis] != after[axis]}
    if not changed:
        return None
    if len(before) == 3:
        return {frozenset({1}): "tokens", frozenset({2}): "channels first"}.get(frozenset(changed))
    if changed <= {2, 3} and 3 in changed:
        return "first"
    return "last" if changed <= {1, 2} else None


def check_said(path: str, layout: Layout, shape: Sequence[int]) -> None:
    """Refuse a tensor that is not what its path says, or of which it must say more.

    Raises:
        ValueError: tokens that the path does not call so; a layout of another number of dimensions.
    """
    given, name = tuple(shape), path.split("@tokens")[0].removesuffix("@last").removesuffix("@first")
    if len(shape) == 3 and layout.kind is None:
        raise ValueError(
            f"tap {path!r} reads three dimensions, {given}, whose layout no shape tells: write {name}@tokens where "
            f"they are (B, N, C) with the image's tokens row by row ({name}@tokens:prefix=1:grid=14x14 where one token "
            "stands in front of 14 rows and 14 columns), and tap another module where they are not"
        )
    if layout.kind is not None and len(shape) != (3 if layout.kind == "tokens" else 4):
        wanted = {"first": "(B, C, H, W)", "last": "(B, H, W, C)", "tokens": "(B, N, C)"}[layout.kind]
        raise ValueError(f"tap {path!r} reads {given}, which cannot be {wanted}: leave out @{layout.kind}")


def check_found(path: str, layout: Layout, shape: Sequence[int], found: str | None) -> None:
    """Refuse a tensor that was found to have another layout than its path says.

    Args:
        path: of the tap.
        layout: what it says; nothing means (B, C, H, W).
        shape: of the tensor.
        found: "first", "last", "tokens", "channels first" (before the tokens), or None where nothing tells.

    Raises:
        ValueError: with what to write.
    """
    given, said = tuple(shape), layout.kind
    if found is None and said is None:
        raise ValueError(
            f"tap {path!r} reads {given}, and nothing tells where its channels are: write {path}@first where it is "
            f"(B, C, H, W), {path}@last where it is (B, H, W, C), and tap another module where it is neither"
        )
    if found == "last" and said is None:
        raise ValueError(f"tap {path!r} gives a map {given} with its channels last: write {path}@last")
    if found is None or found == (said or "first"):
        return
    if said == "tokens":
        raise ValueError(
            f"tap {path!r} reads {given}, whose second dimension are channels, as it does not grow with the image: "
            "tap a module that gives tokens (B, N, C)"
        )
    raise ValueError(
        f"tap {path!r} reads {given} with its channels {found}, as the other dimensions are those of the image: "
        f"leave out @{said}{' and write @last' if found == 'last' else ''}"
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
        f"expected a map (B, C, H, W); got the shape {tuple(x.shape)}: tokens (B, N, C) become one where the tap's "
        "path ends in @tokens, or by mgd.tokens_to_map; tap another module where it is neither"
    )
