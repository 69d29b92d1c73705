"""Whatever a list, a recipe or a checkpoint holds: it is read, or refused in a sentence, and soon.

The suite tries the same few examples every time; FUZZ_EXAMPLES=2000 tries that many new ones.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
import shutil
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from classification import main_mgd
from classification.data.lists import read_list
from classification.errors import UserError
from classification.models import build
from classification.models.weights import load_file
from classification.options.config import parse
from classification.options.parser import build_parser
from classification.options.recipe import STUDENT, TEACHER
from classification.options.terms import Schedule, fields_of
from mgd import Batch, Outputs, Probe
from mgd.losses import LOSSES
from tests.classification.conftest import CLASSES
from tests.classification.conftest import TEACHER as ARCH
from tests.classification.refusals import Place
from tests.mgd.nets import Seen

MANY = "FUZZ_EXAMPLES" in os.environ
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "60"))
SECONDS = 5.0  # of the processor, for one example


def fuzz(share: float = 1.0) -> settings:
    """The settings of a test that tries this share of the examples."""
    return settings(
        max_examples=max(1, round(EXAMPLES * share)),
        derandomize=not MANY,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@contextlib.contextmanager
def soon() -> Iterator[None]:
    start = time.process_time()
    yield
    assert time.process_time() - start < SECONDS


def accepted(read: Callable[[], Any]) -> Any:
    """Return what is read, or None where it is refused; whatever else is raised passes."""
    with soon(), contextlib.suppress(UserError):
        return read()
    return None


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "file"


def pieces(*words: bytes) -> st.SearchStrategy[bytes]:
    """Bytes that are nearly right, as they are made of words of the format, and bytes that are not."""
    return st.lists(st.sampled_from(words) | st.binary(max_size=3), max_size=40).map(b"".join) | st.binary(max_size=200)


# -- lists

LINES = pieces(
    *(b"train/bar/0.png 0\n", b"train/sky/1.png\t2\r\n", b"valid/dot/2.png", b"train", b"/", b"..", b".", b" ", b"\t"),
    *(b"\n", b"\r\n", b"\0", b"0", b"1", b"9999999999", b"-1", b"\xff", b"\xef\xbb\xbf", b"\xef\xbc\x91", b"~", b"#"),
)


@fuzz()
@given(content=LINES, num_classes=st.none() | st.integers(1, 4))
def test_lists(content: bytes, num_classes: int | None, file: Path, photos: Path) -> None:
    file.write_bytes(content)
    for path, label in accepted(lambda: read_list(file, photos, num_classes)) or ():
        assert Path(path).is_file() and Path(path).resolve().is_relative_to(photos.resolve())
        assert 0 <= label < (num_classes or 10**9)


# -- recipes

YAML = pieces(
    *(b"epochs", b"terms", b"teachers", b"student", b"arch", b"kd", b"mgd", b"weight", b": ", b":\n  ", b"\n", b"- "),
    *(b"[", b"]", b"{", b"}", b", ", b"&a ", b"*a", b"!!int ", b"!!python/name:os.system ", b"!!binary ", b"<<: "),
    *(b"1", b"1e-4", b".nan", b"0x", b"1:30", b"2020-01-01", b"'", b'"', b"|\n", b"? ", b"%YAML 1.2\n---\n", b"~"),
)


def read_recipe(file: Path) -> Any:
    return accepted(lambda: parse(["DIR", "--config", str(file)], "main_mgd.py", distillation=True))


@fuzz()
@given(content=YAML)
def test_recipes(content: bytes, file: Path) -> None:
    file.write_bytes(content)
    read_recipe(file)


NUMBERS = st.integers(-3, 200) | st.floats(-2, 2) | st.sampled_from([2**40, 2**70, 1e300, float("nan"), float("inf")])
WORDS = st.text(max_size=4) | st.sampled_from(["1e-4", "resnet18", "a\0", "--lr"])
SCALARS = st.none() | st.booleans() | NUMBERS | WORDS
VALUES = st.recursive(
    SCALARS, lambda some: st.lists(some, max_size=3) | st.dictionaries(SCALARS, some, max_size=3), max_leaves=6
)
ACTIONS = build_parser("main_mgd.py", distillation=True)._actions
FLAGS = sorted(option[2:] for action in ACTIONS for option in action.option_strings if option.startswith("--"))
CHOICES = sorted({str(choice) for action in ACTIONS for choice in action.choices or ()})


def rarely(usual: st.SearchStrategy[Any], odd: st.SearchStrategy[Any] = VALUES) -> st.SearchStrategy[Any]:
    """What is right by its form, and once in a while anything."""
    return st.integers(0, 11).flatmap(lambda number: odd if number == 7 else usual)


def mappings(keys: Iterable[str], values: st.SearchStrategy[Any] = VALUES) -> st.SearchStrategy[Any]:
    return rarely(st.dictionaries(rarely(st.sampled_from(sorted(keys)), SCALARS), values, max_size=2))


LIKELY = rarely(st.integers(0, 3) | st.floats(0, 1) | st.sampled_from(CHOICES) | st.booleans())


def terms_named(names: list[str]) -> st.SearchStrategy[Any]:
    keys = {name: [*fields_of(Schedule), *fields_of(LOSSES[name].Hyper)] for name in names}
    return st.fixed_dictionaries({name: mappings(keys[name], LIKELY) for name in names})


TERMS = st.lists(st.sampled_from([*LOSSES]), max_size=3, unique=True).flatmap(terms_named)
TEACHER_LIST = st.lists(
    mappings(TEACHER, LIKELY).map(lambda t: {**t, "arch": "x"} if isinstance(t, dict) else t), max_size=2
)
PARTS = {"terms": rarely(TERMS), "teachers": rarely(TEACHER_LIST), "student": mappings(STUDENT, LIKELY)}
RECIPES = st.builds(
    lambda options, parts: {**options, **parts} if isinstance(options, dict) else options,
    rarely(st.just({}) | mappings(FLAGS, LIKELY)),
    st.fixed_dictionaries({}, optional=PARTS),
)


def outputs(channels: int) -> Outputs:
    maps = [torch.randn(4, channels, size, size, requires_grad=True) for size in (4, 2)]
    return Outputs(torch.randn(4, 3, requires_grad=True), maps)


@fuzz()
@given(content=RECIPES)
def test_recipes_of_any_values_and_the_terms_that_they_name(content: Any, file: Path) -> None:
    file.write_text(yaml.safe_dump(content, allow_unicode=True))
    args = read_recipe(file)
    for name, spec in getattr(args, "table", {}).items():
        assert all(spec.schedule.at(1.0, 3, epoch) >= 0 for epoch in range(3))
        others = [outputs(8) for _ in args.teachers]
        if others:
            probes = [Probe(teacher) for teacher in others]
            term = None
            with contextlib.suppress(ValueError, TypeError):  # which a run turns into one sentence
                term = spec.kind.build(Probe(outputs(6)), probes, 20, spec.hyper)
            if term is not None:
                term.update(0, Seen([(outputs(6), others)]))
                student = outputs(6)
                loss = term(student, others, Batch(torch.tensor([0, 1, 2, 0]), torch.arange(4)))
                inputs = [student.logits, *student.features, *term.parameters()]
                if loss.requires_grad and loss.isfinite():
                    gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
                    assert all(bool(g.isfinite().all()) for g in gradients if g is not None), name


# -- checkpoints

CHANGES = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4)


def changed_bytes(content: bytes, changes: list[tuple[float, int]], cut: float) -> bytes:
    mutable = bytearray(content)
    for where, value in changes:
        mutable[int(where * (len(mutable) - 1))] = value
    return bytes(mutable[: int(cut * len(mutable))])


def changed_pickle(content: bytes, changes: list[tuple[float, int]]) -> bytes:
    """Change the pickle inside, so that no checksum tells."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as before, zipfile.ZipFile(target, "w") as after:
        for name in before.namelist():
            data = before.read(name)
            after.writestr(name, changed_bytes(data, changes, 1.0) if name.endswith("data.pkl") else data)
    return target.getvalue()


