"""The real step on a pretended GPU: python tests/fake_cuda.py PHOTOS TEACHER 'WORDS' 'WORDS' ...

Fake tensors know shape, type and device, and compute nothing: they run the code of a step on a `cuda:0` that is not
there. A mode below them raises where devices mix, and counts what would have the processor wait for the GPU, with the
line of the project that asked. For each WORDS, options of main_mgd.py, one JSON object is printed.

The backward pass needs a driver, so gradients are zeros of the right shapes.
"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[1]
READS = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::item")
SIZES = ("aten::nonzero", "aten::masked_select", "aten::equal", "aten::unique", "aten::_unique2")  # results of a size


def pretend_gpu() -> None:
    """Have torch believe in two GPUs. For a process of its own: nothing is taken back."""
    mode: Any = FakeTensorMode
    mode.avoid_device_init = True
    torch._C._ensureCUDADeviceGuardSet()
    cuda: Any = torch.cuda
    cuda.is_available = lambda: True
    cuda.device_count = lambda: 2
    cuda.is_bf16_supported = lambda including_emulation=True: True
    cuda.set_device = lambda device: None
    cuda.get_rng_state = lambda device=None: torch.zeros(0, dtype=torch.uint8)
    cuda.Event = _Event
    cuda.manual_seed_all = lambda seed: None
    common: Any = importlib.import_module("torch.cuda.amp.common")
    common.amp_definitely_not_available = lambda: False
    module: Any = nn.Module
    module._apply = _apply
    tensor: Any = Tensor
    tensor.backward = _no_backward
    tensor.pin_memory = lambda self, device=None: self
    tensor.is_pinned = lambda self, device=None: False
    autograd: Any = torch.autograd
    autograd.grad = lambda value, inputs, **_: [torch.zeros_like(part) for part in inputs]


class _Event:
    """What was copied in the background is there."""

    def record(self) -> None: ...
    def synchronize(self) -> None: ...


def _apply(self: nn.Module, change: Any, recurse: bool = True) -> nn.Module:
    """Replace parameters and buffers: torch would write fake values into the real ones. Frozen teachers pass it on."""
    for child in self.children():
        child._apply(change)
    for name, weight in self._parameters.items():
        if weight is not None:
            self._parameters[name] = nn.Parameter(change(weight.detach()), weight.requires_grad)
    for name, value in self._buffers.items():
        if value is not None:
            self._buffers[name] = change(value)
    return self


TRAINED: list[nn.Module] = []


def _no_backward(value: Tensor, *_: Any, **__: Any) -> None:
    assert value.requires_grad and value.device.type == "cuda" and value.ndim == 0, (value.device, value.shape)
    for module in TRAINED:
        for weight in module.parameters():
            if weight.requires_grad:
                weight.grad = torch.zeros_like(weight)


class Waits(TorchDispatchMode):
    """Count what waits for the GPU, by kind and line; answer reads of numbers, which fake tensors do not have."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name()
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_gpu = any(tensor.device.type == "cuda" for tensor in tensors)
        if name in READS and (on_gpu or isinstance(tensors[0], FakeTensor)):
            if on_gpu:
                self._count("reads a number")
            return _some_number(tensors[0])
        if name in SIZES and on_gpu:
            self._count("reads a size")
        if name == "aten::index.Tensor" and on_gpu and any(t.dtype == torch.bool for t in tensors[1:]):
            self._count("reads a size")
        found = func(*args, **kwargs)
        source, target = None, None
        if name == "aten::_to_copy":
            source, target = tensors[0], found
        elif name == "aten::copy_" and len(tensors) > 1:
            source, target = tensors[1], tensors[0]
        if source is not None and target is not None and source.device.type != target.device.type:
            blocking = not (kwargs.get("non_blocking") or (name == "aten::copy_" and len(args) > 2 and args[2]))
            if blocking and source.numel():
                self._count(f"copies {source.device.type} to {target.device.type}")
        return found

    def _count(self, what: str) -> None:
        self.seen[f"{what}: {_asked()}"] += 1


