"""Weights in the forms in which other code saves them, and files that are none."""

from __future__ import annotations

import argparse
import datetime
import io
import pickle
import sys
import tarfile
import types
import zipfile
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from classification import main_base
from classification.errors import UserError
from classification.models import build, known_name, may_be_same
from classification.models.pretrained import load_pretrained
from classification.models.states import choose_state, find_states
from classification.models.weights import load_file, load_strictly, read_weights
from classification.options.teachers import split_files
from classification.system.weight_files import read_checkpoint
from tests.classification.conftest import SMALL, STUDENT

State = dict[str, Tensor]
DATA = Path(__file__).parents[2] / "data"
CLASSES = ["cat", "dog", "eel"]


class Net(nn.Module):
    """Small, and with names that prefixes of others are made of: "model" and "module"."""

    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4))
        self.module = nn.Linear(4, outputs)


def state_of(seed: int = 0, outputs: int = 3) -> State:
    torch.manual_seed(seed)
    return {name: value + seed for name, value in Net(outputs).state_dict().items()}


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: value for name, value in state.items()}


def loaded(content: Any, path: Path, **more: Any) -> tuple[State, str]:
    torch.save(content, path)
    model = Net()
    line = load_file(model, path, arch="net", num_classes=3, classes=CLASSES, **more)
    return model.state_dict(), line


def same(one: State, other: State) -> bool:
    return set(one) == set(other) and all(torch.equal(value, other[name]) for name, value in one.items())


PREFIXES = [
    "module.", "_orig_mod.", "model.", "backbone.", "student.", "encoder.", "module._orig_mod.", "_orig_mod.module.",
    "module.model.", "model.module.", "module._orig_mod.model.backbone.", "net.student.encoder.", "0.",
]  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_are_taken_off_where_the_networks_names_follow(prefix: str, tmp_path: Path) -> None:
    state = state_of()
    assert same(loaded({"state_dict": prefixed(state, prefix)}, tmp_path / "w.pth")[0], state)


@pytest.mark.parametrize(
    "key",
    ["state_dict", "model", "net", "model_state_dict", "network", "state_dict_ema", "model_ema", "student", "any"],
)
def test_weights_are_found_under_any_key(key: str, tmp_path: Path) -> None:
    state = state_of()
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}
    more = {"epoch": 3, "best_acc": torch.tensor(0.7), "optimizer": optimizer}
    got, _ = loaded({**more, key: prefixed(state, "module.")}, tmp_path / "w.pth")
    assert same(got, state)
    assert same(loaded({**more, "checkpoint": {key: state}}, tmp_path / "w.pth")[0], state)


def test_plain_weights_are_taken_before_averages_and_it_is_said(tmp_path: Path) -> None:
    plain, average = state_of(1), state_of(2)
    for one, other in (("state_dict", "state_dict_ema"), ("model", "model_ema"), ("net", "ema")):
        got, line = loaded({other: average, one: plain}, tmp_path / "w.pth")
        assert same(got, plain) and f"under '{one}', not those under '{other}'" in line
    got, line = loaded({"model": {"teacher." + n: v for n, v in average.items()} | prefixed(plain, "student.")},
                       tmp_path / "w.pth")  # fmt: skip
    assert same(got, plain) and "tensors of other parts left out, for example teacher." in line


def test_wrappers_inside_of_names_counters_and_auxiliary_heads_are_no_matter(tmp_path: Path) -> None:
    state = state_of()
    inner = {name.replace("model.", "model._orig_mod."): value for name, value in state.items()}
    assert same(loaded(inner, tmp_path / "w.pth")[0], state)
    without = {name: value for name, value in state.items() if "num_batches" not in name}
    assert same(loaded(without, tmp_path / "w.pth")[0], {**without, "model.1.num_batches_tracked": torch.tensor(0)})
    for head in ("aux1.fc.weight", "AuxLogits.conv0.conv.weight"):
        got, line = loaded({**state, head: torch.zeros(3)}, tmp_path / "w.pth")
        assert same(got, state) and f"left out, for example {head}" in line
    parameters = {name: nn.Parameter(v) if v.is_floating_point() else v for name, v in state.items()}
    assert same(loaded(parameters, tmp_path / "w.pth")[0], state)
    half = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    assert same(
        loaded(half, tmp_path / "w.pth")[0], {name: value.to(state[name].dtype) for name, value in half.items()}
    )


