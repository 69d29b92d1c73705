"""Parse the paths of taps: module, its input, its output or an element of that, number of the call, and layout."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mgd.taps.layout import Layout, parse_layout

NAME = re.compile(r"[^@#\[\]]+")  # of a module or an element
_PATH = re.compile(
    rf"^(?P<module>{NAME.pattern})(\[(?P<element>{NAME.pattern})\]|(?P<side>@in))?(#(?P<call>-?\d{{1,9}}))?"
    r"(?P<layout>@first|@last|@tokens(:prefix=\d{1,9}|:grid=\d{1,9}x\d{1,9}){0,2})?$"
)


@dataclass(frozen=True)
class TapPoint:
    """A parsed path: module, its input, its output or an element of that, number of the call, and layout."""

    path: str
    module: nn.Module
    reads_input: bool
    call: int | None  # None: the module must be called exactly once
    layout: Layout
    element: str | None = None  # index or name in what the module returns


def parse_path(model: nn.Module, path: str) -> TapPoint:
    """Parse a path; see `Taps`.

    Raises:
        ValueError: it is malformed, names no module, or one inside of a compiled or scripted network.
    """
    match = _PATH.match(path)
    if match is None:
        forms = "'layer4', 'layer4.2.relu@in' or 'layer4.2.relu@in#-1', with @last behind it where channels are last"
        raise ValueError(
            f"tap path {path!r} is not of the form {forms}, and @tokens or @tokens:prefix=1:grid=14x14 for tokens"
        )
    modules = dict(model.named_modules())
    name = match["module"]
    if name not in modules:
        inner = next((n for n in modules if _plain(n) == name), None)
        if inner is not None:
            _refuse_fused(modules, path, inner)
        names = [n for n in modules if n]
        near = difflib.get_close_matches(name, names, n=4, cutoff=0.3) or names[:4]
        raise ValueError(f"unknown tap path {path!r}: no module {name!r}; nearest are {', '.join(near)}")
    _refuse_fused(modules, path, name)
    call = None if match["call"] is None else int(match["call"])
    layout = parse_layout(match["layout"])
    return TapPoint(path, modules[name], match["side"] is not None, call, layout, match["element"])


def _refuse_fused(modules: Mapping[str, nn.Module], path: str, name: str) -> None:
    """Refuse a module inside of a compiled or scripted one, where hooks are not called."""
    parts = name.split(".")
    for above in ("", *(".".join(parts[:number]) for number in range(1, len(parts)))):
        module = modules[above]
        compiled = hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        if compiled or isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"tap {path!r} lies in a network that was {'compiled' if compiled else 'scripted'} before it was "
                f"tapped, where no tap is reached: tap the network itself, as Taps(network, [{_plain(path)!r}]), and "
                "compile that"
            )


def _plain(path: str) -> str:
    return path.replace("_orig_mod.", "")


def element_of(point: TapPoint, output: Any) -> Any:
    """Return the part of a module's output that a path names: all of it, or an element of a tuple or a mapping."""
    if point.element is None:
        return output
    if isinstance(output, Mapping):
        names = {str(name): value for name, value in output.items()}
    elif isinstance(output, (tuple, list)):
        names = {str(index): value for index, value in enumerate(output)}
    else:
        raise TypeError(
            f"tap {point.path!r}: the module returns a {type(output).__name__}; leave out [{point.element}]"
        )
    if point.element not in names:
        raise ValueError(f"tap {point.path!r}: what the module returns has no such element, but {', '.join(names)}")
    return names[point.element]
