"""Find the state dict for a network in a file of any code, and rename its tensors as the network does."""

from __future__ import annotations

import copy
import re
import sys
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

State = Mapping[str, Tensor]

# Common keys of state dicts. If several fit a network, the first of these is used; averages come last.
STATE_KEYS = (
    "state_dict", "model", "model_state_dict", "model_state", "net", "network", "module", "student", "weights",
    "params", "classifier", "backbone", "encoder", "encoder_q", "online_encoder", "teacher",
)  # fmt: skip
AVERAGE_NAMES = re.compile(r"(^|[^a-z])(ema|swa|average[ds]?|shadow|momentum)([^a-z]|$)")
# Names that wrappers insert between the names of modules.
WRAPPERS = re.compile(r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
AUXILIARY = re.compile(r"aux", re.IGNORECASE)
DENSENET = re.compile(r"\.(norm|relu|conv)\.([12])\.")  # names in torchvision's published files
COUNTS = re.compile(r"(^|\.)total_(ops|params)$")  # buffers that FLOP counters add to every module
MAX_DEPTH = 3  # levels of nested dictionaries that are searched


def find_states(content: Mapping[Any, Any]) -> dict[str, State]:
    """Return {key path: state dict} of all state dicts in a file's content, preferred ones first; "" is the content."""
    return dict(sorted(_walk(content, "", 0), key=lambda item: _sort_key(item[0])))


def _walk(content: Mapping[Any, Any], key_path: str, depth: int) -> Iterator[tuple[str, State]]:
    tensors = {name: _tensor(value) for name, value in content.items() if isinstance(name, str) and _is_array(value)}
    if tensors:
        yield key_path, tensors
    for key, value in content.items():
        if (
            depth < MAX_DEPTH
            and isinstance(key, str)
            and isinstance(value, Mapping)
            and key not in ("optimizer", "resume")
        ):
            yield from _walk(value, f"{key_path}.{key}" if key_path else key, depth + 1)


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind in "fiub")


def _tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    return torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("=")))


def _sort_key(key_path: str) -> tuple[bool, int]:
    """Return the sort key of a key path: first the content itself, then `STATE_KEYS`, then others, then averages."""
    keys = key_path.split(".") if key_path else []
    rank = max((STATE_KEYS.index(key) if key in STATE_KEYS else len(STATE_KEYS) for key in keys), default=-1)
    return is_average(key_path), rank


def is_average(key_path: str) -> bool:
    """Return whether weights under this key path are an average over training steps."""
    return bool(AVERAGE_NAMES.search(key_path.lower()))


@dataclass(frozen=True)
class ChosenState:
    """The state dict that was chosen for a network.

    Args:
        state: its tensors, named as in the network if the network has them.
        key_path: of it in the file, "" for the file's content itself.
        prefix: what was removed from the front of the names.
        left_out: names of the tensors that were left out: auxiliary heads and other parts.
        others: key paths of other state dicts that fit equally well.
    """

    state: dict[str, Tensor]
    key_path: str = ""
    prefix: str = ""
    left_out: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"under {self.key_path!r}"] if self.key_path not in ("", "state_dict") or self.others else []
        if self.others:
            parts.append(f"not those under {', '.join(map(repr, self.others))}")
        if self.left_out:
            parts.append(f"{len(self.left_out)} tensors of other parts left out, for example {self.left_out[0]}")
        return f" ({', '.join(parts)})" if parts else ""


def choose_state(model: nn.Module, states: Mapping[str, State]) -> ChosenState:
    """Choose the state dict with most of a network's tensors, and rename them as in the network.

    If several have equally many, the number of equal shapes decides. A prefix is removed only if names of the network
    follow it.

    Args:
        model: the network.
        states: result of `find_states`, not empty.
    """
    model_state = model.state_dict()
    matches = [(key_path, *_match(model_state, state)) for key_path, state in states.items()]
    best = max(count for _, _, _, count in matches)
    candidates = [entry for entry in matches if entry[3] == best]
    key_path, prefix, named, _ = candidates[0]
    tensors, left_out = _without_other_parts(model_state, named, prefix)
    others = tuple(key_path for key_path, *_ in candidates[1:]) if best[0] else ()
    return ChosenState(_renamed(model, tensors), key_path, prefix, left_out, others)


