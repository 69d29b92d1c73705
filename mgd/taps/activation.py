"""Find the activation that a network applies to a value, by the operators that read it."""

from __future__ import annotations

from mgd.taps.trace import Trace, Value

ACTIVATIONS = {
    "relu": "ReLU", "relu6": "ReLU6", "silu": "SiLU", "gelu": "GELU", "hardswish": "Hardswish", "mish": "Mish",
    "leaky_relu": "LeakyReLU", "prelu_kernel": "PReLU", "elu": "ELU", "celu": "CELU", "softplus": "Softplus",
    "rrelu_with_noise": "RReLU", "tanh": "Tanh", "sigmoid": "Sigmoid", "hardsigmoid": "Hardsigmoid",
    "hardtanh": "Hardtanh",
}  # fmt: skip
CUTS = ("ReLU", "ReLU6")  # 0 for all negative values
NEARLY_CUTS = ("SiLU", "GELU", "Hardswish", "Mish")  # near 0 for values far below 0
VIEWS = ("view", "_unsafe_view", "permute", "transpose", "t", "clone", "contiguous", "alias", "detach", "_to_copy",
         "dropout", "expand", "reshape", "unsqueeze", "squeeze", "flatten", "_reshape_alias", "native_dropout", "slice",
         "unflatten", "movedim", "written")  # fmt: skip
# Gates of x * gate(x). Sums and products with numbers may come between x and the gate, or after the product.
GATES = {"sigmoid": "SiLU", "hardsigmoid": "Hardswish", "hardtanh": "Hardswish", "clamp": "Hardswish", "tanh": "Mish",
         "erf": "GELU", "gt": "ReLU"}  # fmt: skip
SCALES = ("add", "sub", "mul", "div", "softplus", "_to_copy", "rsub")
CHOICES = ("maximum", "where", "masked_fill")  # between x and 0
COMPARES = ("gt", "ge", "lt", "le")


def activation_of(number: int, graph: Trace, consumers: dict[int, list[Value]]) -> str | None:
    """Return the activation that reads a value, possibly after views, if nothing else reads it; else None."""
    names = set()
    for value in consumers.get(number, []):
        if value.operator in VIEWS:
            names.add(activation_of(value.number, graph, consumers))
        else:
            names.add(_written_out(number, value, graph, consumers) or activation(value))
    return names.pop() if len(names) == 1 else None


def gated(value: Value, graph: Trace) -> tuple[str, int] | None:
    """Return name and x if a value is an activation of several operators, as x * sigmoid(x) or max(x, 0); else None."""
    if value.operator in CHOICES:
        return _chosen(value, graph)
    while value.operator in ("mul", "div") and len(value.parents) == 1:  # by a number
        value = graph.values[value.parents[0]]
    if value.operator != "mul" or len(value.parents) != 2:
        return None
    x, gate = value.parents
    while graph.values[x].operator in ("mul", "div") and len(graph.values[x].parents) == 1:
        x = graph.values[x].parents[0]
    name, scaled = None, False
    while gate > x and len(graph.values[gate].parents) == 1:
        step = graph.values[gate]
        if name is None and step.operator in GATES:
            name = GATES[step.operator]
        elif step.operator not in SCALES:
            return None
        scaled = scaled or (name == "SiLU" and step.operator == "mul")
        gate = step.parents[0]
    if name is None or gate != x:
        return None
    return "GELU" if scaled else name, x  # x * sigmoid(1.7 x)


def _chosen(value: Value, graph: Trace) -> tuple[str, int] | None:
    """Return "ReLU" and x if a value is x where x > 0 and else 0, by `where` or similar operators; else None."""
    x, *others = value.parents
    for number in others:
        other = graph.values[number]
        while other.operator in VIEWS and len(other.parents) == 1:
            other = graph.values[other.parents[0]]
        compared = other.operator in COMPARES and other.constants == (0.0,)
        if other.parents != (x,) or not (compared or other.operator == "zeros_like"):
            return None
    is_zero = value.operator != "masked_fill" or value.constants == (0.0,)
    return ("ReLU", x) if others and is_zero else None


def _written_out(number: int, value: Value, graph: Trace, consumers: dict[int, list[Value]]) -> str | None:
    """Return the activation of several operators to which `value`, which reads x, belongs; else None."""
    while value.operator in (*GATES, *SCALES, *COMPARES, "zeros_like", "detach") and len(value.parents) == 1:
        readers = consumers.get(value.number, [])
        if len(readers) != 1:
            return None
        value = readers[0]
    by_hand = gated(value, graph)
    return by_hand[0] if by_hand and by_hand[1] == number else None


def activation(value: Value) -> str | None:
    """Return the name of the activation that computed a value, or None."""
    name, bounds = value.operator.strip("_"), value.constants
    if name in ("hardtanh", "clamp") and bounds[:1] == (0.0,) and len(bounds) == 2:
        return "ReLU6"
    if (name in ("clamp", "clamp_min") and bounds == (0.0,)) or (name == "threshold" and bounds == (0.0, 0.0)):
        return "ReLU"
    return ACTIVATIONS.get(name)
