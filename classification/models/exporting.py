"""Networks as files that other programs run (ONNX, torch.export, safetensors), and the runtimes that run them here."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from classification.data.preprocessing import Preprocessing
from classification.errors import UserError
from classification.models import configuration
from classification.models.trained import Trained, open_trained

Compute = Callable[[Tensor], Tensor]
DESCRIPTION = ("arch", "num_classes", "classes", "preprocessing")  # what a file says, each as JSON


@dataclass(frozen=True)
class Runtime:
    """What computes logits.

    Args:
        prepare: bytes (B, H, W, 3) to what it takes.
        compute: that to logits (B, K), float32.
    """

    prepare: Compute
    compute: Compute

    def __call__(self, images: Tensor) -> Tensor:
        """Return logits of bytes (B, H, W, 3)."""
        return self.compute(self.prepare(images))


class Normalising(nn.Module):
    """A network that takes bytes (B, 3, H, W) and normalises them itself.

    Args:
        network: it.
        preprocessing: whose mean and std count.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, network: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.network = network
        for name, values in (("shift", preprocessing.mean), ("scale", preprocessing.std)):
            self.register_buffer(name, 255 * torch.tensor(values).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits; the same operations as `Preprocessing.normalise`, so the same bits."""
        logits: Tensor = self.network((images.float() - self.shift) / self.scale)
        return logits


def description(trained: Trained, *, takes_bytes: bool) -> dict[str, str]:
    """Return what a user of a file must know, each value as JSON; the same keys in every kind of file.

    Args:
        trained: the network.
        takes_bytes: whether the file normalises images itself.
    """
    seen = {
        **trained.preprocessing.describe(),
        "layout": "NCHW",
        "colours": "RGB",
        "input": "uint8, 0 to 255, not normalised" if takes_bytes else "float32, (bytes / 255 - mean) / std",
    }
    values = dict(zip(DESCRIPTION, (trained.arch, trained.num_classes, trained.classes, seen), strict=True))
    return {name: json.dumps(value) for name, value in {**values, **configuration(trained.network)}.items()}


def input_of(trained: Trained, *, takes_bytes: bool) -> Callable[[Tensor], Tensor]:
    """Return what turns bytes (B, H, W, 3) into the input of a file."""
    return prepared(trained.preprocessing, takes_bytes=takes_bytes)


def prepared(seen: Preprocessing, *, takes_bytes: bool) -> Compute:
    """Return the same for a file that normalises by `seen`, or takes bytes."""
    return _channels_first if takes_bytes else partial(_normal, seen)


def versions(kind: str) -> str:
    """Return the versions of what writes and runs a kind of file."""
    found = [f"torch {torch.__version__}"]
    if kind in ("onnx", "int8"):
        found += [f"{name} {metadata.version(name)}" for name in ("onnx", "onnxruntime")]
    return ", ".join(found)


def to_onnx(trained: Trained, *, takes_bytes: bool = False, opset: int | None = None) -> bytes:
    """Return an ONNX file: input "images", output "logits", any batch size, weights inside.

    Args:
        trained: the network.
        takes_bytes: whether normalisation is part of the graph.
        opset: its version; None for the exporter's own choice.

    Raises:
        UserError: the network does not go into the format.
    """
    program: Any = None
    with quiet():
        try:
            program = torch.onnx.export(
                _module(trained, takes_bytes),
                (_example(trained, takes_bytes),),
                dynamo=True,
                verbose=False,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                opset_version=opset,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise _cannot(trained, "ONNX", error) from error
    model = program.model_proto
    found = next(entry.version for entry in model.opset_import if entry.domain == "")
    if opset is not None and found != opset:
        raise UserError(
            f"--opset {opset} cannot be had for {trained.arch}: the exporter writes {found} instead; leave it out"
        )
    for node in model.graph.node:  # the exporter notes where each stands in the code, with the paths of this machine
        del node.metadata_props[:]
        node.doc_string = ""
    describe_onnx(model, description(trained, takes_bytes=takes_bytes))
    content: bytes = model.SerializeToString()
    return content


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Leave out what exporters print, warn of and log: what is wrong in the end, they raise."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def describe_onnx(model: Any, said: dict[str, str]) -> None:
    """Put a description into the metadata of an ONNX model, in place of any other."""
    del model.metadata_props[:]
    for name, value in said.items():
        model.metadata_props.add(key=name, value=value)


def to_pt2(trained: Trained, *, takes_bytes: bool = False) -> bytes:
    """Return a torch.export file, of any batch size; `description` stands in its extra files NAME.json.

    Raises:
        UserError: the network does not go into the format.
    """
    file = io.BytesIO()
    try:
        shapes = ({0: torch.export.Dim("batch")},)
        module, example = _module(trained, takes_bytes), _example(trained, takes_bytes)
        program = torch.export.export(module, (example,), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # whatever the network's own code raises when it is traced
        raise _cannot(trained, "torch.export", error) from error
    said = description(trained, takes_bytes=takes_bytes)
    torch.export.save(program, file, extra_files={f"{name}.json": value for name, value in said.items()})
    return file.getvalue()


def to_safetensors(trained: Trained) -> bytes:
    """Return a safetensors file of the weights, with `description` as its metadata."""
    from safetensors.torch import save

    state = {name: value.detach().clone().contiguous() for name, value in trained.network.state_dict().items()}
    return save(state, {"format": "pt", **description(trained, takes_bytes=False)})


def torch_runtime(trained: Trained) -> Runtime:
    """Return the network itself."""
    return Runtime(input_of(trained, takes_bytes=False), _without_graph(trained.network))


def file_runtime(path: Path, kind: str, trained: Trained, *, takes_bytes: bool = False) -> Runtime:
    """Return what runs a file that was written here: onnxruntime, torch.export, or the network loaded anew.

    Args:
        path: the file.
        kind: "onnx", "int8", "pt2" or "safetensors".
        trained: the network it was written from, whose preprocessing counts.
        takes_bytes: whether the file normalises images itself.
    """
    if kind == "safetensors":
        return torch_runtime(open_trained(path))
    prepare = input_of(trained, takes_bytes=takes_bytes)
    return Runtime(prepare, (open_pt2 if kind == "pt2" else open_onnx)(path)[0])


def open_onnx(path: Path) -> tuple[Compute, Mapping[str, str]]:
    """Return what computes logits by onnxruntime, and what the file says in its metadata."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # as torch, which it is compared with
    options.log_severity_level = 3  # errors alone
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def compute(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])

    return compute, session.get_modelmeta().custom_metadata_map