def _some_number(tensor: Tensor) -> Any:
    """Return a number that goes on: no flag is raised on the GPU; the processor's are true, or 1.0, or index 0."""
    here = tensor.device.type == "cpu"
    if tensor.dtype == torch.bool:
        return here
    return float(here) if tensor.is_floating_point() else 0


def _asked() -> str:
    ours = tuple(str(ROOT / room) for room in ("mgd", "classification"))
    for frame in reversed(traceback.extract_stack()):
        if frame.filename.startswith(ours):
            return f"{frame.filename[len(str(ROOT)) + 1 :]}:{frame.lineno} {frame.line}"
    return "tests"


def count_waits(words: list[str], steps: int = 3) -> dict[str, int]:
    """Return what waits for the GPU in the last of some steps of a run with these options."""
    from classification.options.config import parse
    from classification.runs.world import Seed, World
    from classification.training.distilling import prepare
    from classification.training.engine import Engine
    from classification.training.step import Stepper

    options = parse(words, "main_mgd.py", distillation=True)
    job = prepare(options, Seed(0, False))
    assert job.distiller is not None
    with FakeTensorMode(allow_non_fake_inputs=True), Waits() as waits:
        engine = Engine(job, World(0, 1, 1, torch.device("cuda", 0)))
        TRAINED[:] = [job.distiller]
        stepper = Stepper(engine)
        stepper.wrapped.train()
        _match(job.distiller)
        size, batch = job.preprocessing.img_size, options.optimisation.batch_size
        for step in range(steps):
            waits.seen.clear()
            images = torch.zeros(batch, *_views(options), size, size, 3, dtype=torch.uint8)
            loaded = [images, torch.zeros(batch, dtype=torch.int64), torch.arange(batch)]
            stepper.set_rate(0.1)
            values = stepper(loaded, 0, step + 1, batch)
            assert values is not None and all(value.device.type == "cuda" for value in values.values())
    return dict(waits.seen)


def replicate(words: list[str]) -> dict[str, int]:
    """Run a step as DataParallel does, on replicas for two GPUs by torch's own function; raise where devices mix."""
    from classification.options.config import parse
    from classification.runs.world import Seed, World
    from classification.training.distilling import prepare
    from classification.training.engine import Engine
    from classification.training.step import Stepper

    module: Any = importlib.import_module("torch.nn.parallel.replicate")
    module._broadcast_coalesced_reshape = lambda tensors, devices, detach=False: [
        [tensor.to(f"cuda:{device}") for tensor in tensors] for device in devices
    ]
    split: Callable[[nn.Module, list[int]], list[nn.Module]] = module.replicate
    job = prepare(parse(words, "main_mgd.py", distillation=True), Seed(0, False))
    assert job.distiller is not None
    with FakeTensorMode(allow_non_fake_inputs=True), Waits():
        engine = Engine(job, World(0, 1, 1, torch.device("cuda", 0)))
        TRAINED[:] = [job.distiller]
        stepper = Stepper(engine)
        stepper.wrapped.train()
        _match(job.distiller)
        size = job.preprocessing.img_size
        images = engine.images(torch.zeros(8, *_views(job.options), size, size, 3, dtype=torch.uint8))
        for device, replica in enumerate(split(stepper.wrapped, [0, 1])):
            target, index = torch.zeros(4, dtype=torch.int64), torch.arange(4)
            given = [tensor.to(f"cuda:{device}") for tensor in (images[:4], target, index)]
            values = replica(*given, 0)
            assert all(value.device.index == device for value in values.values()), values
    return {}


def _views(options: Any) -> list[int]:
    """Return [2] where a term compares two views of each image."""
    return [2] if any("views" in spec.needs for spec in options.table.values()) else []