def test_nothing_is_taken_off_blindly(tmp_path: Path) -> None:
    state = state_of()
    deeper = {**state, "model.2.weight": torch.zeros(4)}
    for content in (deeper, prefixed(deeper, "student."), {n: v for n, v in state.items() if n != "module.bias"}):
        with pytest.raises(UserError, match="does not fit net"):
            loaded(content, tmp_path / "w.pth")
    assert choose_state(Net(), {"": state}).state == state  # "model." and "module." are the network's own


def test_names_of_earlier_versions_are_turned_into_the_networks_own() -> None:
    """As the published files of these networks have them."""
    net = torchvision.models.DenseNet(8, (2,), 8, num_classes=3)  # type: ignore[arg-type]
    state = {n.replace("norm1.", "norm.1.").replace("conv2.", "conv.2."): v for n, v in net.state_dict().items()}
    assert set(state) != set(net.state_dict())
    assert same(choose_state(net, find_states(state)).state, dict(net.state_dict()))
    vit = torchvision.models.vision_transformer.MLPBlock(4, 8, 0.0)
    old = {name.replace("0.", "linear_1.").replace("3.", "linear_2."): v for name, v in vit.state_dict().items()}
    assert same(choose_state(vit, {"": old}).state, dict(vit.state_dict()))


class Versioned(Net):
    """As torchvision's MNASNet: its state dict cannot be loaded without its version."""

    _version = 2

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: dict[str, Any], *rest: Any) -> None:
        if metadata.get("version") != 2:
            raise ValueError("version should be set to 2")
        super()._load_from_state_dict(state, prefix, metadata, *rest)


def test_versions_of_modules_are_kept_and_not_asked_for(tmp_path: Path) -> None:
    from classification.data.preprocessing import Preprocessing
    from classification.runs.checkpoint import describe_student

    model = Versioned()
    torch.save(describe_student(model.state_dict(), "net", 3, CLASSES, Preprocessing()), tmp_path / "best.pth")
    Versioned().load_state_dict(torch.load(tmp_path / "best.pth", weights_only=True)["state_dict"])  # plain PyTorch
    again = Versioned()
    load_strictly(again, dict(model.state_dict()), "a file", "net")  # a plain dict has no versions
    assert same(dict(again.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize(
    "named",
    [
        {"classes": CLASSES}, {"classes": tuple(CLASSES)}, {"class_to_idx": {"dog": 1, "cat": 0, "eel": 2}},
        {"classes": {0: "cat", 1: "dog", 2: "eel"}}, {"idx_to_class": {2: "eel", 0: "cat", 1: "dog"}},
        {"class_names": np.array(CLASSES)}, {"classes": CLASSES, "num_classes": torch.tensor(3)},
    ],
)  # fmt: skip
def test_class_names_are_read_in_every_form(named: dict[str, Any], tmp_path: Path) -> None:
    _, line = loaded({"state_dict": state_of(), **named}, tmp_path / "w.pth")
    assert "could not be checked" not in line
    torch.save({"state_dict": state_of(), **named}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="another order"):
        load_file(Net(), tmp_path / "w.pth", arch="net", num_classes=3, classes=CLASSES[::-1])


def test_class_numbers_with_holes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'class_to_idx' do not number the classes from 0"):
        loaded({"state_dict": state_of(), "class_to_idx": {"cat": 0, "dog": 1, "eel": 3}}, tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("resnet18", "torchvision:resnet18", True), ("resnet10t", "timm:resnet10t", True),
        ("ResNet18", "resnet18", True), ("Resnet8", "CIFAR_ResNet8", True),
        ("shufflenet_v2", "torchvision:shufflenet_v2_x1_0", True),
        ("resnet8x4", "cifar_resnet8x4", True), ("timm:resnet10t.c3_in1k", "timm:resnet10t", True),
        ("resnet18", "timm:resnet18", True), ("mobilenet_v2", "mobilenet_v2_mgd", False),
        ("torchvision:mobilenet_v2", "mobilenet_v2_mgd", False), ("resnet18", "resnet34", False),
        ("torchvision:resnet18", "timm:resnet18", False), ("cifar_resnet8_w0.5", "cifar_resnet8_w05", False),
    ],
)  # fmt: skip
def test_a_network_may_have_another_name(one: str, other: str, expected: bool) -> None:
    assert may_be_same(one, other) == may_be_same(other, one) == expected


def test_names_of_others_are_found() -> None:
    assert [known_name(name) for name in ("resnet18", "resnet10t", "alexnet", "resnet8x4", "resnext9")] == [
        "resnet18", "timm:resnet10t", "torchvision:alexnet", "cifar_resnet8x4", None,
    ]  # fmt: skip


def test_what_stands_beside_weights_is_read_where_it_is_harmless(tmp_path: Path) -> None:
    state = state_of()
    beside = {
        "args": argparse.Namespace(lr=0.1, model="net", sizes=[1, 2]),
        "best": np.float64(0.5), "count": np.int64(3), "curve": np.arange(3.0), "where": Path("runs/x"),
        "when": datetime.datetime(2020, 1, 2, 3), "scores": defaultdict(list, a=[1]), "order": OrderedDict(a=1),
        "shape": torch.Size([3]), "torch": torch.__version__, "recent": deque([1, 2], maxlen=2), "done": frozenset([1]),
    }  # fmt: skip
    got, _ = loaded({"model": state, **beside}, tmp_path / "w.pth")
    assert same(got, state)
    content = read_checkpoint(tmp_path / "w.pth")
    assert content["args"].lr == 0.1 and content["best"] == 0.5 and str(content["where"]) == "runs/x"


# -- files that are none


class CfgNode(dict[str, Any]):
    """As yacs has it, which is not needed to read what it wrote."""

    __module__ = "yacs.config"


def test_options_in_dictionaries_of_other_packages_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", types.SimpleNamespace(CfgNode=CfgNode))
    config = CfgNode(lr=0.1)
    config.frozen = True  # type: ignore[attr-defined]
    torch.save({"model": state_of(), "config": config}, tmp_path / "w.pth")
    monkeypatch.undo()
    assert read_checkpoint(tmp_path / "w.pth")["config"]["lr"] == 0.1


class Code:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Path]]:
        return Path.touch, (Path("was_run"),)


