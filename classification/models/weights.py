"""Load weights into networks strictly, and describe in one line what was loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from classification.data.preprocessing import Preprocessing, read_preprocessing
from classification.errors import UserError
from classification.models import known_name, may_be_same
from classification.models.huggingface import folder_of, read_huggingface
from classification.models.others import CLASS_KEYS, COMMON_KEYS, not_understood, preprocessing_in_options
from classification.models.sizes import fit_size
from classification.models.states import ChosenState, State, choose_state, find_states, with_versions
from classification.system.weight_files import read_checkpoint


@dataclass(frozen=True)
class WeightFile:
    """The weights of a checkpoint file and their description, as far as the file has one.

    Args:
        path: the file.
        states: its state dicts, by key path.
        arch: the network's name.
        num_classes: its number of outputs.
        classes: class names in order of index.
        preprocessing_values: preprocessing of the images, by key.
        ignored_keys: keys of a file of other code that are not understood, and not used.
        configuration: of a Hugging Face network.
        int8: scales learned by --int8-epochs, {call of the forward: (scale, zero point)}.
    """

    path: Path
    states: dict[str, State]
    arch: str | None = None
    num_classes: int | None = None
    classes: list[str] | None = None
    preprocessing_values: dict[str, Any] = field(default_factory=dict)
    ignored_keys: tuple[str, ...] = ()
    configuration: dict[str, Any] | None = None
    int8: dict[str, tuple[float, int]] | None = None

    def preprocessing(self, default: Preprocessing) -> Preprocessing:
        """Return the preprocessing that the file describes, with missing values from `default`."""
        return read_preprocessing(self.preprocessing_values, default, f"checkpoint {self.path}")


OUR_KEYS = ("img_size", "resize", "crop", "interpolation", "mean", "std")


def read_content(path: str | Path) -> Mapping[str, Any]:
    """Read a checkpoint file, or a Hugging Face network: hf:NAME_OR_FOLDER, or a weight file beside its config.json.

    Raises:
        UserError: as `read_checkpoint` and `read_huggingface`.
    """
    if str(path).startswith("hf:"):
        return read_huggingface(str(path).removeprefix("hf:"))
    if folder := folder_of(Path(path)):  # only transformers can rename tensors of its earlier versions
        return read_huggingface(str(folder))
    return read_checkpoint(path)


def read_weights(path: str | Path) -> WeightFile:
    """Read a file's weights, a state dict under any key, and their description.

    Raises:
        UserError: as `read_checkpoint`; or the file has no weights, or a damaged description.
    """
    content = read_content(path)
    states = find_states(content)
    if not states:
        raise UserError(
            f"checkpoint {path} holds no weights: expected a state dict, or one under 'state_dict', 'model' or another "
            "key"
        )
    return describe_file(path, content, states)


def describe_file(path: str | Path, content: Mapping[str, Any], states: dict[str, State]) -> WeightFile:
    """Return the weights of a checkpoint's content with their description.

    In files of other code, the same keys may have other meanings. Such keys are not used; `ignored_keys` names them.

    Raises:
        UserError: the description in one of our files is damaged, or classes are not numbered from 0.
    """
    is_plain = set(states) == {""}  # then tensors of the network may have the names of description keys
    description = {key: value for key, value in content.items() if not (is_plain and isinstance(value, Tensor))}
    is_ours = "format" in description
    ignored_keys = [] if is_ours else not_understood(description)
    if not is_ours:
        understood = {key: value for key, value in description.items() if key not in ignored_keys}
        description = {**preprocessing_in_options(content), **understood}
    num_classes = description.get("num_classes")
    if isinstance(num_classes, (np.integer, Tensor)) and num_classes.ndim == 0:
        num_classes = num_classes.item()
    for key, value, expected_type, what in (
        ("arch", description.get("arch"), str, "a name"),
        ("num_classes", num_classes, int, "a number"),
    ):
        if value is not None and (not isinstance(value, expected_type) or isinstance(value, bool)):
            raise UserError(f"checkpoint {path} is damaged: its {key!r} is not {what}")
    classes = next(
        (_names(path, key, description[key]) for key in CLASS_KEYS if description.get(key) is not None), None
    )
    preprocessing_values = {
        key: description[key] for key in (OUR_KEYS if is_ours else COMMON_KEYS) if description.get(key) is not None
    }
    configuration = description.get("configuration") if is_ours else None
    if not (configuration is None or (isinstance(configuration, dict) and "model_type" in configuration)):
        raise UserError(f"checkpoint {path} is damaged: its 'configuration' is not one of transformers")
    fields = (description.get("arch"), num_classes, classes, preprocessing_values, tuple(ignored_keys), configuration)
    weights = WeightFile(Path(path), states, *fields, _scales(path, description.get("int8") if is_ours else None))
    weights.preprocessing(Preprocessing())  # raises now if it is damaged
    return weights


def _scales(path: str | Path, value: Any) -> dict[str, tuple[float, int]] | None:
    """Return the int8 scales of a checkpoint, or None."""
    if value is None:
        return None
    try:
        scales = {str(key): (float(scale), int(zero)) for key, (scale, zero) in value.items()}
    except (AttributeError, TypeError, ValueError):
        scales = {"": (0.0, 0)}
    if not all(0 < scale < np.inf and 0 <= zero <= 255 for scale, zero in scales.values()):
        raise UserError(f"checkpoint {path} is damaged: its 'int8' is not a set of scales")
    return scales


def _names(path: str | Path, key: str, value: Any) -> list[str]:
    """Return class names in order of index, from a list, {name: index} or {index: name}."""
    message_start = f"checkpoint {path} is damaged: its {key!r}"
    value = value.tolist() if isinstance(value, np.ndarray) else value
    if isinstance(value, Mapping):
        pairs = [(name, index) if isinstance(name, str) else (index, name) for name, index in value.items()]
        numbers = {int(index): name for name, index in pairs if isinstance(index, (int, np.integer))}
        if sorted(numbers) != list(range(len(value))):
            raise UserError(f"{message_start} do not number the classes from 0")
        value = [numbers[index] for index in range(len(value))]
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{message_start} is not a list")
    if not all(isinstance(name, str) for name in value):
        raise UserError(f"{message_start} are not names")
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
    """Load all tensors of a network from a file.

    Args:
        model: the network, built for `num_classes`.
        path: checkpoint file, or the result of `read_weights` for it.
        arch: the network's name.
        num_classes: its number of classes.
        classes: class names in order of index, which must be those of the file if it has names; or None.
        img_size: side of the images in this run, in pixels, for the note.
        new_head: whether to accept a file of other classes, and keep the fresh head.

    Returns:
        One line that says what was loaded, and whether the file was trained on images of another size.

    Raises:
        UserError: the file is of another network, or other classes, or another order; the message says what differs.
    """
    weights = path if isinstance(path, WeightFile) else read_weights(path)
    path = weights.path
    if weights.arch is not None and not may_be_same(weights.arch, arch) and known_name(weights.arch):
        raise UserError(f"checkpoint {path} holds a {weights.arch}, not a {arch}: change the architecture or the file")
    trained_size = (
        weights.preprocessing(Preprocessing()).img_size if "img_size" in weights.preprocessing_values else None
    )
    is_resized = img_size is not None and trained_size not in (None, img_size)
    notes = f"; trained at {trained_size} px, it will see {img_size} px (--img-size)" if is_resized else ""
    if weights.ignored_keys:
        notes += f"; what it says under {' and '.join(map(repr, weights.ignored_keys))} is not understood, and not used"
    if trained_size is not None:
        fit_size(model, trained_size)
    chosen = choose_state(model, weights.states)
    source = f"checkpoint {path}"
    head = _foreign_head(model.state_dict(), chosen.state, weights.classes, num_classes, classes)
    if new_head and (new_tensors := lacking_head(model.state_dict(), chosen.state, num_classes)):
        load_strictly(model, {**chosen.state, **new_tensors}, source, arch)
        return (
            f"{arch}: loaded {len(chosen.state)} tensors from {source}, which has no head: it is fresh{chosen}{notes}"
        )
    if new_head and head:
        return load_with_new_head(model, chosen.state, arch, source, head) + str(chosen) + notes
    advice = f": fine-tune it first with mgd train DIR -a {arch} --student-resume {path}"
    if head and (file_classes := chosen.state[head[0]].shape[0]) != num_classes:
        raise UserError(
            f"{source} has {file_classes} classes, but this run has {num_classes} (by the shape of {head[0]}){advice}"
        )
    if weights.num_classes is not None and weights.num_classes != num_classes:
        raise UserError(f"{source} has {weights.num_classes} classes, but this run has {num_classes}{advice}")
    if classes is not None and weights.classes is not None:
        _compare_classes(path, weights.classes, classes, advice)
    load_strictly(model, chosen.state, source, arch)
    order = "" if weights.classes is not None else "; it names no classes, so their order could not be checked"
    return f"{arch}: loaded {len(chosen.state)} tensors from {path}{chosen}{order}{notes}"


def other_outputs(model: nn.Module, weights: WeightFile, num_classes: int, classes: list[str]) -> int | None:
    """Return the number of outputs of a file of other classes, 0 if it has no head; None if it fits these classes.

    Args:
        model: the network, built for `num_classes`.
        weights: the file.
        num_classes: of the run.
        classes: class names of the run.
    """
    if "img_size" in weights.preprocessing_values:
        fit_size(model, weights.preprocessing(Preprocessing()).img_size)
    chosen: ChosenState = choose_state(model, weights.states)
    if lacking_head(model.state_dict(), chosen.state, num_classes):
        return 0
    head = _foreign_head(model.state_dict(), chosen.state, weights.classes, num_classes, classes)
    return int(chosen.state[head[0]].shape[0]) if head and head[0] in chosen.state else None


def _compare_classes(path: str | Path, file_classes: list[str], data_classes: list[str], advice: str) -> None:
    if file_classes == data_classes:
        return
    for position, (file_class, data_class) in enumerate(zip(file_classes, data_classes, strict=False)):
        if file_class != data_class:
            is_same_set = sorted(file_classes) == sorted(data_classes)
            what = "are in another order" if is_same_set else "differ"
            raise UserError(
                f"the classes of checkpoint {path} {what}: class {position} is {file_class!r} in the checkpoint, but "
                f"{data_class!r} in the data{'' if is_same_set else advice}"
            )
    raise UserError(
        f"checkpoint {path} names {len(file_classes)} classes, but the data has {len(data_classes)}{advice}"
    )


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], source: str, arch: str) -> None:
    """Load the tensors of a network, which must have exactly the network's names and shapes.

    Args:
        model: the network.
        state: its tensors by name.
        source: where they are from, for the messages.
        arch: the network's name, for the messages.

    Raises:
        UserError: names or shapes differ, or values are not finite.
    """
    if not state or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()):
        raise UserError(f"{source} holds no weights")
    model_state = model.state_dict()
    missing = sorted(set(model_state) - set(state))
    unexpected = sorted(set(state) - set(model_state))
    shapes = [name for name in model_state if name in state and model_state[name].shape != state[name].shape]
    if not missing and not unexpected and (head := head_names(model_state, state)):
        file_rows, model_rows = state[head[0]].shape[0], model_state[head[0]].shape[0]
        raise UserError(f"{source} has {file_rows} classes, but this run has {model_rows} (by the shape of {head[0]})")
    if missing or unexpected or shapes:
        parts = [
            f"{len(names)} {what} (for example {names[0]})"
            for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
            if names
        ]
        raise UserError(
            f"{source} does not fit {arch}; tensors: {', '.join(parts)}: change the architecture or the file"
        )
    _check_values(model, state, source)
    model.load_state_dict(with_versions(state, model))


def head_names(model_state: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the head's tensors if only their number of rows differs from the network's, else none."""
    shapes = {
        n: (state[n].shape, model_state[n].shape)
        for n in model_state
        if n in state and model_state[n].shape != state[n].shape
    }
    rows = {(theirs[:1], ours[:1]) for theirs, ours in shapes.values()}
    same_columns = all(0 < len(theirs) == len(ours) and theirs[1:] == ours[1:] for theirs, ours in shapes.values())
    return list(shapes) if same_columns and len(rows) == 1 else []


