"""Weights into networks: files and pretrained ones, strictly, with a sentence on what was loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from classification.data.preprocessing import Preprocessing, read
from classification.errors import UserError
from classification.models import known_name, may_be_same
from classification.models.huggingface import folder_of, read_huggingface
from classification.models.others import CLASSES, SEEN, not_ours, seen_in_options
from classification.models.sizes import fit_size
from classification.models.states import Found, State, choose, states_of, with_versions
from classification.system.weight_files import read_checkpoint


@dataclass(frozen=True)
class WeightFile:
    """The weights of a checkpoint file, and what it says of them where it says it.

    Args:
        path: the file.
        states: the state dicts in it, by the keys at which they stand.
        arch: the network's name.
        num_classes: its number of outputs.
        classes: names in order of index.
        seen: what it says of the images' preprocessing.
        unread: keys of a file of other code that say something else, or that nothing can be made of.
        configuration: what a network of Hugging Face is built from.
        int8: scales that --int8-epochs learned: {call of the forward: (scale, zero point)}.
    """

    path: Path
    states: dict[str, State]
    arch: str | None = None
    num_classes: int | None = None
    classes: list[str] | None = None
    seen: dict[str, Any] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    configuration: dict[str, Any] | None = None
    int8: dict[str, tuple[float, int]] | None = None

    def preprocessing(self, default: Preprocessing) -> Preprocessing:
        """Return the preprocessing that the file describes, that of `default` where it says nothing."""
        return read(self.seen, default, f"checkpoint {self.path}")


SEEN_BY_US = ("img_size", "resize", "crop", "interpolation", "mean", "std")


def read_content(path: str | Path) -> Mapping[str, Any]:
    """Read a checkpoint file, or a network of Hugging Face: hf:NAME_OR_FOLDER, or its weights beside its config.json.

    Raises:
        UserError: as `read_checkpoint` and `read_huggingface`.
    """
    if str(path).startswith("hf:"):
        return read_huggingface(str(path).removeprefix("hf:"))
    if folder := folder_of(Path(path)):  # transformers may have named the tensors as earlier versions of it did
        return read_huggingface(str(folder))
    return read_checkpoint(path)


def read_weights(path: str | Path) -> WeightFile:
    """Read weights and their description: a plain state dict, or one under any key, of ours or of other code.

    Raises:
        UserError: as `read_checkpoint`, no weights in it, or a description that makes no sense.
    """
    content = read_content(path)
    states = states_of(content)
    if not states:
        raise UserError(
            f"checkpoint {path} holds no weights: expected a state dict, or one under 'state_dict', 'model' or another "
            "key"
        )
    return describe_file(path, content, states)


def describe_file(path: str | Path, content: Mapping[str, Any], states: dict[str, State]) -> WeightFile:
    """Return what a checkpoint's content says of its weights.

    In files of other code the same keys may say other things, which are left out then and named.

    Raises:
        UserError: a description of ours that makes no sense, or classes that are not numbered from 0.
    """
    plain = set(states) == {""}  # there the network's own tensors may have such names
    said = {key: value for key, value in content.items() if not (plain and isinstance(value, Tensor))}
    ours = "format" in said
    unread = [] if ours else not_ours(said)
    said = said if ours else {**seen_in_options(content), **{k: v for k, v in said.items() if k not in unread}}
    number = said.get("num_classes")
    if isinstance(number, (np.integer, Tensor)) and number.ndim == 0:
        number = number.item()
    for key, value, kind, what in (("arch", said.get("arch"), str, "a name"), ("num_classes", number, int, "a number")):
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise UserError(f"checkpoint {path} is damaged: its {key!r} is not {what}")
    classes = next((_names(path, key, said[key]) for key in CLASSES if said.get(key) is not None), None)
    # Of other code's files, the keys whose meaning is everywhere the same.
    seen = {key: said[key] for key in (SEEN_BY_US if ours else SEEN) if said.get(key) is not None}
    configuration = said.get("configuration") if ours else None
    if not (configuration is None or (isinstance(configuration, dict) and "model_type" in configuration)):
        raise UserError(f"checkpoint {path} is damaged: its 'configuration' is not one of transformers")
    known = (said.get("arch"), number, classes, seen, tuple(unread), configuration)
    weights = WeightFile(Path(path), states, *known, _scales(path, said.get("int8") if ours else None))
    weights.preprocessing(Preprocessing())  # refused now, where it is damaged
    return weights


def _scales(path: str | Path, value: Any) -> dict[str, tuple[float, int]] | None:
    """Return the scales of a checkpoint, or None."""
    if value is None:
        return None
    try:
        found = {str(key): (float(scale), int(zero)) for key, (scale, zero) in value.items()}
    except (AttributeError, TypeError, ValueError):
        found = {"": (0.0, 0)}
    if not all(0 < scale < np.inf and 0 <= zero <= 255 for scale, zero in found.values()):
        raise UserError(f"checkpoint {path} is damaged: its 'int8' is not a set of scales")
    return found


def _names(path: str | Path, key: str, value: Any) -> list[str]:
    """Return class names in order of index: of a list, or of a mapping either way."""
    damaged = f"checkpoint {path} is damaged: its {key!r}"
    value = value.tolist() if isinstance(value, np.ndarray) else value
    if isinstance(value, Mapping):
        pairs = [(name, index) if isinstance(name, str) else (index, name) for name, index in value.items()]
        numbers = {int(index): name for name, index in pairs if isinstance(index, (int, np.integer))}
        if sorted(numbers) != list(range(len(value))):
            raise UserError(f"{damaged} do not number the classes from 0")
        value = [numbers[index] for index in range(len(value))]
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{damaged} is not a list")
    if not all(isinstance(name, str) for name in value):
        raise UserError(f"{damaged} are not names")
    return list(value)


def load_file(
    model: nn.Module,
    path: str | Path | WeightFile,
    *,
    arch: str,
    num_classes: int,
    classes: list[str] | None,
    img_size: int | None = None,
    new_head: bool = False,
) -> str:
    """Load a file into a network, every tensor of it, or refuse.

    Args:
        model: the network, built for `num_classes`.
        path: checkpoint file, or what `read_weights` returned of it.
        arch: the network's name.
        num_classes: its number of classes.
        classes: names in order of index, compared where the file has them too.
        img_size: side of the images that the network will see, in pixels.
        new_head: take a file of other classes too, and leave the head fresh.

    Returns:
        One line that says what was loaded, and where the file was trained on images of another size.

    Raises:
        UserError: another network, class count or class order; it says what differs.
    """
    weights = path if isinstance(path, WeightFile) else read_weights(path)
    path = weights.path
    if weights.arch is not None and not may_be_same(weights.arch, arch) and known_name(weights.arch):
        raise UserError(f"checkpoint {path} holds a {weights.arch}, not a {arch}: change the architecture or the file")
    trained = weights.preprocessing(Preprocessing()).img_size if "img_size" in weights.seen else None
    resized = img_size is not None and trained not in (None, img_size)
    size = f"; trained at {trained} px, it will see {img_size} px (--img-size)" if resized else ""
    if weights.unread:
        size += f"; what it says under {' and '.join(map(repr, weights.unread))} is not understood, and not used"
    if trained is not None:
        fit_size(model, trained)
    found = choose(model, weights.states)
    source = f"checkpoint {path}"
    head = _foreign_head(model.state_dict(), found.state, weights.classes, num_classes, classes)
    if new_head and (fresh := lacking_head(model.state_dict(), found.state, num_classes)):
        load_strictly(model, {**found.state, **fresh}, source, arch)
        return f"{arch}: loaded {len(found.state)} tensors from {source}, which has no head: it is fresh{found}{size}"
    if new_head and head:
        return load_with_new_head(model, found.state, arch, source, head) + str(found) + size
    tune = f": fine-tune it first with mgd train DIR -a {arch} --student-resume {path}"
    if head and (theirs := found.state[head[0]].shape[0]) != num_classes:
        raise UserError(
            f"{source} has {theirs} classes, but this run has {num_classes} (by the shape of {head[0]}){tune}"
        )
    if weights.num_classes is not None and weights.num_classes != num_classes:
        raise UserError(f"{source} has {weights.num_classes} classes, but this run has {num_classes}{tune}")
    if classes is not None and weights.classes is not None:
        _compare_classes(path, weights.classes, classes, tune)
    load_strictly(model, found.state, source, arch)
    order = "" if weights.classes is not None else "; it names no classes, so their order could not be checked"
    return f"{arch}: loaded {len(found.state)} tensors from {path}{found}{order}{size}"


def other_outputs(model: nn.Module, weights: WeightFile, num_classes: int, classes: list[str]) -> int | None:
    """Return the number of outputs of a file of other classes, 0 without any; None where it may be of these classes.

    Args:
        model: the network, built for `num_classes`.
        weights: the file.
        num_classes: of the run.
        classes: of the run.
    """
    if "img_size" in weights.seen:
        fit_size(model, weights.preprocessing(Preprocessing()).img_size)
    found: Found = choose(model, weights.states)
    if lacking_head(model.state_dict(), found.state, num_classes):
        return 0
    head = _foreign_head(model.state_dict(), found.state, weights.classes, num_classes, classes)
    return int(found.state[head[0]].shape[0]) if head and head[0] in found.state else None


def _compare_classes(path: str | Path, theirs: list[str], ours: list[str], tune: str) -> None:
    if theirs == ours:
        return
    for position, (their, our) in enumerate(zip(theirs, ours, strict=False)):
        if their != our:
            same = sorted(theirs) == sorted(ours)
            raise UserError(
                f"the classes of checkpoint {path} {'are in another order' if same else 'differ'}: class {position} "
                f"is {their!r} in the checkpoint, but {our!r} in the data{'' if same else tune}"
            )
    raise UserError(f"checkpoint {path} names {len(theirs)} classes, but the data has {len(ours)}{tune}")


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], source: str, arch: str) -> None:
    """Load every tensor of a network, no more and no less.

    Args:
        model: the network.
        state: its tensors by name.
        source: what they come from, for the messages.
        arch: the network's name, likewise.

    Raises:
        UserError: other tensors, or values that are not finite.
    """
    if not state or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()):
        raise UserError(f"{source} holds no weights")
    own = model.state_dict()
    missing = sorted(set(own) - set(state))
    unexpected = sorted(set(state) - set(own))
    shapes = [name for name in own if name in state and own[name].shape != state[name].shape]
    if not missing and not unexpected and (head := head_names(own, state)):
        theirs, ours = state[head[0]].shape[0], own[head[0]].shape[0]
        raise UserError(f"{source} has {theirs} classes, but this run has {ours} (by the shape of {head[0]})")
    if missing or unexpected or shapes:
        parts = [
            f"{len(names)} {what} (for example {names[0]})"
            for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
            if names
        ]
        raise UserError(f"{source} does not fit {arch}; tensors: {', '.join(parts)}")
    _check_values(model, state, source)
    model.load_state_dict(with_versions(state, model))


def head_names(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """Name the tensors that differ only in their number of rows, the same for all of them; none if more differs."""
    shapes = {n: (state[n].shape, own[n].shape) for n in own if n in state and own[n].shape != state[n].shape}
    rows = {(theirs[:1], ours[:1]) for theirs, ours in shapes.values()}
    alike = all(0 < len(theirs) == len(ours) and theirs[1:] == ours[1:] for theirs, ours in shapes.values())
    return list(shapes) if alike and len(rows) == 1 else []


def _foreign_head(
    own: State, state: State, theirs: list[str] | None, num_classes: int, classes: list[str] | None
) -> list[str]:
    """Name the tensors of a head of other classes; none if it is of these classes, in any order."""
    if head := head_names(own, state):
        return head
    if classes is None or theirs is None or sorted(theirs) == sorted(classes):
        return []
    return _last_with_rows(own, num_classes)


def _last_with_rows(own: State, num_classes: int) -> list[str]:
    rows = [name for name, value in own.items() if value.shape[:1] == (num_classes,)]
    return [name for name in rows if name.rpartition(".")[0] == rows[-1].rpartition(".")[0]]  # the last such module


def lacking_head(own: State, state: State, num_classes: int) -> State:
    """Return a network's own head if a file lacks exactly that, as files of training without labels do."""
    head = _last_with_rows(own, num_classes)
    return {name: own[name] for name in head} if state and set(own) - set(state) == set(head) else {}


def _check_values(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Refuse weights that are not finite, and what cannot be copied into a network."""
    weights = dict(model.named_parameters())
    for name, value in state.items():
        plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
        if not plain or value.is_complex():
            raise UserError(f"{source} has {name} in a form that no network accepts (such as sparse or quantised)")
        value = value.float()  # not every kind of number knows whether it is finite
        bad = ~value.isfinite() if name in weights else value.isnan()
        if bad.any():
            raise UserError(f"{source} has values that are not finite (in {name}): its training had diverged")


def load_with_new_head(model: nn.Module, state: Mapping[str, Tensor], arch: str, source: str, head: list[str]) -> str:
    """Load `state` except for the tensors of a head of other classes, and say so."""
    own = model.state_dict()
    kept = {name: own[name] if name in head else value for name, value in state.items()}
    load_strictly(model, kept, source, arch)
    if not head:
        return f"{arch}: loaded {len(kept)} tensors from {source}"
    theirs, ours = state[head[0]].shape[0], own[head[0]].shape[0]
    swapped = f"{theirs} -> {ours} classes" if theirs != ours else "for other classes"
    return f"{arch}: loaded {len(kept) - len(head)} tensors from {source}; head swapped, {swapped}"