def load(file: Path) -> Any:
    return accepted(lambda: load_file(build(ARCH, 3), file, arch=ARCH, num_classes=3, classes=list(CLASSES)))


@fuzz()
@given(
    name=st.sampled_from(["best.pth", "last.pth"]),
    changes=CHANGES,
    cut=st.just(1.0) | st.floats(0, 1),
    inside=st.booleans(),
)
def test_bytes_of_checkpoints(
    name: str, changes: list[tuple[float, int]], cut: float, inside: bool, file: Path, teacher: Path
) -> None:
    content = teacher.with_name(name).read_bytes()
    file.write_bytes(changed_pickle(content, changes) if inside else changed_bytes(content, changes, cut))
    load(file)


@fuzz()
@given(changes=CHANGES, cut=st.just(1.0) | st.floats(0, 1), head=st.booleans())
def test_bytes_of_safetensors(
    changes: list[tuple[float, int]], cut: float, head: bool, file: Path, teacher: Path
) -> None:
    state = torch.load(teacher, weights_only=True)["state_dict"]
    content = safetensors.torch.save({name: value.contiguous() for name, value in state.items()})
    length = 8 + int.from_bytes(content[:8], "little") if head else len(content)
    path = file.with_suffix(".safetensors")
    path.write_bytes(changed_bytes(content[:length], changes, 1.0) + content[length : int(cut * len(content))])
    load(path)


