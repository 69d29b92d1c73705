"""State dicts as others save them: which of those in a file is meant, and its names turned into a network's own."""

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

# Keys under which weights are kept, those first that are meant where several fit; averages come last.
KEYS = (
    "state_dict", "model", "model_state_dict", "model_state", "net", "network", "module", "student", "weights",
    "params", "classifier", "backbone", "encoder", "encoder_q", "online_encoder", "teacher",
)  # fmt: skip
AVERAGES = re.compile(r"(^|[^a-z])(ema|swa|average[ds]?|shadow|momentum)([^a-z]|$)")
# What wrappers put between the names of modules.
WRAPPERS = re.compile(r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
AUXILIARY = re.compile(r"aux", re.IGNORECASE)
DENSENET = re.compile(r"\.(norm|relu|conv)\.([12])\.")  # names of the published files
COUNTS = re.compile(r"(^|\.)total_(ops|params)$")  # what counters of operations add to every module
DEEPEST = 3  # dictionaries within dictionaries


def states_of(content: Mapping[Any, Any]) -> dict[str, State]:
    """Return the state dicts in a file's content by where they are, "" for the content itself, the preferred first."""
    return dict(sorted(_walk(content, "", 0), key=lambda item: _rank(item[0])))


def _walk(content: Mapping[Any, Any], where: str, depth: int) -> Iterator[tuple[str, State]]:
    tensors = {name: _tensor(value) for name, value in content.items() if isinstance(name, str) and _is_array(value)}
    if tensors:
        yield where, tensors
    for key, value in content.items():
        if (
            depth < DEEPEST
            and isinstance(key, str)
            and isinstance(value, Mapping)
            and key not in ("optimizer", "resume")
        ):
            yield from _walk(value, f"{where}.{key}" if where else key, depth + 1)


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind in "fiub")


def _tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    return torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("=")))


def _rank(where: str) -> tuple[bool, int]:
    """Order places: the content itself, then by `KEYS`, then others, then averages."""
    keys = where.split(".") if where else []
    known = max((KEYS.index(key) if key in KEYS else len(KEYS) for key in keys), default=-1)
    return is_average(where), known


def is_average(where: str) -> bool:
    """Return whether weights at this place are an average over the steps of a training."""
    return bool(AVERAGES.search(where.lower()))


@dataclass(frozen=True)
class Found:
    """A state dict of a file, named as the network names its tensors where they are there.

    Args:
        state: the tensors.
        where: the keys at which it stands, "" for the file itself.
        prefix: what stood before the network's own names.
        left: names of tensors that belong to auxiliary heads or to other parts, and were left out.
        others: places of other state dicts that would fit as well.
    """

    state: dict[str, Tensor]
    where: str = ""
    prefix: str = ""
    left: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"under {self.where!r}"] if self.where not in ("", "state_dict") or self.others else []
        if self.others:
            parts.append(f"not those under {', '.join(map(repr, self.others))}")
        if self.left:
            parts.append(f"{len(self.left)} tensors of other parts left out, for example {self.left[0]}")
        return f" ({', '.join(parts)})" if parts else ""


def choose(model: nn.Module, states: Mapping[str, State]) -> Found:
    """Take the state dict that has most of a network's tensors, and name them as the network does.

    Where several have as many, the number of tensors of the network's shapes decides. A prefix is taken off only where
    the network's own names stand behind it.

    Args:
        model: the network.
        states: of `states_of`, at least one.
    """
    own = model.state_dict()
    matched = [(where, *_match(own, state)) for where, state in states.items()]
    most = max(count for _, _, _, count in matched)
    fitting = [entry for entry in matched if entry[3] == most]
    where, prefix, named, _ = fitting[0]
    kept, left = _without_others(own, named, prefix)
    others = tuple(place for place, *_ in fitting[1:]) if most[0] else ()
    return Found(_converted(model, kept), where, prefix, left, others)