def controls() -> dict[str, Any]:
    """Return what the mode sees of the kinds of waits that it is to count, and of devices that mix."""
    found: dict[str, Any] = {}
    with FakeTensorMode(), Waits() as waits:
        on_gpu, mask = torch.zeros(4, device="cuda:0"), torch.ones(4, dtype=torch.bool, device="cuda:0")
        tried: dict[str, Callable[[], Any]] = {
            "item": lambda: on_gpu.sum().item(),
            "if": lambda: bool(mask.any()),
            "mask": lambda: on_gpu[mask],
            "pageable copy": lambda: torch.zeros(4).to("cuda:0"),
            "copy back": lambda: on_gpu.cpu(),
            "background copy": lambda: torch.zeros(4).to("cuda:0", non_blocking=True),
            "plain step": lambda: (on_gpu * 2).add_(1).sum(),
            "two devices": lambda: on_gpu + torch.zeros(4, device="cuda:1"),
        }
        for name, what in tried.items():
            waits.seen.clear()
            try:
                what()
                found[name] = sum(waits.seen.values())
            except Exception as error:
                found[name] = type(error).__name__
    return found


class Memory(TorchDispatchMode):
    """Count the bytes of all tensors on the GPU that live at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known: Any = weakref.WeakSet()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, FakeTensor) and tensor.device.type == "cuda":
                storage = tensor.untyped_storage()
                if storage not in self.known:
                    self.known.add(storage)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._gone, storage.nbytes())
        return found

    def _gone(self, size: int) -> None:
        self.now -= size


def matching_memory() -> dict[str, Any]:
    """Return bytes: of the maps of ResNet-50 and mobilenet_v1, 256 images of 224 px, and the most that `mgd` adds.

    Beside the maps a backward needs the normalised maps of the student, and what counted of their error: `kept`.
    """
    from mgd import ChannelMatching, Outputs

    student, teacher, batch = (128, 256, 512, 1024), (256, 512, 1024, 2048), 256
    matching = ChannelMatching(student, teacher, [torch.zeros(width) for width in teacher])
    matching._matched = True
    for stage in matching._stages():
        stage.index.copy_(torch.arange(stage.num_teacher).reshape(2, -1))
    with FakeTensorMode(allow_non_fake_inputs=True), Memory() as memory:
        matching.to("cuda")
        sides = [56, 28, 14, 7]

        def maps(widths: Sequence[int], trains: bool) -> Outputs:
            made = [torch.zeros(batch, width, side, side, dtype=torch.bfloat16, device="cuda", requires_grad=trains)
                    for width, side in zip(widths, sides, strict=True)]  # fmt: skip
            return Outputs(torch.zeros(batch, 10, device="cuda"), made)

        ours, theirs = maps(student, True), maps(teacher, False)
        before = memory.now
        loss = matching(ours, [theirs])
        assert loss.requires_grad
        return {"maps": before, "added": memory.peak - before, "kept": memory.now - before}


def _match(distiller: Any) -> None:
    """Mark what needs a flow as matched: solvers need numbers."""
    for term in distiller.terms.modules():
        for name in ("_matched", "ready"):
            if hasattr(term, name):
                setattr(term, name, True)


def main() -> None:
    photos, teacher, *cases = sys.argv[1:]
    pretend_gpu()
    print(json.dumps({"words": "controls", "waits": controls()}), flush=True)
    print(json.dumps({"words": "memory", **matching_memory()}), flush=True)
    base = [photos, "-a", "cifar_resnet8_w0.5", "--teacher-arch", "cifar_resnet8", "--teacher-resume", teacher]
    base += ["--img-size", "16", "-b", "8", "-j", "0", "--train-crop", "pad", "--gpu", "0"]
    for case in cases:
        parallel, words = case.startswith("DataParallel "), case.removeprefix("DataParallel ").split()
        words = [*(base[:3] + base[7:] if "--config" in words else base), *words]
        done = _tried(replicate if parallel else count_waits, words)
        print(json.dumps({"words": case, **done}), flush=True)


def _tried(work: Callable[[list[str]], dict[str, int]], words: list[str]) -> dict[str, Any]:
    try:
        return {"waits": work(words)}
    except Exception as error:
        lines = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)]
        return {"error": f"{type(error).__name__}: {error}"[:400], "at": lines[-6:]}


if __name__ == "__main__":
    main()
