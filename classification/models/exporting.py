"""Export networks as ONNX, torch.export and safetensors files, and run these files."""

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
DESCRIPTION = ("arch", "num_classes", "classes", "preprocessing")  # keys of a file's description; values are JSON


@dataclass(frozen=True)
class Runtime:
    """A program that computes logits.

    Args:
        prepare: bytes (B, H, W, 3) -> its input.
        compute: its input -> logits (B, K), float32.
    """

    prepare: Compute
    compute: Compute

    def __call__(self, images: Tensor) -> Tensor:
        """Return the logits of bytes (B, H, W, 3)."""
        return self.compute(self.prepare(images))


class Normalising(nn.Module):
    """A network that takes bytes (B, 3, H, W) and normalises them itself.

    Args:
        network: takes normalised images.
        preprocessing: has mean and std.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, network: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.network = network
        for name, values in (("shift", preprocessing.mean), ("scale", preprocessing.std)):
            self.register_buffer(name, 255 * torch.tensor(values).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, bit for bit those after `Preprocessing.normalise`."""
        logits: Tensor = self.network((images.float() - self.shift) / self.scale)
        return logits


def description(trained: Trained, *, takes_bytes: bool) -> dict[str, str]:
    """Return what one must know to use a file, each value as JSON; all kinds of files have the same keys.

    Args:
        trained: the network.
        takes_bytes: whether the file normalises images itself.
    """
    preprocessing = {
        **trained.preprocessing.describe(),
        "layout": "NCHW",
        "colours": "RGB",
        "input": "uint8, 0 to 255, not normalised" if takes_bytes else "float32, (bytes / 255 - mean) / std",
    }
    values = dict(zip(DESCRIPTION, (trained.arch, trained.num_classes, trained.classes, preprocessing), strict=True))
    return {name: json.dumps(value) for name, value in {**values, **configuration(trained.network)}.items()}


def input_function(trained: Trained, *, takes_bytes: bool) -> Callable[[Tensor], Tensor]:
    """Return the function that turns bytes (B, H, W, 3) into the input of a network's file."""
    return input_function_for(trained.preprocessing, takes_bytes=takes_bytes)


def input_function_for(preprocessing: Preprocessing, *, takes_bytes: bool) -> Compute:
    """Return the function that turns bytes (B, H, W, 3) into the input of a file with this preprocessing."""
    return _channels_first if takes_bytes else partial(_normalise, preprocessing)


def package_versions(kind: str) -> str:
    """Return the versions of the packages that write and run a kind of file."""
    versions = [f"torch {torch.__version__}"]
    if kind in ("onnx", "int8"):
        versions += [f"{name} {metadata.version(name)}" for name in ("onnx", "onnxruntime")]
    return ", ".join(versions)


def to_onnx(trained: Trained, *, takes_bytes: bool = False, opset: int | None = None) -> bytes:
    """Return an ONNX file: input "images", output "logits", any batch size, weights inside.

    Args:
        trained: the network.
        takes_bytes: whether normalisation is part of the graph.
        opset: its version; None for the exporter's own choice.

    Raises:
        UserError: the network cannot be exported.
    """
    module, example = _module(trained, takes_bytes), _example(trained, takes_bytes)
    with suppress_output():
        try:
            try:
                model = _translate(module, example, opset)
            except torch.onnx.errors.OnnxExporterError:
                if not _write_out_attention(module):
                    raise
                model = _translate(module, example, opset)
        except torch.onnx.errors.OnnxExporterError as error:
            raise _export_error(trained, "ONNX", error) from error
    version = next(entry.version for entry in model.opset_import if entry.domain == "")
    if opset is not None and version != opset:
        raise UserError(
            f"--opset {opset} cannot be had for {trained.arch}: the exporter writes {version} instead; leave it out"
        )
    for node in model.graph.node:  # the exporter adds the places in the code, which contain paths of this machine
        del node.metadata_props[:]
        node.doc_string = ""
    describe_onnx(model, description(trained, takes_bytes=takes_bytes))
    content: bytes = model.SerializeToString()
    return content


def _translate(module: nn.Module, example: Tensor, opset: int | None) -> Any:
    """Return the ONNX model of a network."""
    program: Any = torch.onnx.export(
        module,
        (example,),
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        opset_version=opset,
    )
    return program.model_proto


