"""Record a forward as a graph of values, with the modules at which each value can be read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mgd.taps.kept import evaluated
from mgd.taps.paths import NAME
from mgd.taps.taps import first_tensor, logits_of

LAYERS = ("convolution", "addmm", "mm", "linear", "bmm", "baddbmm", "mkldnn_rnn_layer")  # operators with weights


@dataclass
class Value:
    """A tensor at one moment of a forward.

    Args:
        number: in the order of computation.
        shape: of the tensor.
        operator: the operator that computed it, such as "relu", without the underscore of in-place ones.
        constants: the numbers among its arguments.
        parents: the values that it was computed from, if they depend on the images.
        num_layers: number of operators with weights that ran before, itself included.
    """

    number: int
    shape: tuple[int, ...]
    operator: str
    constants: tuple[float, ...]
    parents: tuple[int, ...]
    num_layers: int


@dataclass(frozen=True)
class Place:
    """Where a value can be read: the input of a module, its output, or an element of that.

    Args:
        name: of the module.
        reads_input: whether it is its input.
        element: index or name in the module's result, or None if that is a tensor.
        call: number of the call in the forward.
        module: the module.
        time: number of values that had been computed before.
    """

    name: str
    reads_input: bool
    element: str | None
    call: int
    module: nn.Module
    time: int


@dataclass
class Trace:
    """The graph of one forward.

    Args:
        values: in the order of computation; number 0 are the images.
        places: of each value that a module takes or returns.
        calls: number of calls of each module.
        end: number of the logits, or None if they do not depend on the images.
    """

    values: list[Value]
    places: dict[int, list[Place]]
    calls: dict[str, int]
    end: int | None

    def trunk(self) -> list[Value]:
        """Return the values through which all information of the images passes to the logits, the images first.

        They are the dominators of the logits. The output of a residual block is one; values of its branch are not.
        """
        if self.end is None:
            return []
        above, depth = {0: 0}, {0: 0}
        for value in self.values[1:]:
            common = value.parents[0]
            for parent in value.parents[1:]:
                common = _meet(common, parent, above, depth)
            above[value.number], depth[value.number] = common, depth[common] + 1
        chain = [self.end]
        while chain[-1] != 0:
            chain.append(above[chain[-1]])
        return [self.values[number] for number in reversed(chain)]

    def consumers(self) -> dict[int, list[Value]]:
        """Return {number: values that are computed from it}."""
        consumers: dict[int, list[Value]] = {}
        for value in self.values:
            for parent in value.parents:
                consumers.setdefault(parent, []).append(value)
        return consumers

    def path(self, place: Place) -> str:
        """Return the path of a place for `Taps`, without a layout."""
        element = "" if place.element is None else f"[{place.element}]"
        call = f"#{place.call}" if self.calls[place.name] > 1 else ""
        return f"{place.name}{element}{'@in' if place.reads_input else ''}{call}"


def _meet(a: int, b: int, above: Mapping[int, int], depth: Mapping[int, int]) -> int:
    while a != b:
        if depth[a] < depth[b]:
            a, b = b, a
        a = above[a]
    return a


@dataclass
class _Recorder(TorchDispatchMode):
    """Record every operator whose arguments depend on the images.

    A tensor that was changed in place, also through a view, is a new value, computed from the old one and the change.
    """

    values: list[Value] = field(default_factory=list)
    num_layers: int = 0

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._number: dict[int, int] = {}  # id of a tensor -> number of its value
        self._written: dict[int, int] = {}  # storage -> number of the last change
        self._alive: list[Tensor] = []  # ids are unique only while the tensors are alive

    def start(self, images: Tensor) -> None:
        self._new(images, "images", (), ())

    def _new(self, tensor: Tensor, operator: str, constants: tuple[float, ...], parents: tuple[int, ...]) -> int:
        number = len(self.values)
        self.values.append(Value(number, tuple(tensor.shape), operator, constants, parents, self.num_layers))
        self._number[id(tensor)] = number
        self._alive.append(tensor)
        return number

    def number(self, tensor: Tensor) -> int | None:
        """Return the number of a tensor's current value, or None if it does not depend on the images."""
        own, written = self._number.get(id(tensor)), self._written.get(_storage(tensor))
        if written is None or (own is not None and own >= written):
            return own
        return self._new(tensor, "written", (), (written,) if own is None else (own, written))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = list(_tensors([*args, *kwargs.values()]))
        parents = {number for tensor in inputs if (number := self.number(tensor)) is not None}
        result = func(*args, **kwargs)
        if not parents:
            return result
        name = func._schema.name.removeprefix("aten::")
        changes = func._schema.is_mutable
        if name.strip("_") in LAYERS:
            self.num_layers += 1
        constants = tuple(float(a) for a in args if isinstance(a, (int, float)) and not isinstance(a, bool))
        for output in _tensors([result]):
            number = self._new(output, name.rstrip("_"), constants, tuple(sorted(parents)))
            if changes and any(output is tensor for tensor in inputs):
                self._written[_storage(output)] = number
        return result


def _storage(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except NotImplementedError:  # a tensor without storage, such as those of oneDNN
        return -id(tensor)


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def elements(output: Any) -> Iterator[tuple[str | None, Tensor]]:
    """Yield (index or name, tensor) for the tensors in a module's result that a path can name."""
    if isinstance(output, Tensor):
        yield None, output
    elif isinstance(output, Mapping):
        named = ((str(name), value) for name, value in output.items() if isinstance(value, Tensor))
        yield from ((name, value) for name, value in named if NAME.fullmatch(name))
    elif isinstance(output, (tuple, list)):
        yield from ((str(index), value) for index, value in enumerate(output) if isinstance(value, Tensor))


@torch.no_grad()
def trace(model: nn.Module, images: Tensor) -> Trace:
    """Run a network once, in eval mode, and return the graph of what it computes.

    Args:
        model: the network; the mode of every module is restored.
        images: (B, 3, H, W).
    """
    recorder, places, calls = _Recorder(), dict[int, list[Place]](), dict[str, int]()
    handles: list[Any] = []

    def note(place: Place, tensor: Tensor) -> None:
        number = recorder.number(tensor)
        if number is not None:
            places.setdefault(number, []).append(place)

    def now() -> int:
        return len(recorder.values)

    def follow(name: str, module: nn.Module) -> None:
        open_calls: list[int] = []

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            open_calls.append(calls.get(name, 0))
            calls[name] = open_calls[-1] + 1
            tensor = first_tensor(module, args, kwargs)
            if isinstance(tensor, Tensor):
                note(Place(name, True, None, open_calls[-1], module, now()), tensor)

        def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            call = open_calls.pop()
            for element, tensor in elements(output):
                note(Place(name, False, element, call, module, now()), tensor)

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))

    try:
        for name, module in model.named_modules():
            if NAME.fullmatch(name):
                follow(name, module)
        with evaluated(model), recorder:
            recorder.start(images)
            logits = logits_of(model(images))
            end = recorder.number(logits)
    finally:
        for handle in handles:
            handle.remove()
    return Trace(recorder.values, places, calls, end)
