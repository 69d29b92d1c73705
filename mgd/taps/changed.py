"""Run a network with a changed map at a tap, or with larger images, to learn about that map."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mgd.taps.kept import evaluated
from mgd.taps.layout import Layout, moved, settle_prefix, tokens_to_map
from mgd.taps.taps import Taps, first_tensor, logits_of


@torch.no_grad()
def run_changed(model: nn.Module, path: str, images: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the logits of a network in eval mode whose map at a tap is replaced by `change(map)`.

    Args:
        model: the network; it is not changed.
        path: of the tap.
        images: (B, 3, H, W).
        change: (B, C, H, W) -> (B, C, H, W); tokens before those of the image do not change.

    Raises:
        RuntimeError: the tap was not reached.
    """
    taps = Taps(model, [path])
    point, calls, done = taps.points[0], 0, False
    wanted = _call(taps, images)

    def replaced(tensor: Tensor) -> Tensor:
        nonlocal calls, done
        calls += 1
        if calls - 1 != wanted:
            return tensor
        done = True
        layout = point.layout
        if layout.kind == "tokens":
            layout = settle_prefix(layout, tensor.shape[1], taps.stated_prefix)
        return _replace(tensor, layout, change)

    def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        read_tensor = first_tensor(module, args, kwargs)
        new = replaced(read_tensor)
        return (
            tuple(new if value is read_tensor else value for value in args),
            {name: new if value is read_tensor else value for name, value in kwargs.items()},
        )

    def write(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if point.element is None:
            return replaced(output)
        if isinstance(output, Mapping):
            return type(output)({k: replaced(v) if str(k) == point.element else v for k, v in output.items()})  # type: ignore[call-arg]
        values = [replaced(value) if str(i) == point.element else value for i, value in enumerate(output)]
        return (
            output._replace(**dict(zip(output._fields, values, strict=True)))
            if hasattr(output, "_fields")
            else type(output)(values)
        )

    if point.reads_input:
        handle = point.module.register_forward_pre_hook(read, with_kwargs=True)
    else:
        handle = point.module.register_forward_hook(write)
    try:
        with evaluated(model):
            logits = logits_of(model(images))
    finally:
        handle.remove()
        taps.close()
    if not done:
        raise RuntimeError(f"tap {path!r} was not reached by the forward pass")
    return logits


def matters(model: nn.Module, path: str, images: Tensor) -> bool:
    """Return whether the logits change if the map at a tap is exchanged with that of another image."""
    same = run_changed(model, path, images, torch.clone)
    if torch.equal(same, same.flip(0)):
        return True  # unknown, for example if the last layer is initialised with 0
    return not torch.equal(run_changed(model, path, images, lambda maps: maps.flip(0)), same)


def grown_layout(model: nn.Module, path: str, images: Tensor, shape: Sequence[int], call: int) -> str | None:
    """Return the layout of a tensor by its shape on larger images, as `moved` does; None if that is not clear.

    Args:
        model: the network; it is not changed.
        path: of the tensor.
        images: (B, 3, H, W).
        shape: of the tensor for these images.
        call: number of the module's call.
    """
    taps = Taps(model, [path])
    try:
        grown = taps._grown_shapes(images)
    finally:
        taps.close()
    after = [shapes[0][call] for shapes in grown if len(shapes[0]) > call]
    return next((kind for larger in after if (kind := moved(shape, larger))), None)


def _call(taps: Taps, images: Tensor) -> int:
    """Return the number of the call that a tap reads."""
    stated = taps.points[0].call
    if stated is None or stated >= 0:
        return stated or 0
    with torch.no_grad():
        _, slots = taps._run(images[:1])
    return len(slots[0].calls) + stated


def _replace(tensor: Tensor, layout: Layout, change: Callable[[Tensor], Tensor]) -> Tensor:
    if layout.kind == "last":
        return change(tensor.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous()
    if layout.kind != "tokens":
        return change(tensor)
    prefix = layout.prefix or 0
    new = change(tokens_to_map(tensor, prefix=prefix, grid=layout.grid))
    return torch.cat([tensor[:, :prefix], new.flatten(2).transpose(1, 2)], 1)
