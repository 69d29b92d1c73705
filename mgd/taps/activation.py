"""Which activation a network applies to a value, seen by the operators that read it."""

from __future__ import annotations

from mgd.taps.trace import Trace, Value

ACTIVATIONS = {
    "relu": "ReLU", "relu6": "ReLU6", "silu": "SiLU", "gelu": "GELU", "hardswish": "Hardswish", "mish": "Mish",
    "leaky_relu": "LeakyReLU", "prelu_kernel": "PReLU", "elu": "ELU", "celu": "CELU", "softplus": "Softplus",
}  # fmt: skip
CUTS = ("ReLU", "ReLU6")  # 0 for everything negative
NEARLY_CUTS = ("SiLU", "GELU", "Hardswish", "Mish")  # 0 for what is far below 0
VIEWS = ("view", "_unsafe_view", "permute", "transpose", "t", "clone", "contiguous", "alias", "detach", "_to_copy",
         "dropout", "expand", "reshape", "unsqueeze", "squeeze", "flatten", "_reshape_alias", "native_dropout", "slice",
         "unflatten", "movedim", "written")  # fmt: skip


def activation_of(number: int, graph: Trace, consumers: dict[int, list[Value]]) -> str | None:
    """Return the activation that is all that reads a value, views left aside, or None."""
    names = set()
    for value in consumers.get(number, []):
        if value.operator in VIEWS:
            names.add(activation_of(value.number, graph, consumers))
        elif value.operator != "sigmoid" or not _is_swish(number, value, consumers):
            names.add(activation(value) or gated(value, graph))
    return names.pop() if len(names) == 1 else None


def gated(value: Value, graph: Trace) -> str | None:
    """Return "SiLU" where a product is x * sigmoid(x)."""
    if value.operator != "mul" or len(value.parents) != 2:
        return None
    one, other = (graph.values[number] for number in value.parents)
    return "SiLU" if other.operator == "sigmoid" and other.parents == (one.number,) else None


def _is_swish(number: int, sigmoid: Value, consumers: dict[int, list[Value]]) -> bool:
    products = consumers.get(sigmoid.number, [])
    return bool(products) and all(p.operator == "mul" and p.parents == (number, sigmoid.number) for p in products)


def activation(value: Value) -> str | None:
    """Return the name of the activation that computed a value, or None."""
    name, bounds = value.operator.strip("_"), value.constants
    if name == "hardtanh" and bounds[:1] == (0.0,):
        return "ReLU6"
    if name in ("clamp", "clamp_min") and bounds == (0.0,):
        return "ReLU"
    return ACTIVATIONS.get(name)