def _foreign_head(
    model_state: State, state: State, file_classes: list[str] | None, num_classes: int, classes: list[str] | None
) -> list[str]:
    """Return the names of the head's tensors if it is of other classes; none if of the same ones, in any order."""
    if head := head_names(model_state, state):
        return head
    if classes is None or file_classes is None or sorted(file_classes) == sorted(classes):
        return []
    return _last_with_rows(model_state, num_classes)


def _last_with_rows(model_state: State, num_classes: int) -> list[str]:
    rows = [name for name, value in model_state.items() if value.shape[:1] == (num_classes,)]
    return [name for name in rows if name.rpartition(".")[0] == rows[-1].rpartition(".")[0]]  # the last such module


def lacking_head(model_state: State, state: State, num_classes: int) -> State:
    """Return the network's own head if a file lacks only that, as after training without labels; else nothing."""
    head = _last_with_rows(model_state, num_classes)
    return {name: model_state[name] for name in head} if state and set(model_state) - set(state) == set(head) else {}


def _check_values(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Refuse values that are not finite, and tensors that cannot be copied into a network."""
    weights = dict(model.named_parameters())
    for name, value in state.items():
        is_plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
        if not is_plain or value.is_complex():
            raise UserError(f"{source} has {name} in a form that no network accepts (such as sparse or quantised)")
        value = value.float()  # not all number types support `isfinite`
        is_bad = ~value.isfinite() if name in weights else value.isnan()
        if is_bad.any():
            raise UserError(
                f"{source} has values that are not finite (in {name}), as its training diverged: give another file"
            )


def load_with_new_head(model: nn.Module, state: Mapping[str, Tensor], arch: str, source: str, head: list[str]) -> str:
    """Load all tensors except a head of other classes; return one line that says so."""
    model_state = model.state_dict()
    tensors = {name: model_state[name] if name in head else value for name, value in state.items()}
    load_strictly(model, tensors, source, arch)
    if not head:
        return f"{arch}: loaded {len(tensors)} tensors from {source}"
    file_rows, model_rows = state[head[0]].shape[0], model_state[head[0]].shape[0]
    change = f"{file_rows} -> {model_rows} classes" if file_rows != model_rows else "for other classes"
    return f"{arch}: loaded {len(tensors) - len(head)} tensors from {source}; head swapped, {change}"
