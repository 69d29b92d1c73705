"""Read the maps of any network at module paths during its forward."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mgd.taps.kept import evaluated
from mgd.taps.layout import (
    Layout,
    check_found,
    check_stated,
    moved,
    readings,
    reorders_tokens,
    settle_prefix,
    stated_prefix,
    tokens_to_map,
    turned,
)
from mgd.taps.paths import element_of, parse_path


@dataclass(frozen=True)
class Outputs:
    """The outputs of a network for a batch.

    Args:
        logits: (B, K), before any softmax; (B, 0) for a tapped network without logits, such as a detector.
        features: one (B, C, H, W) per tap, in the order of the taps.
        result: the result of a network without logits, such as a detector's losses; None if there are logits.
        more: the outputs for further augmented views of the same images, if the batch has some.
    """

    logits: Tensor
    features: list[Tensor] = field(default_factory=list)
    result: Any = None
    more: Sequence[Outputs] = ()


@dataclass(frozen=True)
class Batch:
    """The inputs of a term besides the networks' outputs.

    Args:
        target: (B,) int64 class indices, (B, K) probabilities of mixed images, or None without labels.
        index: (B,) int64 positions of the images in the data set, or None.
        epoch: epoch of training, counted from 0.
        counts: number of images of this batch on every rank, or None if unknown.
    """

    target: Tensor | None = None
    index: Tensor | None = None
    epoch: int = 0
    counts: Sequence[int] | None = None


def logits_of(output: Any) -> Tensor:
    """Return the logits in the result of a network.

    Args:
        output: a tensor; an object with `logits`, such as those of transformers or torchvision's Inception; a mapping
            with "logits" or "out"; or a tuple or list whose first element is (B, K).

    Raises:
        TypeError: the output is anything else.
    """
    if isinstance(output, Tensor):
        return output
    logits: Any = getattr(output, "logits", None)
    if logits is None and isinstance(output, Mapping):
        logits = output.get("logits", output.get("out"))
    elif logits is None and isinstance(output, (tuple, list)) and output:
        logits = output[0] if isinstance(output[0], Tensor) and output[0].ndim == 2 else None
    if isinstance(logits, Tensor):
        return logits
    raise TypeError(
        f"the network returns a {type(output).__name__} in which no logits are found: let its forward return a tensor "
        'of logits (B, K), an object with .logits, a mapping with "logits", or a tuple whose first element they are'
    )


Images = Tensor | Sequence[Tensor]  # (B, 3, H, W), or a list of (3, H, W)
Grown = list[list[list[tuple[int, ...]]]]  # shapes of every call of every tap, on images of two larger sizes


@dataclass
class _Slot:
    """The calls of one tap during one forward: tensors, and their versions when they were read."""

    keeps_graph: bool = False  # whether gradients were on when the forward started
    calls: list[Tensor] = field(default_factory=list)
    originals: list[tuple[Tensor, int] | None] = field(default_factory=list)


def _in_order(module: nn.Module, kwargs: dict[str, Any]) -> list[Any]:
    """Return keyword arguments in the order of the module's forward."""
    if len(kwargs) < 2:
        return list(kwargs.values())
    names = list(inspect.signature(module.forward).parameters)
    return [
        kwargs[name] for name in sorted(kwargs, key=lambda name: names.index(name) if name in names else len(names))
    ]


