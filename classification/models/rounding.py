"""Where the int8 file of a network rounds: asked of the file itself, and found again among the calls of the forward."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from classification.errors import UserError
from classification.models import quantised
from classification.models.exporting import input_of, quiet, to_onnx
from classification.models.fake_quantised import INPUT, NORM, WEIGHTED, Calls, Sites
from classification.models.trained import Trained

CLOSE = 1e-4  # of a tensor's largest value: what two programs may differ by
BEHIND = "_QuantizeLinear_Input"  # which onnxruntime puts behind the name of a rounded output
CHANGING = ("AveragePool", "Resize")  # whose results take the scale of their input, and are rounded all the same


def find_sites(trained: Trained, *, takes_bytes: bool = False, opset: int | None = None) -> Sites:
    """Return where the int8 file of a network rounds.

    Two random images go through the ONNX graph, and through the network; tensors that are equal are the same. For this
    the network is copied and all its vectors are shifted: norms that begin at 0 would make maps equal that are not.

    Args:
        trained: the network.
        takes_bytes: whether the file normalises images itself.
        opset: version of ONNX's operators; None for the exporter's own choice.

    Raises:
        UserError: the file rounds what is no result of a call, as inside an attention.
    """
    trained = replace(trained, network=_shifted(trained.network))
    model = quantised.prepared(to_onnx(trained, takes_bytes=takes_bytes, opset=opset))
    side, random = trained.preprocessing.img_size, torch.Generator().manual_seed(0)
    images = torch.randint(256, (2, side, side, 3), generator=random, dtype=torch.uint8)
    fed = input_of(trained, takes_bytes=takes_bytes)(images)
    rounded = _rounded(quantised.quantise(model, [fed]))
    values = _values(model, fed, rounded)
    seen = _Recorder(trained.network, input_of(trained, takes_bytes=False)(images))
    found: dict[str, tuple[str, ...]] = {}
    lost = []
    for name in rounded:
        key = seen.find(values[name])
        if key is None:
            lost.append(name)
        else:
            found[key] = (*found.get(key, ()), name)
    if lost:
        raise UserError(
            f"{trained.arch} cannot train for int8: its int8 file rounds {len(lost)} of {len(rounded)} tensors inside "
            f"functions, for example {lost[0]}; leave out --int8-epochs, and quantise after training"
        )
    left = {seen.find(values[name]) for name in values if name not in rounded}  # norms that the file keeps
    pairs = {key: pair for key, pair in seen.norms.items() if pair[0] not in left}
    order = {key: found[key] for key in seen.values if key in found}
    return Sites(order, {key: path for key, (_, path) in pairs.items()}, frozenset(norm for norm, _ in pairs.values()))


def handed_over(trained: Trained, *, takes_bytes: bool = False, opset: int | None = None) -> dict[str, Any]:
    """Return {tensor of the ONNX graph: (scale, zero point)} of the scales that a checkpoint holds.

    Raises:
        UserError: its scales belong to other calls than those whose results the file rounds.
    """
    sites, known = find_sites(trained, takes_bytes=takes_bytes, opset=opset), trained.int8 or {}
    if other := sorted(set(sites.tensors) ^ set(known)):
        raise UserError(
            f"the scales of {trained.path} do not fit what its int8 file rounds ({len(other)} differ, for example "
            f"{other[0]}): give --calibration minmax to find new ones"
        )
    return {name: known[key] for key, names in sites.tensors.items() for name in names}


class _Recorder:
    """The results of all calls of one forward, and the batch norms that follow a convolution or a linear layer.

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
        self._layers: dict[int, tuple[str, Tensor]] = {}  # the tensors are kept, so that no other gets their number
        with torch.no_grad(), Calls(self._called):
            network(images)

    def _called(self, key: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is F.batch_norm:
            given = {**dict(zip(NORM, args, strict=False)), **kwargs}
            layer, path = self._layers.get(id(given["input"])), self._paths.get(id(given["running_mean"]))
            if layer is not None and path is not None:
                self.norms[layer[0]] = key, path
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and result.is_floating_point():
            self.values[key] = result.clone()  # a later call may overwrite it
            if func in WEIGHTED:
                self._layers[id(result)] = key, result
        return result

    def find(self, value: Tensor) -> str | None:
        """Return the first call whose result equals a tensor."""
        limit = CLOSE * value.abs().max()
        for key, own in self.values.items():
            if own.shape == value.shape and (own - value).abs().max() <= limit:
                return key
        return None


def _rounded(model: bytes) -> list[str]:
    """Return the tensors of the float graph that an int8 file rounds, except those that keep the steps of their input.

    A map that is cut, padded or reshaped takes the scale of what it is made of: rounding it again changes nothing.
    """
    import onnx

    graph = onnx.load_from_string(model).graph
    made = {name: node.op_type for node in graph.node for name in node.output}
    constants = {tensor.name for tensor in graph.initializer}
    found = []
    for node in graph.node:
        if node.op_type != "QuantizeLinear" or node.input[0] in constants:
            continue
        name = node.input[0].removesuffix(BEHIND)
        if node.input[1] == f"{name}_scale" or made.get(node.input[0]) in CHANGING:
            found.append(name)
    return found


def _values(model: bytes, fed: Tensor, wanted: list[str]) -> dict[str, Tensor]:
    """Return tensors of a float graph: those that are wanted, and what its batch norms return."""
    import onnx
    import onnxruntime

    loaded = onnx.load_from_string(model)
    norms = [node.output[0] for node in loaded.graph.node if node.op_type == "BatchNormalization"]
    names = list(dict.fromkeys([*wanted, *norms]))
    known = {"images", *(output.name for output in loaded.graph.output)}
    for name in names:
        if name not in known:
            loaded.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    with quiet():
        session = onnxruntime.InferenceSession(loaded.SerializeToString(), options, providers=["CPUExecutionProvider"])
        inside = [name for name in names if name != "images"]
        found = session.run(inside, {"images": fed.numpy()})
    given = {"images": fed} if "images" in names else {}
    return {**given, **{name: torch.from_numpy(value) for name, value in zip(inside, found, strict=True)}}


def _shifted(network: nn.Module) -> nn.Module:
    """Return a copy whose vectors, as weights of norms, are larger by something random."""
    copied, random = copy.deepcopy(network).cpu().eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in copied.parameters():
            if weight.ndim == 1:
                weight.add_(0.1 + 0.4 * torch.rand(weight.shape, generator=random))
    return copied
