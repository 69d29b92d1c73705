"""Feature capture by module path on any network, and what is learned from one dry forward."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Outputs:
    """What one network makes of one batch.

    Args:
        logits: (B, K), before any softmax.
        features: one (B, C, H, W) per tap, in the order of the taps.
    """

    logits: Tensor
    features: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Batch:
    """What a term may know of a batch besides the networks' outputs.

    Args:
        target: (B,) int64 class indices, (B, K) probabilities of mixed images, or None where images carry no labels.
        index: (B,) int64 positions of the images in the data set, or None.
        epoch: epoch of training, counted from 0.
    """

    target: Tensor | None = None
    index: Tensor | None = None
    epoch: int = 0


_PATH = re.compile(r"^(?P<module>[^@#]+)(?P<side>@in)?(#(?P<call>-?\d+))?(?P<last>@last)?$")


@dataclass(frozen=True)
class TapPoint:
    """One parsed path: which module, its input or its output, and of which call."""

    path: str
    module: nn.Module
    reads_input: bool
    call: int | None  # None: the module must be called exactly once
    channels_last: bool  # (B, H, W, C), to be returned as (B, C, H, W)


def _parse(model: nn.Module, path: str) -> TapPoint:
    match = _PATH.match(path)
    if match is None:
        forms = "'layer4', 'layer4.2.relu@in' or 'layer4.2.relu@in#-1', with @last behind it where channels are last"
        raise ValueError(f"tap path {path!r} is not of the form {forms}")
    modules = dict(model.named_modules())
    name = match["module"]
    if name not in modules:
        names = [n for n in modules if n]
        near = difflib.get_close_matches(name, names, n=4, cutoff=0.3) or names[:4]
        raise ValueError(f"unknown tap path {path!r}: no module {name!r}; nearest are {', '.join(near)}")
    call = None if match["call"] is None else int(match["call"])
    return TapPoint(path, modules[name], match["side"] is not None, call, match["last"] is not None)


@dataclass
class _Slot:
    """The calls of one tap during one forward: tensors, and their versions when seen."""

    calls: list[Tensor] = field(default_factory=list)
    originals: list[tuple[Tensor, int] | None] = field(default_factory=list)


class Taps(nn.Module):
    """Run a network unchanged and return its logits and the maps at the named places.

    A path is a module's dotted name, as `named_modules` gives it: "layer4" is the module's output, "layer4.2.relu@in"
    its input, "layer4.2.relu@in#-1" the input of its last call in a forward (a ReLU that a block shares is called
    several times; the first is #0). "@last" at the end says that the tensor is (B, H, W, C), as in a Swin transformer:
    it is returned as (B, C, H, W). The network computes what it did: hooks read it, and `close` takes them away.

    In-place operations behind a tap would overwrite what was read. A module whose input is read has its `inplace` off
    until `close`. For others (`x += y`) the first forward copies every map and watches which originals change; later
    ones copy only those.

    Args:
        model: any network whose forward takes images and returns logits.
        paths: where to read, one path a tap.

    Raises:
        ValueError: a path that is malformed or names no module (the nearest names are listed).
    """

    def __init__(self, model: nn.Module, paths: Sequence[str] = ()) -> None:
        super().__init__()
        self.model = model
        self.paths = tuple(paths)
        self.points = [_parse(model, path) for path in self.paths]
        # What is overwritten may differ between training and evaluation.
        self._copy = {mode: [True] * len(self.paths) for mode in (True, False)}
        # Keyed by device: the replicas of DataParallel share this object, each on its own device.
        self._open: dict[torch.device, list[_Slot]] = {}
        self._in_place: list[nn.Module] = []
        self._handles: list[Any] = []
        self._attach()

    def _attach(self) -> None:
        modules = {p.module for p in self.points if p.reads_input and getattr(p.module, "inplace", False)}
        self._in_place = list(modules)
        for module in modules:
            module.inplace = False  # type: ignore[assignment]
        self._handles = [self._hook(number, point) for number, point in enumerate(self.points)]

    def _hook(self, number: int, point: TapPoint) -> Any:
        if point.reads_input:
            return point.module.register_forward_pre_hook(lambda _, args: self._record(number, args[0]))
        return point.module.register_forward_hook(lambda _, args, out: self._record(number, out))

    def _record(self, number: int, tensor: Tensor) -> None:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"tap {self.paths[number]!r} reads a {type(tensor).__name__}, not a tensor")
        slots = self._open.get(tensor.device)
        if slots is None:  # the network runs on its own, not through this object
            return
        slot = slots[number]
        copies = self._copy[self.model.training][number]
        if not torch.compiler.is_compiling():  # a compiled forward keeps to what eager ones learned
            unversioned = tensor.is_inference()
            slot.originals.append(None if unversioned else (tensor, tensor._version))
            copies = copies or unversioned
        slot.calls.append(tensor.clone() if copies else tensor)

    def forward(self, images: Tensor) -> Outputs:
        """Return the network's `Outputs` for `images` (B, 3, H, W)."""
        slots = [_Slot() for _ in self.points]
        self._open[images.device] = slots
        try:
            logits = self.model(images)
        finally:
            del self._open[images.device]
        found = (self._read(number, slot) for number, slot in enumerate(slots))
        maps = zip(self.points, found, strict=True)
        return Outputs(logits, [m.permute(0, 3, 1, 2) if point.channels_last else m for point, m in maps])

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
        if original is None:  # nothing tells whether it was overwritten: always a copy
            return slot.calls[call]
        copies = self._copy[self.model.training]
        if original[0]._version != original[1]:
            if not copies[number]:
                raise RuntimeError(f"tap {point.path!r} was overwritten in place; it was not in the first forward")
            return slot.calls[call]
        copies[number] = False
        return original[0]  # never the copy: a graph with one node more has other last bits

    def __deepcopy__(self, memo: dict[int, Any]) -> Taps:
        self.close()  # hooks read for the object that made them: a copy needs its own
        other = Taps(copy.deepcopy(self.model, memo), self.paths)
        self._attach()
        return other

    def close(self) -> None:
        """Take the hooks off the network, and leave it as it was."""
        for handle in self._handles:
            handle.remove()
        for module in self._in_place:
            module.inplace = True  # type: ignore[assignment]
        self._handles, self._in_place = [], []


@torch.no_grad()
def dry_forward(taps: Taps, images: Tensor) -> Outputs:
    """Run `taps` once in eval mode without gradients; the training mode of every module stays as it was."""
    modes = {module: module.training for module in taps.modules()}
    taps.eval()
    try:
        outputs: Outputs = taps(images)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return outputs


def norms_before(taps: Taps, images: Tensor) -> list[nn.BatchNorm2d | None]:
    """Find the batch normalisation in front of each tap.

    It is the last layer with weights (convolution, linear or normalisation) that ran before the tap was read, if that
    is a `BatchNorm2d` of as many channels as the tapped map; None otherwise. Behind a residual sum this is the norm of
    the branch alone, as in the published code; where the shortcut has a norm too (a stage of one block), the one of the
    two that ran last.

    Args:
        taps: the tapped network.
        images: (B, 3, H, W), any content; one image is enough.

    Returns:
        One `BatchNorm2d` or None per tap.
    """
    trace: list[nn.Module] = []
    seen: list[list[int]] = [[] for _ in taps.points]
    handles = []
    for module in taps.model.modules():
        if next(module.parameters(recurse=False), None) is not None or isinstance(module, nn.BatchNorm2d):
            handles.append(module.register_forward_hook(lambda m, args, out: trace.append(m)))
    for number, point in enumerate(taps.points):
        if point.reads_input:
            hook: Any = point.module.register_forward_pre_hook
        else:
            hook = point.module.register_forward_hook
        handles.append(hook(lambda *_, n=number: seen[n].append(len(trace))))
    try:
        outputs = dry_forward(taps, images)
    finally:
        for handle in handles:
            handle.remove()
    found: list[nn.BatchNorm2d | None] = []
    for point, calls, tensor in zip(taps.points, seen, outputs.features, strict=True):
        position = calls[-1 if point.call is None else point.call]
        last = trace[position - 1] if position else None
        # A subclass may do more than normalise, as timm's that activates.
        if type(last) is nn.BatchNorm2d and last.num_features == tensor.shape[1]:
            found.append(last)
        else:
            found.append(None)
    return found