def first_tensor(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return a module's input: the first tensor among its arguments, in the order of its forward."""
    arguments = [*args, *_in_order(module, kwargs)]
    tensors = [value for value in arguments if isinstance(value, Tensor)]
    return (tensors or arguments or [None])[0]


class _Reader:
    """The hooks of one tap: they pass its tensor to `Taps`, and do nothing in a network that is saved without it."""

    def __init__(self, taps: Taps, number: int) -> None:
        self.taps: Taps | None = taps
        self.number = number

    def __getstate__(self) -> dict[str, Any]:
        return {"taps": None, "number": self.number}  # `Taps.__setstate__` restores it

    def read_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.taps is not None:
            self.taps._record(self.number, first_tensor(module, args, kwargs))

    def read_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.taps is not None:
            self.taps._record(self.number, element_of(self.taps.points[self.number], output))


class Taps(nn.Module):
    """Run a network, and return its logits and the maps at the given paths.

    A path is a module's dotted name, as `named_modules` gives it: "layer4" is the module's output, "layer4.2.relu@in"
    its input, "layer4.2.relu@in#-1" the input of its last call in a forward (a ReLU that a block shares is called
    several times; the first is #0). A module's input is the first tensor among its arguments, in the order of
    its forward.

    Every map is returned as (B, C, H, W). The end of a path states another layout: "@last" is (B, H, W, C), as in a
    Swin transformer; "@tokens" is (B, N, C), row by row; "@tokens:prefix=5:grid=14x28" has 5 tokens before 14 rows of
    28; see `tokens_to_map`. Without "prefix", it is the number that the network states, or 0; see `settle_prefix`. No
    layout is guessed. Three dimensions without "@tokens" are refused, as is a first dimension that is not the batch.
    Four dimensions without a stated layout are (B, C, H, W), if only then H and W have the images' proportion. If that
    is not clear, the first forward also runs the network on one image of another size, in eval mode: the channels are
    the dimension that does not grow. Then the error asks for "@last", or if this is not clear either, for "@first" or
    "@last"; a path that states another layout than the one found is refused. Tokens of a network that keeps them in
    another order (it has `unroll`, `reroll` or `mask_unit_size`, as Hiera) are refused.

    The network computes the same as before; `close` removes the hooks. It can be pickled and copied, with its `Taps` or
    without; the hooks of a copy without `Taps` do nothing.

    In-place operations after a tap would overwrite what was read. Modules whose input is read have `inplace` off until
    `close`. For other operations (`x += y`), the first forward copies every map and checks which originals change;
    later ones copy only those.

    Args:
        model: any network whose forward takes images, and in whose result `logits_of` finds logits.
        paths: one path per tap.

    Raises:
        ValueError: a path is malformed or names no module (the nearest names are listed), or has "@tokens" in a network
            with another order of tokens. In the first forward: a tensor has another layout than its path states.
        TypeError: in a forward: the network returns no logits, or a tap reads no tensor.
    """

    def __init__(self, model: nn.Module, paths: Sequence[str] = ()) -> None:
        super().__init__()
        self.model = model
        if isinstance(paths, str):
            raise ValueError(f"the paths of taps are a list, as [{paths!r}]; got the text {paths!r}")
        self.paths = tuple(paths)
        self.points = [parse_path(model, path) for path in self.paths]
        self._reorders = bool(self.paths) and reorders_tokens(model)
        self.stated_prefix = stated_prefix(model) if any(p.layout.kind == "tokens" for p in self.points) else 0
        for point in self.points:
            if point.layout.kind == "tokens":
                self._refuse_reordered(point.path)
        # In-place operations may differ between training and evaluation.
        self._copy = {mode: [True] * len(self.paths) for mode in (True, False)}
        self._settled: set[int] = set()  # taps whose layout was checked
        # Keyed by device: the replicas of DataParallel share this object, each on its own device.
        self._open: dict[torch.device, list[_Slot]] = {}
        self._in_place: list[nn.Module] = []
        self._handles: list[Any] = []
        self._readers = [_Reader(self, number) for number in range(len(self.paths))]
        modules = {p.module for p in self.points if p.reads_input and getattr(p.module, "inplace", False)}
        self._in_place = list(modules)
        for module in modules:
            module.inplace = False  # type: ignore[assignment]
        for point, reader in zip(self.points, self._readers, strict=True):
            if point.reads_input:
                handle = point.module.register_forward_pre_hook(reader.read_input, with_kwargs=True)
            else:
                handle = point.module.register_forward_hook(reader.read_output)
            self._handles.append(handle)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_open": {}}  # type: ignore[no-untyped-call]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for reader in self._readers:
            reader.taps = self

    def _refuse_reordered(self, path: str) -> None:
        if self._reorders:
            raise ValueError(
                f"tap {path!r} reads tokens that are not in the order of rows and columns, so they cannot become a "
                "map: tap a module that returns a map (find_taps names them), or another network"
            )

    def _record(self, number: int, tensor: Tensor) -> None:
        if not isinstance(tensor, Tensor):
            path, element = self.paths[number], "[0]" if isinstance(tensor, tuple | list) else "[name]"
            hint = "" if "@" in path else f"; name the element that is one, as {path}{element}"
            raise TypeError(f"tap {path!r} reads a {type(tensor).__name__}, not a tensor{hint}")
        slots = self._open.get(tensor.device)
        if slots is None:  # the network runs on its own, not through this object
            return
        slot = slots[number]
        if slot.keeps_graph:
            self._check_graph(number)
        copies = self._copy[self.model.training][number]
        if not torch.compiler.is_compiling():  # a compiled forward uses what eager ones found
            unversioned = tensor.is_inference()
            slot.originals.append(None if unversioned else (tensor, tensor._version))
            copies = copies or unversioned
        slot.calls.append(tensor.clone() if copies else tensor)

    def _check_graph(self, number: int) -> None:
        if self.model.training and not torch.is_grad_enabled():
            raise ValueError(
                f"tap {self.paths[number]!r} lies in a part of the network that runs without gradients, so nothing "
                "could be learned there: checkpoint activations with use_reentrant=False, or tap another module"
            )

    def forward(self, images: Images, *more: Any) -> Outputs:
        """Return the network's `Outputs`.

        Args:
            images: (B, 3, H, W); or for a detector, a list of B images (3, H, W).
            more: further arguments of the network's forward, such as the targets of a detector.
        """
        output, slots = self._run(images, *more)
        tensors = [self._read(number, slot) for number, slot in enumerate(slots)]
        calls = [len(slot.calls) for slot in slots]
        grown: Grown = []
        maps = [self._as_map(n, tensors[n], images, calls[n], grown) for n in range(len(tensors))]
        if maps and _is_dense(output):
            return Outputs(maps[0].new_zeros(len(maps[0]), 0), maps, output)
        return Outputs(logits_of(output), maps)

    def _run(self, images: Images, *more: Any) -> tuple[Any, list[_Slot]]:
        slots, device = [_Slot(torch.is_grad_enabled()) for _ in self.points], device_of(images)
        self._open[device] = slots
        try:
            return self.model(images, *more), slots
        finally:
            del self._open[device]

    def _as_map(self, number: int, tensor: Tensor, images: Images, calls: int, grown: Grown) -> Tensor:
        """Return a tapped tensor as (B, C, H, W), after checks of its layout."""
        path, layout, shape = self.points[number].path, self.points[number].layout, tensor.shape
        if len(shape) in (3, 4):
            if len(shape) == 3:
                self._refuse_reordered(path)
            check_stated(path, layout, shape)
            if shape[0] != len(images):
                raise ValueError(
                    f"tap {path!r} reads {tuple(shape)} from a batch of {len(images)}: its first dimension is not the "
                    "batch, so tap another module"
                )
            if not torch.compiler.is_compiling() and number not in self._settled:
                self._settle(number, tuple(shape), images, calls, grown)
        if layout.kind == "last":
            return tensor.permute(0, 3, 1, 2)
        return self._from_tokens(path, layout, tensor, images) if layout.kind == "tokens" else tensor

    def _from_tokens(self, path: str, layout: Layout, tensor: Tensor, images: Images) -> Tensor:
        try:
            layout = settle_prefix(layout, tensor.shape[1], self.stated_prefix)
            tapped = tokens_to_map(tensor, prefix=layout.prefix or 0, grid=layout.grid)
        except ValueError as error:
            raise ValueError(f"tap {path!r}: {error}, as in @tokens:prefix=1:grid=14x14") from error
        shape = _shape(images)
        if layout.grid is None and len(shape) == 4 and "first" not in readings(tapped.shape, shape):
            raise ValueError(
                f"tap {path!r}: the images are {shape[2]} x {shape[3]}, so the tokens are probably not "
                f"{tapped.shape[2]} x {tapped.shape[3]}: say how many rows and columns they have, as in "
                "@tokens:prefix=1:grid=14x28"
            )
        return tapped

    def _settle(self, number: int, shape: tuple[int, ...], images: Images, calls: int, grown: Grown) -> None:
        """Check the layout of a tap, see the class; `grown` is filled for the first tap that needs it."""
        path, layout = self.points[number].path, self.points[number].layout
        image_shape = _shape(images)
        if len(image_shape) != 3:
            maps = len(shape) == 4
            fits = readings(shape, image_shape) if maps and image_shape else []
            # Windows of a map may look like a map with its channels last.
            if not maps or layout.kind == "last" or fits != [layout.kind or "first"]:
                if not grown:
                    grown += self._grown_shapes(images)
                stated = self.points[number].call
                position = (-1 if stated is None else stated) % calls
                after = [shapes[number][position] for shapes in grown if len(shapes[number]) > position]
                found = next((kind for larger in after if (kind := moved(shape, larger))), None)
                found = found if image_shape else turned(shape, after)
                exact = readings(shape, image_shape, slack=False) if maps and image_shape else []
                check_found(path, layout, shape, found or (exact[0] if len(exact) == 1 else None))
        self._settled.add(number)

    @torch.no_grad()
    def _grown_shapes(self, images: Images) -> Grown:
        """Return the shapes of every call of every tap for one image twice as wide, and for one twice as large.

        For a list of images, which the network may shrink, the second one is only twice as high.
        """
        grown: Grown = []
        try:
            with evaluated(self):
                for rows, columns in ((1, 2), (2, 2 if isinstance(images, Tensor) else 1)):
                    channels, height, width = images[0].shape
                    larger = images[0].new_zeros(channels, rows * height, columns * width)
                    # A network may raise anything at a size that it does not support, often after the tap.
                    slots = self._open[larger.device] = [_Slot() for _ in self.points]
                    with contextlib.suppress(Exception):
                        self.model(larger[None] if isinstance(images, Tensor) else [larger])
                    grown.append([[tuple(tensor.shape) for tensor in slot.calls] for slot in slots])
        finally:
            self._open.pop(device_of(images), None)
        return grown

    def _read(self, number: int, slot: _Slot) -> Tensor:
        point, calls = self.points[number], len(slot.calls)
        if calls == 0:
            raise RuntimeError(f"tap {point.path!r} was not reached by the forward pass")
        if point.call is None and calls > 1:
            raise ValueError(
                f"tap {point.path!r}: the module is called {calls} times in a forward; "
                f"write which call, as in '{point.path}#-1' for the last"
            )
        call = -1 if point.call is None else point.call
        if not -calls <= call < calls:
            raise ValueError(f"tap {point.path!r}: the module is called only {calls} times in a forward")
        if torch.compiler.is_compiling():
            return slot.calls[call]
        original = slot.originals[call]
        if original is None:  # it is unknown whether it was overwritten, so it is always copied
            return slot.calls[call]
        copies = self._copy[self.model.training]
        if original[0]._version != original[1]:
            if not copies[number]:
                raise RuntimeError(f"tap {point.path!r} was overwritten in place; it was not in the first forward")
            return slot.calls[call]
        copies[number] = False
        return original[0]  # an extra clone in the graph changes floating-point rounding

    def close(self) -> None:
        """Remove the hooks from the network, and restore `inplace`."""
        for handle in self._handles:
            handle.remove()
        for module in self._in_place:
            module.inplace = True  # type: ignore[assignment]
        self._handles, self._in_place = [], []


def device_of(images: Images) -> torch.device:
    """Return the device of images."""
    return images.device if isinstance(images, Tensor) else images[0].device


def _shape(images: Images) -> tuple[int, ...]:
    """Return the shape of a batch of images; () for a list, of which a detector makes its own batch."""
    return tuple(images.shape) if isinstance(images, Tensor) else ()


def _is_dense(output: Any) -> bool:
    """Return whether a result is that of a detector: a list of mappings per image, or a mapping without logits."""
    if isinstance(output, Mapping):
        return not {"logits", "out"} & set(output) and all(isinstance(value, Tensor) for value in output.values())
    return isinstance(output, (tuple, list)) and bool(output) and all(isinstance(each, Mapping) for each in output)


@torch.no_grad()
def dry_forward(taps: Taps, images: Images) -> Outputs:
    """Run `taps` once in eval mode without gradients, and restore the mode of every module."""
    with evaluated(taps):
        outputs: Outputs = taps(images)
    return outputs