def open_pt2(path: Path) -> tuple[Compute, Mapping[str, str]]:
    """Return what computes logits by torch.export, and what the file says in its extra files.

    Such a file is a program: open those alone whose origin you trust.
    """
    said = {f"{name}.json": "" for name in DESCRIPTION}
    with path.open("rb") as file:
        module = torch.export.load(file, extra_files=said).module()
    return _without_graph(module), {name.removesuffix(".json"): value for name, value in said.items() if value}


def _module(trained: Trained, takes_bytes: bool) -> nn.Module:
    return Normalising(trained.network, trained.preprocessing).eval() if takes_bytes else trained.network


def _example(trained: Trained, takes_bytes: bool) -> Tensor:
    """Return a batch of two: of one, the exporters would take the batch size for fixed."""
    side = trained.preprocessing.img_size
    images = torch.zeros(2, side, side, 3, dtype=torch.uint8)
    return input_of(trained, takes_bytes=takes_bytes)(images)


def _channels_first(images: Tensor) -> Tensor:
    return images.permute(0, 3, 1, 2).contiguous()


def _normal(seen: Preprocessing, images: Tensor) -> Tensor:
    return seen.normalise(images).contiguous()


def _without_graph(module: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    @torch.inference_mode()
    def compute(images: Tensor) -> Tensor:
        return module(images)

    return compute


def _cannot(trained: Trained, what: str, error: Exception) -> UserError:
    cause = (str(error.__cause__ or error) or type(error).__name__).splitlines()[0]
    return UserError(f"{trained.arch} cannot be written as {what}: {cause}")