def _match(model_state: State, state: State) -> tuple[str, dict[str, Tensor], tuple[int, int]]:
    """Match a state dict to a network.

    Returns:
        The most common prefix of the network's names; the tensors without wrappers in their names; how many names, and
        how many shapes, fit with this prefix.
    """
    plain = {WRAPPERS.sub("", name): value for name, value in state.items()}
    if len(plain) < len(state):  # some names differ only by a wrapper
        plain = dict(state)
    prefixes: Counter[str] = Counter()
    shapes: Counter[str] = Counter()
    for name, value in plain.items():
        parts = name.split(".")
        for start in range(len(parts)):
            if (tensor := model_state.get(".".join(parts[start:]))) is not None:
                prefix = "".join(f"{part}." for part in parts[:start])
                prefixes[prefix] += 1
                shapes[prefix] += tensor.shape == value.shape
    if not prefixes:
        return "", plain, (0, 0)
    prefix = min(prefixes, key=lambda p: (-prefixes[p], -shapes[p], _sort_key(p.removesuffix(".")), len(p)))
    if 2 * prefixes[prefix] < len(model_state):  # by chance: the file is of another network that shares a few names
        prefix = ""
    return prefix, plain, (prefixes[prefix], shapes[prefix])


def _without_other_parts(
    model_state: State, state: dict[str, Tensor], prefix: str
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Remove the prefix; leave out tensors without it, auxiliary heads, and counters that the network lacks."""
    body = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
    left_out = [name for name in state if not name.startswith(prefix)]
    head_prefix = _head_prefix(set(model_state) - set(body), set(body), left_out) if prefix else ""
    if head_prefix:
        body |= {name[len(head_prefix) :]: state[name] for name in left_out if name.startswith(head_prefix)}
        left_out = [name for name in left_out if not name.startswith(head_prefix)]
    modules = {name.partition(".")[0] for name in model_state}
    for name in list(body):
        module = name.partition(".")[0]
        is_foreign = AUXILIARY.match(module) and module not in modules
        is_counter = name.endswith(".num_batches_tracked") and f"{name.rpartition('.')[0]}.running_mean" in model_state
        if name not in model_state and (is_foreign or is_counter or COUNTS.search(name)):
            del body[name]
            left_out += [prefix + name] if is_foreign else []
    for name, value in model_state.items():
        statistics = f"{name.rpartition('.')[0]}.running_mean"
        if name.endswith("num_batches_tracked") and name not in body and statistics in body:
            body[name] = value.clone()
    return body, tuple(left_out)


def _head_prefix(missing: set[str], body: set[str], left_out: list[str]) -> str:
    """Return the prefix of the head if body and head have two prefixes, as `backbone.` and `head.`; else ""."""
    lacking = {name for name in missing if not name.endswith(".num_batches_tracked")}
    prefixes = {name[: -len(own)] for name in left_out for own in lacking if name.endswith(f".{own}")}
    for prefix in sorted(prefixes):
        names_after = {name[len(prefix) :] for name in left_out if name.startswith(prefix)}
        if lacking <= names_after and not names_after & body:
            return prefix
    return ""


def _renamed(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of an earlier version of the network, if all names then fit."""
    names = set(model.state_dict())
    if set(state) == names:
        return state
    renamed = {DENSENET.sub(r".\1\2.", name): value for name, value in state.items()}
    if set(renamed) == names:
        return renamed
    if set(converted := _renamed_by_timm(model, state)) == names:
        return converted
    if len(state) != len(names):
        return state
    fresh = copy.deepcopy(model)
    try:
        result = fresh.load_state_dict(OrderedDict(state), strict=False)
    except Exception:  # a network's own conversion may raise anything
        return state
    return state if result.missing_keys or result.unexpected_keys else dict(fresh.state_dict())


def _renamed_by_timm(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of the authors' original files as timm does, if timm can."""
    module = sys.modules.get(type(model).__module__)
    convert = getattr(module, "checkpoint_filter_fn", None)
    if convert is None or not type(model).__module__.startswith("timm."):
        return state
    try:
        return dict(convert(dict(state), model))
    except Exception:  # timm's conversion may raise anything
        return state


def with_versions(state: State, model: nn.Module) -> OrderedDict[str, Tensor]:
    """Add the versions of the network's modules to tensors; `load_state_dict` of some modules needs them."""
    versioned = OrderedDict(state)
    versioned._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]
    return versioned