def script() -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), buffer)
    return buffer.getvalue()


def torch_saved(content: Any, **how: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **how)
    return buffer.getvalue()


def archive(kind: str) -> bytes:
    buffer = io.BytesIO()
    if kind == "tar":
        with tarfile.open(fileobj=buffer, mode="w") as file:
            file.addfile(tarfile.TarInfo("w.pth"))
    else:
        with zipfile.ZipFile(buffer, "w") as packed:
            packed.writestr("weights/w.pth", b"x")
    return buffer.getvalue()


SAVED = torch_saved(state_of())
NONE: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty.pth": (lambda: b"", "it is empty"),
    "lfs.pth": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS pointer.*git lfs pull"),
    "page.pth": (lambda: b"\n <!doctype HTML><html>", "a web page"),
    "text.pth": (lambda: b"Not Found", "a text file"),
    "zeros.pth": (lambda: bytes(5000), "begins with zeros"),
    "half.pth": (lambda: SAVED[: len(SAVED) // 2], "truncated or damaged"),
    "legacy_half.pth": (
        lambda: torch_saved(state_of(), _use_new_zipfile_serialization=False)[:900], "it is truncated, or a pickle"),
    "half.safetensors": (lambda: to_safetensors(state_of())[:-40], "safetensors file that is truncated"),
    "w.pth.gz": (lambda: b"\x1f\x8b\x08\x00", "packed by gzip: unpack"),
    "w.tar": (lambda: archive("tar"), "tar archive: unpack"),
    "w.zip": (lambda: archive("zip"), "zip archive: unpack"),
    "script.pt": (script, "TorchScript archive.*torch.jit.load"),
    "whole.pth": (lambda: torch_saved(Net()), r"it contains tests\.classification.*Net.*state_dict\(\)"),
    "code.pth": (lambda: torch_saved({"a": Code()}), "never run"),
    "plain.pkl": (lambda: pickle.dumps({"a": Code()}), "never run|a pickle of another format"),
    "keras.h5": (lambda: b"\x89HDF\r\n\x1a\n", "HDF5"),
    "w.npz": (lambda: _npz(), "NumPy arrays"),
    "net.onnx": (lambda: b"\x08\x07\x12\x07pytorch", "ONNX"),
    "graph.pb": (lambda: b"\x0a\x01\xff", "TensorFlow"),
}  # fmt: skip


def _npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(3))
    return buffer.getvalue()


