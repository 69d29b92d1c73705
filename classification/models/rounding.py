"""Find the calls in a network's forward whose results its int8 file rounds, by comparing both."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from classification.errors import UserError
from classification.models import quantised
from classification.models.exporting import input_function, suppress_output, to_onnx
from classification.models.fake_quantised import INPUT, NORM_ARGUMENTS, WEIGHTED, CallHook, Sites
from classification.models.trained import Trained

TOLERANCE = 1e-4  # of a tensor's largest value: allowed difference of two programs
ROUNDED_SUFFIX = "_QuantizeLinear_Input"  # suffix that onnxruntime adds to the name of a rounded output
COMPUTING_OPERATORS = ("AveragePool", "Resize")  # operators that use the scale of their input, but compute new values


def find_sites(trained: Trained, *, takes_bytes: bool = False, opset: int | None = None) -> Sites:
    """Return the calls whose results the int8 file of a network rounds.

    The ONNX graph and the network process the same two random images, and tensors with equal values are taken to be the
    same. This uses a copy of the network with shifted vectors, because norms that start at 0 would make different maps
    equal.

    Args:
        trained: the network.
        takes_bytes: whether the file normalises images itself.
        opset: version of ONNX's operators; None for the exporter's default.

    Raises:
        UserError: the file rounds a tensor that is not the result of a call, for example inside an attention.
    """
    trained = replace(trained, network=_with_shifted_vectors(trained.network))
    model = quantised.fold_batch_norms(to_onnx(trained, takes_bytes=takes_bytes, opset=opset))
    side, random = trained.preprocessing.img_size, torch.Generator().manual_seed(0)
    images = torch.randint(256, (2, side, side, 3), generator=random, dtype=torch.uint8)
    inputs = input_function(trained, takes_bytes=takes_bytes)(images)
    rounded = _rounded_tensors(quantised.quantise(model, [inputs]))
    values = _compute_tensors(model, inputs, rounded)
    calls = _Recorder(trained.network, input_function(trained, takes_bytes=False)(images))
    tensors: dict[str, tuple[str, ...]] = {}
    not_found = []
    for name in rounded:
        key = calls.find(values[name])
        if key is None:
            not_found.append(name)
        else:
            tensors[key] = (*tensors.get(key, ()), name)
    if not_found:
        raise UserError(
            f"{trained.arch} cannot train for int8: its int8 file rounds {len(not_found)} of {len(rounded)} tensors "
            f"inside functions, for example {not_found[0]}; leave out --int8-epochs, and quantise after training"
        )
    kept_norms = {calls.find(values[name]) for name in values if name not in rounded}  # batch norms that are not folded
    folded_norms = {key: pair for key, pair in calls.norms.items() if pair[0] not in kept_norms}
    order = {key: tensors[key] for key in calls.values if key in tensors}
    return Sites(
        order,
        {key: path for key, (_, path) in folded_norms.items()},
        frozenset(norm for norm, _ in folded_norms.values()),
    )


def learned_scales(trained: Trained, *, takes_bytes: bool = False, opset: int | None = None) -> dict[str, Any]:
    """Return the learned scales of a checkpoint as {tensor of the ONNX graph: (scale, zero point)}.

    Raises:
        UserError: the calls with scales are not those whose results the file rounds.
    """
    sites, scales = find_sites(trained, takes_bytes=takes_bytes, opset=opset), trained.int8 or {}
    if differing := sorted(set(sites.tensors) ^ set(scales)):
        raise UserError(
            f"the scales of {trained.path} do not fit what its int8 file rounds ({len(differing)} differ, for example "
            f"{differing[0]}): give --calibration minmax to find new ones"
        )
    return {name: scales[key] for key, names in sites.tensors.items() for name in names}


class _Recorder:
    """The results of all calls of one forward, and the batch norms that follow convolutions or linear layers.

    Args:
        network: in eval mode.
        images: normalised, (B, 3, H, W).
    """

    def __init__(self, network: nn.Module, images: Tensor) -> None:
        self.values = {INPUT: images}
        self.norms: dict[str, tuple[str, str]] = {}  # {layer: (call of its norm, path of its norm)}
        self._paths = {
            id(module.running_mean): path
            for path, module in network.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
        }
        self._layers: dict[int, tuple[str, Tensor]] = {}  # by id; keeping the tensors alive keeps their ids unique
        with torch.no_grad(), CallHook(self._called):
            network(images)

    def _called(self, key: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is F.batch_norm:
            arguments = {**dict(zip(NORM_ARGUMENTS, args, strict=False)), **kwargs}
            layer, path = self._layers.get(id(arguments["input"])), self._paths.get(id(arguments["running_mean"]))
            if layer is not None and path is not None:
                self.norms[layer[0]] = key, path
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and result.is_floating_point():
            self.values[key] = result.clone()  # a later call may overwrite the result
            if func in WEIGHTED:
                self._layers[id(result)] = key, result
        return result

    def find(self, value: Tensor) -> str | None:
        """Return the key of the first call whose result equals a tensor, or None."""
        limit = TOLERANCE * value.abs().max()
        for key, result in self.values.items():
            if result.shape == value.shape and (result - value).abs().max() <= limit:
                return key
        return None


def _rounded_tensors(model: bytes) -> list[str]:
    """Return the tensors of the float graph that an int8 file rounds, except where rounding changes nothing.

    A map that is cropped, padded or reshaped has the scale of its input, so its values are rounded already.
    """
    import onnx

    graph = onnx.load_from_string(model).graph
    operators = {name: node.op_type for node in graph.node for name in node.output}
    constants = {tensor.name for tensor in graph.initializer}
    tensors = []
    for node in graph.node:
        if node.op_type != "QuantizeLinear" or node.input[0] in constants:
            continue
        name = node.input[0].removesuffix(ROUNDED_SUFFIX)
        if node.input[1] == f"{name}_scale" or operators.get(node.input[0]) in COMPUTING_OPERATORS:
            tensors.append(name)
    return tensors


def _compute_tensors(model: bytes, images: Tensor, wanted: list[str]) -> dict[str, Tensor]:
    """Compute tensors of a float graph: those that are wanted, and the outputs of its batch norms."""
    import onnx
    import onnxruntime

    loaded = onnx.load_from_string(model)
    norms = [node.output[0] for node in loaded.graph.node if node.op_type == "BatchNormalization"]
    names = list(dict.fromkeys([*wanted, *norms]))
    outputs = {"images", *(output.name for output in loaded.graph.output)}
    for name in names:
        if name not in outputs:
            loaded.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    with suppress_output():
        session = onnxruntime.InferenceSession(loaded.SerializeToString(), options, providers=["CPUExecutionProvider"])
        computed = [name for name in names if name != "images"]
        values = session.run(computed, {"images": images.numpy()})
    images_tensor = {"images": images} if "images" in names else {}
    return {**images_tensor, **{name: torch.from_numpy(value) for name, value in zip(computed, values, strict=True)}}


def _with_shifted_vectors(network: nn.Module) -> nn.Module:
    """Return a copy in which random positive values are added to all vectors, such as the weights of norms."""
    copied, random = copy.deepcopy(network).cpu().eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in copied.parameters():
            if weight.ndim == 1:
                weight.add_(0.1 + 0.4 * torch.rand(weight.shape, generator=random))
    return copied