def test_a_pickle_that_is_left_as_it_is_still_loads(file: Path, teacher: Path) -> None:
    file.write_bytes(changed_pickle(teacher.read_bytes(), []))
    assert "loaded" in load(file)


REMOVE = object()
TENSORS = st.sampled_from([
    torch.zeros(3), torch.tensor(torch.nan), torch.zeros(0), torch.tensor([1 << 40]), torch.ones(3, dtype=torch.cfloat),
    torch.eye(3).to_sparse(), torch.zeros(2, 2, dtype=torch.bool), torch.empty(3, device="meta"),
])  # fmt: skip
FILLED = st.sampled_from([float("nan"), -1, 0, 1e9])
CONTENTS = st.sampled_from([REMOVE, -1, 10**12]) | VALUES | TENSORS | FILLED.map(lambda fill: ("fill", fill))


def changed_part(content: Any, path: list[float], value: Any) -> Any:
    """Replace what lies at `path`, each step of which is a share of the entries; ("fill", x) fills a tensor."""
    if not path or not isinstance(content, (dict, list)) or not content:
        if isinstance(value, tuple):
            return torch.full(content.shape, value[1]).to(content) if isinstance(content, torch.Tensor) else value[1]
        return value
    keys = list(content) if isinstance(content, dict) else list(range(len(content)))
    key = keys[int(path[0] * (len(keys) - 1))]
    inner = changed_part(content[key], path[1:], value)
    if inner is REMOVE:
        del content[key]
    else:
        content[key] = inner
    return content


PATHS = st.lists(st.floats(0, 1), min_size=1, max_size=5)


@fuzz()
@given(path=PATHS, value=CONTENTS)
def test_parts_of_weights(path: list[float], value: Any, file: Path, teacher: Path) -> None:
    torch.save(changed_part(torch.load(teacher, weights_only=True), path, value), file)
    load(file)


@fuzz(1 / 6)
@given(path=PATHS, value=CONTENTS)
def test_parts_of_a_run_to_go_on_with(
    path: list[float], value: Any, short_run: Path, photos: Path, teacher: Path, file: Path, capfd: Any
) -> None:
    root = file.parent / "again"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    content = copy.deepcopy(torch.load(short_run / "last.pth", weights_only=True))
    content["resume"] = changed_part(content["resume"], path, value)
    words = Place(root, photos, teacher, short_run).go_on()
    torch.save(content, root / "run" / "last.pth")
    capfd.readouterr()
    with soon():
        status = main_mgd.main(words)
    error = capfd.readouterr().err
    assert status in (0, 1, 2) and "Traceback" not in error and error.count("\n") == (status != 0), error