def _match(own: State, state: State) -> tuple[str, dict[str, Tensor], tuple[int, int]]:
    """Return the prefix of most of the network's names, the tensors without wrappers, how many names and shapes fit."""
    plain = {WRAPPERS.sub("", name): value for name, value in state.items()}
    if len(plain) < len(state):  # two names that differ by a wrapper alone
        plain = dict(state)
    prefixes: Counter[str] = Counter()
    shapes: Counter[str] = Counter()
    for name, value in plain.items():
        parts = name.split(".")
        for start in range(len(parts)):
            if (there := own.get(".".join(parts[start:]))) is not None:
                prefix = "".join(f"{part}." for part in parts[:start])
                prefixes[prefix] += 1
                shapes[prefix] += there.shape == value.shape
    if not prefixes:
        return "", plain, (0, 0)
    prefix = min(prefixes, key=lambda p: (-prefixes[p], -shapes[p], _rank(p.removesuffix(".")), len(p)))
    if 2 * prefixes[prefix] < len(own):  # chance: another network has some of the names, too
        prefix = ""
    return prefix, plain, (prefixes[prefix], shapes[prefix])


def _without_others(own: State, state: dict[str, Tensor], prefix: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Take the prefix off; leave out what stands beside it, auxiliary heads, and counters that the network lacks."""
    inside = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
    left = [name for name in state if not name.startswith(prefix)]
    beside = _beside(set(own) - set(inside), set(inside), left) if prefix else ""
    if beside:
        inside |= {name[len(beside) :]: state[name] for name in left if name.startswith(beside)}
        left = [name for name in left if not name.startswith(beside)]
    modules = {name.partition(".")[0] for name in own}
    for name in list(inside):
        module = name.partition(".")[0]
        foreign = AUXILIARY.match(module) and module not in modules
        counter = name.endswith(".num_batches_tracked") and f"{name.rpartition('.')[0]}.running_mean" in own
        if name not in own and (foreign or counter or COUNTS.search(name)):
            del inside[name]
            left += [prefix + name] if foreign else []
    for name, value in own.items():
        statistics = f"{name.rpartition('.')[0]}.running_mean"
        if name.endswith("num_batches_tracked") and name not in inside and statistics in inside:
            inside[name] = value.clone()
    return inside, tuple(left)


def _beside(missing: set[str], inside: set[str], left: list[str]) -> str:
    """Return the prefix behind which the head alone stands, "" where there is none: `backbone.` and `head.`."""
    lacking = {name for name in missing if not name.endswith(".num_batches_tracked")}
    prefixes = {name[: -len(own)] for name in left for own in lacking if name.endswith(f".{own}")}
    for prefix in sorted(prefixes):
        behind = {name[len(prefix) :] for name in left if name.startswith(prefix)}
        if lacking <= behind and not behind & inside:
            return prefix
    return ""


def _converted(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Turn names of earlier versions of a network into its own, where that leaves no name over."""
    own = set(model.state_dict())
    if set(state) == own:
        return state
    renamed = {DENSENET.sub(r".\1\2.", name): value for name, value in state.items()}
    if set(renamed) == own:
        return renamed
    if set(published := _by_timm(model, state)) == own:
        return published
    if len(state) != len(own):
        return state
    fresh = copy.deepcopy(model)
    try:
        result = fresh.load_state_dict(OrderedDict(state), strict=False)
    except Exception:  # a network's own conversion raises whatever does not suit it
        return state
    return state if result.missing_keys or result.unexpected_keys else dict(fresh.state_dict())


def _by_timm(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Turn the names of the authors' own files into timm's, where timm knows how to."""
    module = sys.modules.get(type(model).__module__)
    convert = getattr(module, "checkpoint_filter_fn", None)
    if convert is None or not type(model).__module__.startswith("timm."):
        return state
    try:
        return dict(convert(dict(state), model))
    except Exception:  # it raises whatever does not suit it
        return state


def with_versions(state: State, model: nn.Module) -> OrderedDict[str, Tensor]:
    """Return tensors with the versions of the network's modules, which `load_state_dict` of some asks for."""
    versioned = OrderedDict(state)
    versioned._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]
    return versioned