def _write_out_attention(module: nn.Module) -> bool:
    """Have a network of transformers compute attention by plain products, and return whether it is one.

    The exporter cannot translate torch's own function for attention within windows, as of Swin.
    """
    network: Any
    for network in module.modules():
        if hasattr(network, "set_attn_implementation"):  # the outermost, which passes it on
            network.set_attn_implementation("eager")
            return True
    return False


@contextlib.contextmanager
def suppress_output() -> Iterator[None]:
    """Suppress what exporters print, warn of and log: real errors are raised."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def describe_onnx(model: Any, metadata: dict[str, str]) -> None:
    """Replace the metadata of an ONNX model by a description."""
    del model.metadata_props[:]
    for name, value in metadata.items():
        model.metadata_props.add(key=name, value=value)


def to_pt2(trained: Trained, *, takes_bytes: bool = False) -> bytes:
    """Return a torch.export file for any batch size; its extra files NAME.json have the `description`.

    Raises:
        UserError: the network cannot be exported.
    """
    file = io.BytesIO()
    try:
        shapes = ({0: torch.export.Dim("batch")},)
        module, example = _module(trained, takes_bytes), _example(trained, takes_bytes)
        program = torch.export.export(module, (example,), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # the code of a network may raise anything when it is traced
        raise _export_error(trained, "torch.export", error) from error
    metadata = description(trained, takes_bytes=takes_bytes)
    torch.export.save(program, file, extra_files={f"{name}.json": value for name, value in metadata.items()})
    return file.getvalue()


def to_safetensors(trained: Trained) -> bytes:
    """Return a safetensors file of the weights, with `description` as its metadata."""
    from safetensors.torch import save

    state = {name: value.detach().clone().contiguous() for name, value in trained.network.state_dict().items()}
    return save(state, {"format": "pt", **description(trained, takes_bytes=False)})


def torch_runtime(trained: Trained) -> Runtime:
    """Return a runtime that runs the network itself."""
    return Runtime(input_function(trained, takes_bytes=False), _without_graph(trained.network))


def file_runtime(path: Path, kind: str, trained: Trained, *, takes_bytes: bool = False) -> Runtime:
    """Return a runtime for a file that was written here: onnxruntime, torch.export, or the network loaded again.

    Args:
        path: the file.
        kind: "onnx", "int8", "pt2" or "safetensors".
        trained: the network that was exported; its preprocessing is used.
        takes_bytes: whether the file normalises images itself.
    """
    if kind == "safetensors":
        return torch_runtime(open_trained(path))
    prepare = input_function(trained, takes_bytes=takes_bytes)
    return Runtime(prepare, (open_pt2 if kind == "pt2" else open_onnx)(path)[0])


def open_onnx(path: Path) -> tuple[Compute, Mapping[str, str]]:
    """Return a function that computes logits by onnxruntime, and the file's metadata."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # as many as torch, for a fair comparison
    options.log_severity_level = 3  # errors only
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def compute(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])

    return compute, session.get_modelmeta().custom_metadata_map


def open_pt2(path: Path) -> tuple[Compute, Mapping[str, str]]:
    """Return a function that computes logits by torch.export, and the file's description.

    Such a file is a program: open only files whose origin you trust.
    """
    extra_files = {f"{name}.json": "" for name in DESCRIPTION}
    with path.open("rb") as file:
        module = torch.export.load(file, extra_files=extra_files).module()
    return _without_graph(module), {name.removesuffix(".json"): value for name, value in extra_files.items() if value}


def _module(trained: Trained, takes_bytes: bool) -> nn.Module:
    return Normalising(trained.network, trained.preprocessing).eval() if takes_bytes else trained.network


def _example(trained: Trained, takes_bytes: bool) -> Tensor:
    """Return a batch of two images: with one, the exporters would fix the batch size at 1."""
    side = trained.preprocessing.img_size
    images = torch.zeros(2, side, side, 3, dtype=torch.uint8)
    return input_function(trained, takes_bytes=takes_bytes)(images)


def _channels_first(images: Tensor) -> Tensor:
    return images.permute(0, 3, 1, 2).contiguous()


def _normalise(preprocessing: Preprocessing, images: Tensor) -> Tensor:
    return preprocessing.normalise(images).contiguous()


def _without_graph(module: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    @torch.inference_mode()
    def compute(images: Tensor) -> Tensor:
        return module(images)

    return compute


def _export_error(trained: Trained, form: str, error: Exception) -> UserError:
    cause = (str(error.__cause__ or error) or type(error).__name__).splitlines()[0]
    return UserError(f"{trained.arch} cannot be written as {form}: {cause}")