@pytest.mark.parametrize("name", NONE)
def test_the_cause_and_the_next_step_are_said(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content, said = NONE[name]
    (tmp_path / name).write_bytes(content())
    with pytest.raises(UserError, match=f"{name} cannot be read: .*({said})"):
        read_weights(tmp_path / name)
    assert not (tmp_path / "was_run").exists()


def test_safetensors_are_known_by_their_content(tmp_path: Path) -> None:
    state = state_of()
    (tmp_path / "pytorch_model.bin").write_bytes(to_safetensors(state))
    torch.save(state, tmp_path / "w.safetensors")  # and so is the other
    for name in ("pytorch_model.bin", "w.safetensors"):
        model = Net()
        load_file(model, tmp_path / name, arch="net", num_classes=3, classes=CLASSES)
        assert same(dict(model.state_dict()), state)


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html>", SAVED[:300]])
def test_a_broken_file_in_a_cache_is_named(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's cache and that of Hugging Face; there it is the file that a link points to."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    url = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url
    path = tmp_path / "hub" / "checkpoints" / url.rpartition("/")[2]
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"cache cannot be read .{path}: it is .*: delete that file"):
        load_pretrained(nn.Identity(), "resnet18", option="--student-resume")
    blob = tmp_path / "blob"
    blob.write_bytes(content)
    (tmp_path / "model.safetensors").symlink_to(blob)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: str(tmp_path / "model.safetensors"))

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("Error while deserializing header")

    monkeypatch.setattr("timm.create_model", broken)
    with pytest.raises(UserError, match=f"cache cannot be read .{blob}: it is .*: delete that file"):
        load_pretrained(nn.Identity(), "timm:resnet10t", option="--student-resume")


def test_files_with_commas_in_their_names_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lr0.1,wd1e-4").mkdir()
    for name in ("a.pth", "b.pth", "lr0.1,wd1e-4/last.pth", "a.pth,b.pth"):
        Path(name).write_bytes(b"")
    comma = "lr0.1,wd1e-4/last.pth"
    assert split_files(comma, 1) == split_files(comma, 0) == [comma]
    assert split_files(f"a.pth,{comma},b.pth", 3) == ["a.pth", comma, "b.pth"]
    assert split_files("a.pth,b.pth", 2) == ["a.pth", "b.pth"] and split_files("a.pth,b.pth", 1) == ["a.pth,b.pth"]
    assert split_files("gone.pth,a.pth", 2) == ["gone.pth", "a.pth"]


# -- our own formats


@pytest.mark.parametrize("name", ["format3_best.pth", "format3_last.pth", "format4_best.pth"])
def test_files_of_earlier_formats_are_evaluated(
    name: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They were trained on photographs like these, of which they knew all."""
    crop = [] if "4" in name else ["--train-crop", "pad"]  # which format 3 does not keep
    own = ["--output", str(tmp_path)]
    assert main_base.main([str(photos), "-e", "-j", "0", "--student-resume", str(DATA / name), *crop, *own]) == 0
    out = capsys.readouterr().out
    assert "=> student cifar_resnet8_4-4-8" in out and "top-1 100.00" in out


def test_a_run_of_format_3_is_resumed(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    last = tmp_path / "run" / "last.pth"
    last.write_bytes((DATA / "format3_last.pth").read_bytes())
    words = [str(photos), "-a", "cifar_resnet8_4-4-8", *SMALL, "--epochs", "3", "--resume", str(last)]
    assert main_base.main(words) == 0
    content = torch.load(last, weights_only=True)
    assert content["resume"]["epoch"] == 3 and content["format"] == 4 and content["resize"] == 16


def test_a_later_format_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": build(STUDENT, 3).state_dict(), "arch": STUDENT, "format": 5}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"w.pth was written by a newer version of this code, in format 5"):
        read_weights(tmp_path / "w.pth")
